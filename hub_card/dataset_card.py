"""The card of a set of questions and answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import DatasetCardData

from sigphi.hub_card.cards import TEMPLATES
from sigphi.hub_card.markdown import code, table

# Column -> its type, and what it holds.
QA_COLUMNS = {
    "image": ("Image", "the picture, encoded as in its source"),
    "label": ("ClassLabel", "the image's class in the source, 0 (airplane) to 9 (truck)"),
    "dataset_index": ("int64", "the image's row in its split of the source, from 0"),
    "split": ("string", "that split of the source: `train` or `test`"),
    "question": ("string", "the question"),
    "answer": ("string", "its answer in words"),
    "question_type": ("string", "what is asked for; empty where unknown"),
    "short_answer": ("string", "the answer in a form that can be checked; empty where there is none"),
}
# The most rows of each class of size that the Hub knows.
_SIZE_CATEGORIES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


@dataclass(frozen=True)
class QuestionType:
    """The rows of one type of question.

    Args:
        name (`str`): the type, empty for rows without one.
        rows (`dict[str, int]`): how many there are in each split of the set.
        num_checkable (`int`): how many have a short answer.
        commonest (`str`): the commonest short answer, empty where there is none.
        share (`float`): of that one among all short answers, 0 to 1; 0 where there is none.
    """

    name: str
    rows: dict[str, int]
    num_checkable: int
    commonest: str
    share: float


@dataclass(frozen=True)
class Annotation:
    """That a vision-language model wrote the answers.

    Args:
        model (`str`, *optional*): its Hub id and revision; None for a local folder.
        num_judged (`int`): how many of its answers could be compared with a truth.
        agreement (`float`): the share of these that agree, 0 to 1.
    """

    model: str | None
    num_judged: int
    agreement: float


@dataclass(frozen=True)
class QaSet:
    """What the card of a set of questions and answers tells.

    Args:
        repo_id (`str`): `owner/name` on the Hub, as [`huggingface_hub.utils.validate_repo_id`] allows.
        license (`str`): an identifier that the Hub knows; `"unknown"` where none is stated.
        images (`str`, *optional*): the Hub id of the images' source, or `"synthetic..."` for pictures drawn in code;
            None for a local folder, whose path is not published.
        columns (`Sequence[str]`): of `QA_COLUMNS`, those that the set has.
        eval_fraction (`float`): the share of images held out.
        split_seed (`int`): decides which ones.
        splits (`dict[str, dict]`): for each split `num_images`, `images_per_split` (of the source), `num_rows` and
            `fingerprint`.
        types (`Sequence[QuestionType]`): every type.
        dataset_info (`dict`): features and splits as `datasets` writes them into a card's header.
        annotation (`Annotation`, *optional*): of the answers; None where nothing is recorded of how they were made.
    """

    repo_id: str
    license: str
    images: str | None
    columns: Sequence[str]
    eval_fraction: float
    split_seed: int
    splits: dict[str, dict[str, Any]]
    types: Sequence[QuestionType]
    dataset_info: dict[str, Any]
    annotation: Annotation | None = None


def write_dataset_card(folder: Path, qa: QaSet) -> None:
    """
    Write `README.md` of a set of questions and answers, whose Parquet files are `data/SPLIT-*`.

    Question types and short answers are words of whoever wrote the CSV: they are shown as code, in which neither HTML
    nor Markdown means anything.

    Args:
        folder (`Path`): where to.
        qa (`QaSet`): what to tell.
    """
    facts = {
        "header": _dataset_header(qa),
        "num_rows": sum(split["num_rows"] for split in qa.splits.values()),
        "num_images": sum(split["num_images"] for split in qa.splits.values()),
        "repo_id": json.dumps(qa.repo_id),
        "first_split": next(iter(qa.splits)),
        "columns": table(["column", "type", "holds"], [[f"`{name}`", *QA_COLUMNS[name]] for name in qa.columns]),
        "eval_fraction": qa.eval_fraction,
        "split_seed": qa.split_seed,
        "splits": _splits(qa.splits),
        "types": _types(qa),
        "made": _made(qa.annotation),
        "license": "No license is stated." if qa.license == "unknown" else f"License: {code(qa.license)}.",
        **_source(qa.images, "image" in qa.columns),
    }
    template = Template((TEMPLATES / "dataset.md").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(template.substitute(facts), encoding="utf-8")


def _dataset_header(qa: QaSet) -> str:
    num_rows = sum(split["num_rows"] for split in qa.splits.values())
    size = next((name for most, name in _SIZE_CATEGORIES.items() if num_rows < most), "10M<n<100M")
    data_files = [{"split": name, "path": f"data/{name}-*"} for name in qa.splits]
    data = DatasetCardData(
        pretty_name="Questions and answers about small images",
        license=qa.license,
        task_categories=["visual-question-answering"],
        size_categories=[size],
        source_datasets=[qa.images] if qa.images and not qa.images.startswith("synthetic") else None,
        tags=["sigphi"],
        dataset_info=qa.dataset_info,
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    return data.to_yaml()


def _source(images: str | None, with_pictures: bool) -> dict[str, str]:
    """What the card says of the source, of where the pictures are, and of their license."""
    if images is None:
        source = "a local folder in the schema of `uoft-cs/cifar10`"
        rights = "Whose images these are is not recorded."
    elif images.startswith("synthetic"):
        source, rights = code(images), "The pictures are drawn by `sigphi.train.synthetic` (Apache-2.0)."
    else:
        source, rights = code(images), f"The license of the images is that of {code(images)}."
    if images in (None, "uoft-cs/cifar10"):
        rights += (
            " CIFAR-10 (Krizhevsky, 2009: Learning Multiple Layers of Features from Tiny Images) comes without one."
        )
    pictures = 'Each row has its picture in `row["image"]`.' if with_pictures else _pictures_elsewhere(images)
    return {"source": source, "rights": rights, "pictures": pictures}


def _pictures_elsewhere(images: str | None) -> str:
    origin = images or "uoft-cs/cifar10"
    caveat = "" if images else ", if the local folder was a copy of it; a `label` that differs tells that it was not"
    return (
        f"The pictures are not in this set. They are in {code(origin)}{caveat}:\n\n"
        f"```python\nsource = load_dataset({json.dumps(origin)})\n"
        'picture = source[row["split"]][row["dataset_index"]]\n```'
    )


def _made(annotation: Annotation | None) -> str:
    if annotation is None:
        return (
            "The file that this set was made from does not record where its answers come from. Those of\n"
            "`sigphi data build` follow from the image's class and pixels by fixed rules, which the docstrings of\n"
            "`sigphi.train.facts` state. Those that a vision-language model wrote can be wrong."
        )
    model = code(annotation.model) if annotation.model else "a model in a local folder"
    judged = (
        f"Of {annotation.num_judged} that could be judged, by the image's class and the rules of `sigphi.train.facts`,"
    )
    return f"They were written by {model} (`sigphi data annotate`), and can be wrong.\n" + (
        f"{judged} {annotation.agreement:.1%} are right." if annotation.num_judged else "None of them could be judged."
    )


def _splits(splits: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, split in splits.items():
        images = ", ".join(f"{count} of `{origin}`" for origin, count in split["images_per_split"].items())
        rows.append([f"`{name}`", images, f"{split['num_rows']}", f"`{split['fingerprint']}`"])
    return table(["split", "images, by split of the source", "questions", "fingerprint"], rows)


def _types(qa: QaSet) -> str:
    header = ["type", *(f"`{name}`" for name in qa.splits), "with short answer", "commonest", "share"]
    rows = []
    for kind in qa.types:
        name = code(kind.name) if kind.name else "without a type"
        counts = [f"{kind.rows[split]}" for split in qa.splits]
        best = [code(kind.commonest), f"{kind.share:.3f}"] if kind.num_checkable else ["", ""]
        rows.append([name, *counts, f"{kind.num_checkable}", *best])
    return table(header, rows)


__all__ = ["QA_COLUMNS", "Annotation", "QaSet", "QuestionType", "write_dataset_card"]
