"""`sigphi data push`: publish questions and answers as a `datasets` repository on the Hub.

```bash
sigphi data push qa.csv --repo-id alice/cifar10-qa
```
"""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import datasets
import pandas as pd
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from transformers.hf_argparser import HfArg

from sigphi.hub_card.dataset_card import Annotation, QaSet, QuestionType, write_dataset_card
from sigphi.train.arguments import one_of
from sigphi.train.data import data_facts, load_cifar10_qa
from sigphi.train.errors import UserError
from sigphi.train.parser import parse_arguments

# The Hub's word for what is held out to choose by; its `test` would be taken for CIFAR-10's.
SPLIT_NAMES = {"train": "train", "eval": "validation"}
# With pictures of CIFAR-10 about 250 MB.
_ROWS_A_FILE = 100_000
_REMEDIES = {
    400: "check --repo-id and --revision",
    401: "the token is not accepted: log in by `hf auth login`, or correct HF_TOKEN",
    403: "the token may not write there: check the owner, and make a token with write access by `hf auth login`",
    404: "there is no such owner or branch that you can see: check --repo-id and --revision",
    409: "somebody else is changing it: run the command again",
    412: "somebody else has changed it meanwhile: run the command again",
}


@dataclass
class DataPushArguments:
    """Options of `sigphi data push`."""

    _argument_group_name = "data push"

    repo_id: str = HfArg(help="Where to publish: OWNER/NAME. It is made if it does not exist.")
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
    private: bool = HfArg(help="Make the repository private.", default=False)
    revision: str | None = HfArg(help="Branch to publish on; made if it does not exist.", default=None)
    create_pr: bool = HfArg(help="Open a pull request instead of writing to the branch main.", default=False)
    commit_message: str | None = HfArg(help="Title of the commit.", default=None)
    license: str = HfArg(help="License of the questions and answers, as the Hub writes it: 'mit'.", default="unknown")

    def __post_init__(self) -> None:
        _check_repo_id(self.repo_id)
        one_of("--on-faulty-answers", self.on_faulty_answers, ("error", "skip"))
        if self.image_split is not None:
            one_of("--image-split", self.image_split, ("train", "test"))
        if not 0 <= self.eval_fraction <= 1:
            raise UserError(f"--eval-fraction must be between 0 and 1, got {self.eval_fraction}.")
        if self.create_pr and self.revision is not None:
            raise UserError("--create-pr opens a pull request against main; leave out it or --revision.")
        if self.commit_message == "":
            raise UserError("--commit-message is empty; write one or leave it out.")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise UserError(f"--license {self.license!r} is no license of the Hub: write it as mit or cc-by-4.0.")
        if self.images.startswith("synthetic") and not self.with_images:
            raise UserError(
                f"--images {self.images}: nobody can look up pictures drawn in code; publish them by --with-images."
            )


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id!r}: {' '.join(str(error).split()).rstrip('.')}.") from error
    if "/" not in repo_id:
        raise UserError(f"--repo-id {repo_id}: write it with its owner, such as alice/{repo_id}.")


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


def publish(folder: Path, options: DataPushArguments) -> CommitInfo:
    """Make the repository, if need be, and commit `folder` to it: all of it at once, or nothing.

    Files under `data/` of an earlier push disappear in the same commit; others stay. After a broken connection the
    same call again uploads only what is missing, and where all is there it makes no commit.

    Args:
        folder (`Path`): of [`write_qa_repo`].
        options (`DataPushArguments`): where to.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, or the last one where nothing has changed.

    Raises:
        UserError: if the Hub refuses or cannot be reached, and if a public repository was to be private.
    """
    api = HfApi()
    where = {"repo_id": options.repo_id, "repo_type": "dataset"}
    with hub_errors(options.repo_id):
        api.create_repo(**where, private=options.private or None, exist_ok=True)
        is_private = api.repo_info(**where).private
    if options.private and not is_private:
        raise UserError(
            f"--repo-id {options.repo_id} is there already, and public; make it private in its settings first, "
            "or give another name. Nothing has been uploaded."
        )
    with hub_errors(options.repo_id):
        if options.revision is not None and not options.revision.startswith("refs/pr/"):
            api.create_branch(**where, branch=options.revision, exist_ok=True)
        there = api.repo_info(**where, revision=options.revision)
        # Not `upload_folder`, which may spread a folder over several commits.
        return api.create_commit(
            **where,
            operations=_operations(folder, [file.rfilename for file in there.siblings]),
            commit_message=options.commit_message or "Questions and answers with their card",
            revision=options.revision,
            create_pr=options.create_pr,
            parent_commit=there.sha,
        )


def _operations(folder: Path, there: list[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add every file of `folder`, and delete those of an earlier push among the files that are `there`."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = [name for name in there if name.startswith("data/") and name not in paths]
    return [
        *(CommitOperationAdd(name, path) for name, path in paths.items()),
        *(CommitOperationDelete(name) for name in old),
    ]


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into [`UserError`]s with a remedy.

    Of errors below HTTP only the kind is told: their texts can hold signed addresses, and the token.

    Args:
        repo_id (`str`): the repository that is written to.
    """
    try:
        yield
    except (LocalTokenNotFoundError, UnicodeEncodeError) as error:
        raise UserError("there is no token of the Hub, or a garbled one: log in by `hf auth login`.") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be published; unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = f" ({error.server_message.strip().splitlines()[0].rstrip('.')})" if error.server_message else ""
        remedy = _REMEDIES.get(status, "try again later")
        raise UserError(f"--repo-id {repo_id}: the Hub answers {status}{said}; {remedy}.") from error
    except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        kind = type(error.__cause__ or error).__name__
        raise UserError(
            f"--repo-id {repo_id}: no connection to the Hub, or it broke ({kind}). Nothing is half there: run the "
            "command again."
        ) from error
    except ValueError as error:
        # The Hub has looked at the card before anything was uploaded, and --license is what a user decides in it.
        reason = " ".join(str(error).split())
        raise UserError(f"--repo-id {repo_id}: the Hub refuses the card: {reason} Check --license.") from error


def _address(options: DataPushArguments, commit: CommitInfo) -> tuple[str, str | None]:
    """Where to look at what has been published, and the revision to load; None for the branch main."""
    if commit.pr_url is not None:
        return commit.pr_url, commit.pr_revision
    address = f"{HfApi().endpoint}/datasets/{options.repo_id}"
    if options.revision is None:
        return address, None
    return f"{address}/tree/{quote(options.revision, safe='')}", options.revision


def main(argv: list[str]) -> None:
    """`sigphi data push FILE --repo-id OWNER/NAME`: publish, and print the address and the line that loads it."""
    options, input_csv = parse_arguments(
        [DataPushArguments], argv, "sigphi data push", [("input_csv", None, "CSV of questions and answers")]
    )
    with hub_errors(options.repo_id):
        HfApi().whoami()  # before minutes go by on reading
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
        commit = publish(Path(folder), options)
    address, revision = _address(options, commit)
    at = "" if revision is None else f", revision={json.dumps(revision)}"
    sys.stdout.write(f"{address}\nload_dataset({json.dumps(options.repo_id)}{at})\n")


__all__ = ["SPLIT_NAMES", "DataPushArguments", "hub_errors", "main", "publish", "question_types", "write_qa_repo"]
