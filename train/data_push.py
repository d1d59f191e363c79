"""`sigphi data push`: publish questions and answers as a `datasets` repository on the Hub.

```bash
sigphi data push qa.csv --repo-id alice/cifar10-qa
```
"""

import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import CommitInfo
from transformers.hf_argparser import HfArg

from sigphi.hub_card.dataset_card import Annotation, QaSet, QuestionType, write_dataset_card
from sigphi.train.arguments import one_of
from sigphi.train.data import data_facts, load_cifar10_qa
from sigphi.train.errors import UserError
from sigphi.train.hub import HubRepo, PublishArguments, check_license, check_login, files_in
from sigphi.train.parser import parse_arguments

# The Hub's word for what is held out to choose by; its `test` would be taken for CIFAR-10's.
SPLIT_NAMES = {"train": "train", "eval": "validation"}
# With pictures of CIFAR-10 about 250 MB.
_ROWS_A_FILE = 100_000


@dataclass
class DataPushArguments(PublishArguments):
    """Options of `sigphi data push`."""

    _argument_group_name = "data push"

    images: str = HfArg(
        help="Images: a Hub id, a folder in the same schema, torchvision's download folder, or 'synthetic'.",
        default="uoft-cs/cifar10",
    )
    image_split: str | None = HfArg(
        help="'train' or 'test': the split that Dataset_Index counts in; needed when the CSV has no Split column.",
        default=None,
    )
    on_faulty_answers: str = HfArg(
        help="'error' or 'skip': what to do with half-empty pairs and answers that begin with ERROR.", default="error"
    )
    eval_fraction: float = HfArg(help="Share of the images that become the split `validation`.", default=0.1)
    split_seed: int = HfArg(help="Seed of the hash that decides which images these are.", default=0)
    with_images: bool = HfArg(help="Publish the pictures too, one a row.", default=False)
    license: str = HfArg(help="License of the questions and answers, as the Hub writes it: 'mit'.", default="unknown")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("--on-faulty-answers", self.on_faulty_answers, ("error", "skip"))
        if self.image_split is not None:
            one_of("--image-split", self.image_split, ("train", "test"))
        if not 0 <= self.eval_fraction <= 1:
            raise UserError(f"--eval-fraction must be between 0 and 1, got {self.eval_fraction}.")
        check_license(self.license)
        if self.images.startswith("synthetic") and not self.with_images:
            raise UserError(
                f"--images {self.images}: nobody can look up pictures drawn in code; publish them by --with-images."
            )


def write_qa_repo(folder: Path, dataset: datasets.DatasetDict, input_csv: Path, options: DataPushArguments) -> None:
    """Write what is to be published: `data/SPLIT-NUMBER-of-COUNT.parquet` and the card `README.md`.

    Args:
        folder (`Path`): an empty one.
        dataset (`datasets.DatasetDict`): as of [`load_cifar10_qa`], its split `eval` becomes `validation`.
        input_csv (`Path`): what it was read from.
        options (`DataPushArguments`): where the images came from, how they were split, and what the card tells.
    """
    parts = datasets.DatasetDict({SPLIT_NAMES[name]: part for name, part in dataset.items()})
    if not options.with_images:
        parts = parts.remove_columns("image")
    (folder / "data").mkdir()
    num_bytes = {name: _write_parquet(folder / "data", name, part) for name, part in parts.items()}
    columns = next(iter(parts.values())).column_names
    qa = QaSet(
        repo_id=options.repo_id,
        license=options.license,
        images=None if Path(options.images).is_dir() else options.images,
        columns=columns,
        eval_fraction=options.eval_fraction,
        split_seed=options.split_seed,
        splits={name: data_facts(part) for name, part in parts.items()},
        types=question_types(parts),
        dataset_info=_dataset_info(parts, num_bytes),
        annotation=_annotation(input_csv),
    )
    write_dataset_card(folder, qa)


def _write_parquet(folder: Path, name: str, part: datasets.Dataset) -> int:
    """Write a split in files of bounded size, and return how many bytes it has in memory."""
    num_files = -(-len(part) // _ROWS_A_FILE)
    num_bytes = 0
    for number in range(num_files):
        rows = part.shard(num_files, number, contiguous=True)
        if "image" in rows.column_names:
            # Otherwise pictures of a local folder would be published as their paths.
            rows = rows.with_format("arrow").map(
                embed_table_storage, batched=True, keep_in_memory=True, desc="Embedding pictures"
            )
        num_bytes += rows.with_format(None).to_parquet(folder / f"{name}-{number:05d}-of-{num_files:05d}.parquet")
    return num_bytes


def _dataset_info(parts: datasets.DatasetDict, num_bytes: dict[str, int]) -> dict:
    """Features and splits for the card's header, against which `load_dataset` checks what it has read."""
    splits = datasets.SplitDict()
    for name, part in parts.items():
        splits.add(datasets.SplitInfo(name=name, num_bytes=num_bytes[name], num_examples=len(part)))
    info = datasets.DatasetInfo(features=next(iter(parts.values())).features, splits=splits)
    header: dict = {}
    DatasetInfosDict({"default": info}).to_dataset_card_data(header)
    return header["dataset_info"]


def _annotation(input_csv: Path) -> Annotation | None:
    """What `sigphi data annotate` has left beside its CSV; None where there is nothing."""
    path = input_csv.with_name(input_csv.name + ".agreement.json")
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    model, revision = record["settings"]["--model"], record["settings"]["--revision"]
    judged = record["agreement"].values()
    num_judged = sum(kind["answers"] for kind in judged)
    num_right = sum(kind["answers"] * kind["agreement"] for kind in judged)
    # A local folder is recorded by its absolute path, which is not to be published.
    return Annotation(
        None if Path(model).is_absolute() else f"{model}, revision {revision}",
        num_judged,
        num_right / max(num_judged, 1),
    )


def question_types(parts: datasets.DatasetDict) -> list[QuestionType]:
    """Count the rows of each question type, and find the commonest short answer.

    Args:
        parts (`datasets.DatasetDict`): with the columns `question_type` and `short_answer`.

    Returns:
        `list[QuestionType]`: in the order of the alphabet; rows without a type come first, as the type `""`.
    """
    columns = ["question_type", "short_answer"]
    rows = pd.concat({name: part.select_columns(columns).to_pandas() for name, part in parts.items()}, names=["part"])
    types = []
    for kind, group in rows.groupby("question_type"):
        answers = Counter(group["short_answer"][group["short_answer"] != ""])
        (commonest, count), *_ = answers.most_common(1) or [("", 0)]
        num_rows = group.groupby("part").size()
        num_rows_of = {name: int(num_rows.get(name, 0)) for name in parts}
        types.append(QuestionType(kind, num_rows_of, answers.total(), commonest, count / max(answers.total(), 1)))
    return types


def publish(folder: Path, repo: HubRepo) -> CommitInfo:
    """Make the repository, if need be, and commit `folder` to it, see [`HubRepo.commit`].

    Files under `data/` of an earlier push disappear in the same commit; others stay.

    Args:
        folder (`Path`): of [`write_qa_repo`].
        repo (`HubRepo`): where to.

    Raises:
        UserError: if the Hub refuses or cannot be reached, and if a public repository was to be private.
    """
    repo.make()
    paths, head = files_in(folder), repo.head()
    names = [file.rfilename for file in head.siblings]
    old = [name for name in names if name.startswith("data/") and name not in paths]
    return repo.commit(paths, old, "Questions and answers with their card", head.sha)


def main(argv: list[str]) -> None:
    """`sigphi data push FILE --repo-id OWNER/NAME`: publish, and print the address and the line that loads it."""
    options, input_csv = parse_arguments(
        [DataPushArguments], argv, "sigphi data push", [("input_csv", None, "CSV of questions and answers")]
    )
    check_login(options.repo_id)
    dataset = load_cifar10_qa(
        input_csv,
        options.images,
        options.image_split,
        options.eval_fraction,
        options.split_seed,
        options.on_faulty_answers,
    )
    with tempfile.TemporaryDirectory(prefix="sigphi-") as folder:
        write_qa_repo(Path(folder), dataset, Path(input_csv), options)
        repo = HubRepo(options, "dataset")
        commit = publish(Path(folder), repo)
    address, revision = repo.address(commit)
    at = "" if revision is None else f", revision={json.dumps(revision)}"
    sys.stdout.write(f"{address}\nload_dataset({json.dumps(options.repo_id)}{at})\n")


__all__ = ["SPLIT_NAMES", "DataPushArguments", "main", "publish", "question_types", "write_qa_repo"]
