"""The page of `sigphi demo` in a real browser: upload, ask, read the answer; what goes wrong is said in words."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'sigphi[demo]'")
pytest.importorskip("selenium", reason="the browser is driven by selenium: pip install selenium")

from sigphi.hub_card import app
from sigphi.train.chat import Conversation, load_vlm
from sigphi.train.demo_content import classes_of, stored_tower

ROOT = Path(__file__).parents[1]
QUESTION = "What is the object in the image?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """`benchmarks/demo_page.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import demo_page

        if demo_page.browser_programs() is None:
            pytest.skip("there is no Chromium with its driver: apt-get install chromium chromium-driver")
        yield demo_page


@pytest.fixture(scope="module")
def folder(shared: Any, make_vlm: Any, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny VLM and its encoder, pictures, and files that are none."""
    from sigphi import SiglipResNetProcessor, SigPhiProcessor

    place = tmp_path_factory.mktemp("demo")
    shared["encoder"].save_pretrained(place / "encoder")
    SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(place / "encoder")
    make_vlm().save_pretrained(place / "vlm")
    SigPhiProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(place / "vlm")
    for number, image in enumerate(images):
        image.save(place / f"{number}.png")
    (place / "text.png").write_text("no picture at all")
    (place / "text.txt").write_text("no picture at all")
    Image.new("1", (20_000, 20_000)).save(place / "giant.png")
    (place / "heavy.png").write_bytes(random.Random(0).randbytes(21_000_000))
    return place


@pytest.fixture(scope="module")
def page(tool: Any, folder: Path) -> Iterator[Any]:
    """The page, opened. At the end nothing has asked for anything outside it, and the log has no traceback."""
    command = tool.demo_command(str(folder / "vlm"), "--siglip-checkpoint", str(folder / "encoder"))
    with tool.served(command, folder / "log") as address, tool.opened(address) as opened:
        yield opened
        assert opened.requested_elsewhere() == []
    assert "Traceback" not in (folder / "log").read_text()


def expected(folder: Path, picture: str, question: str) -> dict[str, Any]:
    """What `sigphi ask` says about a picture and about a blank one, and the three classes that suit it best."""
    model, processor = load_vlm(str(folder / "vlm"))
    with Image.open(folder / picture) as image:
        given = Conversation(model, processor, image.convert("RGB")).ask(question)
    blank = Conversation(model, processor, Image.new("RGB", (32, 32), (128, 128, 128))).ask(question)
    classes = classes_of(str(folder / "vlm"), stored_tower(folder / "vlm"), str(folder / "encoder"))
    _, _, scores = app.Demo(model, processor, classes, 2).ask({"path": str(folder / picture)}, question)
    assert scores is not None
    top = sorted(scores, key=lambda name: -scores[name])[:3]
    verdict = app.STAYS if blank.text == given.text else app.CHANGES
    return {
        "answer": " ".join(given.text.split()),
        "confidence": f"{given.confidence:.2f}".rstrip("0").rstrip("."),
        "blank": " ".join(blank.text.split()),
        "blank-confidence": f"{blank.confidence:.2f}".rstrip("0").rstrip("."),
        "verdict": verdict.replace("**", ""),
        "classes": top,
    }


def seen(shown: dict[str, Any]) -> dict[str, Any]:
    """What a page shows, but for white space in texts and the percentages of classes."""
    texts = {name: " ".join(shown[name].split()) for name in ("answer", "blank", "verdict")}
    numbers = {name: str(float(shown[name])).removesuffix(".0") for name in ("confidence", "blank-confidence")}
    return texts | numbers | {"classes": [line[0] for line in shown["classes"]]}


def test_a_picture_is_uploaded_and_asked_about(page, folder):
    page.show_picture(folder / "0.png")
    page.type_question(QUESTION)
    shown = page.ask()
    assert seen(shown) == expected(folder, "0.png", QUESTION)
    assert all(re.fullmatch(r"\d+%", line[1]) for line in shown["classes"])


def test_an_answer_goes_with_the_picture_it_is_about(page, folder):
    page.choose_example(1, "pictures")
    page.wait(lambda: page.shown()["answer"] == "" and page.shown()["verdict"] == "")
    page.choose_example(0, "questions")
    page.wait(lambda: page.at("#question textarea").get_property("value") == "What is the main object in this image?")
    shown = page.ask()
    assert shown["answer"] and 0 < float(shown["confidence"]) < 1 and len(shown["classes"]) == 3


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("text.png", "This file is no picture that can be read."),
        ("giant.png", "The picture has more than 50 million pixels. Make it smaller first."),
    ],
)
def test_a_file_that_is_no_picture_gets_a_sentence(file, message, page, folder):
    page.upload(folder / file)
    page.wait(lambda: page.all("#picture img"))
    assert message in page.refusal()
    page.show_picture(folder / "1.png")
    assert page.ask()["answer"]


def test_no_question_and_a_placeholder_get_a_sentence(page, folder):
    page.show_picture(folder / "2.png")
    page.type_question(" ")
    assert "There is no question yet" in page.refusal()
    page.type_question("What is <image>?")
    assert "The question holds <image>, which stands for the picture. Leave it out." in page.refusal()


@pytest.mark.parametrize(("file", "message"), [("text.txt", "Invalid file type"), ("heavy.png", "20")])
def test_what_cannot_be_uploaded_is_said(file, message, page, folder):
    page.upload(folder / file)
    assert message in page.message()
