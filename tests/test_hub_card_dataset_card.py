"""The card of a set of questions and answers tells what is known of it, and words of a CSV cannot break it."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard

from sigphi.hub_card.dataset_card import QA_COLUMNS, Annotation, QaSet, QuestionType, write_dataset_card

FINGERPRINT = "0123456789abcdef" * 4
HOSTILE = [
    "</code><script>alert(1)</script>",
    "`<img src=x onerror=alert(1)>`",
    "``` \n---\nlicense: mit\n---\n# Owned",
    "a | b\n| c | d |",
    "[click](javascript:alert(1)) ![](https://evil.example/pixel.png)",
    "$repo_id ${header} $$",
    "\u202eright to left\x00\x1b[31m",
    "a\\",
    "{{ 7 * 7 }} {% raw %}",
]


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n", 2)[1])


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def qa_set(**fields: Any) -> QaSet:
    splits = {
        "train": {"num_rows": 900, "num_images": 180, "images_per_split": {"train": 170, "test": 10}},
        "validation": {"num_rows": 100, "num_images": 20, "images_per_split": {"train": 20}},
    }
    facts: dict[str, Any] = {
        "repo_id": "somebody/some-set",
        "license": "unknown",
        "images": "uoft-cs/cifar10",
        "columns": [name for name in QA_COLUMNS if name != "image"],
        "eval_fraction": 0.1,
        "split_seed": 7,
        "splits": {name: split | {"fingerprint": FINGERPRINT} for name, split in splits.items()},
        "types": [
            QuestionType("", {"train": 30, "validation": 4}, 0, "", 0.0),
            QuestionType("object", {"train": 870, "validation": 96}, 960, "cat", 0.125),
        ],
        "dataset_info": {"features": [{"name": "label", "dtype": "int64"}]},
    }
    return QaSet(**facts | fields)


def dataset_card(folder: Path, **fields: Any) -> str:
    write_dataset_card(folder, qa_set(**fields))
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_header_of_a_set_is_what_the_hub_reads(tmp_path):
    text = dataset_card(tmp_path, license="cc-by-4.0")
    data = DatasetCard(text).data.to_dict()
    assert header(text) == data
    assert (data["license"], data["size_categories"], data["source_datasets"]) == (
        "cc-by-4.0",
        ["1K<n<10K"],
        ["uoft-cs/cifar10"],
    )
    files = [{"split": name, "path": f"data/{name}-*"} for name in ("train", "validation")]
    assert data["configs"] == [{"config_name": "default", "data_files": files}]
    assert data["dataset_info"] == {"features": [{"name": "label", "dtype": "int64"}]}


@pytest.mark.parametrize(
    ("num_rows", "size"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (250_000, "100K<n<1M"), (10**7, "10M<n<100M")],
)
def test_the_size_of_a_set_is_one_of_the_hubs(tmp_path, num_rows, size):
    splits = {"train": {"num_rows": num_rows, "num_images": 1, "images_per_split": {}, "fingerprint": FINGERPRINT}}
    types = [QuestionType("", {"train": num_rows}, 0, "", 0.0)]
    assert header(dataset_card(tmp_path, splits=splits, types=types))["size_categories"] == [size]


def test_the_card_of_a_set_tells_columns_splits_and_types(tmp_path):
    text = dataset_card(tmp_path)
    assert "1000 questions with their answers about 200 images of `uoft-cs/cifar10`, split by image." in text
    for name in QA_COLUMNS:
        assert (f"| `{name}` | " in text) == (name != "image")
    assert f"| `train` | 170 of `train`, 10 of `test` | 900 | `{FINGERPRINT}` |" in text
    assert f"| `validation` | 20 of `train` | 100 | `{FINGERPRINT}` |" in text
    assert "| without a type | 30 | 4 | 0 |  |  |" in text
    assert "| `object` | 870 | 96 | 960 | `cat` | 0.125 |" in text
    assert "`--eval-fraction 0.1 --split-seed 7`" in text
    assert "does not record where its answers come from" in text and "`sigphi.train.facts`" in text
    assert "$" not in text


def test_the_code_of_a_set_names_it_and_its_pictures(tmp_path):
    code = "\n".join(code_blocks(dataset_card(tmp_path)))
    ast.parse(code)
    assert 'qa = load_dataset("somebody/some-set")' in code
    assert 'source = load_dataset("uoft-cs/cifar10")' in code
    with_pictures = dataset_card(tmp_path, columns=list(QA_COLUMNS))
    assert len(code_blocks(with_pictures)) == 1 and 'picture in `row["image"]`' in with_pictures
    only_held_out = {"validation": qa_set().splits["validation"]}
    assert 'qa["validation"][0]' in dataset_card(tmp_path, splits=only_held_out)


@pytest.mark.parametrize(
    ("images", "told", "source_datasets"),
    [
        ("uoft-cs/cifar10", "CIFAR-10 (Krizhevsky, 2009", ["uoft-cs/cifar10"]),
        ("somebody/pictures", "The license of the images is that of `somebody/pictures`.", ["somebody/pictures"]),
        ("synthetic:60", "The pictures are drawn by `sigphi.train.synthetic` (Apache-2.0).", None),
        (None, "Whose images these are is not recorded.", None),
    ],
)
def test_the_source_of_the_images_is_told_as_far_as_it_is_known(tmp_path, images, told, source_datasets):
    text = dataset_card(tmp_path, images=images)
    assert told in text and header(text).get("source_datasets") == source_datasets
    assert ("Krizhevsky" in text) == (images in (None, "uoft-cs/cifar10"))
    assert ("if the local folder was a copy of it" in text) == (images is None)


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        (None, "does not record where its answers come from. Those of\n`sigphi data build` follow"),
        (Annotation("a/b, revision main", 40, 0.875), "written by `a/b, revision main` (`sigphi data annotate`)"),
        (
            Annotation("a/b, revision main", 40, 0.875),
            "Of 40 that could be judged, by the image's class and the rules",
        ),
        (Annotation(None, 0, 0.0), "written by a model in a local folder (`sigphi data annotate`), and can be wrong."),
        (Annotation(None, 0, 0.0), "None of them could be judged."),
    ],
)
def test_who_wrote_the_answers_is_told_where_it_is_recorded(tmp_path, annotation, told):
    text = dataset_card(tmp_path, annotation=annotation)
    assert told in text and ("87.5% are right" in text) == (annotation is not None and annotation.num_judged > 0)


def test_a_license_is_told_or_said_to_be_unknown(tmp_path):
    assert "\nNo license is stated. The license of the images" in dataset_card(tmp_path)
    assert "\nLicense: `mit`. The license of the images" in dataset_card(tmp_path, license="mit")


@pytest.mark.parametrize("text", HOSTILE)
def test_words_of_a_csv_break_neither_header_nor_text(tmp_path, text):
    kind = QuestionType(text, {"train": 1, "validation": 2}, 3, text, 1.0)
    plain = dataset_card(tmp_path)
    hostile = dataset_card(tmp_path, types=[*qa_set().types, kind])
    assert header(hostile) == header(plain)
    added = [line for line in hostile.splitlines() if line not in plain.splitlines()]
    # One row of a table of six cells, and nothing of the text outside code.
    assert len(added) == 1 and len(hostile.splitlines()) == len(plain.splitlines()) + 1
    assert re.fullmatch(r"\| `[^`|]+` \| 1 \| 2 \| 3 \| `[^`|]+` \| 1.000 \|", added[0])
    assert added[0].isprintable()


def test_a_long_text_is_cut(tmp_path):
    kind = QuestionType("long " * 100, {"train": 1, "validation": 2}, 0, "", 0.0)
    line = next(line for line in dataset_card(tmp_path, types=[kind]).splitlines() if line.startswith("| `long"))
    assert "...` | 1 | 2 | 0 |  |  |" in line and len(line) < 100
