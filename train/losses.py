"""The pairwise sigmoid loss over the batch of all processes, in memory that grows with chunk x batch.

```python
>>> loss = global_sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias)  # in each of N processes
>>> loss.backward()  # DDP then averages the gradients over the processes
```
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sigphi.train.pairs import pair_masks


def global_sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    *,
    duplicates: str = "positive",
    variant: str = "ring",
    chunk_size: int = 256,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    r"""
    The loss of Zhai et al., arXiv 2303.15343, equation 1, over the images and texts of all processes of `group`.

    Every process calls it with its own part of the batch, of any size, also empty, and gets the same number: the loss
    of the whole batch, a mean over all images. Without `torch.distributed` the batch is that of the one process.

    Gradients are made for `DistributedDataParallel`, which averages those of the weights over the P processes. The
    embeddings of a process get P times the derivative of the returned loss. The gradient of a weight is the sum over
    all embeddings of all processes, and the mean over processes of P times each process's part is that sum.
    `logit_scale` and `logit_bias` are the same in all processes and get their whole derivative in each, so that the
    mean is again that of one process.

    The gradients are computed in the forward pass, a chunk of images against all texts (`"gather"`) or those of one
    process (`"ring"`) at a time: no chunk is kept or computed twice, and the backward pass needs no communication.
    All processes have to scale the returned loss alike.

    Args:
        image_embeds (`torch.Tensor` of shape `(images, dim)`): L2-normalised embeddings of this process's images.
        text_embeds (`torch.Tensor` of shape `(texts, dim)`): L2-normalised embeddings of this process's texts.
        logit_scale (`torch.Tensor`, one element): the log temperature t', equal in all processes.
        logit_bias (`torch.Tensor`, one element): the bias b, equal in all processes.
        image_ids (`torch.LongTensor` of shape `(images, width)`, *optional*): see [`pair_ids`]. Without it and
            `text_ids`, image i of a process belongs to text i of that process alone.
        text_ids (`torch.LongTensor` of shape `(texts, 3)`, *optional*): see [`pair_ids`]. A text that several
            processes have, by the first number, counts once: in the first of them.
        duplicates (`str`, *optional*, defaults to `"positive"`): see [`pair_masks`].
        variant (`str`, *optional*, defaults to `"ring"`): `"ring"` passes the texts with their gradients from process
            to process (section 3.3), `"gather"` brings all texts to every process at once.
        chunk_size (`int`, *optional*, defaults to `256`): images whose logits are in memory at a time.
        group (`torch.distributed.ProcessGroup`, *optional*): the processes; all of them by default.

    Returns:
        `torch.Tensor`: the scalar loss, in float64 for float64 embeddings, else in float32. The logits have the same
        type, also under autocast.

    Raises:
        ValueError: for an unknown `variant` or `duplicates`, a `chunk_size` below 1, ids of other lengths than the
            embeddings, or different numbers of images and texts without ids.
    """
    _check_arguments(image_embeds, text_embeds, image_ids, text_ids, duplicates, variant, chunk_size)
    if image_ids is None or text_ids is None:
        image_ids, text_ids = _ids_of_couples(len(image_embeds), image_embeds.device, group)
    all_text_ids = _gather(text_ids, group)
    is_first = _first_of_each(torch.cat(all_text_ids)[:, 0].abs()).split([len(ids) for ids in all_text_ids])
    all_text_ids = [ids[mask] for ids, mask in zip(all_text_ids, is_first, strict=True)]
    dtype = torch.promote_types(torch.promote_types(image_embeds.dtype, text_embeds.dtype), torch.float32)
    return _GlobalSigmoidLoss.apply(
        image_embeds.to(dtype),
        text_embeds.to(dtype)[is_first[_rank(group)]],
        logit_scale.to(dtype).reshape(()),
        logit_bias.to(dtype).reshape(()),
        _Pairs(image_ids, all_text_ids, duplicates, chunk_size, group),
        variant,
    )


@dataclass(frozen=True)
class _Pairs:
    """How images and texts belong together; `text_ids` has an entry for each process."""

    image_ids: torch.Tensor
    text_ids: list[torch.Tensor]
    duplicates: str
    chunk_size: int
    group: dist.ProcessGroup | None


class _GlobalSigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        pairs: _Pairs,
        variant: str,
    ) -> torch.Tensor:
        compare = _compare_in_ring if variant == "ring" else _compare_with_gathered
        with torch.autocast(images.device.type, enabled=False):
            sums, image_grads, text_grads = compare(images, texts, scale, bias, pairs)
        totals = torch.cat([sums, sums.new_tensor([len(images)])])  # loss, its derivatives by t' and b, images
        processes = len(pairs.text_ids)
        if processes > 1:
            dist.all_reduce(totals, group=pairs.group)
        loss, scale_grad, bias_grad = totals[:3] / totals[3]
        factor = processes / totals[3]
        ctx.save_for_backward(image_grads.mul_(factor), text_grads.mul_(factor), scale_grad, bias_grad)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(grad_output * grad for grad in ctx.saved_tensors), None, None


def _compare_in_ring(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, pairs: _Pairs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts travel round all processes with what each adds to their gradients, and come home with the whole."""
    image_grads, text_grads = torch.zeros_like(images), torch.zeros_like(texts)
    sums = images.new_zeros(3)
    processes, rank = len(pairs.text_ids), _rank(pairs.group)
    for step in range(processes):
        owner = (rank - step) % processes
        sums += _add_block(images, texts, scale, bias, pairs, pairs.text_ids[owner], image_grads, text_grads)
        if processes > 1:
            arriving = len(pairs.text_ids[(owner - 1) % processes])
            texts, text_grads = _pass_on(torch.stack([texts, text_grads]), arriving, pairs.group)
    return sums, image_grads, text_grads


def _compare_with_gathered(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, pairs: _Pairs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every process has all texts, and the processes add up what each finds for their gradients."""
    all_texts = torch.cat(_gather(texts, pairs.group))
    image_grads, text_grads = torch.zeros_like(images), torch.zeros_like(all_texts)
    sums = _add_block(images, all_texts, scale, bias, pairs, torch.cat(pairs.text_ids), image_grads, text_grads)
    if len(pairs.text_ids) > 1:
        dist.all_reduce(text_grads, group=pairs.group)
    own = text_grads.split([len(ids) for ids in pairs.text_ids])[_rank(pairs.group)]
    return sums, image_grads, own.clone()  # a view would keep all texts' gradients in memory


def _add_block(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    pairs: _Pairs,
    text_ids: torch.Tensor,
    image_grads: torch.Tensor,
    text_grads: torch.Tensor,
) -> torch.Tensor:
    """Add the gradients of the images with these texts; gives the sums of the loss and its derivatives by t', b."""
    temperature = scale.exp()
    # One tensor made beforehand: small ones kept between the chunks would break the heap into pieces.
    sums = images.new_zeros(math.ceil(len(images) / pairs.chunk_size), 3)
    for index, start in enumerate(range(0, len(images), pairs.chunk_size)):
        chunk = slice(start, start + pairs.chunk_size)
        positives, ignored = pair_masks(pairs.image_ids[chunk], text_ids, pairs.duplicates)
        similarity = images[chunk] @ texts.t()  # (chunk, texts)
        signs = torch.where(positives, 1.0, -1.0).to(similarity.dtype).masked_fill_(ignored, 0.0)
        signed = (temperature * similarity).add_(bias).mul_(signs)  # (chunk, texts)
        loss = -F.logsigmoid(signed).masked_fill_(ignored, 0.0).sum()
        slopes = signed.neg_().sigmoid_().mul_(signs).neg_()  # (chunk, texts), by the logits
        sums[index] = torch.stack([loss, temperature * similarity.mul_(slopes).sum(), slopes.sum()])
        slopes.mul_(temperature)  # by the similarities
        image_grads[chunk].addmm_(slopes, texts)
        text_grads.addmm_(slopes.t(), images[chunk])
    return sums.sum(0)


def _pass_on(rows: torch.Tensor, arriving: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Send `rows` `(2, texts, dim)` to the next process, and take the `(2, arriving, dim)` of the one before."""
    ranks = dist.get_process_group_ranks(group)
    rank = dist.get_rank(group)
    after, before = ranks[(rank + 1) % len(ranks)], ranks[rank - 1]
    received = rows.new_empty(2, arriving, rows.shape[-1])
    exchange = [dist.P2POp(dist.isend, rows, after, group), dist.P2POp(dist.irecv, received, before, group)]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()
    return received


def _gather(rows: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The `rows` of each process, of which each may have another number."""
    if _world_size(group) == 1:
        return [rows]
    counts = _counts(len(rows), rows.device, group)
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _counts(count: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    if _world_size(group) == 1:
        return [count]
    parts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(_world_size(group))]
    dist.all_gather(parts, torch.tensor([count], device=device), group=group)
    return torch.cat(parts).tolist()


def _ids_of_couples(
    count: int, device: torch.device, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids by which image i of a process belongs to its text i."""
    first = 1 + sum(_counts(count, device, group)[: _rank(group)])
    image_ids = torch.arange(first, first + count, device=device)[:, None]  # (images, 1)
    return image_ids, F.pad(image_ids, (0, 2))


def _first_of_each(keys: torch.Tensor) -> torch.Tensor:
    """Which of the `keys` `(texts,)` have not come before."""
    values, places = keys.unique(return_inverse=True)
    positions = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(values, len(keys)).scatter_reduce_(0, places, positions, "amin")
    return first[places] == positions


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _check_arguments(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_ids: torch.Tensor | None,
    text_ids: torch.Tensor | None,
    duplicates: str,
    variant: str,
    chunk_size: int,
) -> None:
    images, texts = len(image_embeds), len(text_embeds)
    if variant not in ("ring", "gather"):
        raise ValueError(f"`variant` must be 'ring' or 'gather', got {variant!r}.")
    if duplicates not in ("positive", "ignored"):
        raise ValueError(f"`duplicates` must be 'positive' or 'ignored', got {duplicates!r}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be 1 or more, got {chunk_size}.")
    if (image_ids is None) != (text_ids is None):
        raise ValueError("Give `image_ids` and `text_ids`, or neither.")
    if image_ids is None and images != texts:
        raise ValueError(f"`image_ids` and `text_ids` are needed for {images} images and {texts} texts.")
    if image_ids is not None and text_ids is not None and (len(image_ids), len(text_ids)) != (images, texts):
        raise ValueError(
            f"`image_ids` and `text_ids` must have a row an image and a text, {images} and {texts}, got "
            f"{len(image_ids)} and {len(text_ids)}."
        )


__all__ = ["global_sigmoid_loss"]
