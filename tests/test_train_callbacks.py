"""Whether the model looks at its image, asked while it trains."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import TOY_IMAGES
from transformers import TrainerControl, TrainerState

from sigphi import VlmTrainingArguments
from sigphi.train import vlm
from sigphi.train.answer_scores import MIN_IMAGE_GAIN, judged_rows
from sigphi.train.callbacks import LooksAtImageCallback, watched_figures, watched_rows
from sigphi.train.collators import VlmCollator
from sigphi.train.data import distinct_images
from sigphi.train.errors import UserError
from sigphi.train.images import decode_images
from sigphi.train.prompts import tokenized_rows
from sigphi.train.trainers import VlmTrainer
from sigphi.train.vlm_evaluation import encode_images


@pytest.fixture
def make_trainer(tiny_vlm_processor: Any, toy_dataset: datasets.Dataset, tmp_path: Path) -> Callable[..., VlmTrainer]:
    """`make_trainer(model, dataset, **arguments)`: a trainer on `dataset` that evaluates on it, too."""

    def make(model: Any, dataset: datasets.Dataset = toy_dataset, **values: Any) -> VlmTrainer:
        arguments: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "bf16": False, "max_steps": 6}
        arguments |= {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "eval_samples": 30}
        arguments |= {"logging_steps": 1, "gradient_checkpointing": False, "per_device_train_batch_size": 8}
        images, positions = distinct_images(dataset)
        features = encode_images(model, tiny_vlm_processor, decode_images(images, range(len(images))))
        rows = datasets.Dataset.from_list(tokenized_rows(tiny_vlm_processor, dataset, positions))
        return VlmTrainer(
            model=model,
            args=VlmTrainingArguments(output_dir=str(tmp_path), **arguments | values),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=VlmCollator(tiny_vlm_processor.tokenizer.pad_token_id, image_features=features),
            processing_class=tiny_vlm_processor,
        )

    return make


def watch(trainer: VlmTrainer, processor: Any, dataset: datasets.Dataset) -> LooksAtImageCallback:
    looks = LooksAtImageCallback(trainer, processor, watched_rows(dataset, trainer.args.eval_samples, 0))
    trainer.add_callback(looks)
    return looks


def logged(trainer: VlmTrainer) -> dict[int, float]:
    return {
        entry["step"]: entry["eval_image_gain"] for entry in trainer.state.log_history if "eval_image_gain" in entry
    }


# Real models ---------------------------------------------------------------------------------------------------------


def random_states() -> tuple[Any, Any, bytes]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().numpy().tobytes()


def test_watching_changes_nothing(make_trainer, make_lora_vlm, tiny_vlm_processor, toy_dataset):
    ends = []
    for is_watched in (False, True):
        model = make_lora_vlm()
        model.config.lora["lora_dropout"] = 0.2
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2  # so that a step depends on the random state
        trainer = make_trainer(model)
        if is_watched:
            watch(trainer, tiny_vlm_processor, toy_dataset)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((copy.deepcopy(model.state_dict()), losses, random_states()))
    assert list(logged(trainer)) == [2, 4, 6]
    (weights, *others), (watched_weights, *watched_others) = ends
    assert others == watched_others and len(others[0]) == 6
    assert weights.keys() == watched_weights.keys()
    assert all(torch.equal(tensor, watched_weights[name]) for name, tensor in weights.items())


def test_the_model_is_asked_in_evaluation_mode_and_left_in_its_own(
    make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset
):
    trainer = make_trainer(tiny_vlm)
    looks = watch(trainer, tiny_vlm_processor, toy_dataset)
    modes = []
    tiny_vlm.model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    for mode in (True, False):
        tiny_vlm.train(mode)
        before = {name: module.training for name, module in tiny_vlm.named_modules()}
        looks.measure()
        assert {name: module.training for name, module in tiny_vlm.named_modules()} == before
    assert modes and not any(modes)
    assert all(parameter.grad is None for parameter in tiny_vlm.parameters())


def blind(model: Any) -> Any:
    """The model with a projector that gives zeros and is not trained."""
    last = model.model.multi_modal_projector.linear_2
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    model.model.multi_modal_projector.requires_grad_(False)
    return model


def learn_objects(make_trainer: Any, model: Any, processor: Any, dataset: Any, **values: Any) -> Any:
    """Train `model` in full to name the object, long enough to know the few images by heart."""
    kinds = dataset["question_type"]
    objects = dataset.select([row for row, kind in enumerate(kinds) if kind == "object"])
    objects = objects.map(
        lambda row: {"question": "What is it?", "answer": row["short_answer"]}, load_from_cache_file=False
    )
    values = {"learning_rate": 3e-3, "max_steps": 60, "eval_steps": 20, "per_device_train_batch_size": 20} | values
    trainer = make_trainer(model, objects, **values)
    looks = watch(trainer, processor, objects)
    trainer.train()
    return trainer, looks


def test_a_model_that_looks_gains_and_nothing_is_said(make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset, caplog):
    trainer, looks = learn_objects(make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset, stop_if_blind=True)
    assert trainer.state.global_step == 60
    assert logged(trainer)[60] > 0.5
    assert not looks.is_blind and "does not look" not in caplog.text


def test_a_model_that_cannot_look_gains_nothing_and_is_warned_about(
    make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset, caplog
):
    trainer, looks = learn_objects(make_trainer, blind(tiny_vlm), tiny_vlm_processor, toy_dataset)
    assert trainer.state.global_step == 60
    assert list(logged(trainer)) == [20, 40, 60]
    assert all(abs(gain) <= 0.02 for gain in logged(trainer).values())
    assert looks.is_blind
    assert [record.getMessage()[:19] for record in caplog.records if "does not look" in record.getMessage()] == [
        "WARNING: at step 40",
        "WARNING: at step 60",
    ]


def test_training_stops_on_demand_when_the_model_does_not_look(
    make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset, caplog
):
    trainer, looks = learn_objects(make_trainer, blind(tiny_vlm), tiny_vlm_processor, toy_dataset, stop_if_blind=True)
    assert trainer.state.global_step == 40
    assert looks.is_blind
    assert caplog.text.count("does not look") == 1


# The rule ------------------------------------------------------------------------------------------------------------


def course(monkeypatch: pytest.MonkeyPatch, gains: list[float], stop: bool = False) -> tuple[list[int], int, bool]:
    """The steps of warnings, the last step and the verdict of a training that measures `gains`, one every 10 steps."""
    looks = LooksAtImageCallback.__new__(LooksAtImageCallback)
    looks.gains, looks.is_blind, looks.rows = [], False, [None]
    state, control = TrainerState(max_steps=10 * len(gains)), TrainerControl()
    arguments = SimpleNamespace(stop_if_blind=stop, load_best_model_at_end=False)

    def measure() -> dict[str, float]:
        looks.gains.append((state.global_step, gains[state.global_step // 10 - 1]))
        return {}

    warned = []
    monkeypatch.setattr(looks, "measure", measure)
    monkeypatch.setattr("sigphi.train.callbacks.logger.warning", lambda *_: warned.append(state.global_step))
    while state.global_step < state.max_steps and not control.should_training_stop:
        state.global_step += 10
        looks.on_evaluate(arguments, state, control, metrics={})
    looks.on_train_end(arguments, state, control)
    assert len(looks.gains) == state.global_step // 10
    return warned, state.global_step, looks.is_blind


@pytest.mark.parametrize(
    ("gains", "warned", "is_blind"),
    [
        ([0.0, 0.0, 0.0, 0.3, 0.3, 0.3], [20, 30], False),
        ([0.0, 0.0, 0.3, 0.0, 0.3, 0.0], [20, 60], True),
        ([0.0, 0.3, 0.0, 0.0, 0.0, 0.049], [40, 50, 60], True),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2], [30, 40, 50, 60], False),
        ([0.05, 0.05, 0.05], [], False),
        ([-0.2, -0.2, -0.2], [20, 30], True),
        ([0.0], [10], True),
    ],
)
def test_a_warning_needs_two_low_gains_behind_a_third_of_training_or_one_at_the_end(
    gains, warned, is_blind, monkeypatch
):
    assert MIN_IMAGE_GAIN == 0.05
    assert course(monkeypatch, gains) == (warned, 10 * len(gains), is_blind)


def test_a_stop_comes_with_the_first_warning_and_says_it_once(monkeypatch):
    assert course(monkeypatch, [0.0, 0.2, 0.01, 0.02, 0.3, 0.3], stop=True) == ([40], 40, True)
    assert course(monkeypatch, [0.2, 0.2, 0.01], stop=True) == ([30], 30, True)


def test_without_evaluations_the_end_is_measured(make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset):
    trainer = make_trainer(tiny_vlm, eval_strategy="no", max_steps=2)
    watch(trainer, tiny_vlm_processor, toy_dataset)
    trainer.train()
    assert list(logged(trainer)) == [2]


def test_the_figures_are_among_the_metrics_of_an_evaluation(make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset):
    trainer = make_trainer(tiny_vlm)
    watch(trainer, tiny_vlm_processor, toy_dataset)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in vlm.FIGURES} <= metrics.keys()
    assert trainer.state.log_history[-1]["eval_image_gain"] == metrics["eval_image_gain"]


def test_what_is_measured_is_known_before(make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset, monkeypatch):
    assert vlm.FIGURES == ("loss", *watched_figures(toy_dataset))
    others = [row for row, kind in enumerate(toy_dataset["question_type"]) if kind == "category"]
    trainer = make_trainer(tiny_vlm)
    for dataset in (toy_dataset, toy_dataset.select(others)):
        looks = LooksAtImageCallback(trainer, tiny_vlm_processor, dataset)
        monkeypatch.setattr(looks, "_answers", lambda looks=looks: ["?"] * 2 * len(looks.rows))
        assert [f"eval_{name}" for name in watched_figures(dataset)] == list(looks.measure())


def test_the_gain_is_that_of_the_answers(make_trainer, tiny_vlm, tiny_vlm_processor, toy_dataset, monkeypatch):
    trainer = make_trainer(tiny_vlm)
    looks = watch(trainer, tiny_vlm_processor, toy_dataset)
    # Right with the image for all rows but the first three, with another one for the last row alone.
    real = ["?"] * 3 + [row.answer for row in looks.rows[3:]]
    monkeypatch.setattr(looks, "_answers", lambda: real + ["?"] * (len(real) - 1) + [looks.rows[-1].answer])
    figures = looks.measure()
    assert figures["eval_image_gain"] == pytest.approx((len(real) - 4) / len(real))
    objects = [row.asks_object for row in looks.rows]
    assert figures["eval_class_accuracy"] == pytest.approx(sum(objects[3:]) / sum(objects))


# What is asked -------------------------------------------------------------------------------------------------------


def keys(dataset: datasets.Dataset) -> list[tuple[str, int]]:
    return list(zip(dataset["question"], dataset["dataset_index"], strict=True))


def test_half_of_the_watched_rows_ask_for_the_object_and_all_can_be_checked(toy_dataset):
    watched = watched_rows(toy_dataset, 24, 0)
    rows = judged_rows(watched)
    assert len(rows) == len(set(keys(watched))) == 24
    assert sum(row.asks_object for row in rows) == 12
    assert all(row.is_checkable and row.question_type != "refusal" for row in rows)
    assert keys(watched_rows(toy_dataset, 24, 0)) == keys(watched)
    assert keys(watched_rows(toy_dataset, 24, 1)) != keys(watched)
    everything = keys(toy_dataset)
    assert [everything.index(key) for key in keys(watched)] == sorted(everything.index(key) for key in keys(watched))


def test_a_side_that_lacks_rows_is_filled_from_the_other(toy_dataset):
    kinds = toy_dataset["question_type"][:]
    objects = toy_dataset.select([row for row, kind in enumerate(kinds) if kind == "object"])
    assert len(watched_rows(objects, 12, 0)) == 12
    few = toy_dataset.select([row for row, kind in enumerate(kinds) if kind != "object"] + [kinds.index("object")])
    assert len(watched_rows(few, 30, 0)) == 30
    assert len(watched_rows(toy_dataset, 10_000, 0)) == sum(
        row.is_checkable for row in judged_rows(toy_dataset)
    ) - sum(kind == "refusal" for kind in kinds)


def test_a_plain_set_is_watched_by_its_questions_for_the_object(toy_dataset):
    plain = toy_dataset.map(
        lambda row, number: {
            "question": "What is in this image?" if number % 5 == 0 else "Why?",
            "question_type": "",
            "short_answer": "",
        },
        with_indices=True,
        load_from_cache_file=False,
    )
    watched = watched_rows(plain, 12, 0)
    assert set(watched["question"]) == {"What is in this image?"} and len(watched) == 12


def test_images_of_one_class_are_not_watched(toy_dataset):
    labels = toy_dataset["label"]
    one = toy_dataset.select([row for row, label in enumerate(labels) if label == labels[0]])
    assert len(watched_rows(one, 12, 0)) == 0
    assert len(watched_rows(toy_dataset, 1, 0)) == 0


# The command ---------------------------------------------------------------------------------------------------------


def command(toy_csv: Path, toy_base: Path, encoder: Path, folder: Path, *options: str) -> list[str]:
    argv = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--language-model", str(toy_base), "--bf16", "false"]
    argv += ["--siglip-checkpoint", str(encoder), "--output-dir", str(folder), "--report-to", "none"]
    return [*argv, "--eval-fraction", "0.3", "--max-steps", "2", "--save-strategy", "no", *options]


@pytest.fixture
def encoder_folder(tiny_encoder: Any, tiny_encoder_processor: Any, tmp_path: Path) -> Path:
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    tiny_encoder_processor.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_blind_model_is_saved_before_the_command_fails(toy_csv, toy_base, encoder_folder, tmp_path):
    options = ["--stop-if-blind", "--learning-rate", "0", "--projector-learning-rate", "0", "--eval-samples", "8"]
    with pytest.raises(UserError) as error:
        vlm.main(command(toy_csv, toy_base, encoder_folder, tmp_path / "vlm", *options))
    message = str(error.value)
    assert message.count("\n") == 1 and "--stop-if-blind: at step 2 " in message and str(tmp_path / "vlm") in message
    files = {path.name for path in (tmp_path / "vlm").iterdir()}
    assert {"model.safetensors", "lora", "training_data.json", "log_history.json", "README.md"} <= files
    assert "eval_results.json" not in files
    history = json.loads((tmp_path / "vlm" / "log_history.json").read_text())
    assert sum("eval_image_gain" in entry for entry in history) == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--eval-samples", "-1"], ["--eval-samples", "-1"]),
        (["--stop-if-blind", "--eval-samples", "0"], ["--stop-if-blind", "--eval-samples"]),
        (
            ["--stop-if-blind", "--eval-fraction", "0", "--eval-strategy", "no"],
            ["--stop-if-blind", "--eval-fraction"],
        ),
    ],
)
def test_a_watch_that_cannot_be_kept_is_refused_before_anything_loads(
    options, parts, toy_csv, toy_base, encoder_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(vlm, "build_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError) as error:
        vlm.main(command(toy_csv, toy_base, encoder_folder, tmp_path / "vlm", *options))
    assert all(part in str(error.value) for part in parts)


def test_nothing_to_watch_is_said_and_nothing_is_asked(toy_csv, toy_base, encoder_folder, tmp_path, caplog):
    vlm.main(
        command(toy_csv, toy_base, encoder_folder, tmp_path / "vlm", "--eval-fraction", "0", "--eval-strategy", "no")
    )
    assert "not watched" in caplog.text
    assert "eval_image_gain" not in (tmp_path / "vlm" / "log_history.json").read_text()
