"""Configurations, registered with `AutoConfig`."""

from transformers import AutoConfig

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig

AutoConfig.register(SiglipResNetConfig.model_type, SiglipResNetConfig, exist_ok=True)
AutoConfig.register(SigPhiConfig.model_type, SigPhiConfig, exist_ok=True)

__all__ = ["SigPhiConfig", "SiglipResNetConfig"]
