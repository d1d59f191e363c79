"""What a Space's repository holds."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

pytest.importorskip("gradio", reason="a Space needs gradio: pip install 'sigphi[demo]'")

from sigphi.hub_card import app
from sigphi.hub_card.release import leaks
from sigphi.hub_card.space import PUBLISHED, Space, pinned, write_space

CLASSES = app.Classes(["cat", "dog"], torch.eye(2), 2.5, -10.0)
QUESTIONS = ["What is it?", "Is it a <b>cat</b>?"]


def make_space(images: list[Image.Image], classes: app.Classes | None = CLASSES) -> Space:
    return Space("alice/vlm", "a" * 40, "mit", ["torch", "transformers", "pillow"], images, QUESTIONS, classes)


def test_a_space_is_complete_and_nothing_else(images, tmp_path):
    write_space(tmp_path, "vlm-page", make_space(images))
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {*PUBLISHED, "examples/01.png", "examples/02.png", "examples/03.png"}
    assert (tmp_path / "app.py").read_bytes() == Path(app.__file__).read_bytes()
    settings = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert settings == {"model": "alice/vlm", "revision": "a" * 40, "questions": QUESTIONS}
    assert app.Classes.read(tmp_path / "classes.safetensors").names == ["cat", "dog"]
    assert leaks(tmp_path, {"a path": str(Path.home()), "a folder": str(tmp_path)}) == []


def test_the_card_has_what_the_hub_reads(images, tmp_path):
    write_space(tmp_path, "vlm-page", make_space(images))
    card = SpaceCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    header = card.data.to_dict()
    assert header["sdk"] == "gradio" and header["sdk_version"] == version("gradio")
    assert (header["app_file"], header["license"], header["models"]) == ("app.py", "mit", ["alice/vlm"])
    assert header["title"] == "vlm-page" and len(header["short_description"]) <= 60
    assert re.fullmatch(r"3\.\d+", header["python_version"])
    assert card.validate is not None and f"at commit `{'a' * 40}`" in card.text
    assert "which classes its image encoder sees" in card.text


def test_without_the_encoder_nothing_is_said_of_classes(images, tmp_path):
    write_space(tmp_path, "vlm-page", make_space(images, classes=None))
    assert not (tmp_path / "classes.safetensors").exists()
    assert "classes its image encoder sees" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_title_cannot_break_the_header(images, tmp_path):
    write_space(tmp_path, 'a: "b"\nsdk: docker', make_space(images))
    header = SpaceCard.load(tmp_path / "README.md").data.to_dict()
    assert header["sdk"] == "gradio" and header["title"] == 'a: "b" sdk: docker'


def test_versions_are_those_here_without_the_build_of_a_wheel(images, tmp_path, monkeypatch):
    write_space(tmp_path, "vlm-page", make_space(images))
    lines = (tmp_path / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition("==")[0] for line in lines] == ["torch", "transformers", "pillow"]
    assert f"pillow=={version('pillow')}" in lines
    monkeypatch.setattr("sigphi.hub_card.space.version", lambda name: "2.14.1+cpu")
    assert pinned("torch") == "torch==2.14.1"


def test_examples_keep_their_pixels_and_lose_what_else_is_in_a_file(images, tmp_path):
    note = PngInfo()
    note.add_text("Author", "somebody")
    images[0].save(tmp_path / "noted.png", pnginfo=note)
    (tmp_path / "space").mkdir()
    with Image.open(tmp_path / "noted.png") as noted:
        write_space(tmp_path / "space", "page", make_space([noted]))
    with Image.open(tmp_path / "space" / "examples" / "01.png") as found:
        assert found.tobytes() == images[0].tobytes() and found.info == {}
