"""The SigLIP encoder: a ResNet image tower, a text tower, and the pairwise sigmoid loss."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel, ResNetModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig, SiglipResNetVisionConfig
from sigphi.configuration.hub_code import check_public, check_weights

# What stays unquantised when the whole model is: all but the language model of the text tower.
NOT_QUANTIZED = ("vision_model", r"text_model\.projection")


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    positives: torch.Tensor | None = None,
    ignored: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Pairwise sigmoid loss (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, equation 1).

    With x the image and y the text embeddings, t = exp(t'), and z = 1 for a positive pair and -1 for a negative one:
    `-1/|images| * sum_ij log sigmoid(z_ij * (t * x_i . y_j + b))`. Computed in float32, or in float64 for such
    embeddings. This is the loss of one process, with all logits in memory; `sigphi.global_sigmoid_loss` is that of
    many, in chunks.

    Args:
        image_embeds (`torch.Tensor` of shape `(images, dim)`): L2-normalised image embeddings.
        text_embeds (`torch.Tensor` of shape `(texts, dim)`): L2-normalised text embeddings.
        logit_scale (`torch.Tensor`, scalar): the log temperature t'.
        logit_bias (`torch.Tensor`, scalar): the bias b.
        positives (`torch.BoolTensor` of shape `(images, texts)`, *optional*):
            Which pairs belong together. An image may have several texts and a text several images. Without it, image
            i belongs to text i alone.
        ignored (`torch.BoolTensor` of shape `(images, texts)`, *optional*):
            Pairs that count neither way, because nobody knows whether they belong together.

    Returns:
        `torch.Tensor`: the scalar loss, float32 or float64.

    Raises:
        ValueError: if `positives` or `ignored` has another shape than `(images, texts)`, or `positives` is left out
            while the numbers differ.
    """
    logits = pairwise_logits(image_embeds, text_embeds, logit_scale, logit_bias)  # (images, texts)
    if positives is None:
        if logits.shape[0] != logits.shape[1]:
            raise ValueError(
                f"`positives` is needed when the numbers of images and texts differ, got {logits.shape[0]} images and "
                f"{logits.shape[1]} texts."
            )
        positives = torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
    for name, mask in (("positives", positives), ("ignored", ignored)):
        if mask is not None and mask.shape != logits.shape:
            raise ValueError(
                f"`{name}` must have the shape (images, texts) = {tuple(logits.shape)}, got {tuple(mask.shape)}."
            )
    signs = torch.where(positives, 1.0, -1.0)  # (images, texts)
    losses = -F.logsigmoid(signs * logits)  # (images, texts)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
    return losses.sum() / logits.shape[0]


def pairwise_logits(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, logit_bias: torch.Tensor
) -> torch.Tensor:
    """Logits `exp(t') * x . y + b` of shape `(images, texts)`, at least in float32, also under autocast."""
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    with torch.autocast(image_embeds.device.type, enabled=False):
        similarity = image_embeds.to(dtype) @ text_embeds.to(dtype).t()  # (images, texts)
        return similarity * logit_scale.to(dtype).exp() + logit_bias.to(dtype)


def right_padded(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Move the real tokens of each row to its start, keeping their order.

    Every text tower then numbers its positions from 0 at the first real token, so that left and right padding give
    the same numbers, whatever kind of position embedding the tower has.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): token ids, padded on either side.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for real tokens; all are without it.

    Returns:
        `tuple`: ids and mask of the same shapes, and the index `(batch,)` of each row's last real token.

    Raises:
        ValueError: if a row has no real token.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    lengths = attention_mask.ne(0).sum(-1)  # (batch,)
    if not torch.compiler.is_compiling() and bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"`attention_mask` has no real token in row {row}; a text must have at least one.")
    order = attention_mask.eq(0).to(torch.int8).argsort(dim=-1, stable=True)  # (batch, length)
    return input_ids.gather(1, order), attention_mask.gather(1, order), lengths - 1


def pooled_states(
    tower: nn.Module, config: SiglipResNetConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The states of a text tower, pooled over the real tokens of each text as `config` says.

    Args:
        tower (`nn.Module`): a text model of transformers.
        config (`SiglipResNetConfig`): `text_layer` and `text_pooling` count.
        input_ids, attention_mask (`torch.Tensor` of shape `(texts, length)`): see [`right_padded`].

    Returns:
        `tuple`: states `(texts, length, hidden_size)`, the real tokens first, and pooled ones `(texts, hidden_size)`.
    """
    input_ids, attention_mask, last = right_padded(input_ids, attention_mask)
    outputs = tower(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    hidden_states = outputs.hidden_states[config.text_layer]  # (texts, length, hidden_size)
    if config.text_pooling == "last":
        return hidden_states, hidden_states[torch.arange(len(last), device=last.device), last]
    weights = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # (texts, length, 1)
    return hidden_states, (hidden_states * weights).sum(1) / weights.sum(1)


@dataclass
class SiglipResNetOutput(ModelOutput):
    r"""
    Output of [`SiglipResNetModel`]. What needs a modality that was not given is `None`.

    Args:
        loss (`torch.FloatTensor`, scalar): the sigmoid loss, with `return_loss=True`.
        image_embeds (`torch.FloatTensor` of shape `(images, projection_dim)`): L2-normalised image embeddings.
        text_embeds (`torch.FloatTensor` of shape `(texts, projection_dim)`): L2-normalised text embeddings.
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`): `exp(t') * x . y + b`, before the sigmoid.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`): its transpose.
        text_model_output, vision_model_output (`BaseModelOutputWithPooling`): what the towers return.
        pooler_output (`torch.FloatTensor` of shape `(images, projection_dim)`): `image_embeds`, where images alone are
            given: the name under which `pipeline("image-feature-extraction")` looks for it.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    pooler_output: torch.FloatTensor | None = None


class SiglipResNetSmallStem(nn.Module):
    """The stem for small images: one 3x3 convolution that keeps the resolution (He et al., section 4.2)."""

    def __init__(self, config: SiglipResNetVisionConfig) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(config.embedding_size)
        self.activation = nn.ReLU()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.activation(self.normalization(self.convolution(pixel_values)))  # (images, embedding, h, w)


class OneCellConv2d(nn.Conv2d):
    """
    A convolution that a CPU computes as a matrix product where its output has one cell.

    A ResNet with the usual stem comes to one cell in its last stage from images of 32 pixels, where the convolution of
    PyTorch takes two to five times as long. Parts of the kernel that see nothing but padding are left out. Without
    dilation and groups.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _), (height, width) = self.kernel_size, self.stride, input.shape[-2:]
        padding = int(self.padding[0])
        has_one_cell = all(0 <= size + 2 * padding - kernel < stride for size in (height, width))
        if input.device.type != "cpu" or not has_one_cell:
            return super().forward(input)  # (images, out_channels, h, w)
        rows, columns = min(height, kernel - padding), min(width, kernel - padding)
        seen = self.weight[:, :, padding : padding + rows, padding : padding + columns]
        output = F.linear(input[:, :, :rows, :columns].flatten(1), seen.flatten(1), self.bias)
        return output[:, :, None, None]  # (images, out_channels, 1, 1)


class MaxPooledConv2d(OneCellConv2d):
    """A convolution that moves by one cell, and the largest of 2x2 of its cells, over what is left at odd borders."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(super().forward(input), kernel_size=2, ceil_mode=True)  # (images, out, h / 2, w / 2)


class AveragePooledConv2d(OneCellConv2d):
    """A convolution that moves by one cell, of the mean of 2x2 cells, over what is left at odd borders."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(F.avg_pool2d(input, kernel_size=2, ceil_mode=True))  # (images, out, h / 2, w / 2)


def choose_convolution(convolution: nn.Conv2d, downsampling: str) -> None:
    """
    Make a convolution of a ResNet's stage one of the classes above, which have the same parameters by the same names.

    Args:
        convolution (`nn.Conv2d`): changed in place.
        downsampling (`str`): see [`SiglipResNetVisionConfig`].
    """
    is_pooled = downsampling == "pool" and convolution.stride == (2, 2)
    if not is_pooled:
        convolution.__class__ = OneCellConv2d
        return
    convolution.stride = (1, 1)
    convolution.__class__ = AveragePooledConv2d if convolution.kernel_size == (1, 1) else MaxPooledConv2d


@contextlib.contextmanager
def keep_batch_norm_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, a forward pass of `module` in training mode leaves the running statistics as they are.

    Gradient checkpointing runs the forward pass twice; without this the statistics would move twice a step.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    saved = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    # Without momentum the new value is the old one; no buffer is replaced, because the backward pass has saved them.
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


class SiglipResNetVisionModel(ResNetModel):
    """
    The image tower: a ResNet and a linear projection of its pooled features.

    The weights of a ResNet of transformers load into it:
    `SiglipResNetVisionModel.from_pretrained("microsoft/resnet-50")` leaves only `projection` newly made.
    """

    config_class = SiglipResNetVisionConfig
    config: SiglipResNetVisionConfig
    supports_gradient_checkpointing = True
    # A ResNet has no attention, so any attention implementation that is asked of the whole model suits it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SiglipResNetVisionConfig) -> None:
        super().__init__(config)
        if config.stem == "cifar":
            self.embedder = SiglipResNetSmallStem(config)
        for module in self.encoder.modules():
            if type(module) is nn.Conv2d:
                choose_convolution(module, config.downsampling)
        self.projection = nn.Linear(config.hidden_sizes[-1], config.projection_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): normalised images.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(images, hidden_sizes[-1], grid, grid)` and
            `pooler_output` of shape `(images, projection_dim)`, not normalised.
        """
        hidden_states = self.embedder(pixel_values.to(self.projection.weight.dtype))  # (images, channels, h, w)
        for stage in self.encoder.stages:
            hidden_states = self._run_stage(stage, hidden_states)
        pooled = self.pooler(hidden_states).flatten(1)  # (images, hidden_sizes[-1])
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.projection(pooled))

    def _run_stage(self, stage: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if not (self.gradient_checkpointing and self.training):
            return stage(hidden_states)
        return torch.utils.checkpoint.checkpoint(
            stage,
            hidden_states,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), keep_batch_norm_statistics(stage)),
        )


class ScaleKeepingLinear(nn.Linear):
    """A linear layer whose weights start with variance 1 / in_features: its output has the scale of its input."""


def quantization_sparing(
    quantization: BitsAndBytesConfig, always: Sequence[str], by_default: Sequence[str] = ()
) -> BitsAndBytesConfig:
    """
    The same quantisation, but not of some modules, which compute in their weights' precision.

    Args:
        quantization (`BitsAndBytesConfig`): stays as it is.
        always (`Sequence[str]`): regular expressions for the beginning of a module's full name.
        by_default (`Sequence[str]`, *optional*): what is spared as well where it names no `llm_int8_skip_modules`.
    """
    quantization, given = copy.deepcopy(quantization), quantization.llm_int8_skip_modules
    quantization.llm_int8_skip_modules = list(dict.fromkeys([*(by_default if given is None else given), *always]))
    return quantization


class SiglipResNetPreTrainedModel(PreTrainedModel):
    config_class = SiglipResNetConfig
    config: SiglipResNetConfig
    base_model_prefix = "siglip_resnet"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """
        Load as transformers does. A `BitsAndBytesConfig` quantises the text tower alone, without its projection.

        Raises:
            OSError: if a file of weights is not the one that was published, see [`check_weights`].
        """
        if isinstance(kwargs.get("quantization_config"), BitsAndBytesConfig):
            kwargs["quantization_config"] = quantization_sparing(kwargs["quantization_config"], NOT_QUANTIZED)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        check_weights(pretrained_model_name_or_path, model.config.weight_hashes, **kwargs)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SiglipResNetModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.constant_(module.logit_bias, self.config.logit_bias_init_value)
        elif isinstance(module, ScaleKeepingLinear):
            init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))


class SiglipResNetTextModel(SiglipResNetPreTrainedModel):
    """The text tower: any text model of transformers, pooled over its real tokens and projected."""

    def __init__(self, config: SiglipResNetConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config) if config.include_text_tower else None
        # The scale of the text tower's states is unknown.
        self.projection = ScaleKeepingLinear(config.text_config.hidden_size, config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        # Without a text tower there are none, and gradient checkpointing asks.
        return None if self.language_model is None else self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._tower().set_input_embeddings(value)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(texts, length)`): token ids, padded on either side.
            attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*): 1 for real tokens.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(texts, length, hidden_size)`, the real tokens
            first whatever the padding side, and `pooler_output` of shape `(texts, projection_dim)`, not normalised.

        Raises:
            ValueError: if the text tower is not loaded, or a text has no real token.
        """
        hidden_states, pooled = self.pool(input_ids, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.project(pooled))

    def pool(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's states `(texts, length, hidden_size)`, and what the projection reads of them.

        The second, of shape `(texts, hidden_size)`, may be computed once per text while the tower is frozen, and given
        to [`SiglipResNetModel.forward`] as `text_features`.
        """
        return pooled_states(self._tower(), self.config, input_ids, attention_mask)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """From pooled states `(texts, hidden_size)` to embeddings `(texts, projection_dim)`, not normalised."""
        return self.projection(pooled.to(self.projection.weight.dtype))

    def _tower(self) -> PreTrainedModel:
        if self.language_model is None:
            raise ValueError(
                f"This encoder was saved without its frozen text tower {self.config.text_model_name_or_path!r} "
                f"(revision {self.config.text_model_revision!r}); call `model.load_text_tower()` before embedding "
                f"texts."
            )
        return self.language_model


class SiglipResNetModel(SiglipResNetPreTrainedModel):
    """
    SigLIP with a ResNet image tower.

    ```python
    >>> model = SiglipResNetModel(SiglipResNetConfig(vision_config={"stem": "cifar", "image_size": 32}))
    >>> model.get_image_features(torch.zeros(2, 3, 32, 32)).pooler_output.shape
    torch.Size([2, 512])
    ```
    """

    # With `**kwargs` in forward the Trainer would otherwise believe that the loss is already divided by its counts.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"text_model\.language_model\."]

    def __init__(self, config: SiglipResNetConfig) -> None:
        super().__init__(config)
        self.vision_model = SiglipResNetVisionModel(config.vision_config)
        self.text_model = SiglipResNetTextModel(config)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(()))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "SiglipResNetModel":
        """Training mode, but a frozen text tower stays in evaluation mode, so that its dropout is off."""
        super().train(mode)
        tower = self.text_model.language_model
        if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        return self

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Publish as transformers does.

        Raises:
            ValueError: if the text tower is not inside and lies in a folder of this machine.
        """
        if not self.config.include_text_tower:
            check_public(self.config, "text_model_name_or_path")
        return super().push_to_hub(repo_id, **kwargs)

    def load_text_tower(self, pretrained_model_name_or_path: str | None = None, **kwargs: Any) -> None:
        """
        Read the text tower of an encoder that was saved without it, and freeze it.

        Args:
            pretrained_model_name_or_path (`str`, *optional*): repository or folder; by default the one that the config
                names, at the revision that it names.
            kwargs: further arguments of `AutoModel.from_pretrained`, such as `dtype` or `revision`.

        Raises:
            ValueError: if neither the argument nor the config names a text tower, or its hidden size is another one.
            OSError: if the repository or folder cannot be read.
        """
        name = pretrained_model_name_or_path or self.config.text_model_name_or_path
        if name is None:
            raise ValueError("`pretrained_model_name_or_path` is needed: the config names no text tower.")
        if pretrained_model_name_or_path is None:
            kwargs.setdefault("revision", self.config.text_model_revision or "main")
        kwargs.setdefault("dtype", self.dtype)
        tower = AutoModel.from_pretrained(name, **kwargs).to(self.device)
        expected = self.text_model.projection.in_features
        if tower.config.hidden_size != expected:
            raise ValueError(f"{name} has hidden size {tower.config.hidden_size}, this encoder needs {expected}.")
        self.text_model.language_model = tower.requires_grad_(False).eval()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The image tower's output; `pooler_output` of shape `(images, projection_dim)` is not normalised."""
        return self.vision_model(pixel_values)

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The text tower's output; `pooler_output` of shape `(texts, projection_dim)` is not normalised."""
        return self.text_model(input_ids, attention_mask)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        positives: torch.Tensor | None = None,
        ignored: torch.Tensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> SiglipResNetOutput:
        """
        Embed images, texts, or both. Either modality may be left out; what cannot be computed then is `None`.

        Args:
            input_ids (`torch.LongTensor` of shape `(texts, length)`, *optional*): token ids.
            pixel_values (`torch.FloatTensor` of shape `(images, 3, height, width)`, *optional*): normalised images.
            attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*): 1 for real tokens.
            text_features (`torch.FloatTensor` of shape `(texts, hidden_size)`, *optional*): the pooled states that
                [`SiglipResNetTextModel.pool`] gives, instead of `input_ids`.
            positives, ignored (`torch.BoolTensor` of shape `(images, texts)`, *optional*): see [`sigmoid_loss`].
            return_loss (`bool`, *optional*): whether to compute the loss; needs both modalities.
            return_logits (`bool`, *optional*, defaults to `True`): whether to compute the logits where both modalities
                are given. A large batch has no room for them.

        Raises:
            ValueError: if neither modality is given, one is missing for the loss, or texts are given twice.
        """
        if input_ids is not None and text_features is not None:
            raise ValueError("Give `input_ids` or `text_features`, not both.")
        has_text = input_ids is not None or text_features is not None
        if pixel_values is None and not has_text:
            raise ValueError("Give `pixel_values`, `input_ids`, or both.")
        if return_loss and (pixel_values is None or not has_text):
            raise ValueError("`return_loss=True` needs both `pixel_values` and `input_ids`.")
        vision = text = image_embeds = text_embeds = logits_per_image = loss = None
        if pixel_values is not None:
            vision = self.get_image_features(pixel_values)
            image_embeds = F.normalize(vision.pooler_output.float(), dim=-1)  # (images, projection_dim)
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask)
        elif text_features is not None:
            text = BaseModelOutputWithPooling(pooler_output=self.text_model.project(text_features))
        if text is not None:
            text_embeds = F.normalize(text.pooler_output.float(), dim=-1)  # (texts, projection_dim)
        if return_logits and image_embeds is not None and text_embeds is not None:
            logits_per_image = pairwise_logits(image_embeds, text_embeds, self.logit_scale, self.logit_bias)
        if return_loss:
            loss = sigmoid_loss(image_embeds, text_embeds, self.logit_scale, self.logit_bias, positives, ignored)
        return SiglipResNetOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=None if logits_per_image is None else logits_per_image.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
            pooler_output=None if has_text else image_embeds,
        )

    def save_pretrained(self, save_directory: Any, state_dict: dict | None = None, **kwargs: Any) -> None:
        """
        Save as transformers does; without the text tower's weights where `config.include_text_tower` is `False`.

        Raises:
            ValueError: with `push_to_hub`, if that text tower lies in a folder of this machine.
        """
        if not self.config.include_text_tower:
            if kwargs.get("push_to_hub"):
                check_public(self.config, "text_model_name_or_path")
            state_dict = {
                name: tensor
                for name, tensor in (state_dict or self.state_dict()).items()
                if not name.startswith("text_model.language_model.")
            }
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)


__all__ = [
    "AveragePooledConv2d",
    "MaxPooledConv2d",
    "OneCellConv2d",
    "ScaleKeepingLinear",
    "SiglipResNetModel",
    "SiglipResNetOutput",
    "SiglipResNetPreTrainedModel",
    "SiglipResNetTextModel",
    "SiglipResNetVisionModel",
    "keep_batch_norm_statistics",
    "pairwise_logits",
    "pooled_states",
    "quantization_sparing",
    "right_padded",
    "sigmoid_loss",
]
