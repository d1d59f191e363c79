"""The encoder against ground truth: zero-shot classification and retrieval."""

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, pairwise_logits
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.train.collators import preprocess, text_key
from sigphi.train.data import distinct_images
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images
from sigphi.train.metrics import majority_share, recall_at_k, top1_accuracy

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
def pool_texts(
    model: SiglipResNetModel, processor: Any, texts: Sequence[str], batch_size: int = 256, max_length: int = 64
) -> torch.Tensor:
    """
    What the text projection reads, float32, of shape `(texts, hidden_size)`, on the CPU; similar lengths together.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    pooled = torch.empty(len(texts), model.text_model.projection.in_features)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        part = [texts[row] for row in rows]
        tokens = processor.tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        tokens = tokens.to(model.device)
        pooled[rows] = model.text_model.pool(tokens["input_ids"], tokens["attention_mask"])[1].float().cpu()
    model.train(was_training)
    return pooled


@torch.no_grad()
def embed_texts(model: SiglipResNetModel, processor: Any, texts: Sequence[str], batch_size: int) -> torch.Tensor:
    """L2-normalised text embeddings, float32, of shape `(texts, projection_dim)`, on the CPU."""
    pooled = pool_texts(model, processor, texts, batch_size).to(model.device)
    return model(text_features=pooled).text_embeds.cpu()


def class_embeddings(model: SiglipResNetModel, processor: Any, batch_size: int = 64) -> torch.Tensor:
    """One L2-normalised embedding a class, of shape `(10, projection_dim)`: the mean over [`ZERO_SHOT_PROMPTS`]."""
    texts = [prompt.format(with_article(name)) for name in CLASS_NAMES for prompt in ZERO_SHOT_PROMPTS]
    embeds = embed_texts(model, processor, texts, batch_size)  # (classes * prompts, dim)
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
) -> dict[str, float]:
    """
    Zero-shot classification and retrieval.

    Args:
        model (`SiglipResNetModel`): with its text tower.
        processor (`SiglipResNetProcessor`): the model's.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`]; the images behind its rows are classified.
        batch_size (`int`, *optional*, defaults to 256): images or texts in a step.
        max_retrieval_images (`int`, *optional*, defaults to 1000): retrieval ranks the first so many images and all
            their distinct texts. Recall depends on this number.

    Returns:
        `dict`: `zero_shot_top1` beside `majority/zero_shot`, and `image_to_text_r1`, `_r5`, `_r10`,
        `text_to_image_r1`, `_r5`, `_r10`: the share of queries with a right item among the first k, where equal texts
        are one item that all their images share.
    """
    was_training = model.training
    model.eval()
    images, positions = distinct_images(dataset)
    pixels = decode_images(images, range(len(images)))
    embeds = embed_images(model, processor, pixels, batch_size)  # (images, dim)
    labels = torch.tensor(images["label"])
    scores = embeds @ class_embeddings(model, processor, batch_size).t()  # (images, classes)
    results = {
        "zero_shot_top1": top1_accuracy(scores, labels),
        "majority/zero_shot": majority_share([CLASS_NAMES[label] for label in labels.tolist()]),
    }
    pairs = [(i, a) for i, a in zip(positions, dataset["answer"], strict=True) if i < max_retrieval_images]
    results |= _retrieval(model, processor, embeds[:max_retrieval_images], pairs, batch_size)
    model.train(was_training)
    return results


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
    found = {f"image_to_text_r{k}": value for k, value in recall_at_k(scores, relevant, RETRIEVAL_KS).items()}
    return found | {
        f"text_to_image_r{k}": value for k, value in recall_at_k(scores.t(), relevant.t(), RETRIEVAL_KS).items()
    }


# VLM -------------------------------------------------------------------------------------------------------------


__all__ = ["class_embeddings", "embed_images", "embed_texts", "evaluate_encoder", "pool_texts"]
