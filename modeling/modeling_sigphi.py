"""The vision-language model: a SigLIP ResNet image tower, a projector, and a causal language model."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, is_peft_available
from transformers.utils.generic import can_return_tuple

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.configuration.hub_code import HUB_ARGUMENTS, check_public, check_weights
from sigphi.modeling.modeling_siglip_resnet import ScaleKeepingLinear, SiglipResNetVisionModel, quantization_sparing

if is_peft_available():
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

LORA_FOLDER = "lora"
LORA_WEIGHTS = "adapter_model.safetensors"
# Those that take a mask of which token sees which; FlashAttention-2 knows only whole sequences one after the other.
SEGMENT_ATTENTION = ("eager", "sdpa", "flex_attention")
# Logits of the loss that are in memory at a time: in float32 with their gradients a few hundred MB.
LOGITS_AT_ONCE = 2**23
# What stays unquantised when the whole model is: as regular expressions, since full names begin otherwise with a head.
NOT_QUANTIZED = (r"(?:.*\.)?vision_tower", r"(?:.*\.)?multi_modal_projector")
# What transformers calls keys and values, in calls and in outputs: another name from 5.24 on.
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))


@dataclass
class SigPhiModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`SigPhiModel`].

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(images, num_image_tokens, hidden_size)`):
            The soft tokens that took the placeholders' places.
    """

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class SigPhiCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Output of [`SigPhiForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor`, scalar): mean cross-entropy over the supervised tokens, with `labels`.
        logits (`torch.FloatTensor` of shape `(batch, length, vocab_size)`): scores before the softmax. `None` in
            training mode with `labels`, where only supervised positions reach the head.
        cache (`Cache`): keys and values for decoding; `past_key_values` before transformers 5.24.
        image_hidden_states (`torch.FloatTensor` of shape `(images, num_image_tokens, hidden_size)`): the soft tokens.
    """

    image_hidden_states: torch.FloatTensor | None = None


class SigPhiMultiModalProjector(nn.Module):
    """Two linear layers from image features to the language model's embeddings (LLaVA-1.5, arXiv 2310.03744)."""

    def __init__(self, config: SigPhiConfig) -> None:
        super().__init__()
        self.linear_1 = ScaleKeepingLinear(image_feature_size(config), config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = ScaleKeepingLinear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        # The tower may be kept in another precision than the projector, which is trained.
        image_features = image_features.to(self.linear_1.weight.dtype)
        return self.linear_2(self.act(self.linear_1(image_features)))  # (images, num_image_tokens, hidden_size)


def image_feature_size(config: SigPhiConfig) -> int:
    """Size of one image feature before the projector: the embedding's, or a feature map cell's."""
    vision = config.vision_config
    return vision.projection_dim if config.num_image_tokens == 1 else vision.hidden_sizes[-1]


class SigPhiPreTrainedModel(PreTrainedModel):
    config_class = SigPhiConfig
    config: SigPhiConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipResNetVisionModel"]  # and the layers that the language model names
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaleKeepingLinear):
            init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """
        Load as transformers does; the adapter form brings its base language model along.

        A folder whose config names a `base_language_model` holds only the image tower, the projector and the LoRA
        weights. The base is then read from its own repository or folder, quantised as it was in training
        (`config.base_bits`); `base_bits=16` or a `quantization_config` overrides that. The base may also be the
        language model inside another folder of this class. `output_loading_info` tells of the base's weights, by their
        names in this model: those of the form itself are all there, or loading fails.

        A `BitsAndBytesConfig` quantises the language model alone: image tower and projector are always left out, and
        the head where the config names no `llm_int8_skip_modules`.

        Raises:
            ImportError: if the adapter form is loaded without `peft`, or a quantised base without `bitsandbytes`.
            OSError: if the base language model cannot be read; the message names its repository and revision. Also if
                a file of weights is not the one that was published, see [`check_weights`].
            ValueError: if the base is itself in adapter form, or stored in another precision than is asked for.
        """
        config = kwargs.pop("config", None)
        # Not SigPhiConfig: of code that comes with a folder, AutoConfig and the model import a copy each.
        if not isinstance(config, PreTrainedConfig):
            # Reading the config uses these up, and the weights need them too.
            kept = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            # That would become the stored precision, which "auto" asks for.
            kept |= {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
            config, kwargs = SigPhiConfig.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs |= kept
        if config.base_language_model is None:
            if isinstance(kwargs.get("quantization_config"), BitsAndBytesConfig):
                kwargs["quantization_config"] = quantization_sparing(
                    kwargs["quantization_config"], NOT_QUANTIZED, by_default=["lm_head"]
                )
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype", "auto"))
            if "quantization_config" in vars(config) and dtype not in ("auto", None):
                bring_to(loaded[0] if isinstance(loaded, tuple) else loaded, dtype)
        else:
            loaded = cls._from_adapter(pretrained_model_name_or_path, config, **dict(kwargs))
        check_weights(pretrained_model_name_or_path, config.weight_hashes, **kwargs)
        keep_4bit_weights(loaded[0] if isinstance(loaded, tuple) else loaded)  # with `output_loading_info`
        return loaded

    @classmethod
    def _from_adapter(cls, folder: Any, config: SigPhiConfig, output_loading_info: bool = False, **kwargs: Any) -> Any:
        if not is_peft_available():
            raise ImportError(f"{folder} is in adapter form, which needs `peft`: pip install peft")
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        dtype = config.dtype or torch.float32 if dtype in ("auto", None) else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        base, info = load_base_language_model(config, dtype, **kwargs)
        vision_tower = SiglipResNetVisionModel(config.vision_config).to(dtype)
        model = SigPhiForConditionalGeneration.from_parts(config, vision_tower, base)
        model.model.multi_modal_projector.to(dtype)
        model.add_lora(config.lora)
        model.read_adapter_weights(folder, **hub)
        model.generation_config = GenerationConfig.from_pretrained(folder, **hub)
        model.place_like_language_model()
        model.eval().requires_grad_(False)
        if cls is not SigPhiForConditionalGeneration:
            model, info = model.model, _renamed(info, _name_without_head)
        return (model, info) if output_loading_info else model


def load_base_language_model(
    config: SigPhiConfig, dtype: torch.dtype, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    The causal language model that an adapter form's config names, quantised as `config.base_bits` says.

    Args:
        config (`SigPhiConfig`): names the base, its revision and its precision.
        dtype (`torch.dtype`): of its weights that are not quantised, and of the arithmetic on those that are.
        kwargs: those of `from_pretrained`: `device_map`, `attn_implementation`, `quantization_config`, ...; `revision`
            is the adapter's, the base has its own.

    Returns:
        The model, and what `output_loading_info` tells of it, by the names of [`SigPhiForConditionalGeneration`].

    Raises:
        OSError: if it cannot be read; the message names its repository and revision.
        ValueError: as of [`_language_model_of_vlm`].
    """
    # `adapter_kwargs` is where the Auto classes note the commit.
    for key in ("revision", "code_revision", "trust_remote_code", "_commit_hash", "_from_auto", "adapter_kwargs"):
        kwargs.pop(key, None)
    kwargs.setdefault("quantization_config", base_quantization(config.base_bits, dtype))
    # Reading the config has taken `attn_implementation` out of the arguments.
    kwargs.setdefault("attn_implementation", config.text_config._attn_implementation)
    name, revision = config.base_language_model, config.base_language_model_revision
    kwargs |= {"revision": revision or "main", "dtype": dtype, "output_loading_info": True}
    try:
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        base_config, _ = PreTrainedConfig.get_config_dict(name, **hub)
        if base_config.get("model_type") == SigPhiConfig.model_type:
            return _language_model_of_vlm(name, base_config, config.base_bits, **kwargs)
        base, info = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        return base, _renamed(info, partial(_name_in_vlm, base))
    except OSError as error:
        raise OSError(
            f"Cannot read the base language model {name!r} (revision {revision or 'main'!r}) of this adapter form. "
            f"Make it reachable, or pass `base_language_model=` another place that holds the same model."
        ) from error


def _language_model_of_vlm(
    name: str, config: dict[str, Any], bits: int, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    The base of an adapter form, where that is the language model inside another VLM of this class.

    Raises:
        ValueError: if that VLM is itself in adapter form, or is stored in 4 bits and asked for in others.
    """
    if config.get("base_language_model") is not None:
        raise ValueError(f"The base {name!r} of this adapter form is itself in adapter form: merge that first.")
    if config.get("quantization_config") is not None:
        if bits != 4:
            raise ValueError(f"The base {name!r} is stored in 4 bits, and `base_bits` is {bits}: it has no others.")
        kwargs.pop("quantization_config")  # it brings its own
    vlm, info = SigPhiForConditionalGeneration.from_pretrained(name, **kwargs)
    return causal_language_model(vlm), _renamed(info, lambda weight: None if _is_own(weight) else weight)


def _renamed(info: dict[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """What `output_loading_info` tells, with other names of the weights; those without a new name are left out."""
    keys = {
        kind: {new for name in info[kind] if (new := rename(name)) is not None}
        for kind in ("missing_keys", "unexpected_keys")
    }
    # Beside the name, both shapes.
    sizes = {(new, *shapes) for name, *shapes in info["mismatched_keys"] if (new := rename(name)) is not None}
    return {**info, **keys, "mismatched_keys": sizes}


def _name_in_vlm(language_model: PreTrainedModel, name: str) -> str:
    """What a weight of a causal language model is called in the VLM that it is put into."""
    prefix = f"{language_model.base_model_prefix}."
    if name.startswith(prefix):
        return f"model.language_model.{name.removeprefix(prefix)}"
    head = language_model.get_output_embeddings()
    heads = {key for key, module in language_model.named_modules() if module is head}
    module, _, last = name.rpartition(".")
    return f"lm_head.{last}" if module in heads else name


def _name_without_head(name: str) -> str | None:
    """What a weight of the VLM is called in [`SigPhiModel`], which has no head."""
    return None if name.startswith("lm_head.") else name.removeprefix("model.")


def causal_language_model(vlm: "SigPhiForConditionalGeneration") -> PreTrainedModel:
    """The language model and the head of a VLM, as the `...ForCausalLM` of transformers that they once were."""
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(vlm.config.text_config)
    setattr(language_model, language_model.base_model_prefix, vlm.model.language_model)
    language_model.set_output_embeddings(vlm.lm_head)
    language_model.generation_config = vlm.generation_config
    return language_model.eval()


def base_quantization(bits: int, dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig | None:
    """
    The quantisation for a base of 4 bits (NF4, double quantisation; arXiv 2305.14314) or 8; `None` for 16.

    `storage` is what the 4-bit weights are packed into: FSDP2 divides only parameters of floating point.
    """
    if bits == 16:
        return None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def keep_4bit_weights(model: nn.Module) -> None:
    """
    Switch off the AVX512-BF16 path of bitsandbytes' 4-bit layers.

    On processors that have it, the first forward pass without gradients repacks the weights for a kernel in bfloat16.
    What reads them afterwards takes them for something else: DoRA and merging compute nonsense without an error, and a
    training step fails with "a view of a leaf Variable". Without it all processors give the same answers.
    """
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def bring_to(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """
    Bring what is not quantised of a VLM to a precision, in place, as loading in that precision does.

    Of a model that is stored quantised, transformers leaves part of it in the stored one. `model.to(dtype)` would
    round the frequencies of rotary positions too, which loading makes anew in float32.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():  # those of bitsandbytes are subclasses
            parameter.data = parameter.data.to(dtype)
    model.base_model.vision_tower.to(dtype)  # the statistics of BatchNorm too


class SigPhiModel(SigPhiPreTrainedModel):
    """Image tower, projector and language model, without the head: gives hidden states."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As [`SigPhiPreTrainedModel.from_pretrained`]; of a folder of the whole model, without its head."""
        # The head is no surprise here, and only here: vLLM builds this class by itself, looks up what its weights may
        # be ignored, and needs the head's.
        cls._keys_to_ignore_on_load_unexpected = [r"^lm_head\."]
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        finally:
            cls._keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: SigPhiConfig) -> None:
        super().__init__(config)
        self.vision_tower = SiglipResNetVisionModel(config.vision_config)
        self.multi_modal_projector = SigPhiMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "SigPhiModel":
        """Training mode, but a frozen image tower stays in evaluation mode, so that its BatchNorm does not move."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        What the projector reads: may be computed once per image and given to `forward` as `image_features`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, 3, height, width)`): normalised images.

        Returns:
            `torch.Tensor` of shape `(images, num_image_tokens, feature_size)`: the L2-normalised embedding times the
            square root of its size (so that its entries have unit variance), or the averaged feature map's cells.
        """
        # Where it is frozen, its numbers are the same in whatever precision the rest trains, and in the feature cache.
        if any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            outputs = self.vision_tower(pixel_values)
        else:
            with torch.autocast(pixel_values.device.type, enabled=False):
                outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype))
        if self.config.num_image_tokens == 1:
            embeds = F.normalize(outputs.pooler_output.float(), dim=-1)  # (images, projection_dim)
            return embeds.unsqueeze(1) * math.sqrt(embeds.shape[-1])  # (images, 1, projection_dim)
        side = math.isqrt(self.config.num_image_tokens)
        grid = F.adaptive_avg_pool2d(outputs.last_hidden_state, side)  # (images, channels, side, side)
        return grid.flatten(2).transpose(1, 2)  # (images, side * side, channels)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The soft tokens of images, as `pooler_output` of shape `(images, num_image_tokens, hidden_size)`."""
        features = self.get_vision_features(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.multi_modal_projector(features)
        )

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where the image placeholders are, `(batch, length)`; from the embeddings where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch, length, hidden_size)` of text tokens.

        Placeholders and padding take the row of token 0: their embedding is replaced or masked, and their ids may lie
        past the end of a language model's embedding, which then needs no resizing.
        """
        unused = input_ids == self.config.image_token_id
        if self.config.pad_token_id is not None:
            unused = unused | (input_ids == self.config.pad_token_id)
        return self.get_input_embeddings()(input_ids.masked_fill(unused, 0))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        prefix_ids: torch.LongTensor | None = None,
        image_rows: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SigPhiModelOutputWithPast:
        """
        A row may hold many texts that do not see each other, and texts about one image may share what precedes them:
        each token belongs to a segment (`segment_ids`), and sees of the tokens before it those of its own segment and
        those of one other (`prefix_ids`). A row of two images, the first with two questions:

        ```
        tokens        <image> <image>  q1 q1 a1  q2 a2 a2  <image> <image>  q3 a3  padding
        segment_ids      0       0      1  1  1   2  2  2     3       3      4  4    -1
        prefix_ids       0       0      0  0  0   0  0  0     3       3      3  3    -1
        position_ids     0       1      2  3  4   2  3  4     0       1      2  3     0
        ```

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): tokens, with `config.num_image_tokens`
                placeholders (`config.image_token_id`) for each image.
            pixel_values (`torch.FloatTensor` of shape `(images, 3, height, width)`, *optional*): normalised images.
            image_features (`torch.FloatTensor` of shape `(images, num_image_tokens, feature_size)`, *optional*):
                the result of [`~SigPhiModel.get_vision_features`], instead of `pixel_values`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): instead of
                `input_ids`.
            segment_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): the segment of each token. They
                come with `prefix_ids` and `position_ids`, and without `attention_mask` and `past_key_values`.
            prefix_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): the segment that each token sees
                beside its own.
            image_rows (`torch.LongTensor` of shape `(images in the texts,)`, *optional*): where texts share images,
                the row of `pixel_values` or `image_features` for each place of an image, in order.
            cache (`Cache`, *optional*): what transformers calls `past_key_values` before 5.24; either name will do.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; if the number of placeholders
                is not the number of soft tokens (with `inputs_embeds` where images are given); and if `segment_ids`
                come without what belongs to them, or with an attention implementation that has no place for them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        cache = past_key_values if cache is None else cache
        if pixel_values is not None and image_features is not None:
            raise ValueError("Give `pixel_values` or `image_features`, not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_text(input_ids)  # (batch, length, hidden_size)
        if pixel_values is not None:
            image_features = self.get_vision_features(pixel_values)
        soft_tokens = None
        if image_features is not None:
            soft_tokens = self.multi_modal_projector(image_features)  # (images, num_image_tokens, hidden_size)
            soft_tokens = soft_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            if image_rows is not None:
                soft_tokens = soft_tokens[image_rows]  # (images in the texts, num_image_tokens, hidden_size)
        if soft_tokens is not None:
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds)  # (batch, length)
            _check_placeholders(placeholders, soft_tokens)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), soft_tokens)
        elif input_ids is not None and not torch.compiler.is_compiling():
            # Embeddings may hold their images already; vLLM gives such, and nothing may wait for the GPU there.
            if cache is None or cache.get_seq_length() == 0:
                _check_placeholders(self.get_placeholder_mask(input_ids, None), None)
        if segment_ids is not None:
            if prefix_ids is None or position_ids is None or attention_mask is not None or cache is not None:
                raise ValueError(
                    "`segment_ids` come with `prefix_ids` and `position_ids`, and without `attention_mask` and "
                    "`past_key_values`."
                )
            attention_mask = self.segment_mask(inputs_embeds, segment_ids, prefix_ids)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        return SigPhiModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=soft_tokens,
            **{CACHE: outputs.get(CACHE)},
        )

    def segment_mask(self, inputs_embeds: torch.Tensor, segment_ids: torch.Tensor, prefix_ids: torch.Tensor) -> Any:
        """
        Which token sees which, as the language model's attention implementation wants it; arguments as of
        [`~SigPhiModel.forward`].

        Returns:
            `torch.Tensor` of shape `(batch, 1, length, length)`, or a `BlockMask` of that shape for FlexAttention.

        Raises:
            ValueError: if the attention implementation has no place for such a mask.
        """
        config: Any = self.language_model.config
        if config._attn_implementation not in SEGMENT_ATTENTION:
            raise ValueError(
                f"`segment_ids` do not go with attn_implementation={config._attn_implementation!r}, which would "
                f"ignore them: use one of {', '.join(SEGMENT_ATTENTION)}."
            )

        def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            segment = segment_ids[row, key]
            return (segment == segment_ids[row, query]) | (segment == prefix_ids[row, query])

        return create_causal_mask(config, inputs_embeds, None, None, and_mask_function=sees)


def _check_placeholders(placeholders: torch.Tensor, soft_tokens: torch.Tensor | None) -> None:
    """An image that does not reach the language model, or a placeholder without an image, is an error."""
    if torch.compiler.is_compiling():  # the count would break the graph; masked_scatter still fails when it is short
        return
    expected = 0 if soft_tokens is None else soft_tokens.shape[0] * soft_tokens.shape[1]
    found = int(placeholders.sum())
    if found != expected:
        images = 0 if soft_tokens is None else soft_tokens.shape[0]
        raise ValueError(
            f"Image features and image tokens do not match: {images} images give {expected} features, but the text "
            f"has {found} image tokens. Use the processor of this model, and give each text its image."
        )


class _LossInParts(torch.autograd.Function):
    """
    A loss that is a sum over positions, made of some of them at a time, each with its gradients at once.

    What one part needs in memory is then free for the next, and nothing is made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        at_once: int,
        targets: torch.Tensor,
        hidden_states: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            loss_of (`Callable`): the summed loss of hidden states and targets.
            at_once (`int`): positions of a part.
            targets (`torch.LongTensor` of shape `(positions,)`): token ids.
            hidden_states (`torch.Tensor` of shape `(positions, hidden_size)`): what the loss is of.
            weights (`torch.Tensor`): the parameters of `loss_of` that are trained.
        """
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        of_states = torch.empty_like(hidden_states)
        of_weights = [torch.zeros_like(weight) for weight in weights]
        parts = zip(*(one.detach().split(at_once) for one in (hidden_states, targets, of_states)), strict=True)
        for states, ids, gradient in parts:
            with torch.enable_grad():
                loss = loss_of(states.requires_grad_(), ids)
                found = torch.autograd.grad(loss, (states, *weights))
            total += loss.detach()
            gradient.copy_(found[0])
            for whole, part in zip(of_weights, found[1:], strict=True):
                whole += part
        ctx.save_for_backward(of_states, *of_weights)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, None, None, *(one * gradient.to(one.dtype) for one in ctx.saved_tensors)


class SigPhiForConditionalGeneration(SigPhiPreTrainedModel, GenerationMixin):
    """
    The vision-language model with its head: answers questions about images.

    ```python
    >>> inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    >>> processor.decode(model.generate(**inputs)[0], skip_special_tokens=True)
    ```
    """

    # Of the loss. A training that divides the weights among processes raises it, since each part gathers the head.
    logits_at_once = LOGITS_AT_ONCE

    def __init__(self, config: SigPhiConfig) -> None:
        super().__init__(config)
        self.model = SigPhiModel(config)
        # Each family has its own name for the embedding: embed_tokens, wte, word_embeddings, ...
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @classmethod
    def from_parts(
        cls, config: SigPhiConfig, vision_tower: SiglipResNetVisionModel, language_model: PreTrainedModel
    ) -> "SigPhiForConditionalGeneration":
        """
        Put a trained image tower and a causal language model together; only the projector is new.

        The parts keep their precision, device and quantisation.

        Args:
            config (`SigPhiConfig`): its `vision_config` and `text_config` describe the parts.
            vision_tower (`SiglipResNetVisionModel`): the image tower.
            language_model (`PreTrainedModel`): a `...ForCausalLM` of transformers.
        """
        projector = SigPhiMultiModalProjector(config)
        with torch.device("meta"):
            model = cls(config)
        model.model.vision_tower = vision_tower
        model.model.multi_modal_projector = projector
        model.model.language_model = language_model.base_model
        model.lm_head = language_model.get_output_embeddings()
        projector.apply(model._init_weights)
        model.place_like_language_model()
        model.generation_config = language_model.generation_config
        model.generation_config.pad_token_id = config.pad_token_id
        # The head has rows for tokens that are no text; one of them in an answer would be read as an image.
        rows = config.text_config.vocab_size
        suppressed = [
            token for token in (config.image_token_id, config.pad_token_id) if token is not None and token < rows
        ]
        model.generation_config.suppress_tokens = suppressed or None
        return model

    def place_like_language_model(self) -> None:
        """Move image tower and projector to where the language model's embedding is."""
        device = self.get_input_embeddings().weight.device
        self.model.vision_tower.to(device)
        self.model.multi_modal_projector.to(device)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """See [`SigPhiModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict:
        """Precomputed image features belong to the prompt alone, as `pixel_values` do."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("image_features", None)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SigPhiCausalLMOutputWithPast:
        """
        As [`SigPhiModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): the token ids of the supervised
                positions, -100 elsewhere. Only these positions reach the head for the loss, and in training mode
                there are no other logits.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to `0`): logits only for the last so many
                positions, or for these; 0 is all, and a tensor without elements none.

        Raises:
            ValueError: if `labels` has no supervised token, and as [`SigPhiModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_features=image_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        hidden_states = outputs.last_hidden_state  # (batch, length, hidden_size)
        loss = logits = None
        if labels is not None:
            loss = self._supervised_loss(hidden_states, labels, kwargs.get("num_items_in_batch"))
        if labels is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.head(hidden_states[:, keep, :])  # (batch, kept, vocab_size)
        return SigPhiCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocab_size)` of hidden states `(..., hidden_size)`, as the language model makes them."""
        logits = self.lm_head(hidden_states)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcapping is not None:
            logits = torch.tanh(logits / self.config.logit_softcapping) * self.config.logit_softcapping
        return logits

    def _supervised_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        targets = labels[:, 1:]  # (batch, length - 1)
        supervised = targets != -100
        targets = targets[supervised]  # (supervised,)
        if targets.numel() == 0:
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} has no supervised token (all are -100): there is no answer "
                f"to learn from in this batch."
            )
        states = hidden_states[:, :-1][supervised]  # (supervised, hidden_size)
        num_items = targets.numel() if num_items_in_batch is None else num_items_in_batch
        parts = states.split(max(self.logits_at_once // self.lm_head.out_features, 1))
        if len(parts) == 1 or not torch.is_grad_enabled():
            losses = map(self._summed_loss, parts, targets.split(len(parts[0])))
            return torch.stack(list(losses)).sum() / num_items
        weights = [parameter for parameter in self.lm_head.parameters() if parameter.requires_grad]
        return _LossInParts.apply(self._summed_loss, len(parts[0]), targets, states, *weights) / num_items

    def _summed_loss(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed cross-entropy of some positions."""
        logits = self.head(hidden_states)  # (positions, vocab_size)
        return self.loss_function(
            logits=logits, labels=None, shift_labels=targets, vocab_size=logits.shape[-1], num_items_in_batch=1
        )

    # Adapter form ------------------------------------------------------------------------------------------------

    def add_lora(self, lora: dict[str, Any]) -> None:
        """
        Put LoRA layers into the language model, and freeze everything else of it.

        Args:
            lora (`dict`): the arguments of `peft.LoraConfig`; `target_modules` are names inside the language model.
        """
        inject_adapter_in_model(LoraConfig(**lora), self.model.language_model)
        self.config.lora = dict(lora)

    def lora_keys(self, peft_state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename a PEFT file's keys, which are relative to the base language model, to this model's."""
        prefix = f"base_model.model.{self._base_prefix()}"
        return {name.replace(prefix, "model.language_model.", 1): tensor for name, tensor in peft_state_dict.items()}

    def read_adapter_weights(self, folder: Any, **hub: Any) -> None:
        """
        Read image tower, projector and LoRA weights from an adapter form, each in the precision that it has here.

        Args:
            folder (`str` or `os.PathLike`): a folder or Hub id.
            hub: `revision`, `token`, ... of a Hub id.

        Raises:
            ValueError: as of [`~SigPhiForConditionalGeneration.load_adapter_weights`].
        """
        weights = load_file(cached_file(folder, "model.safetensors", **hub))
        weights |= self.lora_keys(load_file(cached_file(folder, f"{LORA_FOLDER}/{LORA_WEIGHTS}", **hub)))
        self.load_adapter_weights(weights)

    def load_adapter_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """
        Read image tower, projector and LoRA weights; every tensor must have its place, and every place its tensor.

        Args:
            weights (`dict`): tensors by the names that the adapter form saves, those of LoRA as `lora_keys` gives
                them.

        Raises:
            ValueError: if a name is missing or unexpected.
        """
        prefix = "model.language_model."
        own = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
        lora = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        expected_own = {name for name in self.state_dict() if _is_own(name)}
        expected_lora = set(get_peft_model_state_dict(self.model.language_model, adapter_name="default"))
        wrong = (set(own) ^ expected_own) | (set(lora) ^ expected_lora)
        if wrong:
            raise ValueError(
                f"These weights do not fit the model's adapter form: {sorted(wrong)[:5]} ({len(wrong)} in all)"
            )
        self.load_state_dict(own, strict=False)
        set_peft_model_state_dict(self.model.language_model, lora, adapter_name="default")

    def save_pretrained(
        self, save_directory: Any, state_dict: dict | None = None, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """
        Save as transformers does; a model with LoRA layers in the adapter form, which holds no base weights.

        The LoRA weights go to `lora/` as PEFT writes them for the base language model itself, so that
        `PeftModel.from_pretrained(base, folder, subfolder="lora")` reads them too.
        """
        if self.config.lora is None:
            super().save_pretrained(save_directory, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs)
            return
        if kwargs.get("is_main_process", True):
            self._save_lora(os.path.join(save_directory, LORA_FOLDER), state_dict)
        own = {name: tensor for name, tensor in (state_dict or self.state_dict()).items() if _is_own(name)}
        if not push_to_hub:
            super().save_pretrained(save_directory, state_dict=own, **kwargs)
            return
        super().save_pretrained(save_directory, state_dict=own)
        # There transformers would upload only what it has written itself.
        self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory))), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Publish as transformers does.

        Raises:
            ValueError: if the base language model of the adapter form lies in a folder of this machine.
        """
        check_public(self.config, "base_language_model")
        return super().push_to_hub(repo_id, **kwargs)

    def _save_lora(self, folder: str, state_dict: dict | None) -> None:
        os.makedirs(folder, exist_ok=True)
        lora = LoraConfig(**self.config.lora, task_type="CAUSAL_LM", inference_mode=True)
        lora.base_model_name_or_path = self.config.base_language_model
        lora.revision = self.config.base_language_model_revision
        lora.save_pretrained(folder)
        prefix = "model.language_model."
        if state_dict is not None:
            state_dict = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        tensors = get_peft_model_state_dict(self.model.language_model, state_dict=state_dict, adapter_name="default")
        names = {f"base_model.model.{self._base_prefix()}{name}": t.contiguous() for name, t in tensors.items()}
        save_file(names, os.path.join(folder, LORA_WEIGHTS), metadata={"format": "pt"})

    def _base_prefix(self) -> str:
        """What the base causal language model calls the part that `language_model` is, as `"model."`."""
        return f"{self.model.language_model.base_model_prefix}."

    def merge_lora(self, dtype: torch.dtype | None = None) -> "SigPhiForConditionalGeneration":
        """
        Fold the LoRA weights into the language model's own and forget the base: the merged form, in place.

        The sums are made in float32, of a quantised base on its de-quantised weights: those that LoRA was trained on.

        Args:
            dtype (`torch.dtype`, *optional*): of the merged weights; that of the head by default.

        Raises:
            ValueError: if a merged weight is not finite.
        """
        dtype = dtype or self.lm_head.weight.dtype
        language_model = self.model.language_model
        for name, module in list(language_model.named_modules()):
            if isinstance(module, LoraLayer):
                language_model.set_submodule(name, _merged(module, LoraConfig(**self.config.lora)).to(dtype))
        vars(language_model.config).pop("quantization_config", None)
        self.config.lora = self.config.base_language_model = self.config.base_language_model_revision = None
        self.config.base_bits = 16
        return self


def dequantized(layer: Any) -> nn.Module:
    """
    A linear layer of bitsandbytes as the plain one that it was made of, in float32.

    The weights are those that the layer computes with: of a base in bfloat16 they are rounded to that.
    """
    weight = dequantize_module_weight(layer).detach().float()
    plain: Any = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    if issubclass(layer.source_cls, Conv1D):
        with torch.device("meta"):
            plain = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return plain


def _merged(layer: Any, lora: Any) -> nn.Module:
    """The base layer of a LoRA layer with the LoRA weights in it, in float32."""
    base = layer.get_base_layer()
    if type(base).__name__ in ("Linear4bit", "Linear8bitLt"):
        # PEFT would merge in the base's precision and quantise the result.
        lora.fan_in_fan_out = issubclass(base.source_cls, Conv1D)
        lora.init_lora_weights = False
        weights = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("base_layer.")}
        name = layer.active_adapters[0]
        layer = LoraLinear(dequantized(base), name, lora, r=layer.r[name], lora_alpha=layer.lora_alpha[name])
        unexpected = layer.load_state_dict(weights, strict=False).unexpected_keys
        assert not unexpected, unexpected
    layer.float().merge(safe_merge=True)
    return layer.get_base_layer()


def _is_own(name: str) -> bool:
    """Whether a weight belongs to the adapter form's own file: image tower and projector."""
    return name.startswith(("model.vision_tower.", "model.multi_modal_projector."))


__all__ = [
    "SigPhiForConditionalGeneration",
    "SigPhiModel",
    "SigPhiMultiModalProjector",
    "SigPhiPreTrainedModel",
    "base_quantization",
    "bring_to",
    "causal_language_model",
    "dequantized",
    "image_feature_size",
    "keep_4bit_weights",
    "load_base_language_model",
]
