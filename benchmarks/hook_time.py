"""What it costs that a training loses nothing: our hooks' share of a step; writes results/hook_time.json.

    OMP_NUM_THREADS=1 python benchmarks/hook_time.py

Seconds are those that the processor spends in this process, in one thread: hooks and steps are parts of the same run.
A hook's are those of what a plain Trainer does not do: the random numbers that are taken down before a step, the check
that loss and gradients are numbers, and the callbacks. Two are told apart: the average of the weights (`--ema-decay`),
which is a part of the training that was asked for, and sealing, what a checkpoint costs beyond the Trainer's own:
hashes, syncing and renaming, as a share of saving.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from provenance import provenance
from transformers import PhiConfig, PhiForCausalLM, SiglipImageProcessor, TrainerCallback
from transformers.utils import logging as transformers_logging

from sigphi import (
    SiglipResNetConfig,
    SiglipResNetModel,
    SiglipTrainer,
    SiglipTrainingArguments,
    SigPhiConfig,
    SigPhiForConditionalGeneration,
    VlmTrainingArguments,
)
from sigphi.train import resumable
from sigphi.train.averaging import WeightAverage
from sigphi.train.collators import VlmCollator
from sigphi.train.records import write_json
from sigphi.train.resumable import ResumableTrainer
from sigphi.train.trainers import VlmTrainer

RESULTS = Path(__file__).parent / "results" / "hook_time.json"
VISION = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}
VISION |= {"stem": "cifar", "image_size": 32, "projection_dim": 128}
TEXT = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
COMMON: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "eval_strategy": "no", "logging_strategy": "no"}
COMMON |= {"save_strategy": "steps", "use_cpu": True}
ROWS = 512
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Clock:
    """Seconds of the processor by name, of functions that it is put around."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.process_time() - start

        return timed


def encoder_collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Images as bytes, and what a text tower would say of a text each."""
    index = torch.tensor([row["image_index"] for row in rows])
    generator = torch.Generator().manual_seed(int(index[0]))
    pixels = torch.randint(256, (len(rows), 3, 32, 32), dtype=torch.uint8, generator=generator)
    features = torch.randn(len(rows), TEXT["hidden_size"], generator=generator)
    others = {"return_loss": True, "return_logits": False}
    return {"pixel_values": pixels, "image_index": index, "text_features": features, **others}


class _Processor:
    """As much of a processor as the encoder's trainer reads."""

    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


def encoder_trainer(folder: str, steps: int) -> ResumableTrainer:
    config = SiglipResNetConfig(vision_config=VISION, text_config=PhiConfig(**TEXT), projection_dim=128)
    config.include_text_tower = False
    options = COMMON | {"max_steps": steps, "save_steps": steps // 2, "per_device_train_batch_size": 128}
    return SiglipTrainer(
        model=SiglipResNetModel(config),
        args=SiglipTrainingArguments(output_dir=folder, ema_decay=0.99, **options),
        train_dataset=datasets.Dataset.from_list([{"image_index": row} for row in range(ROWS)]),
        data_collator=encoder_collator,
        processing_class=_Processor(),
    )


def vlm_trainer(folder: str, steps: int) -> ResumableTrainer:
    """All weights are trained: the check of the gradients looks at their norm, which is there anyway."""
    text_config = PhiConfig(**TEXT)
    tower = SiglipResNetModel(SiglipResNetConfig(vision_config=VISION, text_config=text_config, projection_dim=128))
    config = SigPhiConfig(
        vision_config=tower.config.vision_config, text_config=text_config, image_token_id=1999, pad_token_id=0
    )
    model = SigPhiForConditionalGeneration.from_parts(config, tower.vision_model, PhiForCausalLM(text_config))
    rows = [
        {"image_index": row, "prompt_ids": [1999, *range(5, 25)], "answer_ids": [30 + row % 900, *range(5, 15), 0]}
        for row in range(ROWS)
    ]
    options = COMMON | {"max_steps": steps, "save_steps": steps // 2, "per_device_train_batch_size": 32, "bf16": False}
    return VlmTrainer(
        model=model,
        args=VlmTrainingArguments(output_dir=folder, gradient_checkpointing=False, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=VlmCollator(0, image_features=torch.randn(ROWS, 1, 128)),
    )


def measure(make: Callable[[str, int], ResumableTrainer], steps: int) -> dict[str, float]:
    """Of one training: seconds of a step and of the hooks in it, and those of a save and of the sealing in it."""
    clock, originals = Clock(), (resumable.random_state, resumable.all_finite, resumable.seal, resumable.publish)
    resumable.random_state = clock.around("hooks", resumable.random_state)
    resumable.all_finite = clock.around("hooks", resumable.all_finite)
    resumable.seal, resumable.publish = clock.around("seal", resumable.seal), clock.around("seal", resumable.publish)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = make(folder, steps)
        for callback in trainer.callback_handler.callbacks:
            kind = "averaging" if isinstance(callback, WeightAverage) else "hooks"
            for name in EVENTS if type(callback).__module__.startswith("sigphi.") else ():
                setattr(callback, name, clock.around(kind, getattr(callback, name)))
        trainer._save_checkpoint = clock.around("save", trainer._save_checkpoint)
        run = clock.around("run", super(ResumableTrainer, trainer).train)
        describe = clock.around("describe", resumable.describe_run)
        trainer._run = describe(trainer)
        Path(folder, "_unfinished").mkdir()
        run()
    resumable.random_state, resumable.all_finite, resumable.seal, resumable.publish = originals
    seconds = clock.seconds
    step = (seconds["run"] - seconds["save"]) / steps
    return {
        "steps": steps,
        "step_seconds": step,
        "hook_seconds_per_step": seconds["hooks"] / steps,
        "hooks_over_step": seconds["hooks"] / steps / step,
        "averaging_over_step": seconds["averaging"] / steps / step,
        "save_seconds": seconds["save"] / 2,
        "sealing_over_save": seconds["seal"] / seconds["save"],
        "describe_seconds": seconds["describe"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    results = {"encoder": measure(encoder_trainer, options.steps), "vlm": measure(vlm_trainer, options.steps)}
    write_json(options.output, results | {"metadata": provenance()})
    print(json.dumps(results, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
