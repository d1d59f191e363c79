"""`sigphi push`: a stranger loads by the card's own code what was pushed, and nothing private or half is there.

One child process pushes everything to a stand-in Hub, and verifies it; another one, in which this package is hidden,
runs the code of the cards.
"""

import inspect
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_stub import HubStub
from huggingface_hub import ModelCard
from PIL import Image
from test_hub_roundtrip import QUESTIONS, TEXTS, encoder_outputs, vlm_outputs
from transformers import TrainingArguments

from sigphi import SiglipResNetProcessor, SigPhiProcessor
from sigphi.hub_card.cards import write_card
from sigphi.hub_card.release import PUBLISHED, RECORD, is_published, leaks, release_files, scrubbed, stage
from sigphi.train.errors import UserError
from sigphi.train.push import main

TOKEN = "hf_" + "writerOfModels" * 3
REPOS = ("encoder", "towerless", "vlm", "adapter")
FORMS = {"encoder": "AutoModel", "towerless": "AutoModel", "vlm": "AutoModelForImageTextToText"}
FORMS["adapter"] = FORMS["vlm"]

# What `sigphi merge` records of a comparison.
PARITY: dict[str, Any] = {"compared_with": {"form": "adapter", "base_bits": 4}, "base": "original", "questions": 5}
PARITY |= {"identical_answers": 4, "logit_positions": 20, "next_token_agreement": 0.9, "mean_kl": 0.01}
PARITY |= {"max_abs_logit_difference": 0.5}

# What one process does, in turn: words behind `sigphi`, and what else differs.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("push encoder --repo-id tester/encoder", {}),
    "encoder again": ("push encoder --repo-id tester/encoder", {}),
    "towerless": ("push towerless --repo-id tester/towerless --text-model tester/tower", {}),
    "vlm": ("push vlm --repo-id tester/vlm --siglip-checkpoint tester/encoder --license mit", {}),
    "adapter": ("push adapter --repo-id tester/adapter --base-language-model tester/base", {}),
    "verify": ("verify tester/adapter", {}),
    "verify by a record": ("verify tester/vlm --record hashes.json", {}),
    "first form": ("push adapter --repo-id tester/switch --base-language-model tester/base", {}),
    "second form": ("push vlm --repo-id tester/switch --commit-message Merged --space tester/page", {}),
    "branch": ("push encoder --repo-id tester/encoder --revision in/half", {}),
    "request": ("push encoder --repo-id other/theirs --create-pr", {}),
    "secret": ("push encoder --repo-id tester/secret --private", {}),
    "too late": ("push encoder --repo-id tester/vlm --private", {}),
    "cut first": ("push encoder --repo-id tester/cut-first", {}),
    "cut first, again": ("push encoder --repo-id tester/cut-first", {}),
    "cut second": ("push encoder --repo-id tester/cut-second", {}),
    "cut second, again": ("push encoder --repo-id tester/cut-second", {}),
    "local base": ("push adapter --repo-id tester/none", {}),
    "local tower": ("push towerless --repo-id tester/none", {}),
    "other base": ("push adapter --repo-id tester/none --base-language-model tester/wide", {}),
    "no base": ("push adapter --repo-id tester/none --base-language-model tester/nowhere", {}),
    "other encoder": ("push vlm --repo-id tester/none --siglip-checkpoint tester/tower", {}),
    "useless": ("push vlm --repo-id tester/none --text-model tester/tower", {}),
    "half": ("push half --repo-id tester/none", {}),
    "gossip": ("push gossip --repo-id tester/none", {}),
    "no model": ("push empty --repo-id tester/none", {}),
    "no folder": ("push nowhere --repo-id tester/none", {}),
    "no token": ("push encoder --repo-id tester/none", {"token": None}),
    "refused token": ("push encoder --repo-id tester/none", {"token": "hf_refused"}),
    "reading token": ("push encoder --repo-id tester/none", {"token": "hf_read"}),
    "no network": ("push encoder --repo-id tester/none", {"endpoint": "http://127.0.0.1:9"}),
    "altered code": ("verify tester/altered", {}),
    "unrecorded": ("verify tester/base", {}),
    "nobody": ("verify tester/nobody", {}),
}
RUNNER = """
import contextlib, io, json, logging, os, sys
import huggingface_hub
from sigphi.train import push, verify
from sigphi.train.errors import UserError

class Log(logging.Handler):
    def emit(self, record):
        sys.stderr.write(record.getMessage())

for name in ("huggingface_hub", "sigphi"):
    logging.getLogger(name).addHandler(Log())
logging.getLogger("sigphi").setLevel(logging.INFO)
results = {}
os.chdir(os.environ["FOLDER"])
for name, (words, options) in json.loads(os.environ["COMMANDS"]).items():
    os.environ["HF_TOKEN"] = options.get("token", os.environ["TOKEN"]) or ""
    huggingface_hub.constants.ENDPOINT = options.get("endpoint", os.environ["HF_ENDPOINT"])
    command, *rest = words.split()
    out, err, error, code = io.StringIO(), io.StringIO(), None, 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            {"push": push, "verify": verify}[command].main(rest)
        except UserError as caught:
            error, code = str(caught), 2
        except SystemExit as stop:
            code = stop.code
    results[name] = {"out": out.getvalue(), "err": err.getvalue(), "error": error, "code": code}
with open(os.environ["RESULTS"], "w") as file:
    json.dump(results, file)
"""
STRANGER = (
    f"""
import torch
{inspect.getsource(encoder_outputs)}
{inspect.getsource(vlm_outputs)}
"""
    + """import contextlib, io, json, os
from pathlib import Path
from PIL import Image
from transformers import AutoModel

torch.set_num_threads(1)
images = [Image.open(Path(os.environ["DATA"], f"{i}.png")) for i in range(3)]
images[0].save("image.png")
texts, questions = json.loads(os.environ["TEXTS"]), json.loads(os.environ["QUESTIONS"])
results = {}
for name, code in json.loads(os.environ["CODE"]).items():
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    model, processor = names["model"], names["processor"]
    if name in ("vlm", "adapter"):
        headless = AutoModel.from_pretrained(f"tester/{name}", trust_remote_code=True)
        results[name] = vlm_outputs(model, headless, processor, images, questions)
    else:
        results[name] = encoder_outputs(model, processor, images, texts)
    results[name] |= {"printed": out.getvalue(), "module": type(model).__module__}
torch.save(results, os.environ["RESULTS"])
"""
)


# What is pushed ------------------------------------------------------------------------------------------------------


def add_records(folder: Path, root: Path) -> None:
    """What a training and an evaluation leave, and what must not be published."""
    arguments = TrainingArguments(str(root / "runs"), learning_rate=0.003, hub_token=TOKEN, use_cpu=True)
    (folder / "training_args.json").write_text(arguments.to_json_string())
    environment = {"sigphi": "0.1.0", "torch": "2.0", "accelerator": "none"}
    data = {"num_images": 5, "num_rows": 25, "images": str(root / "pictures"), "environment": environment}
    data |= {"siglip_checkpoint": str(root / "encoder"), "eval_fraction": 0.1, "images_per_split": {"train": 5}}
    results = {"zero_shot_top1": 0.51234, "class_accuracy": 0.25, "accuracy/<b>|`x`": 0.5, "majority/class": 0.1}
    metadata = {"images": 3, "image_splits": ["test"], "probe": f"{root}/pictures, split train", "rows": 3}
    metadata["image_source"] = "uoft-cs/cifar10"
    contents = {
        "training_data": data,
        "eval_results": results | {"metadata": metadata},
        "log_history": [{"loss": 1.0}],
    }
    if folder.name == "vlm":
        contents["parity"] = PARITY | {"metadata": {"questions_from": str(root / "mine.csv")}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    Image.new("RGB", (4, 4)).save(folder / "loss_curve.png")
    Image.new("RGB", (4, 4)).save(folder / "eval_samples.png")
    (folder / "eval_samples.md").write_text("# Answers\n")
    for name in ("checkpoint-5/optimizer.pt", "runs/events.1", ".cache/x", "training_args.bin", "notes.txt", "own.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(f"{TOKEN} {root}".encode())


@pytest.fixture(scope="module")
def artifacts(shared, make_vlm, make_lora_vlm, base_folder, images, tmp_path_factory):
    """Folders as a training leaves them, and what each model gives here."""
    root = tmp_path_factory.mktemp("models")
    processor = SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"])
    encoder = shared["encoder"]
    expected = {"encoder": encoder_outputs(encoder, processor, images, TEXTS)}
    encoder.save_pretrained(root / "encoder")
    encoder.text_model.language_model.save_pretrained(root / "tower")
    encoder.config.include_text_tower, encoder.config.text_model_name_or_path = False, str(root / "tower")
    encoder.save_pretrained(root / "towerless")
    expected["towerless"] = expected["encoder"]
    vlm_processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"], num_image_tokens=4)
    for name, make in (("vlm", make_vlm), ("adapter", make_lora_vlm)):
        model = make(num_image_tokens=4)
        model.save_pretrained(root / name)
        expected[name] = vlm_outputs(model, model.model, vlm_processor, images, QUESTIONS)
    for name in REPOS:
        (processor if FORMS[name] == "AutoModel" else vlm_processor).save_pretrained(root / name)
        add_records(root / name, root)
        write_card(root / name)
    shutil.copytree(root / "encoder", root / "half")
    weights = (root / "half" / "model.safetensors").read_bytes()
    (root / "half" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(root / "encoder", root / "gossip")
    (root / "gossip" / "eval_samples.md").write_text(f"see {root / 'gossip'}")
    (root / "empty").mkdir()
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    return SimpleNamespace(root=root, expected=expected, base=base_folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def hub(artifacts):
    with HubStub() as stub:
        stub.tokens[TOKEN] = "write"
        base = contents(artifacts.base)
        stub.add("tester/base", base)
        wide = json.loads(base["config.json"]) | {"hidden_size": 128}
        stub.add("tester/wide", base | {"config.json": json.dumps(wide).encode()})
        stub.add("tester/tower", contents(artifacts.root / "tower"))
        stub.add("other/theirs", {"README.md": b"# Theirs", "notes.txt": b"theirs"})
        stub.cut("POST .*/tester/cut-first/commit/", "answer")
        stub.cut("POST .*/tester/cut-second/commit/", "request", skip=1)
        yield stub


@pytest.fixture(scope="module")
def done(hub, artifacts, run_child, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What every command has printed and raised."""
    home, staged = tmp_path_factory.mktemp("pusher"), tmp_path_factory.mktemp("altered")
    stage(artifacts.root / "encoder", staged, {})
    (staged / "modeling_siglip_resnet.py").write_text("import os\n")
    (staged / "new.py").write_text("")
    (staged / "chat.txt").write_text("of no interest")
    (staged / "processor_config.json").unlink()
    hub.add("tester/altered", contents(staged))
    vlm = tmp_path_factory.mktemp("vlm")
    stage(artifacts.root / "vlm", vlm, {"training_data.json": {"siglip_checkpoint": "x"}})
    shutil.copy(vlm / RECORD, artifacts.root / "hashes.json")
    environment = hub.environment(home) | {"TOKEN": TOKEN, "FOLDER": artifacts.root, "RESULTS": home / "results.json"}
    run_child(RUNNER, **environment, COMMANDS=json.dumps(COMMANDS))
    return json.loads((home / "results.json").read_text())


def code_of(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


@pytest.fixture(scope="module")
def read(hub, done, artifacts, run_stranger, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What somebody without this package computes, after running the code of the cards."""
    home = tmp_path_factory.mktemp("reader")
    code = {name: code_of(hub.files(f"tester/{name}")["README.md"].decode()) for name in REPOS}
    what = {"CODE": code, "TEXTS": TEXTS, "QUESTIONS": QUESTIONS}
    given = {name: json.dumps(value) for name, value in what.items()} | {"DATA": artifacts.root}
    run_stranger(STRANGER, **hub.environment(home), **given, RESULTS=home / "results.pt")
    return torch.load(home / "results.pt")


# What is read back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPOS)
def test_the_cards_code_loads_the_model_that_was_pushed(artifacts, read, name):
    found, expected = read[name], artifacts.expected[name]
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert found["module"].startswith("transformers_modules.")
    assert len(found["printed"].strip()) > 0


def test_the_cards_code_names_the_commit_of_the_weights(hub, done):
    for name in REPOS:
        address, line = done[name]["out"].splitlines()
        assert address == f"{hub.url}/tester/{name}"
        commit = re.search(r'revision="(\w{40})"\)$', line)[1]
        assert line == f'{FORMS[name]}.from_pretrained("tester/{name}", trust_remote_code=True, revision="{commit}")'
        repo = hub.repos["models", f"tester/{name}"]
        assert repo.commits[commit].title == "Model with its card"
        card = hub.files(f"tester/{name}")["README.md"].decode()
        assert f'"tester/{name}", trust_remote_code=True, revision="{commit}")' in card
        before, after = (set(repo.commits[key].files) for key in (commit, repo.branches["main"]))
        assert before == after == set(hub.files(f"tester/{name}"))


def test_what_is_read_from_elsewhere_is_pinned_to_a_commit(hub, done):
    config = json.loads(hub.files("tester/adapter")["config.json"])
    commit = hub.repos["models", "tester/base"].branches["main"]
    assert (config["base_language_model"], config["base_language_model_revision"]) == ("tester/base", commit)
    lora = json.loads(hub.files("tester/adapter")["lora/adapter_config.json"])
    assert (lora["base_model_name_or_path"], lora["revision"]) == ("tester/base", commit)
    config = json.loads(hub.files("tester/towerless")["config.json"])
    commit = hub.repos["models", "tester/tower"].branches["main"]
    assert (config["text_model_name_or_path"], config["text_model_revision"]) == ("tester/tower", commit)
    data = json.loads(hub.files("tester/vlm")["training_data.json"])
    repo = hub.repos["models", "tester/encoder"]
    assert data["siglip_checkpoint"] == "tester/encoder"
    assert data["siglip_checkpoint_revision"] in repo.commits
    assert (
        f"| `tester/encoder` | `{data['siglip_checkpoint_revision']}` |"
        in hub.files("tester/vlm")["README.md"].decode()
    )


def test_the_same_again_makes_no_commit_and_says_the_same(hub, done):
    assert done["encoder again"]["out"] == done["encoder"]["out"]
    titles = [commit.title for commit in hub.repos["models", "tester/encoder"].commits.values()]
    assert titles[:3] == ["initial commit", "Model with its card", "The card's code names the commit"]
    assert done["branch"]["out"].splitlines()[0].endswith("/tester/encoder/tree/in%2Fhalf")


def test_another_form_takes_the_place_of_the_first(hub, done):
    assert "lora/adapter_config.json" in hub.files("tester/adapter")
    assert not [name for name in hub.files("tester/switch") if name.startswith("lora/")]
    assert hub.files("tester/switch").keys() == hub.files("tester/vlm").keys()
    assert "Merged" in [commit.title for commit in hub.repos["models", "tester/switch"].commits.values()]


def test_a_space_asks_the_very_model_that_was_pushed(hub, done):
    address, _, page = done["second form"]["out"].splitlines()
    assert (address, page) == (f"{hub.url}/tester/switch", f"{hub.url}/spaces/tester/page")
    settings = json.loads(hub.files("tester/page", kind="spaces")["demo.json"])
    assert settings["model"] == "tester/switch"
    assert hub.repos["models", "tester/switch"].commits[settings["revision"]].title == "Merged"
    assert [commit.title for commit in hub.repos["spaces", "tester/page"].commits.values()][1:] == ["Merged"]


def test_a_pull_request_is_complete_and_leaves_main_alone(hub, done):
    assert hub.files("other/theirs") == {"README.md": b"# Theirs", "notes.txt": b"theirs"}
    proposed = hub.files("other/theirs", "refs/pr/1")
    assert proposed.keys() == hub.files("tester/encoder").keys() | {"notes.txt"}
    assert (
        'revision="' in proposed["README.md"].decode()
        and "refs/pr/2" not in hub.repos["models", "other/theirs"].branches
    )
    assert done["request"]["out"].startswith(f"{hub.url}/other/theirs/discussions/1\n")


def test_a_private_model_is_private(hub, done):
    assert hub.repos["models", "tester/secret"].private and not hub.repos["models", "tester/encoder"].private


@pytest.mark.parametrize("name", ["cut first", "cut second"])
def test_a_cut_leaves_nothing_half_and_a_second_try_completes(hub, done, name):
    repo = f"tester/{name.replace(' ', '-')}"
    assert done[name]["error"].startswith(f"--repo-id {repo}: no connection to the Hub, or it broke")
    assert done[f"{name}, again"]["error"] is None
    history = [set(commit.files) for commit in hub.repos["models", repo].commits.values()]
    assert history == [set(), set(hub.files("tester/encoder")), set(hub.files("tester/encoder"))]
    without_card = {key: blob for key, blob in hub.files(repo).items() if key != "README.md"}
    assert without_card == {key: hub.files("tester/encoder")[key] for key in without_card}


def test_nothing_was_asked_of_the_hub_that_it_does_not_serve(hub, read):
    assert not [entry for entry in hub.log if entry[2] == 501]


# What must not be there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPOS)
def test_only_what_is_listed_is_published(hub, artifacts, done, name):
    files = hub.files(f"tester/{name}")
    assert all(is_published(file) for file in files.keys() - {"README.md"} if not file.endswith(".py"))
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl", ".txt")) or "checkpoint" in file]
    assert {"training_args.json", "eval_results.json", "loss_curve.png", RECORD} <= files.keys()
    code = {"hub_code.py"} | {path.name for path in (artifacts.root / name).glob("*_si*.py")}
    assert {file for file in files if file.endswith(".py")} == code
    assert (
        "left out of what is published: .cache, checkpoint-5, notes.txt, own.py, runs, training_args.bin"
        in done[name]["err"]
    )


def test_no_byte_tells_a_path_or_a_token(hub, artifacts, done):
    told = b"".join(hub.blobs.values()) + json.dumps([done[name]["out"] + done[name]["err"] for name in done]).encode()
    for secret in (
        str(artifacts.root),
        str(artifacts.root.parent),
        str(Path.home()) + "/",
        str(artifacts.base),
        TOKEN,
    ):
        assert secret.encode() not in told
    errors = json.dumps([one["error"] for one in done.values()])
    assert not [token for token in (TOKEN, "hf_refused", "hf_read") if token in errors]
    titles = [c.title for repo in hub.repos.values() for c in repo.commits.values()]
    assert not [title for title in titles if TOKEN in title]


@pytest.mark.parametrize("word", ["--hub-token", "--hub_token=x"])
def test_a_token_on_the_command_line_is_refused(word):
    from sigphi.train import siglip

    with pytest.raises(UserError, match="whoever lists this machine's processes reads a token there"):
        siglip.main([word, "x"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local base", "its language model is the folder "),
        ("local base", "add --base-language-model OWNER/NAME, or push a form that holds it"),
        ("local tower", "add --text-model OWNER/NAME, or train with --save-text-tower."),
        ("other base", "--base-language-model tester/wide has hidden_size 128, the model was trained with 64"),
        ("no base", "--base-language-model tester/nowhere: cannot be read from the Hub (RepositoryNotFoundError)"),
        ("other encoder", "--siglip-checkpoint tester/tower is a 'phi' model; give an encoder"),
        ("useless", "--text-model tester/tower has no use: vlm is no encoder without text tower."),
        ("half", "half/model.safetensors cannot be read ("),
        ("gossip", "gossip/eval_samples.md holds the path of the model's folder; nothing has been uploaded."),
        ("no model", "MODEL empty: there is no model folder with a config.json here."),
        ("no folder", "MODEL nowhere: there is no such folder"),
        ("no token", "there is no token of the Hub, or a garbled one: log in by `hf auth login`"),
        ("refused token", "--repo-id tester/none: the Hub answers 401; the token is not accepted"),
        (
            "reading token",
            "the Hub answers 403 (You don't have the rights to write to tester/none); the token may not",
        ),
        ("too late", "--repo-id tester/vlm is there already, and public"),
        ("no network", "--repo-id tester/none: no connection to the Hub, or it broke (ConnectError)."),
    ],
)
def test_a_refusal_names_the_remedy_and_nothing_is_there(hub, done, name, message):
    assert message in done[name]["error"] and done[name]["out"] == ""
    assert ("models", "tester/none") not in hub.repos


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--repo-id tester/a/b", "--repo-id 'tester/a/b': Repo id must be in the form"),
        ("--repo-id plain", "--repo-id plain: write it with its owner, such as alice/plain."),
        ("--repo-id a/b --create-pr --revision x", "--create-pr opens a pull request against main"),
        ("--repo-id a/b --license MIT!", "--license 'MIT!' is no license of the Hub"),
        ("--repo-id a/b --token c", "there is no option `--token`."),
    ],
)
def test_a_wrong_command_line_is_a_user_error(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["model", *words.split()])


# Verify --------------------------------------------------------------------------------------------------------------


def test_verify_finds_nothing_wrong_with_what_was_pushed(hub, done):
    count = len(json.loads(hub.files("tester/adapter")[RECORD])["sha256"])
    commit = hub.repos["models", "tester/adapter"].branches["main"]
    line = (
        f'AutoModelForImageTextToText.from_pretrained("tester/adapter", trust_remote_code=True, revision="{commit}")'
    )
    assert done["verify"]["out"] == f"{count} files recorded, 0 differ\n{line}\n"
    assert (done["verify"]["code"], done["verify by a record"]["code"]) == (0, 1)
    assert done["verify by a record"]["out"].startswith("changed: training_data.json\n")


def test_verify_names_every_file_that_differs(done):
    lines = done["altered code"]["out"].splitlines()
    assert lines[:3] == [
        "changed: modeling_siglip_resnet.py",
        "not recorded: new.py",
        "missing: processor_config.json",
    ]
    assert lines[3].endswith(" files recorded, 3 differ") and done["altered code"]["code"] == 1


def test_verify_needs_a_record_and_a_model(done):
    assert "it has no file_hashes.json, which `sigphi push` writes" in done["unrecorded"]["error"]
    assert done["nobody"]["error"].startswith(
        "MODEL tester/nobody: cannot be read from the Hub (RepositoryNotFoundError)"
    )


# Cards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPOS)
def test_the_hubs_own_parser_reads_the_card(hub, done, name):
    text = hub.files(f"tester/{name}")["README.md"].decode()
    data = ModelCard(text).data
    results = json.loads(hub.files(f"tester/{name}")["eval_results.json"])
    assert data.library_name == "transformers" and data.license == ("mit" if name == "vlm" else "apache-2.0")
    figures = {result.metric_name: result.metric_value for result in data.eval_results}
    assert figures == {key: results[key] for key in ("zero_shot_top1", "class_accuracy")}
    assert {(one.dataset_type, one.dataset_split) for one in data.eval_results} == {("uoft-cs/cifar10", "test")}
    assert (
        data.base_model
        == {
            "encoder": None,
            "towerless": ["tester/tower"],
            "vlm": ["tester/encoder"],
            "adapter": ["tester/base"],
        }[name]
    )
    assert f"| `zero_shot_top1` | {results['zero_shot_top1']:.4f} |" in text
    assert "| `accuracy/<b>/'x'` | 0.5000 |" in text and "<b>" not in re.sub(r"`[^`\n]*`", "", text)
    assert "![Loss by step](loss_curve.png)" in text and "| learning rate | 0.003 |" in text
    assert "a local folder" in text and "| torch | `2.0` |" in text


# Parts ---------------------------------------------------------------------------------------------------------------


def test_every_file_that_a_model_saves_is_listed(artifacts):
    for name in REPOS:
        names, left_out = release_files(artifacts.root / name)
        saved = {path.relative_to(artifacts.root / name).as_posix() for path in (artifacts.root / name).rglob("*.*")}
        extra = {"README.md", "own.py", "notes.txt", "training_args.bin", "runs/events.1", "checkpoint-5/optimizer.pt"}
        assert set(names) == saved - extra - {".cache"} - {file for file in saved if file.startswith(".cache")}
        assert set(left_out) == {".cache", "checkpoint-5", "notes.txt", "own.py", "runs", "training_args.bin"}


def test_what_only_this_machine_knows_is_taken_out(tmp_path):
    (tmp_path / "here").mkdir()
    options = {"output_dir": "out", "hub_token": "<HUB_TOKEN>", "hub_model_id": "a/b"}
    options |= {"seed": 3, "deepspeed": "/etc/ds.json"}
    assert scrubbed("training_args.json", options) == {"seed": 3, "deepspeed": "a local folder"}
    nested = {"metadata": {"probe": f"{tmp_path}/my set, split train", "n": 1}, "list": ["~/x", "a/b"]}
    expected = {"metadata": {"probe": "a local folder, split train", "n": 1}, "list": ["a local folder", "a/b"]}
    assert scrubbed("eval_results.json", nested) == expected
    # A tokenizer's or config's strings are not records: a word may look like a path.
    assert scrubbed("tokenizer_config.json", {"word": "/usr", "name_or_path": "x/y"}) == {
        "word": "/usr",
        "name_or_path": "",
    }


def test_leaks_are_found_but_not_in_vocabularies(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"/home/me/": 3}')
    (tmp_path / "a.md").write_text("by /home/me/x")
    (tmp_path / "b.json").write_text(json.dumps("hf_" + "a1" * 20))
    (tmp_path / "c.json").write_text(json.dumps({"path": 'C:\\Users\\"me"'}))
    secrets = {"home": "/home/me/", "windows": 'C:\\Users\\"me"'}
    assert leaks(tmp_path, secrets) == [("a.md", "home"), ("b.json", "a token of the Hub"), ("c.json", "windows")]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("encoder", "model.safetensors"),
        ("vlm", "model.safetensors"),
        ("adapter", "model.safetensors"),
        ("adapter", "lora/adapter_model.safetensors"),
    ],
)
def test_altered_weights_do_not_load(artifacts, tmp_path, form, name):
    from sigphi import SiglipResNetModel, SigPhiForConditionalGeneration

    load = (SiglipResNetModel if form == "encoder" else SigPhiForConditionalGeneration).from_pretrained
    stage(artifacts.root / form, tmp_path, {})
    load(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).unlink()  # it is a link
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OSError, match=f"{name} is not the file that was published"):
        load(tmp_path)
    (tmp_path / name).write_bytes(data[:-4])
    with pytest.raises(Exception, match="(?i)incomplete|not fully covered|cannot read|unable to load"):
        load(tmp_path)


def test_what_is_saved_again_has_no_hashes_of_other_weights(artifacts, tmp_path):
    from sigphi import SiglipResNetModel

    (tmp_path / "pulled").mkdir()
    stage(artifacts.root / "encoder", tmp_path / "pulled", {})
    model = SiglipResNetModel.from_pretrained(tmp_path / "pulled")
    assert model.config.weight_hashes is not None
    model.logit_scale.data += 1
    model.save_pretrained(tmp_path / "pulled")
    again = SiglipResNetModel.from_pretrained(tmp_path / "pulled")
    assert again.config.weight_hashes is None and torch.equal(again.logit_scale, model.logit_scale)
    assert set(PUBLISHED) >= {"config.json", "*.safetensors"}


# Ten random points ---------------------------------------------------------------------------------------------------

PUSHES = {"encoder": "push encoder", "adapter": "push adapter --base-language-model tester/base"}
PULLER = (
    f"""
import torch
{inspect.getsource(encoder_outputs)}
{inspect.getsource(vlm_outputs)}
"""
    + """import json, os
from pathlib import Path
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

images = [Image.open(Path(os.environ["DATA"], f"{i}.png")) for i in range(3)]
texts, questions, results = json.loads(os.environ["TEXTS"]), json.loads(os.environ["QUESTIONS"]), []
auto = AutoModel if os.environ["FORM"] == "encoder" else AutoModelForImageTextToText
for repo in json.loads(os.environ["NAMES"]):
    cache, tries = f"cache-{len(results)}", []
    for _ in range(2):
        try:
            options = {"trust_remote_code": True, "cache_dir": cache}
            model, processor = (kind.from_pretrained(repo, **options) for kind in (auto, AutoProcessor))
            if auto is AutoModel:
                outputs = encoder_outputs(model, processor, images, texts)
            else:
                outputs = vlm_outputs(model, model.model, processor, images, questions)
            tries.append(outputs["logits"])
        except Exception as error:
            tries.append(f"{type(error).__name__}: {error}")
    results.append(tries)
torch.save(results, os.environ["RESULTS"])
"""
)


def with_base(artifacts) -> HubStub:
    """A Hub that has the language model of the adapter form."""
    stub = HubStub()
    stub.tokens[TOKEN] = "write"
    stub.add("tester/base", contents(artifacts.base))
    return stub


@pytest.mark.slow
@pytest.mark.parametrize("form", PUSHES)
def test_a_push_cut_at_any_point_is_complete_or_says_so(artifacts, run_child, tmp_path, form):
    with with_base(artifacts) as stub:
        environment = stub.environment(tmp_path) | {"TOKEN": TOKEN, "FOLDER": artifacts.root}
        environment["RESULTS"] = tmp_path / "results.json"
        commands = {"whole": (f"{PUSHES[form]} --repo-id tester/whole", {})}
        run_child(RUNNER, **environment, COMMANDS=json.dumps(commands))
        requests = [entry for entry in stub.log if "tester/whole" in entry[1]]
        assert [entry for entry in requests if "/lfs/" in entry[1] and entry[0] == "PUT"]
        # An encoder's push has fewer requests than points: some are cut twice, in another way.
        points = sorted(random.Random(0).choices(range(len(requests)), k=10))
        commands = {}
        for number, point in enumerate(points):
            what = ("request", "answer", "middle")[number % 3]
            stub.cut(f"/tester/cut-{number}[/.]|tester/cut-{number}$", what, point)
            words = f"{PUSHES[form]} --repo-id tester/cut-{number}"
            commands |= {f"{number}": (words, {}), f"{number} again": (words, {})}
        run_child(RUNNER, **environment, COMMANDS=json.dumps(commands))
        assert stub.cuts == []
        results = json.loads((tmp_path / "results.json").read_text())
        whole = stub.files("tester/whole")
        broken = 0
        for number in range(len(points)):
            first, second = results[f"{number}"], results[f"{number} again"]
            broken += first["error"] is not None
            if first["error"] is not None:
                assert "no connection to the Hub, or it broke" in first["error"]
            assert second["error"] is None
            history = [set(commit.files) for commit in stub.repos["models", f"tester/cut-{number}"].commits.values()]
            assert all(files in (set(), set(whole)) for files in history)
            found = stub.files(f"tester/cut-{number}")
            assert {k: v for k, v in found.items() if k != "README.md"} == {
                k: whole[k] for k in found if k != "README.md"
            }
            assert 'revision="' in found["README.md"].decode()
        assert broken > 0
        sys.stdout.write(
            f"{form}: 10 of {len(requests)} requests of pushes cut, {broken} errors, 10 second tries whole"
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", PUSHES)
def test_a_pull_cut_at_any_point_is_complete_or_says_so(artifacts, run_stranger, run_child, tmp_path, form):
    with with_base(artifacts) as stub:
        environment = stub.environment(tmp_path / "pusher") | {"TOKEN": TOKEN, "FOLDER": artifacts.root}
        push = {"whole": (f"{PUSHES[form]} --repo-id tester/whole", {})}
        run_child(RUNNER, **environment, RESULTS=tmp_path / "x.json", COMMANDS=json.dumps(push))
        given = {"DATA": artifacts.root, "RESULTS": tmp_path / "results.pt", "FORM": form}
        given |= {"TEXTS": json.dumps(TEXTS), "QUESTIONS": json.dumps(QUESTIONS)}
        before = len(stub.log)
        names = ["tester/whole"]
        run_stranger(PULLER, **stub.environment(tmp_path / "first"), **given, NAMES=json.dumps(names))
        requests = [entry for entry in stub.log[before:] if "tester/whole" in entry[1]]
        # The second load comes mostly from the cache.
        points = sorted(random.Random(0).sample(range(2 * len(requests) // 3), 10))
        names = [f"tester/pull-{number}" for number in range(10)]
        for number, (name, point) in enumerate(zip(names, points, strict=True)):
            stub.repos["models", name] = stub.repos["models", "tester/whole"]
            stub.cut(f"{name}[/.]|{name}$", ("answer", "middle")[number % 2], point)
        run_stranger(PULLER, **stub.environment(tmp_path / "second"), **given, NAMES=json.dumps(names))
        assert stub.cuts == []
        broken = 0
        for first, second in torch.load(tmp_path / "results.pt"):
            assert torch.equal(second, artifacts.expected[form]["logits"])
            broken += isinstance(first, str)
            assert len(first) > 20 if isinstance(first, str) else torch.equal(first, second)
        sys.stdout.write(
            f"{form}: 10 of {len(requests)} requests of pulls cut, {broken} errors, 10 second tries whole"
        )
