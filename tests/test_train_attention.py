"""Which code computes the attention, and what float16 makes of scores that are large."""

import copy
import logging

import pytest
import torch
from transformers import Gemma2Config, PhiConfig, PhiForCausalLM, PreTrainedConfig, Qwen2Config

from sigphi.train import attention as attention_module
from sigphi.train.attention import choose_attn_implementation
from sigphi.train.errors import UserError


@pytest.mark.parametrize(
    ("installed", "cuda", "requested", "expected"),
    [
        (True, True, "auto", "flash_attention_2"),
        (True, False, "auto", "sdpa"),
        (False, True, "auto", "sdpa"),
        (False, False, "auto", "sdpa"),
        (True, True, "sdpa", "sdpa"),
        (True, True, "eager", "eager"),
        (True, True, "flash_attention_2", "flash_attention_2"),
        (True, False, "flash_attention_2", None),
        (False, True, "flash_attention_2", None),
    ],
)
def test_attention_implementation(monkeypatch, caplog, installed, cuda, requested, expected):
    monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(attention_module.torch.cuda, "is_available", lambda: cuda)
    if expected is None:
        with pytest.raises(UserError, match="flash_attention_2 needs a CUDA device .*pip install flash-attn"):
            choose_attn_implementation(requested, PhiConfig())
        return
    with caplog.at_level(logging.INFO, logger=attention_module.__name__):
        assert choose_attn_implementation(requested, PhiConfig()) == expected
    assert f"attention implementation: {expected} (requested {requested})" in caplog.text


def test_packed_rows_need_a_mask(monkeypatch):
    monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention_module.torch.cuda, "is_available", lambda: True)
    assert choose_attn_implementation("auto", PhiConfig(), packs=True) == "sdpa"


def test_scores_that_are_capped_are_left_to_code_that_knows_it():
    assert choose_attn_implementation("auto", Gemma2Config()) == "eager"
    assert choose_attn_implementation("auto", Gemma2Config(attn_logit_softcapping=None)) in ("sdpa", "eager")
    with pytest.raises(UserError, match="--attn-implementation sdpa: .* kind 'gemma2' .*auto"):
        choose_attn_implementation("sdpa", Gemma2Config())


# float16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "requested", "fp16", "refused"),
    [
        (PhiConfig(), "eager", True, True),
        (PhiConfig(), "eager", False, False),
        (PhiConfig(), "auto", True, False),
        (Qwen2Config(), "eager", True, False),
    ],
)
def test_phi_in_float16_keeps_to_code_that_does_not_overflow(
    config: PreTrainedConfig, requested: str, fp16: bool, refused: bool
):
    if refused:
        with pytest.raises(UserError, match="--attn-implementation eager: .* overflow in --fp16.*auto"):
            choose_attn_implementation(requested, config, fp16=fp16)
    else:
        assert choose_attn_implementation(requested, config, fp16=fp16) in ("eager", "sdpa")


def test_large_scores_overflow_in_float16_with_eager_and_not_with_sdpa(tiny_language_model: PhiForCausalLM):
    """Why [`choose_attn_implementation`] refuses the one; as it is on a CPU, whose kernel keeps float32 too."""
    for layer in tiny_language_model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 200.0  # scores of some 100,000, as Phi-2 has them
    ids, found = torch.arange(3, 15)[None], {}
    with torch.no_grad():
        expected = tiny_language_model(ids).logits
        for name in ("eager", "sdpa"):
            model = copy.deepcopy(tiny_language_model)
            model.set_attn_implementation(name)
            with torch.autocast("cpu", torch.float16):
                found[name] = model(ids).logits
    assert not found["eager"].isfinite().all()
    assert found["sdpa"].isfinite().all()
    assert (found["sdpa"] - expected).norm() < 0.1 * expected.norm()
