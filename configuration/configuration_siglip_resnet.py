"""Configuration of the SigLIP encoder: a ResNet image tower and a text tower."""

import copy
import math
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, ResNetConfig
from transformers.configuration_utils import strict

from sigphi.configuration.hub_code import HubConfigMixin

# The published architecture of microsoft/phi-2, the default language model and text tower.
PHI_2: dict[str, Any] = {
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "resid_pdrop": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
}


def text_config_from(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """The configuration object for a text model given as an object, a dict with `model_type`, or nothing (Phi-2)."""
    if isinstance(value, PreTrainedConfig):
        # A composite config resets the attention implementation of its parts, and the value may be a live model's.
        config = copy.deepcopy(value)
    else:
        fields = copy.deepcopy(dict(value) if value else PHI_2)
        config = CONFIG_MAPPING[fields.pop("model_type", "phi")](**fields)
    config._name_or_path = ""  # a path on the machine that trained is nobody else's business
    return config


@strict
class SiglipResNetVisionConfig(ResNetConfig):
    r"""
    Configuration of the image tower, a [`ResNetConfig`] with four more fields.

    Args:
        stem (`str`, *optional*, defaults to `"imagenet"`):
            `"imagenet"` is the 7x7 stride-2 convolution and max pooling of ResNet (He et al., arXiv 1512.03385, table
            1), which reduces the image by 4. `"cifar"` is one 3x3 stride-1 convolution without pooling (section 4.2),
            for images of 32x32.
        downsampling (`str`, *optional*, defaults to `"stride"`):
            How a stage halves the feature map. `"stride"`: the first convolution and that of the shortcut move by two
            cells (He et al., table 1), so that the latter never sees three cells in four. `"pool"`: both move by one
            cell; the largest of 2x2 cells is taken behind the first, and the mean of 2x2 cells ahead of the
            shortcut's (as in ResNet-D, He et al., arXiv 1812.01187, figure 2c). Small towers learn more from an epoch
            by it, and each takes longer. The same weights fit both.
        image_size (`int`, *optional*, defaults to `224`):
            Height and width of the input in pixels.
        projection_dim (`int`, *optional*, defaults to `512`):
            Size of the image embedding.
    """

    model_type = "siglip_resnet_vision"
    base_config_key = "vision_config"

    stem: str = "imagenet"
    downsampling: str = "stride"
    image_size: int = 224
    projection_dim: int = 512

    def validate_stem(self) -> None:
        """Check that `stem` is one that the tower knows."""
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"`stem` must be 'imagenet' or 'cifar', got {self.stem!r}.")

    def validate_downsampling(self) -> None:
        """Check that `downsampling` is one that the tower knows."""
        if self.downsampling not in ("stride", "pool"):
            raise ValueError(f"`downsampling` must be 'stride' or 'pool', got {self.downsampling!r}.")

    def validate_sizes(self) -> None:
        """Check that there is at least one of everything that the tower counts."""
        for name in ("image_size", "projection_dim", "num_channels", "embedding_size", "hidden_sizes", "depths"):
            value = getattr(self, name)
            if min(value if isinstance(value, (list, tuple)) else [value], default=0) < 1:
                raise ValueError(f"`{name}` must hold numbers from 1, got {value!r}.")
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"`hidden_sizes` and `depths` must name the same stages, got {self.hidden_sizes} and {self.depths}."
            )

    @property
    def grid_size(self) -> int:
        """Height and width, in cells, of the feature map of the last stage."""
        strides = 2 * [2] if self.stem == "imagenet" else []
        strides += [2] * (len(self.depths) - (0 if self.downsample_in_first_stage else 1))
        size = self.image_size
        for stride in strides:
            size = math.ceil(size / stride)
        return size


@strict
class SiglipResNetConfig(HubConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`SiglipResNetModel`].

    Args:
        vision_config (`dict` or `SiglipResNetVisionConfig`, *optional*): the image tower, a ResNet-50 by default.
        text_config (`dict` or `PreTrainedConfig`, *optional*): the text tower, any text model of transformers; Phi-2
            by default.
        projection_dim (`int`, *optional*, defaults to `512`): size of both embeddings.
        text_pooling (`str`, *optional*, defaults to `"last"`): `"last"` takes the text tower's state at the last real
            token, `"mean"` averages over the real tokens.
        text_layer (`int`, *optional*, defaults to `-1`): which of the text tower's hidden states is pooled: 0 is the
            embedding's, -1 the last layer's. The last layer of a causal language model says what comes next; the
            meaning of what was read is clearer below it.
        logit_scale_init_value (`float`, *optional*, defaults to `ln 10`): initial log temperature t' (Zhai et al.,
            arXiv 2303.15343, section 3.2).
        logit_bias_init_value (`float`, *optional*, defaults to `-10.0`): initial bias b (same section).
        include_text_tower (`bool`, *optional*, defaults to `True`): whether the model builds and saves the text tower.
            `False` for a frozen tower that is read from `text_model_name_or_path` when texts are to be embedded.
        text_model_name_or_path (`str`, *optional*): repository or folder the text tower comes from.
        text_model_revision (`str`, *optional*): its revision.
        initializer_range (`float`, *optional*, defaults to `0.02`): standard deviation of newly made linear layers.
        weight_hashes (`dict`, *optional*): set in what is published: the SHA-256 of each file of weights in hex, which
            loading compares. Saving drops it.
    """

    model_type = "siglip_resnet"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": SiglipResNetVisionConfig, "text_config": AutoConfig}
    # Trainer.compute_metrics then sees (text_embeds, image_embeds); the logits are blocks that differ between batches.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "text_model_output",
        "vision_model_output",
        "logits_per_image",
        "logits_per_text",
    ]
    hub_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "sigphi.configuration.configuration_siglip_resnet.SiglipResNetConfig",
        "AutoModel": "sigphi.modeling.modeling_siglip_resnet.SiglipResNetModel",
        "AutoModelForZeroShotImageClassification": "sigphi.modeling.modeling_siglip_resnet.SiglipResNetModel",
        "AutoProcessor": "sigphi.processing.processing_siglip_resnet.SiglipResNetProcessor",
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    text_pooling: str = "last"
    text_layer: int = -1
    logit_scale_init_value: float | int = math.log(10.0)
    logit_bias_init_value: float | int = -10.0
    include_text_tower: bool = True
    text_model_name_or_path: str | None = None
    text_model_revision: str | None = None
    initializer_range: float = 0.02
    weight_hashes: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            fields = {k: v for k, v in (self.vision_config or {}).items() if k != "model_type"}
            self.vision_config = SiglipResNetVisionConfig(**{"projection_dim": self.projection_dim, **fields})
        self.text_config = text_config_from(self.text_config)
        super().__post_init__(**kwargs)

    def validate_text_pooling(self) -> None:
        """Check that `text_pooling` is one that the text tower knows."""
        if self.text_pooling not in ("last", "mean"):
            raise ValueError(f"`text_pooling` must be 'last' or 'mean', got {self.text_pooling!r}.")

    def validate_projection_dim(self) -> None:
        """Check that both towers embed into the same space."""
        if (
            isinstance(self.vision_config, PreTrainedConfig)
            and self.vision_config.projection_dim != self.projection_dim
        ):
            raise ValueError(
                f"`projection_dim` is {self.projection_dim}, but `vision_config.projection_dim` is "
                f"{self.vision_config.projection_dim}; give both the same value."
            )


__all__ = ["SiglipResNetConfig", "SiglipResNetVisionConfig", "text_config_from"]
