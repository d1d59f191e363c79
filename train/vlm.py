"""Stage 2: train the vision-language model on a trained encoder.

sigphi train-vlm --input-csv qa.csv --siglip-checkpoint outputs/siglip --output-dir outputs/vlm
accelerate launch -m sigphi.train.vlm --input-csv qa.csv --siglip-checkpoint outputs/siglip
sigphi train-vlm --recipe vlm-6gb --input-csv qa.csv --siglip-checkpoint outputs/siglip
sigphi train-vlm --input-csv more.csv --vlm-checkpoint outputs/vlm --output-dir outputs/vlm2   # a second round
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, PreTrainedConfig, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.modeling.modeling_sigphi import SigPhiForConditionalGeneration, image_feature_size
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.arguments import (
    DataArguments,
    VlmModelArguments,
    VlmTrainingArguments,
    check_best_metric,
    check_evaluation,
    check_launch,
)
from sigphi.train.attention import choose_attn_implementation
from sigphi.train.callbacks import LooksAtImageCallback, watched_figures, watched_rows
from sigphi.train.checkpoints import loading, pinned_revision, read_config, read_encoder
from sigphi.train.collators import VlmCollator
from sigphi.train.data import distinct_images, load_data
from sigphi.train.errors import UserError, run_command
from sigphi.train.evaluation import evaluate_folder, only_unseen, results_table
from sigphi.train.feature_cache import cached_features, check_folder
from sigphi.train.fingerprints import digest, tensor_parts
from sigphi.train.images import decode_images
from sigphi.train.optimization import check_optimization
from sigphi.train.packing import PackingCollator, choose_packing, packed_row_length
from sigphi.train.parser import parse_arguments
from sigphi.train.precision import tower_dtype, weights_dtype
from sigphi.train.prompts import context_length, prepare_tokenizer, tokenized_rows
from sigphi.train.push import check_base, push_run
from sigphi.train.qlora import build_vlm, load_language_model
from sigphi.train.records import durable_name, write_training_data
from sigphi.train.replay_file import recorded_options
from sigphi.train.report import write_loss_curve
from sigphi.train.resumable import check_output_dir, sole_folder
from sigphi.train.second_round import checkpoint_config, load_checkpoint, settle
from sigphi.train.sharding import storage_dtype
from sigphi.train.trainers import VlmTrainer
from sigphi.train.vlm_evaluation import encode_images

logger = logging.getLogger(__name__)

RECIPES = tuple(
    Path(__file__).parent / "recipes" / f"{name}.yaml" for name in ("vlm-6gb", "vlm-12gb", "vlm-24gb", "h200")
)

# Of an evaluation during training; the last two where held-out questions are watched.
FIGURES = ("loss", "image_gain", "class_accuracy")


def check_models(arguments: VlmModelArguments) -> PreTrainedConfig:
    """
    Check that both models are there and of the right kind, before any weights load.

    Args:
        arguments (`VlmModelArguments`): settled options, see [`settle`].

    Returns:
        `PreTrainedConfig`: the language model's.

    Raises:
        UserError: naming the option, its value and the remedy.
    """
    if arguments.vlm_checkpoint is not None:
        return checkpoint_config(arguments).text_config
    encoder = read_config(arguments.siglip_checkpoint, "--siglip-checkpoint", SiglipResNetConfig.model_type)
    language = read_config(arguments.language_model, "--language-model", revision=arguments.language_model_revision)
    if language.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"--language-model {arguments.language_model} is a {language.model_type!r} model, no causal LM."
        )
    if language.get_text_config() is not language:
        raise UserError(
            f"--language-model {arguments.language_model} is a {language.model_type!r} model, which has more parts "
            f"than a language model: give one of text alone."
        )
    cells = encoder.vision_config.grid_size**2
    side = round(arguments.num_image_tokens**0.5)
    if side * side != arguments.num_image_tokens or not 1 <= arguments.num_image_tokens <= cells:
        raise UserError(
            f"--num-image-tokens must be 1 or a square up to {cells}, the cells of the encoder's feature map, got "
            f"{arguments.num_image_tokens}."
        )
    return language


def build_processor(arguments: VlmModelArguments) -> SigPhiProcessor:
    """The encoder's image processor and the language model's tokenizer, prepared for images; or a VLM's own."""
    if arguments.vlm_checkpoint is not None:
        with loading(f"--vlm-checkpoint {arguments.vlm_checkpoint}: its processor"):
            return SigPhiProcessor.from_pretrained(arguments.vlm_checkpoint)
    with loading(f"--language-model {arguments.language_model}: its tokenizer"):
        revision = arguments.language_model_revision or "main"
        tokenizer = prepare_tokenizer(
            AutoTokenizer.from_pretrained(arguments.language_model, revision=revision, trust_remote_code=False)
        )
    with loading(f"--siglip-checkpoint {arguments.siglip_checkpoint}: its processor"):
        image_processor = SiglipResNetProcessor.from_pretrained(arguments.siglip_checkpoint).image_processor
    return SigPhiProcessor(image_processor, tokenizer, num_image_tokens=arguments.num_image_tokens)


def build_model(
    model_arguments: VlmModelArguments,
    arguments: VlmTrainingArguments,
    processor: SigPhiProcessor,
    attn_implementation: str,
) -> SigPhiForConditionalGeneration:
    """The VLM that the options describe, in the precision of training; a base on the Hub is pinned to its commit."""
    if model_arguments.vlm_checkpoint is not None:
        dtype = weights_dtype(arguments)
        with loading(f"--vlm-checkpoint {model_arguments.vlm_checkpoint}"):
            model = load_checkpoint(model_arguments, dtype, attn_implementation, arguments.device)
    else:
        model = _new_model(model_arguments, arguments, processor, attn_implementation)
    base = model.config.base_language_model
    if base is not None:
        revision = model.config.base_language_model_revision
        model.config.base_language_model_revision = pinned_revision(base, revision)
    return model


def _new_model(
    model_arguments: VlmModelArguments,
    arguments: VlmTrainingArguments,
    processor: SigPhiProcessor,
    attn_implementation: str,
) -> SigPhiForConditionalGeneration:
    encoder = read_encoder(model_arguments.siglip_checkpoint, dtype=tower_dtype(weights_dtype(arguments)))
    language_model = load_language_model(
        model_arguments,
        # Full training needs float32 master weights; the arithmetic is in 16 bits by autocast all the same.
        torch.float32 if model_arguments.tuning == "full" else weights_dtype(arguments),
        attn_implementation,
        arguments.device,
        storage_dtype(arguments, weights_dtype(arguments)),
    )
    return build_vlm(encoder.vision_model, language_model, processor.tokenizer, model_arguments)


def collator_for(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    pixels: torch.Tensor,
    arguments: VlmModelArguments,
    tokens_per_row: int | None = None,
) -> VlmCollator:
    """
    A collator that gives images, or what the frozen image tower says of them, see [`image_features`].

    Args:
        pixels (`torch.ByteTensor` of shape `(images, 3, height, width)`): decoded images.
        tokens_per_row (`int`, *optional*): of packed rows; without it each question has a row of its own.

    Raises:
        UserError: if the file of the features cannot be written.
    """
    given: dict[str, Any] = {"images": pixels, "processor": processor}
    if arguments.image_cache == "on":
        given = {"image_features": image_features(model, processor, pixels, arguments.image_cache_dir)}
    pad_token_id = processor.tokenizer.pad_token_id
    if tokens_per_row is None:
        return VlmCollator(pad_token_id, **given)
    image_token_id = processor.image_token_id
    return PackingCollator(pad_token_id, image_token_id=image_token_id, tokens_per_row=tokens_per_row, **given)


def image_features(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    pixels: torch.Tensor,
    folder: str | None = None,
    batch_size: int = 256,
) -> torch.Tensor:
    """
    What the projector reads of each image, from a file; see [`cached_features`].

    Returns:
        `torch.Tensor` of shape `(images, num_image_tokens, feature_size)`: as of [`encode_images`].

    Raises:
        UserError: if the file cannot be written.
    """
    tower, num_tokens = model.model.vision_tower, model.config.num_image_tokens
    about = {
        "kind": "image",
        "images": digest(tensor_parts({"pixels": pixels})),
        "tower": digest(tensor_parts(tower.state_dict())),
        "config": tower.config.to_dict(),
        "processor": json.loads(processor.image_processor.to_json_string()),
        "num_image_tokens": num_tokens,
    }
    shape = (len(pixels), num_tokens, image_feature_size(model.config))
    dtype = torch.float32 if num_tokens == 1 else tower.dtype  # an embedding is normalised in float32
    parts = torch.arange(len(pixels)).split(batch_size)
    return cached_features(
        "--image-cache",
        folder,
        about,
        shape,
        dtype,
        lambda: ((rows.tolist(), encode_images(model, processor, pixels[rows], batch_size)) for rows in parts),
    )


def check_lengths(rows: list[dict[str, Any]], dataset: datasets.Dataset, longest: float, option: str) -> None:
    """Raise a [`UserError`] naming the first row that is longer than the language model's context."""
    for row, question in zip(rows, dataset["question"], strict=True):
        length = len(row["prompt_ids"]) + len(row["answer_ids"])
        if length > longest:
            raise UserError(
                f"{option}: the question {question[:60]!r} and its answer have {length} tokens, the language model "
                f"reads at most {longest}. Shorten or remove the row."
            )


def row_length(
    model: VlmModelArguments,
    training: VlmTrainingArguments,
    language_config: PreTrainedConfig,
    rows: list[dict[str, Any]],
    option: str,
) -> int | None:
    """
    The longest row of packed questions, or `None` where each question has a row of its own.

    Args:
        model, training: the options.
        language_config (`PreTrainedConfig`): of the language model.
        rows: of [`tokenized_rows`].
        option (`str`): what names the rows to the user.

    Raises:
        UserError: if the options ask for packing that cannot work, see [`choose_packing`] and [`packed_row_length`].
    """
    longest = max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows)
    if not choose_packing(model, training, language_config, longest):
        return None
    if training.tokens_per_batch == 0:
        return training.tokens_per_row
    return packed_row_length(training.tokens_per_batch, training.tokens_per_row, longest, option)


def choose_watched(data: datasets.DatasetDict, seed: int, arguments: VlmTrainingArguments) -> datasets.Dataset | None:
    """
    The held-out rows for [`LooksAtImageCallback`], or `None` where there are none or none are wanted.

    Raises:
        UserError: if `--stop-if-blind` has nothing to judge by.
    """
    if arguments.eval_samples == 0:
        return None
    watched = watched_rows(data["eval"], arguments.eval_samples, seed) if "eval" in data else []
    if len(watched) > 0:
        return watched
    reason = "no two held-out images of other classes have a question whose answer can be checked"
    if arguments.stop_if_blind:
        raise UserError(f"--stop-if-blind: {reason}. Raise --eval-fraction or --eval-samples, or leave it out.")
    logger.warning("whether the model looks at its image is not watched: %s", reason)
    return None


def rebuild_trainer(options: dict[str, Any], **changes: Any) -> VlmTrainer:
    """
    The trainer of `main` without its data, for a step that is replayed.

    Args:
        options (`dict`): those of the trainer in `main`.
        changes: options of the training that are to be others.
    """
    model_arguments = VlmModelArguments(**options["model"])
    arguments = VlmTrainingArguments(**options["training"] | changes)
    check_models(model_arguments)
    processor = build_processor(model_arguments)
    model = build_model(model_arguments, arguments, processor, options["attn_implementation"])
    return VlmTrainer(model=model, args=arguments, processing_class=processor)


def main(argv: list[str] | None = None) -> None:
    """`sigphi train-vlm`: options, data, model, training, artifact, evaluation."""
    model_arguments, data_arguments, arguments = parse_arguments(
        [VlmModelArguments, DataArguments, VlmTrainingArguments], argv, "sigphi train-vlm", recipes=RECIPES
    )
    check_launch(arguments)
    check_evaluation(data_arguments, arguments)
    check_best_metric(arguments, FIGURES)
    check_optimization(arguments)
    model_arguments = settle(model_arguments)
    check_output_dir(arguments)
    language_config = check_models(model_arguments)
    if arguments.push_to_hub and model_arguments.tuning == "lora":
        check_base(durable_name(model_arguments.language_model), "--push-to-hub")
    set_seed(arguments.seed)
    data = load_data(data_arguments)
    if "eval" in data:
        data["eval"] = only_unseen(data["eval"], model_arguments.starts_from)
    watched = choose_watched(data, data_arguments.split_seed, arguments)
    check_best_metric(arguments, ["loss"] if watched is None else ["loss", *watched_figures(watched)])
    everything = datasets.concatenate_datasets(list(data.values()))
    images, positions = distinct_images(everything)
    pixels = decode_images(images, range(len(images)))
    if model_arguments.image_cache == "on":
        check_folder("--image-cache", model_arguments.image_cache_dir)
    processor = build_processor(model_arguments)
    rows = tokenized_rows(processor, everything, positions)
    option = f"--input-csv {data_arguments.input_csv}"
    check_lengths(rows, everything, context_length(language_config), option)
    tokens_per_row = row_length(model_arguments, arguments, language_config, rows, option)
    attention = choose_attn_implementation(
        model_arguments.attn_implementation, language_config, tokens_per_row is not None, arguments.fp16
    )
    model = build_model(model_arguments, arguments, processor, attention)
    # The other processes wait, and then read the file that the first one has written.
    with arguments.main_process_first(desc="features of the images"):
        collator = collator_for(model, processor, pixels, model_arguments, tokens_per_row)
    num_train = len(data["train"])
    trainer = VlmTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows[:num_train]),
        eval_dataset=datasets.Dataset.from_list(rows[num_train:]) if "eval" in data else None,
        data_collator=collator,
        processing_class=processor,
        options={
            "stage": "vlm",
            "model": recorded_options(model_arguments),
            "training": recorded_options(arguments),
            "attn_implementation": attention,
        },
    )
    looks = None
    if watched is not None:
        looks = LooksAtImageCallback(trainer, processor, watched, data_arguments.split_seed)
        trainer.add_callback(looks)
    folder = Path(arguments.output_dir)
    with sole_folder(trainer, folder):  # until the model is there with all that belongs to it
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # what is pushed is the whole folder, when it is complete
        if trainer.is_world_process_zero():
            made_from = {"language_model": (model_arguments.language_model, model_arguments.language_model_revision)}
            if model_arguments.vlm_checkpoint is None:
                made_from["siglip_checkpoint"] = (model_arguments.siglip_checkpoint, None)
            kind = "encoder" if model_arguments.vlm_checkpoint is None else "vlm_checkpoint"
            earlier = {kind: model_arguments.starts_from}
            write_training_data(folder, data["train"], data_arguments, made_from=made_from, **earlier)
            write_loss_curve(trainer.state.log_history, folder)
    if trainer.is_world_process_zero():
        # The other processes end well: one that fails takes this one with it before it has said why.
        if looks is not None and looks.is_blind and arguments.stop_if_blind:
            raise UserError(
                f"--stop-if-blind: {looks.finding()}\nThe model is saved in {folder}. Evaluate the encoder first; if "
                f"that is sound, train longer or raise --projector-learning-rate."
            )
        if "eval" in data:
            del model, trainer  # the artifact is loaded anew, beside nothing
            notes = {"image_source": durable_name(data_arguments.images)}
            sys.stdout.write(results_table(evaluate_folder(str(folder), data["eval"], notes)))
        if arguments.push_to_hub:
            sys.stdout.write(push_run(folder, arguments))


__all__ = ["build_model", "check_models", "main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.vlm")
