"""Configurations, registered with `AutoConfig`."""

from transformers import AutoConfig

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig, SiglipResNetVisionConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig

AutoConfig.register(SiglipResNetConfig.model_type, SiglipResNetConfig, exist_ok=True)
# An image tower alone is what `train-siglip --vision-model` starts from.
AutoConfig.register(SiglipResNetVisionConfig.model_type, SiglipResNetVisionConfig, exist_ok=True)
AutoConfig.register(SigPhiConfig.model_type, SigPhiConfig, exist_ok=True)

__all__ = ["SigPhiConfig", "SiglipResNetConfig"]
