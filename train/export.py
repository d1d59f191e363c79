"""Write a VLM in another form, and measure what that has changed.

sigphi export outputs/vlm outputs/vlm-nf4 --form nf4
sigphi merge outputs/vlm outputs/vlm-merged --input-csv test.csv   # the same with --form merged
"""

import gc
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.hf_argparser import HfArg
from transformers.utils import is_bitsandbytes_available, is_peft_available

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.cards import write_card
from sigphi.hub_card.forms import FORMS, export_form, form_of
from sigphi.train.arguments import one_of
from sigphi.train.checkpoints import read_config
from sigphi.train.errors import UserError, run_command
from sigphi.train.parity import ParityArguments, load_questions, parity
from sigphi.train.parser import parse_arguments
from sigphi.train.records import PARITY, environment, write_json

logger = logging.getLogger(__name__)

BASES = ("auto", "dequantized", "original")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class MergeArguments:
    """What is written."""

    _argument_group_name = "export"

    base: str = HfArg(
        help="What LoRA is merged into where it was trained on a quantised language model: 'dequantized', the weights "
        "that it was trained on; 'original', those that they were made of. 'auto': 'dequantized' for the merged form, "
        "'original' for nf4.",
        default="auto",
    )
    dtype: str = HfArg(
        help="Precision of the weights that are not quantised: 'bfloat16', 'float16', 'float32', or 'auto', that of "
        "MODEL.",
        default="auto",
    )

    def __post_init__(self) -> None:
        one_of("--base", self.base, BASES)
        one_of("--dtype", self.dtype, DTYPES)


@dataclass
class ExportArguments(MergeArguments):
    """What is written, and in which form."""

    _argument_group_name = "export"

    form: str = HfArg(
        help="'adapter' (image tower, projector, LoRA), 'merged' (everything inside) or 'nf4' (the same in 4 bits).",
        default="",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("--form", self.form, FORMS)


def choose_base(config: PreTrainedConfig, form: str, base: str, name: str) -> str:
    """
    What LoRA is merged into: `"dequantized"` or `"original"`.

    Args:
        config (`SigPhiConfig`): of the model that is exported.
        form (`str`): the form that is written.
        base (`str`): the option.
        name (`str`): the model, for messages.

    Raises:
        UserError: if the option has no use, or there are no such weights.
    """
    if form_of(config) != "adapter" or form == "adapter" or config.base_bits == 16:
        if base != "auto":
            reason = "nothing is merged" if config.base_bits == 16 and form_of(config) != "adapter" else ""
            reason = reason or ("its LoRA stays apart" if form == "adapter" else "its base is not quantised")
            raise UserError(f"--base {base} has no use for {name}: {reason}. Leave it out.")
        return "dequantized"
    stored = read_config(
        config.base_language_model, f"the base of {name},", revision=config.base_language_model_revision
    )
    if vars(stored).get("quantization_config") is not None:
        if base == "original":
            raise UserError(f"--base original: the base of {name}, {config.base_language_model}, is stored in 4 bits.")
        return "dequantized"
    if base == "auto":
        return "original" if form == "nf4" else "dequantized"
    return base


def check_export(config: PreTrainedConfig, name: str, output: Path, form: str) -> None:
    """
    Check that a model can be written in a form, before any weights load.

    Raises:
        UserError: naming what stands against it, and the remedy.
    """
    own = form_of(config)
    if form == "adapter" and own != "adapter":
        raise UserError(
            f"--form adapter: {name} is in {own} form, where LoRA is merged. Export the folder of its training."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"OUTPUT {output}: something is there already. Give a new folder.")
    if own == "adapter":
        if not is_peft_available():
            raise UserError(f"{name} is in adapter form, which needs peft: pip install peft")
        read_config(config.base_language_model, f"the base of {name},", revision=config.base_language_model_revision)
    if (form == "nf4" or own == "nf4" or config.base_bits < 16) and not is_bitsandbytes_available():
        raise UserError(f"{name} as {form} needs bitsandbytes: pip install 'sigphi[qlora]'")


def export(name: str, output: Path, form: str, options: MergeArguments, comparison: ParityArguments) -> dict[str, Any]:
    """
    Write a VLM in another form and compare it with what it was made of; `parity.json` and the card tell the result.

    Args:
        name (`str`): a folder or Hub id, in any form.
        output (`Path`): the folder to write.
        form (`str`): `"adapter"`, `"merged"` or `"nf4"`.
        options (`MergeArguments`): precision and base.
        comparison (`ParityArguments`): by which questions they are compared.

    Returns:
        `dict`: what `parity.json` holds; empty where nothing was compared.

    Raises:
        UserError: as of [`check_export`] and [`choose_base`].
    """
    config = read_config(name, "MODEL", SigPhiConfig.model_type)
    check_export(config, name, output, form)
    base = choose_base(config, form, options.base, name)
    questions = load_questions(comparison) if comparison.parity_questions > 0 else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    export_form(name, output, form, base, options.dtype, str(device))
    gc.collect()  # a model refers to itself, and the two that are compared need the memory
    if questions is None:
        return {}
    made_of: dict[str, Any] = {"form": form_of(config), "base_bits": config.base_bits}
    figures = parity(
        name, str(output), questions, batch_size=comparison.parity_batch_size, max_new_tokens=comparison.max_new_tokens
    )
    merges = form_of(config) == "adapter" and form != "adapter"
    written = json.loads((output / "config.json").read_text(encoding="utf-8"))
    result = {
        "form": form,
        "dtype": written["dtype"],
        "base": base if merges and config.base_bits < 16 else None,
        "compared_with": made_of,
        **figures,
        "metadata": {"questions_from": questions.source, "images": len(questions.pixels), **environment()},
    }
    write_json(output / PARITY, result)
    write_card(output)
    return result


def run(argv: list[str] | None, program: str, form: str | None = None) -> None:
    """Read the command line of `export`, or with a `form` that of `merge`, and do it."""
    options, comparison, name, output = parse_arguments(
        [ExportArguments if form is None else MergeArguments, ParityArguments],
        argv,
        program,
        [("model", None, "VLM: a folder or Hub id"), ("output", None, "the folder to write")],
    )
    result = export(name, Path(output), options.form if form is None else form, options, comparison)
    figures = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    width = max(map(len, figures), default=0)
    sys.stdout.write("".join(f"{key:<{width}}  {value:.6g}\n" for key, value in figures.items()))


def main(argv: list[str] | None = None) -> None:
    """`sigphi export MODEL OUTPUT --form FORM`."""
    run(argv, "sigphi export")


__all__ = ["export", "main", "run"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.export")
