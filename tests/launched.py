"""One process of a job that a launcher starts: it trains toys one after the other, and keeps what came of each.

accelerate launch --config_file train/launch/zero2.yaml --num_processes 2 tests/launched.py PARTS FOLDER CASES
accelerate launch --config_file train/launch/zero2.yaml --num_processes 2 tests/launched.py train-vlm OPTIONS
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from toy_runs import COMMON, PLAIN, encoder_trainer, read_parts, vlm_trainer

from sigphi.modeling.modeling_sigphi import SigPhiForConditionalGeneration
from sigphi.train import siglip, vlm
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.errors import UserError
from sigphi.train.qlora import build_vlm, load_language_model
from sigphi.train.sharding import storage_dtype

# Each step of several processes is the step of one; nothing is drawn at random, and gradients are clipped.
OPTIONS: dict[str, Any] = {"max_grad_norm": 0.5, "eval_strategy": "no", "save_strategy": "no"}
OPTIONS |= {"save_total_limit": None}
BATCH = 16
COMMANDS = {"train-siglip": siglip.main, "train-vlm": vlm.main}


def take_processes_for_gpus() -> None:
    """
    Let accelerate believe that each process has a GPU, since it leaves FSDP out where they have none; the sharding
    itself is the same.
    """
    from accelerate.state import DistributedType, PartialState

    begin = PartialState.__init__

    def begin_as_if(self: PartialState, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_if


def make_trainer(case: dict[str, Any], parts: Path, folder: Path) -> Any:
    """The trainer of a case."""
    given = read_parts(parts)
    options = COMMON | OPTIONS | {"per_device_train_batch_size": BATCH} | case["options"]
    if "tokens_per_batch" in options:
        del options["per_device_train_batch_size"]
    for name in ("per_device_train_batch_size", "tokens_per_batch"):
        if name in options:
            options[name] //= int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    if case["stage"] == "encoder":
        options = {"ema_decay": 0.0} | options
        if case.get("channels_last"):
            given["encoder"].vision_model.to(memory_format=torch.channels_last)
        return encoder_trainer(given, folder, options)
    trainer = vlm_trainer(given, folder, PLAIN | options, case.get("tokens_per_row"))
    if case.get("nf4"):
        # The options say how weights are shared, which the base is read by.
        given["vlm"] = quantized(given, storage_dtype(trainer.args, torch.float32))
        trainer = vlm_trainer(given, folder, PLAIN | options)
    if case.get("full"):
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(not name.startswith("model.vision_tower."))
    return trainer


def quantized(given: dict[str, Any], storage: torch.dtype) -> SigPhiForConditionalGeneration:
    """The VLM of the toys with a base of 4 bits, as `train-vlm` puts it together."""
    base = given["vlm"].config.base_language_model
    arguments = VlmModelArguments(siglip_checkpoint="encoder", language_model=base, lora_dropout=0.0)
    device = torch.device("cpu")
    language_model = load_language_model(arguments, torch.float32, "sdpa", device, storage)
    torch.manual_seed(5)
    model = build_vlm(given["encoder"].vision_model, language_model, given["tokenizer"], arguments)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def deterministic(model: nn.Module) -> None:
    """No dropout, and BatchNorm by the statistics that it has, so that a row does not depend on its batch."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None  # type: ignore[method-assign, assignment, misc]


def run_case(case: dict[str, Any], parts: Path, folder: Path) -> dict[str, Any]:
    """Train, save, and say what the model was wrapped in and what was logged."""
    trainer = make_trainer(case, parts, folder)
    deterministic(trainer.model)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    trainer.save_model()
    wrapped = trainer.model_wrapped
    history = trainer.state.log_history
    return {
        "classes": [one.__name__ for one in type(wrapped).__mro__],
        "zero_stage": wrapped.zero_optimization_stage() if type(wrapped).__name__ == "DeepSpeedEngine" else None,
        "whole": sorted({name for name, one in wrapped.named_parameters() if not isinstance(one, DTensor)}),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "grad_norms": [float(entry["grad_norm"]) for entry in history if "loss" in entry],
        "eval_losses": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
    }


def main() -> None:
    """Run the cases, of which rank 0 writes what came; or a command of the package."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_processes_for_gpus()
    if sys.argv[1] in COMMANDS:
        COMMANDS[sys.argv[1]](sys.argv[2:])
        return
    parts, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    results = {}
    for name, case in cases.items():
        try:
            results[name] = run_case(case, parts, folder / name)
        except UserError as error:
            results[name] = {"error": str(error)}
    if os.environ.get("RANK", "0") == "0":
        (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
