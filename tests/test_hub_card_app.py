"""The page answers as `sigphi ask` does, and says in words what it cannot answer. No server runs here."""

import ast
import copy
import html
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'sigphi[demo]'")

import gradio as gr

from sigphi.hub_card import app
from sigphi.train.chat import Conversation, open_image
from sigphi.train.encoder_evaluation import class_embeddings
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.precision import inference_dtype
from sigphi.train.vlm_evaluation import encode_images

QUESTION = "What is the object in the image?"


@pytest.fixture
def demo(tiny_vlm: Any, tiny_vlm_processor: Any, tiny_encoder: Any, tiny_encoder_processor: Any) -> app.Demo:
    """The page of the tiny VLM, with the class texts of the encoder whose tower it has; answers of 12 tokens."""
    embeds = class_embeddings(tiny_encoder, tiny_encoder_processor)
    numbers = (tiny_encoder.logit_scale.item(), tiny_encoder.logit_bias.item())
    classes = app.Classes(list(CLASS_NAMES), embeds, *numbers)
    return app.Demo(tiny_vlm, tiny_vlm_processor, classes, max_new_tokens=12)


def save(picture: Image.Image, path: Path, **options: Any) -> dict[str, Any]:
    """A picture's file, as gradio tells of an upload."""
    picture.save(path, **options)
    return {"path": str(path)}


def turned(picture: Image.Image) -> Image.Exif:
    exif = picture.getexif()
    exif[274] = 6
    return exif


def clear_in_part(picture: Image.Image) -> Image.Image:
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    return clear


@pytest.mark.parametrize("kind", ["rgb", "clear", "turned", "palette", "gray16", "gif"])
def test_answers_and_confidence_are_those_of_ask(kind, demo, images, tmp_path):
    first = images[1]
    files = {
        "rgb": lambda path: save(first, path / "a.png"),
        "clear": lambda path: save(clear_in_part(first), path / "a.png"),
        "turned": lambda path: save(first, path / "a.jpg", exif=turned(first)),
        "palette": lambda path: save(first.convert("P"), path / "a.png"),
        "gray16": lambda path: save(Image.fromarray(np.asarray(first.convert("L"), np.uint16) * 256), path / "a.png"),
        "gif": lambda path: save(first, path / "a.gif", save_all=True, append_images=[images[0].resize(first.size)]),
    }
    file = files[kind](tmp_path)
    answer, confidence, _ = demo.ask(file, f" {QUESTION}\n")
    given = Conversation(demo.model, demo.processor, open_image(file["path"], "synthetic"), 12).ask(QUESTION)
    assert answer == given.text != ""
    assert confidence == pytest.approx(given.confidence, abs=1e-6)
    assert 0 < confidence < 1


def test_the_classes_are_those_of_the_encoder(demo, tiny_encoder, tiny_encoder_processor, images, tmp_path):
    file = save(images[0], tmp_path / "a.png")
    _, _, scores = demo.ask(file, QUESTION)
    pixels = tiny_encoder_processor(images=images[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        cosines = tiny_encoder(pixel_values=pixels).image_embeds @ demo.classes.embeds.t()
        expected = torch.sigmoid(cosines * tiny_encoder.logit_scale.exp() + tiny_encoder.logit_bias)[0]
    assert list(scores) == list(CLASS_NAMES)
    assert torch.allclose(torch.tensor(list(scores.values())), expected, atol=1e-6)
    assert len(set(scores.values())) == 10
    assert app.Demo(demo.model, demo.processor, max_new_tokens=2).ask(file, QUESTION)[2] is None


def test_the_blank_picture_is_that_of_an_evaluation(demo):
    gray = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    expected = encode_images(demo.model, demo.processor, gray)
    seen = []
    tower = demo.model.model.vision_tower
    tower.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    answer, confidence, verdict = demo.ask_without_picture(QUESTION, "another answer")
    with torch.no_grad():
        assert torch.equal(demo.model.model.get_vision_features(seen[0]), expected)
    given = Conversation(demo.model, demo.processor, Image.new("RGB", (50, 20), (128, 128, 128)), 12).ask(QUESTION)
    assert (answer, verdict) == (given.text, app.CHANGES)
    assert confidence == pytest.approx(given.confidence, abs=1e-6)
    assert demo.ask_without_picture(QUESTION, given.text) == (answer, confidence, app.STAYS)


def one_colour(width: int, height: int) -> Image.Image:
    return Image.new("1", (width, height))


def broken_files(folder: Path, picture: Image.Image) -> dict[str, str]:
    """Uploads that no answer can be about, by what the message has to hold."""
    picture.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    contents = {
        "text.png": b"What is in this picture?",
        "empty.png": b"",
        "cut.png": whole[: len(whole) // 2],
        "damaged.png": whole[:60] + bytes(40) + whole[100:],
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    one_colour(10_001, 5_000).save(folder / "large.png")
    one_colour(20_000, 20_000).save(folder / "giant.png")
    messages = dict.fromkeys(contents, "This file is no picture that can be read.")
    return messages | dict.fromkeys(("large.png", "giant.png"), "The picture has more than 50 million pixels.")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_is_no_picture_gets_a_sentence(demo, images, tmp_path):
    for name, message in broken_files(tmp_path, images[0]).items():
        with pytest.raises(gr.Error) as refused:
            demo.ask({"path": str(tmp_path / name)}, QUESTION)
        assert refused.value.message.startswith(message), name
        assert not refused.value.print_exception
    for nothing in (None, {"path": None, "url": "data:image/png;base64,AAAA"}):
        with pytest.raises(gr.Error, match="no picture yet"):
            demo.ask(nothing, QUESTION)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "There is no question yet"),
        (None, "There is no question yet"),
        ("  \n", "There is no question yet"),
        ("What is <image>?", "holds <image>, which stands for the picture"),
        ("x" * 501, "has 501 characters, and 500 are read"),
        ("! ? " * 100, "tokens, and the model reads 116"),
    ],
)
def test_a_question_that_cannot_be_asked_gets_a_sentence(question, message, demo, images, tmp_path):
    file = save(images[0], tmp_path / "a.png")
    with pytest.raises(gr.Error) as refused:
        demo.ask(file, question)
    # The page shows messages as HTML.
    assert html.escape(message) in refused.value.message
    assert "<" not in refused.value.message


def test_class_texts_survive_a_file(demo, tmp_path):
    expected = copy.deepcopy(demo.classes)
    demo.classes.write(tmp_path / "classes.safetensors")
    found = app.Classes.read(tmp_path / "classes.safetensors")
    assert torch.equal(found.embeds, expected.embeds)
    assert found.names == expected.names
    scalars = [found.logit_scale, found.logit_bias, expected.logit_scale, expected.logit_bias]
    assert scalars[:2] == scalars[2:]


def test_the_page_tells_nobody_and_has_two_endpoints(demo, images, tmp_path):
    file = save(images[0], tmp_path / "a.png")["path"]
    page = app.make_page(demo, "a model", [file], [QUESTION])
    assert page.analytics_enabled is False
    assert set(page.get_api_info()["named_endpoints"]) == {"/ask", "/ask_without_picture"}
    shown = {component["props"].get("elem_id"): component["props"] for component in page.config["components"]}
    assert shown["classes"]["visible"] and "no-classes" not in shown
    page = app.make_page(app.Demo(demo.model, demo.processor), "a model", [], [])
    shown = {component["props"].get("elem_id"): component["props"] for component in page.config["components"]}
    assert not shown["classes"]["visible"] and "was not at hand" in shown["no-classes"]["value"]


def test_a_space_needs_only_what_its_card_says():
    tree = ast.parse(Path(app.__file__).read_text(encoding="utf-8"))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    foreign = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    # safetensors comes with transformers.
    assert foreign == {"torch", "transformers", "gradio", "PIL", "safetensors"}


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_precision_is_chosen_as_by_ask(has_bfloat16, monkeypatch):
    # Of the tests' own: they take every processor for one with bfloat16.
    monkeypatch.setattr("sigphi.train.precision.cpu_has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert app.inference_dtype() == inference_dtype()
