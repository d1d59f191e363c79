"""Where models are loaded in float32 though they were saved in bfloat16."""

import pytest
import torch

from sigphi.train import precision
from sigphi.train.evaluation import load_for_evaluation


@pytest.mark.parametrize(
    ("has_accelerator", "processor_has_it", "expected"),
    [(True, False, "auto"), (False, True, "auto"), (False, False, torch.float32)],
)
def test_a_model_is_loaded_as_it_was_saved_where_that_is_fast(
    monkeypatch, has_accelerator, processor_has_it, expected
):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_accelerator)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: processor_has_it)
    assert precision.inference_dtype() == expected


@pytest.mark.parametrize(("processor_has_it", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_an_evaluation_computes_in_float32_where_the_processor_has_no_bfloat16(
    monkeypatch, tmp_path, tiny_vlm, tiny_vlm_processor, processor_has_it, expected
):
    tiny_vlm.to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_vlm_processor.save_pretrained(tmp_path)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: processor_has_it)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    model, _ = load_for_evaluation(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
