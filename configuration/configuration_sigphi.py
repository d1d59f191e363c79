"""Configuration of the vision-language model."""

import math
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import strict

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetVisionConfig, text_config_from
from sigphi.configuration.hub_code import HubConfigMixin


@strict
class SigPhiConfig(HubConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`SigPhiModel`] and [`SigPhiForConditionalGeneration`].

    Args:
        vision_config (`dict` or `SiglipResNetVisionConfig`, *optional*): the image tower, a ResNet-50 by default.
        text_config (`dict` or `PreTrainedConfig`, *optional*): the causal language model; Phi-2 by default.
        num_image_tokens (`int`, *optional*, defaults to `1`): soft tokens an image becomes. 1 is the image embedding;
            a larger number must be a square k * k, the feature map of the last stage averaged to k x k cells.
        image_token_id (`int`, *optional*, defaults to `50295`): the placeholder in `input_ids`, one for each soft
            token.
        pad_token_id (`int`, *optional*, defaults to `50296`): the padding token, never the end-of-text token.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`): activation between the projector's two layers.
        lm_head_bias (`bool`, *optional*, defaults to `True`): whether the language model's head has a bias, as Phi's.
        logit_scale (`float`, *optional*, defaults to `1.0`): what the head's logits are multiplied by, as in Cohere's
            and IBM Granite's language models.
        logit_softcapping (`float`, *optional*): what the logits are kept below, by tanh, as in Gemma 2.
        base_language_model (`str`, *optional*): set in the adapter form only: the repository or folder of the
            language model that the folder does not hold.
        base_language_model_revision (`str`, *optional*): its revision.
        base_bits (`int`, *optional*, defaults to `16`): adapter form only: 4 or 8 when the LoRA was trained on the
            base quantised by bitsandbytes (NF4 with double quantisation, or LLM.int8), which loading then repeats.
        lora (`dict`, *optional*): adapter form only: the arguments of `peft.LoraConfig`.
        weight_hashes (`dict`, *optional*): set in what is published: the SHA-256 of each file of weights in hex, which
            loading compares. Saving drops it.
    """

    model_type = "sigphi"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": SiglipResNetVisionConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "image_hidden_states"]
    hub_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "sigphi.configuration.configuration_sigphi.SigPhiConfig",
        "AutoModel": "sigphi.modeling.modeling_sigphi.SigPhiModel",
        "AutoModelForImageTextToText": "sigphi.modeling.modeling_sigphi.SigPhiForConditionalGeneration",
        "AutoModelForMultimodalLM": "sigphi.modeling.modeling_sigphi.SigPhiForConditionalGeneration",
        "AutoProcessor": "sigphi.processing.processing_sigphi.SigPhiProcessor",
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_image_tokens: int = 1
    image_token_id: int = 50295
    pad_token_id: int | None = 50296
    projector_hidden_act: str = "gelu"
    lm_head_bias: bool = True
    logit_scale: float = 1.0
    logit_softcapping: float | None = None
    tie_word_embeddings: bool = False
    base_language_model: str | None = None
    base_language_model_revision: str | None = None
    base_bits: int = 16
    lora: dict | None = None
    weight_hashes: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            fields = {k: v for k, v in (self.vision_config or {}).items() if k != "model_type"}
            self.vision_config = SiglipResNetVisionConfig(**fields)
        self.text_config = text_config_from(self.text_config)
        super().__post_init__(**kwargs)

    def validate_num_image_tokens(self) -> None:
        """Check that the image tower can give this many soft tokens."""
        side = math.isqrt(max(self.num_image_tokens, 0))
        if self.num_image_tokens < 1 or side * side != self.num_image_tokens:
            raise ValueError(f"`num_image_tokens` must be 1 or a square (4, 9, 16, ...), got {self.num_image_tokens}.")
        if isinstance(self.vision_config, SiglipResNetVisionConfig) and side > self.vision_config.grid_size:
            grid = self.vision_config.grid_size
            raise ValueError(
                f"`num_image_tokens` is {self.num_image_tokens}, but the image tower's last feature map has "
                f"{grid} x {grid} cells; give at most {grid * grid}."
            )

    def validate_base_bits(self) -> None:
        """Check that the base language model's precision is one that loading can repeat."""
        if self.base_bits not in (4, 8, 16):
            raise ValueError(f"`base_bits` must be 4, 8 or 16, got {self.base_bits}.")


__all__ = ["SigPhiConfig"]
