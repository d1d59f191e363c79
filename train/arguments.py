"""Options of the training and evaluation commands, as dataclasses for `HfArgumentParser`."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations, is_tensorboard_available
from transformers.utils import is_bitsandbytes_available

from sigphi.train.errors import UserError, printable
from sigphi.train.precision import cpu_has_bfloat16, gpu_has_bfloat16
from sigphi.train.sharding import check_deepspeed, check_options, check_way, load_whole

logger = logging.getLogger(__name__)

# What `--resume` means without a value.
NEWEST = "newest"
ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2", "flex_attention")
# Of `--optim`. The paged ones move their states to the machine's own memory when the GPU's runs short.
BITSANDBYTES_OPTIMIZERS = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)


# The image tower of a new encoder: a ResNet-50.
_SHAPE: dict[str, Any] = {"layer_type": "bottleneck", "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048]}
_SHAPE |= {"depths": [3, 4, 6, 3], "downsample_in_first_stage": False, "downsampling": "stride"}


@dataclass
class QaArguments:
    """Which questions and images a command works on."""

    _argument_group_name = "data"

    input_csv: str = HfArg(help="CSV with Dataset_Index, Q1..Q5, A1..A5 (see docs/data.md).", default="")
    images: str = HfArg(
        help="Images: a Hub id, a folder in the same schema, torchvision's download folder, or 'synthetic'.",
        default="uoft-cs/cifar10",
    )
    image_split: str | None = HfArg(
        help="'train' or 'test': the split that Dataset_Index counts in; needed when the CSV has no Split column.",
        default=None,
    )
    on_faulty_answers: str = HfArg(
        help="'error' or 'skip': what to do with half-empty pairs and answers that begin with ERROR.", default="error"
    )

    def __post_init__(self) -> None:
        self.check_source()
        one_of("--on-faulty-answers", self.on_faulty_answers, ("error", "skip"))
        if self.image_split is not None:
            one_of("--image-split", self.image_split, ("train", "test"))

    def check_source(self) -> None:
        """Raise a [`UserError`] unless it is said what to work on."""
        if not self.input_csv:
            raise UserError(
                "--input-csv is needed: the file of questions and answers (`sigphi data build` makes one)."
            )


@dataclass
class PairsArguments(QaArguments):
    """Which images and texts a command works on: those of a CSV, or of any `datasets` set."""

    _argument_group_name = "data"

    dataset: str | None = HfArg(
        help="Instead of --input-csv: a set of images with texts, a Hub id or a folder.", default=None
    )
    dataset_config: str | None = HfArg(help="Configuration of a --dataset that has several.", default=None)
    dataset_split: str = HfArg(help="Split of --dataset.", default="train")
    image_column: str = HfArg(help="Column of --dataset with the images.", default="image")
    text_column: str = HfArg(help="Column of --dataset with the texts, one or a list of them a row.", default="text")

    def check_source(self) -> None:
        """As that of [`QaArguments`]; and what belongs to the other source may not be given."""
        of_csv = ("input_csv", "images", "image_split", "on_faulty_answers")
        refuse_other_source(self, of_csv, ("dataset_config", "dataset_split", "image_column", "text_column"))
        if self.dataset is None:
            super().check_source()


def refuse_other_source(arguments: Any, of_others: Sequence[str], of_dataset: Sequence[str]) -> None:
    """Raise a [`UserError`] if an option was given that goes with `--dataset` without it, or the other way round."""
    for name in of_dataset if arguments.dataset is None else of_others:
        if getattr(arguments, name) != getattr(type(arguments), name):
            place = "without" if arguments.dataset is None else "with"
            raise UserError(f"--{name.replace('_', '-')} has no use {place} --dataset: leave one of them out.")


@dataclass
class DataArguments(QaArguments):
    """What is trained on, and what is held out from it."""

    _argument_group_name = "data"

    eval_fraction: float = HfArg(help="Share of the images held out from training for evaluation.", default=0.1)
    split_seed: int = HfArg(help="Seed of the hash that decides which images are held out.", default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eval_fraction < 1.0:
            raise UserError(f"--eval-fraction must be at least 0 and below 1, got {self.eval_fraction}.")


@dataclass
class EncoderDataArguments(PairsArguments, DataArguments):
    """What an encoder is trained on, and what is held out from it."""

    _argument_group_name = "data"

    image_store: str = HfArg(
        help="'memory': images are decoded once and kept at the size of the model; 'arrow': decoded for each batch, "
        "for sets larger than memory (add --dataloader-num-workers).",
        default="memory",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("--image-store", self.image_store, ("memory", "arrow"))


@dataclass
class SiglipModelArguments:
    """The towers of the encoder."""

    _argument_group_name = "encoder"

    vision_model: str | None = HfArg(
        help="ResNet to start from, such as microsoft/resnet-50; without it the tower starts from random weights.",
        default=None,
    )
    layer_type: str = HfArg(help="ResNet layers: 'bottleneck' or 'basic'.", default=_SHAPE["layer_type"])
    embedding_size: int = HfArg(help="Channels of the stem.", default=_SHAPE["embedding_size"])
    hidden_sizes: list[int] = field(
        default_factory=lambda: [*_SHAPE["hidden_sizes"]], metadata={"help": "Channels of each stage."}
    )
    depths: list[int] = field(default_factory=lambda: [*_SHAPE["depths"]], metadata={"help": "Layers of each stage."})
    downsample_in_first_stage: bool = HfArg(
        help="Halve the feature map in the first stage too, as in all others: less work for small images.",
        default=_SHAPE["downsample_in_first_stage"],
    )
    downsampling: str = HfArg(
        help="How a stage halves the feature map: 'stride', or 'pool' (at stride 1, then by pooling): more work for "
        "each image, and small towers learn more from it.",
        default=_SHAPE["downsampling"],
    )
    stem: str = HfArg(help="'cifar' (3x3, for 32-pixel images) or 'imagenet' (7x7 and pooling).", default="cifar")
    whiten_stem: bool = HfArg(
        help="Start the stem as the principal directions of the training images' patches, at unit variance and with "
        "both signs, and keep it so. --embedding-size is then even, at most 54.",
        default=False,
    )
    image_size: int = HfArg(help="Height and width in pixels that images are resized to.", default=32)
    projection_dim: int = HfArg(help="Size of the image and text embeddings.", default=512)
    logit_bias_init: float = HfArg(
        help="Initial bias b. The paper's -10 suits batches of 32,000 texts; for 300 texts -4 is near the balance.",
        default=-10.0,
    )
    text_model: str = HfArg(help="Text tower: any text model of transformers.", default="microsoft/phi-2")
    text_model_revision: str | None = HfArg(help="Revision of the text tower.", default=None)
    text_pooling: str = HfArg(help="'last' (real token) or 'mean' (over real tokens).", default="last")
    text_layer: int = HfArg(
        help="Hidden states to pool: -1 is the text tower's last layer, 0 its embedding.", default=-1
    )
    train_text_tower: bool = HfArg(help="Train the text tower too; it is frozen otherwise.", default=False)
    text_cache: str = HfArg(
        help="Run the frozen text tower once per distinct text, keep what it says in a file, and train without it: "
        "'auto' (when it is frozen), 'on', 'off'.",
        default="auto",
    )
    text_cache_dir: str | None = HfArg(
        help="Folder of that file, which later runs read again; by default sigphi in the cache of Hugging Face.",
        default=None,
    )
    text_tower_dtype: str = HfArg(
        help="Precision of a frozen text tower in training: 'float32', 'bfloat16', or 'nf4' (4 bits).",
        default="float32",
    )
    save_text_tower: bool = HfArg(help="Write a frozen text tower into the model's folder.", default=False)
    max_text_length: int = HfArg(help="Longest text in tokens; longer ones are cut.", default=64)
    siglip_checkpoint: str | None = HfArg(
        help="Start from this encoder instead (a folder or Hub id); the options above that shape it are its own.",
        default=None,
    )

    def __post_init__(self) -> None:
        one_of("--layer-type", self.layer_type, ("bottleneck", "basic"))
        one_of("--stem", self.stem, ("cifar", "imagenet"))
        one_of("--downsampling", self.downsampling, ("stride", "pool"))
        one_of("--text-pooling", self.text_pooling, ("last", "mean"))
        one_of("--text-cache", self.text_cache, ("auto", "on", "off"))
        one_of("--text-tower-dtype", self.text_tower_dtype, ("float32", "bfloat16", "nf4"))
        self._check_text_tower()
        at_least(
            self, 1, "embedding_size", "hidden_sizes", "depths", "image_size", "projection_dim", "max_text_length"
        )
        self._check_shape()
        self._check_stem()
        if len(self.hidden_sizes) != len(self.depths):
            raise UserError(
                f"--hidden-sizes and --depths must name the same stages, got {self.hidden_sizes} and {self.depths}."
            )

    def _check_shape(self) -> None:
        if self.vision_model is None:
            return
        if self.siglip_checkpoint is not None:
            raise UserError("--vision-model and --siglip-checkpoint both give an image tower: leave one of them out.")
        for name, default in _SHAPE.items():
            if getattr(self, name) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} has no use with --vision-model, which has its own: leave one of them "
                    "out."
                )

    def _check_stem(self) -> None:
        if not self.whiten_stem:
            return
        for option, value in (("vision-model", self.vision_model), ("siglip-checkpoint", self.siglip_checkpoint)):
            if value is not None:
                raise UserError(
                    f"--whiten-stem is for a new image tower, --{option} gives a trained one: leave one out."
                )
        if self.stem != "cifar":
            raise UserError(f"--whiten-stem needs --stem cifar, got --stem {self.stem}.")
        # Both signs of 27 directions, since a kernel sees 3x3 pixels of three colors.
        if self.embedding_size % 2 or self.embedding_size > 54:
            raise UserError(f"--embedding-size {self.embedding_size}: --whiten-stem needs an even number up to 54.")

    @property
    def caches_texts(self) -> bool:
        """Whether training reads the text tower's states from a file."""
        return self.text_cache != "off" and not self.train_text_tower

    def _check_text_tower(self) -> None:
        if self.text_cache == "on" and self.train_text_tower:
            raise UserError("--text-cache on needs a frozen text tower: leave --train-text-tower out.")
        if self.text_cache_dir is not None and not self.caches_texts:
            cause = "--train-text-tower" if self.train_text_tower else "--text-cache off"
            raise UserError(f"--text-cache-dir has no use with {cause}: leave one of them out.")
        if self.text_tower_dtype != "float32" and self.train_text_tower:
            raise UserError(
                f"--text-tower-dtype {self.text_tower_dtype} needs a frozen text tower: its weights are too coarse to "
                f"train. Leave --train-text-tower out (--bf16 true trains with bfloat16 arithmetic)."
            )
        if self.text_tower_dtype == "nf4" and not is_bitsandbytes_available():
            raise UserError(
                "--text-tower-dtype nf4 needs bitsandbytes: pip install 'sigphi[qlora]' (or use bfloat16)."
            )


@dataclass
class VlmModelArguments:
    """The parts of the VLM and what is trained of them."""

    _argument_group_name = "vlm"

    siglip_checkpoint: str = HfArg(help="The trained encoder: a folder or Hub id.", default="")
    vlm_checkpoint: str | None = HfArg(
        help="Instead of --siglip-checkpoint and --language-model: a VLM to train on, a folder or Hub id in adapter, "
        "merged or nf4 form (see docs/vlm.md).",
        default=None,
    )
    language_model: str = HfArg(help="Any causal language model: a folder or Hub id.", default="microsoft/phi-2")
    language_model_revision: str | None = HfArg(help="Revision of the language model.", default=None)
    num_image_tokens: int = HfArg(
        help="Soft tokens of an image: 1 (the embedding), or a square (cells of the averaged feature map).", default=1
    )
    tuning: str = HfArg(help="'lora', or 'full' for all weights of the language model.", default="lora")
    bits: int = HfArg(help="Precision of the frozen language model: 4 (NF4), 8 or 16.", default=4)
    lora_r: int = HfArg(help="Rank of the LoRA matrices.", default=8)
    lora_alpha: int = HfArg(help="Numerator of LoRA's scale.", default=16)
    use_rslora: bool = HfArg(
        help="Scale LoRA by alpha / sqrt(r) (rank-stabilised, arXiv 2312.03732), not by alpha / r.", default=True
    )
    lora_dropout: float = HfArg(help="Dropout before the LoRA matrices.", default=0.05)
    use_dora: bool = HfArg(
        help="Train the length of each column of the adapted weights apart from its direction (DoRA, arXiv "
        "2402.09353): slower.",
        default=False,
    )
    attn_implementation: str = HfArg(
        help="'auto' (sdpa with --packing; else FlashAttention-2 where it can run, else sdpa), 'eager', 'sdpa', "
        "'flash_attention_2' (no packing), 'flex_attention' (CUDA).",
        default="auto",
    )
    image_cache: str = HfArg(
        aliases=["--feature-cache", "--feature_cache"],
        help="Run the frozen image tower once per image, before training, and keep what it says in a file: 'on', "
        "'off'.",
        default="on",
    )
    image_cache_dir: str | None = HfArg(
        aliases=["--feature-cache-dir", "--feature_cache_dir"],
        help="Folder of that file, which later runs read again; by default sigphi in the cache of Hugging Face.",
        default=None,
    )

    def __post_init__(self) -> None:
        self._check_start()
        one_of("--tuning", self.tuning, ("lora", "full"))
        one_of("--bits", self.bits, (4, 8, 16))
        one_of("--image-cache", self.image_cache, ("on", "off"))
        at_least(self, 1, "lora_r", "lora_alpha")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"--lora-dropout {self.lora_dropout}: it has to be at least 0 and below 1.")
        if self.image_cache == "off" and self.image_cache_dir is not None:
            raise UserError("--image-cache-dir has no use with --image-cache off: leave one of them out.")
        one_of("--attn-implementation", self.attn_implementation, ATTENTION)
        if self.tuning == "full" and self.bits != 16:
            raise UserError(f"--tuning full trains all weights, which {self.bits}-bit ones cannot be: add --bits 16.")
        if self.tuning == "full" and self.use_dora:
            raise UserError("--use-dora is a kind of LoRA, and --tuning full has none: leave one of them out.")
        if self.bits == 8 and self.use_dora:
            raise UserError(
                "--use-dora needs the whole weights at each step, which peft does not get of 8-bit ones: add --bits 4 "
                "or --bits 16."
            )
        if self.bits < 16 and not is_bitsandbytes_available():
            raise UserError(
                f"--bits {self.bits} needs bitsandbytes: pip install 'sigphi[qlora]' (or train with --bits 16)."
            )

    @property
    def starts_from(self) -> str:
        """The folder or Hub id of the model whose image tower is used: an encoder, or a VLM."""
        return self.vlm_checkpoint or self.siglip_checkpoint

    def _check_start(self) -> None:
        if self.vlm_checkpoint is None:
            if not self.siglip_checkpoint:
                raise UserError(
                    "--siglip-checkpoint is needed: the encoder that `sigphi train-siglip` wrote (or "
                    "--vlm-checkpoint, a VLM to train on)."
                )
            return
        for name in ("siglip_checkpoint", "language_model", "language_model_revision"):
            if getattr(self, name) != getattr(VlmModelArguments, name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no use with --vlm-checkpoint, which has its own: leave one out."
                )


@dataclass
class SigphiTrainingArguments(TrainingArguments):
    """
    What all trainings set beyond [`~transformers.TrainingArguments`]: TensorBoard is the default tracker where it is
    installed, the collators read columns by name, `use_cpu` is on where there is no accelerator, and `bf16` is off on
    a CPU without bfloat16, with a warning.
    """

    _argument_group_name = "training"

    report_to: None | str | list[str] = HfArg(
        help="Trackers: tensorboard (the default where installed), wandb, trackio, all, none.", default=None
    )
    remove_unused_columns: bool = HfArg(help="Must stay off: the collators read columns by name.", default=False)

    def __post_init__(self) -> None:
        if self.report_to is None:
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
            if self.report_to == "none":
                logger.warning("TensorBoard is not installed, so nothing is reported: pip install 'sigphi[eval]'")
        if not torch.accelerator.is_available():
            # Several CPU processes become one job only under this flag; without it each trains alone.
            self.use_cpu = True
        self._check_numbers()
        self._check_precision()
        if self.bf16 and not self.has_bfloat16:
            logger.warning(
                "training is in float32, as with --bf16 false: this processor has no arithmetic in bfloat16 and would "
                "be many times slower with it"
            )
            self.bf16: bool = False
        super().__post_init__()
        available = get_available_reporting_integrations()
        for tracker in self.report_to:
            if tracker not in available:
                name = printable(tracker)[:80]
                raise UserError(
                    f"--report-to {name}: transformers knows no such tracker, or its package is missing "
                    f"(pip install {name}); installed here: {', '.join(available) or 'none'}."
                )
        if self.optim in BITSANDBYTES_OPTIMIZERS and not is_bitsandbytes_available():
            raise UserError(
                f"--optim {self.optim.value} needs bitsandbytes: pip install 'sigphi[qlora]' (or leave it out)."
            )

    def _check_numbers(self) -> None:
        """What would end in an error of a library behind the loading of the data, or in no training at all."""
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise UserError(f"--{name.replace('_', '-')} {value}: it has to be from 0 to 2**32 - 1.")
        at_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UserError(f"--num-train-epochs {self.num_train_epochs}: it has to be above 0.")
        at_least(self, 0, "learning_rate", "dataloader_num_workers")

    @property
    def has_bfloat16(self) -> bool:
        """Whether arithmetic in bfloat16 is no slower than in float32 where this training runs."""
        return cpu_has_bfloat16() if self.use_cpu else gpu_has_bfloat16()

    def _check_precision(self) -> None:
        if self.fp16 and self.bf16:
            raise UserError("--fp16 and --bf16 are two precisions: with --fp16 true add --bf16 false.")
        if self.fp16 and self.use_cpu:
            raise UserError("--fp16 needs a GPU: leave it out (--bf16 true trains in 16 bits on a CPU that has them).")
        if self.bf16 and not self.use_cpu and not gpu_has_bfloat16():
            raise UserError(
                f"--bf16: this GPU ({torch.cuda.get_device_name()}) has no arithmetic in bfloat16. Train with "
                f"--bf16 false --fp16 true."
            )


@dataclass
class StageArguments(SigphiTrainingArguments):
    """
    What both stages set beyond [`SigphiTrainingArguments`]: `logging_nan_inf_filter` is off, since a loss that is no
    number ends the run, and `data_seed` is `seed` where it is not given.
    """

    _argument_group_name = "training"

    resume_from_checkpoint: str | None = HfArg(
        aliases=["--resume"],
        help="Go on from this checkpoint; without a value, from the newest one in --output-dir that is whole, or from "
        "the beginning where there is none yet.",
        default=None,
        metadata={"nargs": "?", "const": NEWEST, "metavar": "CHECKPOINT"},
    )
    data_seed: int | None = HfArg(help="Seed of the order of the rows; without it that of --seed.", default=None)
    logging_nan_inf_filter: bool = HfArg(help="Has no use: such a loss ends the run.", default=False)

    def __post_init__(self) -> None:
        if self.enable_jit_checkpoint:
            raise UserError("--enable-jit-checkpoint has no use: SIGTERM saves a checkpoint always. Leave it out.")
        if self.data_seed is None:
            self.data_seed = self.seed
        check_deepspeed(self)
        super().__post_init__()
        check_way(self)
        load_whole()


@dataclass
class SiglipTrainingArguments(StageArguments):
    r"""
    Options of [`SiglipTrainer`].

    Defaults that differ from [`~transformers.TrainingArguments`]: `per_device_train_batch_size` and
    `per_device_eval_batch_size` 256, `num_train_epochs` 10, `learning_rate` 1e-3, `weight_decay` 0.05, `warmup_steps`
    0.1 (a ratio), `lr_scheduler_type` `"cosine"`, `eval_strategy` and `save_strategy` `"epoch"`, `save_total_limit` 2,
    `logging_steps` 20, `ddp_find_unused_parameters` off, and those of [`StageArguments`].
    """

    _argument_group_name = "training"

    output_dir: str = HfArg(help="Folder of the trained encoder.", default="outputs/siglip")
    per_device_train_batch_size: int = HfArg(
        aliases=["--batch-size", "--batch_size"], help="Images in a step, per device.", default=256
    )
    per_device_eval_batch_size: int = HfArg(help="Images in an evaluation step, per device.", default=256)
    num_train_epochs: float = HfArg(aliases=["--num-epochs", "--num_epochs"], help="Passes over the data.", default=10)
    learning_rate: float = HfArg(help="Peak learning rate.", default=1e-3)
    weight_decay: float = HfArg(help="Decay of matrices and kernels; never of t', b, norms and biases.", default=0.05)
    warmup_steps: float = HfArg(help="Warm-up, in steps, or as a share of all steps when below 1.", default=0.1)
    lr_scheduler_type: str = HfArg(help="Learning rate schedule.", default="cosine")
    eval_strategy: str = HfArg(help="When to evaluate: 'no', 'steps' or 'epoch'.", default="epoch")
    save_strategy: str = HfArg(help="When to save a checkpoint: 'no', 'steps', 'epoch' or 'best'.", default="epoch")
    save_total_limit: int | None = HfArg(help="Checkpoints to keep.", default=2)
    logging_steps: float = HfArg(help="Steps between two log lines.", default=20)
    logit_learning_rate: float = HfArg(help="Peak learning rate of the temperature t' and the bias b.", default=3e-3)
    loss_variant: str = HfArg(
        help="How several processes compare their pairs: 'ring' (texts pass from one to the next) or 'gather'.",
        default="ring",
    )
    loss_chunk_size: int = HfArg(help="Images whose logits are in memory at a time, per device.", default=256)
    duplicate_texts: str = HfArg(
        help="What a text of another image is that is true of the image too: 'positive' or 'ignored'.",
        default="positive",
    )
    micro_batch_size: int = HfArg(
        help="Images that go through the towers at a time, per device, while the loss compares the whole batch: less "
        "memory for a second forward pass. 0: all at once.",
        default=0,
    )
    sync_batch_norm: bool = HfArg(help="BatchNorm over the images of all processes (GPU).", default=False)
    ddp_find_unused_parameters: bool | None = HfArg(
        help="Must stay off: t' and b are used after the model's forward pass.", default=False
    )
    augment: bool = HfArg(help="Random shift by up to 1/8 of the image, and horizontal flip.", default=True)
    cutout: int = HfArg(
        help="Height and width in pixels of a square of each image that is blanked, at random; 0: none.", default=0
    )
    color_jitter: float = HfArg(
        help="Change brightness, contrast and saturation by up to this share, at random, from 0 (off) to 1.",
        default=0.0,
    )
    muon: bool = HfArg(
        help="Move the kernels of convolutions by their orthogonalised momentum (Muon), at the same learning rate; "
        "--optim, an AdamW, moves all other weights.",
        default=False,
    )
    ema_decay: float = HfArg(
        help="Evaluate and save an exponential moving average of the weights, with this decay a step; 0: the weights "
        "themselves.",
        default=0.0,
    )
    channels_last: bool = HfArg(help="Keep images and kernels in channels-last order.", default=True)

    def __post_init__(self) -> None:
        one_of("--loss-variant", self.loss_variant, ("ring", "gather"))
        one_of("--duplicate-texts", self.duplicate_texts, ("positive", "ignored"))
        if self.cutout < 0:
            raise UserError(f"--cutout must be 0 (off) or a number of pixels, got {self.cutout}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise UserError(f"--ema-decay must be at least 0 (off) and below 1, got {self.ema_decay}.")
        if not 0.0 <= self.color_jitter <= 1.0:
            raise UserError(f"--color-jitter must be from 0 (off) to 1, got {self.color_jitter}.")
        if self.loss_chunk_size < 1:
            raise UserError(f"--loss-chunk-size must be 1 or more, got {self.loss_chunk_size}.")
        if self.micro_batch_size < 0:
            raise UserError(f"--micro-batch-size must be 0 (off) or more, got {self.micro_batch_size}.")
        if self.muon and self.fp16:
            raise UserError("--muon does not know the loss scaling of --fp16: train with --bf16 true.")
        if self.ddp_find_unused_parameters:
            raise UserError(
                "--ddp-find-unused-parameters must stay off: t' and b are used after the model's forward pass, where "
                "DistributedDataParallel would not find them."
            )
        super().__post_init__()
        check_options(
            self,
            {
                "`--ema-decay`": self.ema_decay > 0,
                "`--micro-batch-size`": self.micro_batch_size > 0,
                "`--muon true`": self.muon,
                "`train-siglip --bf16 true`": self.bf16,
            },
        )
        if self.muon and self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise UserError(
                f"--muon goes with --optim adamw_torch or adamw_torch_fused (the default), not {self.optim.value}."
            )
        if self.sync_batch_norm and self.device.type == "cpu":
            raise UserError("--sync-batch-norm needs GPUs: PyTorch has no SyncBatchNorm on CPU. Leave it out.")


@dataclass
class VlmTrainingArguments(StageArguments):
    r"""
    Options of [`VlmTrainer`].

    Defaults that differ from [`~transformers.TrainingArguments`]: `per_device_train_batch_size` 32,
    `per_device_eval_batch_size` 64, `num_train_epochs` 1, `learning_rate` 2e-4 (LoRA), `warmup_steps` 0.03 (a ratio),
    `lr_scheduler_type` `"cosine"`, `bf16` and `gradient_checkpointing` on, `eval_strategy` and `save_strategy`
    `"epoch"`, `save_total_limit` 2, `logging_steps` 20, and those of [`StageArguments`].
    """

    _argument_group_name = "training"

    output_dir: str = HfArg(help="Folder of the trained VLM.", default="outputs/vlm")
    per_device_train_batch_size: int = HfArg(
        aliases=["--batch-size", "--batch_size"], help="Questions in a step, per device.", default=32
    )
    packing: str = HfArg(
        help="Several questions a row instead of padding, none of which sees another: 'auto' (where the language "
        "model's attention can keep them apart), 'on', 'off'.",
        default="auto",
    )
    tokens_per_row: int = HfArg(help="Longest packed row, where no question is longer.", default=512)
    tokens_per_batch: int = HfArg(
        help="Positions in a step at most, per device, in place of --batch-size: packed rows of images with all their "
        "questions, which share the image's tokens. 0: by --batch-size.",
        default=0,
    )
    per_device_eval_batch_size: int = HfArg(help="Questions in an evaluation step, per device.", default=64)
    num_train_epochs: float = HfArg(aliases=["--num-epochs", "--num_epochs"], help="Passes over the data.", default=1)
    learning_rate: float = HfArg(help="Peak learning rate of LoRA, or of the language model.", default=2e-4)
    projector_learning_rate: float = HfArg(help="Peak learning rate of the projector.", default=1e-3)
    weight_decay: float = HfArg(help="Decay of matrices; never of norms and biases.", default=0.0)
    warmup_steps: float = HfArg(help="Warm-up, in steps, or as a share of all steps when below 1.", default=0.03)
    lr_scheduler_type: str = HfArg(help="Learning rate schedule.", default="cosine")
    bf16: bool = HfArg(help="Mixed precision in bfloat16.", default=True)
    gradient_checkpointing: bool = HfArg(help="Recompute activations in the backward pass.", default=True)
    eval_strategy: str = HfArg(help="When to evaluate: 'no', 'steps' or 'epoch'.", default="epoch")
    save_strategy: str = HfArg(help="When to save a checkpoint: 'no', 'steps', 'epoch' or 'best'.", default="epoch")
    save_total_limit: int | None = HfArg(help="Checkpoints to keep.", default=2)
    logging_steps: float = HfArg(help="Steps between two log lines.", default=20)
    eval_samples: int = HfArg(
        help="Held-out questions that each evaluation asks with the right and with another image; 0: none.", default=96
    )
    stop_if_blind: bool = HfArg(
        help="Stop, with exit code 2, when the right image stays worth less than 0.05 accuracy.", default=False
    )

    def __post_init__(self) -> None:
        one_of("--packing", self.packing, ("auto", "on", "off"))
        if self.tokens_per_row < 1:
            raise UserError(f"--tokens-per-row must be 1 or more, got {self.tokens_per_row}.")
        if self.tokens_per_batch < 0:
            raise UserError(f"--tokens-per-batch must be 0 (off) or more, got {self.tokens_per_batch}.")
        self._check_budget()
        if self.eval_samples < 0:
            raise UserError(f"--eval-samples must be 0 or more, got {self.eval_samples}.")
        if self.stop_if_blind and self.eval_samples == 0:
            raise UserError("--stop-if-blind judges by --eval-samples, which is 0: leave one of them out.")
        with warnings.catch_warnings():
            # The newer name does not exist in the oldest transformers that is supported.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            super().__post_init__()
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            # The reentrant kind gives no gradients when the block's inputs need none, as with a frozen base.
            self.gradient_checkpointing_kwargs: dict[str, Any] | None = {"use_reentrant": False}

    def _check_budget(self) -> None:
        if self.tokens_per_batch == 0:
            return
        if self.packing == "off":
            raise UserError("--tokens-per-batch counts packed rows, and --packing is off: leave one of them out.")
        if self.per_device_train_batch_size != VlmTrainingArguments.per_device_train_batch_size:
            raise UserError(
                f"--batch-size {self.per_device_train_batch_size}: a step has --tokens-per-batch "
                f"{self.tokens_per_batch} positions. Leave one of them out, or say --tokens-per-batch 0."
            )


def at_least(arguments: Any, minimum: int, *names: str) -> None:
    """Raise a [`UserError`] naming the first of these options of which a number is less than `minimum`."""
    for name in names:
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value], default=minimum) < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value}: it has to be {minimum} or more.")


def one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise a [`UserError`] naming `option` unless `value` is in `allowed`."""
    if value not in allowed:
        raise UserError(f"{option} must be one of {', '.join(map(str, allowed))}, got {value!r}.")


def check_evaluation(data: DataArguments, training: TrainingArguments) -> None:
    """Raise a [`UserError`] if evaluations during training are wanted and no image is held out for them."""
    if data.eval_fraction == 0 and training.eval_strategy != "no":
        raise UserError(
            "--eval-fraction 0 holds out no image to evaluate on during training: add --eval-strategy no, or hold out "
            "more."
        )


def check_duplicates(data: EncoderDataArguments, training: SiglipTrainingArguments) -> None:
    """Raise a [`UserError`] if texts of the same fact are to be ignored in a set whose texts state no known facts."""
    if data.dataset is not None and training.duplicate_texts == "ignored":
        raise UserError(
            "--duplicate-texts ignored is about texts that state the same fact, and of the texts of a --dataset no "
            "facts are known: leave it out. Equal texts are one text in any case."
        )


def check_best_metric(training: TrainingArguments, figures: Sequence[str]) -> None:
    """
    Raise a [`UserError`] if `metric_for_best_model` is none of the figures of an evaluation, or is missing.

    Args:
        training (`TrainingArguments`): the options.
        figures (`Sequence[str]`): what evaluations during training give, without prefix.
    """
    name = training.metric_for_best_model
    given = f"evaluations of this training give {', '.join(figures)}. Name one of them."
    if name is None and training.save_strategy == "best":
        raise UserError(f"--save-strategy best needs --metric-for-best-model: {given}")
    if name is not None and training.eval_strategy != "no" and name.removeprefix("eval_") not in figures:
        raise UserError(f"--metric-for-best-model {name}: {given}")


def check_launch(arguments: TrainingArguments) -> None:
    """
    Refuse set-ups in which several processes or devices would train something else than one model on one batch.

    Raises:
        UserError: if `WORLD_SIZE` is not the number of processes that train together, or if several GPUs are visible
            to one process (the Trainer would use DataParallel, which breaks the loss over the batch).
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != arguments.world_size:
        raise UserError(
            f"WORLD_SIZE is {world}, but {arguments.world_size} process trains: each would train alone. On CPU launch "
            f"with: torchrun --nproc_per_node {world} -m sigphi.train.siglip --use_cpu ... (or sigphi.train.vlm)"
        )
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs are visible to one process. Launch one process for each: accelerate launch "
            f"--num_processes {arguments.n_gpu} -m sigphi.train.siglip ... (or sigphi.train.vlm; or set "
            f"CUDA_VISIBLE_DEVICES=0)"
        )


__all__ = [
    "ATTENTION",
    "BITSANDBYTES_OPTIMIZERS",
    "NEWEST",
    "DataArguments",
    "QaArguments",
    "SigphiTrainingArguments",
    "SiglipModelArguments",
    "SiglipTrainingArguments",
    "StageArguments",
    "VlmModelArguments",
    "VlmTrainingArguments",
    "at_least",
    "check_best_metric",
    "check_duplicates",
    "check_evaluation",
    "check_launch",
    "one_of",
]
