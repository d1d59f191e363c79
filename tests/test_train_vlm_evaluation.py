"""The VLM's figures, with models whose answers are known."""

from typing import Any

import datasets
import pytest

from sigphi.train import vlm_evaluation
from sigphi.train.data import distinct_images
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images
from sigphi.train.metrics import majority_share
from sigphi.train.vlm_evaluation import encode_images, evaluate_vlm, generate_answers


def without_types(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.map(lambda row: {"question_type": "", "short_answer": ""}, load_from_cache_file=False)


def answer_by(monkeypatch, answer: Any) -> None:
    """Let the model's answers be those of `answer(row, image)`, `image` being `None` for the gray one."""

    def fake(model, processor, image_features, image_indices, questions, batch_size=64, max_new_tokens=80):
        gray = len(image_features) - 1
        return [answer(row, None if image == gray else image) for row, image in enumerate(image_indices)]

    monkeypatch.setattr(vlm_evaluation, "generate_answers", fake)


def is_finite(results: dict[str, float]) -> bool:
    return all(value == value and abs(value) < 1e6 for value in results.values())


def test_the_figures_of_a_real_model_are_those_promised_and_consistent(tiny_vlm, tiny_vlm_processor, toy_dataset):
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset, batch_size=32, max_new_tokens=4)
    kinds = {
        kind for kind, short in zip(toy_dataset["question_type"], toy_dataset["short_answer"], strict=True) if short
    }
    suffixes = ("", "_shuffled_image", "_blank_image")
    expected = {"eval_loss", "answer_count", "class_count", "image_gain", "class_image_gain", "majority/class"}
    expected |= {f"{name}{end}" for name in ("token_f1", "answer_accuracy", "class_accuracy") for end in suffixes}
    expected |= {f"{name}/{kind}" for name in ("accuracy", "majority", "image_gain") for kind in kinds}
    assert results.keys() == expected
    assert is_finite(results)
    gain = results["answer_accuracy"] - results["answer_accuracy_shuffled_image"]
    assert results["image_gain"] == pytest.approx(gain)
    assert results["answer_count"] == sum(bool(short) for short in toy_dataset["short_answer"])
    assert results["class_count"] == toy_dataset["question_type"][:].count("object") > 0


def test_a_perfect_model_that_answers_nothing_without_its_image_gains_everything(
    monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset
):
    _, positions = distinct_images(toy_dataset)
    truth = toy_dataset["answer"][:]
    answer_by(monkeypatch, lambda row, image: truth[row] if image == positions[row] else "")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset)
    for name in ("answer_accuracy", "class_accuracy", "token_f1", "image_gain", "class_image_gain"):
        assert results[name] == pytest.approx(1), name
    for name in ("answer_accuracy", "class_accuracy", "token_f1"):
        assert results[f"{name}_shuffled_image"] == results[f"{name}_blank_image"] == 0
    kinds = [name.partition("/")[2] for name in results if name.startswith("accuracy/")]
    assert kinds and all(results[f"accuracy/{kind}"] == results[f"image_gain/{kind}"] == 1 for kind in kinds)


def test_a_model_that_does_not_look_gains_nothing(monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset):
    truth = toy_dataset["answer"][:]
    answer_by(monkeypatch, lambda row, image: truth[row])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset)
    assert results["answer_accuracy"] == results["answer_accuracy_blank_image"] == 1
    gains = [value for name, value in results.items() if "image_gain" in name]
    assert gains and not any(gains)


def test_a_model_that_names_what_it_is_shown_is_wrong_for_every_other_image(
    monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset
):
    images, _ = distinct_images(toy_dataset)
    names = [CLASS_NAMES[label] for label in images["label"]]
    answer_by(monkeypatch, lambda row, image: "gray" if image is None else f"It is a {names[image]}.")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset)
    assert results["class_accuracy"] == results["class_image_gain"] == results["image_gain/object"] == 1
    assert results["class_accuracy_shuffled_image"] == results["class_accuracy_blank_image"] == 0


def test_a_model_of_one_answer_reaches_the_majority(monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset):
    pairs = zip(toy_dataset["question_type"], toy_dataset["short_answer"], strict=True)
    objects = [short for kind, short in pairs if kind == "object"]
    commonest = max(set(objects), key=objects.count)
    answer_by(monkeypatch, lambda row, image: f"It is a {commonest}.")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset)
    assert results["accuracy/object"] == results["majority/object"] == pytest.approx(majority_share(objects))
    assert results["class_accuracy"] == results["majority/class"]


def test_rows_without_types_are_judged_by_the_wording_of_the_question(
    monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset
):
    question = "What is the main object in this image?"
    plain = without_types(toy_dataset)
    plain = plain.map(
        lambda row, number: {"question": question if number % 5 == 0 else f"Anything {number}?"},
        with_indices=True,
        load_from_cache_file=False,
    )
    images, positions = distinct_images(plain)
    names = [CLASS_NAMES[images["label"][position]] for position in positions]
    answer_by(monkeypatch, lambda row, image: names[row])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, plain)
    assert results["class_count"] == len(plain) / 5
    assert results["class_accuracy"] == 1
    assert not [name for name in results if name.startswith(("answer_", "accuracy/", "majority/class/"))]
    assert "image_gain" not in results and results["class_image_gain"] == 0


def test_answers_come_in_the_order_of_the_questions(tiny_vlm, tiny_vlm_processor, toy_dataset):
    images, positions = distinct_images(toy_dataset)
    features = encode_images(tiny_vlm, tiny_vlm_processor, decode_images(images, range(len(images))))
    questions = toy_dataset["question"][:12]
    together = generate_answers(tiny_vlm, tiny_vlm_processor, features, positions[:12], questions, 5, 6)
    assert len(set(together)) > 3
    for row, question in enumerate(questions):
        alone = generate_answers(tiny_vlm, tiny_vlm_processor, features, [positions[row]], [question], 1, 6)
        assert alone == [together[row]]


def test_one_class_of_most_images_gives_no_shuffled_figure(tiny_vlm, tiny_vlm_processor, toy_dataset, caplog):
    labels = toy_dataset["label"]
    one = toy_dataset.select([row for row, label in enumerate(labels) if label == labels[0]])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, one, max_new_tokens=2)
    assert "answer_accuracy" in results and "answer_accuracy_blank_image" in results
    assert [name for name in results if "shuffled" in name or "gain" in name] == []
    assert "more than half of the images" in caplog.text
