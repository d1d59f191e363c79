"""The encoder's figures against naive twins."""

import pytest
import torch

from sigphi.train import encoder_evaluation
from sigphi.train.collators import text_key
from sigphi.train.data import distinct_images
from sigphi.train.encoder_evaluation import class_embeddings, embed_images, embed_texts, evaluate_encoder, with_article
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images
from sigphi.train.vlm_evaluation import evaluate_vlm


def naive_recall(scores: torch.Tensor, relevant: list[list[bool]], k: int) -> float:
    hits = [
        any(wanted[i] for i in row.argsort(descending=True)[:k].tolist())
        for row, wanted in zip(scores, relevant, strict=True)
    ]
    return sum(hits) / len(hits)


def test_the_encoder_figures_equal_the_naive_ones(tiny_encoder, tiny_encoder_processor, toy_dataset):
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, batch_size=7)
    names = {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert results.keys() == names | {"zero_shot_top1", "majority/zero_shot"}
    images, positions = distinct_images(toy_dataset)
    embeds = embed_images(tiny_encoder, tiny_encoder_processor, decode_images(images, range(20)), 64)
    scores = embeds @ class_embeddings(tiny_encoder, tiny_encoder_processor).t()
    right = [int(row.argmax()) == label for row, label in zip(scores, images["label"], strict=True)]
    assert results["zero_shot_top1"] == pytest.approx(sum(right) / 20)
    most = max(images["label"][:].count(label) for label in range(10))
    assert results["majority/zero_shot"] == pytest.approx(most / 20)

    answers: list[set[str]] = [set() for _ in range(20)]
    for position, answer in zip(positions, toy_dataset["answer"], strict=True):
        answers[position].add(text_key(answer))
    spelling = {text_key(answer): answer for answer in reversed(toy_dataset["answer"][:])}
    keys = list(dict.fromkeys(text_key(answer) for answer in toy_dataset["answer"]))
    texts = embed_texts(tiny_encoder, tiny_encoder_processor, [spelling[key] for key in keys], 64)
    relevant = [[key in own for key in keys] for own in answers]
    for k in (1, 5, 10):
        assert results[f"image_to_text_r{k}"] == pytest.approx(naive_recall(embeds @ texts.t(), relevant, k))
        transposed = [list(column) for column in zip(*relevant, strict=True)]
        assert results[f"text_to_image_r{k}"] == pytest.approx(naive_recall(texts @ embeds.t(), transposed, k))


def test_retrieval_is_over_the_first_images_alone(tiny_encoder, tiny_encoder_processor, toy_dataset):
    _, positions = distinct_images(toy_dataset)
    few = toy_dataset.select([row for row, position in enumerate(positions) if position < 5])
    expected = evaluate_encoder(tiny_encoder, tiny_encoder_processor, few)
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, max_retrieval_images=5)
    for name in ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1"):
        assert results[name] == pytest.approx(expected[name])


def test_a_model_keeps_its_mode(tiny_encoder, tiny_encoder_processor, tiny_vlm, tiny_vlm_processor, toy_dataset):
    for mode in (True, False):
        evaluate_encoder(tiny_encoder.train(mode), tiny_encoder_processor, toy_dataset)
        assert tiny_encoder.training == mode
        evaluate_vlm(tiny_vlm.train(mode), tiny_vlm_processor, toy_dataset, max_new_tokens=1)
        assert tiny_vlm.training == mode


def test_class_embeddings_are_directions_and_differ(tiny_encoder, tiny_encoder_processor):
    embeds = class_embeddings(tiny_encoder, tiny_encoder_processor)
    assert embeds.shape == (10, 32)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(10))
    cat = [prompt.format("a cat") for prompt in encoder_evaluation.ZERO_SHOT_PROMPTS]
    mean = embed_texts(tiny_encoder, tiny_encoder_processor, cat, 64).mean(0)
    torch.testing.assert_close(embeds[CLASS_NAMES.index("cat")], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_articles():
    assert (with_article("airplane"), with_article("ship")) == ("an airplane", "a ship")
