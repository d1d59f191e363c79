"""The recipes of `sigphi train-siglip`, each run by the command at toy size."""

import json
from pathlib import Path

import pytest
from conftest import TOY_IMAGES
from transformers import ResNetConfig, ResNetModel

from sigphi import SiglipResNetModel
from sigphi.train import siglip

TOWER = ["--embedding-size", "8", "--hidden-sizes", "8", "16", "--depths", "1", "1"]


@pytest.fixture
def resnet(tmp_path: Path) -> str:
    """A ResNet as transformers saves it."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    return str(tmp_path / "resnet")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path.stem for path in siglip.RECIPES])
def test_a_recipe_trains_a_tiny_tower(recipe, resnet, toy_csv, toy_base, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    tower = ["--vision-model", resnet, "--image-size", "64"] if recipe == "resnet50-224-pretrained" else TOWER
    workers = [] if recipe == "cpu-small" else ["--dataloader-num-workers", "1"]
    folder = tmp_path / "out"
    siglip.main(
        ["--recipe", recipe, "--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--text-model", str(toy_base)]
        + ["--output-dir", str(folder), "--batch-size", "12", "--max-steps", "3", "--eval-fraction", "0.2"]
        + ["--torch-compile", "false", "--disable-tqdm", "true", *tower, *workers]
    )
    arguments = json.loads((folder / "training_args.json").read_text())
    assert arguments["bf16"] and arguments["ema_decay"] > 0 and arguments["per_device_train_batch_size"] == 12
    assert arguments["muon"] == (recipe != "resnet50-224-pretrained")
    assert 0 <= json.loads((folder / "eval_results.json").read_text())["zero_shot_top1"] <= 1
    vision = SiglipResNetModel.from_pretrained(folder).config.vision_config
    assert (vision.stem, vision.hidden_sizes) == ("imagenet" if "224" in recipe else "cifar", [8, 16])
