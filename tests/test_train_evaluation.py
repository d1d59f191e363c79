"""Which rows count, and the command."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from conftest import TOY_IMAGES

from sigphi.train import evaluation
from sigphi.train.data import data_facts, held_out, load_cifar10_qa
from sigphi.train.encoder_evaluation import evaluate_encoder
from sigphi.train.errors import UserError
from sigphi.train.evaluation import evaluate_folder, only_unseen, results_table
from sigphi.train.vlm_evaluation import evaluate_vlm


def record(folder: Path, train: datasets.Dataset, fraction: float, seed: int) -> None:
    facts = data_facts(train) | {"eval_fraction": fraction, "split_seed": seed}
    (folder / "training_data.json").write_text(json.dumps(facts))


def test_images_of_training_are_left_out(toy_csv, tmp_path, caplog):
    data = load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=0.3, seed=5)
    record(tmp_path, data["train"], 0.3, 5)
    everything = load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=1.0)["eval"]
    kept = only_unseen(everything, str(tmp_path))
    assert kept["dataset_index"][:] == data["eval"]["dataset_index"][:]
    assert all(held_out(index, "train", 0.3, 5) for index in kept["dataset_index"])
    assert not set(kept["dataset_index"]) & set(data["train"]["dataset_index"])
    assert f"{len(everything) - len(kept)} of {len(everything)} rows" in caplog.text


def test_images_of_another_split_are_all_unseen(toy_dataset, tmp_path):
    record(tmp_path, toy_dataset.map(lambda row: {"split": "test"}, load_from_cache_file=False), 0.0, 0)
    assert only_unseen(toy_dataset, str(tmp_path))["question"][:] == toy_dataset["question"][:]


def test_nothing_left_is_an_error_that_names_the_model(toy_dataset, tmp_path):
    record(tmp_path, toy_dataset, 0.0, 0)
    with pytest.raises(UserError, match=rf"{tmp_path.name} was trained on all images .*\['train'\].*another|other"):
        only_unseen(toy_dataset, str(tmp_path))


def test_a_model_without_a_record_is_evaluated_with_a_warning(toy_dataset, tmp_path, caplog):
    assert len(only_unseen(toy_dataset, str(tmp_path))) == len(toy_dataset)
    assert "does not record what it was trained on" in caplog.text


def test_a_record_that_was_cut_off_is_named(toy_dataset, tmp_path):
    record(tmp_path, toy_dataset, 0.3, 5)
    path = tmp_path / "training_data.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=f"{path} is not the JSON that it should be; .*Put a whole copy there"):
        only_unseen(toy_dataset, str(tmp_path))


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def vlm_folder(tiny_vlm, tiny_vlm_processor, tmp_path) -> Path:
    tiny_vlm.save_pretrained(tmp_path / "vlm")
    tiny_vlm_processor.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


def test_the_command_writes_results_and_card_and_prints_them(vlm_folder, toy_csv, capsys):
    argv = [str(vlm_folder), "--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--max-images", "20"]
    evaluation.main([*argv, "--max-new-tokens", "2"])
    results = json.loads((vlm_folder / "eval_results.json").read_text())
    assert (results["metadata"]["images"], results["metadata"]["rows"]) == (20, 100)
    assert capsys.readouterr().out == results_table(results)
    card = (vlm_folder / "README.md").read_text()
    assert f"| `eval_loss` | {results['eval_loss']:.4f} |" in card
    assert f"| `class_count` | {results['class_count']} |" in card and results["class_count"] == 20


def test_a_folder_gives_the_figures_of_the_model_in_memory(tiny_vlm, tiny_vlm_processor, vlm_folder, toy_dataset):
    expected = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset, max_new_tokens=3)
    results = evaluate_folder(str(vlm_folder), toy_dataset, max_new_tokens=3)
    results.pop("metadata")
    assert results == pytest.approx(expected, rel=1e-5)


def test_an_encoder_without_its_text_tower_is_evaluated_with_it(
    tiny_encoder, tiny_encoder_processor, base_folder, toy_dataset, tmp_path
):
    # The base holds the weights of a language model of the same shape.
    tiny_encoder.load_text_tower(str(base_folder))
    expected = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset)
    tiny_encoder.config.include_text_tower = False
    tiny_encoder.config.text_model_name_or_path = str(base_folder)
    tiny_encoder.save_pretrained(tmp_path)
    tiny_encoder_processor.save_pretrained(tmp_path)
    results = evaluate_folder(str(tmp_path), toy_dataset)
    results.pop("metadata")
    assert results == pytest.approx(expected)


def test_the_table_has_a_line_for_every_number():
    table = results_table({"loss": 1.25, "accuracy/object": 0.5, "count": 3, "metadata": {"rows": 1}})
    assert table == "loss             1.2500\naccuracy/object  0.5000\ncount            3\n"


@pytest.mark.parametrize("option", ["--batch-size", "--max-new-tokens", "--max-images"])
def test_numbers_below_one_are_refused(option, vlm_folder, toy_csv):
    with pytest.raises(UserError, match=f"{option} must be at least 1, got 0"):
        evaluation.main([str(vlm_folder), "--input-csv", str(toy_csv), option, "0"])


def test_answers_and_samples_lie_beside_the_results(vlm_folder, toy_dataset):
    results = evaluate_folder(str(vlm_folder), toy_dataset, max_new_tokens=3)
    table = pd.read_parquet(vlm_folder / "predictions.parquet")
    assert len(table) == len(toy_dataset)
    assert table["correct"].mean() == pytest.approx(results["answer_accuracy"])
    assert (vlm_folder / "eval_samples.md").exists() and (vlm_folder / "eval_samples.png").exists()
