"""An encoder trained, planned and evaluated on images and texts of any set."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch

from sigphi.train import evaluation, plan, siglip
from sigphi.train.arguments import EncoderDataArguments
from sigphi.train.encoder_data import load_encoder_data
from sigphi.train.errors import UserError
from sigphi.train.images import load_images
from sigphi.train.records import write_training_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn pictures with two texts each, as others publish such sets. Read only."""
    folder = tmp_path_factory.mktemp("captions")
    images = load_images("synthetic:60", "train")
    names = images.features["label"].names
    texts = [[f"A {names[label]}.", f"It is a {names[label]}, number {n}."] for n, label in enumerate(images["label"])]
    set_ = datasets.Dataset.from_dict({"caption": texts})
    pictures = images.select_columns(["img"]).rename_column("img", "jpg")
    datasets.concatenate_datasets([pictures, set_], axis=1).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def words(captions, toy_base, tmp_path) -> list[str]:
    tower = ["--layer-type", "basic", "--embedding-size", "8", "--hidden-sizes", "8", "16", "--depths", "1", "1"]
    run = ["--max-steps", "2", "--eval-strategy", "steps", "--eval-steps", "1", "--logging-steps", "1"]
    run += ["--batch-size", "16", "--save-strategy", "no", "--use-cpu", "true", "--report-to", "none"]
    return [*source(captions), "--eval-fraction", "0.3", "--text-model", str(toy_base), *tower, *run]


def source(captions: Path) -> list[str]:
    return ["--dataset", str(captions), "--image-column", "jpg", "--text-column", "caption"]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def losses(folder: Path) -> list[float]:
    return [entry[key] for entry in read(folder, "log_history.json") for key in ("loss", "eval_loss") if key in entry]


def test_a_set_is_trained_on_and_scored_by_its_held_out_images(words, captions, tmp_path, capsys):
    folder = tmp_path / "out"
    siglip.main([*words, "--output-dir", str(folder)])
    capsys.readouterr()
    results, facts = read(folder, "eval_results.json"), read(folder, "training_data.json")
    held_out = results["metadata"]["images"]
    assert 5 <= held_out <= 30 and facts["num_images"] == 60 - held_out
    assert facts["dataset"] == str(captions) and facts["num_texts"] == 2 * facts["num_images"]
    assert results["retrieval_images"] == held_out and "zero_shot_top1" not in results
    assert 0 <= results["image_to_text_r1"] <= results["image_to_text_r5"] <= results["image_to_text_r10"] <= 1
    assert len(losses(folder)) == 4 and all(loss > 0 for loss in losses(folder))
    # On the same split the images that it was trained on are left out.
    evaluation.main([str(folder), *source(captions)])
    assert read(folder, "eval_results.json")["image_to_text_r1"] == results["image_to_text_r1"]
    assert read(folder, "eval_results.json")["metadata"]["images"] == held_out


def test_images_in_memory_and_on_disk_train_alike(words, tmp_path):
    siglip.main([*words, "--output-dir", str(tmp_path / "memory")])
    siglip.main([*words, "--output-dir", str(tmp_path / "arrow"), "--image-store", "arrow"])
    assert losses(tmp_path / "memory") == losses(tmp_path / "arrow")


def test_a_set_larger_than_memory_is_refused_with_the_remedy(captions, image_processor, monkeypatch):
    arguments = EncoderDataArguments(dataset=str(captions), image_column="jpg", text_column="caption")
    memory = psutil.virtual_memory()._replace(available=60 * 3 * 32 * 32 - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match="60 images of 32x32 pixels take .*--image-store arrow"):
        load_encoder_data(arguments, image_processor)
    arguments.image_store = "arrow"
    images = load_encoder_data(arguments, image_processor).images
    assert images[torch.tensor([59, 0])].shape == (2, 3, 32, 32)


def test_a_training_on_a_set_is_planned(words, tmp_path, capsys):
    plan.main(["siglip", *words, "--output-dir", str(tmp_path / "out"), "--tflops", "0.1"])
    printed = capsys.readouterr().out
    assert "60 images in all" in printed and "decoded images" in printed and "It fits." in printed
    plan.main(["siglip", *words, "--output-dir", str(tmp_path / "out"), "--tflops", "0.1", "--image-store", "arrow"])
    assert "decoded images" not in capsys.readouterr().out


def test_what_a_set_cannot_be_used_for_is_refused(words, captions, tmp_path):
    folder = tmp_path / "out"
    siglip.main([*words, "--output-dir", str(folder), "--eval-fraction", "0", "--eval-strategy", "no"])
    with pytest.raises(UserError, match="was trained on all images of this split"):
        evaluation.main([str(folder), *source(captions)])
    with pytest.raises(UserError, match="--probe-... and --human-labels .* leave them out"):
        evaluation.main([str(folder), *source(captions), "--probe-size", "5"])


def test_the_folder_is_one_run_s_until_what_belongs_to_the_model_is_there(words, tmp_path, monkeypatch):
    folder, told = tmp_path / "out", []

    def write_and_look(*arguments: Any, **options: Any) -> None:
        write_training_data(*arguments, **options)
        assert (folder / "model.safetensors").exists()
        with ThreadPoolExecutor(1) as another:
            told.append(str(another.submit(siglip.main, [*words, "--output-dir", str(folder)]).exception()))

    monkeypatch.setattr(siglip, "write_training_data", write_and_look)
    siglip.main([*words, "--output-dir", str(folder)])
    assert told == [f"--output-dir {folder}: another run is writing there. Wait for it, or name another folder."]
    assert read(folder, "eval_results.json") and not (folder / "_unfinished").exists()
