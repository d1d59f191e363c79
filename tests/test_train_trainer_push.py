"""Trainings that push: what `--push-to-hub` leaves on the Hub is what `sigphi push` would, and no pickle."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TOY_IMAGES
from hub_stub import HubStub
from huggingface_hub import ModelCard

from sigphi.train import siglip, vlm
from sigphi.train.errors import UserError

TOKEN = "hf_" + "writerOfTrainings" * 2
TRAIN = """
import json, logging, os, sys
from transformers.utils import logging as of_transformers
from sigphi.train import siglip, vlm

# Everything that is logged, of whatever library, and standard error.
sys.stderr = open(os.environ["LOG"], "w")
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
of_transformers.enable_propagation()
words = json.loads(os.environ["WORDS"])
{"siglip": siglip, "vlm": vlm}[os.environ["STAGE"]].main(words)
"""
STRANGER = """
import json, os
from PIL import Image

Image.new("RGB", (32, 32), "red").save("image.png")
for code in json.loads(os.environ["CODE"]):
    exec(code, {})
"""
TINY = ["--hidden-sizes", "8", "16", "--depths", "1", "1", "--layer-type", "basic", "--embedding-size", "8"]
COMMON = ["--images", TOY_IMAGES, "--num-epochs", "1", "--report-to", "none", "--bf16", "false"]


@pytest.fixture(scope="module")
def trained(toy_csv, toy_base, run_child, tmp_path_factory):
    """The stand-in Hub after both stages have been trained and pushed, and the folder of the runs."""
    root = tmp_path_factory.mktemp("runs")
    with HubStub() as stub:
        stub.tokens[TOKEN] = "write"
        stub.add("tester/base", {path.name: path.read_bytes() for path in toy_base.iterdir() if path.is_file()})
        stub.cut("POST .*/tester/eye/commit/")  # the push of a checkpoint, which must not end the training
        given = stub.environment(root / "home") | {"HF_TOKEN": TOKEN}
        common = ["--input-csv", str(toy_csv), *COMMON, "--push-to-hub", "--hub-model-id"]
        words = [*common, "tester/eye", "--text-model", "tester/base", "--batch-size", "32", *TINY]
        words += ["--output-dir", str(root / "eye"), "--text-cache-dir", str(root / "cache")]
        given["LOG"] = root / "siglip.log"
        out = {"siglip": run_child(TRAIN, **given, STAGE="siglip", WORDS=json.dumps(words))}
        words = [*common, "tester/vlm", "--language-model", "tester/base", "--siglip-checkpoint", "tester/eye"]
        words += ["--output-dir", str(root / "vlm"), "--bits", "16", "--batch-size", "64", "--hub-strategy", "end"]
        words += ["--gradient-checkpointing", "false", "--lora-r", "4", "--image-cache-dir", str(root / "cache")]
        given["LOG"] = root / "vlm.log"
        out["vlm"] = run_child(TRAIN, **given, STAGE="vlm", WORDS=json.dumps(words))
        yield stub, root, out


def test_what_is_there_is_the_folder_with_its_figures(trained):
    stub, root, out = trained
    for name, loader in (("eye", "AutoModel"), ("vlm", "AutoModelForImageTextToText")):
        files = stub.files(f"tester/{name}")
        assert {"eval_results.json", "training_data.json", "training_args.json", "file_hashes.json"} <= files.keys()
        assert not [file for file in files if file.endswith((".bin", ".pt")) or file.startswith((".", "checkpoint"))]
        assert files["model.safetensors"] == (root / name / "model.safetensors").read_bytes()
        line = rf'{loader}.from_pretrained\("tester/{name}", trust_remote_code=True, revision="\w{{40}}"\)\n$'
        assert re.search(line, out["siglip" if name == "eye" else "vlm"])
        assert not list((root / name).glob(".push-*"))


def test_both_are_pinned_to_what_they_were_made_from(trained):
    stub, _, _ = trained
    base = stub.repos["models", "tester/base"].branches["main"]
    assert json.loads(stub.files("tester/eye")["config.json"])["text_model_revision"] == base
    assert json.loads(stub.files("tester/vlm")["config.json"])["base_language_model_revision"] == base
    data = json.loads(stub.files("tester/vlm")["training_data.json"])
    assert data["siglip_checkpoint_revision"] == stub.repos["models", "tester/eye"].branches["main"]
    # What the encoder has seen counts when the VLM is evaluated, also where it comes from the Hub.
    assert data["encoder"]["num_images"] > 0


def test_every_state_of_main_is_whole(trained):
    stub, _, _ = trained
    for name in ("eye", "vlm"):
        for commit in stub.repos["models", f"tester/{name}"].commits.values():
            assert not commit.files or {"config.json", "model.safetensors", "README.md", "hub_code.py"} <= set(
                commit.files
            )


def test_nothing_private_is_there(trained, toy_csv):
    stub, root, _ = trained
    told = b"".join(stub.blobs.values())
    for secret in (str(root), str(root.parent), f"{Path.home()}/", TOKEN, str(toy_csv)):
        assert secret.encode() not in told


def test_no_log_and_no_file_of_a_run_holds_the_token(trained):
    _, root, out = trained
    assert (root / "siglip.log").stat().st_size > 1000 and TOKEN not in out["siglip"] + out["vlm"]
    home = {path for path in (root / "home").rglob("*")}  # `huggingface_hub` keeps there what it was given by a login
    files = [path for path in root.rglob("*") if path.is_file() and path not in home]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_the_figures_of_a_card_are_those_of_the_evaluation(trained):
    stub, _, _ = trained
    for name in ("eye", "vlm"):
        files = stub.files(f"tester/{name}")
        text, results = files["README.md"].decode(), json.loads(files["eval_results.json"])
        figures = {key: value for key, value in results.items() if isinstance(value, (int, float))}
        shown = dict(re.findall(r"^\| `([^`]+)` \| (-?\d[\d.]*) \|$", text, re.MULTILINE))
        listed = {key: value for key, value in figures.items() if not key.startswith("recall/")}
        assert len(listed) > 5
        assert shown == {key: str(v) if isinstance(v, int) else f"{v:.4f}" for key, v in listed.items()}
        index = {one.metric_name: one.metric_value for one in ModelCard(text).data.eval_results}
        assert index and index == {key: results[key] for key in index}


def test_the_cards_code_runs_for_a_stranger(trained, run_stranger, tmp_path):
    stub, _, _ = trained
    cards = [stub.files(f"tester/{name}")["README.md"].decode() for name in ("eye", "vlm")]
    code = ["\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL)) for card in cards]
    printed = run_stranger(STRANGER, **stub.environment(tmp_path), CODE=json.dumps(code))
    assert printed.startswith("torch.Size([1, 512])")


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_the_state_of_an_optimizer_is_never_pushed(toy_csv, toy_base, tmp_path, strategy):
    words = ["--input-csv", str(toy_csv), *COMMON, "--text-model", str(toy_base), "--save-text-tower", *TINY]
    words += ["--output-dir", str(tmp_path), "--push-to-hub", "--hub-strategy", strategy]
    with pytest.raises(UserError, match=f"--hub-strategy {strategy} would publish the state of the optimizer"):
        siglip.main(words)


def test_a_tower_that_nobody_has_is_noticed_before_the_training(toy_csv, toy_base, tmp_path):
    words = ["--input-csv", str(toy_csv), *COMMON, "--text-model", str(toy_base), *TINY]
    with pytest.raises(UserError, match="--push-to-hub: its text tower is the folder"):
        siglip.main([*words, "--output-dir", str(tmp_path), "--push-to-hub"])


def test_a_language_model_that_nobody_has_is_noticed_before_the_training(toy_csv, toy_base, tiny_encoder, tmp_path):
    tiny_encoder.save_pretrained(tmp_path / "eye")
    words = ["--input-csv", str(toy_csv), *COMMON, "--language-model", str(toy_base), "--push-to-hub", "--bits", "16"]
    with pytest.raises(UserError, match="--push-to-hub: its language model is the folder"):
        vlm.main([*words, "--siglip-checkpoint", str(tmp_path / "eye"), "--output-dir", str(tmp_path / "vlm")])


def test_models_in_python_are_not_pushed_with_a_path(tiny_lora_vlm, tiny_encoder, tmp_path):
    with pytest.raises(ValueError, match="`config.base_language_model` is /.*, a folder of this machine"):
        tiny_lora_vlm.push_to_hub("a/b")
    with pytest.raises(ValueError, match="`config.base_language_model` is /"):
        tiny_lora_vlm.save_pretrained(tmp_path / "vlm", push_to_hub=True, repo_id="a/b")
    tiny_encoder.config.include_text_tower, tiny_encoder.config.text_model_name_or_path = False, str(tmp_path)
    for push in (
        tiny_encoder.push_to_hub,
        lambda repo: tiny_encoder.save_pretrained(tmp_path / "x", push_to_hub=True),
    ):
        with pytest.raises(ValueError, match="`config.text_model_name_or_path` is /"):
            push("a/b")
    assert isinstance(tiny_encoder.logit_scale, torch.nn.Parameter) and not (tmp_path / "x").exists()
