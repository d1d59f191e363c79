"""sigphi: small vision-language models, from a CSV of questions and answers to two models on the Hub."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> the module that defines it. Resolved on first use, so that `import sigphi` does not import torch.
_PUBLIC = {
    "SiglipResNetConfig": "sigphi.configuration.configuration_siglip_resnet",
    "SigPhiConfig": "sigphi.configuration.configuration_sigphi",
    "SiglipResNetModel": "sigphi.modeling.modeling_siglip_resnet",
    "sigmoid_loss": "sigphi.modeling.modeling_siglip_resnet",
    "SigPhiModel": "sigphi.modeling.modeling_sigphi",
    "SigPhiForConditionalGeneration": "sigphi.modeling.modeling_sigphi",
    "SiglipResNetProcessor": "sigphi.processing.processing_siglip_resnet",
    "SigPhiProcessor": "sigphi.processing.processing_sigphi",
    "SiglipTrainer": "sigphi.train.trainers",
    "VlmTrainer": "sigphi.train.trainers",
    "SiglipTrainingArguments": "sigphi.train.arguments",
    "VlmTrainingArguments": "sigphi.train.arguments",
    "global_sigmoid_loss": "sigphi.train.losses",
    "load_cifar10_qa": "sigphi.train.data",
    "evaluate_encoder": "sigphi.train.encoder_evaluation",
    "evaluate_vlm": "sigphi.train.vlm_evaluation",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sigphi' has no attribute {name!r}")
    # Hub classes register with the Auto classes in their package's __init__, which this import runs.
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
