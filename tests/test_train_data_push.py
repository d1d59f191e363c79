"""`sigphi data push`: `load_dataset` gives back what was published, and a push that fails leaves nothing half."""

import csv
import functools
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hub_stub import HubStub
from huggingface_hub.errors import HfHubHTTPError

from sigphi.train import data_push
from sigphi.train.data import QA_FEATURES, data_facts, load_cifar10_qa, main
from sigphi.train.data_build import build_csv
from sigphi.train.data_push import DataPushArguments, question_types, write_qa_repo
from sigphi.train.errors import UserError
from sigphi.train.hub import hub_errors
from sigphi.train.images import load_images

# The same pictures under two names; the stand-in Hub has them as uoft-cs/cifar10.
DRAWN = "synthetic:60"
NUM_IMAGES = 40
TOKEN = "hf_writer"
WITHOUT_IMAGE = datasets.Features({name: kind for name, kind in QA_FEATURES.items() if name != "image"})

# What one process pushes, in turn: the words behind `sigphi data push`, and what else differs. Those without --images
# take them from the stand-in Hub; `pictures` is a folder with the same.
PUSHES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qa.csv --repo-id tester/plain", {}),
    "plain again": ("qa.csv --repo-id tester/plain", {}),
    "drawn": (f"qa.csv --repo-id tester/drawn --images {DRAWN} --with-images --license mit", {}),
    "branch": ("qa.csv --images pictures --repo-id tester/plain --revision in/half --eval-fraction 0.5", {}),
    "request": ("qa.csv --images pictures --repo-id other/theirs --create-pr --commit-message Ours", {}),
    "request again": ("qa.csv --images pictures --repo-id other/theirs --create-pr --license mit", {}),
    "many files": ("qa.csv --images pictures --repo-id tester/shrunk", {"rows_a_file": 30}),
    "few files": ("qa.csv --images pictures --repo-id tester/shrunk", {}),
    "secret": ("qa.csv --images pictures --repo-id tester/secret --private", {}),
    "too late": ("qa.csv --images pictures --repo-id tester/plain --private --revision late", {}),
    "cut request": ("qa.csv --images pictures --repo-id tester/cut-request", {}),
    "cut request, again": ("qa.csv --images pictures --repo-id tester/cut-request", {}),
    "cut answer": ("qa.csv --images pictures --repo-id tester/cut-answer", {}),
    "cut answer, again": ("qa.csv --images pictures --repo-id tester/cut-answer", {}),
    "no token": ("qa.csv --images pictures --repo-id tester/none", {"token": None}),
    "refused token": ("qa.csv --images pictures --repo-id tester/none", {"token": "hf_refused"}),
    "garbled token": ("qa.csv --images pictures --repo-id tester/none", {"token": "hf_g\u00e4rbled"}),
    "reading token": ("qa.csv --images pictures --repo-id tester/none", {"token": "hf_read"}),
    "other owner": ("qa.csv --images pictures --repo-id other/none", {}),
    "unknown license": ("qa.csv --images pictures --repo-id tester/license --license gpl-99", {}),
    "faulty": ("faulty.csv --images pictures --repo-id tester/none", {}),
    "no network": ("qa.csv --images pictures --repo-id tester/none", {"endpoint": "http://127.0.0.1:9"}),
}
PUSHER = """
import contextlib, io, json, logging, os, sys
import huggingface_hub
from sigphi.train import data_push
from sigphi.train.errors import UserError

class Log(logging.Handler):
    def emit(self, record):
        sys.stderr.write(record.getMessage())

logging.getLogger("huggingface_hub").addHandler(Log())
results, rows_a_file = {}, data_push._ROWS_A_FILE
os.chdir(os.environ["FOLDER"])
for name, (words, options) in json.loads(os.environ["PUSHES"]).items():
    os.environ["HF_TOKEN"] = options.get("token", os.environ["TOKEN"]) or ""
    data_push._ROWS_A_FILE = options.get("rows_a_file", rows_a_file)
    huggingface_hub.constants.ENDPOINT = options.get("endpoint", os.environ["HF_ENDPOINT"])
    out, err, error = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data_push.main(words.split())
        except UserError as caught:
            error = str(caught)
    results[name] = {"out": out.getvalue(), "err": err.getvalue(), "error": error}
with open(os.environ["RESULTS"], "w") as file:
    json.dump(results, file)
"""
READER = """
import contextlib, hashlib, io, json, os
import datasets
from datasets import Image, load_dataset

def rows_of(part):
    rows = part.cast_column("image", Image(decode=False)).to_list() if "image" in part.features else part.to_list()
    for row in rows:
        if "image" in row:
            row["image"] = hashlib.sha256(row["image"]["bytes"]).hexdigest()
    return rows

results = {}
for name, repo, revision, token in json.loads(os.environ["SETS"]):
    os.environ["HF_TOKEN"] = token
    try:
        loaded = load_dataset(repo, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        results[name] = type(error).__name__
    else:
        results[name] = {key: [repr(part.features), rows_of(part)] for key, part in loaded.items()}
os.environ["HF_TOKEN"] = ""
for name, code in json.loads(os.environ["CODE"]).items():
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    picture = names["picture"]["img"] if "picture" in names else names["row"]["image"]
    pixels = hashlib.sha256(picture.tobytes()).hexdigest()
    results[name] = [out.getvalue(), names["row"]["dataset_index"], pixels]
with open(os.environ["RESULTS"], "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`, `qa.csv` about two splits of them, with odd characters and a row without type, and `faulty.csv`."""
    path = tmp_path_factory.mktemp("csv")
    (path / "pictures").mkdir()
    for split in ("train", "test"):
        load_images(DRAWN, split).to_parquet(path / "pictures" / f"{split}-00000-of-00001.parquet")
    build_csv(path / "qa.csv", DRAWN, "train", num_images=NUM_IMAGES)
    with (path / "qa.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    extra = dict.fromkeys(names, "")
    rows.insert(0, extra | {"Dataset_Index": "3", "Split": "test", "Q1": 'Why?\n"So", says он', "A1": " `|<b> "})
    rows.append(extra | {"Dataset_Index": "5", "Split": "train", "Q1": "Plain?", "A1": "NA", "T1": "object|`<i>"})
    for name, content in (("qa.csv", rows), ("faulty.csv", [*rows, rows[-1]])):
        with (path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(content)
    return path


@pytest.fixture(scope="module")
def hub(folder):
    with HubStub() as stub:
        stub.tokens[TOKEN] = "write"
        pictures = {f"plain_text/{path.name}": path.read_bytes() for path in (folder / "pictures").iterdir()}
        stub.add("uoft-cs/cifar10", pictures, "datasets")
        stub.add("other/theirs", {"README.md": b"# Theirs", "data/old.csv": b"a,b\n1,2\n"}, "datasets")
        stub.cut("PUT .*/lfs/")
        stub.cut("POST .*/tester/cut-request/commit/")
        stub.cut("POST .*/tester/cut-answer/commit/", "answer")
        yield stub


@pytest.fixture(scope="module")
def pushed(hub, folder, run_child, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What every push has printed and raised."""
    home = tmp_path_factory.mktemp("pusher")
    environment = hub.environment(home) | {"TOKEN": TOKEN, "FOLDER": folder, "RESULTS": home / "results.json"}
    run_child(PUSHER, **environment, PUSHES=json.dumps(PUSHES))
    return json.loads((home / "results.json").read_text())


@pytest.fixture(scope="module")
def read(hub, pushed, run_stranger, tmp_path_factory) -> dict[str, Any]:
    """What somebody without this package loads, and what the code of the cards prints."""
    sets = [
        ("plain", "tester/plain", None, ""),
        ("drawn", "tester/drawn", None, ""),
        ("branch", "tester/plain", "in/half", ""),
        ("request", "other/theirs", "refs/pr/1", ""),
        ("shrunk", "tester/shrunk", None, ""),
        # In this order: what has been loaded once comes from the cache where the Hub refuses.
        ("secret without token", "tester/secret", None, ""),
        ("secret", "tester/secret", None, "hf_read"),
        ("cut request", "tester/cut-request", None, ""),
    ]
    code = {f"code of {name}": "\n".join(code_blocks(card(hub, f"tester/{name}"))) for name in ("plain", "drawn")}
    home = tmp_path_factory.mktemp("reader")
    environment = hub.environment(home) | {"SETS": json.dumps(sets), "CODE": json.dumps(code)}
    run_stranger(READER, **environment, RESULTS=home / "results.json")
    return json.loads((home / "results.json").read_text())


def card(hub: HubStub, repo: str, revision: str = "main") -> str:
    return hub.files(repo, revision, "datasets")["README.md"].decode()


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@functools.cache
def load(path: Path, eval_fraction: float = 0.1) -> datasets.DatasetDict:
    """The rows of a CSV about the drawn pictures."""
    return load_cifar10_qa(path, DRAWN, eval_fraction=eval_fraction)


def expected(path: Path, with_image: bool, eval_fraction: float = 0.1) -> dict[str, list[Any]]:
    """Features and rows as the reader gives them, but from the CSV."""
    result = {}
    for name, part in zip(("train", "validation"), load(path, eval_fraction).values(), strict=True):
        rows = part.cast_column("image", datasets.Image(decode=False)).to_list()
        for row in rows:
            picture = row.pop("image")
            if with_image:
                row["image"] = hashlib.sha256(picture["bytes"]).hexdigest()
        result[name] = [repr(QA_FEATURES if with_image else WITHOUT_IMAGE), rows]
    return result


# What is read back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "with_image", "eval_fraction"),
    [
        ("plain", False, 0.1),
        ("drawn", True, 0.1),
        ("branch", False, 0.5),
        ("request", False, 0.1),
        ("shrunk", False, 0.1),
        ("secret", False, 0.1),
        ("cut request", False, 0.1),
    ],
)
def test_a_stranger_loads_the_rows_of_the_csv(folder, read, name, with_image, eval_fraction):
    wanted = expected(folder / "qa.csv", with_image, eval_fraction)
    assert list(read[name]) == list(wanted)
    for split, (features, rows) in wanted.items():
        assert read[name][split] == [features, rows]
    assert sum(len(rows) for _, rows in wanted.values()) == NUM_IMAGES * 5 + 2


def test_the_cards_code_finds_the_pictures(read, folder):
    first = load(folder / "qa.csv")["train"][0]
    pixels = hashlib.sha256(first["image"].tobytes()).hexdigest()
    for name in ("plain", "drawn"):
        printed, index, found = read[f"code of {name}"]
        assert printed == f"{first['question']} {first['answer']}\n"
        assert (index, found) == (first["dataset_index"], pixels)


def test_a_private_set_needs_a_token(hub, read):
    assert hub.repos["datasets", "tester/secret"].private
    assert read["secret without token"] == "DatasetNotFoundError"


def test_nothing_was_asked_of_the_hub_that_it_does_not_serve(hub, read):
    assert not [entry for entry in hub.log if entry[2] == 501]


# What is printed and committed ---------------------------------------------------------------------------------------


def commits(hub: HubStub, repo: str) -> list[str]:
    return [commit.title for commit in hub.repos["datasets", repo].commits.values()]


def test_the_address_and_the_line_that_loads_it_are_printed(hub, pushed):
    url = f"{hub.url}/datasets"
    assert pushed["plain"]["out"] == f'{url}/tester/plain\nload_dataset("tester/plain")\n'
    branch = f'{url}/tester/plain/tree/in%2Fhalf\nload_dataset("tester/plain", revision="in/half")\n'
    assert pushed["branch"]["out"] == branch
    request = f'{url}/other/theirs/discussions/1\nload_dataset("other/theirs", revision="refs/pr/1")\n'
    assert pushed["request"]["out"] == request


def test_card_and_data_are_one_commit_and_none_where_nothing_is_new(hub, pushed):
    assert pushed["plain again"]["error"] is None
    # The second is the one on the branch `in/half`.
    assert commits(hub, "tester/plain") == ["initial commit"] + 2 * ["Questions and answers with their card"]
    assert set(hub.files("tester/plain", kind="datasets")) == {
        "README.md",
        "data/train-00000-of-00001.parquet",
        "data/validation-00000-of-00001.parquet",
    }


def test_a_pull_request_leaves_main_alone(hub, pushed):
    assert hub.files("other/theirs", kind="datasets") == {"README.md": b"# Theirs", "data/old.csv": b"a,b\n1,2\n"}
    proposed = hub.files("other/theirs", "refs/pr/1", "datasets")
    assert "data/old.csv" not in proposed and "data/train-00000-of-00001.parquet" in proposed
    assert commits(hub, "other/theirs")[2:] == ["Ours", "Questions and answers with their card"]
    assert "refs/pr/2" in pushed["request again"]["out"]


def test_files_of_an_earlier_push_are_gone(hub, pushed):
    history = [set(commit.files) for commit in hub.repos["datasets", "tester/shrunk"].commits.values()]
    assert len([name for name in history[1] if name.startswith("data/train-")]) == 7
    assert history[2] == set(hub.files("tester/plain", kind="datasets"))


def test_a_broken_connection_leaves_nothing_half_and_a_second_try_completes(hub, pushed):
    # The first upload of all was broken too, and huggingface_hub has tried that once more by itself.
    assert hub.cuts == [] and any("/lfs/" in path and not status for _, path, status in hub.log)
    for name in ("cut request", "cut answer"):
        assert pushed[name]["error"].startswith(f"--repo-id tester/{name.replace(' ', '-')}: no connection to the Hub")
        assert "Nothing is half there: run the command again." in pushed[name]["error"]
        assert pushed[f"{name}, again"]["error"] is None
        assert len(commits(hub, f"tester/{name.replace(' ', '-')}")) == 2


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no token", "there is no token of the Hub, or a garbled one: log in by `hf auth login`"),
        ("garbled token", "there is no token of the Hub, or a garbled one: log in by `hf auth login`"),
        ("refused token", "--repo-id tester/none: the Hub answers 401; the token is not accepted: log in by"),
        ("reading token", "answers 403 (You don't have the rights to write to tester/none); the token may not write"),
        ("other owner", "--repo-id other/none: the Hub answers 403 (You don't have the rights to write"),
        ("unknown license", 'the Hub refuses the card: Invalid metadata in README.md. - "license" must be one of'),
        ("too late", "--repo-id tester/plain is there already, and public; make it private in its settings first"),
        ("no network", "--repo-id tester/none: no connection to the Hub, or it broke (ConnectError)."),
        ("faulty", "faulty.csv: line 44 (Q1) and line 45 (Q1) ask the same of train image 5: 'Plain?'; remove one."),
    ],
)
def test_a_refusal_names_the_remedy_and_nothing_is_there(hub, pushed, name, message):
    assert message in pushed[name]["error"] and pushed[name]["out"] == ""
    assert not {("datasets", "tester/none"), ("datasets", "other/none")} & hub.repos.keys()
    assert "late" not in hub.repos["datasets", "tester/plain"].branches


def test_no_token_is_told(hub, pushed):
    told = json.dumps(pushed, ensure_ascii=False) + "".join(blob.decode("latin-1") for blob in hub.blobs.values())
    for token in (TOKEN, "hf_refused", "hf_read", "hf_g\u00e4rbled"):
        assert token not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--repo-id"),
        ("--repo-id tester/a/b", "--repo-id 'tester/a/b': Repo id must be in the form"),
        ("--repo-id tester/a..b", "--repo-id 'tester/a..b': Cannot have -- or .. in repo_id"),
        ("--repo-id plain", "--repo-id plain: write it with its owner, such as alice/plain."),
        ("--repo-id a/b --create-pr --revision x", "--create-pr opens a pull request against main"),
        ("--repo-id a/b --license MIT!", "--license 'MIT!' is no license of the Hub"),
        ("--repo-id a/b --images synthetic:9", "--images synthetic:9: nobody can look up pictures drawn in code"),
        ("--repo-id a/b --on-faulty-answers no", "--on-faulty-answers must be one of error, skip"),
        ("--repo-id a/b --image-split val", "--image-split must be one of train, test"),
        ("--repo-id a/b --eval-fraction 2", "--eval-fraction must be between 0 and 1, got 2.0"),
        ("--repo-id a/b --commit-message=", "--commit-message is empty"),
        ("--repo-id a/b --reop-id c", "there is no option `--reop-id`. Did you mean `--repo-id`?"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["push", "qa.csv", *words.split()])


def test_offline_is_said(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so nothing can be published; unset it."):
        main(["push", "qa.csv", "--repo-id", "a/b"])


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(404, "check --repo-id and --revision"), (409, "again"), (412, "again"), (429, "later"), (503, "later")],
)
def test_every_status_has_a_remedy(status, remedy):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    with pytest.raises(UserError, match=rf"--repo-id a/b: the Hub answers {status} \(Because\); .*{remedy}\."):
        with hub_errors("a/b"):
            raise HfHubHTTPError("https://signed.example", response=response, server_message="Because.\nMore")


# What is written -----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(folder, tmp_path, monkeypatch):
    """`written(**options)`: the folder that would be published, of the rows of `qa.csv` or of `dataset`."""

    def write(dataset: datasets.DatasetDict | None = None, source: Path = folder / "qa.csv", **options: Any) -> Path:
        arguments = DataPushArguments(**{"repo_id": "a/b", "images": DRAWN, "with_images": True} | options)
        dataset = dataset or load(folder / "qa.csv", arguments.eval_fraction)
        (tmp_path / "set").mkdir()
        write_qa_repo(tmp_path / "set", dataset, source, arguments)
        return tmp_path / "set"

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write


def test_many_files_keep_the_order(written, folder, monkeypatch):
    monkeypatch.setattr(data_push, "_ROWS_A_FILE", 30)
    place = written()
    assert len(list((place / "data").glob("train-*-of-00007.parquet"))) == 7
    loaded, wanted = datasets.load_dataset(str(place)), load(folder / "qa.csv")
    for name, of in (("train", "train"), ("validation", "eval")):
        assert loaded[name].features == wanted[of].features
        assert loaded[name].remove_columns("image").to_list() == wanted[of].remove_columns("image").to_list()


def test_a_file_too_few_is_noticed_when_loading(written, monkeypatch):
    monkeypatch.setattr(data_push, "_ROWS_A_FILE", 30)
    place = written()
    next((place / "data").glob("train-00003-*")).unlink()
    with pytest.raises(datasets.exceptions.NonMatchingSplitsSizesError):
        datasets.load_dataset(str(place))


def test_pictures_of_a_local_folder_travel_and_its_path_does_not(written, tmp_path, qa_of_folder):
    pictures = str(tmp_path / "pictures")
    place = written(load_cifar10_qa(qa_of_folder, pictures, eval_fraction=0), images=pictures, eval_fraction=0.0)
    stored = b"".join(path.read_bytes() for path in place.rglob("*.*"))
    assert str(tmp_path).encode() not in stored
    loaded = datasets.load_dataset(str(place))["train"]
    assert loaded[1]["image"].size == (32, 32)
    assert "a local folder in the schema of `uoft-cs/cifar10`" in (place / "README.md").read_text()


@pytest.fixture
def qa_of_folder(tmp_path):
    """A CSV about `pictures`, a folder with one folder of pictures a class."""
    images = load_images("synthetic:40", "train")
    for number, row in enumerate(images):
        place = tmp_path / "pictures" / "train" / images.features["label"].int2str(row["label"])
        place.mkdir(parents=True, exist_ok=True)
        row["img"].save(place / f"{number}.png")
    lines = ["Dataset_Index,Split," + ",".join(f"Q{n},A{n}" for n in range(1, 6))]
    lines += [f"{index},train,What?,This.{',' * 8}" for index in (4, 7, 1)]
    (tmp_path / "qa.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "qa.csv"


def test_types_are_counted_as_a_loop_counts_them(folder):
    loaded = load(folder / "qa.csv", 0.3)
    types = question_types(loaded)
    rows = [(name, row["question_type"], row["short_answer"]) for name, part in loaded.items() for row in part]
    assert [kind.name for kind in types] == sorted({row[1] for row in rows})
    assert types[0].name == "" and types[0].num_checkable == 0 and types[0].share == 0
    for kind in types:
        short = [answer for _, name, answer in rows if name == kind.name and answer]
        assert kind.rows == {part: sum(row[:2] == (part, kind.name) for row in rows) for part in loaded}
        assert kind.num_checkable == len(short)
        if short:
            assert kind.share == max(short.count(answer) for answer in short) / len(short)
            assert Counter(short)[kind.commonest] / len(short) == kind.share


def test_the_card_tells_what_was_split_how(written, folder):
    text = (written(eval_fraction=0.3, split_seed=0) / "README.md").read_text(encoding="utf-8")
    loaded = load(folder / "qa.csv", 0.3)
    for name, of in (("train", "train"), ("validation", "eval")):
        facts = data_facts(loaded[of])
        images = ", ".join(f"{count} of `{split}`" for split, count in facts["images_per_split"].items())
        assert f"| `{name}` | {images} | {facts['num_rows']} | `{facts['fingerprint']}` |" in text
    assert "`--eval-fraction 0.3 --split-seed 0`" in text
    assert f"{NUM_IMAGES * 5 + 2} questions with their answers about {NUM_IMAGES + 1} images of `{DRAWN}`" in text
    assert "| `object/'<i>` | " in text and "<i>" not in re.sub(r"`[^`\n]*`", "", text)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("HuggingFaceTB/SmolVLM2", "`HuggingFaceTB/SmolVLM2, revision v1`"),
        ("/home/me/vlm", "a model in a local folder"),
    ],
)
def test_what_an_annotator_has_recorded_is_told(written, tmp_path, model, told):
    judged = {"object": {"answers": 30, "agreement": 0.9}, "habitat": {"answers": 10, "agreement": 0.5}}
    record = {"settings": {"--model": model, "--revision": "v1"}, "agreement": judged}
    (tmp_path / "qa.csv.agreement.json").write_text(json.dumps(record))
    text = (written(source=tmp_path / "qa.csv") / "README.md").read_text(encoding="utf-8")
    assert f"They were written by {told} (`sigphi data annotate`), and can be wrong." in text
    assert "Of 40 that could be judged," in text and " 80.0% are right." in text
    assert "/home/me" not in text and "does not record" not in text
