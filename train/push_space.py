"""`sigphi push --space`: the page of `sigphi demo` about the model that is pushed, as a Space on the Hub.

Needs gradio: import it where that is known to be there.
"""

import dataclasses
import json
import logging
import tempfile
from pathlib import Path

from sigphi.hub_card.app import EXAMPLES
from sigphi.hub_card.cards import packages
from sigphi.hub_card.space import PUBLISHED, Space, write_space
from sigphi.train.demo_content import classes_of, example_pictures, example_questions, stored_tower
from sigphi.train.hub import HubRepo, check_no_secrets, files_in

logger = logging.getLogger(__name__)


def draft_space(folder: Path, model_id: str, license: str, siglip_checkpoint: str | None) -> Space:
    """
    What the Space of a model is to show; its `revision` is empty until the model has a commit.

    Args:
        folder (`Path`): the model's.
        model_id (`str`): where the model is to be on the Hub.
        license (`str`): of the model.
        siglip_checkpoint (`str`, *optional*): the encoder, where the user has named it.

    Raises:
        UserError: if that encoder cannot be read, or has another image tower, and if a file would hold a path of this
            machine or a token.
    """
    classes = classes_of(str(folder), stored_tower(folder), siglip_checkpoint)
    space = Space(
        model_id=model_id,
        revision="",
        license=license,
        packages=packages(json.loads((folder / "config.json").read_text(encoding="utf-8"))),
        examples=example_pictures(str(folder)),
        questions=example_questions(str(folder)),
        classes=classes,
    )
    with tempfile.TemporaryDirectory(prefix="sigphi-") as staging:
        write_space(Path(staging), "", space)
        check_no_secrets(Path(staging), folder, Path("Space"))
    return space


def publish_space(space: Space, model: HubRepo, repo_id: str) -> str:
    """
    Make the Space, if need be, and commit all of it at once, as the model was: `model.options` say how.

    What an earlier push has brought and this one has not disappears in the same commit; other files stay.

    Args:
        space (`Space`): of [`draft_space`], with the commit of the model.
        model (`HubRepo`): where the model was published.
        repo_id (`str`): of the Space.

    Returns:
        `str`: the address.

    Raises:
        UserError: if the Hub refuses or cannot be reached. The Space then is what it was before.
    """
    repo = HubRepo(dataclasses.replace(model.options, repo_id=repo_id), "space", model.api.token, "--space")
    with tempfile.TemporaryDirectory(prefix="sigphi-") as staging:
        write_space(Path(staging), repo_id.rpartition("/")[2], space)
        repo.make()
        paths, head = files_in(Path(staging)), repo.head()
        there = [file.rfilename for file in head.siblings]
        ours = [name for name in there if name in PUBLISHED or name.startswith(f"{EXAMPLES}/")]
        old = [name for name in ours if name not in paths]
        commit = repo.commit(paths, old, "Page to ask the model about pictures", head.sha)
    if model.head().private:
        logger.warning(
            "%s is private, so the Space cannot read it yet: add a secret HF_TOKEN that may, in the Space's settings.",
            model.options.repo_id,
        )
    return repo.address(commit)[0]


__all__ = ["draft_space", "publish_space"]
