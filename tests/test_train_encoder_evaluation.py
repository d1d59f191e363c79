"""The encoder's figures against naive twins, and its confusion matrix."""

import json
import math

import datasets
import pytest
import torch
from conftest import TOY_IMAGES
from PIL import Image
from sklearn.linear_model import LogisticRegression

from sigphi.train import encoder_evaluation, report
from sigphi.train.collators import text_key
from sigphi.train.data import distinct_images
from sigphi.train.encoder_evaluation import class_embeddings, embed_images, embed_texts, evaluate_encoder, with_article
from sigphi.train.encoder_options import probe_images
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images
from sigphi.train.metrics import knn_scores, per_class_scores
from sigphi.train.vlm_evaluation import evaluate_vlm


def naive_recall(scores: torch.Tensor, relevant: list[list[bool]], k: int) -> float:
    hits = [
        any(wanted[i] for i in row.argsort(descending=True)[:k].tolist())
        for row, wanted in zip(scores, relevant, strict=True)
    ]
    return sum(hits) / len(hits)


def missed_by_chance(candidates: int, right: int, k: int) -> float:
    return math.comb(candidates - right, k) / math.comb(candidates, k)


def naive_calibration_error(confidences: list[float], correct: list[bool]) -> float:
    gaps = [0.0] * 15
    for confidence, right in zip(confidences, correct, strict=True):
        gaps[math.ceil(confidence * 15) - 1] += right - confidence
    return sum(map(abs, gaps)) / len(confidences)


def test_images_may_differ_in_size(tiny_encoder, tiny_encoder_processor, toy_dataset):
    sizes = [(32, 32), (20, 50), (64, 48)]
    mixed = toy_dataset.map(lambda row: {"image": row["image"].resize(sizes[row["dataset_index"] % 3])})
    images, _ = distinct_images(mixed)
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, mixed, batch_size=7, probe=images.select([0]))
    assert {image.size for image in images["img"]} == set(sizes)
    with torch.no_grad():
        inputs = [tiny_encoder_processor(images=image, return_tensors="pt") for image in images["img"]]
        embeds = torch.cat([tiny_encoder(**one).image_embeds for one in inputs])
    scores = embeds @ class_embeddings(tiny_encoder, tiny_encoder_processor).t()
    right = scores.argmax(1) == torch.tensor(images["label"][:])
    assert results["zero_shot_top1"] == pytest.approx(right.double().mean().item())
    assert "knn_top1" not in results  # the one image to fit on is evaluated too


def test_the_encoder_figures_equal_the_naive_ones(tiny_encoder, tiny_encoder_processor, toy_dataset):
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, batch_size=7)
    images, positions = distinct_images(toy_dataset)
    names = {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    names |= {f"chance/{name}" for name in names} | {f"recall/{CLASS_NAMES[label]}" for label in images["label"]}
    names |= {"zero_shot_top1", "majority/zero_shot", "ece", "ece_sigmoid", "retrieval_images", "retrieval_texts"}
    assert results.keys() == names
    embeds = embed_images(tiny_encoder, tiny_encoder_processor, decode_images(images, range(20)), 64)
    scores = embeds @ class_embeddings(tiny_encoder, tiny_encoder_processor).t()
    right = [int(row.argmax()) == label for row, label in zip(scores, images["label"], strict=True)]
    assert results["zero_shot_top1"] == pytest.approx(sum(right) / 20)
    most = max(images["label"][:].count(label) for label in range(10))
    assert results["majority/zero_shot"] == pytest.approx(most / 20)

    labels = images["label"][:]
    for own in set(labels):
        mine = [ok for ok, label in zip(right, labels, strict=True) if label == own]
        assert results[f"recall/{CLASS_NAMES[own]}"] == pytest.approx(sum(mine) / len(mine))
    probabilities = (scores * tiny_encoder.logit_scale.exp()).softmax(1).max(1).values.tolist()
    assert results["ece"] == pytest.approx(naive_calibration_error(probabilities, right), abs=1e-6)
    sigmoids = (scores * tiny_encoder.logit_scale.exp() + tiny_encoder.logit_bias).sigmoid().flatten().tolist()
    is_class = [label == own for label in labels for own in range(10)]
    assert results["ece_sigmoid"] == pytest.approx(naive_calibration_error(sigmoids, is_class), abs=1e-6)

    answers: list[set[str]] = [set() for _ in range(20)]
    for position, answer in zip(positions, toy_dataset["answer"], strict=True):
        answers[position].add(text_key(answer))
    spelling = {text_key(answer): answer for answer in reversed(toy_dataset["answer"][:])}
    keys = list(dict.fromkeys(text_key(answer) for answer in toy_dataset["answer"]))
    assert (results["retrieval_images"], results["retrieval_texts"]) == (20, len(keys))
    texts = embed_texts(tiny_encoder, tiny_encoder_processor, [spelling[key] for key in keys], 64)
    relevant = [[key in own for key in keys] for own in answers]
    for k in (1, 5, 10):
        assert results[f"image_to_text_r{k}"] == pytest.approx(naive_recall(embeds @ texts.t(), relevant, k))
        chance = 1 - sum(missed_by_chance(len(keys), sum(own), k) for own in relevant) / 20
        assert results[f"chance/image_to_text_r{k}"] == pytest.approx(chance)
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


def test_a_figure_that_is_undefined_is_absent(tiny_encoder, tiny_encoder_processor, toy_dataset):
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, human_counts=torch.ones(20, 10))
    assert results["human_cross_entropy"] > results["human_entropy"] == pytest.approx(math.log(10))
    assert "human_entropy_correlation" not in results


# Probes --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(toy_dataset: datasets.Dataset) -> datasets.Dataset:
    """Fifty drawn pictures of the toy split that `toy_dataset` does not hold."""
    return probe_images(TOY_IMAGES, "train", 50, toy_dataset)


def test_probes_are_fitted_on_the_images_given(tiny_encoder, tiny_encoder_processor, toy_dataset, probe):
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, batch_size=7, probe=probe)
    images, _ = distinct_images(toy_dataset)
    embeds, known = (
        embed_images(tiny_encoder, tiny_encoder_processor, decode_images(part, range(len(part))), 64)
        for part in (images, probe)
    )
    predictions = knn_scores(embeds, known, torch.tensor(probe["label"]), 10).argmax(1).tolist()
    right = [one == label for one, label in zip(predictions, images["label"], strict=True)]
    assert results["knn_top1"] == pytest.approx(sum(right) / 20)
    assert results["probe_count"] == 50
    assert results["majority/knn"] == results["majority/linear_probe"] == results["majority/zero_shot"]
    fitted = LogisticRegression(C=1 / (1e-4 * 50), tol=1e-8, max_iter=10_000).fit(known.double(), probe["label"][:])
    assert results["linear_probe_top1"] == pytest.approx(fitted.score(embeds.double(), images["label"][:]))


def test_images_with_evaluated_pixels_are_no_probes_under_any_name(
    tiny_encoder, tiny_encoder_processor, toy_dataset, probe, caplog
):
    images, _ = distinct_images(toy_dataset)
    mixed = datasets.concatenate_datasets([images.cast(probe.features), probe])
    expected = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, probe=probe)
    assert evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, probe=mixed) == pytest.approx(expected)
    assert not caplog.text
    without = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, probe=images)
    assert "so there are no such figures" in caplog.text
    assert "knn_top1" not in without and "probe_count" not in without


# Confusion -----------------------------------------------------------------------------------------------------------


def test_the_confusion_matrix_is_written_as_numbers_and_picture(
    tiny_encoder, tiny_encoder_processor, toy_dataset, tmp_path
):
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset, output_dir=tmp_path)
    content = json.loads((tmp_path / "confusion_matrix.json").read_text())
    images, _ = distinct_images(toy_dataset)
    assert content["classes"] == list(CLASS_NAMES)
    assert [sum(row) for row in content["counts"]] == [images["label"][:].count(label) for label in range(10)]
    hits = sum(content["counts"][label][label] for label in range(10))
    assert hits / 20 == pytest.approx(results["zero_shot_top1"])
    for name, scores in content["per_class"].items():
        assert scores["recall"] == results.get(f"recall/{name}")
    with Image.open(tmp_path / "confusion_matrix.png") as picture:
        assert picture.width > picture.height > 500


def test_undefined_scores_are_null(tmp_path):
    counts = torch.tensor([[2, 0], [0, 0]])
    report.write_confusion_matrix(counts, ("a", "b"), tmp_path)
    content = json.loads((tmp_path / "confusion_matrix.json").read_text())
    assert content["counts"] == [[2, 0], [0, 0]]
    assert content["per_class"]["a"] == {"precision": 1, "recall": 1, "f1": 1, "support": 2}
    assert content["per_class"]["b"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert per_class_scores(counts)["f1"].isnan().tolist() == [False, True]


def test_without_matplotlib_no_old_picture_stays_beside_new_numbers(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report, "is_matplotlib_available", lambda: False)
    (tmp_path / "confusion_matrix.png").write_bytes(b"of an earlier evaluation")
    report.write_confusion_matrix(torch.eye(2, dtype=torch.long), ("a", "b"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["confusion_matrix.json"]
    assert "pip install 'sigphi[eval]'" in caplog.text
