"""The recipes of both trainings, each run by its command at toy size."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TOY_IMAGES, Originals
from transformers import ResNetConfig, ResNetModel

from sigphi import SiglipResNetModel, SiglipResNetProcessor
from sigphi.configuration.configuration_siglip_resnet import SiglipResNetVisionConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetVisionModel
from sigphi.train import siglip, vlm
from sigphi.train.arguments import SiglipModelArguments

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


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
def test_a_tower_to_start_from_goes_on_as_it_was_trained(downsampling, toy_base, tmp_path):
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32}
    tower = SiglipResNetVisionModel(SiglipResNetVisionConfig(**shape, downsampling=downsampling)).eval()
    tower.save_pretrained(tmp_path / "tower")
    arguments = SiglipModelArguments(vision_model=str(tmp_path / "tower"), text_model=str(toy_base), stem="imagenet")
    model = siglip.build_encoder(arguments, siglip.encoder_config(arguments)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.vision_model(pixels).pooler_output, tower(pixels).pooler_output)


@pytest.mark.parametrize("recipe", vlm.RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_of_the_vlm_needs_is_beside_it(recipe):
    found = json.loads(recipe.with_suffix(".json").read_text())
    assert found["fits"] and 0 < found.get("measured_bytes", found["estimated_bytes"]) < 0.9 * found["limit_bytes"]
    assert found["estimated_bytes"] == sum(found["bytes_at_that_moment"].values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path.stem for path in vlm.RECIPES])
def test_a_recipe_trains_a_tiny_vlm(recipe, shared: Originals, toy_csv, toy_base, tmp_path):
    encoder = shared["encoder"]
    encoder.config.include_text_tower = False
    encoder.save_pretrained(tmp_path / "encoder")
    SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(tmp_path / "encoder")
    # The optimizer of the smallest is for CUDA alone.
    vlm.main(
        ["--recipe", recipe, "--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--language-model", str(toy_base)]
        + ["--siglip-checkpoint", str(tmp_path / "encoder"), "--output-dir", str(tmp_path / "out"), "--max-steps", "2"]
        + ["--optim", "adamw_torch", "--eval-fraction", "0.2", "--dataloader-num-workers", "0", "--report-to", "none"]
    )
    arguments = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert arguments["bf16"] and arguments["tokens_per_batch"] >= arguments["tokens_per_row"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_bits"] in (4, 16)
