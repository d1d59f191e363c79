"""`sigphi demo`: what it shows beside answers, and where it listens. In a browser: `test_benchmarks_demo_page.py`."""

import json
import logging
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'sigphi[demo]'")

import httpx

from sigphi.train import demo, push, push_space
from sigphi.train.demo_content import (
    QUESTIONS,
    classes_of,
    example_pictures,
    example_questions,
    has_tower,
    recorded_encoder,
    stored_tower,
)
from sigphi.train.encoder_evaluation import class_texts, embed_texts
from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.predictions import PREDICTIONS
from sigphi.train.report import picture_grid


@pytest.fixture
def folders(
    tiny_vlm: Any, tiny_vlm_processor: Any, tiny_encoder: Any, tiny_encoder_processor: Any, tmp_path: Path
) -> Path:
    """A VLM whose record names the encoder that it was made from, and that encoder."""
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    tiny_encoder_processor.save_pretrained(tmp_path / "encoder")
    tiny_vlm.save_pretrained(tmp_path / "vlm")
    tiny_vlm_processor.save_pretrained(tmp_path / "vlm")
    record(tmp_path / "vlm", siglip_checkpoint=str(tmp_path / "encoder"), siglip_checkpoint_revision=None)
    return tmp_path


def record(folder: Path, **facts: Any) -> None:
    (folder / "training_data.json").write_text(json.dumps(facts))


# Classes -------------------------------------------------------------------------------------------------------------


def test_class_texts_are_those_of_the_recorded_encoder(folders, tiny_encoder, tiny_encoder_processor):
    classes = classes_of(str(folders / "vlm"), stored_tower(folders / "vlm"), None)
    texts = embed_texts(tiny_encoder, tiny_encoder_processor, class_texts(), 64)
    expected = [F.normalize(part.mean(0), dim=0) for part in texts.split(len(texts) // 10)]
    assert torch.allclose(classes.embeds, torch.stack(expected), atol=1e-6)
    assert classes.names == list(CLASS_NAMES)
    assert (classes.logit_scale, classes.logit_bias) == (tiny_encoder.logit_scale.item(), -10.0)


def test_the_towers_weights_are_read_from_the_files_alone(folders, tiny_vlm, tiny_encoder):
    stored, loaded = stored_tower(folders / "vlm"), tiny_vlm.model.vision_tower.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in stored.items()}
    assert has_tower(tiny_encoder, stored) and has_tower(tiny_encoder, rounded)


@pytest.mark.parametrize("change", ["trained on", "of another size", "of fewer layers"])
def test_an_encoder_that_was_changed_since_is_not_taken_for_the_models(change, folders, caplog):
    tower = stored_tower(folders / "vlm")
    name = next(name for name, weights in tower.items() if weights.dim() == 4)
    if change == "of fewer layers":
        del tower[name]
    else:
        tower[name] = tower[name] * 1.05 if change == "trained on" else tower[name][:, :1]
    with caplog.at_level(logging.WARNING):
        assert classes_of(str(folders / "vlm"), tower, None) is None
    assert "does not show classes" in caplog.text and "another image tower" in caplog.text
    with pytest.raises(UserError, match="encoder has another image tower than MODEL"):
        classes_of(str(folders / "vlm"), tower, str(folders / "encoder"))


def test_without_encoder_or_text_tower_there_are_no_classes_and_the_log_says_why(folders, tiny_encoder, caplog):
    model, tower = str(folders / "vlm"), stored_tower(folders / "vlm")
    tiny_encoder.config.include_text_tower = False
    tiny_encoder.config.text_model_name_or_path = str(folders / "gone")
    tiny_encoder.save_pretrained(folders / "encoder")
    with caplog.at_level(logging.WARNING):
        assert classes_of(model, tower, None) is None
    assert "gone" in caplog.text
    shutil.rmtree(folders / "encoder")
    with caplog.at_level(logging.WARNING):
        assert classes_of(model, tower, None) is None
    assert "there is no model folder" in caplog.text
    (folders / "vlm" / "training_data.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert classes_of(model, tower, None) is None
    assert f"{model} does not record its encoder" in caplog.text
    with pytest.raises(UserError, match="--siglip-checkpoint .*there is no model folder"):
        classes_of(model, tower, str(folders / "encoder"))


def test_the_encoder_of_a_second_training_is_that_of_the_first():
    first = {"siglip_checkpoint": "alice/encoder", "siglip_checkpoint_revision": "a" * 40}
    assert recorded_encoder(first) == ("alice/encoder", "a" * 40)
    assert recorded_encoder({"vlm_checkpoint": {"vlm_checkpoint": first}}) == ("alice/encoder", "a" * 40)
    # A push has taken the path of a local one out.
    assert recorded_encoder({"siglip_checkpoint": None}) == recorded_encoder({}) == (None, None)


# Pictures and questions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "chosen"), [(5, range(5)), (8, range(8)), (13, [0, 1, 2, 3, 9, 10, 11, 12])])
def test_pictures_are_those_of_the_evaluation(count, chosen, folders):
    drawn = [Image.new("RGB", (32, 32), (number * 15, 255 - number, 7)) for number in range(count)]
    picture_grid(drawn, columns=8).save(folders / "vlm" / "eval_samples.png")
    found = example_pictures(str(folders / "vlm"))
    assert [one.tobytes() for one in found] == [drawn[number].tobytes() for number in chosen]


def test_else_pictures_are_drawn_or_one_of_each_class(folders, tmp_path):
    drawn = example_pictures(str(folders / "vlm"))
    assert len(drawn) == 8 and {(one.size, one.mode) for one in drawn} == {((32, 32), "RGB")}
    assert len({one.tobytes() for one in drawn}) == 8
    # A picture with its numbers on it, as none is written any more.
    Image.new("RGB", (1096, 280)).save(folders / "vlm" / "eval_samples.png")
    assert [one.tobytes() for one in example_pictures(str(folders / "vlm"))] == [one.tobytes() for one in drawn]
    for number, name in enumerate(CLASS_NAMES):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        for copy in range(3):
            colour = (number * 10, copy * 10, 0)
            Image.new("RGB", (32, 32), colour).save(tmp_path / "set" / "test" / name / f"{copy}.png")
    rows = [Image.new("RGB", (32, 32), (number * 10, 0, 0)).tobytes() for number in range(8)]
    assert [one.tobytes() for one in example_pictures(str(folders / "vlm"), str(tmp_path / "set"))] == rows


def test_questions_are_those_that_an_evaluation_asked_most(folders):
    assert example_questions(str(folders / "vlm")) == list(QUESTIONS)
    asked = {"What is it?": ("object", 4), "Name it.": ("object", 3), "How many?": ("counting", 2)}
    asked |= {"x" * 501: ("long", 9), "Where?": ("", 1)}
    rows = [(kind, question) for question, (kind, count) in asked.items() for _ in range(count)]
    table = pd.DataFrame(rows, columns=["question_type", "question"])
    table.to_parquet(folders / "vlm" / PREDICTIONS)
    assert example_questions(str(folders / "vlm")) == ["What is it?", "How many?", "Where?", "Name it."]


def test_what_a_space_would_tell_is_searched_before_the_model_is_pushed(folders, monkeypatch):
    model = folders / "vlm"
    monkeypatch.setattr(push_space, "example_questions", lambda name: [f"Is it in {model}?"])
    with pytest.raises(UserError, match="Space/demo.json holds the path of the model's folder; nothing has been"):
        push_space.draft_space(model, "alice/vlm", "mit", None)


# Where it listens ----------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_a_user_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot be listened on"):
            demo.free_port("127.0.0.1", port)
    assert demo.free_port("127.0.0.1", port) == port
    assert demo.free_port("127.0.0.1", 0) > 0


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
    + [("192.168.1.5", False), ("example.org", False), ("::", False)],
)
def test_who_can_reach_an_address(host, alone):
    assert demo.is_loopback(host) == alone


def test_listening_to_everybody_is_said(folders, monkeypatch, caplog):
    shown = []
    monkeypatch.setattr(demo, "show", lambda *given: shown.append(given))
    with caplog.at_level(logging.WARNING):
        demo.main([str(folders / "vlm"), "--port", "0"])
        assert "everybody" not in caplog.text
        demo.main([str(folders / "vlm"), "--host", "0.0.0.0", "--port", "0"])
    assert "--host 0.0.0.0: everybody who reaches this machine can use the page" in caplog.text
    assert [options.host for _, options, _ in shown] == ["127.0.0.1", "0.0.0.0"]


@pytest.mark.parametrize(
    ("main", "words", "option"),
    [
        (demo.main, ["nowhere"], "sigphi demo"),
        (push.main, ["nowhere", "--repo-id", "a/b", "--space", "a/c"], "--space"),
    ],
)
def test_without_gradio_the_remedy_is_named(main, words, option, monkeypatch):
    monkeypatch.setattr("sigphi.train.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{option} needs gradio: pip install 'sigphi\[demo\]'"):
        main(words)


def event(address: str, picture: Path) -> str:
    """What the server says to a question about a picture on its disk: `complete` or `error`."""
    file = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    started = httpx.post(f"{address}gradio_api/call/ask", json={"data": [file, "What?"]}).json()
    return re.match(
        r"event: (\w+)", httpx.get(f"{address}gradio_api/call/ask/{started['event_id']}", timeout=120).text
    )[1]


# Behind some tests of other files in the same process, the output that pytest captures is found closed.
@pytest.mark.slow
def test_the_page_is_served_until_it_is_interrupted(folders, images, monkeypatch, capsys):
    """It reads uploads and no other file; after Ctrl-C nobody listens, and what was uploaded is gone."""
    images[0].save(folders / "a.png")
    ports: list[int] = []
    uploads: list[Path] = []

    def interrupt() -> None:
        address = capsys.readouterr().out.split()[0]
        assert address.startswith("http://127.0.0.1:")
        ports.append(int(address.rstrip("/").rpartition(":")[2]))
        assert "Ask about a picture" in httpx.get(address).text
        answer = httpx.post(
            f"{address}gradio_api/upload", files={"files": ("a.png", (folders / "a.png").read_bytes())}
        )
        uploads.extend(map(Path, answer.json()))
        assert event(address, uploads[0]) == "complete"
        assert event(address, folders / "a.png") == event(address, Path("/etc/passwd")) == "error"
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "wait_forever", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.main([str(folders / "vlm"), "--port", "0"])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]), 10)
    assert not uploads[0].exists()
