"""The VLM's figures, with models whose answers are known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

from sigphi.train import vlm_evaluation
from sigphi.train.answering import Answerer, generate_answers
from sigphi.train.data import distinct_images
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images
from sigphi.train.metrics import majority_share
from sigphi.train.predictions import Given
from sigphi.train.prompts import tokenize_questions
from sigphi.train.vlm_evaluation import encode_images, evaluate_vlm


def without_types(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.map(lambda row: {"question_type": "", "short_answer": ""}, load_from_cache_file=False)


def numbered(dataset: datasets.Dataset) -> datasets.Dataset:
    """With another question in each row: then a question alone says which row is meant."""
    return dataset.map(
        lambda row, number: {"question": f"{number}: {row['question']}"}, with_indices=True, load_from_cache_file=False
    )


def answer_by(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, int | None], str]) -> None:
    """Let the model's answers be those of `answer(question, image)`, `image` being `None` for the gray one."""

    def fake(
        model: Any, processor: Any, image_features: Any, image_indices: Any, questions: Any, *options: Any
    ) -> list[Given]:
        gray = len(image_features) - 1
        pairs = zip(questions, image_indices, strict=True)
        return [Given(answer(question, None if image == gray else image), 0.5) for question, image in pairs]

    monkeypatch.setattr(vlm_evaluation, "generate_answers", fake)


def is_finite(results: dict[str, float]) -> bool:
    return all(value == value and abs(value) < 1e6 for value in results.values())


def test_the_figures_of_a_real_model_are_those_promised_and_consistent(tiny_vlm, tiny_vlm_processor, toy_dataset):
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset, batch_size=32, max_new_tokens=4)
    pairs = zip(toy_dataset["question_type"], toy_dataset["short_answer"], strict=True)
    kinds = {kind for kind, short in pairs if short and kind != "description"}
    suffixes = ("", "_shuffled_image", "_blank_image")
    expected = {"eval_loss", "answer_count", "class_count", "image_gain", "class_image_gain", "majority/class"}
    expected |= {"hallucination_rate", "hallucination_count"}
    expected |= {f"refusal_{name}" for name in ("precision", "recall", "f1", "count")}
    names = ["token_f1", "rougeL", "bleu", "answer_accuracy", "class_accuracy"]
    names += ["description_precision", "description_recall"]
    expected |= {f"{name}{end}" for name in names for end in suffixes}
    expected |= {f"{name}/{kind}" for name in ("accuracy", "majority", "image_gain") for kind in kinds}
    assert results.keys() == expected
    assert is_finite(results)
    gain = results["answer_accuracy"] - results["answer_accuracy_shuffled_image"]
    assert results["image_gain"] == pytest.approx(gain)
    shorts = zip(toy_dataset["short_answer"], toy_dataset["question_type"], strict=True)
    assert results["answer_count"] == sum(bool(short) and kind != "description" for short, kind in shorts)
    assert results["class_count"] == toy_dataset["question_type"][:].count("object") > 0


def test_a_perfect_model_that_answers_nothing_without_its_image_gains_everything(
    monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset
):
    dataset = numbered(toy_dataset)
    _, positions = distinct_images(dataset)
    truth = dict(zip(zip(dataset["question"], positions, strict=True), dataset["answer"], strict=True))
    answer_by(monkeypatch, lambda question, image: truth.get((question, image), ""))
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset)
    names = ["answer_accuracy", "class_accuracy", "token_f1", "rougeL", "bleu"]
    names += ["description_precision", "description_recall"]
    perfect = ["image_gain", "class_image_gain", "refusal_precision", "refusal_recall", "refusal_f1"]
    for name in names + perfect:
        assert results[name] == pytest.approx(1), name
    for name in names:
        assert results[f"{name}_shuffled_image"] == results[f"{name}_blank_image"] == 0
    assert results["hallucination_rate"] == 0
    kinds = [name.partition("/")[2] for name in results if name.startswith("accuracy/")]
    assert kinds and all(results[f"accuracy/{kind}"] == results[f"image_gain/{kind}"] == 1 for kind in kinds)


def test_a_model_that_does_not_look_gains_nothing(monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset):
    dataset = numbered(toy_dataset)
    truth = dict(zip(dataset["question"], dataset["answer"], strict=True))
    answer_by(monkeypatch, lambda question, image: truth[question])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset)
    assert results["answer_accuracy"] == results["answer_accuracy_blank_image"] == 1
    gains = [value for name, value in results.items() if "image_gain" in name]
    assert gains and not any(gains)


def test_a_real_model_that_cannot_look_gains_nothing(tiny_vlm, tiny_vlm_processor, toy_dataset):
    torch.nn.init.zeros_(tiny_vlm.model.multi_modal_projector.linear_2.weight)
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset, max_new_tokens=8)
    assert abs(results["image_gain"]) <= 0.02
    assert results["token_f1"] == results["token_f1_shuffled_image"] == results["token_f1_blank_image"] > 0


def test_a_model_that_names_what_it_is_shown_is_wrong_for_every_other_image(
    monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset
):
    images, _ = distinct_images(toy_dataset)
    names = [CLASS_NAMES[label] for label in images["label"]]
    answer_by(monkeypatch, lambda question, image: "gray" if image is None else f"It is a {names[image]}.")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset)
    assert results["class_accuracy"] == results["class_image_gain"] == results["image_gain/object"] == 1
    assert results["class_accuracy_shuffled_image"] == results["class_accuracy_blank_image"] == 0


BLIND = "does not look at its image"


def test_a_model_that_cannot_look_is_told_so(tiny_vlm, tiny_vlm_processor, toy_dataset, caplog):
    torch.nn.init.zeros_(tiny_vlm.model.multi_modal_projector.linear_2.weight)
    evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset, max_new_tokens=2)
    (line,) = [record.getMessage() for record in caplog.records if BLIND in record.getMessage()]
    assert "+0.000" in line and line.startswith("WARNING")


@pytest.mark.parametrize("has_types", [True, False])
@pytest.mark.parametrize("looks", [True, False])
def test_only_a_model_that_does_not_look_is_warned_of(
    looks, has_types, monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset, caplog
):
    dataset = toy_dataset.filter(lambda row: row["question_type"] == "object", load_from_cache_file=False)
    dataset = dataset.map(lambda row: {"question": "What is in this image?"}, load_from_cache_file=False)
    labels = distinct_images(dataset)[0]["label"]
    shown = {image: CLASS_NAMES[label] if looks else "cat" for image, label in enumerate(labels)} | {None: "cat"}
    answer_by(monkeypatch, lambda question, image: f"A {shown[image]}.")
    evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset if has_types else without_types(dataset))
    assert (BLIND in caplog.text) is not looks


def test_refusals_alone_say_nothing_of_looking(monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset, caplog):
    refusals = toy_dataset.filter(lambda row: row["question_type"] == "refusal", load_from_cache_file=False)
    answer_by(monkeypatch, lambda question, image: "I cannot tell.")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, refusals)
    assert results["image_gain"] == 0 and results["refusal_f1"] == 1
    assert BLIND not in caplog.text


def test_a_model_of_one_answer_reaches_the_majority(monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset):
    pairs = zip(toy_dataset["question_type"], toy_dataset["short_answer"], strict=True)
    objects = [short for kind, short in pairs if kind == "object"]
    commonest = max(set(objects), key=objects.count)
    answer_by(monkeypatch, lambda question, image: f"It is a {commonest}.")
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
    labels = distinct_images(plain)[0]["label"]
    answer_by(monkeypatch, lambda question, image: "gray" if image is None else CLASS_NAMES[labels[image]])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, plain)
    assert results["class_count"] == len(plain) / 5
    assert results["class_accuracy"] == results["class_image_gain"] == 1
    assert results["class_accuracy_shuffled_image"] == 0
    assert {f"{name}{end}" for name in ("token_f1", "rougeL") for end in ("", "_shuffled_image")} <= results.keys()
    without_rows = ("answer_", "accuracy/", "majority/class/", "refusal", "description")
    assert not [name for name in results if name.startswith(without_rows)]
    assert "image_gain" not in results


def test_without_the_extra_its_figures_alone_are_left_out(
    monkeypatch, tiny_vlm, tiny_vlm_processor, toy_dataset, caplog
):
    part = toy_dataset.select(range(20))
    complete = evaluate_vlm(tiny_vlm, tiny_vlm_processor, part, max_new_tokens=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, part, max_new_tokens=2)
    assert {name for name in complete if name.startswith(("rougeL", "bleu"))} == complete.keys() - results.keys()
    assert caplog.text.count("sigphi[eval]") == 1


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def features(tiny_vlm, tiny_vlm_processor, toy_dataset) -> torch.Tensor:
    images, _ = distinct_images(toy_dataset)
    return encode_images(tiny_vlm, tiny_vlm_processor, decode_images(images, range(len(images))))


def test_answers_come_in_the_order_of_the_questions(tiny_vlm, tiny_vlm_processor, toy_dataset, features):
    _, positions = distinct_images(toy_dataset)
    questions = toy_dataset["question"][:12]
    together = generate_answers(tiny_vlm, tiny_vlm_processor, features, positions[:12], questions, 5, 6)
    assert len({one.text for one in together}) > 3
    for row, question in enumerate(questions):
        (alone,) = generate_answers(tiny_vlm, tiny_vlm_processor, features, [positions[row]], [question], 1, 6)
        assert alone.text == together[row].text
        assert alone.confidence == pytest.approx(together[row].confidence, rel=1e-4)


def test_the_same_question_about_the_same_image_is_answered_once(tiny_vlm, tiny_vlm_processor, features, monkeypatch):
    sizes = []
    generate = tiny_vlm.generate
    monkeypatch.setattr(
        tiny_vlm, "generate", lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    questions = ["What is it?", "Which color?", "What is it?", "What is it?", "Which color?"]
    given = generate_answers(tiny_vlm, tiny_vlm_processor, features, [0, 0, 1, 0, 0], questions, 2, 4)
    assert sizes == [2, 1]
    assert given[0] == given[3] and given[1] == given[4] and given[0] != given[2]


@torch.no_grad()
def test_confidence_is_the_mean_probability_of_the_answers_tokens(tiny_vlm, tiny_vlm_processor, features):
    tokenizer = tiny_vlm_processor.tokenizer
    # One that ends before the others, so that it is padded.
    ending = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tiny_vlm.lm_head.bias[ending] += 3
    questions = ["What is it?", "Which color is the dog?", "Is this a ship?", "What is on the blue sea?"]
    given = generate_answers(tiny_vlm, tiny_vlm_processor, features, [0, 1, 2, 3], questions, 4, 7)
    lengths = set()
    for image, (question, one) in enumerate(zip(questions, given, strict=True)):
        ids = torch.tensor([tokenize_questions(tiny_vlm_processor, [question])[0]])
        probability, count = 1.0, 0
        while count < 7 and (count == 0 or ids[0, -1] != ending):
            output = tiny_vlm(input_ids=ids, image_features=features[[image]])
            scores = output.logits[0, -1]
            scores[tiny_vlm.generation_config.suppress_tokens] = -torch.inf
            best = scores.argmax()
            probability *= scores.softmax(-1)[best].item()
            ids, count = torch.cat([ids, best.view(1, 1)], 1), count + 1
        lengths.add(count)
        assert one.confidence == pytest.approx(probability ** (1 / count), rel=1e-4)
    assert len(lengths) > 1


# A table of all answers, and going on after a kill -------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "predictions.parquet")


def test_every_answer_is_in_the_table(tiny_vlm, tiny_vlm_processor, toy_dataset, tmp_path, monkeypatch):
    dataset = numbered(toy_dataset)
    _, positions = distinct_images(dataset)
    answer_by(monkeypatch, lambda question, image: f"{question} {image} a cat")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset, predictions_file=tmp_path / "predictions.parquet")
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert leftovers(tmp_path) == []
    columns = ["split", "dataset_index", "class_name", "question", "true_answer", "question_type", "short_answer"]
    columns += [
        f"{name}{end}"
        for end in ("", "_shuffled_image", "_blank_image")
        for name in ("given_answer", "confidence", "correct")
    ]
    assert list(table) == columns
    for name, column in (("question", "question"), ("answer", "true_answer"), ("dataset_index", "dataset_index")):
        assert table[column].tolist() == dataset[name][:]
    assert table["class_name"].tolist() == [CLASS_NAMES[label] for label in dataset["label"]]
    expected = [f"{question} {image} a cat" for question, image in zip(dataset["question"], positions, strict=True)]
    assert table["given_answer"].tolist() == expected
    assert table["given_answer_blank_image"].tolist() == [f"{question} None a cat" for question in dataset["question"]]
    other = table["given_answer_shuffled_image"].tolist()
    assert all(one != two and two.endswith(" a cat") for one, two in zip(expected, other, strict=True))
    for end in ("", "_shuffled_image", "_blank_image"):
        assert table[f"correct{end}"].mean() == pytest.approx(results[f"answer_accuracy{end}"])
    assert table["correct"].isna().tolist() == [kind == "description" for kind in dataset["question_type"]]


def test_a_set_without_another_image_has_empty_cells(tiny_vlm, tiny_vlm_processor, toy_dataset, tmp_path):
    one = toy_dataset.select(range(3))
    evaluate_vlm(
        tiny_vlm, tiny_vlm_processor, one, max_new_tokens=2, predictions_file=tmp_path / "predictions.parquet"
    )
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert table[[name for name in table if name.endswith("_shuffled_image")]].isna().all(axis=None)
    assert table["given_answer_blank_image"].notna().all()


class Killed(BaseException):
    """Ends a process where it stands."""


@pytest.fixture
def killed_after(monkeypatch):
    """`killed_after(count)`: the batch behind so many is the last thing that this process tries."""
    real = Answerer.answer

    def arrange(count: int | None) -> list[int]:
        done: list[int] = []

        def answer(*inputs: Any) -> Any:
            if len(done) == count:
                raise Killed
            done.append(1)
            return real(*inputs)

        monkeypatch.setattr(Answerer, "answer", answer)
        return done

    return arrange


def test_a_killed_evaluation_goes_on_where_it_stopped(
    tiny_vlm, tiny_vlm_processor, toy_dataset, tmp_path, killed_after
):
    options = {"batch_size": 16, "max_new_tokens": 4}
    whole = killed_after(None)
    (tmp_path / "whole").mkdir()
    expected = evaluate_vlm(
        tiny_vlm,
        tiny_vlm_processor,
        toy_dataset,
        **options,
        predictions_file=tmp_path / "whole" / "predictions.parquet",
    )
    path = tmp_path / "broken" / "predictions.parquet"
    path.parent.mkdir()
    for count in (3, 2):
        killed_after(count)
        with pytest.raises(Killed):
            evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset, **options, predictions_file=path)
        assert len(leftovers(path.parent)) == 1
    rest = killed_after(None)
    assert evaluate_vlm(tiny_vlm, tiny_vlm_processor, toy_dataset, **options, predictions_file=path) == expected
    assert len(rest) == len(whole) - 5 > 0
    assert path.read_bytes() == (tmp_path / "whole" / "predictions.parquet").read_bytes()
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("change", ["weight", "question", "batch size", "answer length"])
def test_answers_of_another_evaluation_are_not_taken_over(
    change, tiny_vlm, tiny_vlm_processor, toy_dataset, tmp_path, killed_after
):
    options: dict[str, Any] = {"batch_size": 16, "max_new_tokens": 2}
    whole = killed_after(None)
    part = toy_dataset.select(range(40))
    evaluate_vlm(tiny_vlm, tiny_vlm_processor, part, **options)
    killed_after(2)
    path = tmp_path / "predictions.parquet"
    with pytest.raises(Killed):
        evaluate_vlm(tiny_vlm, tiny_vlm_processor, part, **options, predictions_file=path)
    if change == "weight":
        with torch.no_grad():
            tiny_vlm.lm_head.bias[0] += 1e-3
    elif change == "question":
        part = part.map(lambda row: {"question": row["question"] + "?"}, load_from_cache_file=False)
    else:
        options |= {"batch_size": 15} if change == "batch size" else {"max_new_tokens": 3}
    done = killed_after(None)
    evaluate_vlm(tiny_vlm, tiny_vlm_processor, part, **options, predictions_file=path)
    assert len(done) >= len(whole)
    assert leftovers(tmp_path) == []


def test_one_class_of_most_images_gives_no_shuffled_figure(tiny_vlm, tiny_vlm_processor, toy_dataset, caplog):
    labels = toy_dataset["label"]
    one = toy_dataset.select([row for row, label in enumerate(labels) if label == labels[0]])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, one, max_new_tokens=2)
    assert "answer_accuracy" in results and "answer_accuracy_blank_image" in results
    assert [name for name in results if "shuffled" in name or "gain" in name] == []
    assert "more than half of the images" in caplog.text
