import csv
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from sigphi import cli
from sigphi.train import data_check
from sigphi.train.check_report import KINDS, Findings
from sigphi.train.data import main
from sigphi.train.data_build import build_csv
from sigphi.train.data_check import CheckReport, Problem, check_csv, format_report
from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import load_images
from sigphi.train.lenient_csv import iterate_rows, read_header, read_tables
from sigphi.train.near_duplicates import near_duplicates, small_pictures
from sigphi.train.qa_csv import read_qa_csv

SHARED = Path(__file__).parents[2] / "shared" / "data"
HEADER = ["Dataset_Index", *(f"{letter}{pair}" for pair in range(1, 6) for letter in "QA")]
CIFAR10 = {"train": 50_000, "test": 10_000}


def row(index: object, *pairs: str, **extra: str) -> dict[str, str]:
    """A CSV row from its index and its questions and answers in turn; the other pairs are sound ones."""
    texts = [text for pair in range(1, 6) for text in (f"What about part {pair}?", f"It is part {pair}.")]
    texts[: len(pairs)] = pairs
    return {"Dataset_Index": str(index), **dict(zip(HEADER[1:], texts, strict=True)), **extra}


def write(path: Path, rows: Sequence[dict[str, str]], extra: Sequence[str] = ()) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*HEADER, *extra], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def qa_csv(tmp_path: Path) -> Path:
    return tmp_path / "qa.csv"


def found(report: CheckReport) -> dict[str, tuple[str, ...]]:
    """Kind -> places."""
    return {problem.kind: problem.places for problem in report.problems}


def check(path: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return found(check_csv(path, **{"image_split": "train"} | options))


# ---------------------------------------------------------------------------------------------------------------------
# Each kind of problem


def test_a_sound_file_has_no_problem(qa_csv: Path) -> None:
    report = check_csv(write(qa_csv, [row(0), row(1, "Q,\n?", 'A "b".'), row(49_999)]), image_split="train")
    assert report == CheckReport([], num_rows=3, num_pairs=15, num_images=3)
    assert report.num_errors == 0


CAT = {"Class_Label": "cat"}
# Kind -> a row with that fault alone, and the column of the fault.
FAULTY_ROWS: dict[str, tuple[dict[str, str], str]] = {
    "damaged text": (row(1, "What is it?", "A cafÃ© in the sun."), "A1"),
    "bad split": (row(1, Split="val"), "Split"),
    "bad index": (row("50000"), "Dataset_Index"),
    "half-empty pair": (row(1, "What is it?", "A thing.", "Why?", ""), "A2"),
    "failure as answer": (row(1, "What is it?", "ERROR: CUDA out of memory."), "A1"),
    "image placeholder": (row(1, "What is in <image>?", "A thing."), "Q1"),
    "bad short answer": (row(1, "Describe it.", "A thing.", T1="description", S1="a thing"), "S1"),
    "contradicted label": (row(1, "What is the main object in this image?", "It is a dog.", **CAT), "A1"),
    "missed short answer": (row(1, "Is it dark?", "It is bright.", T1="brightness", S1="dark"), "A1"),
    "unclear answer": (row(1, "What is the main object in this image?", "Something small.", **CAT), "A1"),
    "foreign class": (row(1, "How large is it?", "The dog fills the frame.", **CAT), "A1"),
    "over-long text": (row(1, "What is it?", "word " * 300), "A1"),
    "no answer": (row(1, "What is it?", "nan"), "A1"),
    "talk of an assistant": (row(1, "What is it?", "As an AI language model, I cannot say."), "A1"),
    "leftover markup": (row(1, "What is it?", "A thing.<|im_end|>"), "A1"),
    "empty pair": (row(1, "", ""), "Q1"),
}


@pytest.mark.parametrize("kind", FAULTY_ROWS)
def test_a_faulty_row_is_named_by_its_kind_alone(qa_csv: Path, kind: str) -> None:
    extra = ("Split", "Class_Label", "T1", "S1")
    faulty, column = FAULTY_ROWS[kind]
    sound = [row(index, Split="train") for index in (7, 8)]
    write(qa_csv, [sound[0], {"Split": "train", **faulty}, sound[1]], extra)
    report = check_csv(qa_csv)
    assert [(problem.kind, problem.count, problem.places) for problem in report.problems] == [
        (kind, 1, (f"line 3 column {column}",))
    ]
    assert report.problems[0].is_error == KINDS[kind][0]
    assert report.problems[0].example or kind == "empty pair"
    assert report.num_errors == int(KINDS[kind][0])


def test_the_kinds_of_a_whole_file_are_found_together(qa_csv: Path) -> None:
    rows = [{"Split": "train", **faulty} for faulty, _ in FAULTY_ROWS.values()]
    write(qa_csv, rows, ("Split", "Class_Label", "T1", "S1"))
    with qa_csv.open("ab") as file:
        file.write(b"2,caf\xe9" + b"," * 13 + b"\n3,too,few\n" + b"4,Again?,A.,again? ,B." + b"," * 7 + b"train,,,\n")
    places = check(qa_csv, image_split=None, max_places=1000)
    line = {kind: number for number, kind in enumerate(FAULTY_ROWS, start=2)}
    for kind, (_, column) in FAULTY_ROWS.items():
        assert f"line {line[kind]} column {column}" in places[kind], kind
    # Image 1 is asked the same in all these rows.
    assert set(places) - set(FAULTY_ROWS) == {"not UTF-8", "malformed row", "repeated question"}
    last = len(FAULTY_ROWS) + 2
    assert places["not UTF-8"] == (f"line {last}",)
    assert places["malformed row"] == (f"line {last + 1}",)
    assert f"line {last + 2} column Q2 asks the same as line {last + 2} column Q1" in places["repeated question"]


def test_a_large_file_is_read_in_a_process_of_its_own_with_the_same_report(
    qa_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(qa_csv, [row(index, "What?", "ERROR") for index in range(7)])
    monkeypatch.setattr("sigphi.train.lenient_csv._ROWS_A_TABLE", 3)
    for bad in (b"8,too few cells\n", b"9,\xff\n"):  # behind the last table, and within one
        qa_csv.write_bytes(qa_csv.read_bytes() + bad)
        whole = check_csv(qa_csv, image_split="train")
        assert {"failure as answer", "malformed row"} <= {problem.kind for problem in whole.problems}
        with monkeypatch.context() as patch:
            patch.setattr("sigphi.train.data_check._LARGE", 0)
            assert check_csv(qa_csv, image_split="train") == whole


@pytest.mark.parametrize("died", ["before its first table", "while that is checked"])
def test_a_reading_process_that_is_killed_ends_the_check_in_one_line(
    qa_csv: Path, monkeypatch: pytest.MonkeyPatch, died: str
) -> None:
    here, is_checked = os.getpid(), multiprocessing.Event()

    def killed(*arguments: Any) -> Iterator[Any]:
        assert os.getpid() != here, "not in a process of its own"
        if died == "while that is checked":
            yield from read_tables(*arguments)
            is_checked.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    def slow(*arguments: Any) -> Any:
        is_checked.set()
        time.sleep(30)  # the signal of the child's death interrupts it

    write(qa_csv, [row(0)])
    monkeypatch.setattr("sigphi.train.data_check._LARGE", 0)
    monkeypatch.setattr("sigphi.train.data_check.read_tables", killed)
    monkeypatch.setattr("sigphi.train.data_check.check_texts", slow)
    # PyTorch hears of it by the child's signal, or when it misses the child.
    expected = f"^{qa_csv}: the process that reads it has died .*(Killed|exited unexpectedly).*memory.*again"
    with pytest.raises(UserError, match=expected) as error:
        check_csv(qa_csv, image_split="train")
    assert "\n" not in str(error.value)


def test_a_file_that_the_reading_process_cannot_read_is_named(qa_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(qa_csv, [row(0)])
    read = data_check.check_header

    def remove_afterwards(path: Path, *arguments: Any) -> None:
        read(path, *arguments)
        path.unlink()
        path.mkdir()

    monkeypatch.setattr("sigphi.train.data_check._LARGE", 0)
    monkeypatch.setattr("sigphi.train.data_check.check_header", remove_afterwards)
    with pytest.raises(UserError, match=f"^{qa_csv} cannot be read: Is a directory; give a CSV file.$"):
        check_csv(qa_csv, image_split="train")


@pytest.mark.parametrize("index", ["50000", "-1", "cat", "1.0", "", "9" * 25])
def test_every_row_with_a_bad_index_is_named(qa_csv: Path, index: str) -> None:
    places = check(write(qa_csv, [row(index), row(1), row(index, "", "")]))
    assert places["bad index"] == ("line 2 column Dataset_Index", "line 4 column Dataset_Index")


def test_indices_count_in_the_images_that_are_given(qa_csv: Path) -> None:
    write(qa_csv, [row(19), row(20)])
    assert "bad index" not in check(qa_csv)
    assert check(qa_csv, images="synthetic:20")["bad index"] == ("line 3 column Dataset_Index",)
    report = check_csv(qa_csv, images="synthetic:20", image_split="train")
    assert "'20' is no row of the train split, which has 20 images: 0 to 19" in report.problems[0].example


def test_a_split_that_contradicts_the_option_is_bad(qa_csv: Path) -> None:
    write(qa_csv, [row(1, Split="train"), row(2, Split="test")], ["Split"])
    assert check(qa_csv, image_split=None) == {}
    assert check(qa_csv, image_split="train") == {"bad split": ("line 3 column Split",)}


def test_a_file_without_split_needs_the_option_and_is_checked_all_the_same(qa_csv: Path) -> None:
    write(qa_csv, [row(1), row("x"), row(1)])
    places = check(qa_csv, image_split=None)
    assert set(places) == {"unknown split", "bad index", "repeated question"}
    with pytest.raises(UserError, match="--image-split val: it has to be train or test"):
        check_csv(qa_csv, image_split="val")


def test_missing_and_repeated_columns_do_not_hide_what_else_is_wrong(qa_csv: Path) -> None:
    qa_csv.write_text("Dataset_Index,Q1,A1,Q2,Q2,T1\nx,Q?,ERROR,,,\n")
    report = check_csv(qa_csv, image_split="train")
    places = found(report)
    assert places["missing column"] == ("A2", "Q3", "A3", "Q4", "A4", "Q5", "A5")
    assert places["repeated column"] == ("Q2",)
    assert places["bad index"] == ("line 2 column Dataset_Index",)
    assert places["failure as answer"] == ("line 2 column A1",)
    assert set(places) == {"missing column", "repeated column", "bad index", "failure as answer"}
    assert (report.num_rows, report.num_pairs, report.num_images) == (1, 1, 0)


@pytest.mark.parametrize(
    "content", ["", "\n", '"Dataset_Index', ",".join(HEADER) + "\n", "Dataset_Index;Q1;A1\n1;Q;A\n"]
)
def test_a_file_without_header_or_rows_is_reported(qa_csv: Path, content: str) -> None:
    qa_csv.write_text(content)
    report = check_csv(qa_csv, image_split="train")
    assert "no pairs" in found(report) and (report.num_rows == 0) == (";" not in content)
    assert ("missing column" in found(report)) == (",Q5," not in content)


def test_lines_are_those_of_an_editor(qa_csv: Path) -> None:
    write(qa_csv, [row(1, "Over\ntwo lines?", "Over\r\nthree\nlines."), row("x")])
    data = qa_csv.read_bytes().replace(b"\nx,", b"\n\n\nx,")
    qa_csv.write_bytes(data)
    line = 1 + data[: data.index(b"\nx,") + 1].count(b"\n")
    assert line == 8
    assert check(qa_csv) == {"bad index": ("line 8 column Dataset_Index",)}


def test_a_row_that_is_no_csv_costs_no_other_row(qa_csv: Path) -> None:
    write(qa_csv, [row(index) for index in range(6)] + [row("x", 'An "inner" quote', "is fine.")])
    lines = qa_csv.read_text().split("\n")
    lines[1] = lines[1].replace("It is part 1.", '"It is not closed.')
    lines[3] = lines[3].replace("It is part 2.", '"It "is" loose.')
    qa_csv.write_text("\n".join(lines))
    report = check_csv(qa_csv, image_split="train")
    assert found(report) == {
        "malformed row": ("line 2", "line 4"),
        "bad index": ("line 8 column Dataset_Index",),
    }
    assert report.num_rows == 5


def test_rows_are_read_as_the_csv_module_reads_them(qa_csv: Path) -> None:
    write(qa_csv, [row(1, " a ", 'b "c", d', "e\nf", "é"), row(2)])
    with qa_csv.open(newline="", encoding="utf-8") as file:
        naive = [tuple(cell.strip() for cell in cells) for cells in csv.reader(file)]
    rows = list(iterate_rows(qa_csv, pytest.fail))
    assert [cells for _, cells in rows] == naive
    assert [line for line, _ in rows] == [1, 2, 4]
    assert read_header(qa_csv) == HEADER


def test_bytes_that_are_no_utf8_are_shown(qa_csv: Path) -> None:
    write(qa_csv, [row(1), row(2, "What?", "A caf#.")])
    qa_csv.write_bytes(qa_csv.read_bytes().replace(b"#", b"\xe9"))
    (problem,) = check_csv(qa_csv, image_split="train").problems
    assert (problem.kind, problem.places) == ("not UTF-8", ("line 3",))
    assert r"caf\xe9." in problem.example


@pytest.mark.parametrize(
    "text", ["caf\ufffd", "cafÃ©", "Itâ€™s", "20Â°", "a\x00b", "a\x07b", "\u200bword", "ðŸ˜€", "a\x85b"]
)
def test_damaged_text_is_found(qa_csv: Path, text: str) -> None:
    assert check(write(qa_csv, [row(1, "Q?", f"It is {text} here.")])) == {"damaged text": ("line 2 column A1",)}


@pytest.mark.parametrize(
    "text", ["café, naïve, Ångström", "“CAFÉ”…", "It’s 20° – a 😀", "a\tb\nc", "Ω 你好", "São Paulo, NÃO", "Â hein"]
)
def test_sound_text_in_other_letters_is_not_damaged(qa_csv: Path, text: str) -> None:
    assert check(write(qa_csv, [row(1, "Q?", text)])) == {}


@pytest.mark.parametrize(
    "answer",
    ["ERROR", "Error: timeout", "CUDA error: device-side assert", "RuntimeError: x", "[error: no answer]"]
    + ["Traceback (most recent call last):\n  File", "torch.cuda.OutOfMemoryError: CUDA out of memory."],
)
def test_failures_are_found(qa_csv: Path, answer: str) -> None:
    assert check(write(qa_csv, [row(1, "Q?", answer)])) == {"failure as answer": ("line 2 column A1",)}


@pytest.mark.parametrize(
    "answer", ["An error of the camera.", "An ERROR is shown.", "Terror: a film.", "I see no text."]
)
def test_answers_about_errors_are_no_failures(qa_csv: Path, answer: str) -> None:
    assert check(write(qa_csv, [row(1, "Q?", answer)])) == {}


def test_a_question_is_the_same_in_any_case_and_spacing_and_row(qa_csv: Path) -> None:
    rows = [row(1, "What is it?", "A."), row(2, "What  is\nit?", "A."), row(1, "WHAT is it? ", "B.", *("", "") * 4)]
    places = check(write(qa_csv, rows))
    assert places["repeated question"] == ("line 5 column Q1 asks the same as line 2 column Q1",)


def test_failures_do_not_count_as_asked(qa_csv: Path) -> None:
    rows = [row(1, "What is it?", "ERROR"), row(1, "What is it?", "A cat.", *("", "") * 4)]
    assert "repeated question" not in check(write(qa_csv, rows))


# ---------------------------------------------------------------------------------------------------------------------
# Answers and labels


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "qa.csv"
    build_csv(path, "synthetic:400", "train")
    return path


def test_a_built_file_has_no_problem(built: Path) -> None:
    report = check_csv(built, images="synthetic:400")
    assert report == CheckReport([], num_rows=400, num_pairs=2000, num_images=400)
    assert check_csv(built) == report


def with_labels_moved(built: Path, path: Path) -> Path:
    """Each row under the index of the next image of another class."""
    with built.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = [cells["Class_Label"] for cells in rows]
    for position, cells in enumerate(rows):
        step = next(step for step in range(1, 400) if labels[(position + step) % 400] != labels[position])
        cells["Dataset_Index"] = str((position + step) % 400)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_answers_about_another_image_are_found_by_the_labels(built: Path, qa_csv: Path) -> None:
    with_labels_moved(built, qa_csv)
    report = check_csv(qa_csv, images="synthetic:400", max_places=10_000)
    counts = {problem.kind: problem.count for problem in report.problems}
    assert counts["wrong Class_Label"] == 400
    contradicted = set(found(report)["contradicted label"])
    with qa_csv.open(newline="", encoding="utf-8") as file:
        for line, cells in enumerate(csv.DictReader(file), start=2):
            for pair in range(1, 6):
                if cells[f"T{pair}"] in ("object", "comparison"):
                    assert f"line {line} column A{pair}" in contradicted
                if cells[f"T{pair}"] in ("dominant_color", "brightness", "refusal"):
                    assert f"line {line} column A{pair}" not in contradicted


@pytest.mark.parametrize(
    ("question", "answer", "question_type", "kind"),
    [
        ("What is the main object in this image?", "A kitten.", "", ""),
        ("What is the main object in this image?", "A cat and a dog.", "", "unclear answer"),
        ("What is the main object in this image?", "A truck.", "", "contradicted label"),
        ("Look closely. What is shown in this picture?", "A truck.", "", "contradicted label"),
        ("What is the main object made of?", "It is a truck.", "", "foreign class"),
        ("What is the main object made of?", "It is not a truck.", "", ""),
        ("Which kind?", "An animal.", "category", ""),
        ("Which kind?", "A vehicle.", "category", "contradicted label"),
        ("Is there a cat in the image?", "Yes, there is.", "yes_no_class", ""),
        ("Is there a dog in the image?", "Yes, there is.", "yes_no_class", "contradicted label"),
        ("Is there a dog in the image?", "No, there is a cat.", "yes_no_class", ""),
        ("Is it a cat or a ship?", "It is a ship.", "comparison", "contradicted label"),
        ("Can it fly?", "Yes.", "can_fly", "contradicted label"),
        ("Can it fly?", "Perhaps.", "can_fly", "unclear answer"),
        ("What color is it?", "Gray.", "dominant_color", ""),
    ],
)
def test_answers_are_judged_by_the_class(
    qa_csv: Path, question: str, answer: str, question_type: str, kind: str
) -> None:
    write(qa_csv, [row(1, question, answer, T1=question_type, Class_Label="cat")], ["T1", "Class_Label"])
    assert check(qa_csv) == ({kind: ("line 2 column A1",)} if kind else {})


MISSED = {"missed short answer": ("line 2 column A1",)}
UNUSABLE = {"bad short answer": ("line 2 column S1",)}


@pytest.mark.parametrize(
    ("answer", "question_type", "short_answer", "places"),
    [
        ("It is dark.", "brightness", "dark", {}),
        ("It is dark.", "brightness", "bright", MISSED),
        ("It is dark.", "brightness", "-", UNUSABLE),
        ("I cannot tell.", "refusal", "cannot tell", {}),
        ("On Monday.", "refusal", "cannot tell", MISSED),
        ("A gray cat.", "description", "object=cat; dominant_color=gray", {}),
        ("A gray dog.", "description", "object=cat; dominant_color=gray", MISSED),
        ("A gray cat.", "description", "cat", UNUSABLE),
        ("It is dark.", "mood", "sad", {}),  # no type of ours, so nothing is known of its values
        ("It is dark.", "mood", "?", UNUSABLE),
    ],
)
def test_the_short_answer_has_to_be_in_the_answer(
    qa_csv: Path, answer: str, question_type: str, short_answer: str, places: dict[str, tuple[str]]
) -> None:
    write(qa_csv, [row(1, "Q?", answer, T1=question_type, S1=short_answer)], ["T1", "S1"])
    assert check(qa_csv) == places


@pytest.mark.parametrize("label", ["cat", "Cat", "kitten", "3", "", "dog", "n/a"])
def test_class_label_is_compared_with_the_images(qa_csv: Path, label: str) -> None:
    index = load_images("synthetic:20", "train")["label"][:].index(CLASS_NAMES.index("cat"))
    write(qa_csv, [row(index, Class_Label=label)], ["Class_Label"])
    expected = {"wrong Class_Label": ("line 2 column Class_Label",)} if label in ("dog", "n/a") else {}
    assert check(qa_csv, images="synthetic:20") == expected
    assert check(qa_csv) == {}


def constant_rows(num_other: int, **extra: str) -> list[dict[str, str]]:
    rows = [row(index, "Is it blurry?", "It is blurry.", *("", "") * 4, **extra) for index in range(100)]
    for position in range(num_other):
        rows[position]["A1"] = "It is sharp."
    return rows


def test_an_answer_that_is_always_the_same_is_named_with_its_question(qa_csv: Path) -> None:
    (problem, _) = check_csv(write(qa_csv, constant_rows(4)), image_split="train").problems
    assert (problem.kind, problem.is_error, problem.count) == ("constant answer", False, 1)
    # The first row with that answer.
    assert problem.places == ("line 6 column Q1, 'Is it blurry?': 96 of 100 times",)
    assert "constant answer" not in check(write(qa_csv, constant_rows(5)))
    assert "constant answer" not in check(write(qa_csv, constant_rows(0)[:49]))


def test_a_type_with_one_short_answer_is_constant_but_for_refusals(qa_csv: Path) -> None:
    rows = constant_rows(0, T1="brightness", S1="dark")
    for position, cells in enumerate(rows):
        cells |= {"Q1": f"How bright is part {position}?", "A1": f"Part {position} is dark."}
    assert check(write(qa_csv, rows, ["T1", "S1"]))["constant answer"] == ("type brightness: 'dark' 100 of 100 times",)
    for number, fields in enumerate(rows):
        fields["S1"] = ("dark", "Dark", " DARK.")[number % 3]
    (place,) = check(write(qa_csv, rows, ["T1", "S1"]))["constant answer"]
    assert place == "type brightness: 'dark' 100 of 100 times"
    rows = constant_rows(0, T1="refusal", S1="cannot tell")
    for cells in rows:
        cells["A1"] = "I cannot tell."
    assert set(check(write(qa_csv, rows, ["T1", "S1"]))) == {"empty pair"}


# ---------------------------------------------------------------------------------------------------------------------
# Whatever the reader refuses is an error


MUTATIONS = [
    "",
    ",",
    '"',
    "\n",
    "\r",
    "\x00",
    "ERROR",
    "<image>",
    "-",
    "x",
    " ",
    "\ufeff",
    "9" * 20,
    ",,",
    '""',
    "\n\n",
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data))
        stop = start + rng.choice((0, 1, 1, 2, 10))
        data = data[:start] + rng.choice([*map(str.encode, MUTATIONS), b"\xff", b"\xc3"]) + data[stop:]
        if rng.random() < 0.2:
            lines = data.split(b"\n")
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            data = b"\n".join(lines)
    return data


@pytest.mark.parametrize("seed", range(4))
def test_what_the_reader_refuses_is_an_error_and_what_has_no_error_it_reads(qa_csv: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [row(index, f"Q {index}?", "A.", "R,\n?", 'B "b".', Split="train", T1="object") for index in range(4)]
    sound = write(qa_csv, rows, ["Split", "T1"]).read_bytes()
    num_refused = 0
    for _ in range(30):
        qa_csv.write_bytes(mutated(sound, rng))
        report = check_csv(qa_csv)
        try:
            read_qa_csv(qa_csv, None, CIFAR10)
        except UserError as error:
            num_refused += 1
            assert report.num_errors > 0, (str(error), qa_csv.read_bytes())
    assert num_refused > 5


# ---------------------------------------------------------------------------------------------------------------------
# Images in training and evaluation


def test_an_image_in_both_files_is_an_error(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", [row(1), row(2), row(3)])
    second = write(tmp_path / "b.csv", [row(9), row(3), row(1), row("x")])
    (problem,) = check_csv(first, image_split="train", eval_csv=second).problems
    assert (problem.kind, problem.is_error, problem.count) == ("image in both files", True, 2)
    assert problem.places == ("line 2", "line 4")
    assert problem.example == f"train image 1 is in line 4 of {second} too"


def test_the_evaluation_may_be_in_another_split(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", [row(1)])
    second = write(tmp_path / "b.csv", [row(1, Split="test")], ["Split"])
    assert check(first, eval_csv=second) == {}
    second = write(tmp_path / "b.csv", [row(1, Split="train")], ["Split"])
    assert set(check(first, eval_csv=second)) == {"image in both files"}


def test_an_evaluation_that_names_no_image_is_a_user_error(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", [row(1, Split="train")], ["Split"])
    with pytest.raises(UserError, match="--eval-csv .*b.csv has no column Split; give --image-split"):
        check_csv(first, eval_csv=write(tmp_path / "b.csv", [row(1)]))
    with pytest.raises(UserError, match="--eval-csv .*b.csv names no image"):
        check_csv(first, eval_csv=write(tmp_path / "b.csv", [row("x", Split="test")], ["Split"]))
    with pytest.raises(UserError, match="none.csv cannot be read"):
        check_csv(first, eval_csv=tmp_path / "none.csv")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no CIFAR-10 at {SHARED}")
@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (0, -1)])
def test_a_picture_with_other_light_and_color_that_is_moved_is_found_and_others_are_not(down: int, right: int) -> None:
    pictures = small_pictures(load_images(str(SHARED / "cifar10"), "test"), range(200))
    color = torch.tensor([0.8, 0.9, 0.7]).view(3, 1, 1)
    copies = (pictures[::10].roll((down, right), dims=(2, 3)) * color + 25).round().to(torch.uint8)
    pairs = near_duplicates(pictures, copies)
    assert len(pairs) >= 15
    assert all(i == 10 * j and likeness <= 1.0001 for i, j, likeness in pairs)


def test_candidates_and_shifts_agree_with_a_naive_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigphi.train.near_duplicates._BLOCK", 3)
    pictures = small_pictures(load_images("synthetic:20", "train"), range(20))
    first, second = pictures[:10], torch.cat([pictures[5:], pictures[:2].roll(1, dims=3)])

    def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
        return max(
            float(details(one[:, 4:28, 4:28], 2, 8) @ details(other[:, 4 + y : 28 + y, 4 + x : 28 + x], 2, 8))
            for y in range(-2, 3)
            for x in range(-2, 3)
        )

    def details(pixels: torch.Tensor, cell: int, large_cell: int) -> torch.Tensor:
        side = pixels.shape[1]
        fine, coarse = (
            pixels.double().reshape(3, side // size, size, side // size, size).mean(dim=(2, 4))
            for size in (cell, large_cell)
        )
        drawn_up = torch.nn.functional.interpolate(coarse[None], size=fine.shape[1:], mode="bilinear")[0]
        flat = (fine - drawn_up).flatten()
        return (flat - flat.mean()) / (flat - flat.mean()).norm()

    naive = {
        (i, j): likeness(one, other)
        for i, one in enumerate(first)
        for j, other in enumerate(second)
        if float(details(one, 4, 16) @ details(other, 4, 16)) > 0.82 and likeness(one, other) > 0.91
    }
    pairs = near_duplicates(first, second)
    assert [(i, j) for i, j, _ in pairs] == list(naive) and {(5, 0), (9, 4), (0, 15)} <= set(naive)
    for i, j, value in pairs:
        assert value == pytest.approx(naive[i, j], abs=1e-5)


def test_pictures_without_detail_are_like_nothing_and_other_sizes_are_averaged_down() -> None:
    flat = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    assert near_duplicates(flat, flat) == []
    large = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    images = datasets.Dataset.from_dict({"img": [large]}, features=datasets.Features({"img": datasets.Image()}))
    (small,) = small_pictures(images, [0])
    naive = large.astype(np.float64).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(small.numpy() - naive).max() <= 0.5


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no CIFAR-10 at {SHARED}")
def test_near_duplicates_of_cifar10_are_warned_of(tmp_path: Path) -> None:
    # Pairs that ciFAIR lists as the same shot: https://cvjena.github.io/cifair/
    images = str(SHARED / "cifar10")
    train = [row(index, Split="train") for index in (0, 49007, 6801)]
    test = [row(index, Split="test") for index in (0, 6611, 2901)]
    names = ["train image 49007 is like test image 6611", "train image 6801 is like test image 2901"]
    one = check_csv(write(tmp_path / "a.csv", train + test, ["Split"]), images=images)
    (problem,) = one.problems
    assert (problem.kind, problem.is_error, problem.count) == ("near-duplicate image", False, 2)
    assert set(problem.places) == {f"line 3 and line 6: {names[0]}", f"line 4 and line 7: {names[1]}"}
    write(tmp_path / "a.csv", train, ["Split"])
    second = write(tmp_path / "b.csv", test, ["Split"])
    (problem,) = check_csv(tmp_path / "a.csv", images=images, eval_csv=second).problems
    assert set(problem.places) == {
        f"line 3 and line 3 of {second}: {names[0]}",
        f"line 4 and line 4 of {second}: {names[1]}",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Report and command


def test_places_are_kept_up_to_a_number_and_counted_beyond(qa_csv: Path) -> None:
    report = check_csv(write(qa_csv, [row("x") for _ in range(5)]), image_split="train", max_places=2)
    (problem,) = report.problems
    assert (problem.count, problem.places) == (5, ("line 2 column Dataset_Index", "line 3 column Dataset_Index"))
    assert "line 3 column Dataset_Index; 3 more" in format_report(report)
    for option in ("max_places", "max_characters"):
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} 0: it has to be 1 or more"):
            check_csv(qa_csv, **{option: 0})


def test_the_report_puts_errors_first_and_gives_every_line() -> None:
    findings = Findings(max_places=3)
    findings.add("empty pair", "line 2 column Q1", "-")
    findings.add("bad index", "line 3 column Dataset_Index", "'x'\nis  no row")
    report = CheckReport(findings.problems(), 2, 9, 1)
    assert report.num_errors == 1
    text = format_report(report)
    assert text.startswith(
        "2 rows, 9 pairs, 1 image.\n\nERROR  bad index: 1\n  at:      line 3 column Dataset_Index\n"
    )
    assert "\n  example: 'x' is no row\n  remedy:  Write the row of the image" in text
    assert text.index("ERROR") < text.index("warning  empty pair: 1")
    assert text.endswith("\n1 error, 1 warning.\n")
    assert max(map(len, text.split("\n"))) <= 119


def test_the_report_shows_what_cannot_be_printed_and_cuts_what_is_long() -> None:
    findings = Findings(max_places=3)
    findings.add("damaged text", "line 2 column A1", "a\x1b[2Jb\x00" + "c" * 1000)
    findings.add("empty pair", "line 3 column Q1", "")
    text = format_report(CheckReport(findings.problems(), 2, 9, 1))
    assert r"example: a\x1b[2Jb\x00ccc" in text and "\x1b" not in text
    assert text.count("c" * 20) < 20 and " ...\n" in text
    assert text.count("example:") == 1


def test_errors_come_before_warnings_in_the_table_of_kinds() -> None:
    levels = [is_error for is_error, _ in KINDS.values()]
    assert levels == sorted(levels, reverse=True)
    assert all(remedy.endswith((".", "?")) for _, remedy in KINDS.values())


def test_the_command_prints_the_report_and_fails_on_errors_only(
    qa_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(qa_csv, [row(1, "", "")])
    main(["check", str(qa_csv), "--image-split", "train"])
    assert "warning  empty pair: 1" in capsys.readouterr().out
    write(qa_csv, [row("x")])
    with pytest.raises(UserError, match=r"qa.csv: 1 error, named above"):
        main(["check", str(qa_csv), "--image-split", "train"])
    assert "ERROR  bad index: 1" in capsys.readouterr().out


def test_errors_end_the_command_with_code_2(qa_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(qa_csv, [row(1, "Q?", "ERROR")])
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "check", str(qa_csv), "--image-split=train"])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err == f"sigphi data: error: {qa_csv}: 1 error, named above with what to do.\n"
    assert "ERROR  failure as answer: 1" in printed.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "input_csv"),
        (["none.csv"], "none.csv cannot be read: No such file"),
        (["none.csv", "--image-split", "val"], "val"),
        (["none.csv", "--evl-csv", "x"], "Did you mean `--eval-csv`"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["check", *argv])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no sample at {SHARED}")
def test_every_fault_of_the_sample_of_the_earlier_annotator_is_named() -> None:
    sample = SHARED / "sample_qa_smolvlm_style.csv"
    failures, half_empty = [], []
    with sample.open(newline="", encoding="utf-8") as file:
        for line, cells in enumerate(csv.DictReader(file), start=2):
            for pair in range(1, 6):
                place = f"line {line} column A{pair}"
                failures += [place] * cells[f"A{pair}"].startswith("ERROR")
                half_empty += [place] * (cells[f"A{pair}"] == "")
    report = check_csv(sample, images=str(SHARED / "cifar10"), image_split="test")
    places = found(report)
    assert set(places) == {"failure as answer", "half-empty pair", "constant answer"}
    assert places["failure as answer"] == tuple(failures) and len(failures) == 30
    assert places["half-empty pair"] == tuple(half_empty) and len(half_empty) == 10
    assert (report.num_rows, report.num_errors) == (200, 40)


def test_problems_can_be_made_by_name() -> None:
    problem = Problem(kind="bad index", is_error=True, count=1, places=("line 2",), example="x", remedy="y")
    assert CheckReport(problems=[problem], num_rows=1, num_pairs=5, num_images=1).num_errors == 1
