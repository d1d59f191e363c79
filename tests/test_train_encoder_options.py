"""What an encoder is compared with: other labelled images, and people; and the command."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import TOY_IMAGES

from sigphi.train import evaluation
from sigphi.train.data import distinct_images, load_cifar10_qa
from sigphi.train.data_build import build_csv
from sigphi.train.encoder_evaluation import class_embeddings, embed_images, evaluate_encoder
from sigphi.train.encoder_options import EncoderEvaluationArguments, encoder_options, probe_images, read_human_labels
from sigphi.train.errors import UserError
from sigphi.train.images import decode_images, load_images
from sigphi.train.metrics import human_agreement


def pixels(images: datasets.Dataset) -> list[bytes]:
    return [np.asarray(picture).tobytes() for picture in images["img"]]


def test_probe_images_are_none_of_those_evaluated(toy_dataset):
    evaluated = set(toy_dataset["dataset_index"])
    everything = load_images(TOY_IMAGES, "train")
    rest = probe_images(TOY_IMAGES, "train", 1000, toy_dataset)
    expected = [row for row in range(200) if row not in evaluated]
    assert pixels(rest) == pixels(everything.select(expected))
    assert rest["label"][:] == everything.select(expected)["label"][:]
    # The same indices of another split are other images.
    other_split = toy_dataset.map(lambda row: {"split": "test"}, load_from_cache_file=False)
    assert len(probe_images(TOY_IMAGES, "train", 1000, other_split)) == 200


def test_the_draw_is_decided_by_its_seed(toy_dataset):
    first, again, other = (pixels(probe_images(TOY_IMAGES, "train", 30, toy_dataset, seed)) for seed in (0, 0, 1))
    assert len(set(first)) == 30
    assert first == again != other


def test_probe_mistakes_name_option_and_remedy(toy_dataset):
    with pytest.raises(UserError, match=r"--probe-images synthetic --probe-split val: .*--probe-split one of train"):
        probe_images("synthetic", "val", 10, toy_dataset)
    with pytest.raises(UserError, match=r"(?s)--probe-images .*/none .*\n--probe-size 0 does without"):
        probe_images("/nowhere/none", "train", 10, toy_dataset)
    with pytest.raises(UserError, match="all its images are evaluated; give another split, or --probe-size 0"):
        probe_images("synthetic:20", "train", 10, toy_dataset)
    with pytest.raises(UserError, match="--probe-size has to be at least 0, got -1"):
        EncoderEvaluationArguments(probe_size=-1)


def test_options_become_arguments(toy_dataset):
    options = encoder_options(EncoderEvaluationArguments(probe_size=12), toy_dataset, TOY_IMAGES)
    assert len(options["probe"]) == 12
    assert options["notes"] == {"probe": f"{TOY_IMAGES}, split train"}
    assert encoder_options(EncoderEvaluationArguments(probe_size=0), toy_dataset, TOY_IMAGES) == {"notes": {}}


# Human labels --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def csv_of_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about the first 30 test pictures of `TOY_IMAGES`."""
    path = tmp_path_factory.mktemp("human") / "test.csv"
    build_csv(path, TOY_IMAGES, "test", num_images=30)
    return path


@pytest.fixture(scope="module")
def rows_of_test(csv_of_test: Path) -> datasets.Dataset:
    """The questions of `csv_of_test`, the last image first."""
    rows = load_cifar10_qa(csv_of_test, TOY_IMAGES, eval_fraction=1.0)["eval"]
    return rows.select(range(len(rows) - 1, -1, -1))


@pytest.fixture(scope="module")
def human_table() -> pd.DataFrame:
    """Labels for all test pictures, most of them right."""
    labels = load_images(TOY_IMAGES, "test")["label"][:]
    counts = np.random.default_rng(0).integers(0, 5, (len(labels), 10))
    counts[range(len(labels)), labels] += 20
    return pd.DataFrame({"label": np.array(labels, dtype=np.int8), "human_counts": list(counts.astype(np.int16))})


def test_human_labels_are_joined_by_index(tiny_encoder, tiny_encoder_processor, rows_of_test, human_table, tmp_path):
    human_table.to_parquet(tmp_path / "people.parquet")
    counts = read_human_labels(str(tmp_path / "people.parquet"), rows_of_test)
    assert counts.tolist() == [human_table["human_counts"][index].tolist() for index in range(29, -1, -1)]
    images, _ = distinct_images(rows_of_test)
    assert counts.argmax(1).tolist() == images["label"][:]

    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, rows_of_test, human_counts=counts)
    embeds = embed_images(tiny_encoder, tiny_encoder_processor, decode_images(images, range(30)), 64)
    logits = tiny_encoder.logit_scale.exp() * embeds @ class_embeddings(tiny_encoder, tiny_encoder_processor).t()
    expected = human_agreement(logits.log_softmax(1).detach(), counts)
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    # Their majority is the true label here.
    assert results["human_top1"] == pytest.approx(results["zero_shot_top1"])
    assert results["majority/human"] == pytest.approx(results["majority/zero_shot"])


def with_value(table: pd.DataFrame, column: str, row: int, value: object) -> pd.DataFrame:
    table = table.copy()
    table[column] = [value if position == row else old for position, old in enumerate(table[column])]
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: with_value(table, "label", 7, 10),
            r"row 7: the label is 10, but that of test image 7 is \d \(",
        ),
        (lambda table: table.iloc[::-1], r"row \d+: the label is \d, but that of test image \d+ is \d \("),
        (lambda table: table.head(12), "row 29: the label is missing"),
        (lambda table: table.drop(columns="human_counts"), "cannot be read .*human_counts"),
        (lambda table: with_value(table, "human_counts", 3, [1] * 9), "columns label and human_counts"),
        (lambda table: table.assign(human_counts=[[1, 2]] * len(table)), "hold 10 numbers in each row"),
        (lambda table: with_value(table, "human_counts", 3, [0] * 10), r"row 3: .*at least one in all"),
        (lambda table: with_value(table, "human_counts", 4, [-1, *[2] * 9]), r"row 4: human_counts is \[-1"),
        (lambda table: table.assign(human_counts="cat"), "cannot be read|hold 10 numbers"),
        (lambda table: table.head(0), "hold 10 numbers in each row"),
    ],
)
def test_a_file_of_human_labels_that_does_not_fit_is_a_user_error(
    change, message, human_table, rows_of_test, tmp_path
):
    path = tmp_path / "people.parquet"
    change(human_table).to_parquet(path)
    with pytest.raises(UserError, match=rf"--human-labels {path}.*{message}"):
        read_human_labels(str(path), rows_of_test)


def test_human_labels_are_for_test_images_alone(human_table, toy_dataset, rows_of_test, tmp_path):
    path = tmp_path / "people.parquet"
    human_table.to_parquet(path)
    both = datasets.concatenate_datasets([rows_of_test, toy_dataset])
    index = toy_dataset["dataset_index"][0]
    with pytest.raises(UserError, match=f"is about the test split, but image {index} of split train"):
        read_human_labels(str(path), both)
    with pytest.raises(UserError, match="--human-labels .*none.parquet: there is no such file"):
        read_human_labels(str(tmp_path / "none.parquet"), rows_of_test)
    (tmp_path / "text.parquet").write_text("label,human_counts")
    with pytest.raises(UserError, match="--human-labels .*text.parquet cannot be read"):
        read_human_labels(str(tmp_path / "text.parquet"), rows_of_test)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder_folder(tiny_encoder, tiny_encoder_processor, tmp_path) -> Path:
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    tiny_encoder_processor.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_command_measures_everything_and_its_card_tells(
    encoder_folder, csv_of_test, human_table, tmp_path, capsys
):
    people = str(tmp_path / "people.parquet")
    human_table.to_parquet(people)
    argv = [str(encoder_folder), "--input-csv", str(csv_of_test), "--images", TOY_IMAGES, "--human-labels", people]
    evaluation.main([*argv, "--probe-images", "synthetic:90", "--probe-size", "40"])
    results = json.loads((encoder_folder / "eval_results.json").read_text())
    assert results["probe_count"] == 40
    assert results["metadata"]["probe"] == "synthetic:90, split train"
    assert results["metadata"]["human_labels"] == people
    out = capsys.readouterr().out
    for name in ("knn_top1", "linear_probe_top1", "ece", "human_top1", "human_cross_entropy"):
        assert f"{name} " in out and math.isfinite(results[name])
    card = (encoder_folder / "README.md").read_text()
    assert "Over 30 images of split `test`." in card
    assert "40 labelled images of `synthetic:90`, `split train`, none of which is evaluated" in card
    assert "labels that people gave" in card
    scores = json.loads((encoder_folder / "confusion_matrix.json").read_text())["per_class"]["cat"]
    precision = "-" if scores["precision"] is None else f"{scores['precision']:.3f}"
    assert f"| `cat` | {precision} | {scores['recall']:.3f} |" in card
    assert "](confusion_matrix.png)" in card and (encoder_folder / "confusion_matrix.png").exists()
    assert "recall/cat" not in card


@pytest.mark.parametrize("option", ["--probe-size=0", "--human-labels=people.parquet", "--probe-split=test"])
def test_a_vlm_takes_no_options_of_an_encoder(option, tiny_vlm, tiny_vlm_processor, toy_csv, tmp_path):
    tiny_vlm.save_pretrained(tmp_path / "vlm")
    tiny_vlm_processor.save_pretrained(tmp_path / "vlm")
    argv = [str(tmp_path / "vlm"), "--input-csv", str(toy_csv), "--images", TOY_IMAGES, option]
    with pytest.raises(UserError, match="are for encoders, and .*vlm is none; leave them out"):
        evaluation.main(argv)


def test_a_csv_of_one_image_is_evaluated(encoder_folder, toy_csv):
    argv = [str(encoder_folder), "--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--max-images", "1"]
    evaluation.main([*argv, "--probe-size", "1"])
    results = json.loads((encoder_folder / "eval_results.json").read_text())
    assert results["zero_shot_top1"] in (0, 1) and results["probe_count"] == 1
    assert all(math.isfinite(value) for name, value in results.items() if name != "metadata")
