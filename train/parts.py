"""A batch in parts, where memory does not hold all of it at once."""

import torch


def split_rows(
    batch: dict[str, torch.Tensor], rows_at_once: int, image_token_id: int, num_image_tokens: int
) -> list[dict[str, torch.Tensor]]:
    """
    The rows of a VLM's batch in parts, each with the images that its rows ask about.

    Args:
        batch (`dict`): of a [`VlmCollator`] or [`PackingCollator`].
        rows_at_once (`int`): of a part, at most; packed rows are never cut.
        image_token_id (`int`): the placeholder in `input_ids`.
        num_image_tokens (`int`): placeholders of an image.

    Returns:
        `list[dict]`: batches whose losses, each divided by the supervised tokens of the whole, add up to that of the
        whole.
    """
    others = dict(batch)
    images_of_row = (batch["input_ids"] == image_token_id).sum(1) // num_image_tokens  # (rows,)
    name = "pixel_values" if "pixel_values" in others else "image_features"
    images = others.pop(name)  # (images, ...)
    image_rows = others.pop("image_rows", torch.arange(len(images), device=images.device))
    ends = images_of_row.cumsum(0).tolist()
    parts = []
    for start in range(0, len(ends), rows_at_once):
        stop = min(start + rows_at_once, len(ends))
        own = image_rows[ends[start] - int(images_of_row[start]) : ends[stop - 1]]
        distinct, place = torch.unique(own, return_inverse=True)
        part = {key: value[start:stop] for key, value in others.items()}
        parts.append(part | {name: images[distinct], "image_rows": place})
    return parts


__all__ = ["split_rows"]
