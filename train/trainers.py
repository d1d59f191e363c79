"""The Trainers of the two stages."""

import contextlib
import copy
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, HubStrategy

from sigphi.configuration.hub_code import HubCodeMixin
from sigphi.hub_card.cards import write_card
from sigphi.modeling.modeling_siglip_resnet import keep_batch_norm_statistics
from sigphi.modeling.modeling_sigphi import LORA_FOLDER, LORA_WEIGHTS
from sigphi.train.arguments import SiglipTrainingArguments, check_launch
from sigphi.train.augmentation import cut_out, jitter_color, shift_and_flip, uniform_draws
from sigphi.train.averaging import WeightAverage
from sigphi.train.checkpoint_files import ASIDE, move_files, reading, write_errors
from sigphi.train.collators import normalize
from sigphi.train.errors import UserError
from sigphi.train.gradient_check import GradientCheck
from sigphi.train.hub import hub_errors
from sigphi.train.losses import global_sigmoid_loss
from sigphi.train.muon import Muon
from sigphi.train.packing import PackedBatches, question_sizes
from sigphi.train.parts import split_rows
from sigphi.train.push import push_run
from sigphi.train.resumable import ResumableTrainer, sole_folder
from sigphi.train.sharding import divides_weights, load_whole

logger = logging.getLogger(__name__)


class _ArtifactTrainer(ResumableTrainer):
    """A Trainer whose output folders can be loaded and pushed as they are, and whose runs lose nothing.

    Args:
        extra_evaluation (`Callable`, *optional*): called with the model after each evaluation; gives further metrics
            by name, without prefix.
        kwargs: those of [`ResumableTrainer`].
    """

    def __init__(self, *, extra_evaluation: Callable[[Any], dict[str, float]] | None = None, **kwargs: Any) -> None:
        check_launch(kwargs["args"])
        check_hub_options(kwargs["args"])
        self.hub_model_id: str | None = None
        self.push_in_progress: Any = None
        super().__init__(**kwargs)
        load_whole()  # what comes behind the training too
        self.extra_evaluation = extra_evaluation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and kernels decay; scalars, biases and the weights of norms do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def learning_rate_of(self, name: str) -> float:
        """The peak learning rate of the parameter called `name`."""
        return self.args.learning_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, over groups by learning rate and weight decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer: torch.optim.Optimizer = optimizer_class(self._parameter_groups(model), **options)
            if options.get("optim_bits") == 8:
                keep_embeddings_in_32_bits(model)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((self.learning_rate_of(name), decay), []).append(parameter)
        # The Trainer logs the learning rate of the first group: that of the most parameters.
        ordered = sorted(groups.items(), key=lambda group: -sum(parameter.numel() for parameter in group[1]))
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in ordered]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        As the Trainer's, of a model that all processes train.

        Raises:
            UserError: if each process would train one of its own.
        """
        is_shared = self.is_deepspeed_enabled or isinstance(model, DistributedDataParallel | FSDPModule)
        if self.args.world_size > 1 and not is_shared:
            raise UserError(
                f"{self.args.world_size} processes, and nothing shares the gradients of the model among them: each "
                "would train alone. Launch with a configuration of train/launch/, or torchrun (docs/many_gpus.md)."
            )
        return super().training_step(model, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As the Trainer's, with the metrics of `extra_evaluation`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.extra_evaluation is not None:
            model = self.accelerator.unwrap_model(self.model).eval()
            extra = {f"{metric_key_prefix}_{name}": value for name, value in self.extra_evaluation(model).items()}
            self.log(extra)
            metrics.update(extra)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As the Trainer's; files come under their names when all of them are written, the config last.

        Raises:
            UserError: if they cannot be written, or another run is writing there; the folder then holds what it held
                before.
        """
        folder = Path(output_dir or self.args.output_dir)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super().save_model(output_dir, _internal_call)
            return
        remedy = "Make room; the last checkpoint is whole: go on with --resume."
        with sole_folder(self, folder), write_errors(folder, remedy):
            super().save_model(str(folder / ASIDE / "model"), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_files(folder / ASIDE / "model", folder)
                self._write_card(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A final folder holds no pickle: the arguments go to a JSON file. Checkpoints keep the Trainer's own."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            (folder / TRAINING_ARGS_NAME).unlink()
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        if self.args.should_save:
            self._write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is rendered from the folder's recorded facts, also before the Trainer pushes."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))

    def _write_card(self, folder: Path) -> None:
        """Our cards tell how to load models of ours; another one, such as transformers' `SiglipModel`, has none."""
        if isinstance(self.accelerator.unwrap_model(self.model).config, HubCodeMixin):
            write_card(folder)

    def init_hf_repo(self, **kwargs: Any) -> None:
        """As the Trainer's, whose arguments depend on the version; what the Hub refuses is a [`UserError`]."""
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name, "--hub-model-id"):
            super().init_hf_repo(**kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save, and publish the output folder as `sigphi push` does: one commit, no pickle, no path of this machine.

        It returns when all is there, whatever `blocking` says.

        Args:
            commit_message, token, revision, private: instead of what the training's options say.
            kwargs: further ones of the Trainer's method; the card has its facts from the folder.

        Raises:
            UserError: see [`push_run`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        given = {"hub_token": token, "hub_revision": revision, "hub_private_repo": private}
        arguments = copy.copy(self.args)
        for name, value in given.items():
            if value is not None:
                setattr(arguments, name, value)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.push_in_progress is not None:
            self._finish_current_push()
        folder = Path(self.args.output_dir)
        return push_run(folder, arguments, self.hub_model_id, commit_message or "End of training")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Publish the model of a checkpoint, without its state for resuming, where `--hub-strategy` says so.

        Training goes on when the Hub does not answer: the next push, or the last one, brings what is missing.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        try:
            push_run(Path(checkpoint_folder), self.args, self.hub_model_id, message)
        except UserError as error:
            logger.warning("not pushed at step %d: %s", self.state.global_step, error)


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """
    Let 8-bit optimizers of bitsandbytes keep whole numbers for embeddings, whose rows move seldom and far, as its
    authors advise (Dettmers et al., arXiv 2110.02861).
    """
    from bitsandbytes.optim import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


class SiglipTrainer(_ArtifactTrainer):
    """
    Trains a [`SiglipResNetModel`] on batches of images with all their texts (see [`SiglipCollator`]).

    The loss compares all images with all texts of a batch over all processes, see [`global_sigmoid_loss`]. The loss
    that is logged, and the gradients, are those of one process with the same batch.

    `gradient_accumulation_steps` adds up losses that each compare their own batch, which is not the loss of one large
    batch. `args.micro_batch_size` is: the images and texts of a batch go through the towers in parts, without a graph;
    the loss over all of them gives the gradients of the embeddings; and a second pass, with the same random numbers,
    takes these to the weights part by part (GradCache: Gao et al., arXiv 2101.06983). BatchNorm in training mode
    normalises by the part, as it does by the process.

    Any model will do whose forward pass takes the batch without `pairs` and `return_loss` and gives normalised
    `image_embeds` and `text_embeds`, and that has a `logit_scale` and `logit_bias`, such as transformers'
    `SiglipModel`. A batch without `pairs` says that image i belongs to text i alone.

    `pixel_values` of bytes are augmented and normalised on the training device, see [`tower_inputs`]: by the image
    processor of `processing_class`, and by `image_index`. Those of floats are taken as they are, so that
    augmentation has to be off.

    With `args.ema_decay` the Trainer keeps an average of the weights, see [`WeightAverage`]: it is evaluated, and is
    the model of each checkpoint and the one that training leaves.

    Under FSDP2 and DeepSpeed the model's t' and b are vectors of one number from here on; folders hold them without
    dimensions, as ever.

    Raises:
        UserError: if the processes of a job do not train together, see [`check_launch`].
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs["args"].sync_batch_norm:
            kwargs["model"] = nn.SyncBatchNorm.convert_sync_batchnorm(kwargs["model"])
        super().__init__(**kwargs)
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self.scalars = lay_out_for_shards(self.model) if is_sharded else []
        self.logit_parameters = logit_parameters_of_forward(self.model) if is_sharded else None
        # The loss is the mean of one batch, whatever the model's forward pass accepts: the Trainer divides it by the
        # number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.micro_batch_size = self.args.micro_batch_size  # less, once memory has not sufficed
        self.averaging = WeightAverage(self.args.ema_decay) if self.args.ema_decay > 0 else None
        if self.averaging is not None:
            self.add_callback(self.averaging)

    def learning_rate_of(self, name: str) -> float:
        """Temperature and bias are two numbers on a scale of ten; at the rate of the weights they would not move."""
        is_logit = name in ("logit_scale", "logit_bias")
        return self.args.logit_learning_rate if is_logit else self.args.learning_rate

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the Trainer's, or [`Muon`] with the options of its AdamW."""
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return (Muon if args.muon else optimizer_class), options

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Augments the images of a training batch, on its device, and computes the loss over all processes."""
        outputs = model(**self._model_inputs(model, inputs))
        unwrapped = self.accelerator.unwrap_model(model)
        logits = self.logit_parameters or (unwrapped.logit_scale, unwrapped.logit_bias)
        loss = self._global_loss((outputs.image_embeds, outputs.text_embeds, *logits), inputs)
        return (loss, outputs) if return_outputs else loss

    def one_batch(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As the Trainer's, or in two passes over the parts of the batch."""
        if self.micro_batch_size == 0:
            return super().one_batch(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        parts = _split(self._model_inputs(model, inputs), self.micro_batch_size)
        seeds = torch.randint(2**62, (len(parts),)).tolist()
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad(), keep_batch_norm_statistics(unwrapped):
            embeds = [_embed(unwrapped, part, seed) for part, seed in zip(parts, seeds, strict=True)]
        logit_parameters = (unwrapped.logit_scale, unwrapped.logit_bias)
        leaves = [torch.cat(column) for column in zip(*embeds, strict=True)]  # (images, dim), (texts, dim)
        leaves = [leaf.detach().requires_grad_() for leaf in (*leaves, *logit_parameters)]
        loss = self._global_loss(leaves, inputs)
        image_grads, text_grads, *logit_grads = torch.autograd.grad(loss, leaves)
        image_grads = image_grads.split([len(images) for images, _ in embeds])
        text_grads = text_grads.split([len(texts) for _, texts in embeds])
        # Processes exchange their gradients once, after the part that surely has texts.
        for index in reversed(range(len(parts))):
            with self.accelerator.no_sync(model) if index > 0 else contextlib.nullcontext():
                outputs = (*_embed(model, parts[index], seeds[index]), *logit_parameters)
                shares = [gradient / len(parts) for gradient in logit_grads]
                gradients = (image_grads[index], text_grads[index], *shares)
                # Its derivative by each output is the gradient that the loss has there.
                product = sum((out * grad).sum() for out, grad in zip(outputs, gradients, strict=True))
                self.accelerator.backward(product / self.current_gradient_accumulation_steps)
        return loss.detach() / self.current_gradient_accumulation_steps

    def take_less(self, inputs: dict[str, Any]) -> str | None:
        """Half as many images through the towers at a time, in two passes; one pass compares all of a batch."""
        before = min(self.micro_batch_size, len(inputs["pixel_values"]))
        if before < 2:
            return None
        self.micro_batch_size = before // 2
        return f"{self.micro_batch_size} images at a time instead of {before}"

    def memory_advice(self, inputs: dict[str, Any]) -> str:
        """Two passes, where they are not taken yet."""
        images = len(inputs["pixel_values"])
        smaller = min(self.micro_batch_size or images, images) // 2
        if smaller == 0:
            return "even one image at a time is too much: use a smaller model or --image-size."
        return (
            f"add --micro-batch-size {smaller}, which compares the same {images} images in less memory and a second "
            f"forward pass."
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As the Trainer's; of the average of the weights, where one is kept."""
        with self._averaged():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The model is the average of the weights, where one is kept; a checkpoint has the weights themselves too."""
        if state_dict is not None:
            scalars = {name: state_dict[name].reshape(()) for name in self.scalars if name in state_dict}
            state_dict = state_dict | scalars
        with self._averaged():
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.averaging is not None and is_checkpoint and self.args.should_save:  # every process comes here
            self.averaging.save_live_weights(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's; where an average is kept, the weights themselves follow when training begins."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.averaging is not None:
            self.averaging.resume(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """As the Trainer's; the model of a checkpoint is an average already."""
        if self.averaging is not None:
            self.averaging.stop()
        super()._load_best_model()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.averaging is None else self.averaging.applied()

    def _global_loss(self, tensors: Sequence[torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
        """Of image embeddings, text embeddings, t' and b, by the options."""
        image_embeds, text_embeds, logit_scale, logit_bias = tensors
        return global_sigmoid_loss(
            image_embeds,
            text_embeds,
            logit_scale,
            logit_bias,
            **inputs.get("pairs", {}),
            duplicates=self.args.duplicate_texts,
            variant=self.args.loss_variant,
            chunk_size=self.args.loss_chunk_size,
        )

    def _model_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        pixel_values = inputs["pixel_values"]  # (images, 3, height, width)
        if pixel_values.dtype == torch.uint8:
            epoch = int(self.state.epoch or 0) if model.training else None
            pixel_values = tower_inputs(
                self.processing_class.image_processor, self.args, pixel_values, inputs["image_index"], epoch
            )
        elif model.training and (self.args.augment or self.args.color_jitter > 0 or self.args.cutout > 0):
            raise ValueError("`pixel_values` of floats are not augmented: give bytes, or `augment=False`.")
        if self.args.channels_last:
            pixel_values = pixel_values.to(memory_format=torch.channels_last)
        others = ("pairs", "return_loss", "image_index")
        rest = {name: value for name, value in inputs.items() if name not in others}
        return rest | {"pixel_values": pixel_values}


def lay_out_for_shards(model: nn.Module) -> list[str]:
    """
    Give the parameters the layout that DeepSpeed and FSDP2 take, in place: one number is a vector, and the kernels of
    convolutions are in the order of their dimensions, not in channels-last order.

    Returns:
        `list` of `str`: the names of those that had no dimension.
    """
    scalars = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            scalars.append(name)
            parameter.data = parameter.data.reshape(1)
        elif parameter.ndim == 4:
            # `contiguous` passes over kernels of one cell, whose strides are others all the same.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return scalars


def logit_parameters_of_forward(model: nn.Module) -> list[torch.Tensor]:
    """A list that holds t' and b as the last forward pass of `model` had them: outside of it shards are no weights."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        kept[:] = [module.logit_scale.clone(), module.logit_bias.clone()]

    model.register_forward_hook(keep)
    return kept


def tower_inputs(
    image_processor: Any,
    arguments: SiglipTrainingArguments,
    pixels: torch.Tensor,
    image_index: torch.Tensor,
    epoch: int | None,
) -> torch.Tensor:
    """
    What the image tower reads of a batch, made on its device; with no augmentation exactly what the processor makes.

    Args:
        image_processor (`SiglipImageProcessor`): of the model.
        arguments (`SiglipTrainingArguments`): how images are augmented, and the seed.
        pixels (`torch.ByteTensor` of shape `(images, 3, size, size)`): in the size of the model.
        image_index (`torch.LongTensor` of shape `(images,)`): their numbers in the data set.
        epoch (`int`, *optional*): of the training; without it nothing is augmented.

    Returns:
        `torch.FloatTensor` of shape `(images, 3, size, size)`.
    """
    if epoch is None:
        return normalize(image_processor, pixels)
    draws = uniform_draws(arguments.seed, epoch, image_index, 8)  # (images, 8)
    if arguments.augment:
        pixels = shift_and_flip(pixels, pixels.shape[-1] // 8, draws[:, :3])
    if arguments.color_jitter > 0:
        pixels = jitter_color(pixels.float(), arguments.color_jitter, draws[:, 3:6])
    values = normalize(image_processor, pixels)
    return cut_out(values, arguments.cutout, draws[:, 6:]) if arguments.cutout > 0 else values


def _split(inputs: dict[str, Any], images_at_once: int) -> list[dict[str, Any]]:
    """A batch in parts of at most so many images, with as many parts of its texts; the last may have none."""
    parts = math.ceil(len(inputs["pixel_values"]) / images_at_once)
    tensors = {name: value.tensor_split(parts) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in inputs.items() if name not in tensors}
    return [
        others | {name: pieces[part] for name, pieces in tensors.items() if len(pieces[part]) > 0}
        for part in range(parts)
    ]


def _embed(model: nn.Module, inputs: dict[str, Any], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings, with the same dropout whenever `seed` is the same."""
    torch.manual_seed(seed)
    outputs = model(**inputs)
    no_texts = outputs.image_embeds[:0]
    return outputs.image_embeds, no_texts if outputs.text_embeds is None else outputs.text_embeds


class VlmTrainer(_ArtifactTrainer):
    """
    Trains a [`SigPhiForConditionalGeneration`], by LoRA or in full.

    The projector has its own learning rate, `args.projector_learning_rate`. The evaluation loss is the mean over all
    supervised tokens of the evaluation set, however they are batched. So is the training loss over those of an update:
    the same for any batch size, accumulation, number of processes, padding or packing.

    The first updates are watched: what is trained and gets no gradient is an error, see [`GradientCheck`].

    With `args.tokens_per_batch` the batches are those of [`PackedBatches`], for a [`PackingCollator`].

    Raises:
        ValueError: if a row of a data set of [`tokenized_rows`] has no answer tokens; it names the row.
    """

    def __init__(self, **kwargs: Any) -> None:
        for name in ("train_dataset", "eval_dataset"):
            _check_answers(kwargs.get(name), name)
        super().__init__(**kwargs)
        # There the gradients lie in parts, in places of their own.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.add_callback(GradientCheck())
        if divides_weights(self.args):
            # The head is gathered once for a batch, whatever it holds, and not for each part of it.
            self.model.logits_at_once = sys.maxsize
        self.rows_at_once: int | None = None  # all of a batch, until memory does not suffice

    def one_batch(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As the Trainer's; or of parts of the batch: their losses add up, since all are over the update's tokens."""
        if self.rows_at_once is None or len(inputs["input_ids"]) <= self.rows_at_once:
            return super().one_batch(model, inputs, num_items_in_batch)
        config: Any = self.accelerator.unwrap_model(model).config
        parts = split_rows(inputs, self.rows_at_once, config.image_token_id, config.num_image_tokens)
        losses = [super(VlmTrainer, self).one_batch(model, part, num_items_in_batch) for part in parts]
        return torch.stack(losses).sum()

    def take_less(self, inputs: dict[str, Any]) -> str | None:
        """Half as many rows through the model at a time."""
        rows = len(inputs["input_ids"])
        before = min(self.rows_at_once or rows, rows)
        if before < 2:
            return None
        self.rows_at_once = before // 2
        return f"{self.rows_at_once} rows at a time instead of {before}"

    def memory_advice(self, inputs: dict[str, Any]) -> str:
        """What is left behind single rows, or between several processes."""
        size = "--tokens-per-batch" if self.args.tokens_per_batch > 0 else "--batch-size"
        return (
            f"use a smaller {size} with as many more --gradient-accumulation-steps, --gradient-checkpointing true, "
            "--bits 4, or a smaller --tokens-per-row."
        )

    def learning_rate_of(self, name: str) -> float:
        """The projector starts from random weights and learns faster than what is already trained."""
        is_projector = ".multi_modal_projector." in f".{name}"
        return self.args.projector_learning_rate if is_projector else self.args.learning_rate

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's, or with batches of at most `args.tokens_per_batch` positions."""
        if self.args.tokens_per_batch == 0:
            return super().get_train_dataloader()
        collator: Any = self.data_collator
        rows_per_batch = self.args.tokens_per_batch // collator.tokens_per_row
        if rows_per_batch == 0:
            raise ValueError(
                f"`tokens_per_batch` is {self.args.tokens_per_batch}, less than the collator's `tokens_per_row` of "
                f"{collator.tokens_per_row}."
            )
        batches = PackedBatches(
            question_sizes(self.train_dataset.to_list(), collator.image_token_id),
            collator.tokens_per_row,
            rows_per_batch,
            self.args.world_size,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            lambda: self.state.epoch or 0.0,
        )
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        with self._uneven_batches():
            return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, but no rows are repeated to fill the last batches of several processes."""
        with self._uneven_batches():
            return super().get_eval_dataloader(eval_dataset)

    @contextlib.contextmanager
    def _uneven_batches(self) -> Iterator[None]:
        """Within it batches are shared out as they are."""
        even_batches = self.accelerator.even_batches
        self.accelerator.even_batches = False
        try:
            yield
        finally:
            self.accelerator.even_batches = even_batches

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sums loss and supervised tokens over all batches and processes; no logits are kept."""
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
        for batch, counts in self._as_many_on_all(dataloader):
            batch = self._prepare_inputs(batch)
            tokens = (batch["labels"][:, 1:] != -100).sum() * counts
            with self.compute_loss_context_manager():
                loss = model(**batch, logits_to_keep=torch.arange(0)).loss
            totals += torch.stack([loss.double() * tokens, tokens.double()]).cpu()
            self.control: Any = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        totals = self.accelerator.reduce(totals.to(self.args.device).float(), "sum").cpu()
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        num_samples = self.num_examples(dataloader)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_samples)

    def _as_many_on_all(self, dataloader: DataLoader) -> Iterator[tuple[dict[str, Any], bool]]:
        """
        The batches, and whether each counts: where weights are divided, all processes make as many forward passes, and
        those that have no more batches repeat a row.
        """
        missing = 0
        if divides_weights(self.args):
            own = torch.tensor(len(dataloader), device=self.args.device)
            missing = int(self.accelerator.gather(own).max() - own)
        yield from ((batch, True) for batch in dataloader)
        for _ in range(missing):
            yield dataloader.collate_fn([dataloader.dataset[0]]), False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """
        A checkpoint in adapter form brings only what was trained, and the image tower; the base is already there.
        """
        if self.is_fsdp_enabled:  # which has files of its own for its parts
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        vlm: Any = self.accelerator.unwrap_model(model or self.model)
        if vlm.config.lora is None:
            super()._load_from_checkpoint(resume_from_checkpoint, vlm)
            return
        with reading(Path(resume_from_checkpoint)):
            weights = load_file(os.path.join(resume_from_checkpoint, "model.safetensors"))
            lora = load_file(os.path.join(resume_from_checkpoint, LORA_FOLDER, LORA_WEIGHTS))
            vlm.load_adapter_weights(weights | vlm.lora_keys(lora))

    def _load_best_model(self) -> None:
        """As the Trainer's, for the adapter form too."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def check_hub_options(arguments: TrainingArguments) -> None:
    """Raise a [`UserError`] if a training would publish its state for resuming."""
    if arguments.push_to_hub and arguments.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"--hub-strategy {arguments.hub_strategy.value} would publish the state of the optimizer, a pickle; use "
            "every_save or end."
        )


def _check_answers(dataset: Any, name: str) -> None:
    if not isinstance(dataset, datasets.Dataset) or "answer_ids" not in dataset.column_names:
        return
    for row, answer in enumerate(dataset["answer_ids"]):
        if not answer:
            raise ValueError(f"Row {row} of `{name}` has no answer tokens, so nothing in it is supervised.")


__all__ = ["SiglipTrainer", "VlmTrainer", "lay_out_for_shards", "tower_inputs"]
