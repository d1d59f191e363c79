"""Trainings that SIGKILL ends at random moments, and in the middle of saving: minutes long."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes  # noqa: F401  (the fork server has the imports ready)
import pytest
import torch
from toy_runs import STAGES, end_of, make_toy, unequal, write_parts
from transformers import TrainerCallback

from sigphi.train.checkpoint_files import checkpoints, fault_of

SAVE_STEPS, STEPS, RANDOM_KILLS, KILLS_WHILE_SAVING = 3, 42, 30, 20


@pytest.fixture(scope="module")
def parts(shared: Any, make_vlm: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts") / "parts.pt", shared, make_vlm, base_folder)


class Journal(TrainerCallback):
    """Writes each step into a file as it ends; another process reads it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, line: str) -> None:
        os.write(self.descriptor, f"{line}\n".encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(str(state.global_step))


def live(stage: str, parts: Path, folder: Path) -> None:
    """One life of a training, from wherever the last one has come."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer = make_toy(stage, parts, folder, max_steps=STEPS, save_steps=SAVE_STEPS)
    journal = Journal(folder.with_suffix(".journal"))
    trainer.add_callback(journal)
    save = trainer._save_checkpoint

    def noted(*arguments: Any) -> None:
        journal.note("save")
        save(*arguments)
        journal.note("saved")

    trainer._save_checkpoint = noted  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint="newest")
    trainer.save_model()


def start(stage: str, parts: Path, folder: Path) -> Any:
    process = multiprocessing.get_context("forkserver").Process(target=live, args=(stage, parts, folder))
    process.start()
    return process


def lines(folder: Path) -> list[str]:
    path = folder.with_suffix(".journal")
    return path.read_text().splitlines() if path.exists() else []


def wait_for(process: Any, is_so: Callable[[], bool]) -> None:
    """Until something is so, or the process has ended."""
    while process.is_alive() and not is_so():
        time.sleep(0.0005)


def unbroken(stage: str, parts: Path, folder: Path) -> tuple[dict[str, Any], float, float]:
    """The end of a training that is never stopped, its seconds, and those of a save."""
    process = start(stage, parts, folder)
    wait_for(process, lambda: "begin" in lines(folder))
    begun, saves = time.perf_counter(), []
    while process.is_alive():
        wait_for(process, lambda: lines(folder)[-1] == "save")
        at = time.perf_counter()
        wait_for(process, lambda: lines(folder)[-1] != "save")
        saves.append(time.perf_counter() - at)
    process.join()
    assert process.exitcode == 0
    return end_of(folder, STEPS), time.perf_counter() - begun, sorted(saves)[len(saves) // 2]


def check_life(folder: Path, seen: int) -> None:
    """No checkpoint is broken; and of the steps before, at most those of one save interval were made again."""
    assert [path.name for path in checkpoints(folder) if fault_of(path) is not None] == []
    before = [int(line) for line in lines(folder)[:seen] if line.isdecimal()]
    after = [int(line) for line in lines(folder)[seen:] if line.isdecimal()]
    if before and after:
        assert 0 <= before[-1] + 1 - after[0] <= SAVE_STEPS, (before[-1], after[0])


def kill_until(
    stage: str, parts: Path, root: Path, kills: int, moment: Callable[[Any, Path, int], None]
) -> tuple[int, int, list[Path]]:
    """
    Live, die at `moment`, and live again, through as many whole runs as it takes.

    Returns:
        `tuple`: the kills, how many of them came while a checkpoint was being written, and the folders of the runs.
    """
    killed, while_saving, folders = 0, 0, [root / "run-0"]
    while True:
        folder, seen = folders[-1], len(lines(folders[-1]))
        process = start(stage, parts, folder)
        if killed < kills:
            moment(process, folder, seen)
            process.kill()
        process.join()
        check_life(folder, seen)
        if process.exitcode == 0:
            if killed == kills:
                return killed, while_saving, folders
            folders.append(root / f"run-{len(folders)}")
            continue
        assert process.exitcode == -9, process.exitcode
        killed += 1
        while_saving += lines(folder)[-1:] == ["save"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_thirty_kills_at_random_moments_change_no_bit(stage, parts, tmp_path, capsys):
    expected, seconds, _ = unbroken(stage, parts, tmp_path / "unbroken")
    draw = random.Random(stage)

    def moment(process: Any, folder: Path, seen: int) -> None:
        wait_for(process, lambda: "begin" in lines(folder)[seen:])
        time.sleep(draw.uniform(0, seconds / 3))

    killed, while_saving, folders = kill_until(stage, parts, tmp_path, RANDOM_KILLS, moment)
    with capsys.disabled():
        print(f"\n{stage}: {killed} kills, {while_saving} while saving, {len(folders)} runs")  # noqa: T201
    assert killed == RANDOM_KILLS
    for folder in folders:
        assert unequal(expected, end_of(folder, STEPS)) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills_while_saving_leave_a_checkpoint_to_go_on_from(stage, parts, tmp_path, capsys):
    expected, _, seconds = unbroken(stage, parts, tmp_path / "unbroken")
    draw = random.Random(stage)

    def moment(process: Any, folder: Path, seen: int) -> None:
        """While the second save of a life is under way, so that each life comes further."""
        wait_for(process, lambda: lines(folder)[seen:].count("save") == 2)
        time.sleep(draw.uniform(0, 0.8 * seconds))

    # A kill that came too late for its save does not count.
    wanted, killed, while_saving, folders = KILLS_WHILE_SAVING, 0, 0, []
    while while_saving < wanted:
        root = tmp_path / f"round-{len(folders)}"
        root.mkdir()
        more, hits, runs = kill_until(stage, parts, root, wanted - while_saving, moment)
        killed, while_saving, folders = killed + more, while_saving + hits, folders + runs
    with capsys.disabled():
        print(f"\n{stage}: {killed} kills, {while_saving} while saving, {len(folders)} runs")  # noqa: T201
    for folder in folders:
        assert unequal(expected, end_of(folder, STEPS)) == []
