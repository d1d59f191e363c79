"""The VLM against ground truth: loss, accuracy, and what looking at the image is worth."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from sigphi.modeling.modeling_sigphi import SigPhiForConditionalGeneration
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.collators import VlmCollator, preprocess
from sigphi.train.data import distinct_images
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images
from sigphi.train.judging import asks_for_object, is_correct
from sigphi.train.metrics import has_label_derangement, label_derangement, majority_share, token_f1
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
def generate_answers(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    image_features: torch.Tensor,
    image_indices: Sequence[int],
    questions: Sequence[str],
    batch_size: int = 64,
    max_new_tokens: int = 80,
) -> list[str]:
    """
    Greedy answers.

    Args:
        model, processor: of the VLM.
        image_features (`torch.Tensor` of shape `(images, num_image_tokens, feature_size)`): see [`encode_images`].
        image_indices (`Sequence[int]`): for each question the row of `image_features`.
        questions (`Sequence[str]`): one a row. Equal questions are answered together, since their answers are about
            equally long.
        batch_size (`int`, *optional*, defaults to 64): questions in a step.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
    """
    prompts = tokenize_questions(processor, questions)
    order = sorted(range(len(questions)), key=lambda row: (questions[row], row))
    answers = [""] * len(questions)
    for start in tqdm(range(0, len(order), batch_size), desc="answering", disable=None, leave=False):
        rows = order[start : start + batch_size]
        padded = processor.tokenizer.pad({"input_ids": [prompts[row] for row in rows]}, padding_side="left")
        inputs = {name: torch.tensor(padded[name], device=model.device) for name in ("input_ids", "attention_mask")}
        features = image_features[[image_indices[row] for row in rows]].to(model.device)
        tokens = model.generate(**inputs, image_features=features, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


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
    for start in range(0, len(order), batch_size):
        batch = collate([rows[row] for row in order[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch, logits_to_keep=1).loss.item() * supervised
        tokens += supervised
    return total / tokens


@dataclass
class _Row:
    """One question with what its answer is judged by."""

    question: str
    answer: str
    question_type: str
    short_answer: str
    class_name: str
    asks_object: bool

    def judge(self, given: str) -> bool:
        return is_correct(given, self.short_answer, self.question_type)

    def judge_class(self, given: str) -> bool:
        return is_correct(given, self.class_name, "object")


def evaluate_vlm(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    dataset: datasets.Dataset,
    batch_size: int = 64,
    max_new_tokens: int = 80,
    seed: int = 0,
) -> dict[str, float]:
    """
    Loss, accuracy against ground truth, and what looking at the image is worth.

    Each question is answered three times: with its image, with the image of another row (a seeded permutation of the
    images in which none keeps its label), and with a gray one.

    Args:
        model (`SigPhiForConditionalGeneration`): the VLM.
        processor (`SigPhiProcessor`): its processor.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].
        batch_size (`int`, *optional*, defaults to 64): questions in a step.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
        seed (`int`, *optional*, defaults to 0): of the permutation.

    Returns:
        `dict`: `eval_loss` (nats per supervised token) and `token_f1`; over rows with a short answer
        `answer_accuracy`, `answer_count`, `accuracy/<type>` beside `majority/<type>`; over rows that ask for the
        object `class_accuracy`, `class_count`, `majority/class`; each accuracy also with `_shuffled_image` and
        `_blank_image`; and `image_gain`, `image_gain/<type>`, `class_image_gain`: real minus shuffled. Keys without
        rows are absent.

    Raises:
        ValueError: if one class has more than half of the images, so that no permutation changes every label.
    """
    was_training = model.training
    model.eval()
    images, positions = distinct_images(dataset)
    pixels = decode_images(images, range(len(images)))
    gray = torch.full_like(pixels[:1], 128)
    features = encode_images(model, processor, torch.cat([pixels, gray]))  # (images + 1, tokens, size)
    indices = {"": positions, "_blank_image": [len(images)] * len(positions)}
    if has_label_derangement(images["label"]):
        indices["_shuffled_image"] = label_derangement(images["label"], seed)[positions].tolist()
    else:
        logger.warning("one class has more than half of the images, so there is no shuffled figure and no image_gain")
    rows = _judged_rows(dataset)
    results = {"eval_loss": supervised_loss(model, processor, features, positions, dataset, batch_size)}
    for suffix, image_indices in indices.items():
        answers = generate_answers(
            model, processor, features, image_indices, dataset["question"], batch_size, max_new_tokens
        )
        results |= {f"{name}{suffix}": value for name, value in _accuracies(rows, answers).items()}
    model.train(was_training)
    return _summarise(results, rows)


def _judged_rows(dataset: datasets.Dataset) -> list[_Row]:
    columns = ("question", "answer", "question_type", "short_answer", "label")
    return [
        _Row(
            question,
            answer,
            kind,
            short,
            CLASS_NAMES[label],
            kind == "object" or not kind and asks_for_object(question),
        )
        for question, answer, kind, short, label in zip(*(dataset[name] for name in columns), strict=True)
    ]


def _accuracies(rows: list[_Row], answers: list[str]) -> dict[str, float]:
    """Mean scores of `answers`, by metric name without suffix."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row, given in zip(rows, answers, strict=True):
        scores["token_f1"].append(token_f1(given, row.answer))
        if row.short_answer:
            scores["answer_accuracy"].append(row.judge(given))
            scores[f"accuracy/{row.question_type}"].append(row.judge(given))
        if row.asks_object:
            scores["class_accuracy"].append(row.judge_class(given))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _summarise(results: dict[str, float], rows: list[_Row]) -> dict[str, float]:
    """Keep the promised keys, and add counts, majority figures and gains."""
    kinds = sorted({row.question_type for row in rows if row.short_answer})
    kept = {name: value for name, value in results.items() if not (name.startswith("accuracy/") and "_image" in name)}
    for kind in kinds:
        kept[f"majority/{kind}"] = majority_share([row.short_answer for row in rows if row.question_type == kind])
    classes = [row.class_name for row in rows if row.asks_object]
    if kinds:
        kept["answer_count"] = sum(bool(row.short_answer) for row in rows)
    if classes:
        kept["class_count"] = len(classes)
        kept["majority/class"] = majority_share(classes)
    gains = {f"accuracy/{kind}": f"image_gain/{kind}" for kind in kinds}
    gains |= {"answer_accuracy": "image_gain", "class_accuracy": "class_image_gain"}
    for name, gain in gains.items():
        if f"{name}_shuffled_image" in results:
            kept[gain] = results[name] - results[f"{name}_shuffled_image"]
    return kept


__all__ = ["encode_images", "evaluate_vlm", "generate_answers", "supervised_loss"]
