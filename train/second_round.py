"""Training that starts from a VLM: `sigphi train-vlm --vlm-checkpoint`, of any form.

Of the adapter form the same LoRA weights and the projector are trained on, on the same base. The others get new LoRA
layers on the language model inside, or are trained in full, and keep their projector as a start.
"""

import copy
import logging
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedConfig

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.forms import as_stored, form_of
from sigphi.modeling.modeling_sigphi import (
    SigPhiForConditionalGeneration,
    base_quantization,
    causal_language_model,
)
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.checkpoints import read_config
from sigphi.train.errors import UserError
from sigphi.train.precision import tower_dtype
from sigphi.train.qlora import only_trains, train_language_model

logger = logging.getLogger(__name__)

# Options that an adapter form has decided, and what PEFT calls them.
_LORA_FIELDS = {"lora_r": "r"} | {name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}


def settle(arguments: VlmModelArguments) -> VlmModelArguments:
    """
    The options of a training, with those filled in that `--vlm-checkpoint` decides; without it as they are.

    Raises:
        UserError: if there is no such VLM, its base cannot be read, or an option contradicts it.
    """
    if arguments.vlm_checkpoint is None:
        return arguments
    config = read_config(arguments.vlm_checkpoint, "--vlm-checkpoint", SigPhiConfig.model_type)
    decided: dict[str, Any] = {"num_image_tokens": config.num_image_tokens}
    _check_decided(arguments, decided)
    if form_of(config) == "adapter":
        decided |= _of_adapter(config, arguments)
    else:
        decided |= {"language_model": arguments.vlm_checkpoint, "language_model_revision": None}
        if form_of(config) == "nf4" and arguments.bits != 4:
            raise UserError(
                f"--bits {arguments.bits}: {arguments.vlm_checkpoint} is stored in 4 bits. Leave it out, or train the "
                f"result of: sigphi merge {arguments.vlm_checkpoint} NEW-FOLDER"
            )
    settled = copy.copy(arguments)
    for name, value in decided.items():
        if name != "language_model" and value != getattr(settled, name):
            logger.info("--%s %s, as --vlm-checkpoint has it", name.replace("_", "-"), value)
        setattr(settled, name, value)
    return settled


def _check_decided(arguments: VlmModelArguments, decided: dict[str, Any], otherwise: str = "") -> None:
    """Raise a [`UserError`] if an option, or a recipe, says something else than `--vlm-checkpoint` has decided."""
    for option, value in decided.items():
        given, words = getattr(arguments, option), f"--{option.replace('_', '-')}"
        if given not in (value, getattr(VlmModelArguments, option)):
            raise UserError(
                f"{words} {given}: {arguments.vlm_checkpoint} was trained with {value}. "
                f"Say {words} {value}{otherwise}."
            )


def _of_adapter(config: PreTrainedConfig, arguments: VlmModelArguments) -> dict[str, Any]:
    name = arguments.vlm_checkpoint
    if arguments.tuning == "full":
        raise UserError(
            f"--tuning full: {name} holds no language model, only LoRA. Train the result of: sigphi merge {name} "
            f"NEW-FOLDER"
        )
    lora = LoraConfig(**config.lora)
    decided = {"bits": config.base_bits} | {option: getattr(lora, key) for option, key in _LORA_FIELDS.items()}
    _check_decided(arguments, decided, f", or begin new LoRA layers on the result of: sigphi merge {name} NEW-FOLDER")
    base, revision = config.base_language_model, config.base_language_model_revision
    read_config(base, f"the base of --vlm-checkpoint {name},", revision=revision)
    return decided | {"language_model": base, "language_model_revision": revision}


def checkpoint_config(arguments: VlmModelArguments) -> SigPhiConfig:
    """The config of `--vlm-checkpoint`, of settled options."""
    return SigPhiConfig.from_pretrained(arguments.vlm_checkpoint)


def encoder_of(config: SigPhiConfig) -> SiglipResNetConfig:
    """The image tower of a VLM, described as an encoder whose text tower is left out."""
    vision: Any = config.vision_config
    return SiglipResNetConfig(vision_config=vision, projection_dim=vision.projection_dim, include_text_tower=False)


def load_checkpoint(
    arguments: VlmModelArguments, dtype: torch.dtype, attn_implementation: str, device: torch.device
) -> SigPhiForConditionalGeneration:
    """
    The VLM of `--vlm-checkpoint`, ready to be trained on.

    Args:
        arguments (`VlmModelArguments`): settled options.
        dtype (`torch.dtype`): of what is frozen, and of the arithmetic.
        attn_implementation (`str`): `"eager"`, `"sdpa"`, ...
        device (`torch.device`): of this process.
    """
    name: Any = arguments.vlm_checkpoint
    form = form_of(checkpoint_config(arguments))
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "device_map": {"": device}}
    if form == "adapter":
        model = SigPhiForConditionalGeneration.from_pretrained(name, dtype=dtype, **options)
        as_stored(model, name)
        model.model.vision_tower.to(tower_dtype(dtype))
        only_trains(model, "lora")
        return model
    if form == "merged":
        options["quantization_config"] = base_quantization(arguments.bits, dtype)
    # Full training needs float32 master weights; the arithmetic is in bfloat16 by autocast all the same.
    full = arguments.tuning == "full"
    vlm = SigPhiForConditionalGeneration.from_pretrained(name, dtype=torch.float32 if full else dtype, **options)
    config = copy.deepcopy(vlm.config)
    vars(config).pop("quantization_config", None)  # recorded as `base_bits`
    tower, projector = vlm.model.vision_tower.to(tower_dtype(dtype)), vlm.model.multi_modal_projector
    # Anew from its parts: the Trainer takes the whole for quantised, which it then refuses to train.
    model = SigPhiForConditionalGeneration.from_parts(config, tower, causal_language_model(vlm))
    model.model.multi_modal_projector = projector
    train_language_model(model, arguments)
    return model


__all__ = ["checkpoint_config", "encoder_of", "load_checkpoint", "settle"]
