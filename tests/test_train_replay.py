"""The first number that is none ends a training; its step is kept, told of, and run again bit for bit."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_runs import make_toy, write_parts
from transformers import TrainerCallback

from sigphi import cli
from sigphi.train.errors import UserError
from sigphi.train.feature_cache import cached_features
from sigphi.train.nonfinite import NonFiniteError, all_finite
from sigphi.train.replay import replay_step
from sigphi.train.replay_file import FOLDER, Replay, read_replay, write_replay
from sigphi.train.resumable import ResumableTrainer

BROKEN = 33  # the row whose image is no number


@pytest.fixture(scope="module")
def parts(shared: Any, make_vlm: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts") / "parts.pt", shared, make_vlm, base_folder)


@pytest.fixture
def make(parts: Path, tmp_path: Path) -> Callable[..., ResumableTrainer]:
    """`make(stage, **options)`: a trainer that saves no checkpoints."""

    def make(stage: str = "vlm", **options: Any) -> ResumableTrainer:
        return make_toy(stage, parts, tmp_path, **{"save_strategy": "no", "eval_strategy": "no", **options})

    return make


class Watch(TrainerCallback):
    """The trained weights behind each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = kwargs["model"].named_parameters()
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in trained if p.requires_grad}


def stopped(trainer: ResumableTrainer) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    return error.value


def kept(trainer: ResumableTrainer) -> Path:
    (path,) = Path(trainer.args.output_dir, FOLDER).iterdir()
    return path


# The step ------------------------------------------------------------------------------------------------------------

ACCUMULATED = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


def plant(trainer: ResumableTrainer) -> None:
    """An image that is no number, of one row alone."""
    trainer.data_collator.image_features[BROKEN, 0, 3] = math.nan


def step_of_row(trainer: ResumableTrainer) -> tuple[int, int]:
    """The step, from 1, and the batch in it of `BROKEN`, by looking at what a training without NaN is given."""
    steps = []
    wanted = trainer.data_collator.image_features[BROKEN]

    def listen(*arguments: Any) -> Any:
        batches, num_items = ResumableTrainer.get_batch_samples(trainer, *arguments)
        steps.append([bool((batch["image_features"] == wanted).all((1, 2)).any()) for batch in batches])
        return batches, num_items

    trainer.get_batch_samples = listen  # type: ignore[method-assign]
    trainer.train()
    step = next(number for number, batches in enumerate(steps, 1) if any(batches))
    return step, steps[step - 1].index(True)


def test_a_planted_nan_stops_its_step_and_is_reproduced_bit_for_bit(make):
    watch = Watch()
    clean = make(**ACCUMULATED, max_steps=4)
    clean.add_callback(watch)
    step, batch = step_of_row(clean)
    trainer = make(**ACCUMULATED, max_steps=4)
    plant(trainer)
    error = stopped(trainer)
    assert step > 1 and error.finding.step == step and trainer.state.global_step == step - 1
    path = kept(trainer)
    assert f"step {step}: the loss is " in str(error) and str(error).endswith(f"sigphi replay {path}")
    assert f"`image_features` of batch {batch} is no number in row" in str(error)
    # The weights are those before the step, in the trainer and in the file.
    replay = read_replay(path)
    statistics = replay.weights.keys() - watch.weights[step - 1].keys()
    assert all(".normalization.running_" in name for name in statistics)
    for name, tensor in watch.weights[step - 1].items():
        assert torch.equal(replay.weights[name], tensor), name
    rows = replay.about["rows"]
    assert [len(part) for part in rows] == [8, 8] and BROKEN in rows[batch] and BROKEN not in rows[1 - batch]
    assert replay.about["contents"][batch][rows[batch].index(BROKEN)]["image_index"] == BROKEN
    assert torch.isnan(error.finding.losses[batch]) and torch.isfinite(error.finding.losses[1 - batch])
    assert error.finding.is_repeatable
    # A trainer whose data are sound: the batch comes from the file.
    found = replay_step(make(), replay)
    assert found is not None and found.equals(error.finding) and found.cause == error.finding.cause
    # Dropout draws from the random numbers of the file, and so does the loss of the other batch.
    other = read_replay(path)
    other.step.random[0]["torch"] = torch.Generator().manual_seed(5).get_state()
    found = replay_step(make(), other)
    assert found is not None and not found.equals(error.finding)


def test_a_step_of_two_passes_is_reproduced(make):
    """With parts of its own random numbers, and augmentation by the epoch."""
    options = {"micro_batch_size": 5, "max_steps": 7, "color_jitter": 0.2}
    trainer = make("encoder", **options)

    class Plant(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                kwargs["model"].vision_model.projection.weight.data.fill_(3e38)

    trainer.add_callback(Plant())
    error = stopped(trainer)
    assert error.finding.step == 6 and "vision_model.projection is the first module" in str(error)
    replay = read_replay(kept(trainer))
    assert replay.about["epoch"] == 1.25 and len(replay.about["rows"][0]) == 16
    assert {"pairs/image_ids", "pixel_values"} <= {name.partition("/")[2] for name in batch_names(kept(trainer))}
    found = replay_step(make("encoder", **options), replay)
    assert found is not None and found.equals(error.finding)


def batch_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return [name.removeprefix("batches/") for name in file.keys() if name.startswith("batches/")]


def test_numbers_that_are_numbers_write_nothing(make):
    trainer = make(max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and not Path(trainer.args.output_dir, FOLDER).exists()


# Causes --------------------------------------------------------------------------------------------------------------


def projector(trainer: ResumableTrainer) -> Any:
    return trainer.model.model.multi_modal_projector


def break_weight(trainer: ResumableTrainer) -> None:
    projector(trainer).linear_1.weight.data[1, 2] = math.nan


def break_module(trainer: ResumableTrainer) -> None:
    projector(trainer).linear_2.weight.data.fill_(3e38)


def break_gradient(trainer: ResumableTrainer) -> None:
    projector(trainer).linear_1.bias.register_hook(lambda gradient: gradient * math.inf)


def break_norm(trainer: ResumableTrainer) -> None:
    projector(trainer).linear_1.bias.register_hook(lambda gradient: torch.full_like(gradient, 1e30))


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (break_weight, "the weight model.multi_modal_projector.linear_1.weight was no number before this step"),
        (break_module, "model.multi_modal_projector.linear_2 is the first module whose output is no number .*float32"),
        (break_gradient, "the gradient of model.multi_modal_projector.linear_1.bias is the first that is none"),
        (break_norm, "gradients that are numbers, too large for a norm"),
    ],
)
def test_the_likely_cause_is_named(harm, cause, make):
    # The Trainer computes the norm of the gradients whether it clips them or not.
    trainer = make(max_grad_norm=0.0 if harm is break_gradient else 1.0)
    harm(trainer)
    error = stopped(trainer)
    assert error.finding.step == 1 and error.finding.is_repeatable
    with pytest.raises(UserError, match=cause):
        raise error
    assert len(str(error).splitlines()) == 2


@pytest.mark.parametrize(
    ("losses", "grad_norm", "expected"),
    [
        ([1.0, 2.0], 3.0, True),
        ([1.0], None, True),
        ([1.0, math.nan], None, False),
        ([math.inf], 1.0, False),
        ([1.0], math.nan, False),
        ([1.0], -math.inf, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_finite(losses, grad_norm, expected, dtype):
    given = None if grad_norm is None else torch.tensor(grad_norm, dtype=dtype)
    assert all_finite([torch.tensor(loss, dtype=dtype) for loss in losses], given) == expected


# The commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def argv(toy_csv: Path, toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Both trainings, whose features of frozen towers lie in files that the tests can break."""
    folder = tmp_path_factory.mktemp("commands")
    common = f"--images {TOY_IMAGES} --input-csv {toy_csv} --eval-fraction 0 --eval-strategy no --save-strategy no"
    common += " --report-to none --disable-tqdm true --batch-size 12 --max-steps 4 --logging-steps 1"
    encoder = f"train-siglip {common} --text-model {toy_base} --text-cache-dir {folder}/texts --layer-type basic"
    encoder += " --embedding-size 8 --hidden-sizes 8 16 --depths 1 1 --projection-dim 32"
    vlm = f"train-vlm {common} --siglip-checkpoint {folder}/siglip --language-model {toy_base} --bf16 false"
    vlm += f" --image-cache-dir {folder}/images --lora-dropout 0.2 --eval-samples 0"
    cli.main([*encoder.split(), "--output-dir", f"{folder}/siglip"])
    return {"siglip": encoder.split(), "vlm": vlm.split()}


def test_a_nan_in_cached_features_stops_both_commands_and_is_replayed(argv, tmp_path, monkeypatch, capsys):
    for stage, words in argv.items():
        monkeypatch.setattr(f"sigphi.train.{'text_tower' if stage == 'siglip' else 'vlm'}.cached_features", broken)
        out = tmp_path / stage
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--output-dir", str(out)])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "features` of batch 0 is no number in row" in error and "Traceback" not in error
        assert not (out / "config.json").exists()
        monkeypatch.undo()
        (path,) = (out / FOLDER).iterdir()
        assert f"sigphi replay {path}" in error
        cli.main(["replay", str(path)])
        printed = capsys.readouterr().out
        assert "the same, bit for bit" in printed and "rows of the training data: " in printed
        assert "likely cause: `" in printed
    check_another_outcome(path, capsys)


def check_another_outcome(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of the VLM that comes out otherwise than its file says ends with exit code 1."""
    replay = read_replay(path)
    replay.finding.losses[0].fill_(1.0)
    assert "not the same, bit for bit" in replayed_otherwise(path, replay, capsys)
    for batch in replay.step.batches:
        batch["image_features"].nan_to_num_()
    assert "replayed: all numbers are numbers" in replayed_otherwise(path, replay, capsys)


def replayed_otherwise(path: Path, replay: Replay, capsys: pytest.CaptureFixture[str]) -> str:
    write_replay(path, replay)
    with pytest.raises(SystemExit) as stop:
        cli.main(["replay", str(path)])
    assert stop.value.code == 1
    return capsys.readouterr().out


def broken(*arguments: Any) -> torch.Tensor:
    """The features of the file, with every fourth row no number."""
    features = cached_features(*arguments).clone()
    features[::4] = math.nan
    return features


def test_what_cannot_be_replayed_is_said(make, tmp_path, monkeypatch, capsys):
    trainer = make()
    plant(trainer)
    stopped(trainer)
    path = kept(trainer)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"nothing")
    for words, message in (
        ([str(tmp_path / "none")], "none is no replay file"),
        ([str(other)], "other.safetensors is no replay file"),
        ([str(path)], "of a trainer made in Python"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["replay", *words])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main(["replay", str(path)])
    assert "is of a run of 1 processes, and 2 replay it" in capsys.readouterr().err


def test_a_file_that_lacks_something_is_no_replay_file(make, tmp_path):
    trainer = make()
    plant(trainer)
    stopped(trainer)
    path, other = kept(trainer), tmp_path / "other.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["sigphi_replay"])
    lacking = [{name: value for name, value in about.items() if name != absent} for absent in about]
    for some in (*lacking, {"format": 1}, about | {"plain": 3}, about | {"plain": []}, [], None, 1):
        save_file(tensors, other, metadata={"sigphi_replay": json.dumps(some)})
        with pytest.raises(UserError, match="other.safetensors is no replay file"):
            read_replay(other)
    del tensors["grad_norm"]
    save_file(tensors, other, metadata={"sigphi_replay": json.dumps(about)})
    with pytest.raises(UserError, match="other.safetensors is no replay file"):
        read_replay(other)
    save_file(tensors, other, metadata={"sigphi_replay": json.dumps(about | {"format": 2})})
    with pytest.raises(UserError, match="other.safetensors was written by another version"):
        read_replay(other)


def test_a_replay_file_holds_no_pickle_and_no_secret(make):
    trainer = make(hub_token="hf_secret")
    trainer.options = {"training": {}}
    plant(trainer)
    stopped(trainer)
    assert b"hf_secret" not in kept(trainer).read_bytes()
    with safe_open(kept(trainer), framework="pt") as file:
        assert json.loads(file.metadata()["sigphi_replay"])["format"] == 1
