"""What a user does wrong ends with code 2 and one or two lines, before any model loads."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import TOY_IMAGES
from PIL import Image
from transformers import PreTrainedModel

from sigphi import cli
from sigphi.modeling.modeling_sigphi import SigPhiPreTrainedModel
from sigphi.train.checkpoints import read_config
from sigphi.train.errors import UserError

HEADER = ["Dataset_Index", "Split", *(f"{letter}{pair}" for pair in range(1, 6) for letter in "QA")]
ROW = ["0", "train", "What is it?", "A cat.", *[""] * 8]


@pytest.fixture(scope="module")
def folders(shared: Any, make_vlm: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The names that the tables below use: files, and folders of every kind of model."""
    from sigphi import SiglipResNetProcessor, SigPhiProcessor

    place = tmp_path_factory.mktemp("user_errors")
    shared["encoder"].save_pretrained(place / "encoder")
    SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(place / "encoder")
    make_vlm().save_pretrained(place / "vlm")
    SigPhiProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(place / "vlm")
    shutil.copytree(place / "vlm", place / "mismatch")
    edit(place / "mismatch" / "processor_config.json", num_image_tokens=4)
    shutil.copytree(place / "encoder", place / "broken")
    edit(place / "broken" / "config.json", text_pooling="max")
    Image.new("RGB", (4, 4)).save(place / "cat.png")
    pictures = datasets.Dataset.from_dict({"picture": [Image.new("RGB", (4, 4))], "text": ["What is it?"]})
    pictures.cast_column("picture", datasets.Image()).save_to_disk(place / "set")
    for name, header, rows in csv_files():
        with (place / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows] if header else [])
    names = ("encoder", "vlm", "mismatch", "broken", "cat.png", "set", "none", *(name for name, _, _ in csv_files()))
    return {name: str(place / name) for name in names} | {"base": str(base_folder), "out": str(place / "out")}


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def csv_files() -> list[tuple[str, list[str], list[list[str]]]]:
    return [
        ("good.csv", HEADER, [ROW]),
        ("column.csv", [name for name in HEADER if name != "A3"], [ROW[:-1]]),
        ("index.csv", HEADER, [ROW, ["60000", *ROW[1:]]]),
        ("text.csv", HEADER, [ROW, ["seven", *ROW[1:]]]),
        ("split.csv", [name for name in HEADER if name != "Split"], [[ROW[0], *ROW[2:]]]),
        ("error.csv", HEADER, [ROW, ["1", "train", "What is it?", "ERROR: timeout", *[""] * 8]]),
        ("empty.csv", [], []),
        ("header.csv", HEADER, []),
    ]


@pytest.fixture(autouse=True)
def no_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cls: type, name: Any, *args: Any, **kwargs: Any) -> None:
        pytest.fail(f"{cls.__name__} {name} was loaded before the mistake was found")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(refuse))
    monkeypatch.setattr(SigPhiPreTrainedModel, "from_pretrained", classmethod(refuse))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


TRAIN_ENCODER = "train-siglip --text-model {base} --output-dir {out} --report-to none"
TRAIN_VLM = "train-vlm --siglip-checkpoint {encoder} --language-model {base} --output-dir {out} --report-to none"
DATA = f"--images {TOY_IMAGES} --eval-fraction 0 --eval-strategy no"

# What is typed, and what the message has to hold: the value, the place and the remedy.
MISTAKES = {
    "unknown flag": (f"{TRAIN_ENCODER} --input-csv {{good.csv}} --bath-size 3", ["--bath-size", "--batch-size"]),
    "unknown flag of ask": ("ask {vlm} {cat.png} --questoin a", ["--questoin", "--question"]),
    "no csv": (TRAIN_ENCODER, ["--input-csv is needed"]),
    "no checkpoint": ("train-vlm --input-csv {good.csv} --output-dir {out}", ["--siglip-checkpoint is needed"]),
    "no model": ("evaluate --input-csv {good.csv}", ["model"]),
    "no such picture": ("ask {vlm} {none} -q a", ["{none}", "no such file", "test:12"]),
    "no picture": ("describe {vlm} {good.csv}", ["{good.csv}", "no picture"]),
    "no such row": (f"ask {{vlm}} train:200 -q a --images {TOY_IMAGES}", ["train:200", "0 to 199"]),
    "encoder to ask": ("ask {encoder} {cat.png} -q a", ["MODEL {encoder}", "'siglip_resnet'", "sigphi train-vlm"]),
    "encoder to describe": ("describe {encoder} {cat.png}", ["MODEL {encoder}", "sigphi train-vlm"]),
    "plain language model to ask": ("ask {base} {cat.png} -q a", ["MODEL {base}", "'phi'", "sigphi train-vlm"]),
    "plain language model to evaluate": (
        f"evaluate {{base}} --input-csv {{good.csv}} {DATA.split(' --eval')[0]}",
        ["MODEL {base}", "'phi'", "sigphi train-siglip", "sigphi train-vlm"],
    ),
    "no such model": ("ask {none} {cat.png} -q a", ["MODEL {none}", "config.json"]),
    "broken model": ("ask {broken} {cat.png} -q a", ["MODEL {broken}", "text_pooling", "'max'", "Give a model"]),
    "other token count": (
        "ask {mismatch} {cat.png} -q a",
        ["{mismatch}", "4 image tokens", "expects 1", "num_image_tokens in processor_config.json"],
    ),
    "other token count to evaluate": (
        f"evaluate {{mismatch}} --input-csv {{good.csv}} --images {TOY_IMAGES}",
        ["{mismatch}", "4 image tokens", "expects 1", "num_image_tokens in processor_config.json"],
    ),
}
CSV = f"--csv {{good.csv}} --images {TOY_IMAGES} --output {{out}}"
MISTAKES |= {
    "nothing to ask about": ("ask {vlm} -q a", ["give one of IMAGE, --csv and --dataset."]),
    "nothing to describe": ("describe {vlm}", ["give one of IMAGE, --csv and --dataset."]),
    "too much to ask about": (f"ask {{vlm}} {{cat.png}} {CSV}", ["not IMAGE and --csv"]),
    "two sets to describe": (f"describe {{vlm}} {CSV} --dataset {{none}}", ["not --csv and --dataset"]),
    "nowhere to write to": ("ask {vlm} --csv {good.csv}", ["--csv needs --output FILE.csv"]),
    "nothing to write": ("describe {vlm} {cat.png} --output {out}", ["--output {out}", "leave it out"]),
    "no folder to write to": ("ask {vlm} --csv {good.csv} --output {none}/a.csv", ["no folder {none}", "create it"]),
    "a question beside a csv": (f"ask {{vlm}} {CSV} -q a", ["--question", "--csv"]),
    "two sets of images": ("describe {vlm} --dataset {none} --images {none} --output {out}", ["--images has no use"]),
    "a set without a question": ("ask {vlm} --dataset {none} --output {out}", ["--question or --question-column"]),
    "two kinds of questions": (
        "ask {vlm} --dataset {none} -q a --question-column b --output {out}",
        ["either --question or --question-column"],
    ),
    "a column without a set": (f"ask {{vlm}} {CSV} --question-column a", ["--question-column", "--dataset"]),
    "a split without a csv": ("ask {vlm} {cat.png} -q a --image-split test", ["--image-split", "--csv"]),
    "a column of images without a set": ("describe {vlm} {cat.png} --image-column a", ["--image-column", "--dataset"]),
    "batches of one image": ("ask {vlm} {cat.png} -q a --batch-size 2", ["--batch-size has no use"]),
    "compiling for one answer": ("ask {vlm} {cat.png} -q a --torch-compile", ["--torch-compile", "--output"]),
    "confidence to show in a file": (f"ask {{vlm}} {CSV} --show-confidence", ["--show-confidence", "--output"]),
    "no share": ("ask {vlm} {cat.png} -q a --abstain-below 50", ["--abstain-below 50", "at most 1"]),
    "no batch": ("describe {vlm} {cat.png} --batch-size 0", ["--batch-size 0", "at least 1"]),
    "no such csv": ("ask {vlm} --csv {none} --output {out}", ["{none} cannot be read", "by --csv"]),
    "no such set": ("describe {vlm} --dataset {none} --output {out}", ["--dataset {none}"]),
    "no such column of a set": (
        "describe {vlm} --dataset {set} --image-column photo --output {out}",
        ["--dataset {set} has no column 'photo'", "--image-column", "picture"],
    ),
    "a column of no images": (
        "describe {vlm} --dataset {set} --image-column text --output {out}",
        ["column text", "has to be images"],
    ),
    "no such column of questions": (
        "ask {vlm} --dataset {set} --image-column picture --question-column asked --output {out}",
        ["no column 'asked'", "--question-column"],
    ),
    "a column of no questions": (
        "ask {vlm} --dataset {set} --image-column picture --question-column picture --output {out}",
        ["column picture", "has to be texts"],
    ),
    "a placeholder in a question": (
        "ask {vlm} --dataset {set} --image-column picture -q <image> --output {out}",
        ["'<image>'", "stands for the image"],
    ),
    "no room for an answer": (f"ask {{vlm}} {CSV} --max-new-tokens 120", ["'What is it?'", "reads 128", "shorten it"]),
    "encoder to ask about a csv": (f"ask {{encoder}} {CSV}", ["MODEL {encoder}", "'siglip_resnet'"]),
    "index too large, ask": (
        f"ask {{vlm}} --csv {{index.csv}} --images {TOY_IMAGES} --output {{out}}",
        ["{index.csv}, line 3, column Dataset_Index", "'60000'"],
    ),
    "no split, describe": (
        f"describe {{vlm}} --csv {{split.csv}} --images {TOY_IMAGES} --output {{out}}",
        ["{split.csv}", "--image-split train"],
    ),
    "an encoder to compile": (
        f"evaluate {{encoder}} --input-csv {{good.csv}} --images {TOY_IMAGES} --torch-compile",
        ["--torch-compile is for VLMs", "{encoder}"],
    ),
}
MISTAKES |= {
    "encoder to demo": ("demo {encoder}", ["MODEL {encoder}", "'siglip_resnet'", "sigphi train-vlm"]),
    "no model to demo": ("demo {none}", ["MODEL {none}", "config.json"]),
    "vlm as encoder of a demo": (
        "demo {vlm} --siglip-checkpoint {vlm}",
        ["--siglip-checkpoint {vlm}", "'sigphi'", "sigphi train-siglip"],
    ),
    "no port": ("demo {vlm} --port 65536", ["--port 65536", "0 to 65535"]),
    "somebody else's address": ("demo {vlm} --host 192.0.2.1 --port 0", ["--host 192.0.2.1", "cannot be listened on"]),
    "no images to demo": ("demo {vlm} --images {none} --port 0", ["{none}", "synthetic"]),
    "a space of an encoder": (
        "push {encoder} --repo-id a/b --space a/c",
        ["--space a/c", "{encoder} is an encoder", "Leave it out"],
    ),
    "a space without owner": ("push {vlm} --repo-id a/b --space c", ["--space c", "alice/c"]),
}
for command in (TRAIN_ENCODER, TRAIN_VLM):
    stage = command.split()[0]
    MISTAKES |= {
        f"missing column, {stage}": (f"{command} {DATA} --input-csv {{column.csv}}", ["{column.csv}", "no column A3"]),
        f"index too large, {stage}": (
            f"{command} {DATA} --input-csv {{index.csv}}",
            ["{index.csv}, line 3, column Dataset_Index", "'60000'", "0 to 199"],
        ),
        f"index of letters, {stage}": (
            f"{command} {DATA} --input-csv {{text.csv}}",
            ["{text.csv}, line 3, column Dataset_Index", "'seven'", "0 to 199"],
        ),
        f"empty file, {stage}": (f"{command} {DATA} --input-csv {{empty.csv}}", ["{empty.csv} is empty"]),
        f"header alone, {stage}": (f"{command} {DATA} --input-csv {{header.csv}}", ["{header.csv}", "one row"]),
        f"no such file, {stage}": (f"{command} {DATA} --input-csv {{none}}", ["{none}", "--input-csv"]),
        f"no split, {stage}": (
            f"{command} {DATA} --input-csv {{split.csv}}",
            ["{split.csv}", "--image-split train", "--image-split test"],
        ),
        f"faulty answer, {stage}": (
            f"{command} {DATA} --input-csv {{error.csv}}",
            ["line 3 column A1", "--on-faulty-answers skip"],
        ),
        f"nothing to evaluate on, {stage}": (
            f"{command} --images {TOY_IMAGES} --eval-fraction 0 --input-csv {{good.csv}}",
            ["--eval-fraction 0", "--eval-strategy no"],
        ),
        f"no such images, {stage}": (
            f"{command} --images {{none}} --input-csv {{good.csv}}",
            ["{none}", "synthetic"],
        ),
        f"options of no optimizer, {stage}": (
            f"{command} {DATA} --input-csv {{good.csv}} --optim-args abc",
            ["--optim-args abc", "name=value"],
        ),
        f"options of no schedule, {stage}": (
            f'{command} {DATA} --input-csv {{good.csv}} --lr-scheduler-kwargs {{"nope":1}}',
            ['--lr-scheduler-type cosine --lr-scheduler-kwargs {"nope": 1}', "'nope'", "Give other"],
        ),
        f"no such metric, {stage}": (
            f"{command} --images {TOY_IMAGES} --input-csv {{good.csv}} --metric-for-best-model nope",
            ["--metric-for-best-model nope", "give loss, ", "Name one of them."],
        ),
        f"no metric, {stage}": (
            f"{command} --images {TOY_IMAGES} --input-csv {{good.csv}} --save-strategy best",
            ["--save-strategy best needs --metric-for-best-model", "give loss, "],
        ),
    }
for option, kind in (("vlm", "'sigphi'"), ("base", "'phi'")):
    MISTAKES |= {
        f"{option} as encoder, {start.split()[0]}": (
            f"{start} --siglip-checkpoint {{{option}}} --input-csv {{good.csv}} {DATA}",
            [f"--siglip-checkpoint {{{option}}}", kind, "sigphi train-siglip"],
        )
        for start in (TRAIN_ENCODER, TRAIN_VLM.replace("--siglip-checkpoint {encoder} ", ""))
    }
MISTAKES |= {
    "no such base": (
        TRAIN_VLM.replace("{base}", "{none}") + " --input-csv {good.csv}",
        ["--language-model {none}", "config.json"],
    ),
    "encoder as base": (
        TRAIN_VLM.replace("{base}", "{encoder}") + " --input-csv {good.csv}",
        ["--language-model {encoder}", "'siglip_resnet'", "no causal LM"],
    ),
    "no such text tower": (
        TRAIN_ENCODER.replace("{base}", "{none}") + f" --input-csv {{good.csv}} {DATA}",
        ["--text-model {none}", "config.json"],
    ),
    "tokens that are no square": (
        f"{TRAIN_VLM} --input-csv {{good.csv}} --num-image-tokens 5",
        ["--num-image-tokens", "1 or a square", "got 5"],
    ),
    "too many tokens": (
        f"{TRAIN_VLM} --input-csv {{good.csv}} --num-image-tokens 10000",
        ["--num-image-tokens", "square up to", "got 10000"],
    ),
}


def filled(text: str, folders: dict[str, str]) -> str:
    return re.sub(r"\{([\w.]+)\}", lambda found: folders[found[1]], text)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_code_2_and_what_to_do(mistake, folders, capsys):
    words, parts = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        cli.main([filled(word, folders) for word in words.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    # Other lines are progress of reading the images.
    start = error.index(f"sigphi {words.split()[0]}: error: ")
    message = error[start:]
    assert 1 <= message.count("\n") <= 2 and message.endswith("\n")
    assert "Traceback" not in error
    for part in parts:
        assert filled(part, folders) in message
    assert not Path(folders["out"]).exists()


def test_a_config_that_its_class_refuses_is_a_user_error(folders):
    with pytest.raises(UserError, match=r"MODEL .*broken: cannot be read .*text_pooling"):
        read_config(folders["broken"], "MODEL")


def test_an_unreachable_hub_id_is_a_user_error():
    with pytest.raises(UserError, match="--language-model nobody/nothing: cannot be read .*reachable Hub id"):
        read_config("nobody/nothing", "--language-model")
