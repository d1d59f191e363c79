"""Publishing a folder on the Hub: options of every kind of repository, one commit, and errors with a remedy."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

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

from sigphi.hub_card.markdown import is_license
from sigphi.train.errors import UserError

_REMEDIES = {
    400: "check --repo-id and --revision",
    401: "the token is not accepted: log in by `hf auth login`, or correct HF_TOKEN",
    403: "the token may not write there: check the owner, and make a token with write access by `hf auth login`",
    404: "there is no such owner or branch that you can see: check --repo-id and --revision",
    409: "somebody else is changing it: run the command again",
    412: "somebody else has changed it meanwhile: run the command again",
}


@dataclass
class PublishArguments:
    """Where to publish, whatever it is."""

    _argument_group_name = "publishing"

    repo_id: str = HfArg(help="Where to publish: OWNER/NAME. It is made if it does not exist.")
    private: bool = HfArg(help="Make the repository private.", default=False)
    revision: str | None = HfArg(help="Branch to publish on; made if it does not exist.", default=None)
    create_pr: bool = HfArg(help="Open a pull request instead of writing to the branch main.", default=False)
    commit_message: str | None = HfArg(help="Title of the commit.", default=None)

    def __post_init__(self) -> None:
        check_repo_id("--repo-id", self.repo_id)
        if self.create_pr and self.revision is not None:
            raise UserError("--create-pr opens a pull request against main; leave out it or --revision.")
        if self.commit_message == "":
            raise UserError("--commit-message is empty; write one or leave it out.")


def check_repo_id(option: str, repo_id: str) -> None:
    """Raise a [`UserError`] unless `repo_id` is written `owner/name`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{option} {repo_id!r}: {' '.join(str(error).split()).rstrip('.')}.") from error
    if "/" not in repo_id:
        raise UserError(f"{option} {repo_id}: write it with its owner, such as alice/{repo_id}.")


def check_license(name: str) -> None:
    """Raise a [`UserError`] unless `name` is written as the Hub writes licenses."""
    if not is_license(name):
        raise UserError(f"--license {name!r} is no license of the Hub: write it as mit or cc-by-4.0.")


def check_login(repo_id: str) -> None:
    """Raise a [`UserError`] unless the Hub can be reached with a token that it knows, before minutes go by."""
    with hub_errors(repo_id):
        HfApi().whoami()


def make_repo(options: PublishArguments, repo_type: str) -> None:
    """
    Make the repository, if it does not exist.

    Args:
        options (`PublishArguments`): its name, and whether it is private.
        repo_type (`str`): `"model"` or `"dataset"`.

    Raises:
        UserError: if the Hub refuses or cannot be reached, and if a public repository was to be private.
    """
    api = HfApi()
    with hub_errors(options.repo_id):
        api.create_repo(options.repo_id, repo_type=repo_type, private=options.private or None, exist_ok=True)
        is_private = api.repo_info(options.repo_id, repo_type=repo_type).private
        if options.private and not is_private:
            raise UserError(
                f"--repo-id {options.repo_id} is there already, and public; make it private in its settings first, "
                "or give another name. Nothing has been uploaded."
            )
        if options.revision is not None and not options.revision.startswith("refs/pr/"):
            api.create_branch(options.repo_id, repo_type=repo_type, branch=options.revision, exist_ok=True)


def commit_folder(
    folder: Path, options: PublishArguments, repo_type: str, message: str, is_ours: Callable[[str], bool]
) -> CommitInfo:
    """
    Commit `folder` to a repository of [`make_repo`]: all of it at once, or nothing.

    After a broken connection the same call again uploads only what is missing, and where all is there it makes no
    commit.

    Args:
        folder (`Path`): what is to be there.
        options (`PublishArguments`): where to.
        repo_type (`str`): `"model"` or `"dataset"`.
        message (`str`): title of the commit, where the options have none.
        is_ours (`Callable`): whether a file of this name comes from an earlier push. It disappears in the same commit
            if `folder` has none such; all others stay.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, or the last one where nothing has changed.

    Raises:
        UserError: if the Hub refuses or cannot be reached.
    """
    api = HfApi()
    where = {"repo_id": options.repo_id, "repo_type": repo_type, "revision": options.revision}
    with hub_errors(options.repo_id):
        there = api.repo_info(**where)
        # Not `upload_folder`, which may spread a folder over several commits.
        return api.create_commit(
            **where,
            operations=_operations(folder, [file.rfilename for file in there.siblings], is_ours),
            commit_message=options.commit_message or message,
            create_pr=options.create_pr,
            parent_commit=there.sha,
        )


def _operations(
    folder: Path, there: list[str], is_ours: Callable[[str], bool]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add every file of `folder`, and delete those of an earlier push among the files that are `there`."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = [name for name in there if is_ours(name) and name not in paths]
    return [
        *(CommitOperationAdd(name, path) for name, path in paths.items()),
        *(CommitOperationDelete(name) for name in old),
    ]


@contextmanager
def hub_errors(repo_id: str, option: str = "--repo-id") -> Iterator[None]:
    """Turn what `huggingface_hub` raises into [`UserError`]s with a remedy.

    Of errors below HTTP only the kind is told: their texts can hold signed addresses, and the token.

    Args:
        repo_id (`str`): the repository that is written to.
        option (`str`, *optional*, defaults to `"--repo-id"`): where the user has named it.
    """
    try:
        yield
    except UserError:
        raise
    except (LocalTokenNotFoundError, UnicodeEncodeError) as error:
        raise UserError("there is no token of the Hub, or a garbled one: log in by `hf auth login`.") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be published; unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = f" ({error.server_message.strip().splitlines()[0].rstrip('.')})" if error.server_message else ""
        remedy = _REMEDIES.get(status, "try again later")
        raise UserError(f"{option} {repo_id}: the Hub answers {status}{said}; {remedy}.") from error
    except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        kind = type(error.__cause__ or error).__name__
        raise UserError(
            f"{option} {repo_id}: no connection to the Hub, or it broke ({kind}). Nothing is half there: run the "
            "command again."
        ) from error
    except ValueError as error:
        # The Hub has looked at the card before anything was uploaded, and --license is what a user decides in it.
        reason = " ".join(str(error).split())
        raise UserError(f"{option} {repo_id}: the Hub refuses the card: {reason} Check --license.") from error


def address_of(options: PublishArguments, commit: CommitInfo, prefix: str = "") -> tuple[str, str | None]:
    """
    Where to look at what has been published, and the revision to load; None for the branch main.

    Args:
        options (`PublishArguments`): where to.
        commit (`huggingface_hub.CommitInfo`): of [`commit_folder`].
        prefix (`str`, *optional*): what stands before the repository's name, `"datasets/"` for sets.
    """
    if commit.pr_url is not None:
        return commit.pr_url, commit.pr_revision
    address = f"{HfApi().endpoint}/{prefix}{options.repo_id}"
    if options.revision is None:
        return address, None
    return f"{address}/tree/{quote(options.revision, safe='')}", options.revision


__all__ = [
    "PublishArguments",
    "address_of",
    "check_license",
    "check_login",
    "check_repo_id",
    "commit_folder",
    "hub_errors",
    "make_repo",
]
