"""Layers that start from the statistics of what they read."""

from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES
from safetensors.torch import load_file
from torch.nn import functional as F

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetVisionConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetVisionModel
from sigphi.train import siglip
from sigphi.train.arguments import SiglipModelArguments
from sigphi.train.errors import UserError
from sigphi.train.whitening import whiten_stem

STEM = "vision_model.embedder.convolution.weight"


def vision_model(kernels: int) -> SiglipResNetVisionModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_sizes": [8], "depths": [1], "layer_type": "basic", "image_size": 32}
    return SiglipResNetVisionModel(SiglipResNetVisionConfig(embedding_size=kernels, stem="cifar", **shape))


def smooth_images(count: int = 64) -> torch.Tensor:
    """Noise whose neighbours are alike, of another mean in each channel."""
    noise = F.avg_pool2d(torch.randn(count, 3, 34, 34, generator=torch.Generator().manual_seed(1)), 3, stride=1)
    return 3 * noise + torch.tensor([1.0, -2.0, 0.5])[:, None, None]


@pytest.mark.parametrize("kernels", [12, 54])
def test_a_whitened_stem_gives_uncorrelated_outputs_of_unit_variance(kernels):
    model, images = vision_model(kernels), smooth_images()
    whiten_stem(model, images)
    weight = model.embedder.convolution.weight.detach()
    seen = [
        image[:, row : row + 3, column : column + 3].flatten()
        for image in images
        for row in range(0, 30, 3)
        for column in range(0, 30, 3)
    ]
    outputs = torch.stack(seen).double() @ weight[: kernels // 2].flatten(1).double().t()
    covariance = torch.cov(outputs.t())
    # The patches of each third row and column stand for all; directions of almost no variance are held down.
    assert (covariance - torch.eye(kernels // 2)).abs().max() < 0.12
    assert torch.equal(weight[kernels // 2 :], -weight[: kernels // 2])


def test_the_directions_of_most_variance_come_first():
    few, many, images = vision_model(4), vision_model(20), smooth_images()
    whiten_stem(few, images)
    whiten_stem(many, images)
    first, all_of_them = (one.embedder.convolution.weight.detach() for one in (few, many))
    torch.testing.assert_close(first[:2], all_of_them[:2])
    # Of smooth images most of what varies is how bright a channel is: its nine pixels have one weight.
    assert first[0].sum((1, 2)).norm() / 3 > 0.95 * first[0].norm()


def test_training_keeps_a_whitened_stem_and_moves_all_else(tmp_path, toy_csv, toy_base):
    common = ["--images", TOY_IMAGES, "--eval-fraction", "0", "--eval-strategy", "no", "--report-to", "none"]
    common += ["--batch-size", "12", "--layer-type", "basic", "--hidden-sizes", "8", "16", "--depths", "1", "1"]
    common += ["--embedding-size", "8", "--whiten-stem", "true", "--input-csv", str(toy_csv)]
    common += ["--text-model", str(toy_base)]
    weights = {}
    for steps in ("1", "3"):
        siglip.main([*common, "--max-steps", steps, "--output-dir", str(tmp_path / steps)])
        weights[steps] = load_file(tmp_path / steps / "model.safetensors")
    first, last = weights["1"], weights["3"]
    assert torch.equal(first[STEM], last[STEM])
    assert torch.equal(last[STEM][4:], -last[STEM][:4])
    moved = [name for name in first if first[name].is_floating_point() and not torch.equal(first[name], last[name])]
    assert len(moved) > 20
    assert not {f"vision_model.embedder.normalization.{name}" for name in ("weight", "bias")} & {*moved}
    assert {f"vision_model.embedder.normalization.running_{name}" for name in ("mean", "var")} <= {*moved}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"embedding_size": 7}, "--embedding-size 7"),
        ({"embedding_size": 56}, "--embedding-size 56"),
        ({"stem": "imagenet"}, "--stem imagenet"),
        ({"vision_model": "microsoft/resnet-50"}, "--vision-model"),
        ({"siglip_checkpoint": "outputs/siglip"}, "--siglip-checkpoint"),
    ],
)
def test_a_stem_that_cannot_be_whitened_is_refused(options, named):
    with pytest.raises(UserError, match=named):
        SiglipModelArguments(**{"embedding_size": 48, "whiten_stem": True} | options)
