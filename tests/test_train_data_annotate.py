import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Originals, child_environment, make_tokenizer, token_ids
from hub_stub import HubStub
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from sigphi.train import data_annotate, images
from sigphi.train.annotator import Answer, ModelSource, judged_answer, load_annotator, load_processor
from sigphi.train.batch_log import BatchLog, finished_batches
from sigphi.train.data import load_cifar10_qa
from sigphi.train.data_annotate import (
    DataAnnotateArguments,
    agreement,
    agreement_table,
    annotate,
    answer_batch,
    bank_questions,
    csv_text,
    failure_lines,
    main,
)
from sigphi.train.data_build import build_csv
from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import load_images
from sigphi.train.judging import is_correct
from sigphi.train.qa_csv import read_qa_csv
from sigphi.train.synthetic import IMAGE_FEATURES

IMAGES = "synthetic:30"
NUM_IMAGES = 6
LONGEST = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}User:{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"
)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


# ---------------------------------------------------------------------------------------------------------------------
# Models: random weights, and so many tokens that end an answer that about half of the answers end in time


def save(folder: Path, model: Any, processor: Any) -> Path:
    model.generation_config.eos_token_id = [0, *range(100, 160)]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sigphi_folder(make_vlm: Callable[..., Any], shared: Originals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sigphi import SigPhiProcessor

    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"])
    return save(tmp_path_factory.mktemp("sigphi"), make_vlm(), processor)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer()
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        text_config=LLAMA | token_ids(tokenizer),
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("llava"), LlavaForConditionalGeneration(config), processor)


@pytest.fixture
def without_num2words(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's processor asks for this package, and uses it for videos only."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)


@pytest.fixture
def smolvlm_folder(without_num2words: None, tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    pieces = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *pieces], True)
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokenizer,
        SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    config = SmolVLMConfig(
        text_config=LLAMA | token_ids(tokenizer),
        vision_config=VISION,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    return save(tmp_path / "smolvlm", SmolVLMForConditionalGeneration(config), processor)


class Parrot:
    """Stands in for a model: an answer that is a function of picture and question, and now and then a fault."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def answer(self, pictures: list[Image.Image], questions: list[str]) -> list[Answer]:
        self.batches.append(questions)
        answers = []
        for picture, question in zip(pictures, questions, strict=True):
            assert picture.mode == "RGB"
            digest = hashlib.sha256(picture.tobytes() + question.encode()).hexdigest()
            answers.append(
                Answer(f"Half of {digest[:6]}", "cut") if digest[0] in "012" else Answer(f"It, {digest[:8]}.", "")
            )
        return answers


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty pictures in the test split of `synthetic`, too, instead of a thousand."""
    monkeypatch.setitem(images._SYNTHETIC_SIZES, "test", 30)


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    parrot = Parrot()
    monkeypatch.setattr(data_annotate, "_load", lambda *_: parrot)
    return parrot


def options(folder: Path, model_folder: Path, **changes: Any) -> DataAnnotateArguments:
    fields = {
        "output": str(folder / "qa.csv"),
        "model": str(model_folder),
        "images": IMAGES,
        "num_images": NUM_IMAGES,
        "batch_size": 4,
        "max_new_tokens": LONGEST,
    }
    return DataAnnotateArguments(**fields | changes)


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ---------------------------------------------------------------------------------------------------------------------
# Answers of real architectures


@pytest.mark.parametrize("kind", ["sigphi", "llava", "smolvlm"])
def test_a_model_folder_answers_the_questions_of_the_bank(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_folder = request.getfixturevalue(f"{kind}_folder")
    folder = tmp_path / "out"
    folder.mkdir()
    argv = ["--output", str(folder / "qa.csv"), "--model", str(model_folder), "--images", IMAGES]
    main([*argv, "--num-images", str(NUM_IMAGES), "--max-new-tokens", str(LONGEST), "--batch-size", "7"])
    assert "question type" in capsys.readouterr().out
    assert sorted(results(folder)) == ["qa.csv", "qa.csv.agreement.json", "qa.csv.failures.jsonl"]
    assert not list(folder.glob("*.parts*"))

    asked = bank_questions(load_images(IMAGES, "train"), "train", NUM_IMAGES, 0)
    alone = one_by_one(model_folder, asked)
    rows = read_qa_csv(folder / "qa.csv", None, {"train": 30}).rows
    answered = {(row.dataset_index, row.pair): row.answer for row in rows.itertuples()}
    lines = (folder / "qa.csv.failures.jsonl").read_text(encoding="utf-8").splitlines()
    failed = {(line["Dataset_Index"], line["pair"]): line for line in map(json.loads, lines)}
    assert answered and failed and not answered.keys() & failed.keys()
    assert len(answered) + len(failed) == len(asked) == 5 * NUM_IMAGES
    for row in asked.itertuples():
        text, is_whole = alone[row.dataset_index, row.pair]
        if is_whole and text:
            assert answered[row.dataset_index, row.pair] == text
        else:
            line = failed[row.dataset_index, row.pair]
            assert (line["question"], line["generated"], line["Split"]) == (row.question, text, "train")
            assert line["reason"] == ("empty" if is_whole else f"cut at {LONGEST} tokens, before its end")


def one_by_one(model_folder: Path, asked: pd.DataFrame) -> dict[tuple[int, int], tuple[str, bool]]:
    """What the model says to each question alone, without padding, and whether it came to an end."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    images = load_images(IMAGES, "train")
    answers = {}
    for row in asked.itertuples():
        content = [{"type": "image"}, {"type": "text", "text": row.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=images[row.dataset_index]["img"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        is_whole = tokens[-1].item() in model.generation_config.eos_token_id
        answers[row.dataset_index, row.pair] = (processor.decode(tokens, skip_special_tokens=True).strip(), is_whole)
    return answers


def test_a_model_that_names_no_end_is_stopped_by_that_of_its_language_model(
    llava_folder: Path, tmp_path: Path
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    model.config.text_config.eos_token_id = 77
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    processor = load_processor(ModelSource(str(llava_folder)), {})
    annotator = load_annotator(ModelSource(str(tmp_path)), processor, "auto", torch.device("cpu"), LONGEST)
    assert annotator.model.generation_config.eos_token_id == 77
    assert annotator.model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_dtype_and_options_of_the_image_processor_reach_the_model(smolvlm_folder: Path) -> None:
    source, pixels = ModelSource(str(smolvlm_folder)), []
    for image_options in ({}, {"do_image_splitting": False}):
        processor = load_processor(source, image_options)
        annotator = load_annotator(source, processor, "bfloat16", torch.device("cpu"), LONGEST)
        annotator.model.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs: pixels.append(kwargs["pixel_values"]), with_kwargs=True
        )
        annotator.answer([Image.new("RGB", (32, 32))], ["What is it?"])
    assert [part.shape[0] for part in pixels] == [5, 1]  # four pieces and the whole, or the whole alone
    assert pixels[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "is_whole", "expected"),
    [
        (" A cat. ", True, Answer("A cat.", "")),
        ("A cat on a", False, Answer("A cat on a", "cut at 9 tokens, before its end")),
        (" \n", True, Answer("", "empty")),
        ("I cannot tell.", True, Answer("I cannot tell.", "")),
        ("ERROR: no", True, Answer("ERROR: no", "begins with ERROR")),
        ("An ERROR sign.", True, Answer("An ERROR sign.", "")),
        ("<image> cat", True, Answer("<image> cat", "holds <image>")),
        ("one\r\ntwo\rthree", True, Answer("one\ntwo\nthree", "")),
    ],
)
def test_faults_are_told_from_answers(text: str, is_whole: bool, expected: Answer) -> None:
    assert judged_answer(text, is_whole, 9) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def test_the_bank_asks_what_data_build_asks(
    few_test_images: None, parrot: Parrot, sigphi_folder: Path, tmp_path: Path
) -> None:
    for seed in (0, 3):
        build_csv(tmp_path / "built.csv", IMAGES, "test", NUM_IMAGES, seed)
        annotate(options(tmp_path, sigphi_folder, image_split="test", seed=seed))
        built = rows_of((tmp_path / "built.csv").read_text(encoding="utf-8"))
        annotated = rows_of((tmp_path / "qa.csv").read_text(encoding="utf-8"))
        assert list(built[0]) == list(annotated[0])
        for truth, row in zip(built, annotated, strict=True):
            assert [row[name] for name in ("Dataset_Index", "Split", "Class_Label")] == [
                truth[name] for name in ("Dataset_Index", "Split", "Class_Label")
            ]
            for pair in range(1, 6):
                names = [f"{letter}{pair}" for letter in "QTS"]
                expected = [truth[name] for name in names] if row[f"A{pair}"] else [""] * 3
                assert [row[name] for name in names] == expected
        for path in tmp_path.iterdir():
            path.unlink()


def test_the_questions_of_a_csv_are_answered_row_by_row(
    few_test_images: None, parrot: Parrot, sigphi_folder: Path, tmp_path: Path
) -> None:
    header = "Image_Number,Dataset_Index,Split,Q1,A1,T1,S1,Q2,Q3,Q4,Q5"
    lines = [
        "1,7,test,What is it?,ERROR: <image>,object,cat,,,Why?,",
        "2,0,train,What is it?,,,,,,,",
        "3,7,test,Where?,,,,,,,",
    ]
    (tmp_path / "in.csv").write_text("\n".join([header, *lines]) + "\n")
    annotate(options(tmp_path, sigphi_folder, questions_csv=str(tmp_path / "in.csv"), num_images=None))
    rows = rows_of((tmp_path / "qa.csv").read_text(encoding="utf-8"))
    assert [(row["Dataset_Index"], row["Split"]) for row in rows] == [("7", "test"), ("0", "train"), ("7", "test")]
    assert [row["Class_Label"] for row in rows] == [
        CLASS_NAMES[load_images(IMAGES, row["Split"])[int(row["Dataset_Index"])]["label"]] for row in rows
    ]
    picture = load_images(IMAGES, "test")[7]["img"]
    expected = Parrot().answer([picture] * 2, ["What is it?", "Why?"])
    for pair, answer, rest in ((1, expected[0], ["object", "cat"]), (4, expected[1], ["", ""])):
        assert [rows[0][f"{letter}{pair}"] for letter in "ATS"] == (
            [answer.text, *rest] if not answer.fault else [""] * 3
        )
    assert rows[0]["Q2"] == rows[0]["A2"] == ""
    assert parrot.batches == [["What is it?", "Why?", "What is it?", "Where?"]]


def test_the_first_images_of_a_csv(parrot: Parrot, sigphi_folder: Path, tmp_path: Path) -> None:
    lines = ["Dataset_Index,Q1,Q2", "9,A?,B?", "2,A?,B?", "9,C?,", "4,A?,"]
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    arguments = options(
        tmp_path, sigphi_folder, questions_csv=str(tmp_path / "in.csv"), image_split="train", num_images=2
    )
    report = annotate(arguments)
    assert (report["questions"], report["images"]) == (5, 2)
    assert [row["Dataset_Index"] for row in rows_of((tmp_path / "qa.csv").read_text())] == ["9", "2", "9"]


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.fixture
def broken_set(tmp_path: Path) -> Path:
    """Eight train pictures, of which number 2 is cut and number 5 is no picture, as parquet."""
    images = load_images("synthetic:8", "train").cast_column("img", datasets.Image(decode=False))
    rows = [dict(row) for row in images]
    rows[2]["img"] = {"bytes": rows[2]["img"]["bytes"][:-40], "path": None}
    rows[5]["img"] = {"bytes": b"<html>not found</html>", "path": None}
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=IMAGE_FEATURES).to_parquet(folder / "train-0.parquet")
    return folder


@pytest.mark.parametrize("from_csv", [False, True])
def test_a_picture_that_cannot_be_decoded_is_a_failure_of_its_own(
    from_csv: bool, broken_set: Path, parrot: Parrot, sigphi_folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"num_images": None, "images": str(broken_set)}
    if from_csv:
        lines = ["Dataset_Index,Q1,Q2", *(f"{index},What?,Where?" for index in range(8))]
        (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
        changes |= {"questions_csv": str(tmp_path / "in.csv"), "image_split": "train"}
    report = annotate(options(tmp_path, sigphi_folder, **changes))
    lines = (tmp_path / "qa.csv.failures.jsonl").read_text(encoding="utf-8").splitlines()
    broken = [line for line in map(json.loads, lines) if "decoded" in line["reason"]]
    assert [line["Dataset_Index"] for line in broken] == ([2, 2, 5, 5] if from_csv else [2, 5])
    assert broken[0]["question"] == ("What?" if from_csv else "")
    assert "truncated" in broken[0]["reason"]
    assert broken[-1]["reason"] == "the picture cannot be decoded: cannot identify image file"
    rows = rows_of((tmp_path / "qa.csv").read_text())
    assert len(rows) == 8 and report["images"] == 8
    for index in (2, 5):
        assert set(rows[index].values()) == {str(index), "train", rows[index]["Class_Label"], ""}
    assert report["failures"] == len(lines) > len(broken)
    assert load_cifar10_qa(tmp_path / "qa.csv", "synthetic:8", eval_fraction=0)["train"].num_rows == (
        report["questions"] - report["failures"]
    )


def test_a_missing_picture_file_stops_the_run(tmp_path: Path) -> None:
    images = {"train": datasets.Dataset.from_dict({"img": [{"bytes": None, "path": str(tmp_path / "gone.png")}]})}
    batch = pd.DataFrame({"split": ["train"], "dataset_index": [0], "question": ["What?"]})
    with pytest.raises(UserError, match=r"gone\.png cannot be read: No such file"):
        answer_batch(Parrot(), images, batch)  # type: ignore[arg-type]


def test_a_model_that_fails_stops_the_run_and_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch, sigphi_folder: Path, tmp_path: Path
) -> None:
    class Failing(Parrot):
        def answer(self, pictures: list[Image.Image], questions: list[str]) -> list[Answer]:
            if len(self.batches) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().answer(pictures, questions)

    monkeypatch.setattr(data_annotate, "_load", lambda *_: Failing())
    with pytest.raises(torch.OutOfMemoryError):
        annotate(options(tmp_path, sigphi_folder))
    assert sorted(finished_batches(tmp_path / "qa.csv.parts")) == [0, 1]
    assert not results(tmp_path)


def test_no_failure_leaves_no_file_of_failures(
    monkeypatch: pytest.MonkeyPatch, sigphi_folder: Path, tmp_path: Path
) -> None:
    class Sure(Parrot):
        def answer(self, pictures: list[Image.Image], questions: list[str]) -> list[Answer]:
            return [Answer("A cat.", "") for _ in questions]

    monkeypatch.setattr(data_annotate, "_load", lambda *_: Sure())
    (tmp_path / "qa.csv.failures.jsonl").write_text("of an earlier run")
    report = annotate(options(tmp_path, sigphi_folder))
    assert sorted(results(tmp_path)) == ["qa.csv", "qa.csv.agreement.json"]
    assert report["failures"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


TABLE = pd.DataFrame(
    [
        (2, 1, "train", 0, "What is it?", "", "object", "cat", "cat"),
        (2, 2, "train", 0, "Bright?", "", "brightness", "dark", "cat"),
        (2, 3, "train", 0, "Describe it.", "", "description", "object=cat; category=animal", "cat"),
        (3, 1, "train", 1, "What is it?", "", "object", "dog", "dog"),
        (3, 2, "train", 1, "Is it alive?", "", "living", "yes", "dog"),
        (4, 1, "test", 0, "What is shown in this picture?", "", "", "", "ship"),
        (4, 2, "test", 0, "Why?", "", "", "", "ship"),
        (4, 3, "test", 0, "What object is this?", "", "object", "??", "ship"),
        (5, 1, "test", 1, "Who?", "", "", "Bob", "frog"),
    ],
    columns=[
        *("line", "pair", "split", "dataset_index", "question", "answer", "question_type", "short_answer"),
        "class_name",
    ],
)
ANSWERS = [
    Answer("A kitten.", ""),
    Answer("It is bright.", ""),
    Answer("A cat.", ""),
    Answer("A cat or a dog.", ""),
    Answer("Yes", "cut"),
    Answer("A boat, I think.", ""),
    Answer("Because.", ""),
    Answer("A truck.", ""),
    Answer("bob", ""),
]


def test_agreement_counts_what_can_be_judged() -> None:
    found = agreement(TABLE, ANSWERS)
    assert found == {
        "": {"answers": 1, "agreement": 1.0, "majority": 1.0},
        "brightness": {"answers": 1, "agreement": 0.0, "majority": 1.0},
        # Right are the kitten and the boat; cat or dog is no answer, and a ship is no truck.
        "object": {"answers": 4, "agreement": 0.5, "majority": 0.5},
    }
    spelled = TABLE.copy()
    spelled.loc[[0, 3, 7], "short_answer"] = ["Kitten", "cat", "CAT"]  # beside one ship
    assert agreement(spelled, ANSWERS)["object"]["majority"] == 0.75
    table = agreement_table({"agreement": found}).splitlines()
    assert table[0].split() == ["question", "type", "answers", "agreement", "majority"]
    assert table[1].split() == ["(no", "type)", "1", "1.000", "1.000"]
    assert table[3].split() == ["object", "4", "0.500", "0.500"]
    assert agreement_table({"agreement": {}}).count("\n") == 1


def test_the_reported_agreement_is_that_of_the_written_file(
    parrot: Parrot, sigphi_folder: Path, tmp_path: Path
) -> None:
    report = annotate(options(tmp_path, sigphi_folder, num_images=20))
    assert report == json.loads((tmp_path / "qa.csv.agreement.json").read_text(encoding="utf-8"))
    rows = read_qa_csv(tmp_path / "qa.csv", None, {"train": 30}).rows
    for kind, part in rows[rows["question_type"] != "description"].groupby("question_type"):
        right = [is_correct(row.answer, row.short_answer, kind) for row in part.itertuples()]
        assert report["agreement"][kind] == {
            "answers": len(part),
            "agreement": pytest.approx(np.mean(right)),
            "majority": pytest.approx(part["short_answer"].value_counts().max() / len(part)),
        }
    assert "description" not in report["agreement"]


def test_the_file_is_in_the_contract() -> None:
    rows = rows_of(csv_text(TABLE, ANSWERS))
    assert len(rows) == 4 and len(rows[0]) == 23
    assert [rows[1][name] for name in ("Q1", "A1", "T1", "S1")] == ["What is it?", "A cat or a dog.", "object", "dog"]
    assert [rows[1][name] for name in ("Q2", "A2", "T2", "S2")] == [""] * 4
    assert [rows[2][name] for name in ("Dataset_Index", "Split", "Class_Label")] == ["0", "test", "ship"]
    (failure,) = failure_lines(TABLE, ANSWERS).splitlines()
    assert json.loads(failure) == {
        "Dataset_Index": 1,
        "Split": "train",
        "pair": 2,
        "question": "Is it alive?",
        "reason": "cut",
        "generated": "Yes",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Going on after a kill


class Killed(BaseException):
    """Ends a run at once, as a kill does: nothing catches it."""


def runs_into_kill(patch: pytest.MonkeyPatch, moment: int, torn: bool, run: Callable[[], Any]) -> bool:
    """Whether a run ended at its `moment`-th step towards the disk, before it took place or behind a torn write."""
    steps = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps < moment:
                return function(*args, **kwargs)
            if torn and function is fsync:
                os.ftruncate(args[0], max(os.fstat(args[0]).st_size - 9, 0))
            raise Killed

        return step

    fsync = os.fsync
    for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "mkdir")):
        patch.setattr(module, name, killing(getattr(module, name)))
    try:
        run()
    except Killed:
        return True
    return False


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_any_step_changes_nothing(
    torn: bool, parrot: Parrot, sigphi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = options(folder, sigphi_folder, batch_size=11)
    asked = data_annotate._load_questions(arguments)
    monkeypatch.setattr(data_annotate, "_load_questions", lambda *_: asked)
    annotate(arguments)
    expected, all_batches = results(folder), parrot.batches[:]
    moment, is_killed = 0, True
    while is_killed:
        moment += 1
        for path in folder.iterdir():
            path.unlink()
        parrot.batches.clear()
        with monkeypatch.context() as patch:
            is_killed = runs_into_kill(patch, moment, torn, lambda: annotate(arguments))
        recorded = finished_batches(folder / "qa.csv.parts")
        is_done = (folder / "qa.csv").exists()
        first = parrot.batches[:]
        report = annotate(arguments)
        assert results(folder) == expected
        assert json.loads(expected["qa.csv.agreement.json"]) == report
        assert not list(folder.glob("*.parts*"))
        # What was on the disk is not asked again.
        left = [] if is_done else [batch for number, batch in enumerate(all_batches) if number not in recorded]
        assert parrot.batches == first + left
    assert moment > 15  # settings, three batches, three files, removal of the folder


def test_a_torn_line_is_dropped_and_a_damaged_one_refused(parrot: Parrot, sigphi_folder: Path, tmp_path: Path) -> None:
    with BatchLog(tmp_path / "parts", {"--seed": "0"}, rank=1) as log:
        for batch in range(3):
            log.add(batch, [["Gr\u00fc\u00df dich.", ""]])
    path = tmp_path / "parts" / "rank-1.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        assert finished_batches(tmp_path / "parts") == dict.fromkeys(range(kept), [["Gr\u00fc\u00df dich.", ""]])
        with BatchLog(tmp_path / "parts", {"--seed": "0"}, rank=1) as log:
            log.add(7, "next")
        assert list(finished_batches(tmp_path / "parts")) == [*range(kept), 7]
    path.write_bytes(whole.replace(b"[1,", b"[1]"))
    with pytest.raises(UserError, match=r"rank-1.jsonl, line 2 is damaged; remove the line to do its batch again"):
        finished_batches(tmp_path / "parts")


def test_two_processes_do_not_write_to_one_log(tmp_path: Path) -> None:
    with BatchLog(tmp_path / "parts", {}, rank=0), BatchLog(tmp_path / "parts", {}, rank=1):
        with pytest.raises(UserError, match="parts is in use by another process; wait for it, or end it first"):
            BatchLog(tmp_path / "parts", {}, rank=0)
    BatchLog(tmp_path / "parts", {}, rank=0).__exit__(None, None, None)
    with pytest.raises(UserError, match="cannot be made: No such file or directory"):
        BatchLog(tmp_path / "no" / "parts", {})


def test_a_run_that_finished_nothing_binds_nobody(
    parrot: Parrot, sigphi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        assert runs_into_kill(patch, 4, True, lambda: annotate(options(tmp_path, sigphi_folder)))
    assert not finished_batches(tmp_path / "qa.csv.parts")
    report = annotate(options(tmp_path, sigphi_folder, batch_size=2))
    assert report is not None and report["settings"]["--batch-size"] == "2"


def test_a_batch_that_is_nowhere_is_told(
    parrot: Parrot, sigphi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on machines that do not share the folder: each ends its share, and the first does not see that of the others.
    monkeypatch.setattr(data_annotate.BatchLog, "add", lambda *_: None)
    with pytest.raises(UserError, match=r"qa.csv.parts lacks 8 of 8 batches; all processes need to write to the same"):
        annotate(options(tmp_path, sigphi_folder))
    assert not results(tmp_path)


def start_and_stop(arguments: DataAnnotateArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run with two finished batches."""
    with monkeypatch.context() as patch:
        assert runs_into_kill(patch, 6, False, lambda: annotate(arguments))
    assert sorted(finished_batches(arguments.beside(".parts"))) == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "--batch-size: 4 before, 5 now"),
        ({"max_new_tokens": 13}, "--max-new-tokens: 12 before, 13 now"),
        ({"dtype": "float16"}, "--dtype: auto before, float16 now"),
        ({"images": "synthetic:29"}, "--images: synthetic:30 before, synthetic:29 now"),
        ({"image_options": '{"do_resize": false}'}, '--image-options: {} before, {"do_resize": false} now'),
        ({"seed": 1}, r"the questions \(--questions-csv, --seed, .*\): [0-9a-f]{64} before, "),
        ({"num_images": 5}, r"the questions \(.*--num-images\): "),
    ],
)
def test_an_unfinished_run_with_other_settings_is_refused(
    change: dict[str, Any],
    message: str,
    parrot: Parrot,
    sigphi_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_and_stop(options(tmp_path, sigphi_folder), monkeypatch)
    with pytest.raises(
        UserError, match=f"qa.csv.parts holds an unfinished run with other settings: {message}"
    ) as stop:
        annotate(options(tmp_path, sigphi_folder, **change))
    assert str(stop.value).endswith("Give the same ones to go on with it, or remove that folder to start anew.")
    assert not results(tmp_path)


def test_a_model_that_was_trained_on_meanwhile_is_another_one(
    parrot: Parrot, sigphi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(sigphi_folder, tmp_path / "model")
    start_and_stop(options(tmp_path, model), monkeypatch)
    (model / "README.md").write_text("A card may change.")
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    with pytest.raises(UserError, match="settings: the model's files: "):
        annotate(options(tmp_path, model))
    shutil.copy(sigphi_folder / "model.safetensors", model)
    annotate(options(tmp_path, model))
    assert (tmp_path / "qa.csv").exists()


def test_a_finished_file_is_not_made_again_and_not_overwritten(
    parrot: Parrot, sigphi_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--output",
        str(tmp_path / "qa.csv"),
        "--model",
        str(sigphi_folder),
        "--images",
        IMAGES,
        "--num-images",
        "3",
    ]
    main(argv)
    expected, first, printed = results(tmp_path), parrot.batches[:], capsys.readouterr().out
    main(argv)
    assert results(tmp_path) == expected and parrot.batches == first and capsys.readouterr().out == printed
    for other in (["--seed", "1"], ["--batch-size", "2"]):
        with pytest.raises(UserError, match=r"--output .*qa.csv exists, and was not made with these settings; remove"):
            main([*argv, *other])
    (tmp_path / "qa.csv.agreement.json").unlink()
    with pytest.raises(UserError, match=r"--output .*qa.csv exists"):
        main(argv)
    assert results(tmp_path) == {name: expected[name] for name in expected if "agreement" not in name}


# A process that has imported everything forks one child a run, so that kills fall into the run and not into imports.
KILLING = """
import os, random, shutil, signal, sys, time
from pathlib import Path
# What transformers and datasets import late, and each child would import anew.
import torchvision
from datasets import arrow_dataset
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor, TokenizersBackend
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from sigphi.train.data_annotate import DataAnnotateArguments, annotate

folder, kills = Path("out"), int(os.environ["KILLS"])
arguments = dict(model=os.environ["MODEL"], images="synthetic:8", num_images=8, batch_size=4, max_new_tokens=12)

def start():
    pid = os.fork()
    if pid == 0:
        annotate(DataAnnotateArguments(output=str(folder / "qa.csv"), **arguments))
        os._exit(0)
    return pid

def results():
    return {path.name: path.read_bytes() for path in folder.iterdir()}

durations = []
for _ in range(2):  # the first run reads what the next ones find in memory
    folder.mkdir()
    begin = time.monotonic()
    assert os.waitpid(start(), 0)[1] == 0
    durations.append(time.monotonic() - begin)
    expected = results()
    shutil.rmtree(folder)
folder.mkdir()
moments, landed, resumed, completed = random.Random(0), 0, 0, 0
while landed < kills:
    pid = start()
    time.sleep(moments.uniform(0, min(durations)))
    os.kill(pid, signal.SIGKILL)
    landed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    resumed += (folder / "qa.csv.parts").exists()
    if moments.random() < 0.3 or landed == kills:  # killed runs go on, several times in a row, until one may end
        assert os.waitpid(start(), 0)[1] == 0
        assert results() == expected
        completed += 1
        shutil.rmtree(folder), folder.mkdir()
print(landed, resumed, completed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_kills_at_random_moments_change_nothing(kills: int, llava_folder: Path, run_child: Callable[..., str]) -> None:
    landed, resumed, completed = map(int, run_child(KILLING, MODEL=llava_folder, KILLS=str(kills)).split())
    assert landed == kills and resumed > 0 and completed > 0


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def command(model: Path, output: Path, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *(launcher if processes > 1 else []), "-m", "sigphi.train.data_annotate"]
    words += ["--model", str(model), "--output", str(output), "--images", IMAGES, "--num-images", "12"]
    return [*words, "--batch-size", "4", "--max-new-tokens", str(LONGEST)]


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_either_resumes_the_other(llava_folder: Path, tmp_path: Path) -> None:
    environment = child_environment(tmp_path / "home")
    environment = {
        name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    run: dict[str, Any] = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    outputs = [tmp_path / name for name in ("one", "two", "killed")]
    for output in outputs:
        output.mkdir()
    for output, processes in zip(outputs, (1, 2), strict=False):
        done = subprocess.run(command(llava_folder, output / "qa.csv", processes), **run)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("question type") == 1
    expected = results(outputs[0])
    assert results(outputs[1]) == expected
    for processes in (2, 1, 2):
        killed_command(
            command(llava_folder, outputs[2] / "qa.csv", processes), outputs[2] / "qa.csv.parts", environment
        )
        assert finished_batches(outputs[2] / "qa.csv.parts")
    done = subprocess.run(command(llava_folder, outputs[2] / "qa.csv", 1), **run)
    assert done.returncode == 0, done.stderr[-4000:]
    assert results(outputs[2]) == expected


def killed_command(words: list[str], parts: Path, environment: dict[str, str]) -> None:
    """Kill a command and its children as soon as it has finished a batch more than the one before."""
    before = len(finished_batches(parts))
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(finished_batches(parts)) == before and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, before any weights load


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "none/qa.csv"}, "--output none/qa.csv: there is no folder none; create it first"),
        ({"batch_size": 0}, "--batch-size 0: it has to be at least 1"),
        ({"max_new_tokens": -1}, "--max-new-tokens -1: it has to be at least 1"),
        ({"num_images": 0}, "--num-images 0: it has to be at least 1"),
        ({"num_images": 31}, "--num-images 31: split train has 30 images"),
        ({"image_options": "{do_resize}"}, "--image-options {do_resize}: it has to be a JSON object"),
        ({"image_options": "[1]"}, r"--image-options \[1\]: it has to be a JSON object"),
        (
            {"image_options": '{"nonsense": 1}'},
            "--image-options: the image processor of .* has no nonsense, only .*size",
        ),
        ({"images": "nothing"}, "images 'nothing'"),
        ({"image_split": "val"}, "have no split 'val'"),
        ({"model": "/no/where"}, "--model /no/where: there is no model folder with a config.json here"),
        ({"questions_csv": "x.csv", "seed": 0}, "--seed is of the draw from the question bank"),
        ({"questions_csv": "none.csv"}, "none.csv cannot be read: .* give a CSV file by --questions-csv"),
    ],
)
def test_mistakes_are_told_before_weights_load(
    changes: dict[str, Any], message: str, sigphi_folder: Path, tmp_path: Path, no_weights: None
) -> None:
    with pytest.raises(UserError, match=message):
        annotate(options(tmp_path, sigphi_folder, **changes))
    assert not results(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["Dataset_Index,Q2", "1,A?"], "in.csv: no column Q1; the header has Dataset_Index, Q2"),
        (["Dataset_Index,Q1", "1,A?"], "in.csv has no column Split, so say which split"),
        (
            ["Dataset_Index,Split,Q1", "30,train,A?"],
            "in.csv, line 2, column Dataset_Index: '30' is no row of the train",
        ),
        (["Dataset_Index,Split,Q1", "3,train,A?", "3,train,A?"], r"line 2 \(Q1\) and line 3 \(Q1\) ask the same"),
        (["Dataset_Index,Split,Q1", "3,train,"], "in.csv holds no question; fill Q1"),
        (["Dataset_Index,Split,Q1", "3,train,<image>?"], "in.csv, line 2, column Q1: the text holds <image>"),
    ],
)
def test_faults_of_the_questions_are_told_before_weights_load(
    lines: list[str], message: str, sigphi_folder: Path, tmp_path: Path, no_weights: None
) -> None:
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        annotate(options(tmp_path, sigphi_folder, questions_csv=str(tmp_path / "in.csv"), num_images=None))


def test_models_of_another_kind_are_refused(
    base_folder: Path, tiny_encoder: Any, llava_folder: Path, tmp_path: Path, no_weights: None
) -> None:
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    for folder, kind in ((base_folder, "phi"), (tmp_path / "encoder", "siglip_resnet")):
        with pytest.raises(UserError, match=f"--model {folder} is a '{kind}' model; give one that answers questions"):
            annotate(options(tmp_path, folder))
    silent = shutil.copytree(llava_folder, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="its processor has no chat template; give a model that is made for chats"):
        annotate(options(tmp_path, silent))
    (silent / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"--model {silent}: its processor cannot be loaded"):
        annotate(options(tmp_path, silent))


def test_a_missing_package_is_named(smolvlm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(UserError, match=r"num2words.*pip install 'sigphi\[annotate\]'"):
        load_processor(ModelSource(str(smolvlm_folder)), {})


REMOTE_CODE = """
from transformers import LlavaConfig, LlavaForConditionalGeneration

class OwnConfig(LlavaConfig):
    model_type = "own_vlm"

class OwnForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_the_user_says_so(
    llava_folder: Path, parrot: Parrot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree(llava_folder, tmp_path / "model")
    (model / "own.py").write_text(REMOTE_CODE)
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnForConditionalGeneration"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own_vlm", "auto_map": classes}))
    with pytest.raises(
        UserError, match=f"--model {model} comes with code of its own: read it, and let it run by --trust-remote-code"
    ):
        annotate(options(tmp_path, model))
    report = annotate(options(tmp_path, model, trust_remote_code=True))
    assert report is not None and parrot.batches


def test_random_weights_do_not_answer(llava_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llava_folder, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights[next(name for name in weights if "lm_head" in name)]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"--model {model}: its files lack weights of the model, such as .*lm_head"):
        annotate(options(tmp_path, model))
    assert not results(tmp_path)


FINGERPRINTS = """
import os, sys
from huggingface_hub import HfApi
from sigphi.train.annotator import ModelSource, model_fingerprint, read_annotator_config

api = HfApi()
api.create_repo("tester/model")
commits = []
for content in (os.environ["FIRST"], os.environ["SECOND"]):
    commits.append(api.upload_file(path_or_fileobj=content, path_in_repo="config.json", repo_id="tester/model").oid)
for revision in (None, *commits, "main"):
    source = ModelSource("tester/model", revision)
    read_annotator_config(source)
    print(model_fingerprint(source))
print(*commits)
"""


@pytest.mark.slow
def test_a_model_of_the_hub_is_told_by_its_commit(run_child, tiny_vlm, tmp_path) -> None:
    tiny_vlm.config.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    other = tmp_path / "other.json"
    other.write_text(config.read_text() + "\n")
    with HubStub() as hub:
        home = tmp_path / "home"
        printed = run_child(FINGERPRINTS, FIRST=config, SECOND=other, **hub.environment(home)).split()
    fingerprints, (first, second) = printed[:4], printed[4:]
    assert first != second
    assert fingerprints == [second, first, second, second]
