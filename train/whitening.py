"""Layers of the encoder that start from the statistics of what they read."""

from collections.abc import Callable, Iterable
from functools import reduce

import torch
import torch.nn.functional as F

from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, SiglipResNetVisionModel

_IMAGES_AT_ONCE = 500


@torch.no_grad()
def whiten_text_projection(model: SiglipResNetModel, features: torch.Tensor) -> None:
    """
    Start the text projection so that embeddings of different texts point in different directions.

    The states of a language model share a large common part; projected at random, all texts have nearly the same
    embedding, and the loss has nothing to compare. The projection is composed with the whitening of `features`
    (centred, all principal directions at unit variance), as for sentence embeddings in Su et al., arXiv 2103.15316.

    Args:
        model (`SiglipResNetModel`): its `text_model.projection` is set.
        features (`torch.Tensor` of shape `(texts, hidden_size)`): pooled states of the training texts.
    """
    mean, whitening = _whitening(lambda: features.split(4096))  # features in a file need not fit in memory
    projection = model.text_model.projection
    weight = projection.weight.double().cpu() @ whitening
    projection.weight.copy_(weight)
    projection.bias.copy_(-weight @ mean)


@torch.no_grad()
def whiten_stem(vision_model: SiglipResNetVisionModel, pixel_values: torch.Tensor) -> None:
    """
    Start the stem's convolution as the whitening of what its kernel sees of images.

    Neighbouring pixels are nearly the same, so that random kernels nearly all tell how bright a patch is. Here each
    kernel is a principal direction of the patches, at unit variance, those of the most variance first, and the other
    half of the kernels is the first half negated, for what ReLU takes away (Jordan, arXiv 2404.00498, section 3.2).

    Args:
        vision_model (`SiglipResNetVisionModel`): its `embedder.convolution`, of a `"cifar"` stem, is set; it has an
            even number of kernels, at most two for each of the `channels x 3 x 3` numbers of a patch.
        pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): normalised images.
    """
    convolution = vision_model.embedder.convolution
    count = convolution.out_channels // 2
    parts, size = pixel_values.split(_IMAGES_AT_ONCE), convolution.kernel_size
    _, whitening = _whitening(lambda: (F.unfold(part, size).transpose(1, 2).flatten(0, 1) for part in parts))
    kernels = whitening.flip(0)[:count].view(count, *convolution.weight.shape[1:])
    convolution.weight.copy_(torch.cat([kernels, -kernels]))


def freeze_stem(vision_model: SiglipResNetVisionModel) -> None:
    """Keep a stem as [`whiten_stem`] made it, and the norm behind it too: no gradient has to reach what is widest."""
    vision_model.embedder.requires_grad_(False)


def _whitening(parts: Callable[[], Iterable[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What gives centred rows all principal directions at unit variance.

    Args:
        parts (`Callable`): the rows in parts of shape `(rows, size)`, which are asked for twice.

    Returns:
        `tuple` in float64: the mean of the rows `(size,)`, and the whitening `(size, size)`, a line a direction, those
        of the least variance first.
    """
    sums = [(part.double().sum(0), len(part)) for part in parts()]
    count = sum(length for _, length in sums)
    mean = reduce(torch.add, (one for one, _ in sums)) / count
    centred = (part - mean for part in parts())
    covariance = reduce(torch.add, (part.t() @ part for part in centred)) / (count - 1)
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    # Directions with almost no variance hold rounding noise, which must not be blown up.
    scale = (variances + 1e-3 * variances.mean()).rsqrt()
    return mean, scale[:, None] * directions.t()


__all__ = ["freeze_stem", "whiten_stem", "whiten_text_projection"]
