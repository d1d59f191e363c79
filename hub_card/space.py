"""
A Space on the Hub: the page of `sigphi demo` about a published model.

Needs gradio, whose version it pins: import it where that is known to be there.
"""

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template

from huggingface_hub import SpaceCardData
from PIL import Image

from sigphi.hub_card import app
from sigphi.hub_card.cards import CARD, TEMPLATES
from sigphi.hub_card.markdown import code, one_line

APP, REQUIREMENTS = "app.py", "requirements.txt"
# What a push brings to a Space, so that the next one knows what to replace.
PUBLISHED = (APP, CARD, REQUIREMENTS, app.SETTINGS, app.CLASSES)


@dataclass
class Space:
    """
    What a Space shows.

    Args:
        model_id, revision (`str`): the model on the Hub and its commit.
        license (`str`): of the page, as the Hub writes it.
        packages (`Sequence[str]`): that the model needs; their versions here are pinned.
        examples (`Sequence[PIL.Image.Image]`): pictures to choose from.
        questions (`Sequence[str]`): to choose from.
        classes (`Classes`, *optional*): what the encoder's view of a picture is computed with.
    """

    model_id: str
    revision: str
    license: str
    packages: Sequence[str]
    examples: Sequence[Image.Image]
    questions: Sequence[str]
    classes: app.Classes | None = None


def write_space(folder: Path, title: str, space: Space) -> None:
    """
    Write the files of a Space.

    Args:
        folder (`Path`): an empty one.
        title (`str`): of the Space.
        space (`Space`): what it shows.
    """
    shutil.copyfile(Path(app.__file__), folder / APP)
    settings = {"model": space.model_id, "revision": space.revision, "questions": list(space.questions)}
    (folder / app.SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / REQUIREMENTS).write_text("".join(f"{pinned(name)}\n" for name in space.packages), encoding="utf-8")
    write_examples(folder / app.EXAMPLES, space.examples)
    if space.classes is not None:
        space.classes.write(folder / app.CLASSES)
    facts = {
        "header": _header(title, space),
        "model": code(space.model_id, 100),
        "revision": space.revision,
        "classes": "" if space.classes is None else "which classes its image encoder sees, ",
        "license": code(space.license),
    }
    template = Template((TEMPLATES / "space.md").read_text(encoding="utf-8"))
    (folder / CARD).write_text(template.substitute(facts), encoding="utf-8")


def pinned(package: str) -> str:
    """A line of `requirements.txt`: the version that is installed here, without what names the build of a wheel."""
    return f"{package}=={version(package).partition('+')[0]}"


def write_examples(folder: Path, pictures: Sequence[Image.Image]) -> list[str]:
    """Write pictures as PNG files in order, without metadata of theirs, into a folder that is made; their paths."""
    folder.mkdir()
    paths = [folder / f"{number:02d}.png" for number in range(1, len(pictures) + 1)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes()).save(path)
    return [str(path) for path in paths]


def _header(title: str, space: Space) -> str:
    """What the Hub reads of a Space."""
    data = SpaceCardData(
        title=one_line(title),
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file=APP,
        license=space.license,
        models=[space.model_id],
        tags=["sigphi", "vision-language"],
        emoji="🔎",
        colorFrom="blue",
        colorTo="green",
        pinned=False,
        short_description="Ask a small vision-language model about pictures",
    )
    return data.to_yaml()


__all__ = ["PUBLISHED", "Space", "pinned", "write_examples", "write_space"]
