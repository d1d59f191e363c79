"""Which code computes the language model's attention."""

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.import_utils import is_flash_attn_2_available

from sigphi.train.errors import UserError

logger = logging.getLogger(__name__)

# Kinds of language models whose attention scores are known to exceed the largest number of float16.
_LARGE_SCORES = ("phi",)


def choose_attn_implementation(
    requested: str, config: PreTrainedConfig, packs: bool = False, fp16: bool = False
) -> str:
    """
    The attention implementation for `--attn-implementation`.

    `"auto"` is `"sdpa"` for packed rows; else FlashAttention-2 where a CUDA device and the package are present, else
    `"sdpa"`; and `"eager"` for a language model that has no other. The choice is logged.

    Args:
        requested (`str`): the option.
        config (`PreTrainedConfig`): of the language model.
        packs (`bool`, *optional*, defaults to `False`): whether rows hold several questions, see [`choose_packing`].
        fp16 (`bool`, *optional*, defaults to `False`): whether training is in float16.

    Raises:
        UserError: if what is requested cannot run here, if the language model has no code for it, or if its scores
            would overflow.
    """
    flash_runs = is_flash_attn_2_available() and torch.cuda.is_available()
    if requested == "flash_attention_2" and not flash_runs:
        raise UserError(
            "--attn-implementation flash_attention_2 needs a CUDA device and the package: pip install flash-attn "
            "(or use --attn-implementation auto)."
        )
    if requested == "flex_attention" and not torch.cuda.is_available():
        raise UserError(
            "--attn-implementation flex_attention needs a CUDA device: on a CPU it cannot train (use "
            "--attn-implementation auto)."
        )
    choice = _default(config, flash_runs and not packs) if requested == "auto" else requested
    if not _has(config, choice):
        raise UserError(
            f"--attn-implementation {choice}: transformers has none for a language model of the kind "
            f"{config.model_type!r} (use --attn-implementation auto)."
        )
    _check_scores(config, choice, fp16)
    logger.info("attention implementation: %s (requested %s)", choice, requested)
    return choice


def _default(config: PreTrainedConfig, wants_flash: bool) -> str:
    wanted = ("flash_attention_2", "sdpa", "eager") if wants_flash else ("sdpa", "eager")
    return next(one for one in wanted if _has(config, one))


def _has(config: PreTrainedConfig, implementation: str) -> bool:
    """Whether transformers has this code for a language model; all have the eager one."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Scores that are squeezed by tanh: sdpa does not know them, and before transformers 5.24 it said nothing.
    softcaps = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {
        "eager": True,
        "sdpa": kind._supports_sdpa and not softcaps,
        "flash_attention_2": kind._supports_flash_attn,
        "flex_attention": kind._supports_flex_attn,
    }[implementation]


def _check_scores(config: PreTrainedConfig, implementation: str, fp16: bool) -> None:
    """
    Products of Phi-2's queries and keys are above 65,504, the largest number of float16, and its loss becomes NaN. The
    fused kernels keep them in float32; the eager code keeps them in the precision of the queries.
    """
    if fp16 and implementation == "eager" and config.model_type in _LARGE_SCORES:
        raise UserError(
            "--attn-implementation eager: the attention scores of a Phi overflow in --fp16. Use "
            "--attn-implementation auto, whose kernels keep them in float32, or --bf16 true --fp16 false."
        )


__all__ = ["choose_attn_implementation"]
