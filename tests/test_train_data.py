import csv
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest

from sigphi.train.data import QA_FEATURES, data_facts, distinct_images, held_out, load_cifar10_qa, main
from sigphi.train.data_build import build_csv
from sigphi.train.errors import UserError
from sigphi.train.images import load_images
from sigphi.train.qa_csv import read_qa_csv

SHARED = Path(__file__).parents[2] / "shared" / "data"
HEADER = ["Dataset_Index", *(f"{letter}{pair}" for pair in range(1, 6) for letter in "QA")]
SIZES = {"train": 20, "test": 10}
SYNTHETIC = "synthetic:20"
# Models on the Hub tell by this hash which images they have not seen.
HELD_OUT_TRAIN = [0, 36, 38, 41, 48]
HELD_OUT_TEST = [5, 6, 7, 9, 14, 19, 32, 56]


def row(index: object, *pairs: str, **extra: str) -> dict[str, str]:
    """A CSV row from its index and its questions and answers in turn."""
    return {"Dataset_Index": str(index), **dict(zip(HEADER[1:], pairs, strict=False)), **extra}


def write(path: Path, rows: Sequence[dict[str, str]], extra: Sequence[str] = ()) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*HEADER, *extra], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def qa_csv(tmp_path: Path) -> Path:
    return tmp_path / "qa.csv"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "qa.csv"
    build_csv(path, "synthetic:200", "train")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Reading the CSV


def test_pairs_are_read_in_order_with_their_lines(qa_csv: Path) -> None:
    rows = [row(7, "Q a?", " A a. ", "Q\nb?", "A b."), row(7, "Q c?", "A c."), row(0, "", "", "NA", "None")]
    table = read_qa_csv(write(qa_csv, rows), "train", SIZES)
    # The second question goes over two lines of the file.
    assert table.rows["line"].tolist() == [2, 2, 4, 5]
    assert table.rows["pair"].tolist() == [1, 2, 1, 2]
    assert table.rows["dataset_index"].tolist() == [7, 7, 7, 0]
    assert table.rows["question"].tolist() == ["Q a?", "Q\nb?", "Q c?", "NA"]
    assert table.rows["answer"].tolist() == ["A a.", "A b.", "A c.", "None"]
    assert set(table.rows["split"]) == {"train"}
    assert set(table.rows["question_type"]) == set(table.rows["short_answer"]) == {""}
    assert (table.num_empty, table.num_faulty) == (3 + 4 + 4, 0)


def test_split_types_and_short_answers_are_optional_columns_and_others_ignored(qa_csv: Path) -> None:
    extra = {"Split": "test", "T1": "object", "S1": "cat", "Class_Label": "cat", "Concat_Q": '"""a"""'}
    write(qa_csv, [row(9, "Q?", "A cat.", **extra)], list(extra))
    table = read_qa_csv(qa_csv, None, SIZES)
    assert table.rows.drop(columns=["line", "pair"]).to_dict("records") == [
        {
            "split": "test",
            "dataset_index": 9,
            "question": "Q?",
            "answer": "A cat.",
            "question_type": "object",
            "short_answer": "cat",
        }
    ]


def test_a_file_without_split_needs_the_option(qa_csv: Path) -> None:
    write(qa_csv, [row(1, "Q?", "A.")])
    with pytest.raises(UserError, match="no column Split, .*--image-split train or --image-split test.*earlier"):
        read_qa_csv(qa_csv, None, SIZES)
    with pytest.raises(UserError, match="--image-split valid: it has to be train or test"):
        read_qa_csv(qa_csv, "valid", SIZES)


def test_a_wrong_split_names_its_line(qa_csv: Path) -> None:
    write(qa_csv, [row(1, "Q?", "A.", Split="train"), row(1, "R?", "A.", Split="val")], ["Split"])
    with pytest.raises(UserError, match=r"qa.csv, line 3, column Split: 'val' has to be train or test"):
        read_qa_csv(qa_csv, None, SIZES)
    write(qa_csv, [row(1, "Q?", "A.", Split="train")], ["Split"])
    with pytest.raises(UserError, match="line 2, column Split: 'train', but --image-split says test; leave that"):
        read_qa_csv(qa_csv, "test", SIZES)


@pytest.mark.parametrize("index", ["20", "-1", "cat", "1.0", "", "99999999999999999999999"])
def test_an_index_outside_the_split_names_line_value_and_size(qa_csv: Path, index: str) -> None:
    write(qa_csv, [row(19, "Q?", "A."), row(index, "Q?", "A.")])
    message = f"line 3, column Dataset_Index: '{index}' is no row of the train split, which has 20 images: 0 to 19"
    with pytest.raises(UserError, match=message):
        read_qa_csv(qa_csv, "train", SIZES)


def test_a_duplicate_names_both_lines(qa_csv: Path) -> None:
    write(qa_csv, [row(1, "Q?", "A."), row(2, "Q?", "A."), row(1, "R?", "A.", "Q?", "B.")])
    with pytest.raises(UserError, match=r"line 2 \(Q1\) and line 4 \(Q2\) ask the same of train image 1: 'Q\?'"):
        read_qa_csv(qa_csv, "train", SIZES)


def test_the_same_index_in_two_splits_is_no_duplicate(qa_csv: Path) -> None:
    write(qa_csv, [row(1, "Q?", "A.", Split=split) for split in ("train", "test")], ["Split"])
    assert len(read_qa_csv(qa_csv, None, SIZES).rows) == 2


FAULTY = [
    row(1, "Q?", "A.", "R?", ""),
    row(2, "", "A."),
    row(3, "Q?", "ERROR: CUDA out of memory."),
    row(4, "Q?", "ERROR"),
    row(5, "Q?", "An ERROR is shown."),
]


def test_faulty_pairs_are_counted_and_named_with_the_way_around_them(qa_csv: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_qa_csv(write(qa_csv, FAULTY), "train", SIZES)
    first, second = str(caught.value).split("\n")
    assert "4 questions or answers are missing, or answers start with ERROR" in first
    assert "line 2 column A2, line 3 column Q1, line 4 column A1, ..." in first
    assert "--on-faulty-answers skip" in second


def test_faulty_pairs_can_be_skipped(qa_csv: Path) -> None:
    table = read_qa_csv(write(qa_csv, FAULTY), "train", SIZES, on_faulty="skip")
    assert table.rows["answer"].tolist() == ["A.", "An ERROR is shown."]
    assert (table.num_empty, table.num_faulty) == (19, 4)
    with pytest.raises(UserError, match="--on-faulty-answers drop: it has to be error or skip"):
        read_qa_csv(qa_csv, "train", SIZES, on_faulty="drop")


@pytest.mark.parametrize(("question", "answer", "column"), [("What is <image>?", "A.", "Q2"), ("Q?", "<image>", "A2")])
def test_the_placeholder_of_the_image_is_refused(qa_csv: Path, question: str, answer: str, column: str) -> None:
    write(qa_csv, [row(1, "P?", "A.", question, answer)])
    with pytest.raises(UserError, match=f"line 2, column {column}: the text holds <image>"):
        read_qa_csv(qa_csv, "train", SIZES)


@pytest.mark.parametrize(
    ("question_type", "short_answer", "message"),
    [
        ("description", "a grey cat", "line 3, column S1: the short answer of a description .* got 'a grey cat'"),
        ("object", "?!", "line 3, column S1: a short answer has to hold a word, got '\\?!'"),
        ("of_my_own", "?!", "line 3, column S1"),
    ],
)
def test_a_short_answer_that_nothing_can_be_judged_by_is_refused(
    qa_csv: Path, question_type: str, short_answer: str, message: str
) -> None:
    sound = row(0, "What?", "A cat.", T1="description", S1="object=cat; category=animal")
    faulty = row(1, "What?", "A cat.", T1=question_type, S1=short_answer)
    write(qa_csv, [sound, faulty], ["T1", "S1"])
    with pytest.raises(UserError, match=message):
        read_qa_csv(qa_csv, "train", SIZES)
    write(qa_csv, [sound, faulty | {"S1": ""}], ["T1", "S1"])
    assert len(read_qa_csv(qa_csv, "train", SIZES).rows) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "qa.csv: no column Dataset_Index|qa.csv is empty"),
        ((",".join(HEADER) + "\n\n").encode(), "qa.csv is empty; it needs a header and at least one row"),
        ((",".join(HEADER) + "\n1,,,,,,,,,,\n").encode(), "holds no pair of a question and an answer; fill Q1 and A1"),
        (b"Dataset_Index,Q1,A1\n1,Q?,A.\n", "no column Q2, A2, Q3, .*; the header has Dataset_Index, Q1, A1"),
        (b"Dataset_Index;Q1;A1\n1;Q?;A.\n", "no column Dataset_Index, .*; the header has Dataset_Index;Q1;A1"),
        (b'Dataset_Index\tQ1\tA1\n1\t"Q,\nQ?"\tA, a\n', "no column Dataset_Index, .*; the header has Dataset_Index"),
        ((",".join([*HEADER, "Q1"]) + "\n" + "1," * 11 + "\n").encode(), "2 columns are named Q1; rename or remove"),
        ((",".join(HEADER) + "\n1,Q,A\n").encode(), "line 2: 3 cells, but the header has 11; put cells with commas"),
        ((",".join(HEADER) + '\n1,"Q' + "," * 9 + "\n").encode(), "line 2: this is not CSV"),
        (
            (",".join(HEADER) + "\n1,caf\xe9" + "," * 9 + "\n").encode("latin-1"),
            "line 2, is not text in UTF-8; save it as",
        ),
        # Further on than a file is read at once.
        (
            (",".join(HEADER) + "\n" + ("1," + "q" * 98 + ",A" + "," * 8 + "\n") * 999 + "1,\xe9\n").encode("latin-1"),
            "line 1001, is not text in UTF-8",
        ),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1, is not text in UTF-8"),
        ((",".join(HEADER) + "\n").encode("utf-16"), "line 1, is not text in UTF-8"),
    ],
)
def test_a_file_that_is_no_sound_csv_is_refused(qa_csv: Path, content: bytes, message: str) -> None:
    qa_csv.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_qa_csv(qa_csv, "train", SIZES)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.csv cannot be read: No such file or directory; give a CSV file"):
        read_qa_csv(tmp_path / "none.csv", "train", SIZES)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_qa_csv(tmp_path, "train", SIZES)


def test_a_byte_order_mark_is_no_part_of_the_header(qa_csv: Path) -> None:
    write(qa_csv, [row(1, "Q?", "A.")])
    qa_csv.write_bytes(b"\xef\xbb\xbf" + qa_csv.read_bytes())
    assert len(read_qa_csv(qa_csv, "train", SIZES).rows) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no sample at {SHARED}")
def test_the_sample_of_the_earlier_annotator_is_read() -> None:
    sample = SHARED / "sample_qa_smolvlm_style.csv"
    with pytest.raises(UserError, match=r"40 questions or answers .* line 2 column A4"):
        read_qa_csv(sample, "test", {"test": 10_000})
    table = read_qa_csv(sample, "test", {"test": 10_000}, on_faulty="skip")
    assert (len(table.rows), table.num_faulty, table.num_empty) == (960, 40, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Joining it with its images


def test_held_out_is_fixed_for_all_time() -> None:
    assert [index for index in range(60) if held_out(index, "train", 0.1, 0)] == HELD_OUT_TRAIN
    assert [index for index in range(60) if held_out(index, "test", 0.1, 0)] == HELD_OUT_TEST


def test_held_out_has_its_share_grows_with_it_and_depends_on_the_seed() -> None:
    def chosen(fraction: float, seed: int = 0) -> set[int]:
        return {index for index in range(10_000) if held_out(index, "train", fraction, seed)}

    assert len(chosen(0.1)) / 10_000 == pytest.approx(0.1, abs=0.01)
    assert chosen(0.1) < chosen(0.3)
    assert len(chosen(0.1) & chosen(0.1, seed=1)) < 200
    assert chosen(0.0) == set() and len(chosen(1.0)) == 10_000


def test_a_csv_is_joined_with_the_images_it_names(qa_csv: Path) -> None:
    extra = {"T1": "object", "S1": "frog"}
    rows = [
        row(3, "Q?", "A.", Split="test", **extra),
        row(3, "Q?", "A.", Split="train"),
        row(0, "Q?", "A.", Split="train"),
    ]
    write(qa_csv, rows, ["Split", "T1", "S1"])
    dataset = load_cifar10_qa(qa_csv, SYNTHETIC, eval_fraction=0)
    assert list(dataset) == ["train"]
    assert dataset["train"].features == QA_FEATURES
    sources = {split: load_images(SYNTHETIC, split) for split in ("train", "test")}
    for joined, (split, index) in zip(dataset["train"], (("test", 3), ("train", 3), ("train", 0)), strict=True):
        assert (joined["split"], joined["dataset_index"]) == (split, index)
        assert joined["label"] == sources[split][index]["label"]
        assert joined["image"].tobytes() == sources[split][index]["img"].tobytes()
    assert dataset["train"]["question_type"][:] == ["object", "", ""]
    assert dataset["train"]["short_answer"][:] == ["frog", "", ""]


def test_no_image_is_in_both_parts_and_no_row_is_lost(built: Path) -> None:
    dataset = load_cifar10_qa(built, "synthetic:200", eval_fraction=0.2)
    images = {name: set(part["dataset_index"]) for name, part in dataset.items()}
    assert not images["train"] & images["eval"]
    assert images["train"] | images["eval"] == set(range(200))
    assert images["eval"] == {index for index in range(200) if held_out(index, "train", 0.2, 0)}
    assert len(dataset["train"]) + len(dataset["eval"]) == 1000
    assert len(dataset["eval"]) == 5 * len(images["eval"])


def test_fractions_of_zero_and_one_leave_one_part(built: Path) -> None:
    assert {name: len(part) for name, part in load_cifar10_qa(built, "synthetic:200", eval_fraction=0).items()} == {
        "train": 1000
    }
    assert {name: len(part) for name, part in load_cifar10_qa(built, "synthetic:200", eval_fraction=1).items()} == {
        "eval": 1000
    }


def test_a_part_without_images_names_the_fraction(qa_csv: Path) -> None:
    write(qa_csv, [row(1, "Q?", "A."), row(2, "Q?", "A.")])
    with pytest.raises(UserError, match="--eval-fraction 0.0001 leaves no image of 2 for eval; .* or 0 to do without"):
        load_cifar10_qa(qa_csv, SYNTHETIC, "train", eval_fraction=0.0001)
    with pytest.raises(
        UserError, match="--eval-fraction 0.9999 leaves no image of 2 for train; .* or 1 to do without"
    ):
        load_cifar10_qa(qa_csv, SYNTHETIC, "train", eval_fraction=0.9999)
    with pytest.raises(UserError, match="--eval-fraction 1.5: it has to lie in 0 to 1"):
        load_cifar10_qa(qa_csv, SYNTHETIC, "train", eval_fraction=1.5)


def test_counts_are_logged(qa_csv: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sigphi.train.data")
    load_cifar10_qa(write(qa_csv, FAULTY), SYNTHETIC, "train", eval_fraction=0, on_faulty="skip")
    assert "2 questions about 2 images; left out: 19 empty pairs, 4 faulty ones." in caplog.text


def test_encoded_images_are_not_encoded_again(tmp_path: Path, qa_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = load_images(SYNTHETIC, "train")
    (tmp_path / "set").mkdir()
    images.to_parquet(tmp_path / "set" / "train.parquet")
    write(qa_csv, [row(index, f"Q{pair}?", "A.") for index in (19, 0) for pair in range(2)])
    joined = load_cifar10_qa(qa_csv, str(tmp_path / "set"), "train", eval_fraction=0)["train"]
    encoded = joined.cast_column("image", datasets.Image(decode=False))
    source = images.cast_column("img", datasets.Image(decode=False))
    assert [picture["bytes"] for picture in encoded["image"]] == [source[i]["img"]["bytes"] for i in (19, 19, 0, 0)]


def test_distinct_images_keep_the_order_of_first_occurrence(qa_csv: Path) -> None:
    places = [("train", 5), ("test", 5), ("train", 1), ("train", 5), ("test", 5), ("train", 0)]
    write(qa_csv, [row(i, f"Q{n}?", "A.", Split=split) for n, (split, i) in enumerate(places)], ["Split"])
    dataset = load_cifar10_qa(qa_csv, SYNTHETIC, eval_fraction=0)["train"]
    images, positions = distinct_images(dataset)
    assert images.column_names == ["img", "label"]
    assert positions == [0, 1, 2, 0, 1, 3]
    sources = {split: load_images(SYNTHETIC, split) for split in ("train", "test")}
    for image, (split, index) in zip(images, (places[0], places[1], places[2], places[5]), strict=True):
        assert image["img"].tobytes() == sources[split][index]["img"].tobytes()
        assert image["label"] == sources[split][index]["label"]


def test_data_facts_count_and_tell_data_apart(built: Path) -> None:
    dataset = load_cifar10_qa(built, "synthetic:200", eval_fraction=0)["train"]
    facts = data_facts(dataset)
    assert (facts["num_rows"], facts["num_images"]) == (1000, 200)
    assert facts["images_per_split"] == {"train": 200}
    assert facts["rows_per_question_type"]["object"] == 200
    assert sum(facts["rows_per_question_type"].values()) == 1000
    assert facts == data_facts(load_cifar10_qa(built, "synthetic:200", eval_fraction=0)["train"])
    assert facts["fingerprint"] != data_facts(dataset.select(range(999)))["fingerprint"]
    assert facts["fingerprint"] != data_facts(dataset.select([1, 0, *range(2, 1000)]))["fingerprint"]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a subcommand is missing; `sigphi data` has: build"),
        (["bild"], "there is no subcommand 'bild'; `sigphi data` has: build"),
        (["build", "--output", "x.csv", "--image-splt", "train"], "--image-splt"),
        (["build"], "--output"),
        (["build", "--output", "x.csv", "--image-split", "val"], "val"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(argv)


def test_help_names_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert re.search("\nbuild +make a CSV", printed) and re.search("\nannotate +let a vision-language model", printed)
