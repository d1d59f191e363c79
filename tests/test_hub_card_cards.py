"""Model cards: what is recorded is told, what is not is said to be unknown."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from sigphi import SiglipResNetConfig, SigPhiConfig
from sigphi.hub_card.cards import TEMPLATES, check_records, write_card
from sigphi.hub_card.errors import UserError

ENCODER = {"model_type": "siglip_resnet", "projection_dim": 48, "vision_config": {"image_size": 40}}
VLM = {"model_type": "sigphi", "num_image_tokens": 16, "vision_config": {"image_size": 40}}


def card(folder: Path, config: dict[str, Any], model_id: str | None = None, **files: Any) -> str:
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    write_card(folder, model_id)
    return (folder / "README.md").read_text(encoding="utf-8")


def header(text: str) -> dict[str, Any]:
    empty, front_matter, body = text.split("---\n", 2)
    assert empty == "" and body.lstrip().startswith("# ")
    return yaml.safe_load(front_matter)


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    ("config", "task", "auto_class"),
    [
        (ENCODER, "zero-shot-image-classification", "AutoModel"),
        (VLM, "image-text-to-text", "AutoModelForImageTextToText"),
    ],
)
def test_header_and_loading_code(tmp_path, config, task, auto_class):
    text = card(tmp_path, config, model_id="somebody/some-model")
    front = header(text)
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", task)
    assert "sigphi" in front["tags"]
    code = "".join(code_blocks(text))
    ast.parse(code)
    assert f'model = {auto_class}.from_pretrained("somebody/some-model", trust_remote_code=True)' in code
    assert 'AutoProcessor.from_pretrained("somebody/some-model", trust_remote_code=True)' in code


@pytest.mark.parametrize("config", [ENCODER, VLM])
def test_unknown_facts_are_said_to_be_unknown(tmp_path, config):
    text = card(tmp_path, config)
    assert "Not evaluated yet: `sigphi evaluate` writes the figures." in text
    assert "What it was trained on is not recorded." in text
    assert "$" not in text


@pytest.mark.parametrize("config", [ENCODER, VLM])
def test_recorded_facts_are_told(tmp_path, config):
    results = {"zero_shot_top1": 0.98765, "answer_count": 12, "metadata": {"rows": 3}}
    data = {"num_images": 4321, "images": "uoft-cs/cifar10", "eval_fraction": 0.1, "images_per_split": {"train": 4321}}
    text = card(tmp_path, config, eval_results=results, training_data=data)
    assert "| `zero_shot_top1` | 0.9877 |" in text
    assert "| num images | 4321 |" in text and "| images | `uoft-cs/cifar10` |" in text
    assert "metadata" not in text and "images per split" not in text
    assert "Not evaluated yet" not in text and "not recorded" not in text
    assert "40 x 40 pixels" in text


def test_an_encoder_of_another_set_says_so(tmp_path):
    data = {"num_images": 8, "dataset": "somebody/captions", "dataset_config": None, "images_per_split": {}}
    results = {"image_to_text_r1": 0.5, "metadata": {"images": 3, "dataset": "somebody/captions"}}
    text = card(tmp_path, ENCODER, eval_results=results, training_data=data)
    assert "Trained on the images and texts of `somebody/captions` alone, at 40 x 40 pixels." in text
    assert "Over 3 images of `somebody/captions`" in text
    assert "airplane" not in text and "None" not in text
    assert "Trained on pictures of ten classes (airplane" in card(tmp_path, ENCODER, training_data={"num_images": 8})


NASTY = 'x: "y\n---\n<script>alert(1)</script> | `z` [a](javascript:b) $HOME'


@pytest.mark.parametrize("config", [ENCODER | {"include_text_tower": False}, VLM | {"base_bits": 4}])
def test_text_of_others_breaks_neither_yaml_nor_markdown(tmp_path, config):
    config = config | {"text_model_name_or_path": NASTY, "base_language_model": NASTY}
    data = dict.fromkeys(("images", "dataset", "siglip_checkpoint", "language_model", "fingerprint"), NASTY)
    results = {"zero_shot_top1": 0.5, f"accuracy/{NASTY}": 0.25}
    results["metadata"] = {"images": 3, "dataset": NASTY, "probe": NASTY, "image_splits": [NASTY]}
    scores = {"precision": 0.5, "recall": None, "f1": None, "support": 3}
    files = {"eval_results": results, "training_data": data, "training_args": {"optim": NASTY, "seed": 3}}
    figures = ("questions", "identical_answers", "logit_positions", "next_token_agreement", "mean_kl")
    files["parity"] = dict.fromkeys((*figures, "max_abs_logit_difference"), 1) | {"base": "original"}
    files["parity"] |= {"compared_with": {"form": "merged"}, "metadata": {"questions_from": NASTY}}
    text = card(tmp_path, config, model_id=NASTY, confusion_matrix={"per_class": {NASTY: scores}}, **files)
    front = header(text)
    assert front.keys() >= {"library_name", "pipeline_tag", "license", "model-index"}
    assert "base_model" not in front and "datasets" not in front
    body = text.split("---\n", 2)[2]
    for block in re.findall(r"```python\n(.*?)\n```", body, re.DOTALL):
        ast.parse(block)
    outside = re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", body, flags=re.DOTALL))
    assert "<script" not in outside and "javascript:" not in outside and "`" not in outside
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(re.sub(r"`[^`]*`", "", row).count("|") in (3, 6) for row in rows)


def test_the_index_has_the_figures_that_the_hub_can_compare(tmp_path):
    results = {"class_accuracy": 0.75, "answer_accuracy_shuffled_image": 0.3, "accuracy/object": 0.7, "eval_loss": 1.5}
    results |= {"majority/class": 0.1, "answer_count": 12, "image_gain": 0.4}
    metadata = {"image_source": "uoft-cs/cifar10", "image_splits": ["test"]}
    text = card(tmp_path, VLM, model_id="a/vlm", eval_results=results | {"metadata": metadata})
    data = ModelCard(text).data
    assert data.model_name == "vlm"
    assert {one.metric_name: (one.metric_type, one.metric_value) for one in data.eval_results} == {
        "eval_loss": ("loss", 1.5),
        "class_accuracy": ("accuracy", 0.75),
        "image_gain": ("image_gain", 0.4),
    }
    drawn = results | {"metadata": {"image_source": "synthetic:200"}}
    assert {one.dataset_type for one in ModelCard(card(tmp_path, VLM, eval_results=drawn)).data.eval_results} == {
        "synthetic"
    }
    here = results | {"metadata": {"image_source": str(tmp_path)}}
    text = card(tmp_path, VLM, eval_results=here)
    assert ModelCard(text).data.eval_results[0].dataset_name == "a local folder" and str(tmp_path) not in text


def test_sources_sets_and_emissions_are_in_the_header(tmp_path):
    (tmp_path / "emissions.csv").write_text("timestamp,emissions\n1,0.5\n2,0.0125\n")
    data = {"images": "uoft-cs/cifar10", "siglip_checkpoint": "a/eye", "encoder": {"dataset": "b/captions"}}
    data |= {"siglip_checkpoint_revision": "c" * 40}
    text = card(tmp_path, VLM | {"base_language_model": "microsoft/phi-2"}, training_data=data)
    front = header(text)
    assert front["base_model"] == ["microsoft/phi-2", "a/eye"] and front["base_model_relation"] == "adapter"
    assert front["datasets"] == ["uoft-cs/cifar10", "b/captions"]
    assert front["co2_eq_emissions"]["emissions"] == 12.5
    assert f"| `a/eye` | `{'c' * 40}` |" in text and "| `microsoft/phi-2` | not recorded |" in text
    assert "pip install torch torchvision transformers pillow peft`" in text


def test_the_name_is_the_folder_s_by_default(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert 'from_pretrained("my-model", trust_remote_code=True)' in card(folder, VLM)


def test_sizes_come_from_the_config(tmp_path):
    assert "same\n48 dimensions" in card(tmp_path, ENCODER)
    assert "16 soft token(s)" in card(tmp_path, VLM)


def test_an_encoder_without_text_tower_names_it(tmp_path):
    without = ENCODER | {"include_text_tower": False, "text_model_name_or_path": "microsoft/phi-2"}
    text = card(tmp_path, without)
    assert "`microsoft/phi-2` is not inside" in text and "load_text_tower()" in text
    assert "The text tower is inside" in card(tmp_path, ENCODER)


@pytest.mark.parametrize(("bits", "needs"), [(4, "`peft` and `bitsandbytes`"), (16, "Loading needs `peft`.")])
def test_the_adapter_form_names_its_base_and_what_it_needs(tmp_path, bits, needs):
    text = card(tmp_path, VLM | {"base_language_model": "microsoft/phi-2", "base_bits": bits})
    assert "the language model `microsoft/phi-2` is read from its own place" in text
    assert f"in {bits} bits" in text and needs in text
    assert "All weights are inside." in card(tmp_path, VLM)


def test_a_new_card_replaces_the_old_one(tmp_path):
    card(tmp_path, VLM)
    assert "| `eval_loss` | 1.5000 |" in card(tmp_path, VLM, eval_results={"eval_loss": 1.5})


@pytest.mark.parametrize("config_class", [SiglipResNetConfig, SigPhiConfig])
def test_a_saved_config_has_a_card(tmp_path, config_class):
    assert (TEMPLATES / f"{config_class.model_type}.md").is_file()
    config_class().save_pretrained(tmp_path)
    write_card(tmp_path)
    assert header((tmp_path / "README.md").read_text(encoding="utf-8"))["library_name"] == "transformers"


@pytest.mark.parametrize("name", ["eval_results", "training_data", "parity", "confusion_matrix", "training_args"])
def test_a_record_that_was_cut_off_is_named_and_the_card_stays(tmp_path, name):
    before = card(tmp_path, VLM)
    (tmp_path / f"{name}.json").write_text("")
    for render in (write_card, check_records):
        with pytest.raises(UserError, match=f"{tmp_path / name}.json is not the JSON that it should be"):
            render(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == before
