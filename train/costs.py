"""What the two trainings need of their device: each is run, for one step, on tensors without data."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers import AutoHfQuantizer

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, SiglipResNetVisionModel
from sigphi.modeling.modeling_sigphi import CACHE, SigPhiForConditionalGeneration, base_quantization
from sigphi.train.arguments import (
    BITSANDBYTES_OPTIMIZERS,
    SiglipModelArguments,
    SiglipTrainingArguments,
    VlmModelArguments,
    VlmTrainingArguments,
)
from sigphi.train.attention import choose_attn_implementation
from sigphi.train.averaging import averaged_tensors
from sigphi.train.collators import IGNORE_INDEX
from sigphi.train.errors import UserError
from sigphi.train.losses import global_sigmoid_loss
from sigphi.train.memory import MemoryMeter, Speed, fake_mode, materialize
from sigphi.train.muon import Muon
from sigphi.train.precision import tower_dtype, weights_dtype
from sigphi.train.qlora import build_vlm
from sigphi.train.text_tower import TEXTS_A_BATCH, TOKENS_A_BATCH
from sigphi.train.trainers import SiglipTrainer, tower_inputs
from sigphi.train.whitening import freeze_stem, whiten_text_projection

# What `encode_images` takes at once, and the longest answer that an evaluation asks for.
ENCODED_AT_ONCE = 256
ANSWER_TOKENS = 80

# A language model of more than twice the larger number of layers is run with so few, and all its costs are read off
# the line through both.
_FEW_LAYERS = (2, 4)

_BASE_PARTS = ("language model", "text tower")
_BACKWARD, _SECOND_HALF = "backward", "backward, second half"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer states"


@dataclass(frozen=True)
class Costs:
    """
    What a training needs of its device.

    Args:
        parameters, base, trained (`float`): how many there are in all, in the language model or text tower, and how
            many are trained.
        weights (`dict[str, float]`): bytes by part.
        moments (`dict[str, dict[str, float]]`): for each moment of the run, the bytes of all that is alive where the
            sum is highest, by kind.
        flops, seconds (`float`): of a training step.
        feature_bytes, feature_seconds (`float`): of the features of one image (VLM) or text (encoder), for a cache.
    """

    parameters: float
    base: float
    trained: float
    weights: dict[str, float]
    moments: dict[str, dict[str, float]]
    flops: float
    seconds: float
    feature_bytes: float
    feature_seconds: float

    @property
    def optimizer(self) -> float:
        """Bytes of the optimizer's states."""
        return self.moments["update"].get(OPTIMIZER, 0.0)


def highest(moments: dict[str, dict[str, float]]) -> tuple[str, float]:
    """The moment that needs most, and its bytes."""
    sums = {moment: sum(kinds.values()) for moment, kinds in moments.items()}
    moment = max(sums, key=lambda name: sums[name])
    return moment, sums[moment]


@dataclass(frozen=True)
class VlmBatch:
    """
    The size of a batch of questions.

    Args:
        rows (`int`): rows, each a question or a packed one.
        length (`int`): tokens of the longest, to which all are padded.
        images (`int`): images of all rows.
        supervised (`int`): answer tokens of all rows.
        longest_prompt (`int`): tokens of the longest question of the whole set.
        longest (`int`): tokens of the longest question of the whole set with its answer.
    """

    rows: int
    length: int
    images: int
    supervised: int
    longest_prompt: int
    longest: int


@dataclass(frozen=True)
class VlmSetup:
    """
    What the costs of training a VLM depend on beside the batch.

    Args:
        model, training: the options.
        encoder, text: the configs of the parts.
        tokenizer: the language model's, prepared.
        caches_features (`bool`): whether the image tower runs once an image.
        evaluates (`bool`): whether there are evaluations.
        packs (`bool`, *optional*, defaults to `False`): whether rows hold several questions.
    """

    model: VlmModelArguments
    training: VlmTrainingArguments
    encoder: SiglipResNetConfig
    text: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    caches_features: bool
    evaluates: bool
    packs: bool = False


@dataclass(frozen=True)
class SiglipBatch:
    """
    The size of a batch of images with their texts.

    Args:
        images, texts (`int`): how many of each are in a batch; equal texts are one.
        length (`int`): tokens of the longest text.
        all_texts (`int`): texts of the whole set; equal ones are one.
    """

    images: int
    texts: int
    length: int
    all_texts: int


@dataclass(frozen=True)
class SiglipSetup:
    """What the costs of training an encoder depend on beside the batch."""

    model: SiglipModelArguments
    training: SiglipTrainingArguments
    encoder: SiglipResNetConfig
    evaluates: bool

    @property
    def caches_features(self) -> bool:
        """Whether the text tower runs once a text, before training."""
        return self.model.caches_texts


def vlm_costs(setup: VlmSetup, batch: VlmBatch, speed: Speed | None = None) -> Costs:
    """
    The costs of `sigphi train-vlm`.

    Args:
        setup (`VlmSetup`): models and options.
        batch (`VlmBatch`): the largest batch.
        speed (`Speed`, *optional*): of the device; without it `seconds` mean nothing.

    Raises:
        UserError: if the optimizer, or the kind of LoRA, is none that runs without data.
    """
    return _by_layers(
        setup.text,
        build=lambda text: _meta_vlm(replace(setup, text=text)),
        run=lambda model: _run_vlm(model, setup, batch, speed),
    )


def siglip_costs(setup: SiglipSetup, batch: SiglipBatch, speed: Speed | None = None) -> Costs:
    """The costs of `sigphi train-siglip`; arguments and errors as those of [`vlm_costs`]."""
    text: Any = setup.encoder.text_config
    return _by_layers(
        text,
        build=lambda part: _encoder_to_train(setup, part),
        run=lambda model: _run_encoder(model, setup, batch, speed),
    )


# Depth ---------------------------------------------------------------------------------------------------------------


def _by_layers(
    text: PreTrainedConfig, build: Callable[[PreTrainedConfig], nn.Module], run: Callable[[nn.Module], Costs]
) -> Costs:
    """Run the whole model, or where its language model has many equal layers, two with few."""
    few, more = _FEW_LAYERS
    with _quietly():
        whole = build(text)
        if text.num_hidden_layers <= 2 * more:
            return _with_whole_backward(run(whole))
        low, high = (run(build(_with_layers(text, layers))) for layers in (few, more))
        costs = Costs(**_on_line(asdict(low), asdict(high), (text.num_hidden_layers - few) / (more - few)))
        # Layers of different sizes, as some mixtures of experts have, do not lie on a line.
        is_line = costs.parameters == _number_of(whole.parameters())
        return _with_whole_backward(costs if is_line else run(whole))


def _with_whole_backward(costs: Costs) -> Costs:
    """With the two halves of the backward pass as one moment."""
    halves = {name: kinds for name, kinds in costs.moments.items() if name in (_BACKWARD, _SECOND_HALF)}
    others = {name: kinds for name, kinds in costs.moments.items() if name not in halves}
    return replace(costs, moments=others | {_BACKWARD: halves[highest(halves)[0]]})


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What building and running models logs and warns of is not shown: they are none of the user's."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _with_layers(text: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    fields = text.to_dict()
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:layers]
    return type(text).from_dict(fields | {"num_hidden_layers": layers})


def _on_line(low: Any, high: Any, position: float) -> Any:
    """The value at `position` of the line through `low` at 0 and `high` at 1; of dicts for each key."""
    if isinstance(low, dict):
        return {key: _on_line(low.get(key, 0), high.get(key, 0), position) for key in low | high}
    return low + (high - low) * position


# Models without weights ----------------------------------------------------------------------------------------------


def _meta_vlm(setup: VlmSetup) -> SigPhiForConditionalGeneration:
    """The VLM as `train-vlm` builds it."""
    arguments = setup.model
    if arguments.use_dora and arguments.bits < 16:
        raise UserError(
            f"--use-dora with --bits {arguments.bits} cannot be planned, because it reads the quantised weights: plan "
            f"with --bits 16, or without --use-dora."
        )
    dtype = weights_dtype(setup.training)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(
            setup.text,
            dtype=torch.float32 if arguments.tuning == "full" else dtype,
            attn_implementation=_attention(setup),
        )
        if arguments.bits < 16:
            _quantize(language_model, arguments.bits, dtype)
        vision_config: Any = setup.encoder.vision_config
        vision_tower = SiglipResNetVisionModel(vision_config).to(tower_dtype(weights_dtype(setup.training)))
        model = build_vlm(vision_tower, language_model, setup.tokenizer, arguments)
    model.config.use_cache = setup.training.use_cache  # as the Trainer does
    return model


def _attention(setup: VlmSetup) -> str:
    """
    Neither FlashAttention nor FlexAttention runs without data; the fused kernels of sdpa keep no matrix of scores
    either.
    """
    requested = setup.model.attn_implementation
    choice = choose_attn_implementation(requested, setup.text, setup.packs, setup.training.fp16)
    return "sdpa" if choice in ("flash_attention_2", "flex_attention") else choice


def _quantize(language_model: Any, bits: int, dtype: torch.dtype) -> None:
    """Put the layers of bitsandbytes where loading a checkpoint would put them."""
    quantizer = AutoHfQuantizer.from_config(base_quantization(bits, dtype))
    quantizer.preprocess_model(model=language_model, device_map=None)
    quantizer.postprocess_model(language_model)
    for name, parameter in language_model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = parameter.data.to(dtype)


def _encoder_to_train(setup: SiglipSetup, text: PreTrainedConfig) -> SiglipResNetModel:
    """Of [`_meta_encoder`], what stays as it is frozen."""
    model = _meta_encoder(setup.encoder, text)
    text_tower: Any = model.text_model.language_model
    text_tower.requires_grad_(setup.model.train_text_tower)
    if setup.model.whiten_stem:
        freeze_stem(model.vision_model)
    return model


def _meta_encoder(encoder: SiglipResNetConfig, text: PreTrainedConfig) -> SiglipResNetModel:
    """The encoder as `train-siglip` builds it, its text tower included."""
    config = copy.deepcopy(encoder)
    config.text_config, config.include_text_tower = text, True
    with torch.device("meta"):
        return SiglipResNetModel(config)


def _number_of(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _vlm_part(name: str, tensor: torch.Tensor) -> str:
    if name.startswith("model.vision_tower."):
        return "image tower"
    if name.startswith("model.multi_modal_projector."):
        return "projector"
    if "lora_" in name:
        return "LoRA"
    is_quantised = type(tensor).__name__ in ("Params4bit", "Int8Params")
    return f"language model, {'quantised' if is_quantised else 'not quantised'}"


def _encoder_part(name: str, tensor: torch.Tensor) -> str:
    if name.startswith("text_model.language_model."):
        return "text tower"
    return "image tower" if name.startswith("vision_model.") else "text projection, temperature, bias"


# One step ------------------------------------------------------------------------------------------------------------


class _Run:
    """A model on fake tensors with its optimizer, and the moments of its training."""

    def __init__(
        self, model: Any, arguments: Any, part_of: Callable[[str, torch.Tensor], str], speed: Speed | None
    ) -> None:
        self.model, self.arguments = model, arguments
        self.parameters = _number_of(model.parameters())
        named = model.named_parameters()
        self.base = _number_of(tensor for name, tensor in named if part_of(name, tensor).startswith(_BASE_PARTS))
        self.mode, self.meter = fake_mode(), MemoryMeter(arguments.device, speed)
        self.work: dict[str, tuple[int, float]] = {}  # FLOPs and seconds of each moment
        with self.meter:
            materialize(model, arguments.device, self.mode, self.meter, part_of)
        self.weights = dict(self.meter.alive)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)

    def add_weights(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """A copy of `tensors` that lies on the device in all moments."""
        with self.meter:
            self.meter.kind = kind
            self.copies = [torch.empty_like(tensor) for tensor in tensors]
        self.weights = dict(self.meter.alive)

    def fake(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor without data on the device."""
        with self.mode:
            return torch.empty(*shape, dtype=dtype, device=self.arguments.device)

    def forward(self, **inputs: Any) -> Any:
        """The model's outputs, in the precision of the training."""
        half = torch.bfloat16 if self.arguments.bf16 else torch.float16
        enabled = self.arguments.bf16 or self.arguments.fp16
        with torch.autocast(self.arguments.device.type, dtype=half, enabled=enabled):
            return self.model(**inputs)

    def train_step(
        self,
        inputs: Callable[[], dict[str, Any]],
        layers: nn.ModuleList | None,
        loss_of: Callable[[Any], torch.Tensor] = lambda outputs: outputs.loss,
    ) -> None:
        """
        The moments of a training step.

        Args:
            inputs (`Callable`): makes the batch.
            layers (`nn.ModuleList`, *optional*): of the language model, when gradients pass through it. What is alive
                in the backward pass changes evenly from layer to layer, so that it is highest at one of its ends; with
                its halves as two moments each of them lies on a line over the number of layers.
            loss_of (`Callable`, *optional*): the loss of the model's outputs; by default the one among them.
        """
        self.model.train()
        self.optimizer = optimizer = self._optimizer_with_states()
        hooks = [parameter.register_post_accumulate_grad_hook(self._note_gradient) for parameter in self.trained]
        if layers is not None:
            hooks.append(layers[len(layers) // 2].register_forward_pre_hook(self._split_backward))
        with self._working("step"):
            self.meter.begin("forward", "activations")
            loss = loss_of(self.forward(**inputs()))
            self.meter.begin(_BACKWARD, "temporaries of the backward pass")
            loss.backward()
            del loss
            self.meter.begin("update", "temporaries of the update")
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            self.meter.end()
            optimizer.zero_grad()
        for hook in hooks:
            hook.remove()

    def _optimizer_with_states(self) -> torch.optim.Optimizer:
        """An optimizer that has made a step, as at all steps but the first; gradients stay where they accumulate."""
        optimizer = optimizer_of(self.arguments, self.model, self.trained)
        with self.meter:
            self.meter.kind = GRADIENTS
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            self.meter.kind = OPTIMIZER
            optimizer.step()
            if self.arguments.gradient_accumulation_steps == 1:
                optimizer.zero_grad()
        self.resident = self.weights | {OPTIMIZER: self.meter.alive[OPTIMIZER]}
        return optimizer

    def _note_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.meter.move(parameter.grad, GRADIENTS)

    def _split_backward(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: self.meter.begin(_SECOND_HALF, self.meter.kind))

    @contextlib.contextmanager
    def _working(self, name: str) -> Iterator[None]:
        flops, seconds = self.meter.flops, self.meter.seconds
        with self.meter:
            yield
        self.work[name] = (self.meter.flops - flops, self.meter.seconds - seconds)

    @contextlib.contextmanager
    def inference(self, moment: str) -> Iterator[None]:
        """Within it all belongs to `moment`, and nothing is kept for a backward pass."""
        self.model.eval()
        with torch.no_grad(), self._working(moment):
            self.meter.begin(moment, "activations")
            yield
            self.meter.end()

    def costs(self, feature_bytes: float, feature_moment: str, at_once: int) -> Costs:
        """What the run has found; one pass of `feature_moment` gave the features of `at_once` items."""
        flops, seconds = self.work["step"]
        return Costs(
            parameters=self.parameters,
            base=self.base,
            trained=_number_of(self.trained),
            weights={kind: float(size) for kind, size in self.weights.items()},
            moments={moment: {k: float(v) for k, v in kinds.items()} for moment, kinds in self.meter.moments.items()},
            flops=flops,
            seconds=seconds,
            feature_bytes=feature_bytes,
            feature_seconds=self.work[feature_moment][1] / at_once,
        )


def optimizer_of(arguments: TrainingArguments, model: Any, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """
    The Trainer's optimizer, over parameters without data.

    Raises:
        UserError: unless it is one of torch or bitsandbytes.
    """
    trainer = SiglipTrainer if isinstance(arguments, SiglipTrainingArguments) else Trainer
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if arguments.optim in BITSANDBYTES_OPTIMIZERS:
        # States that can leave the device count as on it: they leave only when it is full.
        options = {name: value for name, value in options.items() if name != "is_paged"}
    elif not issubclass(optimizer_class, Muon) and not optimizer_class.__module__.startswith("torch.optim"):
        raise UserError(
            f"--optim {arguments.optim.value} does not run without data, so that its memory cannot be planned; plan "
            f"with one of torch, such as adamw_torch_fused, which needs 8 bytes for each trained parameter."
        )
    return optimizer_class(trained, **options)


def _run_vlm(model: Any, setup: VlmSetup, batch: VlmBatch, speed: Speed | None) -> Costs:
    run = _Run(model, setup.training, _vlm_part, speed)
    ids = _Ids(model.config.image_token_id, setup.model.num_image_tokens, setup.training.device)
    vision: Any = setup.encoder.vision_config
    pixels = (3, vision.image_size, vision.image_size)
    with run.inference("image features"):
        features = model.model.get_vision_features(run.fake(ENCODED_AT_ONCE, *pixels))[:1]

    def image(rows: int) -> dict[str, torch.Tensor]:
        if setup.caches_features:
            return {"image_features": run.fake(rows, *features.shape[1:], dtype=features.dtype)}
        return {"pixel_values": run.fake(rows, *pixels)}

    def begin_loss(*_: Any) -> None:
        run.meter.kind = "logits and loss"

    model.lm_head.register_forward_pre_hook(begin_loss)
    inputs = ids.packed if setup.packs else ids.supervised
    run.train_step(lambda: inputs(batch) | image(batch.images), _layers_of(model.model.language_model))
    if setup.evaluates:
        rows = setup.training.per_device_eval_batch_size
        with run.inference("evaluation, questions"):
            before = run.meter.total
            questions = ids.prompts(rows, batch.longest) | image(rows)
            cache = run.forward(**questions, use_cache=True, logits_to_keep=1)[CACHE]
            del questions
            cached = run.meter.total - before
        del cache
        grown = (batch.longest_prompt + ANSWER_TOKENS) / batch.longest
        run.meter.moments["evaluation, answers"] = run.resident | {"keys and values": int(cached * grown)}
    if setup.encoder.include_text_tower:
        encoder = _meta_encoder(setup.encoder, setup.encoder.text_config)
        itemsize = model.model.vision_tower.dtype.itemsize
        tower = _number_of(encoder.parameters()) * itemsize
        run.meter.moments["loading"] = run.weights | {"the encoder with its text tower": tower}
    return run.costs(features.numel() * features.itemsize, "image features", ENCODED_AT_ONCE)


@dataclass(frozen=True)
class _Ids:
    """Token ids. They have values, because the model counts placeholders and gathers supervised positions."""

    image_token_id: int
    num_image_tokens: int
    device: torch.device

    def prompts(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(rows, length, dtype=torch.long, device=self.device)
        ids[:, : self.num_image_tokens] = self.image_token_id
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # without any padding the attention would do without a mask
        return {"input_ids": ids, "attention_mask": mask}

    def supervised(self, batch: VlmBatch) -> dict[str, torch.Tensor]:
        inputs = self.prompts(batch.rows, batch.length)
        return inputs | {"labels": self._labels(inputs["input_ids"], batch)}

    def packed(self, batch: VlmBatch) -> dict[str, torch.Tensor]:
        """Which token sees which costs the same however many segments there are."""
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long, device=self.device)
        ids.view(-1)[: batch.images * self.num_image_tokens] = self.image_token_id
        zeros = {name: torch.zeros_like(ids) for name in ("position_ids", "segment_ids", "prefix_ids")}
        return zeros | {"input_ids": ids, "labels": self._labels(ids, batch)}

    def _labels(self, ids: torch.Tensor, batch: VlmBatch) -> torch.Tensor:
        labels = torch.full_like(ids, IGNORE_INDEX)
        answer = torch.arange(batch.supervised, device=self.device)  # in turn the last token of each row, and so on
        labels[answer % batch.rows, batch.length - 1 - answer // batch.rows] = 0
        return labels


def _layers_of(language_model: Any) -> nn.ModuleList:
    """The layers of a language model, whatever their list is called."""
    count = language_model.config.num_hidden_layers
    return next(m for m in language_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def _run_encoder(model: Any, setup: SiglipSetup, batch: SiglipBatch, speed: Speed | None) -> Costs:
    arguments = setup.training
    if arguments.channels_last:
        model.vision_model.to(memory_format=torch.channels_last)
    run = _Run(model, arguments, _encoder_part, speed)
    if arguments.ema_decay > 0:
        run.add_weights("average of the trained weights", averaged_tensors(model).values())
    vision: Any = setup.encoder.vision_config
    hidden_size = model.text_model.projection.in_features

    texts_at_once = min(TEXTS_A_BATCH, max(TOKENS_A_BATCH // batch.length, 1))

    def texts(rows: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(rows, batch.length, dtype=torch.long, device=arguments.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    image_processor = SiglipImageProcessor()  # whatever it normalises by takes the same memory
    parts = -(-batch.images // (arguments.micro_batch_size or batch.images))
    image_ids = torch.arange(batch.images, device=arguments.device)[:, None]
    text_ids = F.pad(torch.arange(batch.texts, device=arguments.device)[:, None], (0, 2))

    def inputs() -> dict[str, Any]:
        images, part = -(-batch.images // parts), -(-batch.texts // parts)
        shape = (images, 3, vision.image_size, vision.image_size)
        index = torch.arange(images, device=arguments.device)
        pixels = tower_inputs(image_processor, arguments, run.fake(*shape, dtype=torch.uint8), index, epoch=0)
        if arguments.channels_last:
            pixels = pixels.to(memory_format=torch.channels_last)
        words = {"text_features": run.fake(part, hidden_size)} if setup.caches_features else texts(part)
        return words | {"pixel_values": pixels, "return_logits": False}

    def whole_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        others = (model.logit_scale, model.logit_bias, image_ids, text_ids)
        return global_sigmoid_loss(image_embeds, text_embeds, *others, chunk_size=arguments.loss_chunk_size)

    with run.inference("text features"):
        model.text_model.pool(**texts(texts_at_once))
    if setup.caches_features:  # training then holds no text tower
        model.text_model.language_model = None
    if setup.model.siglip_checkpoint is None:
        with run.inference("whitening of the text projection"):
            whiten_text_projection(model, run.fake(batch.all_texts, hidden_size))
    layers = _layers_of(model.text_model.language_model) if setup.model.train_text_tower else None
    if parts == 1:
        run.train_step(inputs, layers, lambda outputs: whole_loss(outputs.image_embeds, outputs.text_embeds))
    else:
        _run_in_parts(run, inputs, layers, whole_loss, batch, parts)
    if setup.evaluates:
        with run.inference("evaluation, images"):
            model(pixel_values=run.fake(arguments.per_device_eval_batch_size, 3, vision.image_size, vision.image_size))
    return run.costs(torch.float32.itemsize * hidden_size, "text features", texts_at_once)


def _run_in_parts(
    run: _Run,
    inputs: Callable[[], dict[str, Any]],
    layers: nn.ModuleList | None,
    whole_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch: SiglipBatch,
    parts: int,
) -> None:
    """A step as `--micro-batch-size` makes it: `inputs` are those of one part, and both passes take all in turn."""
    dim = run.model.config.projection_dim
    with run.inference("first pass"):
        run.forward(**inputs())
    with run.inference("loss over all parts"):
        whole = [run.fake(count, dim) for count in (batch.images, batch.texts)]
        gradients = [torch.empty_like(embeds) for embeds in whole]
        whole_loss(*whole)
    run.train_step(
        inputs,
        layers,
        lambda outputs: (
            (outputs.image_embeds * gradients[0][: len(outputs.image_embeds)]).sum()
            + (outputs.text_embeds * gradients[1][: len(outputs.text_embeds)]).sum()
            + run.model.logit_scale.sum()
            + run.model.logit_bias.sum()
        ),
    )
    passes = [run.work[moment] for moment in ("first pass", "step")]
    loss = run.work["loss over all parts"]
    flops, seconds = (loss[place] + parts * sum(one[place] for one in passes) for place in (0, 1))
    run.work["step"] = (int(flops), seconds)


__all__ = [
    "ANSWER_TOKENS",
    "ENCODED_AT_ONCE",
    "GRADIENTS",
    "OPTIMIZER",
    "Costs",
    "SiglipBatch",
    "SiglipSetup",
    "VlmBatch",
    "VlmSetup",
    "highest",
    "optimizer_of",
    "siglip_costs",
    "vlm_costs",
]
