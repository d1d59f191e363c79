"""Processors, registered with `AutoProcessor`."""

from transformers import AutoProcessor

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.processing.processing_sigphi import SigPhiProcessor

AutoProcessor.register(SiglipResNetConfig, SiglipResNetProcessor, exist_ok=True)
AutoProcessor.register(SigPhiConfig, SigPhiProcessor, exist_ok=True)

__all__ = ["SigPhiProcessor", "SiglipResNetProcessor"]
