"""Memory, workers and disks that do not suffice: handled, or ended in one line, with nothing half done."""

import contextlib
import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_of, files_of_20_kb
from torch import nn
from toy_runs import end_of, make_toy, train_toy, unequal, vlm_rows, write_parts
from transformers import AutoModelForImageTextToText, TrainerCallback

from sigphi import SigPhiForConditionalGeneration
from sigphi.train.arguments import DataArguments
from sigphi.train.checkpoint_files import ASIDE, checkpoints, fault_of, move_files
from sigphi.train.checkpoints import read_config
from sigphi.train.collators import VlmCollator
from sigphi.train.errors import UserError, full_disks, run_command
from sigphi.train.packing import PackingCollator
from sigphi.train.parts import split_rows
from sigphi.train.records import write_json, write_training_data
from sigphi.train.report import write_loss_curve

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def parts(shared: Any, make_vlm: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts") / "parts.pt", shared, make_vlm, base_folder)


# A batch in parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_the_losses_and_gradients_of_parts_add_up_to_those_of_the_whole(packed, rows_at_once, make_vlm):
    model = make_vlm(num_image_tokens=4)
    image = model.config.image_token_id
    rows = [
        row | {"prompt_ids": [image] * 4 + row["prompt_ids"][1:], "image_index": row["image_index"] // 2}
        for row in vlm_rows(image).to_list()[:9]
    ]
    features = torch.randn(64, 4, 16, generator=torch.Generator().manual_seed(7))
    options: dict[str, Any] = {"image_features": features}
    collator = (
        PackingCollator(1, image_token_id=image, tokens_per_row=40, **options) if packed else VlmCollator(1, **options)
    )
    batch = collator(rows)
    tokens = (batch["labels"] != -100).sum()
    pieces = split_rows(batch, rows_at_once, image, 4)
    assert len(pieces) == -(-len(batch["input_ids"]) // rows_at_once) and len(pieces) > 1
    found = []
    for batches in ([batch], pieces):
        model.zero_grad()
        losses = [model(**one, num_items_in_batch=tokens).loss for one in batches]
        sum(losses).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((sum(losses).detach(), gradients))
    (whole, whole_gradients), (sum_of_parts, sum_of_gradients) = found
    torch.testing.assert_close(sum_of_parts, whole)
    assert whole_gradients.keys() == sum_of_gradients.keys() and len(whole_gradients) > 20
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(sum_of_gradients[name], gradient, msg=name, rtol=1e-4, atol=1e-6)


# Out of memory -------------------------------------------------------------------------------------------------------


class Memory:
    """Holds so many rows of a forward pass, from the `first` one on."""

    def __init__(self, model: nn.Module, rows: int, first: int = 1) -> None:
        self.rows, self.first, self.calls = rows, first, 0
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, arguments: tuple, given: dict[str, Any]) -> None:
        if not model.training:
            return
        self.calls += 1
        name = "input_ids" if "labels" in given else "pixel_values"
        if self.calls >= self.first and len(given[name]) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


SHORT: dict[str, Any] = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}


# The second case fails in the second batch of an update, whose first one has left its gradients.
@pytest.mark.parametrize(("rows", "first"), [(5, 1), (8, 2)])
def test_a_vlm_goes_on_with_fewer_rows_at_a_time_to_the_same_weights(rows, first, parts, tmp_path, caplog):
    trained = []
    for name in ("whole", "little"):
        trainer = make_toy("vlm", parts, tmp_path / name, **SHORT, gradient_accumulation_steps=2)
        no_dropout(trainer.model)
        if name == "little":
            Memory(trainer.model, rows, first)
        trainer.train()
        trained.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, msg=name, rtol=1e-4, atol=1e-5)
    said = [line for line in caplog.messages if "out of memory" in line]
    expected = ["8 rows at a time instead of 16", "4 rows at a time instead of 8"][: 1 if rows == 8 else 2]
    assert said == [
        f"out of memory at step 1: {what} from now on; the batch of an update stays the same" for what in expected
    ]


def test_a_vlm_for_which_one_row_is_too_much_ends_with_advice(parts, tmp_path):
    trainer = make_toy("vlm", parts, tmp_path, **SHORT)
    Memory(trainer.model, 0)
    with pytest.raises(UserError, match="out of memory at step 1: use a smaller --batch-size") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_an_encoder_in_one_pass_ends_with_the_option_that_helps(parts, tmp_path):
    trainer = make_toy("encoder", parts, tmp_path, **SHORT)
    Memory(trainer.model, 5)
    with pytest.raises(UserError, match="at step 1: add --micro-batch-size 8, which compares the same 16 images"):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / ASIDE).exists()


def test_an_encoder_in_two_passes_goes_on_with_smaller_parts_as_if_it_had_begun_with_them(parts, tmp_path, caplog):
    trained = []
    for size in (4, 16):
        trainer = make_toy("encoder", parts, tmp_path / str(size), **SHORT, micro_batch_size=size)
        Memory(trainer.model, 5)
        trainer.train()
        trained.append(copy.deepcopy(trainer.model.state_dict()))
    assert unequal(trained[0], trained[1]) == []
    assert "8 images at a time instead of 16" in caplog.text and "4 images at a time instead of 8" in caplog.text


def test_memory_that_is_short_outside_the_batches_ends_with_advice(parts, tmp_path, monkeypatch):
    trainer = make_toy("vlm", parts, tmp_path, **SHORT)
    trainer.create_optimizer()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer.optimizer, "step", fail)
    with pytest.raises(UserError, match="out of memory behind step 0, outside the batches .*--optim"):
        trainer.train()


# Workers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "mistake"])
def test_a_worker_that_dies_ends_the_training_in_one_line(how, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from fuzz_seeds import Rows, tiny_trainer

    class Dying(Rows):
        def __getitem__(self, row: int) -> dict[str, Any]:
            if torch.utils.data.get_worker_info() is None:  # what a run is compared by
                return super().__getitem__(row)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError(f"image {row} cannot be decoded (it is cut).")

    trainer = tiny_trainer(tmp_path)
    trainer.args.dataloader_num_workers = 1
    trainer.train_dataset = Dying()
    expected = "a worker of the data loader has died .*--resume" if how == "killed" else "^image . cannot be decoded"
    with pytest.raises(UserError, match=expected) as error:
        trainer.train()
    assert "\n" not in str(error.value)


# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["encoder", "vlm"])
def test_a_model_without_room_leaves_nothing_under_its_name(stage, parts, tmp_path, small_files):
    trainer = make_toy(stage, parts, tmp_path, **SHORT)
    with pytest.raises(UserError, match=f"--output-dir {tmp_path} cannot be written: .*Make room"):
        trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} <= {ASIDE}


def test_a_model_without_room_leaves_the_one_that_was_there(parts, tmp_path):
    train_toy("vlm", parts, tmp_path, **SHORT)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in before}
    assert not (tmp_path / ASIDE).exists()
    trainer = make_toy("vlm", parts, tmp_path, **SHORT)
    with files_of_20_kb(), pytest.raises(UserError, match="cannot be written"):
        trainer.save_model()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["training_data.json", "log_history.json", "loss_curve.png"])
def test_what_belongs_to_a_model_without_room_leaves_what_was_there(name, toy_dataset, tmp_path):
    def write(history: list[dict[str, float]]) -> None:
        if name == "training_data.json":
            write_training_data(tmp_path, toy_dataset, DataArguments(input_csv="qa.csv", images="synthetic"))
        else:
            write_loss_curve(history, tmp_path)

    write([{"step": 1, "loss": 1.0}])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert tmp_path / name in before
    history = [{"step": step, "loss": step**0.5} for step in range(1, 4 if name == "loss_curve.png" else 100)]
    with files_of(300), pytest.raises(UserError) as error:
        write(history)
    message = f"--output-dir {tmp_path} cannot be written: File too large. Make room, and run it again with --resume."
    assert str(error.value) == message
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() and after[tmp_path / name] == before[tmp_path / name]


def test_results_without_room_end_a_command_in_one_line(tmp_path, capsys):
    path = tmp_path / "eval_results.json"
    write_json(path, {"zero_shot_top1": 0.5})
    before = path.read_bytes()
    with files_of(1000), pytest.raises(SystemExit) as ended:
        run_command(lambda: write_json(path, {"zero_shot_top1": 0.5, "more": "x" * 2000}), "sigphi evaluate")
    assert ended.value.code == 2
    line = "sigphi evaluate: error: a file cannot be written: File too large. Make room, and run it again.\n"
    assert capsys.readouterr().err == line
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_other_errors_of_the_system_keep_their_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), full_disks():
        (tmp_path / "none").read_text()


class NoMoreRoom(TrainerCallback):
    """From the end of the second step on no file of the folder may grow."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.stack = folder, stack

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            [events] = self.folder.rglob("events.out.*")
            self.stack.enter_context(files_of(events.stat().st_size + 10))


def test_a_tracker_without_room_ends_the_training_in_one_line(parts, tmp_path, capfd):
    options = SHORT | {"max_steps": 4, "report_to": "tensorboard", "logging_steps": 1}
    trainer = make_toy("encoder", parts, tmp_path, **options)
    with contextlib.ExitStack() as stack, pytest.raises(UserError) as error:
        trainer.add_callback(NoMoreRoom(tmp_path, stack))
        trainer.train()
    message = f"--output-dir {tmp_path} cannot be written: File too large. Make room, and go on with --resume"
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert trainer.state.global_step == 2
    assert "Traceback" not in capfd.readouterr().err


# Kills ---------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, what: str) -> None:
    for name in ("README.md", "config.json", "lora/adapter_model.safetensors", "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(what)


@pytest.mark.parametrize("moves", range(5))
def test_a_kill_while_a_model_gets_its_names_leaves_none_or_a_whole_one(moves, tmp_path, monkeypatch):
    write_model(tmp_path, "old")
    write_model(tmp_path / ASIDE / "model", "new")
    replace, done = os.replace, []

    def one_more(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        replace(source, target)
        done.append(target)

    monkeypatch.setattr(os, "replace", one_more)
    with pytest.raises(KeyboardInterrupt) if moves < 4 else contextlib.nullcontext():
        move_files(tmp_path / ASIDE / "model", tmp_path)
    there = {path.read_text() for path in tmp_path.rglob("*") if path.is_file() and ASIDE not in path.parts}
    assert (tmp_path / "config.json").exists() == (moves == 4)
    assert moves < 4 or there == {"new"}


def test_a_folder_of_a_model_without_its_config_does_not_load(parts, tmp_path):
    train_toy("vlm", parts, tmp_path, **SHORT)
    (tmp_path / "config.json").unlink()
    for loader in (AutoModelForImageTextToText, SigPhiForConditionalGeneration):
        with pytest.raises((OSError, ValueError), match="config.json"):
            loader.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="there is no model folder with a config.json here"):
        read_config(str(tmp_path), "MODEL")


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_nothing(parts, tmp_path, monkeypatch):
    import time

    train_toy("encoder", parts, tmp_path / "whole", save_total_limit=None, max_steps=4)
    train_toy("encoder", parts, tmp_path / "run", save_total_limit=None, max_steps=4)
    for path in checkpoints(tmp_path / "run"):
        os.utime(path, (10_000 - int(path.name[11:]),) * 2)  # the newest one is the oldest by its time
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1e9)
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    train_toy("encoder", parts, tmp_path / "run", resume="newest", save_total_limit=None, max_steps=4)
    assert fault_of(tmp_path / "run" / "checkpoint-4") is None
    assert unequal(end_of(tmp_path / "whole", 4), end_of(tmp_path / "run", 4)) == []
