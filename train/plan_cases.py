"""The trainings that `sigphi plan` looks at: options and data, read as the training commands read them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import datasets
import numpy as np
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.arguments import (
    DataArguments,
    EncoderDataArguments,
    SiglipModelArguments,
    SiglipTrainingArguments,
    VlmModelArguments,
    VlmTrainingArguments,
    check_evaluation,
)
from sigphi.train.checkpoints import read_config
from sigphi.train.costs import (
    Costs,
    SiglipBatch,
    SiglipSetup,
    VlmBatch,
    VlmSetup,
    siglip_costs,
    vlm_costs,
)
from sigphi.train.data import distinct_images, load_data
from sigphi.train.encoder_data import encoder_source
from sigphi.train.errors import UserError
from sigphi.train.evaluation import only_unseen
from sigphi.train.images import decode_images
from sigphi.train.memory import Speed
from sigphi.train.packing import (
    PackedBatches,
    QuestionSizes,
    packed_row_length,
    packed_shape,
    question_sizes,
)
from sigphi.train.padding import padding_share, random_batches
from sigphi.train.pairs import text_key
from sigphi.train.prompts import context_length, prepare_tokenizer, tokenized_rows
from sigphi.train.second_round import checkpoint_config, encoder_of, settle
from sigphi.train.siglip import distinct_texts, encoder_config, encoder_processor
from sigphi.train.text_tower import length_batches, token_ids
from sigphi.train.vlm import check_lengths, check_models, choose_watched, row_length

# Options in other words than their fields'.
_FLAGS = {"per_device_train_batch_size": "--batch-size"}


@dataclass(frozen=True)
class _Case:
    """
    A training: its options and the sizes of its data.

    Args:
        model, training: the options.
        lengths (`np.ndarray` of shape `(rows,)`, int): tokens of each question with its answer, or of each text.
        num_train, num_eval (`int`): questions (VLM) or images (encoder).
        num_images (`int`): distinct images of both parts.
        image_bytes (`int`): of a decoded image that stays in memory.
    """

    model: Any
    training: Any
    lengths: np.ndarray
    num_train: int
    num_eval: int
    num_images: int
    image_bytes: int

    @cached_property
    def batches(self) -> list[np.ndarray]:
        """The rows of an epoch's batches, in an order as good as any."""
        return random_batches(self.num_train, self.training.per_device_train_batch_size, self.training.seed)

    @property
    def steps_an_epoch(self) -> int:
        """Updates of the weights in a pass over the data, as the Trainer counts them."""
        return max(-(-len(self.batches) // self.training.gradient_accumulation_steps), 1)

    @property
    def steps(self) -> int:
        """Updates of the weights in all."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        return int(np.ceil(self.training.num_train_epochs * self.steps_an_epoch))

    def changed(self, options: dict[str, Any]) -> Self:
        """The same training with other options."""
        model, training = copy.copy(self.model), copy.copy(self.training)
        for name, value in options.items():
            setattr(model if name in {field.name for field in fields(model)} else training, name, value)
        return replace(self, model=model, training=training)


@dataclass(frozen=True)
class VlmCase(_Case):
    """
    A training of the VLM.

    Args:
        prompts (`np.ndarray` of shape `(rows,)`, int): tokens of each question.
        encoder, text: the configs of the parts.
        tokenizer: the language model's, prepared.
        sizes (`QuestionSizes`): of all questions.
        packs (`bool`): whether rows hold several questions.
    """

    prompts: np.ndarray
    encoder: SiglipResNetConfig
    text: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    sizes: QuestionSizes
    packs: bool

    @cached_property
    def batches(self) -> list[np.ndarray]:
        """The questions of an epoch's batches, in an order as good as any."""
        budget = self.training.tokens_per_batch
        if budget == 0:
            return super().batches
        sizes = self.sizes[range(self.num_train)]
        length = self._row_length
        batches = PackedBatches(sizes, length, budget // length, seed=self.training.seed)
        return [np.array(batch) for batch in batches]

    @property
    def _row_length(self) -> int:
        training = self.training
        if training.tokens_per_batch == 0:
            return training.tokens_per_row
        longest = int(self.lengths.max())
        return packed_row_length(training.tokens_per_batch, training.tokens_per_row, longest, "the CSV")

    @cached_property
    def shapes(self) -> np.ndarray:
        """Rows, length of the longest, images and tokens of each batch, `(batches, 4)`."""
        if not self.packs:
            lengths = [self.lengths[rows] for rows in self.batches]
            return np.array([(len(rows), rows.max(), len(rows), rows.sum()) for rows in lengths])
        return np.array([packed_shape(self.sizes[rows], self._row_length) for rows in self.batches])

    def costs(self, speed: Speed | None = None) -> Costs:
        """What it needs of its device."""
        setup = VlmSetup(
            self.model,
            self.training,
            self.encoder,
            self.text,
            self.tokenizer,
            self.caches_features,
            self.num_eval > 0,
            self.packs,
        )
        return vlm_costs(setup, self.batch, speed)

    @property
    def caches_features(self) -> bool:
        """Whether the image tower runs once an image."""
        return self.model.image_cache == "on"

    @property
    def batch(self) -> VlmBatch:
        """The one of an epoch with most positions, with as many images and answer tokens as any."""
        answers = self.lengths - self.prompts
        rows, length, _, _ = self.shapes[self.shapes[:, :2].prod(1).argmax()].tolist()
        return VlmBatch(
            rows=rows,
            length=length,
            images=int(self.shapes[:, 2].max()),
            supervised=max(int(answers[questions].sum()) for questions in self.batches),
            longest_prompt=int(self.prompts.max()),
            longest=int(self.lengths.max()),
        )

    @property
    def num_features(self) -> int:
        """How many a cache holds."""
        return self.num_images

    @property
    def base_model(self) -> str:
        """The language model's folder or Hub id."""
        return self.model.language_model

    @property
    def padding(self) -> float:
        """The share of the positions of an epoch that is padding."""
        return 1.0 - float(self.shapes[:, 3].sum() / self.shapes[:, :2].prod(1).sum())

    @property
    def mean_share(self) -> float:
        """The work of a mean batch, as a share of that of the largest."""
        positions = self.shapes[:, :2].prod(1)
        return float(positions.mean() / positions.max())

    def saved_parts(self, costs: Costs) -> list[str]:
        """The parts that a checkpoint holds."""
        base = [part for part in costs.weights if part.startswith("language model")]
        return [part for part in costs.weights if self.model.tuning == "full" or part not in base]

    def remedies(self) -> list[list[dict[str, Any]]]:
        """Changes that save memory, in families; within one from the mildest to the strongest."""
        families = [smaller_batches(self.training)]
        if self.training.tokens_per_batch > 0:
            families = [smaller_budgets(self.training, int(self.lengths.max()))]
        if not self.training.gradient_checkpointing:
            families.append([_CHECKPOINTING])
        if not self.training.bf16 and self.training.has_bfloat16:
            families.append([{"bf16": True}])
        if self.model.tuning == "full":
            families.append(
                [{"tuning": "lora"}, *([{"tuning": "lora", "bits": 4}] if is_bitsandbytes_available() else [])]
            )
        elif self.model.bits > 4 and is_bitsandbytes_available():
            families.append([{"bits": bits} for bits in (8, 4) if bits < self.model.bits])
        if self.num_eval > 0:
            families.append(smaller_evaluations(self.training))
        return families


@dataclass(frozen=True)
class SiglipCase(_Case):
    """
    A training of the encoder.

    Args:
        texts (`list[list[int]]`): for each image its texts, as rows of `lengths`.
        encoder: its config.
    """

    texts: Sequence[Sequence[int]]
    encoder: SiglipResNetConfig

    def costs(self, speed: Speed | None = None) -> Costs:
        """What it needs of its device."""
        return siglip_costs(self.setup, self.batch, speed)

    @property
    def setup(self) -> SiglipSetup:
        """What the costs depend on beside the batch."""
        return SiglipSetup(self.model, self.training, self.encoder, self.num_eval > 0)

    @property
    def caches_features(self) -> bool:
        """Whether the text tower runs once a text."""
        return self.setup.caches_features

    @property
    def batch(self) -> SiglipBatch:
        """The largest of an epoch."""
        return SiglipBatch(
            images=len(self.batches[0]),
            texts=max(len(texts) for texts in self._texts_of_batches),
            length=int(self.lengths.max()),
            all_texts=len(self.lengths),
        )

    @cached_property
    def _texts_of_batches(self) -> list[np.ndarray]:
        return [np.unique(np.concatenate([self.texts[image] for image in rows])) for rows in self.batches]

    @property
    def num_features(self) -> int:
        """How many a cache holds."""
        return len(self.lengths)

    @property
    def base_model(self) -> str:
        """The text tower's folder or Hub id."""
        return self.encoder.text_model_name_or_path or str(self.model.siglip_checkpoint)

    @property
    def padding(self) -> float:
        """The share of the tokens that is padding: of the texts of an epoch's batches, or of those that are cached."""
        if not self.caches_features:
            return padding_share(self.lengths, self._texts_of_batches)
        batches = length_batches(self.lengths.tolist())
        return padding_share(self.lengths, [np.array(rows) for rows in batches])

    @property
    def mean_share(self) -> float:
        """The work of a mean batch, as a share of that of the largest."""
        return float(np.mean([len(rows) for rows in self.batches])) / self.batch.images

    def saved_parts(self, costs: Costs) -> list[str]:
        """The parts that a checkpoint holds."""
        keeps = self.encoder.include_text_tower or self.model.train_text_tower or self.model.save_text_tower
        return [part for part in costs.weights if keeps or part != "text tower"]

    def remedies(self) -> list[list[dict[str, Any]]]:
        """Changes that save memory, in families; within one from the mildest to the strongest."""
        # Smaller parts, not smaller batches: the loss goes on comparing all pairs.
        size = self.training.micro_batch_size or self.training.per_device_train_batch_size
        families: list[list[dict[str, Any]]] = [
            [{"micro_batch_size": size // 2**k} for k in range(1, size.bit_length())]
        ]
        if not self.training.gradient_checkpointing:
            families.append([{"gradient_checkpointing": True}])
        if not self.training.bf16 and self.training.has_bfloat16:
            families.append([{"bf16": True}])
        if self.model.train_text_tower:
            families.append([{"train_text_tower": False}])
        if self.num_eval > 0:
            families.append(smaller_evaluations(self.training))
        return families


# As `VlmTrainingArguments` completes it.
_CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def smaller_batches(training: Any) -> list[dict[str, Any]]:
    """Batches of a half, a quarter, ..., accumulated so that an update sees as many rows as before."""
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return [
        {"per_device_train_batch_size": size // 2**k, "gradient_accumulation_steps": accumulated * 2**k}
        for k in range(1, size.bit_length())
    ]


def smaller_budgets(training: Any, longest: int) -> list[dict[str, Any]]:
    """As [`smaller_batches`], of a half, a quarter, ... of the positions, as long as a question fits."""
    budget, accumulated = training.tokens_per_batch, training.gradient_accumulation_steps
    return [
        {"tokens_per_batch": budget // 2**k, "gradient_accumulation_steps": accumulated * 2**k}
        for k in range(1, budget.bit_length())
        if budget // 2**k >= longest
    ]


def smaller_evaluations(training: Any) -> list[dict[str, Any]]:
    """Evaluation batches of a half, a quarter, ..."""
    size = training.per_device_eval_batch_size
    return [{"per_device_eval_batch_size": size // 2**k} for k in range(1, size.bit_length())]


def as_options(changes: dict[str, Any]) -> str:
    """Changes of fields as words of a command line."""
    words = []
    for name, value in changes.items():
        if not isinstance(value, dict):  # that one follows from another option
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
            words.append(f"{flag} {str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


Case = VlmCase | SiglipCase


def read_vlm_case(model: VlmModelArguments, data_arguments: DataArguments, training: VlmTrainingArguments) -> VlmCase:
    """
    The training that `sigphi train-vlm` would start with these options.

    Raises:
        UserError: as `sigphi train-vlm` does before any weights load.
    """
    check_evaluation(data_arguments, training)
    model = settle(model)
    language_config = check_models(model)
    text = language_config.get_text_config()
    encoder, processor = _encoder_and_processor(model)
    data = load_data(data_arguments)
    if "eval" in data:
        data["eval"] = only_unseen(data["eval"], model.starts_from)
    choose_watched(data, data_arguments.split_seed, training)
    everything = datasets.concatenate_datasets(list(data.values()))
    images, positions = distinct_images(everything)
    rows = tokenized_rows(processor, everything, positions)
    option = f"--input-csv {data_arguments.input_csv}"
    check_lengths(rows, everything, context_length(language_config), option)
    prompts = np.array([len(row["prompt_ids"]) for row in rows])
    return VlmCase(
        model=model,
        training=training,
        lengths=prompts + np.array([len(row["answer_ids"]) for row in rows]),
        num_train=len(data["train"]),
        num_eval=len(everything) - len(data["train"]),
        num_images=len(images),
        image_bytes=decode_images(images, [0]).nbytes,
        prompts=prompts,
        encoder=encoder,
        text=text,
        tokenizer=processor.tokenizer,
        sizes=question_sizes(rows, processor.image_token_id),
        packs=row_length(model, training, language_config, rows, option) is not None,
    )


def _encoder_and_processor(model: VlmModelArguments) -> tuple[SiglipResNetConfig, SigPhiProcessor]:
    """Of settled options: the config of the encoder, and what prepares questions and images."""
    if model.vlm_checkpoint is not None:
        return encoder_of(checkpoint_config(model)), SigPhiProcessor.from_pretrained(model.vlm_checkpoint)
    encoder = read_config(model.siglip_checkpoint, "--siglip-checkpoint", SiglipResNetConfig.model_type)
    tokenizer = prepare_tokenizer(_tokenizer(model.language_model, model.language_model_revision))
    image_processor = SiglipResNetProcessor.from_pretrained(model.siglip_checkpoint).image_processor
    return encoder, SigPhiProcessor(image_processor, tokenizer, num_image_tokens=model.num_image_tokens)


def _tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--language-model {name}: its tokenizer cannot be read ({reason}).") from error


def read_siglip_case(
    model: SiglipModelArguments, data_arguments: EncoderDataArguments, training: SiglipTrainingArguments
) -> SiglipCase:
    """
    The training that `sigphi train-siglip` would start with these options.

    Raises:
        UserError: as `sigphi train-siglip` does before any weights load.
    """
    check_evaluation(data_arguments, training)
    encoder = encoder_config(model)
    processor = encoder_processor(model)
    source, make_rows = encoder_source(data_arguments)
    texts_of = {name: make_rows(part)[0]["texts"][:] for name, part in source.items()}
    of_all = [texts for rows in texts_of.values() for texts in rows]
    spellings = distinct_texts(text for texts in of_all for text in texts)
    number = {key: position for position, key in enumerate(spellings)}
    tokens = token_ids(processor.tokenizer, list(spellings.values()))
    size = processor.image_processor.size
    return SiglipCase(
        model=model,
        training=training,
        lengths=np.array([len(ids) for ids in tokens]),
        num_train=len(texts_of["train"]),
        num_eval=len(of_all) - len(texts_of["train"]),
        num_images=len(of_all),
        image_bytes=3 * size["height"] * size["width"] if data_arguments.image_store == "memory" else 0,
        texts=[[number[text_key(text)] for text in texts] for texts in of_all],
        encoder=encoder,
    )


__all__ = ["Case", "SiglipCase", "VlmCase", "as_options", "read_siglip_case", "read_vlm_case"]
