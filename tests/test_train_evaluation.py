"""Evaluation: its figures, which rows count, and prompts as at inference."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import TOY_IMAGES

from sigphi.train import evaluation
from sigphi.train.collators import text_key
from sigphi.train.data import data_facts, distinct_images, held_out, load_cifar10_qa
from sigphi.train.encoder_evaluation import class_embeddings, embed_images, embed_texts, evaluate_encoder, with_article
from sigphi.train.errors import UserError
from sigphi.train.evaluation import evaluate_folder, only_unseen, results_table
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images
from sigphi.train.metrics import majority_share
from sigphi.train.prompts import prepare_tokenizer, tokenize_questions, tokenized_rows
from sigphi.train.vlm_evaluation import encode_images, evaluate_vlm, generate_answers

NUM_IMAGES = 20


@pytest.fixture(scope="module")
def dataset(toy_csv: Path) -> datasets.Dataset:
    """The questions about 20 pictures."""
    data = load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=1.0)["eval"]
    _, positions = distinct_images(data)
    return data.select([row for row, position in enumerate(positions) if position < NUM_IMAGES])


def without_types(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.map(lambda row: {"question_type": "", "short_answer": ""}, load_from_cache_file=False)


# Encoder -------------------------------------------------------------------------------------------------------------


def naive_recall(scores: torch.Tensor, relevant: list[list[bool]], k: int) -> float:
    hits = [
        any(wanted[i] for i in row.argsort(descending=True)[:k].tolist())
        for row, wanted in zip(scores, relevant, strict=True)
    ]
    return sum(hits) / len(hits)


def test_the_encoder_figures_equal_the_naive_ones(tiny_encoder, tiny_encoder_processor, dataset):
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, dataset, batch_size=7)
    names = {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert results.keys() == names | {"zero_shot_top1", "majority/zero_shot"}
    images, positions = distinct_images(dataset)
    embeds = embed_images(tiny_encoder, tiny_encoder_processor, decode_images(images, range(NUM_IMAGES)), 64)
    scores = embeds @ class_embeddings(tiny_encoder, tiny_encoder_processor).t()
    right = [int(row.argmax()) == label for row, label in zip(scores, images["label"], strict=True)]
    assert results["zero_shot_top1"] == pytest.approx(sum(right) / NUM_IMAGES)
    most = max(images["label"][:].count(label) for label in range(10))
    assert results["majority/zero_shot"] == pytest.approx(most / NUM_IMAGES)

    answers: list[set[str]] = [set() for _ in range(NUM_IMAGES)]
    for position, answer in zip(positions, dataset["answer"], strict=True):
        answers[position].add(text_key(answer))
    spelling = {text_key(answer): answer for answer in reversed(dataset["answer"][:])}
    keys = list(dict.fromkeys(text_key(answer) for answer in dataset["answer"]))
    texts = embed_texts(tiny_encoder, tiny_encoder_processor, [spelling[key] for key in keys], 64)
    relevant = [[key in own for key in keys] for own in answers]
    for k in (1, 5, 10):
        assert results[f"image_to_text_r{k}"] == pytest.approx(naive_recall(embeds @ texts.t(), relevant, k))
        transposed = [list(column) for column in zip(*relevant, strict=True)]
        assert results[f"text_to_image_r{k}"] == pytest.approx(naive_recall(texts @ embeds.t(), transposed, k))


def test_retrieval_is_over_the_first_images_alone(tiny_encoder, tiny_encoder_processor, dataset):
    _, positions = distinct_images(dataset)
    few = dataset.select([row for row, position in enumerate(positions) if position < 5])
    expected = evaluate_encoder(tiny_encoder, tiny_encoder_processor, few)
    results = evaluate_encoder(tiny_encoder, tiny_encoder_processor, dataset, max_retrieval_images=5)
    for name in ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1"):
        assert results[name] == pytest.approx(expected[name])


def test_a_model_keeps_its_mode(tiny_encoder, tiny_encoder_processor, tiny_vlm, tiny_vlm_processor, dataset):
    for mode in (True, False):
        evaluate_encoder(tiny_encoder.train(mode), tiny_encoder_processor, dataset)
        assert tiny_encoder.training == mode
        evaluate_vlm(tiny_vlm.train(mode), tiny_vlm_processor, dataset, max_new_tokens=1)
        assert tiny_vlm.training == mode


def test_class_embeddings_are_directions_and_differ(tiny_encoder, tiny_encoder_processor):
    embeds = class_embeddings(tiny_encoder, tiny_encoder_processor)
    assert embeds.shape == (10, 32)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(10))
    cat = [prompt.format("a cat") for prompt in evaluation.ZERO_SHOT_PROMPTS]
    mean = embed_texts(tiny_encoder, tiny_encoder_processor, cat, 64).mean(0)
    torch.testing.assert_close(embeds[CLASS_NAMES.index("cat")], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_articles():
    assert (with_article("airplane"), with_article("ship")) == ("an airplane", "a ship")


# VLM -----------------------------------------------------------------------------------------------------------------


def answer_by(monkeypatch, answer: Any) -> None:
    """Let the model's answers be those of `answer(row, image)`, `image` being `None` for the gray one."""

    def fake(model, processor, image_features, image_indices, questions, batch_size=64, max_new_tokens=80):
        gray = len(image_features) - 1
        return [answer(row, None if image == gray else image) for row, image in enumerate(image_indices)]

    monkeypatch.setattr(evaluation, "generate_answers", fake)


def is_finite(results: dict[str, float]) -> bool:
    return all(value == value and abs(value) < 1e6 for value in results.values())


def test_the_figures_of_a_real_model_are_those_promised_and_consistent(tiny_vlm, tiny_vlm_processor, dataset):
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset, batch_size=32, max_new_tokens=4)
    kinds = {kind for kind, short in zip(dataset["question_type"], dataset["short_answer"], strict=True) if short}
    suffixes = ("", "_shuffled_image", "_blank_image")
    expected = {"eval_loss", "answer_count", "class_count", "image_gain", "class_image_gain", "majority/class"}
    expected |= {f"{name}{end}" for name in ("token_f1", "answer_accuracy", "class_accuracy") for end in suffixes}
    expected |= {f"{name}/{kind}" for name in ("accuracy", "majority", "image_gain") for kind in kinds}
    assert results.keys() == expected
    assert is_finite(results)
    gain = results["answer_accuracy"] - results["answer_accuracy_shuffled_image"]
    assert results["image_gain"] == pytest.approx(gain)
    assert results["answer_count"] == sum(bool(short) for short in dataset["short_answer"])
    assert results["class_count"] == dataset["question_type"][:].count("object") > 0


def test_a_perfect_model_that_answers_nothing_without_its_image_gains_everything(
    monkeypatch, tiny_vlm, tiny_vlm_processor, dataset
):
    _, positions = distinct_images(dataset)
    truth = dataset["answer"][:]
    answer_by(monkeypatch, lambda row, image: truth[row] if image == positions[row] else "")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset)
    for name in ("answer_accuracy", "class_accuracy", "token_f1", "image_gain", "class_image_gain"):
        assert results[name] == pytest.approx(1), name
    for name in ("answer_accuracy", "class_accuracy", "token_f1"):
        assert results[f"{name}_shuffled_image"] == results[f"{name}_blank_image"] == 0
    kinds = [name.partition("/")[2] for name in results if name.startswith("accuracy/")]
    assert kinds and all(results[f"accuracy/{kind}"] == results[f"image_gain/{kind}"] == 1 for kind in kinds)


def test_a_model_that_does_not_look_gains_nothing(monkeypatch, tiny_vlm, tiny_vlm_processor, dataset):
    truth = dataset["answer"][:]
    answer_by(monkeypatch, lambda row, image: truth[row])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset)
    assert results["answer_accuracy"] == results["answer_accuracy_blank_image"] == 1
    gains = [value for name, value in results.items() if "image_gain" in name]
    assert gains and not any(gains)


def test_a_model_that_names_what_it_is_shown_is_wrong_for_every_other_image(
    monkeypatch, tiny_vlm, tiny_vlm_processor, dataset
):
    images, _ = distinct_images(dataset)
    names = [CLASS_NAMES[label] for label in images["label"]]
    answer_by(monkeypatch, lambda row, image: "gray" if image is None else f"It is a {names[image]}.")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset)
    assert results["class_accuracy"] == results["class_image_gain"] == results["image_gain/object"] == 1
    assert results["class_accuracy_shuffled_image"] == results["class_accuracy_blank_image"] == 0


def test_a_model_of_one_answer_reaches_the_majority(monkeypatch, tiny_vlm, tiny_vlm_processor, dataset):
    pairs = zip(dataset["question_type"], dataset["short_answer"], strict=True)
    objects = [short for kind, short in pairs if kind == "object"]
    commonest = max(set(objects), key=objects.count)
    answer_by(monkeypatch, lambda row, image: f"It is a {commonest}.")
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset)
    assert results["accuracy/object"] == results["majority/object"] == pytest.approx(majority_share(objects))
    assert results["class_accuracy"] == results["majority/class"]


def test_rows_without_types_are_judged_by_the_wording_of_the_question(
    monkeypatch, tiny_vlm, tiny_vlm_processor, dataset
):
    question = "What is the main object in this image?"
    plain = without_types(dataset)
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


def test_answers_come_in_the_order_of_the_questions(tiny_vlm, tiny_vlm_processor, dataset):
    images, positions = distinct_images(dataset)
    features = encode_images(tiny_vlm, tiny_vlm_processor, decode_images(images, range(len(images))))
    questions = dataset["question"][:12]
    together = generate_answers(tiny_vlm, tiny_vlm_processor, features, positions[:12], questions, 5, 6)
    assert len(set(together)) > 3
    for row, question in enumerate(questions):
        alone = generate_answers(tiny_vlm, tiny_vlm_processor, features, [positions[row]], [question], 1, 6)
        assert alone == [together[row]]


def test_one_class_of_most_images_gives_no_shuffled_figure(tiny_vlm, tiny_vlm_processor, dataset, caplog):
    labels = dataset["label"]
    one = dataset.select([row for row, label in enumerate(labels) if label == labels[0]])
    results = evaluate_vlm(tiny_vlm, tiny_vlm_processor, one, max_new_tokens=2)
    assert "answer_accuracy" in results and "answer_accuracy_blank_image" in results
    assert [name for name in results if "shuffled" in name or "gain" in name] == []
    assert "more than half of the images" in caplog.text


# Prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_image_tokens", [1, 4])
def test_prompts_are_the_ids_of_the_chat_template(tiny_vlm_processor, images, num_image_tokens):
    tiny_vlm_processor.num_image_tokens = num_image_tokens
    questions = ["What color is the dog?", " Is this a ship? ", "What color is the dog?"]
    for question, ids in zip(questions, tokenize_questions(tiny_vlm_processor, questions), strict=True):
        content = [{"type": "image", "image": images[0]}, {"type": "text", "text": question}]
        inputs = tiny_vlm_processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert ids == list(inputs["input_ids"][0])
        assert ids.count(tiny_vlm_processor.image_token_id) == num_image_tokens


def test_training_rows_are_the_ids_of_the_whole_conversation(tiny_vlm_processor, images):
    rows = datasets.Dataset.from_dict({"question": ["What is it?"], "answer": [" It is a cat. "]})
    (row,) = tokenized_rows(tiny_vlm_processor, rows, [3])
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "It is a cat."}]},
    ]
    inputs = tiny_vlm_processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert row["prompt_ids"] + row["answer_ids"] == list(inputs["input_ids"][0])
    assert row["answer_ids"][-1] == tiny_vlm_processor.tokenizer.eos_token_id
    assert row["image_index"] == 3


def test_the_tokenizer_gets_a_placeholder_and_a_padding_token_of_its_own(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    size = len(tokenizer)
    prepared = prepare_tokenizer(tokenizer, image_token="<picture>")
    assert prepared.pad_token_id != prepared.eos_token_id
    assert prepared.tokenize("a<picture>b").count("<picture>") == 1
    assert prepared.padding_side == "left"
    assert len(prepare_tokenizer(prepared, image_token="<picture>")) == len(prepared) <= size + 2


# Which rows ----------------------------------------------------------------------------------------------------------


def record(folder: Path, train: datasets.Dataset, fraction: float, seed: int) -> None:
    facts = data_facts(train) | {"eval_fraction": fraction, "split_seed": seed}
    (folder / "training_data.json").write_text(json.dumps(facts))


def test_images_of_training_are_left_out(toy_csv, tmp_path, caplog):
    data = load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=0.3, seed=5)
    record(tmp_path, data["train"], 0.3, 5)
    everything = load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=1.0)["eval"]
    kept = only_unseen(everything, str(tmp_path))
    assert kept["dataset_index"][:] == data["eval"]["dataset_index"][:]
    assert all(held_out(index, "train", 0.3, 5) for index in kept["dataset_index"])
    assert not set(kept["dataset_index"]) & set(data["train"]["dataset_index"])
    assert f"{len(everything) - len(kept)} of {len(everything)} rows" in caplog.text


def test_images_of_another_split_are_all_unseen(dataset, tmp_path):
    record(tmp_path, dataset.map(lambda row: {"split": "test"}, load_from_cache_file=False), 0.0, 0)
    assert only_unseen(dataset, str(tmp_path))["question"][:] == dataset["question"][:]


def test_nothing_left_is_an_error_that_names_the_model(dataset, tmp_path):
    record(tmp_path, dataset, 0.0, 0)
    with pytest.raises(UserError, match=rf"{tmp_path.name} was trained on all images .*\['train'\].*another|other"):
        only_unseen(dataset, str(tmp_path))


def test_a_model_without_a_record_is_evaluated_with_a_warning(dataset, tmp_path, caplog):
    assert len(only_unseen(dataset, str(tmp_path))) == len(dataset)
    assert "does not record what it was trained on" in caplog.text


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def vlm_folder(tiny_vlm, tiny_vlm_processor, tmp_path) -> Path:
    tiny_vlm.save_pretrained(tmp_path / "vlm")
    tiny_vlm_processor.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


def test_the_command_writes_results_and_card_and_prints_them(vlm_folder, toy_csv, capsys):
    argv = [str(vlm_folder), "--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--max-images", "20"]
    evaluation.main([*argv, "--max-new-tokens", "2"])
    results = json.loads((vlm_folder / "eval_results.json").read_text())
    assert (results["metadata"]["images"], results["metadata"]["rows"]) == (20, 100)
    assert capsys.readouterr().out == results_table(results)
    assert f"| `eval_loss` | {results['eval_loss']:.4f} |" in (vlm_folder / "README.md").read_text()


def test_a_folder_gives_the_figures_of_the_model_in_memory(tiny_vlm, tiny_vlm_processor, vlm_folder, dataset):
    expected = evaluate_vlm(tiny_vlm, tiny_vlm_processor, dataset, max_new_tokens=3)
    results = evaluate_folder(str(vlm_folder), dataset, max_new_tokens=3)
    results.pop("metadata")
    assert results == pytest.approx(expected, rel=1e-5)


def test_an_encoder_without_its_text_tower_is_evaluated_with_it(
    tiny_encoder, tiny_encoder_processor, base_folder, dataset, tmp_path
):
    # The base holds the weights of a language model of the same shape.
    tiny_encoder.load_text_tower(str(base_folder))
    expected = evaluate_encoder(tiny_encoder, tiny_encoder_processor, dataset)
    tiny_encoder.config.include_text_tower = False
    tiny_encoder.config.text_model_name_or_path = str(base_folder)
    tiny_encoder.save_pretrained(tmp_path)
    tiny_encoder_processor.save_pretrained(tmp_path)
    results = evaluate_folder(str(tmp_path), dataset)
    results.pop("metadata")
    assert results == pytest.approx(expected)


def test_the_table_has_a_line_for_every_number():
    table = results_table({"loss": 1.25, "accuracy/object": 0.5, "count": 3, "metadata": {"rows": 1}})
    assert table == "loss             1.2500\naccuracy/object  0.5000\ncount            3.0000\n"
