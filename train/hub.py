"""Publishing a folder on the Hub: options of every kind of repository, one commit, and errors with a remedy."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
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
from sigphi.hub_card.release import leaks
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


class HubRepo:
    """
    A repository that is written to.

    Args:
        options (`PublishArguments`): which, and how.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`, which is made for gradio.
        token (`str`, *optional*): by default the one that `huggingface_hub` finds in HF_TOKEN or in its own place.
        option (`str`, *optional*, defaults to `"--repo-id"`): where the user has named it, for messages.
    """

    def __init__(
        self, options: PublishArguments, repo_type: str, token: str | None = None, option: str = "--repo-id"
    ) -> None:
        self.options, self.option = options, option
        self.api = HfApi(token=token)
        self.where: dict[str, Any] = {"repo_id": options.repo_id, "repo_type": repo_type}

    def make(self) -> None:
        """
        Make repository and branch, if they do not exist.

        Raises:
            UserError: if the Hub refuses or cannot be reached, and if a public repository was to be private.
        """
        name, branch = self.options.repo_id, self.options.revision
        with self.errors():
            sdk = "gradio" if self.where["repo_type"] == "space" else None
            self.api.create_repo(**self.where, private=self.options.private or None, exist_ok=True, space_sdk=sdk)
            if self.options.private and not self.api.repo_info(**self.where).private:
                raise UserError(
                    f"{self.option} {name} is there already, and public; make it private in its settings first, "
                    "or give another name. Nothing has been uploaded."
                )
            if branch is not None and not branch.startswith("refs/pr/"):
                self.api.create_branch(**self.where, branch=branch, exist_ok=True)

    def head(self) -> Any:
        """The last commit of the branch, as `huggingface_hub` tells of it: `sha`, `siblings`."""
        with self.errors():
            return self.api.repo_info(**self.where, revision=self.options.revision)

    def text_at(self, head: Any, name: str) -> str | None:
        """The text of a file at a commit of [`head`], or None where there is no such file."""
        if name not in [file.rfilename for file in head.siblings]:
            return None
        with self.errors(), tempfile.TemporaryDirectory(prefix="sigphi-") as folder:
            path = self.api.hf_hub_download(**self.where, filename=name, revision=head.sha, local_dir=folder)
            return Path(path).read_text(encoding="utf-8")

    def commit(self, paths: dict[str, Path], old: list[str], message: str, parent: str) -> CommitInfo:
        """
        Commit files: all of them at once, or nothing.

        After a broken connection the same call again uploads only what is missing, and where all is there it makes
        no commit.

        Args:
            paths (`dict[str, Path]`): what is to be there, by its name in the repository.
            old (`list[str]`): files to delete in the same commit.
            message (`str`): title of the commit, where the options have none.
            parent (`str`): the commit that it follows; if there has been another one since, nothing happens.

        Returns:
            `huggingface_hub.CommitInfo`: the commit, or the last one where nothing has changed.

        Raises:
            UserError: if the Hub refuses or cannot be reached.
        """
        with self.errors():
            # Not `upload_folder`, which may spread a folder over several commits.
            return self.api.create_commit(
                **self.where,
                operations=[
                    *(CommitOperationAdd(name, path) for name, path in paths.items()),
                    *(CommitOperationDelete(name) for name in old),
                ],
                commit_message=self.options.commit_message or message,
                revision=self.options.revision,
                create_pr=self.options.create_pr,
                parent_commit=parent,
            )

    def address(self, commit: CommitInfo) -> tuple[str, str | None]:
        """Where to look at what has been committed, and the revision to load; None for the branch main."""
        if commit.pr_url is not None:
            return commit.pr_url, commit.pr_revision
        prefix = "" if self.where["repo_type"] == "model" else f"{self.where['repo_type']}s/"
        address = f"{self.api.endpoint}/{prefix}{self.options.repo_id}"
        if self.options.revision is None:
            return address, None
        return f"{address}/tree/{quote(self.options.revision, safe='')}", self.options.revision

    def errors(self) -> AbstractContextManager[None]:
        """See [`hub_errors`]."""
        return hub_errors(self.options.repo_id, self.option)


def files_in(folder: Path) -> dict[str, Path]:
    """Every file below `folder`, by its path there."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def check_no_secrets(staged: Path, folder: Path, shown: Path, token: str | None = None) -> None:
    """
    Check what is to be published.

    Args:
        staged (`Path`): the files.
        folder (`Path`): the model's, whose path must not be in them.
        shown (`Path`): how the user knows the folder of the files, for messages.
        token (`str`, *optional*): the one that publishes, by default that of `huggingface_hub`.

    Raises:
        UserError: if a file holds a path of this machine or a token.
    """
    secrets = {"the path of the model's folder": str(folder.resolve()), "a path of your home": f"{Path.home()}/"}
    secrets["your token of the Hub"] = token or get_token() or ""
    found = leaks(staged, {what: text for what, text in secrets.items() if text.strip("/")})
    if found:
        name, what = found[0]
        raise UserError(f"{shown / name} holds {what}; nothing has been uploaded. Remove it from the file.")


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


__all__ = [
    "HubRepo",
    "PublishArguments",
    "check_license",
    "check_login",
    "check_no_secrets",
    "check_repo_id",
    "files_in",
    "hub_errors",
]
