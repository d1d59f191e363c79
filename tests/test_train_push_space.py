"""`sigphi push --space`: a stranger runs the Space that was published, and it answers as `sigphi ask` does.

One child process pushes everything to a stand-in Hub; the Space runs in another one that cannot import this package.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import child_environment
from hub_stub import HubStub
from PIL import Image
from test_train_push import RUNNER, TOKEN

pytest.importorskip("gradio", reason="a Space needs gradio: pip install 'sigphi[demo]'")

from sigphi import SiglipResNetProcessor, SigPhiProcessor
from sigphi.hub_card import app
from sigphi.hub_card.release import leaks
from sigphi.train import ask
from sigphi.train.chat import load_vlm
from sigphi.train.demo_content import classes_of, stored_tower
from sigphi.train.report import picture_grid

pytestmark = pytest.mark.slow

QUESTION = "What is the object in the image?"
PUSH = "push vlm --repo-id tester/vlm --siglip-checkpoint tester/encoder --license mit"
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("push encoder --repo-id tester/encoder", {}),
    "space": (f"{PUSH} --space tester/page", {}),
    "again": (f"{PUSH} --space tester/page", {}),
    "without encoder": ("push alone --repo-id tester/alone --space tester/page", {}),
    "secret": ("push vlm --repo-id tester/secret --private --space tester/secret-page --commit-message First", {}),
    "request": ("push vlm --repo-id other/theirs --create-pr --space other/page", {}),
    "branch": ("push vlm --repo-id tester/vlm --revision try --space tester/page", {}),
    "cut": ("push vlm --repo-id tester/cut --space tester/cut", {}),
    "cut, again": ("push vlm --repo-id tester/cut --space tester/cut", {}),
    "too late": ("push vlm --repo-id tester/late --private --space tester/page", {}),
    "gossip": ("push gossip --repo-id tester/none --space tester/none", {}),
    "other encoder": ("push vlm --repo-id tester/none --siglip-checkpoint tester/tuned --space tester/none", {}),
}


@pytest.fixture(scope="module")
def root(shared: Any, make_vlm: Any, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as trainings leave them."""
    root = tmp_path_factory.mktemp("models")
    encoder = shared["encoder"]
    for name in ("encoder", "tuned"):
        encoder.save_pretrained(root / name)
        SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(root / name)
        encoder.vision_model.projection.weight.data.mul_(1.1)
    vlm = root / "vlm"
    make_vlm().save_pretrained(vlm)
    SigPhiProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(vlm)
    shutil.copytree(vlm, root / "alone")
    (vlm / "training_data.json").write_text(json.dumps({"siglip_checkpoint": str(root / "encoder")}))
    picture_grid([image.resize((32, 32)) for image in images], columns=8).save(vlm / "eval_samples.png")
    shutil.copytree(vlm, root / "gossip")
    for folder, question in ((vlm, QUESTION), (root / "gossip", f"Is it in {root / 'gossip'}?")):
        table = pd.DataFrame({"question_type": ["object"], "question": [question]})
        table.to_parquet(folder / "predictions.parquet")
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def hub(root: Path) -> Iterator[HubStub]:
    with HubStub() as stub:
        stub.tokens[TOKEN] = "write"
        stub.add("tester/tuned", {path.name: path.read_bytes() for path in (root / "tuned").iterdir()})
        stub.add("other/theirs", {"README.md": b"# Theirs"})
        stub.add("other/page", {"README.md": b"# Theirs"}, "spaces")
        stub.cut("POST .*/spaces/tester/cut/commit/")
        yield stub


@pytest.fixture(scope="module")
def done(
    hub: HubStub, root: Path, run_child: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What every command has printed and raised."""
    home = tmp_path_factory.mktemp("pusher")
    environment = hub.environment(home) | {"TOKEN": TOKEN, "FOLDER": root, "RESULTS": home / "results.json"}
    run_child(RUNNER, **environment, COMMANDS=json.dumps(COMMANDS))
    return json.loads((home / "results.json").read_text())


def commits(hub: HubStub, repo: str) -> list[str]:
    return [commit.title for commit in hub.repos["spaces", repo].commits.values()]


def at(hub: HubStub, repo: str, title: str) -> dict[str, bytes]:
    """The files of a Space at the commit of a title."""
    (name,) = [name for name, commit in hub.repos["spaces", repo].commits.items() if commit.title == title]
    return hub.files(repo, name, "spaces")


def test_the_space_comes_in_one_commit_pinned_to_that_of_the_model(hub, done):
    assert [one["error"] for name, one in done.items() if name in ("encoder", "space", "again")] == [None] * 3
    address, line, page = done["space"]["out"].splitlines()
    assert (address, page) == (f"{hub.url}/tester/vlm", f"{hub.url}/spaces/tester/page")
    revision = re.search(r'revision="(\w{40})"\)$', line)[1]
    # The branch was made at the last commit of main; a second push of the same makes none.
    assert commits(hub, "tester/page") == ["initial commit", *["Page to ask the model about pictures"] * 3]
    first = list(hub.repos["spaces", "tester/page"].commits)[1]
    files = hub.files("tester/page", first, "spaces")
    settings = json.loads(files["demo.json"])
    assert settings == {"model": "tester/vlm", "revision": revision, "questions": [QUESTION]}
    assert hub.repos["models", "tester/vlm"].commits[revision].title == "Model with its card"
    examples = {"examples/01.png", "examples/02.png", "examples/03.png"}
    assert files.keys() == {"README.md", "app.py", "requirements.txt", "demo.json", "classes.safetensors", *examples}
    assert hub.repos["spaces", "tester/page"].sdk == "gradio"
    assert b"license: mit" in files["README.md"]


def test_what_is_no_longer_shown_goes_in_the_same_commit(hub, done):
    assert done["without encoder"]["error"] is None
    files = hub.files("tester/page", kind="spaces")
    assert json.loads(files["demo.json"])["model"] == "tester/alone"
    assert "classes.safetensors" not in files and "examples/08.png" in files
    assert "alone does not record its encoder" in done["without encoder"]["err"]


def test_private_message_branch_and_request_are_as_for_models(hub, done):
    assert hub.repos["spaces", "tester/secret-page"].private and not hub.repos["spaces", "tester/page"].private
    assert commits(hub, "tester/secret-page") == ["initial commit", "First"]
    assert "tester/secret is private, so the Space cannot read it yet: add a secret HF_TOKEN" in done["secret"]["err"]
    assert "is private" not in done["space"]["err"]
    assert done["branch"]["out"].splitlines()[-1] == f"{hub.url}/spaces/tester/page/tree/try"
    assert json.loads(hub.files("tester/page", "try", "spaces")["demo.json"])["model"] == "tester/vlm"
    assert hub.files("other/page", kind="spaces") == {"README.md": b"# Theirs"}
    proposed = json.loads(hub.files("other/page", "refs/pr/1", "spaces")["demo.json"])
    assert proposed["revision"] in hub.repos["models", "other/theirs"].commits
    assert done["request"]["out"].splitlines()[-1] == f"{hub.url}/spaces/other/page/discussions/1"
    assert done["too late"]["error"].startswith("--space tester/page is there already, and public")


def test_a_cut_leaves_nothing_half_and_a_second_try_completes(hub, done):
    assert done["cut"]["error"].startswith("--space tester/cut: no connection to the Hub, or it broke")
    assert len(done["cut"]["out"].splitlines()) == 2
    assert done["cut, again"]["error"] is None
    history = [set(commit.files) for commit in hub.repos["spaces", "tester/cut"].commits.values()]
    assert [len(files) for files in history] == [0, 8]


def test_nothing_is_published_where_something_is_wrong(hub, done, root):
    assert "holds the path of the model's folder; nothing has been uploaded" in done["gossip"]["error"]
    assert "--siglip-checkpoint tester/tuned has another image tower than MODEL" in done["other encoder"]["error"]
    assert not [key for key in hub.repos if key[1] == "tester/none"]


def test_a_space_holds_nothing_of_this_machine(hub, done, root, tmp_path):
    for number, (kind, repo) in enumerate(key for key in hub.repos if key[0] == "spaces"):
        for name, content in hub.files(repo, kind=kind).items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    assert leaks(tmp_path, {"root": str(root), "home": f"{Path.home()}/", "token": TOKEN}) == []


def test_nothing_was_asked_of_the_hub_that_it_does_not_serve(hub, done):
    assert not [entry for entry in hub.log if entry[2] == 501]


# The Space runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(hub: HubStub, done: Any, run_stranger: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the Space, downloaded into an empty folder and run by somebody without this package."""
    place, home = tmp_path_factory.mktemp("space"), tmp_path_factory.mktemp("reader")
    commit = list(hub.repos["spaces", "tester/page"].commits)[1]
    download = f"""
from huggingface_hub import snapshot_download
snapshot_download("tester/page", repo_type="space", revision={commit!r}, local_dir={str(place / "files")!r})
"""
    run_stranger(download, **hub.environment(home))
    (place / "absent" / "sigphi").mkdir(parents=True)
    (place / "absent" / "sigphi" / "__init__.py").write_text("raise ImportError('sigphi is not installed')")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = child_environment(home) | hub.environment(home)
    environment |= {"PYTHONPATH": str(place / "absent"), "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=place / "files",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        addresses = (re.search(r"http://127\S+", line) for line in process.stdout)
        address = next(filter(None, addresses), None)
        assert address is not None, (place / "log").read_text()[-3000:]
        yield address[0]
    finally:
        process.terminate()
        process.wait(60)
    assert "Traceback" not in (place / "log").read_text()


def asked(root: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The answer and the confidence that `sigphi ask` prints."""
    ask.main([str(root / "vlm"), str(root / picture), "-q", QUESTION, "--show-confidence"])
    answer, _, confidence = capsys.readouterr().out.rpartition("(confidence ")
    return answer.strip(), confidence.strip(")\n")


def test_the_space_answers_as_sigphi_ask_does(running, root, capsys):
    from gradio_client import Client, handle_file

    vlm = str(root / "vlm")
    local = app.Demo(*load_vlm(vlm), classes_of(vlm, stored_tower(root / "vlm"), None), max_new_tokens=2)
    client = Client(running, verbose=False, analytics_enabled=False, download_files=False)
    answers = set()
    for picture in ("0.png", "1.png", "2.png"):
        answer, confidence, classes = client.predict(handle_file(root / picture), QUESTION, api_name="/ask")
        assert (answer, f"{confidence:.2f}") == asked(root, picture, capsys)
        scores = {one["label"]: one["confidence"] for one in classes["confidences"]}
        _, _, expected = local.ask({"path": str(root / picture)}, QUESTION)
        assert scores == {name: pytest.approx(expected[name], abs=1e-5) for name in scores} and len(scores) >= 3
        blank, _, verdict = client.predict(QUESTION, answer, api_name="/ask_without_picture")
        assert verdict == (app.STAYS if blank == answer else app.CHANGES)
        answers.add(answer)
    assert len(answers) > 1
