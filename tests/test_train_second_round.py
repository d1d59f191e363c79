"""`--vlm-checkpoint`: training goes on from each form, and what it leaves loads again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from sigphi import SigPhiConfig
from sigphi.hub_card.forms import export_form, form_of
from sigphi.train import vlm
from sigphi.train.arguments import DataArguments, VlmModelArguments, VlmTrainingArguments
from sigphi.train.data import load_cifar10_qa
from sigphi.train.errors import UserError
from sigphi.train.evaluation import only_unseen
from sigphi.train.parser import parse_arguments
from sigphi.train.plan_cases import read_vlm_case
from sigphi.train.second_round import load_checkpoint, settle


@pytest.fixture(scope="module")
def forms(save_toy_vlm: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a first round has left, in each form."""
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("first")
    adapter = save_toy_vlm(root / "adapter", bits=4)
    first = {"images_per_split": {"train": 5}, "eval_fraction": 0.75, "split_seed": 0}
    (adapter / "training_data.json").write_text(json.dumps(first))
    for form in ("merged", "nf4"):
        export_form(str(adapter), root / form, form)
    return {form: root / form for form in ("adapter", "merged", "nf4")}


@pytest.fixture(scope="module")
def argv(toy_csv: Path) -> list[str]:
    words = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--bf16", "false", "--report-to", "none"]
    words += ["--max-steps", "2", "--batch-size", "8", "--save-strategy", "no", "--eval-strategy", "no"]
    return [*words, "--eval-samples", "0", "--eval-fraction", "0", "--disable-tqdm", "true"]


@pytest.fixture(scope="module")
def second(forms: dict[str, Path], argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a second round leaves, by the form that it started from; `full`: of all weights of the merged one."""
    root = tmp_path_factory.mktemp("second")
    for form, folder in forms.items():
        vlm.main([*argv, "--vlm-checkpoint", str(folder), "--output-dir", str(root / form)])
    full = ["--vlm-checkpoint", str(forms["merged"]), "--tuning", "full", "--bits", "16"]
    vlm.main([*argv, *full, "--output-dir", str(root / "full")])
    return {name: root / name for name in ("adapter", "merged", "nf4", "full")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    lora = folder / "lora" / "adapter_model.safetensors"
    return tensors | (load_file(lora) if lora.exists() else {})


def test_of_the_adapter_form_the_same_lora_and_projector_are_trained_on(forms, second):
    before, after = weights(forms["adapter"]), weights(second["adapter"])
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name or ".multi_modal_projector." in name}
    assert max((before[name] - after[name]).abs().max() for name in moved) < 0.1, "trained on, not begun anew"
    old, new = SigPhiConfig.from_pretrained(forms["adapter"]), SigPhiConfig.from_pretrained(second["adapter"])
    for field in ("base_language_model", "base_bits", "lora"):
        assert getattr(new, field) == getattr(old, field)


@pytest.mark.parametrize("form", ["merged", "nf4"])
def test_the_other_forms_get_new_lora_on_the_language_model_inside(forms, second, form):
    config = SigPhiConfig.from_pretrained(second[form])
    assert (config.base_language_model, config.base_bits) == (str(forms[form]), 4)
    assert "quantization_config" not in vars(config)
    before, after = weights(forms[form]), weights(second[form])
    projector = [name for name in after if ".multi_modal_projector." in name]
    tower = [name for name in after if ".vision_tower." in name]
    assert all(torch.equal(before[name], after[name]) for name in tower)
    assert all(0 < (before[name] - after[name]).abs().max() < 0.1 for name in projector)
    assert all(tensor.any() for name, tensor in after.items() if "lora_B" in name)


def test_all_weights_of_the_merged_form_may_be_trained(forms, second):
    config = SigPhiConfig.from_pretrained(second["full"])
    assert form_of(config) == "merged" and config.lora is None
    before, after = weights(forms["merged"]), weights(second["full"])
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(".vision_tower." in name for name in moved)
    assert {"lm_head.weight", "model.language_model.layers.0.mlp.fc1.weight"} <= moved


@pytest.mark.parametrize("form", ["adapter", "merged", "nf4", "full"])
def test_what_a_second_round_leaves_can_be_merged_again(second, tmp_path, form):
    export_form(str(second[form]), tmp_path / "again", "merged")
    features = torch.randn(1, 1, 32)
    image = SigPhiConfig.from_pretrained(second[form]).image_token_id
    inputs = {"input_ids": torch.tensor([[image, 5, 6, 7]]), "image_features": features}
    models = [AutoModelForImageTextToText.from_pretrained(folder) for folder in (second[form], tmp_path / "again")]
    with torch.no_grad():
        before, after = (model(**inputs).logits for model in models)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_stranger_reads_what_second_rounds_leave(second, run_stranger, tmp_path):
    code = """
import json, os
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
for folder in json.loads(os.environ["FOLDERS"]):
    for auto in (AutoModel, AutoModelForImageTextToText, AutoProcessor):
        auto.from_pretrained(folder, trust_remote_code=True)
    print("read")
"""
    folders = json.dumps([str(folder) for folder in second.values()])
    assert run_stranger(code, FOLDERS=folders).split() == ["read"] * 4


def test_images_of_the_first_round_are_not_evaluated_on(second, toy_csv):
    facts = json.loads((second["merged"] / "training_data.json").read_text())
    assert facts["vlm_checkpoint"]["images_per_split"] == {"train": 5}
    everything = load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=1.0)["eval"]
    with pytest.raises(UserError, match="trained on all images"):
        only_unseen(everything, str(second["merged"]))


def test_a_plan_knows_what_the_checkpoint_decides(forms, toy_csv, tmp_path):
    data = DataArguments(input_csv=str(toy_csv), images=TOY_IMAGES)
    training = VlmTrainingArguments(output_dir=str(tmp_path), bf16=False, report_to="none")
    folders = [forms["adapter"], forms["nf4"]]
    cases = [read_vlm_case(VlmModelArguments(vlm_checkpoint=str(folder)), data, training) for folder in folders]
    assert cases[1].base_model == str(forms["nf4"])
    of_adapter, of_nf4 = (case.costs() for case in cases)
    assert of_adapter.parameters == of_nf4.parameters and of_adapter.weights == of_nf4.weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"siglip_checkpoint": "x"}, "--siglip-checkpoint has no use with --vlm-checkpoint"),
        ({"language_model": "x"}, "--language-model has no use with --vlm-checkpoint"),
        ({"num_image_tokens": 4}, "--num-image-tokens 4: .* was trained with 1. Say --num-image-tokens 1"),
        ({"vlm_checkpoint": "gone/nowhere/x"}, "--vlm-checkpoint gone/nowhere/x: there is no model folder"),
        ({"vlm_checkpoint": "base"}, "--vlm-checkpoint .* is a 'phi' model; give a VLM"),
        ({"lora_r": 4}, "--lora-r 4: .* was trained with 8. Say --lora-r 8, or begin new LoRA layers .*sigphi merge"),
        ({"use_dora": True}, "--use-dora True: .* was trained with False. Say --use-dora False"),
        ({"use_rslora": False}, "--use-rslora False: .* was trained with True. Say --use-rslora True"),
        ({"bits": 16}, "--bits 16: .* was trained with 4. Say --bits 4, .*sigphi merge .* NEW-FOLDER"),
        ({"bits": 16, "tuning": "full"}, "--tuning full: .* holds no language model, only LoRA"),
        ({"vlm_checkpoint": "nf4", "bits": 16}, "--bits 16: .* is stored in 4 bits"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    forms: dict[str, Path], toy_base: Path, options: dict[str, Any], message: str
) -> None:
    places = SimpleNamespace(**forms, base=toy_base)
    name = options.get("vlm_checkpoint", "adapter")
    folder = str(vars(places).get(name, name))
    with pytest.raises(UserError, match=message):
        settle(VlmModelArguments(**{**options, "vlm_checkpoint": folder}))


def test_one_start_is_needed():
    with pytest.raises(UserError, match="--siglip-checkpoint is needed"):
        VlmModelArguments()


def test_a_recipe_goes_with_a_checkpoint_that_has_its_image_tokens(forms, argv, tmp_path):
    words = [*argv[: argv.index("--batch-size")], "--vlm-checkpoint", str(forms["merged"]), "--recipe", "vlm-6gb"]
    words += ["--output-dir", str(tmp_path)]
    types = [VlmModelArguments, DataArguments, VlmTrainingArguments]
    with pytest.raises(UserError, match="--num-image-tokens 16: .* was trained with 1. Say --num-image-tokens 1."):
        settle(parse_arguments(types, words, "sigphi train-vlm", recipes=vlm.RECIPES)[0])
    words += ["--num-image-tokens", "1"]
    settled = settle(parse_arguments(types, words, "sigphi train-vlm", recipes=vlm.RECIPES)[0])
    assert (settled.num_image_tokens, settled.bits) == (1, 4)


def test_what_the_checkpoint_decides_is_told(forms, caplog):
    with caplog.at_level("INFO"):
        settled = settle(VlmModelArguments(vlm_checkpoint=str(forms["adapter"]), lora_r=8))
    assert settled.language_model != VlmModelArguments.language_model
    told = [record.message for record in caplog.records if "as --vlm-checkpoint has it" in record.message]
    decided = {name for name in ("lora_alpha", "lora_dropout") if f"--{name.replace('_', '-')}" in " ".join(told)}
    assert decided == {
        name for name in ("lora_alpha", "lora_dropout") if getattr(settled, name) != getattr(VlmModelArguments, name)
    }


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_the_image_tower_is_never_in_float16(forms, form, dtype, expected):
    settled = settle(VlmModelArguments(vlm_checkpoint=str(forms[form])))
    model = load_checkpoint(settled, dtype, "sdpa", torch.device("cpu"))
    assert model.model.vision_tower.dtype == expected
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {expected}
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.isfinite(model.model.get_vision_features(pixels)).all()
