"""Stage 1: train the SigLIP encoder.

sigphi train-siglip --input-csv qa.csv --output-dir outputs/siglip
sigphi train-siglip --recipe cpu-small --input-csv qa.csv --output-dir outputs/siglip
accelerate launch -m sigphi.train.siglip --input-csv qa.csv --output-dir outputs/siglip
torchrun --nproc_per_node 2 -m sigphi.train.siglip --use_cpu --input-csv qa.csv --output-dir outputs/siglip
"""

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, SiglipImageProcessor, set_seed
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_STANDARD_MEAN

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig, SiglipResNetVisionConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, SiglipResNetVisionModel
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.train.arguments import (
    EncoderDataArguments,
    SiglipModelArguments,
    SiglipTrainingArguments,
    check_best_metric,
    check_duplicates,
    check_evaluation,
    check_launch,
)
from sigphi.train.checkpoints import loading, pinned_revision, read_config, read_encoder
from sigphi.train.collators import SiglipCollator, preprocess
from sigphi.train.data import distinct_images
from sigphi.train.encoder_data import EncoderData, load_encoder_data
from sigphi.train.encoder_evaluation import class_embeddings, class_texts, embed_images, pool_texts
from sigphi.train.encoder_options import EncoderEvaluationArguments, sample_images
from sigphi.train.errors import UserError, run_command
from sigphi.train.evaluation import evaluate_folder, evaluate_pairs_folder, results_table
from sigphi.train.metrics import top1_accuracy
from sigphi.train.optimization import check_optimization
from sigphi.train.pairs import text_key
from sigphi.train.parser import parse_arguments
from sigphi.train.push import SourceArguments, check_sources, push_run
from sigphi.train.records import durable_name, write_training_data
from sigphi.train.replay_file import recorded_options
from sigphi.train.report import write_loss_curve
from sigphi.train.resumable import check_output_dir, sole_folder
from sigphi.train.sharding import SAVE_TEXT_TOWER, check_options
from sigphi.train.text_tower import cached_text_features, text_tower_of, token_ids
from sigphi.train.trainers import SiglipTrainer
from sigphi.train.whitening import freeze_stem, whiten_stem, whiten_text_projection

logger = logging.getLogger(__name__)

# Patches of so many images tell how pixels hang together.
WHITENING_IMAGES = 5000

RECIPES = tuple(
    Path(__file__).parent / "recipes" / f"{name}.yaml"
    for name in ("cpu-small", "resnet50-32", "resnet50-224-pretrained")
)

# Of an evaluation during training; the last one where the images have labels.
FIGURES = ("loss", "zero_shot_top1")


def build_encoder(
    arguments: SiglipModelArguments, config: SiglipResNetConfig, device: torch.device | None = None
) -> SiglipResNetModel:
    """
    The encoder that the options describe; without a text tower where training reads what it says from a file.

    Args:
        arguments (`SiglipModelArguments`): the options.
        config (`SiglipResNetConfig`): of [`encoder_config`].
        device (`torch.device`, *optional*): of the text tower, by default the CPU.

    Raises:
        UserError: if the text tower cannot be read.
    """
    # The tower is read apart, so that a new encoder starts from the tower's own weights, in any precision.
    towerless = copy.deepcopy(config)
    towerless.include_text_tower = False
    if arguments.siglip_checkpoint is None:
        model = _new_encoder(arguments, towerless)
    else:
        model = read_encoder(arguments.siglip_checkpoint, config=towerless)
    if not arguments.caches_texts:
        tower: Any = text_tower_of(config, arguments.siglip_checkpoint).load(arguments.text_tower_dtype, device)
        model.text_model.language_model = tower.requires_grad_(arguments.train_text_tower)
    is_exact = not arguments.caches_texts and arguments.text_tower_dtype == "float32"
    _include_text_tower(model, config, is_exact and _saves_text_tower(arguments, config))
    return model


def complete_encoder(model: SiglipResNetModel, arguments: SiglipModelArguments, config: SiglipResNetConfig) -> None:
    """
    Give a trained encoder the frozen text tower that its folder has to hold, if any, in the tower's own precision.

    Args:
        model (`SiglipResNetModel`): of [`build_encoder`].
        arguments, config: as there.
    """
    if _saves_text_tower(arguments, config) and not model.config.include_text_tower:
        model.text_model.language_model = text_tower_of(config, arguments.siglip_checkpoint).load()
        _include_text_tower(model, config, True)


def _saves_text_tower(arguments: SiglipModelArguments, config: SiglipResNetConfig) -> bool:
    return config.include_text_tower or arguments.train_text_tower or arguments.save_text_tower


def _include_text_tower(model: SiglipResNetModel, config: SiglipResNetConfig, included: bool) -> None:
    """Whether the model is saved with its text tower, and where its config says that the tower is."""
    model.config.include_text_tower = included
    # The tower inside an encoder may have been trained: without it, nothing may point to the one that it came from.
    is_nowhere = config.include_text_tower and not included
    model.config.text_model_name_or_path = None if is_nowhere else config.text_model_name_or_path


def encoder_config(arguments: SiglipModelArguments) -> SiglipResNetConfig:
    """
    The configuration of the encoder that the options describe, before any weights load.

    Raises:
        UserError: if a tower cannot be read or is of another kind.
    """
    if arguments.siglip_checkpoint is not None:
        return read_config(arguments.siglip_checkpoint, "--siglip-checkpoint", SiglipResNetConfig.model_type)
    text_config = read_config(
        arguments.text_model, "--text-model", revision=arguments.text_model_revision
    ).get_text_config()
    return SiglipResNetConfig(
        logit_bias_init_value=arguments.logit_bias_init,
        vision_config=_vision_config(arguments),
        text_config=text_config,
        projection_dim=arguments.projection_dim,
        text_pooling=arguments.text_pooling,
        text_layer=arguments.text_layer,
        text_model_name_or_path=durable_name(arguments.text_model),
        text_model_revision=pinned_revision(arguments.text_model, arguments.text_model_revision),
        include_text_tower=False,
    )


def _new_encoder(arguments: SiglipModelArguments, config: SiglipResNetConfig) -> SiglipResNetModel:
    model = SiglipResNetModel(config)
    if arguments.vision_model is not None:
        with loading(f"--vision-model {arguments.vision_model}"):
            model.vision_model = SiglipResNetVisionModel.from_pretrained(
                arguments.vision_model, config=config.vision_config
            )
    return model


def _vision_config(arguments: SiglipModelArguments) -> SiglipResNetVisionConfig:
    shape = {
        "stem": arguments.stem,
        "image_size": arguments.image_size,
        "projection_dim": arguments.projection_dim,
    }
    if arguments.vision_model is None:
        return SiglipResNetVisionConfig(
            layer_type=arguments.layer_type,
            embedding_size=arguments.embedding_size,
            hidden_sizes=arguments.hidden_sizes,
            depths=arguments.depths,
            downsample_in_first_stage=arguments.downsample_in_first_stage,
            downsampling=arguments.downsampling,
            **shape,
        )
    pretrained = read_config(arguments.vision_model, "--vision-model", "resnet", SiglipResNetVisionConfig.model_type)
    names = ["layer_type", "embedding_size", "hidden_sizes", "depths", "hidden_act", "num_channels"]
    names += ["downsample_in_first_stage", "downsample_in_bottleneck"]
    names += ["downsampling"] if isinstance(pretrained, SiglipResNetVisionConfig) else []
    return SiglipResNetVisionConfig(**{name: getattr(pretrained, name) for name in names}, **shape)


def encoder_processor(arguments: SiglipModelArguments) -> SiglipResNetProcessor:
    """The processor of the encoder that the options describe; its tokenizer knows where texts are cut."""
    if arguments.siglip_checkpoint is not None:
        with loading(f"--siglip-checkpoint {arguments.siglip_checkpoint}: its processor"):
            processor = SiglipResNetProcessor.from_pretrained(arguments.siglip_checkpoint)
        processor.tokenizer.model_max_length = arguments.max_text_length
        return processor
    with loading(f"--text-model {arguments.text_model}: its tokenizer"):
        revision = arguments.text_model_revision or "main"
        tokenizer = AutoTokenizer.from_pretrained(arguments.text_model, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        # The text tower reads the mask, not the id, so that any token may fill the gaps.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = arguments.max_text_length
    pretrained = arguments.vision_model is not None
    image_processor = SiglipImageProcessor(
        size={"height": arguments.image_size, "width": arguments.image_size},
        image_mean=IMAGENET_DEFAULT_MEAN if pretrained else IMAGENET_STANDARD_MEAN,
        image_std=IMAGENET_DEFAULT_STD if pretrained else IMAGENET_STANDARD_MEAN,
    )
    return SiglipResNetProcessor(image_processor, tokenizer)


def distinct_texts(texts: Iterable[str]) -> dict[str, str]:
    """One spelling of each text by its [`text_key`], sorted by it, whatever the order and number of `texts`."""
    spellings = {text_key(text): text for text in sorted(set(texts), reverse=True)}
    return dict(sorted(spellings.items()))


def cache_texts(
    collator: SiglipCollator,
    texts: Iterable[str],
    config: SiglipResNetConfig,
    arguments: SiglipModelArguments,
    device: torch.device | None = None,
) -> None:
    """
    Give `collator` what the frozen text tower says of each distinct text, see [`cached_text_features`].

    The first rows of its `text_features` are those of [`distinct_texts`] in that order; the texts of the classes,
    which evaluations during training need, follow.
    """
    spellings = distinct_texts(texts)
    spellings |= {key: text for key, text in distinct_texts(class_texts()).items() if key not in spellings}
    tokens = token_ids(collator.processor.tokenizer, list(spellings.values()))
    tower = text_tower_of(config, arguments.siglip_checkpoint)
    collator.text_features = cached_text_features(
        tower, config, tokens, arguments.text_tower_dtype, arguments.text_cache_dir, device
    )
    collator.text_rows = {key: row for row, key in enumerate(spellings)}


def encoder_collator(
    data: EncoderData,
    config: SiglipResNetConfig,
    processor: SiglipResNetProcessor,
    arguments: SiglipModelArguments,
    device: torch.device | None = None,
) -> SiglipCollator:
    """
    The collator for the rows of `data`, with what the frozen text tower says of their texts where that is cached.

    Args:
        data (`EncoderData`): of [`load_encoder_data`].
        config (`SiglipResNetConfig`): of [`encoder_config`].
        processor (`SiglipResNetProcessor`): of [`encoder_processor`].
        arguments (`SiglipModelArguments`): the options.
        device (`torch.device`, *optional*): where the text tower runs, if it has to; by default the CPU.
    """
    collator = SiglipCollator(processor, data.images, arguments.max_text_length)
    if arguments.caches_texts:
        cache_texts(collator, data.texts(), config, arguments, device)
    return collator


def start_text_projection(model: SiglipResNetModel, collator: SiglipCollator, texts: Iterable[str]) -> None:
    """
    [`whiten_text_projection`] of a new encoder, by all `texts`, whether they are in a file or not.

    Raises:
        UserError: if all of them are the same text, so that there is nothing to compare.
    """
    spellings = distinct_texts(texts)
    if len(spellings) < 2:
        raise UserError(
            f"every image has the same text, {' '.join(spellings)[:60]!r}: the loss compares texts, so that two "
            "different ones are needed."
        )
    if collator.text_features is not None:
        features = collator.text_features[: len(spellings)]
    else:
        features = pool_texts(model, collator.processor, list(spellings.values()))
    whiten_text_projection(model, features)


def start_stem(model: SiglipResNetModel, collator: SiglipCollator, image_indices: Sequence[int]) -> None:
    """[`whiten_stem`] of a new encoder, by images that are spread over those of training."""
    step = max(1, len(image_indices) // WHITENING_IMAGES)
    images = collator.images[torch.tensor(image_indices[::step][:WHITENING_IMAGES])]
    whiten_stem(model.vision_model, preprocess(collator.processor, images))


def zero_shot_metric(
    rows: datasets.Dataset, collator: SiglipCollator, batch_size: int
) -> Callable[[SiglipResNetModel], dict[str, float]]:
    """What the Trainer adds to each evaluation: zero-shot accuracy on the images of `rows`."""
    batches, labels = torch.tensor(rows["image_index"]).split(batch_size), torch.tensor(rows["label"])
    features = None if collator.text_features is None else collator.features_of(class_texts())

    def metric(model: SiglipResNetModel) -> dict[str, float]:
        parts = [embed_images(model, collator.processor, collator.images[batch], batch_size) for batch in batches]
        embeds = torch.cat(parts)  # (images, dim)
        classes = class_embeddings(model, collator.processor, features=features)  # (classes, dim)
        return {"zero_shot_top1": top1_accuracy(embeds @ classes.t(), labels)}

    return metric


def encoder_to_train(
    model_arguments: SiglipModelArguments, arguments: SiglipTrainingArguments, config: SiglipResNetConfig
) -> SiglipResNetModel:
    """[`build_encoder`], laid out in memory as training wants it, with what stays as it is frozen."""
    model = build_encoder(model_arguments, config, arguments.device)
    if model_arguments.whiten_stem:
        freeze_stem(model.vision_model)
    if arguments.channels_last:
        model.vision_model.to(memory_format=torch.channels_last)
    return model


def rebuild_trainer(options: dict[str, Any], **changes: Any) -> SiglipTrainer:
    """
    The trainer of `main` without its data, for a step that is replayed.

    Args:
        options (`dict`): those of the trainer in `main`.
        changes: options of the training that are to be others.
    """
    model_arguments = SiglipModelArguments(**options["model"])
    arguments = SiglipTrainingArguments(**options["training"] | changes)
    model = encoder_to_train(model_arguments, arguments, encoder_config(model_arguments))
    return SiglipTrainer(model=model, args=arguments, processing_class=encoder_processor(model_arguments))


def main(argv: list[str] | None = None) -> None:
    """`sigphi train-siglip`: options, data, model, training, artifact, evaluation."""
    model_arguments, data_arguments, arguments = parse_arguments(
        [SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments],
        argv,
        "sigphi train-siglip",
        recipes=RECIPES,
    )
    check_launch(arguments)
    check_evaluation(data_arguments, arguments)
    check_duplicates(data_arguments, arguments)
    check_best_metric(arguments, FIGURES)
    check_optimization(arguments)
    check_output_dir(arguments)
    config, processor = encoder_config(model_arguments), encoder_processor(model_arguments)
    adds_tower = model_arguments.caches_texts and _saves_text_tower(model_arguments, config)
    check_options(arguments, {SAVE_TEXT_TOWER: adds_tower})
    if arguments.push_to_hub and not _saves_text_tower(model_arguments, config):
        check_sources(config, SourceArguments(), "--push-to-hub")
    data = load_encoder_data(data_arguments, processor.image_processor)
    eval_rows = data.rows.get("eval")
    has_labels = eval_rows is not None and "label" in eval_rows.column_names
    check_best_metric(arguments, FIGURES if has_labels else FIGURES[:1])
    # The other processes wait, and then read the file that the first one has written.
    with arguments.main_process_first(desc="features of the texts"):
        collator = encoder_collator(data, config, processor, model_arguments, arguments.device)
    set_seed(arguments.seed)  # here, so that a run that has to embed the texts starts from the same weights
    model = encoder_to_train(model_arguments, arguments, config)
    if model_arguments.siglip_checkpoint is None:  # a checkpoint's projection is trained already
        start_text_projection(model, collator, data.texts())
    if model_arguments.whiten_stem:
        start_stem(model, collator, data.rows["train"]["image_index"])
    batch_size = arguments.per_device_eval_batch_size
    trainer = SiglipTrainer(
        model=model,
        args=arguments,
        train_dataset=data.rows["train"],
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
        extra_evaluation=zero_shot_metric(eval_rows, collator, batch_size) if has_labels else None,
        options={
            "stage": "siglip",
            "model": recorded_options(model_arguments),
            "training": recorded_options(arguments),
        },
    )
    folder = Path(arguments.output_dir)
    with sole_folder(trainer, folder):  # until the model is there with all that belongs to it
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        if arguments.should_save:
            complete_encoder(model, model_arguments, config)
        trainer.save_model(_internal_call=True)  # what is pushed is the whole folder, when it is complete
        if trainer.is_world_process_zero():
            write_training_data(folder, data.source["train"], data_arguments, made_from=_models(model_arguments))
            write_loss_curve(trainer.state.log_history, folder)
    if not trainer.is_world_process_zero():
        return
    if eval_rows is not None:
        del model, trainer  # the artifact is loaded anew, beside nothing
        sys.stdout.write(results_table(_evaluate(str(folder), data.source, data_arguments)))
    if arguments.push_to_hub:
        sys.stdout.write(push_run(folder, arguments))


def _models(arguments: SiglipModelArguments) -> dict[str, tuple[str | None, str | None]]:
    """What the encoder was made from, for its record."""
    if arguments.siglip_checkpoint is not None:
        return {"siglip_checkpoint": (arguments.siglip_checkpoint, None)}
    text_model = (arguments.text_model, arguments.text_model_revision)
    return {"text_model": text_model, "vision_model": (arguments.vision_model, None)}


def _evaluate(folder: str, source: datasets.DatasetDict, arguments: EncoderDataArguments) -> dict[str, Any]:
    if arguments.dataset is not None:
        return evaluate_pairs_folder(folder, source["eval"], {"dataset": durable_name(arguments.dataset)})
    probe = sample_images(distinct_images(source["train"])[0], EncoderEvaluationArguments.probe_size)
    images = durable_name(arguments.images)
    notes = {"probe": f"{images}, those of training", "image_source": images}
    return evaluate_folder(folder, source["eval"], notes, probe=probe)


__all__ = ["RECIPES", "build_encoder", "complete_encoder", "encoder_config", "encoder_processor", "main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.siglip")
