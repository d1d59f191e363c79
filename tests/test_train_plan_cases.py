"""The trainings that are planned, against the trainings that run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOY_IMAGES, Originals

from sigphi import SiglipResNetProcessor
from sigphi.train import siglip, vlm
from sigphi.train.arguments import (
    DataArguments,
    EncoderDataArguments,
    SiglipModelArguments,
    SiglipTrainingArguments,
    VlmModelArguments,
    VlmTrainingArguments,
)
from sigphi.train.collators import IGNORE_INDEX
from sigphi.train.encoder_evaluation import class_texts
from sigphi.train.errors import UserError
from sigphi.train.parser import parse_arguments
from sigphi.train.plan_cases import Case, SiglipCase, VlmCase, as_options, read_siglip_case, read_vlm_case

NO_CUDA = ["--use-cpu", "true", "--report-to", "none", "--bf16", "false", "--save-strategy", "no"]


@pytest.fixture(scope="module")
def encoder_folder(shared: Originals, toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    shared["encoder"].save_pretrained(folder)
    SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(folder)
    return folder


@pytest.fixture
def vlm_words(toy_csv, toy_base, encoder_folder, tmp_path) -> list[str]:
    files = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--output-dir", str(tmp_path / "out")]
    return [*files, "--siglip-checkpoint", str(encoder_folder), "--language-model", str(toy_base), *NO_CUDA]


@pytest.fixture
def siglip_words(toy_csv, toy_base, tmp_path) -> list[str]:
    files = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--output-dir", str(tmp_path / "out")]
    tower = ["--layer-type", "basic", "--embedding-size", "8", "--hidden-sizes", "8", "16", "--depths", "1", "1"]
    return [*files, "--text-model", str(toy_base), *tower, *NO_CUDA]


def vlm_case(words: list[str], *more: str) -> VlmCase:
    return read_vlm_case(
        *parse_arguments([VlmModelArguments, DataArguments, VlmTrainingArguments], [*words, *more], "")
    )


def siglip_case(words: list[str], *more: str) -> SiglipCase:
    types = [SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments]
    return read_siglip_case(*parse_arguments(types, [*words, *more], ""))


class Trained(Exception):
    """Ends a training when the Trainer stands."""


@pytest.fixture
def trainer_of(monkeypatch):
    """The Trainer of a command, as it is when training would begin."""

    def run(stage: Any, words: list[str]) -> Any:
        caught: list[Any] = []

        def stop(trainer: Any, *args: Any, **kwargs: Any) -> None:
            caught.append(trainer)
            raise Trained

        monkeypatch.setattr("transformers.Trainer.train", stop)
        with pytest.raises(Trained):
            stage.main(words)
        return caught[0]

    return run


def steps_of(trainer: Any) -> int:
    loader = trainer.get_train_dataloader()
    return trainer.set_initial_training_values(trainer.args, loader)[6]


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "16", "--batch-size", "7"],
        ["--bits", "16", "--num-epochs", "2.5", "--gradient-accumulation-steps", "3"],
    ],
)
def test_a_vlm_case_has_the_rows_and_steps_of_its_training(vlm_words, trainer_of, options):
    options = ["--bits", "16", "--packing", "off", *options]
    case, trainer = vlm_case(vlm_words, *options), trainer_of(vlm, [*vlm_words, *options])
    assert (case.num_train, case.num_eval) == (len(trainer.train_dataset), len(trainer.eval_dataset))
    assert case.steps == steps_of(trainer)
    batches = list(trainer.get_train_dataloader())
    assert len(case.batches) == len(batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert int(case.lengths[: case.num_train].sum()) == tokens
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    assert case.batch.length == longest
    supervised = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    assert int((case.lengths - case.prompts)[: case.num_train].sum()) == supervised
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    assert case.padding == pytest.approx(1 - tokens / padded, abs=0.1)  # another order of the rows
    assert case.caches_features == ("image_features" in batches[0])


def test_a_packed_vlm_case_has_the_batches_of_its_training(vlm_words, trainer_of):
    options = ["--bits", "16", "--tokens-per-batch", "400", "--tokens-per-row", "128", "--num-epochs", "2"]
    case, trainer = vlm_case(vlm_words, *options), trainer_of(vlm, [*vlm_words, *options])
    assert case.steps == steps_of(trainer)
    batches = list(trainer.get_train_dataloader())
    shapes = [(*batch["input_ids"].shape, len(batch["image_features"])) for batch in batches]
    assert [tuple(shape) for shape in case.shapes[:, :3].tolist()] == shapes
    assert max(rows * length for rows, length, _ in shapes) == case.batch.rows * case.batch.length <= 400
    assert case.batch.images == max(images for _, _, images in shapes)
    assert case.batch.supervised == max(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    real = sum(int((batch["segment_ids"] >= 0).sum()) for batch in batches)
    assert case.padding == pytest.approx(1 - real / sum(rows * length for rows, length, _ in shapes))
    halved = case.changed({"tokens_per_batch": 200})
    assert halved.batch.rows * halved.batch.length <= 200 and halved.steps > 1.7 * case.steps


def test_packed_batches_by_number_have_fewer_positions_than_padded_ones(vlm_words, trainer_of):
    options = ["--bits", "16", "--batch-size", "16"]
    padded = vlm_case(vlm_words, *options, "--packing", "off")
    case, trainer = vlm_case(vlm_words, *options), trainer_of(vlm, [*vlm_words, *options])
    assert case.steps == steps_of(trainer)
    assert case.packs and not padded.packs
    assert case.shapes[:, :2].prod(1).sum() < 0.9 * padded.shapes[:, :2].prod(1).sum()
    batches = list(trainer.get_train_dataloader())
    positions = sum(batch["input_ids"].numel() for batch in batches)
    assert case.shapes[:, :2].prod(1).sum() == pytest.approx(positions, rel=0.1)  # another order of the rows
    assert case.costs().flops < padded.costs().flops


def test_features_are_cached_as_the_options_say(vlm_words):
    assert vlm_case(vlm_words, "--image-cache", "on").caches_features
    assert not vlm_case(vlm_words, "--image-cache", "off").caches_features


def test_an_encoder_case_has_the_rows_and_steps_of_its_training(siglip_words, trainer_of):
    options = ["--batch-size", "16", "--num-epochs", "3"]
    case, trainer = siglip_case(siglip_words, *options), trainer_of(siglip, [*siglip_words, *options])
    assert (case.num_train, case.num_eval) == (len(trainer.train_dataset), len(trainer.eval_dataset))
    assert case.steps == steps_of(trainer)
    batches = list(trainer.get_train_dataloader())
    assert case.batch.images == max(len(batch["pixel_values"]) for batch in batches)
    # The texts of the classes, which evaluations need, may come on top.
    assert 0 <= len(trainer.data_collator.text_features) - case.num_features <= len(class_texts())
    seen = max(len(batch["text_features"]) for batch in batches)
    assert case.batch.texts == pytest.approx(seen, rel=0.2)  # another order of the rows
    assert 0.0 <= case.padding < 1.0


def test_without_a_cache_the_padding_is_that_of_the_batches(siglip_words):
    case = siglip_case(siglip_words, "--text-cache", "off", "--batch-size", "4")
    assert not case.caches_features
    naive = total = 0
    for images in case.batches:
        lengths = [int(case.lengths[text]) for text in {text for image in images for text in case.texts[image]}]
        naive += sum(max(lengths) - length for length in lengths)
        total += len(lengths) * max(lengths)
    assert case.padding == pytest.approx(naive / total)


def test_a_changed_case_leaves_the_first_as_it_is(vlm_words):
    case = vlm_case(vlm_words, "--bits", "16", "--batch-size", "8", "--packing", "off")
    changed = case.changed({"per_device_train_batch_size": 2, "bits": 4})
    assert (changed.training.per_device_train_batch_size, changed.model.bits) == (2, 4)
    assert (case.training.per_device_train_batch_size, case.model.bits) == (8, 16)
    assert len(changed.batches) > len(case.batches)
    assert changed.batch.rows == 2


@pytest.mark.parametrize("stage", ["vlm", "siglip"])
def test_each_remedy_is_an_option_of_the_command(vlm_words, siglip_words, stage):
    read, words, options = {
        "vlm": (vlm_case, vlm_words, ["--bits", "16", "--tuning", "full", "--gradient-checkpointing", "false"]),
        "siglip": (siglip_case, siglip_words, ["--train-text-tower", "true", "--text-cache", "off"]),
    }[stage]
    families = read(words, *options).remedies()
    assert len(families) >= 4
    for change in (change for family in families for change in family):
        again = read(words, *as_options(change).split())
        for name, value in change.items():
            holder = again.model if name in type(again.model).__dataclass_fields__ else again.training
            assert getattr(holder, name) == value


@pytest.mark.parametrize("family", range(4))
def test_each_change_of_a_family_saves_more_than_the_one_before(vlm_words, family):
    options = ["--bits", "16", "--tuning", "full", "--gradient-checkpointing", "false", "--bf16", "true"]
    case = vlm_case(vlm_words, *options)
    # Where weights are larger than activations, as they are in any model that does not fit.
    text = type(case.text).from_dict(case.text.to_dict() | {"hidden_size": 512, "intermediate_size": 2048})
    case = replace(case, text=text)
    needs = [_sum(one) for one in (case, *(case.changed(change) for change in case.remedies()[family]))]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > needs[-1]


def _sum(case: Case) -> float:
    """Of all moments: a change may help at one that is not the highest."""
    return sum(sum(kinds.values()) for kinds in case.costs().moments.values())


def test_options_are_written_as_a_user_types_them():
    changes = {
        "per_device_train_batch_size": 4,
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    assert as_options(changes) == "--batch-size 4 --bf16 true --gradient-checkpointing true"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--language-model", "nowhere/at-all"], "--language-model nowhere/at-all"),
        (["--siglip-checkpoint", "nowhere/at-all"], "--siglip-checkpoint nowhere/at-all"),
    ],
)
def test_what_the_training_refuses_is_refused(vlm_words, words, match):
    with pytest.raises(UserError, match=match):
        vlm_case(vlm_words, *words)


def test_no_weights_are_read(vlm_words, siglip_words, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    for target in ("safetensors.torch.load_file", "transformers.PreTrainedModel.from_pretrained"):
        monkeypatch.setattr(target, refuse)
    assert vlm_case(vlm_words).costs().trained > 0
    assert siglip_case(siglip_words).costs().trained > 0
    assert np.all(vlm_case(vlm_words).lengths > 0)
