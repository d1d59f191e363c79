"""Mutation fuzz of the six kinds of input: CSVs, pictures, configs, YAML files, checkpoints and model folders.

    python benchmarks/fuzz.py --output-dir runs/fuzz

Every input has to end in success or in a user error of one or two lines. The result, benchmarks/results/fuzz.json,
counts for each way of changing an input how many were made, how many a parser took (so that the code behind it was
reached), and how they ended; what ends otherwise is kept in `--output-dir`. The exit code is 1 where there is any, and
where the parser took less than three tenths of what one way of changing inputs has made. `--kinds` runs some kinds,
which replace those of the same name in the result.
"""

import argparse
import contextlib
import json
import logging
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from fuzz_mutations import (
    Mutation,
    csv_cells,
    csv_header,
    csv_lines,
    csv_rows,
    cut,
    flip,
    flip_letters,
    gray_values,
    insert,
    insert_text,
    jpeg_exif,
    json_form,
    of_json,
    of_one_file,
    of_yaml_values,
    png_chunks,
    renamed,
    repeat,
    resealed,
    safetensors_header,
    spell,
    without_one,
    yaml_form,
)
from fuzz_seeds import Files, checkpoint_seeds, csv_seeds, files_of, image_seeds, model_seeds, yaml_seeds
from fuzz_targets import TARGETS, WrongSuccess, signature
from provenance import provenance

from sigphi.train.errors import UserError
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
LONGEST = 20.0  # seconds of an input
MOST_MEMORY = 500_000_000  # bytes that an input may add to the largest size of the process
MOST_CHARACTERS = 1200  # of a message
LEAST_SHARE = 0.3  # of the inputs of each way of changing them that a parser has to take

# How many inputs of each way of changing one.
COUNTS = {"csv": 300, "image": 1500, "config": 800, "yaml": 1000, "checkpoint": 100, "model folder": 100}

# Options whose values a training reads before anything loads.
OPTIONS = """
per_device_train_batch_size batch_size num_train_epochs learning_rate weight_decay warmup_steps lr_scheduler_type optim
seed data_seed eval_strategy eval_steps save_strategy save_steps save_total_limit logging_steps report_to max_steps
hidden_sizes depths image_size stem micro_batch_size loss_chunk_size ema_decay cutout color_jitter
gradient_checkpointing lora_r lora_alpha lora_dropout bits num_image_tokens tokens_per_row tokens_per_batch packing
eval_samples eval_fraction split_seed images image_split output_dir input_csv dataset lr_scheduler_kwargs optim_args
gradient_accumulation_steps max_grad_norm adam_beta1 dataloader_num_workers resume_from_checkpoint accelerator_config
metric_for_best_model load_best_model_at_end push_to_hub hub_strategy fp16 bf16 tf32 torch_compile ddp_backend debug
""".split()


class Hang(BaseException):
    """An input has taken too long."""


@dataclass
class Tally:
    """How the inputs of one way of changing them have ended."""

    inputs: int = 0
    parsed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def as_json(self) -> dict[str, Any]:
        share = round(self.parsed / self.inputs, 3) if self.inputs else 0.0
        return {
            "inputs": self.inputs,
            "passed_the_parser": self.parsed,
            "share_behind_the_parser": share,
            **{kind: self.outcomes.get(kind, 0) for kind in ("success", "user error", *FAULTS)},
            "slowest_seconds": round(self.slowest, 2),
        }


FAULTS = ("traceback", "hang", "memory", "wrong success", "bad message")


def mutations() -> dict[str, dict[str, Mutation]]:
    """The ways to change an input, by its kind."""
    bytes_of: dict[str, Any] = {"flipped bits": flip, "a piece repeated or missing": repeat, "inserted": insert}
    texts = {"flipped bits": flip_letters, "letters": spell, "inserted": insert_text}
    return {
        "csv": {name: of_one_file(change) for name, change in bytes_of.items()}
        | {"letters": of_one_file(spell), "cut": of_one_file(partial(cut, least=60))}
        | {"cells": csv_cells, "rows": csv_rows, "header": csv_header, "lines and columns": csv_lines},
        "image": {name: of_one_file(partial(change, first=60)) for name, change in bytes_of.items()}
        | {"cut": of_one_file(partial(cut, least=100)), "chunks of PNG": png_chunks}
        | {"EXIF": jpeg_exif, "floating point grays": gray_values},
        "config": {"values": of_json("config.json"), "form": of_one_file(json_form, r"^config\.json")}
        | {name: of_one_file(change, r"^config\.json") for name, change in texts.items()},
        "yaml": {"values": of_yaml_values(OPTIONS), "form": of_one_file(yaml_form)}
        | {name: of_one_file(change) for name, change in texts.items()},
        "checkpoint": {
            "flipped bits": of_one_file(flip, "checkpoint-4/"),
            "cut": of_one_file(cut, "checkpoint-4/"),
            "missing": without_one("checkpoint-4/"),
            "record": of_json("checkpoint-4/sigphi_run.json"),
            "state, resealed": resealed(of_json("checkpoint-4/trainer_state.json")),
            "flipped bits, resealed": resealed(of_one_file(flip, r"checkpoint-4/.*\.(pt|pth|safetensors)$")),
            "header of the weights, resealed": resealed(of_one_file(safetensors_header, "checkpoint-4/model")),
            "cut, resealed": resealed(of_one_file(cut, r"checkpoint-4/.*(\.pt|\.pth|\.safetensors|state\.json)$")),
            "missing, resealed": resealed(without_one(r"checkpoint-4/.*\.(pt|pth|safetensors)$")),
            "renamed": renamed,
        },
        "model folder": {
            "header of the weights": of_one_file(safetensors_header, r"\.safetensors$"),
            "flipped bits of the weights": of_one_file(flip, r"\.safetensors$"),
            "cut weights": of_one_file(cut, r"\.safetensors$"),
            "values of the processor": of_json(r"^processor_config\.json"),
            "values of the tokenizer": of_json(r"^tokenizer.*\.json"),
            "flipped bits of the tokenizer": of_one_file(flip_letters, r"^tokenizer.*\.json"),
            "values of the config": of_json(r"^(config|generation_config)\.json"),
            "chat template": of_one_file(insert_text, r"^chat_template|^processor_config"),
            "missing": without_one(),
        },
    }


def seeds(kind: str, folder: Path) -> list[Files]:
    """The sound inputs of a kind."""
    if kind == "csv":
        return csv_seeds()
    if kind == "image":
        return image_seeds()
    if kind == "yaml":
        return yaml_seeds(folder / "output")
    if kind == "checkpoint":
        return checkpoint_seeds(folder / "seed")
    return model_seeds(folder)[: 2 if kind == "config" else 3]


class Fuzz:
    """
    Runs inputs of one kind in this process.

    Args:
        kind (`str`): of `TARGETS`.
        folder (`Path`): for the files, and what ends otherwise than it should.
        seed (`int`): of the changes.
    """

    def __init__(self, kind: str, folder: Path, seed: int = 0) -> None:
        self.kind, self.folder, self.seed = kind, folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.seeds = seeds(kind, folder)
        self.is_file = kind in ("csv", "image", "yaml")
        self.faults: Counter[str] = Counter()
        self._written: Files | None = None

    def run(self, name: str, mutation: Mutation, count: int) -> Tally:
        """So many inputs of one way of changing them."""
        tally = Tally()
        for number in range(count):
            rng = random.Random(f"{self.seed}:{self.kind}:{name}:{number}")
            files = mutation(rng, rng.choice(self.seeds))
            outcome, parsed, seconds, what = self.one(files)
            tally.inputs += 1
            tally.parsed += parsed
            tally.outcomes[outcome] += 1
            tally.slowest = max(tally.slowest, seconds)
            if outcome in FAULTS:
                self.faults[f"{outcome}: {what}"] += 1
                if self.faults[f"{outcome}: {what}"] == 1:
                    self._keep(files, f"{name}, number {number}: {outcome}: {what}")
        return tally

    def _keep(self, files: Files, what: str) -> None:
        place = self.folder / "faults" / str(len(self.faults))
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        (place / "what.txt").write_text(what, encoding="utf-8", errors="backslashreplace")
        logging.getLogger(__name__).warning("%s: %s", self.kind, what)

    def one(self, files: Files) -> tuple[str, bool, float, str]:
        """How an input ends, whether a parser took it, after how many seconds, and what was wrong."""
        place = self._write(files)
        reached: list[bool] = []
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        outcome, what = "success", ""
        try:
            with time_limit(LONGEST):
                TARGETS[self.kind](place, lambda: reached.append(True))
        except UserError as error:
            outcome, what = "user error", str(error)
            if what.count("\n") > 1 or len(what) > MOST_CHARACTERS or not what.replace("\n", " ").isprintable():
                outcome = "bad message"
        except WrongSuccess as error:
            outcome, what = "wrong success", str(error)[:300]
        except Hang as error:
            outcome, what = "hang", signature(error)
        except (Exception, SystemExit) as error:
            outcome, what = "traceback", signature(error)
        seconds = time.perf_counter() - began
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MOST_MEMORY:
            outcome, what = "memory", f"{grown / 1e9:.1f} GB more"
        return outcome, bool(reached), seconds, what

    def _write(self, files: Files) -> Path:
        place = self.folder / "input"
        if self.kind == "checkpoint" or self.is_file:
            shutil.rmtree(place, ignore_errors=True)  # a training may have left more there
            self._written = None
        old = self._written or {}
        for name in old.keys() - files.keys():
            (place / name).unlink()
        for name, content in files.items():
            if old.get(name) != content:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(content)
        self._written = files
        return place / next(iter(files)) if self.is_file else place


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises [`Hang`] in what takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def be_quiet() -> None:
    """What libraries have to say of ten thousand broken files is of no use."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logging.getLogger("sigphi").setLevel(logging.CRITICAL)
    for name in ("PIL", "torch", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the inputs, and those that failed")
    parser.add_argument("--kinds", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--share", type=float, default=1.0, help="of the number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run all, write the result, and tell by the exit code whether there are objections to it."""
    arguments = parse_args()
    torch.set_num_threads(1)
    be_quiet()
    origin = provenance()
    found = json.loads(arguments.results.read_text())["kinds"] if arguments.results.exists() else {}
    for kind in arguments.kinds:
        found[kind] = origin | run_kind(kind, arguments)
        found = {name: found[name] for name in TARGETS if name in found}
        write_json(arguments.results, {"total": totals(found), "kinds": found})
    sys.stdout.write(f"{totals(found)}\n")
    reasons = [reason for kind in arguments.kinds for reason in objections(kind, found[kind])]
    sys.stdout.write("".join(f"{reason}\n" for reason in reasons))
    sys.exit(1 if reasons else 0)


def objections(kind: str, result: dict[str, Any]) -> list[str]:
    """
    What is wrong with a result.

    Args:
        kind (`str`): the inputs.
        result (`dict`): of [`run_kind`].

    Returns:
        `list[str]`: a line for each fault, and for each way of changing inputs that the parser takes too few of.
    """
    faults = [f"{kind}: {count} times {what}" for what, count in result["faults"].items()]
    shares = {name: tally["share_behind_the_parser"] for name, tally in result["mutations"].items()}
    return faults + [
        f"{kind}, {name}: the parser took {share:.0%} of the inputs, fewer than {LEAST_SHARE:.0%}"
        for name, share in shares.items()
        if share < LEAST_SHARE
    ]


def run_kind(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways to change an input of a kind."""
    fuzz = Fuzz(kind, (arguments.output_dir / kind.replace(" ", "_")).absolute(), arguments.seed)
    began = time.perf_counter()
    count = max(1, round(COUNTS[kind] * arguments.share))
    tallies = {}
    for name, change in mutations()[kind].items():
        tallies[name] = fuzz.run(name, change, count).as_json()
        sys.stdout.write(f"{kind:12} {name:32} {tallies[name]}\n")
        sys.stdout.flush()
    seconds = round(time.perf_counter() - began, 1)
    return {"seeds": len(fuzz.seeds), "seconds": seconds, "mutations": tallies, "faults": dict(fuzz.faults)}


def totals(kinds: dict[str, Any]) -> dict[str, Any]:
    """Over all kinds of a result."""
    every = [tally for result in kinds.values() for tally in result["mutations"].values()]
    total = {key: sum(tally[key] for tally in every) for key in ("inputs", "success", "user error", *FAULTS)}
    return total | {"least_share_behind_the_parser": min(tally["share_behind_the_parser"] for tally in every)}


__all__ = ["Fuzz", "be_quiet", "files_of", "main", "mutations", "objections"]

if __name__ == "__main__":
    main()
