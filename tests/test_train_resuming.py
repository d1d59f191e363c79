"""Resuming: exact whatever a kill leaves; what does not fit is refused; signals end a run well."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from toy_runs import STAGES, end_of, make_toy, train_toy, unequal, write_parts
from transformers import TrainerCallback

from sigphi.train import siglip, trainers, vlm
from sigphi.train.checkpoint_files import ASIDE, RECORD, checkpoints, fault_of, move_files, remove_old, sole_run
from sigphi.train.errors import UserError
from sigphi.train.resumable import check_checkpoint, check_output_dir, newest_checkpoint
from sigphi.train.run_identity import describe_run

# Called at each operation on files; a hook of the interpreter cannot be taken away.
LISTENERS: list[Callable[[str, tuple], None]] = []
sys.addaudithook(lambda event, arguments: [listen(event, arguments) for listen in LISTENERS] and None)


@pytest.fixture(scope="module")
def parts(shared: Any, make_vlm: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts") / "parts.pt", shared, make_vlm, base_folder)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def whole(parts: Path, snapshots: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An unbroken run of each stage; of the encoder's, what a kill at each operation on files would have left."""
    folders = {}
    for stage in STAGES:
        folders[stage] = tmp_path_factory.mktemp("whole") / stage
        listen = Snapshots(folders[stage], snapshots)
        if stage == "encoder":
            LISTENERS.append(listen)
        train_toy(stage, parts, folders[stage])
        LISTENERS.clear()
    return folders


class Snapshots:
    """
    Copies a folder as it is at each operation on its checkpoints: what a SIGKILL in that moment would leave, since
    the system keeps what a dead process has written.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target, self.is_copying = folder, target, False

    def __call__(self, event: str, arguments: tuple) -> None:
        paths = [str(one) for one in arguments if isinstance(one, str | os.PathLike)]
        is_ours = any(path.startswith(str(self.folder)) and "checkpoint-" in path for path in paths)
        # Up to the fourth checkpoint: two of the earlier ones have gone by then.
        is_late = (self.folder / "checkpoint-8").exists()
        if self.is_copying or is_late or not is_ours or event.split(".")[0] not in ("open", "os", "shutil"):
            return
        self.is_copying = True
        shutil.copytree(self.folder, self.target / f"{len(list(self.target.iterdir())):04}")
        self.is_copying = False


# Exact ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_as_the_whole_one_bit_for_bit(stage, whole, parts, tmp_path):
    # A folder with the checkpoint that the whole run keeps beside its last one, within the third epoch's start.
    shutil.copytree(whole[stage] / "checkpoint-8", tmp_path / "checkpoint-8")
    train_toy(stage, parts, tmp_path, resume="newest")
    expected = end_of(whole[stage])
    assert len(expected) > 100 and {"log 4 eval_loss", "log 8 eval_loss"} <= expected.keys()
    assert unequal(expected, end_of(tmp_path)) == []


def train_stream(parts: Path, folder: Path, passes: int | None, steps: int, resume: str | None = None) -> None:
    """Train on a shuffled stream of four batches, so many times over or without end."""
    trainer = make_toy("encoder", parts, folder, max_steps=steps, eval_strategy="no")
    rows = trainer.train_dataset.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=16)
    trainer.train_dataset = rows if passes == 1 else rows.repeat(passes)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def test_a_run_on_a_stream_without_end_goes_on_bit_for_bit(parts, tmp_path):
    train_stream(parts, tmp_path / "whole", None, steps=8)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    train_stream(parts, tmp_path / "again", None, steps=8, resume="newest")
    expected = end_of(tmp_path / "whole", step=8)
    assert len(expected) > 100
    assert unequal(expected, end_of(tmp_path / "again", step=8)) == []


def test_a_run_on_a_stream_goes_on_within_its_first_pass_alone(parts, tmp_path):
    train_stream(parts, tmp_path / "whole", 1, steps=6)
    for step in (4, 6):  # the first pass ends behind step 4
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
    train_stream(parts, tmp_path / "4", 1, steps=6, resume="newest")
    assert unequal(end_of(tmp_path / "whole", step=6), end_of(tmp_path / "4", step=6)) == []
    with pytest.raises(UserError, match="checkpoint-6: the rows are a stream, and .* of its pass 2;.*repeat"):
        train_stream(parts, tmp_path / "6", 1, steps=8, resume="newest")


def test_the_comparison_sees_one_random_number_more(whole, parts, tmp_path):
    class Draw(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.rand(1)

    trainer = make_toy("vlm", parts, tmp_path)
    trainer.add_callback(Draw())
    trainer.train(resume_from_checkpoint=str(whole["vlm"] / "checkpoint-8"))
    trainer.save_model()
    differing = unequal(end_of(whole["vlm"]), end_of(tmp_path))
    assert any(name.startswith("rng_state.pth/cpu") for name in differing)
    assert any("lora_A" in name for name in differing), "dropout draws other masks"


def test_what_any_kill_leaves_can_be_gone_on_from(whole, snapshots, parts, tmp_path):
    run = describe_run(make_toy("encoder", parts, tmp_path / "run"))
    left = sorted(snapshots.iterdir())
    assert len(left) > 100
    chosen = {}
    for folder in left:
        assert [path.name for path in checkpoints(folder) if fault_of(path) is not None] == []
        newest = newest_checkpoint(folder, run)
        chosen.setdefault("none" if newest is None else newest.name, folder)
        unfinished = [path.name for path in (folder / ASIDE).glob("checkpoint-*")]
        assert len(unfinished) <= 1, "one at a time is aside"
    assert set(chosen) == {"none", *(f"checkpoint-{step}" for step in (2, 4, 6))}
    # Once a checkpoint is there, one is always there.
    first = left.index(chosen["checkpoint-2"])
    assert all(checkpoints(folder) for folder in left[first:])
    for name in ("none", "checkpoint-6"):
        shutil.copytree(chosen[name], tmp_path / name)
        train_toy("encoder", parts, tmp_path / name, resume="newest")
        assert unequal(end_of(whole["encoder"]), end_of(tmp_path / name)) == []


def test_a_run_that_was_killed_behind_its_last_checkpoint_makes_no_further_step(whole, parts, tmp_path):
    shutil.copytree(whole["encoder"], tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    train_toy("encoder", parts, tmp_path / "run", resume="newest")
    assert unequal(end_of(whole["encoder"]), end_of(tmp_path / "run")) == []


def test_a_checkpoint_is_of_its_place_and_nothing_is_left_aside(whole):
    for folder in whole.values():
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-8", "checkpoint-10"]
        assert not (folder / ASIDE).exists()


def test_the_best_checkpoint_is_recorded_under_its_own_name_and_kept(parts, tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    trainer = make_toy("vlm", parts, tmp_path, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and fault_of(best) is None
    recorded = json.loads((best / "trainer_state.json").read_text())
    assert recorded["best_model_checkpoint"] == str(best)


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(whole["encoder"], tmp_path / "copied")
    return tmp_path / "copied"


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "unrecorded"])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(harm, copied, parts, whole, caplog):
    newest = copied / "checkpoint-10"
    path = newest / ("optimizer.pt" if harm != "unrecorded" else RECORD)
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-10])
    elif harm == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    run = describe_run(make_toy("encoder", parts, copied))
    assert newest_checkpoint(copied, run) == copied / "checkpoint-8"
    assert "checkpoint-10 is passed over: it" in caplog.text
    with pytest.raises(UserError, match="resume-from-checkpoint .*checkpoint-10: it"):
        check_checkpoint(newest, copied, run)
    with pytest.raises(UserError, match="resume-from-checkpoint .*: there is no such folder"):
        check_checkpoint(copied / "checkpoint-7", copied, run)
    if harm == "cut":
        train_toy("encoder", parts, copied, resume="newest")
        assert unequal(end_of(whole["encoder"]), end_of(copied)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 7}, "--seed was 42, is 7"),
        ({"learning_rate": 0.5}, "--learning-rate was 0.001, is 0.5"),
        ({"per_device_train_batch_size": 8}, "an update had a batch of 16 over all processes, has 8"),
        ({"ema_decay": 0.0}, "--ema-decay was 0.9, is 0.0"),
        ({"augment": False}, "--augment was True, is False"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(options, message, copied, parts):
    trainer = make_toy("encoder", parts, copied, **options)
    for resume in ("newest", str(copied / "checkpoint-10")):
        with pytest.raises(UserError, match="it is of another run") as error:
            trainer.train(resume_from_checkpoint=resume)
        assert message in str(error.value) and len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("part", ["row", "image", "text tower", "count"])
def test_a_checkpoint_of_other_data_or_another_model_is_refused(part, copied, parts):
    trainer = make_toy("encoder", parts, copied)
    if part == "row":
        texts = trainer.train_dataset["texts"][:]
        texts[33] = ["Another text.", *texts[33][1:]]  # not among those of which the batch is compared
        trainer.train_dataset = trainer.train_dataset.remove_columns("texts").add_column("texts", texts)
    elif part == "image":
        trainer.data_collator.images = trainer.data_collator.images + 1
    elif part == "text tower":
        with torch.no_grad():
            trainer.model.text_model.language_model.embed_tokens.weight += 1
    else:
        trainer.train_dataset = trainer.train_dataset.select(range(60))
    with pytest.raises(UserError, match="it is of another run .*(rows|images|weights)"):
        trainer.train(resume_from_checkpoint="newest")


def test_more_steps_are_said_and_made(copied, parts, caplog):
    trainer = make_toy("encoder", parts, copied, max_steps=12)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    assert "--max-steps was 10, is 12: the weights will not be" in caplog.text


def test_a_new_run_does_not_mix_its_checkpoints_with_those_of_another(copied, parts):
    with pytest.raises(UserError, match="holds checkpoint-10 of an earlier run. Go on with it by --resume"):
        train_toy("encoder", parts, copied)
    with pytest.raises(UserError, match="has newer ones, up to checkpoint-10"):
        train_toy("encoder", parts, copied, resume=str(copied / "checkpoint-8"))


def elsewhere(function: Callable[[], Any]) -> BaseException | None:
    """What a run in another process would get; the lock is of the thread that took it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).exception()


def take(folder: Path) -> None:
    with sole_run(folder):
        pass


def test_two_runs_do_not_write_into_one_folder(parts, tmp_path):
    with sole_run(tmp_path):
        error = elsewhere(lambda: train_toy("encoder", parts, tmp_path))
    assert isinstance(error, UserError) and "another run is writing there" in str(error)
    assert not (tmp_path / ASIDE).exists()


def test_the_folder_is_held_while_the_model_is_written(parts, tmp_path, monkeypatch):
    trainer = make_toy("encoder", parts, tmp_path, save_strategy="no", max_steps=1, eval_strategy="no")
    trainer.train()
    assert elsewhere(lambda: check_output_dir(trainer.args)) is None
    errors = []

    def moved(aside: Path, folder: Path) -> None:
        before = sorted(path.name for path in aside.iterdir())
        errors.append(elsewhere(lambda: check_output_dir(trainer.args)))
        assert sorted(path.name for path in aside.iterdir()) == before and "model.safetensors" in before
        move_files(aside, folder)

    monkeypatch.setattr(trainers, "move_files", moved)
    trainer.save_model()
    assert [type(error) for error in errors] == [UserError]
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / ASIDE).exists()


def test_a_run_in_its_own_folder_does_not_wait_for_itself(tmp_path):
    with sole_run(tmp_path):
        (tmp_path / ASIDE / "model").mkdir()
        take(tmp_path / ".." / tmp_path.name)
        assert (tmp_path / ASIDE / "model").exists()
        assert isinstance(elsewhere(lambda: take(tmp_path)), UserError)
    assert elsewhere(lambda: take(tmp_path)) is None


@pytest.mark.parametrize("name", ["eval_results.json", "training_data.json"])
def test_a_broken_record_of_the_folder_is_said_before_anything_is_loaded(name, tmp_path):
    (tmp_path / name).touch()
    argv = ["--input-csv", "none.csv", "--output-dir", str(tmp_path), "--report-to", "none", "--resume"]
    with pytest.raises(UserError, match=f"{tmp_path / name} is not the JSON that it should be"):
        siglip.main(argv)


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    for command in (siglip, vlm):
        argv = ["--input-csv", "none.csv", "--output-dir", str(tmp_path / "file" / "model"), "--report-to", "none"]
        argv += ["--siglip-checkpoint", "none"] if command is vlm else []
        with pytest.raises(UserError, match="--output-dir .*model cannot be made: .*file is no folder"):
            command.main(argv)


def test_old_checkpoints_go_and_newer_and_the_best_stay(tmp_path):
    for step in (1, 2, 3, 9, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / ASIDE).mkdir()
    remove_old(tmp_path / "checkpoint-10", 3, str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 9, 10, 20)]
    remove_old(tmp_path / "checkpoint-10", 1, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]


def test_a_checkpoint_without_room_is_an_error_and_the_one_before_stays(copied, parts, small_files):
    trainer = make_toy("encoder", parts, copied, max_steps=12)
    with pytest.raises(UserError, match="cannot be written: .*go on with --resume from the last checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-8", "checkpoint-10"]
    assert fault_of(copied / "checkpoint-10") is None


# Signals -------------------------------------------------------------------------------------------------------------


class SendSignal(TrainerCallback):
    """To this process, in the middle of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("stage", "number", "step", "ends_by"),
    [
        ("encoder", signal.SIGTERM, 3, SystemExit),
        ("vlm", signal.SIGINT, 5, KeyboardInterrupt),
        ("vlm", signal.SIGTERM, 4, SystemExit),  # the last step of an epoch, whose evaluation is not missed
    ],
)
def test_a_signal_saves_and_ends_and_the_run_goes_on(stage, number, step, ends_by, whole, parts, tmp_path, capfd):
    before = signal.getsignal(number)
    trainer = make_toy(stage, parts, tmp_path)
    trainer.add_callback(SendSignal(number, step))
    with pytest.raises(ends_by) as ended:
        trainer.train()
    assert ends_by is KeyboardInterrupt or ended.value.code == 143
    assert signal.getsignal(number) is before
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{step}" and fault_of(checkpoints(tmp_path)[-1]) is None
    assert f"stopped at step {step} of 10, saved in {tmp_path}/checkpoint-{step}; go on with" in capfd.readouterr().err
    train_toy(stage, parts, tmp_path, resume="newest")
    assert unequal(end_of(whole[stage]), end_of(tmp_path)) == []


WORSE = {"metric_for_best_model": "loss", "greater_is_better": True}  # with each evaluation


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"save_strategy": "no"}, 3),
        ({"save_strategy": "no"}, 4),  # the last step of an epoch
        ({"save_only_model": True}, 3),
        ({"save_strategy": "best", **WORSE}, 8),
        ({"save_strategy": "epoch", "save_total_limit": 1, "load_best_model_at_end": True, **WORSE}, 5),
    ],
)
def test_whatever_is_saved_else_a_stopped_run_leaves_what_it_goes_on_from(
    options, step, whole, parts, tmp_path, capfd
):
    trainer = make_toy("vlm", parts, tmp_path, **options)
    trainer.add_callback(SendSignal(signal.SIGTERM, step))
    with pytest.raises(SystemExit):
        trainer.train()
    assert f"saved in {tmp_path}/checkpoint-{step}; go on with --resume" in capfd.readouterr().err
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{step}"
    assert trainer.args.save_only_model == options.get("save_only_model", False)
    if "metric_for_best_model" in options:  # the best one is another, and stays too
        assert checkpoints(tmp_path)[0].name == "checkpoint-4"
    train_toy("vlm", parts, tmp_path, resume="newest")
    assert unequal(end_of(whole["vlm"]), end_of(tmp_path)) == []


def test_a_signal_while_the_model_alone_is_saved_is_answered_by_a_whole_checkpoint(parts, tmp_path):
    trainer = make_toy("vlm", parts, tmp_path, save_only_model=True)
    save = trainer._save_checkpoint

    def interrupted(*arguments: Any) -> None:
        save(*arguments)
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._save_checkpoint = interrupted  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        trainer.train()
    assert [fault_of(path) is None for path in checkpoints(tmp_path)] == [False, True]
    assert checkpoints(tmp_path)[-1].name == "checkpoint-3"


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["vlm", "encoder"])
def test_two_processes_resume_within_the_second_epoch_bit_for_bit(stage, parts, tmp_path):
    options = {"per_device_train_batch_size": 8, "save_total_limit": None}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_processes(in_two, 2, tmp_path, stage, parts, whole, None, options)
    names = {path.name for path in (whole / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", RECORD} <= names
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    run_processes(in_two, 2, tmp_path, stage, parts, resumed, "newest", options)
    assert unequal(end_of(whole), end_of(resumed)) == []
    # A mistake is told by all processes, none of which waits for another one.
    answers = run_processes(in_two, 2, tmp_path, stage, parts, resumed, None, options)
    assert all("holds checkpoint-10 of an earlier run" in answer for answer in answers)


def in_two(stage: str, parts: Path, folder: Path, resume: str | None, options: dict[str, Any]) -> str:
    try:
        train_toy(stage, parts, folder, resume, **options)
    except UserError as error:
        return str(error)
    return ""


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(parts, tmp_path):
    answers = run_processes(stopped_in_two, 2, tmp_path, parts, tmp_path / "run")
    assert answers == [3, 3]
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"
    assert fault_of(tmp_path / "run" / "checkpoint-3") is None


def stopped_in_two(parts: Path, folder: Path) -> int:
    trainer = make_toy("vlm", parts, folder, per_device_train_batch_size=8)
    if trainer.args.process_index == 1:
        trainer.add_callback(SendSignal(signal.SIGTERM, 3))
    with pytest.raises(SystemExit):
        trainer.train()
    return trainer.state.global_step
