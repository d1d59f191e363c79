"""The sigmoid loss over the batch of several processes, against a twin that forms every pair in float64."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch.nn import functional as F

from sigphi import global_sigmoid_loss, sigmoid_loss

# The images and texts of each process. The last batch of a run may be uneven, or have nothing for a process.
SIZES = {
    1: [[(13, 29)]],
    2: [[(16, 40), (16, 37)], [(11, 23), (4, 9)], [(9, 21), (0, 0)]],
    3: [[(8, 20), (8, 25), (8, 19)], [(7, 18), (5, 0), (1, 3)], [(6, 14), (0, 0), (2, 5)]],
}
CHUNKS = (3, 256)
NAMES = ("loss", "images", "texts", "scale", "bias")
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


def make_part(rank: int, images: int, texts: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One process's part of a batch. Ids are few, so that texts repeat within a process and across processes."""
    generator = torch.Generator().manual_seed(100 * rank + images)
    embeds = [torch.randn(rows, 24, generator=generator, dtype=dtype) for rows in (images, texts)]
    image_ids = torch.randint(1, 60, (images, 7), generator=generator)
    image_ids[torch.rand(image_ids.shape, generator=generator) < 0.2] = -1  # padding
    keys = torch.randint(1, 40, (texts, 1), generator=generator)
    keys[torch.rand(keys.shape, generator=generator) < 0.1] *= -1  # says nothing
    facts = torch.randint(40, 50, (texts, 1), generator=generator) * (keys % 3 > 0)
    attributes = torch.randint(50, 60, (texts, 1), generator=generator) * (facts > 0)
    return {
        "images": F.normalize(embeds[0], dim=-1),
        "texts": F.normalize(embeds[1], dim=-1),
        "image_ids": image_ids,
        "text_ids": torch.cat([keys, facts, attributes], dim=1),
    }


def logit_parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.tensor(value, dtype=dtype, requires_grad=True) for value in (1.3, -2.5)
    ]  # far from where the gradient of b is 0


def loss_and_gradients(sizes: list[tuple[int, int]], dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
    """The loss in this process, and the gradients of its image embeddings, its text embeddings, t' and b."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    part = make_part(rank, *sizes[rank], dtype)
    leaves = [part["images"].requires_grad_(), part["texts"].requires_grad_(), *logit_parameters(dtype)]
    loss = global_sigmoid_loss(*leaves, part["image_ids"], part["text_ids"], **options)
    assert loss.dtype == dtype
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def all_cases(sizes: list[list[tuple[int, int]]]) -> list[list[torch.Tensor]]:
    if len(sizes[0]) > 1:
        dist.init_process_group("gloo")
    return [
        loss_and_gradients(one, dtype, variant=variant, chunk_size=chunk, duplicates=duplicates)
        for one, dtype, variant, chunk, duplicates in cases(sizes)
    ]


def cases(sizes: list[list[tuple[int, int]]]) -> list[tuple[Any, ...]]:
    return list(product(sizes, TOLERANCES, ("ring", "gather"), CHUNKS, ("positive", "ignored")))


def naive_loss_and_gradients(
    sizes: list[tuple[int, int]], dtype: torch.dtype, duplicates: str
) -> list[list[torch.Tensor]]:
    """What each process has to give: pair by pair, in float64, from the whole batch."""
    parts = [make_part(rank, *size, dtype) for rank, size in enumerate(sizes)]
    images = [part["images"].double().requires_grad_() for part in parts]
    texts = [part["texts"].double().requires_grad_() for part in parts]
    scale, bias = (value.detach().double().requires_grad_() for value in logit_parameters(dtype))
    distinct: dict[int, tuple[torch.Tensor, list[int]]] = {}
    for part, embeds in zip(parts, texts, strict=True):
        for ids, embed in zip(part["text_ids"].tolist(), embeds, strict=True):
            distinct.setdefault(abs(ids[0]), (embed, ids))
    losses = []
    for part, embeds in zip(parts, images, strict=True):
        for ids, image in zip(part["image_ids"].tolist(), embeds, strict=True):
            for text, (key, fact, attribute) in distinct.values():
                own, states_it = key in ids, fact in ids
                is_positive = own or (states_it and duplicates == "positive")
                if is_positive or not (states_it or (attribute != 0 and attribute not in ids)):
                    logit = scale.exp() * (image * text).sum() + bias
                    losses.append(F.softplus(-logit if is_positive else logit, threshold=1000))
    loss = torch.stack(losses).sum() / sum(len(one) for one in images)
    gradients = torch.autograd.grad(loss, [*images, *texts, scale, bias], allow_unused=True, materialize_grads=True)
    world = len(sizes)
    return [
        [loss.detach(), world * gradients[rank], world * gradients[world + rank], *gradients[-2:]]
        for rank in range(world)
    ]


@pytest.mark.parametrize("world_size", SIZES)
def test_loss_and_gradients_equal_those_of_every_pair_in_float64(world_size: int, tmp_path: Path):
    sizes = SIZES[world_size]
    measured = run_processes(all_cases, world_size, tmp_path, sizes) if world_size > 1 else [all_cases(sizes)]
    naive = {
        (str(one), dtype, duplicates): naive_loss_and_gradients(one, dtype, duplicates)
        for one, dtype, duplicates in product(sizes, TOLERANCES, ("positive", "ignored"))
    }
    for number, (one, dtype, variant, chunk, duplicates) in enumerate(cases(sizes)):
        for rank in range(world_size):
            expected = naive[str(one), dtype, duplicates][rank]
            for name, value, right in zip(NAMES, measured[rank][number], expected, strict=True):
                error = (value.double() - right).norm()
                assert error <= TOLERANCES[dtype] * right.norm(), (one, dtype, variant, chunk, rank, name, error)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_gradients_on_a_gpu_equal_those_of_every_pair_in_float64(dtype: torch.dtype, tolerance: float):
    sizes = SIZES[1][0]
    (right,) = naive_loss_and_gradients(sizes, dtype, "positive")
    part = {name: value.cuda() for name, value in make_part(0, *sizes[0], dtype).items()}
    logit = [value.detach().cuda().requires_grad_() for value in logit_parameters(dtype)]
    leaves = [part["images"].requires_grad_(), part["texts"].requires_grad_(), *logit]
    loss = global_sigmoid_loss(*leaves, part["image_ids"], part["text_ids"], chunk_size=3)
    for name, value, expected in zip(NAMES, [loss, *torch.autograd.grad(loss, leaves)], right, strict=True):
        assert (value.cpu().double() - expected).norm() <= tolerance * expected.norm(), name


def couples(sizes: list[int]) -> list[torch.Tensor]:
    """The loss of image i with text i, without ids, and the gradient of t'."""
    dist.init_process_group("gloo")
    part = make_part(dist.get_rank(), sizes[dist.get_rank()], sizes[dist.get_rank()], torch.float64)
    scale, bias = logit_parameters(torch.float64)
    loss = global_sigmoid_loss(part["images"], part["texts"], scale, bias)
    return [loss.detach(), *torch.autograd.grad(loss, scale)]


def test_without_ids_each_image_has_one_text_and_the_loss_is_that_of_one_process(tmp_path: Path):
    sizes = [5, 8]
    parts = [make_part(rank, size, size, torch.float64) for rank, size in enumerate(sizes)]
    scale, bias = logit_parameters(torch.float64)
    images, texts = (torch.cat([part[name] for part in parts]) for name in ("images", "texts"))
    loss = sigmoid_loss(images, texts, scale, bias)
    gradient = torch.autograd.grad(loss, scale)[0]
    torch.testing.assert_close(global_sigmoid_loss(images, texts, scale, bias), loss, rtol=1e-12, atol=0)
    for measured in run_processes(couples, 2, tmp_path, sizes):
        torch.testing.assert_close(measured, [loss.detach(), gradient], rtol=1e-12, atol=0)


def test_logits_are_in_float32_under_autocast_and_for_half_precision():
    part = make_part(0, 13, 29, torch.float32)
    scale, bias = logit_parameters(torch.float32)
    ids = (part["image_ids"], part["text_ids"])
    expected = global_sigmoid_loss(part["images"], part["texts"], scale, bias, *ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(global_sigmoid_loss(part["images"], part["texts"], scale, bias, *ids), expected)
    halves = [part[name].bfloat16().requires_grad_() for name in ("images", "texts")]
    rounded = global_sigmoid_loss(*halves, scale, bias, *ids)
    assert torch.equal(rounded, global_sigmoid_loss(*(half.float() for half in halves), scale, bias, *ids))
    assert torch.autograd.grad(rounded, halves)[0].dtype == torch.bfloat16


def test_the_gradient_follows_the_scale_of_the_loss():
    part = make_part(0, 13, 29, torch.float64)
    scale, bias = logit_parameters(torch.float64)
    loss = global_sigmoid_loss(part["images"], part["texts"], scale, bias, part["image_ids"], part["text_ids"])
    (3 * loss).backward()
    whole = loss_and_gradients([(13, 29)], torch.float64)
    torch.testing.assert_close([scale.grad, bias.grad], [3 * gradient for gradient in whole[3:]])


def test_large_logits_stay_finite():
    images = torch.tensor([[1.0, 0.0]], requires_grad=True)
    texts = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    ids = (torch.tensor([[1]]), torch.tensor([[1, 0, 0], [2, 0, 0]]))
    for bias in (-1e4, 1e4):
        loss = global_sigmoid_loss(images, texts, torch.tensor(math.log(100.0)), torch.tensor(bias), *ids)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, images)[0]).all()
        assert loss.item() == pytest.approx(9900.0)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (4, {"variant": "tree"}, "`variant` must be 'ring' or 'gather', got 'tree'"),
        (4, {"duplicates": "negative"}, "`duplicates` must be"),
        (4, {"chunk_size": 0}, "`chunk_size` must be 1 or more, got 0"),
        (5, {}, "needed for 4 images and 5 texts"),
        (4, {"image_ids": torch.ones(4, 1, dtype=torch.long)}, "or neither"),
        (4, {"image_ids": torch.ones(4, 1), "text_ids": torch.ones(3, 3)}, "4 and 4, got 4 and 3"),
    ],
)
def test_wrong_arguments_are_named(texts, options, message):
    with pytest.raises(ValueError, match=message):
        global_sigmoid_loss(torch.ones(4, 2), torch.ones(texts, 2), torch.zeros(()), torch.zeros(()), **options)
