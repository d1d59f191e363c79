"""The forms of a VLM's folder, made from one another: adapter, merged, nf4."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedConfig
from transformers.utils import cached_file

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.cards import write_card
from sigphi.hub_card.files import read_record
from sigphi.modeling.modeling_sigphi import (
    SigPhiForConditionalGeneration,
    base_quantization,
    bring_to,
    dequantized,
)

FORMS = ("adapter", "merged", "nf4")
# What a training records beside its model, and what is true of its model in every form.
RECORDS = ("training_data.json", "training_args.json", "log_history.json", "loss_curve.png")
EVAL_RESULTS = "eval_results.json"


def form_of(config: PreTrainedConfig) -> str:
    """The form of the folder that a [`SigPhiConfig`] was read from, one of `FORMS`."""
    if config.base_language_model is not None:
        return "adapter"
    return "merged" if vars(config).get("quantization_config") is None else "nf4"


def as_stored(model: SigPhiForConditionalGeneration, name: str) -> None:
    """
    Read projector and LoRA weights of an adapter form again, in float32: loading has rounded them to the precision
    of the whole.

    Args:
        model (`SigPhiForConditionalGeneration`): loaded from `name`, changed in place.
        name (`str`): a folder or Hub id.
    """
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name or ".multi_modal_projector." in parameter_name:
            parameter.data = parameter.data.float()
    model.read_adapter_weights(name)


def merged_model(name: str, base: str, dtype: torch.dtype, device: torch.device) -> SigPhiForConditionalGeneration:
    """
    A VLM with everything inside, not quantised.

    Args:
        name (`str`): a folder or Hub id, in any form.
        base (`str`): of an adapter form that was trained on a quantised base: `"dequantized"` merges into the weights
            that the quantised ones stand for, `"original"` into those that they were made of.
        dtype (`torch.dtype`): of the result; sums are made in float32.
        device (`torch.device`): where quantised weights are unpacked.

    Raises:
        OSError, ValueError: as of [`~SigPhiForConditionalGeneration.from_pretrained`] and
            [`~SigPhiForConditionalGeneration.merge_lora`].
    """
    config = SigPhiConfig.from_pretrained(name)
    options: dict[str, Any] = {"base_bits": 16} if base == "original" else {}
    quantised = form_of(config) == "nf4" or options.get("base_bits", config.base_bits) < 16
    # What is not quantised needs no accelerator, and is too large for some.
    options["device_map"] = {"": device if quantised else torch.device("cpu")}
    model = SigPhiForConditionalGeneration.from_pretrained(name, dtype="auto", **options)
    if model.config.lora is not None:
        as_stored(model, name)
        model.merge_lora(dtype)
    elif form_of(model.config) == "nf4":
        _dequantize(model, dtype)
    bring_to(model, dtype)
    return model


def _dequantize(model: Any, dtype: torch.dtype) -> None:
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            model.set_submodule(name, dequantized(module).to(dtype))
    model.hf_quantizer.remove_quantization_config(model)


def adapter_model(name: str, dtype: torch.dtype, device: torch.device) -> SigPhiForConditionalGeneration:
    """An adapter form with image tower, projector and LoRA weights in `dtype`."""
    model = SigPhiForConditionalGeneration.from_pretrained(name, dtype="auto", device_map={"": device})
    as_stored(model, name)
    model.model.vision_tower.to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name or ".multi_modal_projector." in parameter_name:
            parameter.data = parameter.data.to(dtype)
    return model


def nf4_model(
    name: str, base: str, dtype: torch.dtype, device: torch.device, scratch: Path
) -> SigPhiForConditionalGeneration:
    """
    A VLM with everything inside, its language model in 4 bits (NF4 with double quantisation).

    Args:
        name, base, device: as of [`merged_model`].
        dtype (`torch.dtype`): of what is not quantised, and of the arithmetic.
        scratch (`Path`): where the merged form may lie in between.
    """
    quantization = base_quantization(4, dtype)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".merged-") as folder:
        merged_model(name, base, dtype, device).save_pretrained(folder)
        return SigPhiForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, quantization_config=quantization, device_map={"": device}
        )


def export_form(
    name: str, output: Path, form: str, base: str = "dequantized", dtype: str = "auto", device: str = "cpu"
) -> None:
    """
    Write a VLM in another form: weights, config, code, processor, what its training recorded, and a card.

    Nothing that resumes a training comes along, nor single answers of an evaluation. Its figures do; they name the
    form that they were measured on. The folder appears whole or not at all.

    Args:
        name (`str`): a folder or Hub id, in any form.
        output (`Path`): the folder to write; it may be there, and empty.
        form (`str`): one of `FORMS`; `"adapter"` only of an adapter form.
        base (`str`, *optional*, defaults to `"dequantized"`): see [`merged_model`].
        dtype (`str`, *optional*, defaults to `"auto"`): of the weights that are not quantised, such as `"bfloat16"`;
            `"auto"` is what `name` loads in.
        device (`str`, *optional*, defaults to `"cpu"`): where quantised weights are made and unpacked.

    Raises:
        OSError, ValueError: as of [`merged_model`].
    """
    config = SigPhiConfig.from_pretrained(name)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    unfinished.mkdir(parents=True)
    precision = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    place = torch.device(device)
    if form == "adapter":
        model = adapter_model(name, precision, place)
    elif form == "merged":
        model = merged_model(name, base, precision, place)
    else:
        model = nf4_model(name, base, precision, place, unfinished)
    model.save_pretrained(unfinished)
    AutoProcessor.from_pretrained(name).save_pretrained(unfinished)
    _copy_records(name, unfinished, form_of(config))
    os.replace(unfinished, output)
    write_card(output)


def _copy_records(name: str, output: Path, form: str) -> None:
    for record in (*RECORDS, EVAL_RESULTS):
        found = cached_file(
            name, record, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is not None and record != EVAL_RESULTS:
            shutil.copyfile(found, output / record)
        elif found is not None:
            results = read_record(Path(found))
            results["metadata"] = {"form": form} | results.get("metadata", {})
            text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
            (output / EVAL_RESULTS).write_text(text, encoding="utf-8")


__all__ = ["FORMS", "adapter_model", "as_stored", "export_form", "form_of", "merged_model", "nf4_model"]
