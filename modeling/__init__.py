"""Models, registered with the Auto classes."""

from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForZeroShotImageClassification,
)

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, sigmoid_loss
from sigphi.modeling.modeling_sigphi import SigPhiForConditionalGeneration, SigPhiModel

AutoModel.register(SiglipResNetConfig, SiglipResNetModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(SiglipResNetConfig, SiglipResNetModel, exist_ok=True)
AutoModel.register(SigPhiConfig, SigPhiModel, exist_ok=True)
AutoModelForImageTextToText.register(SigPhiConfig, SigPhiForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(SigPhiConfig, SigPhiForConditionalGeneration, exist_ok=True)

__all__ = ["SigPhiForConditionalGeneration", "SigPhiModel", "SiglipResNetModel", "sigmoid_loss"]
