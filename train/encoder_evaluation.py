"""The encoder against ground truth: classification without and with labels, calibration, retrieval."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, pairwise_logits
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.train.collators import preprocess
from sigphi.train.data import distinct_images
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.image_texts import StoredImages
from sigphi.train.metrics import (
    chance_recall_at_k,
    confusion_counts,
    expected_calibration_error,
    fit_linear_probe,
    human_agreement,
    knn_scores,
    majority_share,
    per_class_scores,
    recall_at_k,
    top1_accuracy,
)
from sigphi.train.pairs import text_key
from sigphi.train.report import write_confusion_matrix
from sigphi.train.text_tower import pooled_batches, token_ids

logger = logging.getLogger(__name__)

# The wordings in which answers name the object. An embedding is averaged over all of them (Radford et al., arXiv
# 2103.00020, section 3.1.4).
ZERO_SHOT_PROMPTS = (
    "The main object in this image is {}.",
    "This image shows {}.",
    "It is a picture of {}.",
    "It is {}.",
    "The picture shows {}.",
    "Yes, this image shows {}.",
)
RETRIEVAL_KS = (1, 5, 10)


@torch.no_grad()
def embed_images(model: SiglipResNetModel, processor: Any, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """L2-normalised image embeddings, float32, of shape `(images, projection_dim)`, on the CPU."""
    batches = [preprocess(processor, part).to(model.device) for part in images.split(batch_size)]
    return torch.cat([model(pixel_values=batch).image_embeds.cpu() for batch in batches])


@torch.no_grad()
def pool_texts(model: SiglipResNetModel, processor: Any, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
    """
    What the text projection reads, float32, of shape `(texts, hidden_size)`, on the CPU; similar lengths together.

    Texts are cut where the tokenizer's `model_max_length` says, as in training.
    """
    was_training = model.training
    model.eval()
    tokens = token_ids(processor.tokenizer, texts)
    pooled = torch.empty(len(texts), model.text_model.projection.in_features)
    for rows, part in pooled_batches(model.text_model.pool, tokens, model.text_model.device, batch_size):
        pooled[rows] = part.float()
    model.train(was_training)
    return pooled


@torch.no_grad()
def embed_texts(model: SiglipResNetModel, processor: Any, texts: Sequence[str], batch_size: int) -> torch.Tensor:
    """L2-normalised text embeddings, float32, of shape `(texts, projection_dim)`, on the CPU."""
    pooled = pool_texts(model, processor, texts, batch_size).to(model.device)
    return model(text_features=pooled).text_embeds.cpu()


def class_texts() -> list[str]:
    """All [`ZERO_SHOT_PROMPTS`] of the first class, then those of the second, and so on."""
    return [prompt.format(with_article(name)) for name in CLASS_NAMES for prompt in ZERO_SHOT_PROMPTS]


@torch.no_grad()
def class_embeddings(
    model: SiglipResNetModel, processor: Any, batch_size: int = 64, features: torch.Tensor | None = None
) -> torch.Tensor:
    """
    One L2-normalised embedding a class, of shape `(10, projection_dim)`: the mean over [`ZERO_SHOT_PROMPTS`].

    With `features`, what the text projection reads of each of [`class_texts`], the model needs no text tower.
    """
    if features is None:
        features = pool_texts(model, processor, class_texts(), batch_size)
    embeds = model(text_features=features.to(model.device)).text_embeds.cpu()  # (classes * prompts, dim)
    mean = embeds.view(len(CLASS_NAMES), len(ZERO_SHOT_PROMPTS), -1).mean(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def with_article(noun: str) -> str:
    """`noun` behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def evaluate_encoder(
    model: SiglipResNetModel,
    processor: SiglipResNetProcessor,
    dataset: datasets.Dataset,
    batch_size: int = 256,
    max_retrieval_images: int = 1000,
    probe: datasets.Dataset | None = None,
    human_counts: torch.Tensor | None = None,
    output_dir: str | Path | None = None,
) -> dict[str, float]:
    """
    Classification without and with labels, calibration, agreement with people, retrieval.

    Args:
        model (`SiglipResNetModel`): with its text tower.
        processor (`SiglipResNetProcessor`): the model's.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`]; the images behind its rows are evaluated.
        batch_size (`int`, *optional*, defaults to 256): images or texts in a step.
        max_retrieval_images (`int`, *optional*, defaults to 1000): retrieval ranks the first so many images and all
            their distinct texts. Recall depends on this number.
        probe (`datasets.Dataset`, *optional*): images with labels, as of `probe_images`, that kNN and linear probe
            are fitted on. Those whose pixels equal an evaluated image's are left out.
        human_counts (`torch.Tensor` of shape `(images, 10)`, *optional*): see `read_human_labels`.
        output_dir (`str` or `Path`, *optional*): the folder for `confusion_matrix.json` and `.png`.

    Returns:
        `dict`: beside each accuracy, under `majority/...`, that of the best constant guess:

        - `zero_shot_top1`, by the class embedding with the highest cosine; `recall/<class>`, the share of a class
          that was recognised;
        - `ece` of the softmax over the class embeddings at the model's own temperature, and `ece_sigmoid` of
          the sigmoids that the model was trained by, over all pairs of image and class ("does it show a cat?");
        - with `probe`, `knn_top1`, `linear_probe_top1` and `probe_count`, the number of images they were fitted on;
        - with `human_counts`, the figures of [`human_agreement`] for that softmax;
        - `image_to_text_r1`, `_r5`, `_r10`, `text_to_image_r1`, `_r5`, `_r10`: the share of queries with a right item
          among the first k, beside `chance/...`, that of a random order. Texts that are equal but for case and
          surrounding space are one item that all their images share; other wordings of a fact are other items, so
          that a perfect model does not reach 1. `retrieval_images` and `retrieval_texts` are how many were ranked.
    """
    was_training = model.training
    model.eval()
    images, positions = distinct_images(dataset)
    embeds, pixels = _embed(model, processor, images, batch_size, "images")  # (images, dim)
    labels = torch.tensor(images["label"])
    logits = pairwise_logits(
        embeds, class_embeddings(model, processor, batch_size), model.logit_scale.cpu(), model.logit_bias.cpu()
    ).detach()  # (images, classes)
    results = _zero_shot(logits, labels, output_dir)
    if human_counts is not None:
        agreement = human_agreement(logits.double().log_softmax(1), human_counts)
        results |= {name: value for name, value in agreement.items() if not math.isnan(value)}
    if probe is not None:
        evaluated = set(pixels)
        known, known_pixels = _embed(model, processor, probe, batch_size, "probe images")  # (probe images, dim)
        unseen = torch.tensor([picture not in evaluated for picture in known_pixels])
        results |= _probes(embeds, labels, known[unseen], torch.tensor(probe["label"])[unseen])
    pairs = [(i, a) for i, a in zip(positions, dataset["answer"], strict=True) if i < max_retrieval_images]
    results |= _retrieval(model, processor, embeds[:max_retrieval_images], pairs, batch_size)
    model.train(was_training)
    return results


def evaluate_retrieval(
    model: SiglipResNetModel,
    processor: SiglipResNetProcessor,
    rows: datasets.Dataset,
    batch_size: int = 256,
    max_retrieval_images: int = 1000,
) -> dict[str, float]:
    """
    The figures of retrieval of [`evaluate_encoder`], for images and texts of which nothing else is known.

    Args:
        model, processor, batch_size, max_retrieval_images: as there.
        rows (`datasets.Dataset`): with `image` and `texts`, as of [`load_image_texts`]; the first so many are ranked.
    """
    was_training = model.training
    model.eval()
    rows = rows.select(range(min(len(rows), max_retrieval_images)))
    pictures, batches = StoredImages(rows, processor.image_processor), torch.arange(len(rows)).split(batch_size)
    embeds = torch.cat([embed_images(model, processor, pictures[batch], batch_size) for batch in batches])
    pairs = [(image, text) for image, texts in enumerate(rows["texts"]) for text in texts]
    results = _retrieval(model, processor, embeds, pairs, batch_size)
    model.train(was_training)
    return results


def _embed(
    model: SiglipResNetModel, processor: Any, images: datasets.Dataset, batch_size: int, what: str
) -> tuple[torch.Tensor, list[int]]:
    """Embeddings `(images, dim)`, see [`embed_images`], and a hash of each image's pixels; decoded batch by batch."""
    pictures = StoredImages(images.select_columns(["img"]).rename_column("img", "image"), processor.image_processor)
    embeds, hashes = [], []
    for batch in tqdm(torch.arange(len(images)).split(batch_size), desc=what, disable=None, leave=False):
        pixels = pictures[batch]  # (batch, 3, size, size), whatever their own sizes
        embeds.append(embed_images(model, processor, pixels, batch_size))
        hashes += [hash(picture.numpy().tobytes()) for picture in pixels]
    return torch.cat(embeds), hashes


def _zero_shot(logits: torch.Tensor, labels: torch.Tensor, output_dir: str | Path | None) -> dict[str, float]:
    probabilities = logits.double().softmax(1)  # (images, classes)
    confidences, predictions = probabilities.max(1)  # (images,)
    counts = confusion_counts(predictions, labels, len(CLASS_NAMES))
    if output_dir is not None:
        write_confusion_matrix(counts, CLASS_NAMES, Path(output_dir))
    is_class = F.one_hot(labels, len(CLASS_NAMES)).bool()  # (images, classes)
    recalls = dict(zip(CLASS_NAMES, per_class_scores(counts)["recall"].tolist(), strict=True))
    return {
        "zero_shot_top1": top1_accuracy(logits, labels),
        "majority/zero_shot": _majority(labels),
        "ece": expected_calibration_error(confidences, predictions == labels),
        "ece_sigmoid": expected_calibration_error(logits.sigmoid().flatten(), is_class.flatten()),
    } | {f"recall/{name}": recall for name, recall in recalls.items() if not math.isnan(recall)}


def _probes(
    embeds: torch.Tensor, labels: torch.Tensor, known: torch.Tensor, known_labels: torch.Tensor
) -> dict[str, float]:
    if len(known) == 0:
        logger.warning("every image for kNN and linear probe is also evaluated, so there are no such figures")
        return {}
    weight, bias = fit_linear_probe(known, known_labels, len(CLASS_NAMES))
    return {
        "knn_top1": top1_accuracy(knn_scores(embeds, known, known_labels, len(CLASS_NAMES)), labels),
        "majority/knn": _majority(labels),
        "linear_probe_top1": top1_accuracy(embeds.double() @ weight.t() + bias, labels),
        "majority/linear_probe": _majority(labels),
        "probe_count": len(known),
    }


def _majority(labels: torch.Tensor) -> float:
    return majority_share([CLASS_NAMES[label] for label in labels.tolist()])


def _retrieval(
    model: SiglipResNetModel, processor: Any, embeds: torch.Tensor, pairs: list[tuple[int, str]], batch_size: int
) -> dict[str, float]:
    texts: dict[str, int] = {}
    for _, text in pairs:
        texts.setdefault(text_key(text), len(texts))
    relevant = torch.zeros(len(embeds), len(texts), dtype=torch.bool)  # (images, texts)
    for image, text in pairs:
        relevant[image, texts[text_key(text)]] = True
    spellings = {text_key(text): text for _, text in reversed(pairs)}
    first_spelling = [spellings[key] for key in texts]
    text_embeds = embed_texts(model, processor, first_spelling, batch_size)
    scores = pairwise_logits(embeds, text_embeds, model.logit_scale.cpu(), model.logit_bias.cpu()).detach()
    results: dict[str, float] = {"retrieval_images": len(embeds), "retrieval_texts": len(texts)}
    for way, ranked, right in (("image_to_text", scores, relevant), ("text_to_image", scores.t(), relevant.t())):
        chance = chance_recall_at_k(right, RETRIEVAL_KS)
        for k, value in recall_at_k(ranked, right, RETRIEVAL_KS).items():
            results |= {f"{way}_r{k}": value, f"chance/{way}_r{k}": chance[k]}
    return results


__all__ = [
    "class_embeddings",
    "class_texts",
    "embed_images",
    "embed_texts",
    "evaluate_encoder",
    "evaluate_retrieval",
    "pool_texts",
]
