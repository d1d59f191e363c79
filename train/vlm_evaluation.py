"""The VLM against ground truth: loss, accuracy, and what looking at the image is worth."""

import json
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from sigphi.modeling.modeling_sigphi import SigPhiForConditionalGeneration
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.answer_scores import BLANK, SHUFFLED, answer_scores, judged_rows, sees_nothing
from sigphi.train.answering import generate_answers
from sigphi.train.batch_log import discard
from sigphi.train.collators import VlmCollator, preprocess
from sigphi.train.data import distinct_images
from sigphi.train.fingerprints import digest, tensor_parts
from sigphi.train.images import decode_images
from sigphi.train.metrics import has_label_derangement, label_derangement
from sigphi.train.predictions import write_predictions
from sigphi.train.prompts import tokenize_questions, tokenized_rows

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_images(
    model: SigPhiForConditionalGeneration, processor: Any, images: torch.Tensor, batch_size: int = 256
) -> torch.Tensor:
    """What the projector reads, `(images, num_image_tokens, feature_size)`, on the CPU: once an image."""
    was_training = model.model.vision_tower.training
    model.model.vision_tower.eval()
    parts = [
        model.model.get_vision_features(preprocess(processor, part).to(model.device)).cpu()
        for part in images.split(batch_size)
    ]
    model.model.vision_tower.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def supervised_loss(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    image_features: torch.Tensor,
    image_indices: Sequence[int],
    dataset: datasets.Dataset,
    batch_size: int,
) -> float:
    """Mean cross-entropy in nats over all supervised tokens of `dataset`, however they are batched."""
    rows = tokenized_rows(processor, dataset, image_indices)
    collate = VlmCollator(pad_token_id=processor.tokenizer.pad_token_id, image_features=image_features)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["prompt_ids"]) + len(rows[row]["answer_ids"]))
    total = tokens = 0.0
    for start in tqdm(range(0, len(order), batch_size), "loss", disable=None, leave=False):
        batch = collate([rows[row] for row in order[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch, logits_to_keep=torch.arange(0)).loss.item() * supervised
        tokens += supervised
    return total / tokens


def evaluate_vlm(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    dataset: datasets.Dataset,
    batch_size: int = 64,
    max_new_tokens: int = 80,
    seed: int = 0,
    predictions_file: Path | None = None,
    torch_compile: bool = False,
) -> dict[str, float]:
    """
    Loss, accuracy against ground truth, and what looking at the image is worth.

    Each question is answered three times: with its image, with the image of another row (a seeded permutation of the
    images in which none keeps its label), and with a gray one. A warning says when the right image is worth nothing.

    Args:
        model (`SigPhiForConditionalGeneration`): the VLM.
        processor (`SigPhiProcessor`): its processor.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].
        batch_size (`int`, *optional*, defaults to 64): questions in a step.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
        seed (`int`, *optional*, defaults to 0): of the permutation.
        predictions_file (`Path`, *optional*): where to write every answer, see [`write_predictions`]. Beside it a
            folder keeps what is answered, so that the same call goes on where a killed one stopped.
        torch_compile (`bool`, *optional*, defaults to `False`): see [`Answerer`].

    Returns:
        `dict`: `eval_loss` (nats per supervised token); `token_f1`, `rougeL` and `bleu`, the latter two with the extra
        `eval` alone; over rows with a short answer `answer_accuracy`, `answer_count`, `accuracy/<type>` beside
        `majority/<type>`; over rows that ask for the object `class_accuracy`, `class_count`, `majority/class`; over
        descriptions `description_precision` and `description_recall`; these, but not those of a type, also with
        `_shuffled_image` and `_blank_image`; `image_gain`, `image_gain/<type>`, `class_image_gain`: real minus
        shuffled; and the figures of [`hallucination_rate`] and [`refusal_scores`]. Keys without rows are absent, and
        all that need another image where one class has more than half of the images.

    Raises:
        UserError: if a short answer cannot be judged by.
    """
    rows = judged_rows(dataset)
    was_training = model.training
    model.eval()
    features, image_indices = with_other_images(model, processor, dataset, seed)
    names, num_rows = list(image_indices), len(dataset)
    asked = ([image for name in names for image in image_indices[name]], dataset["question"][:] * len(names))
    log_folder = None
    if predictions_file is not None:
        prompts = tokenize_questions(processor, dataset["question"])
        log_folder = _log_folder(
            predictions_file, model, features, [*asked, prompts, batch_size, max_new_tokens, torch_compile]
        )
    answers = generate_answers(
        model, processor, features, *asked, batch_size, max_new_tokens, log_folder, torch_compile
    )
    given = {name: answers[number * num_rows :][:num_rows] for number, name in enumerate(names)}
    loss = supervised_loss(model, processor, features, image_indices[""], dataset, batch_size)
    model.train(was_training)
    texts: dict[str, Sequence[str]] = {name: [one.text for one in part] for name, part in given.items()}
    results = answer_scores(rows, texts)
    finding = sees_nothing(rows, texts[""], texts[SHUFFLED]) if SHUFFLED in texts else ""
    if finding:
        logger.warning("WARNING: %s", finding)
    if predictions_file is not None and log_folder is not None:
        write_predictions(predictions_file, dataset, rows, given)
        discard(log_folder)
    return {"eval_loss": loss} | results


def with_other_images(
    model: SigPhiForConditionalGeneration, processor: SigPhiProcessor, dataset: datasets.Dataset, seed: int
) -> tuple[torch.Tensor, dict[str, list[int]]]:
    """
    What the projector reads of all images and of a gray one, and which of these to show with each question.

    Returns:
        `tuple`: features of shape `(images + 1, num_image_tokens, feature_size)`, and by suffix the row of them for
        each row of `dataset`: `""` for the image itself, `"_blank_image"`, and `"_shuffled_image"` unless one class
        has more than half of the images.
    """
    images, positions = distinct_images(dataset)
    pixels = decode_images(images, range(len(images)))
    gray = torch.full_like(pixels[:1], 128)
    features = encode_images(model, processor, torch.cat([pixels, gray]))
    indices = {"": positions, BLANK: [len(images)] * len(positions)}
    if has_label_derangement(images["label"]):
        indices[SHUFFLED] = label_derangement(images["label"], seed)[positions].tolist()
    else:
        logger.warning("one class has more than half of the images, so there is no shuffled figure and no image_gain")
    return features, indices


def _log_folder(
    predictions_file: Path, model: SigPhiForConditionalGeneration, features: torch.Tensor, inputs: Any
) -> Path:
    """Where the finished batches of this very evaluation are kept; those of any other are removed."""
    settings = json.dumps([inputs, model.generation_config.to_json_string()]).encode()
    name = digest(chain([settings], tensor_parts(model.state_dict() | {"features": features})))
    start = f".{predictions_file.name}.unfinished-"
    folder = predictions_file.with_name(start + name[:16])
    for other in predictions_file.parent.glob(f"{start}*"):
        if other != folder:
            logger.info("%s is of another model, CSV or setting: removed", other)
            discard(other)
    return folder


__all__ = ["encode_images", "evaluate_vlm", "generate_answers", "supervised_loss", "with_other_images"]
