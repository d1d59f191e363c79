"""Options of the training commands: defaults, checks, recipes, and how a run may be launched."""

import dataclasses
import inspect
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS

from sigphi.train import arguments as arguments_module
from sigphi.train import plan, quickstart, siglip, vlm
from sigphi.train.arguments import (
    BITSANDBYTES_OPTIMIZERS,
    DataArguments,
    EncoderDataArguments,
    SiglipModelArguments,
    SiglipTrainingArguments,
    SigphiTrainingArguments,
    StageArguments,
    VlmModelArguments,
    VlmTrainingArguments,
    check_best_metric,
    check_duplicates,
    check_launch,
)
from sigphi.train.base_lm import BaseModelArguments, BaseTrainingArguments
from sigphi.train.errors import UserError
from sigphi.train.parser import parse_arguments
from sigphi.train.precision import weights_dtype
from sigphi.train.replay_file import recorded_options

SIGLIP = [SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments]
VLM = [VlmModelArguments, DataArguments, VlmTrainingArguments]
BASE = [BaseModelArguments, DataArguments, BaseTrainingArguments]
DOCUMENTED = [SiglipTrainingArguments, VlmTrainingArguments, BaseTrainingArguments]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def documented_defaults(dataclass_type: type) -> dict[str, str]:
    """Field -> its documented default: "`a` and `b` `"epoch"`, `c` 1e-3, `d` on"."""
    text = " ".join(dataclass_type.__doc__.split())
    listed = re.search(r"Defaults that differ from .*?: (.*?)\.?$", text)[1]
    defaults = {}
    for names, value in re.findall(r"((?:`\w+`(?: and )?)+) (`\"\w+\"`|[\d.]+(?:e-\d+)?|on\b|off\b)", listed):
        defaults |= dict.fromkeys(re.findall(r"`(\w+)`", names), value.strip('`"'))
    return defaults


def default_of(dataclass_type: type, name: str) -> object:
    return next(field.default for field in dataclasses.fields(dataclass_type) if field.name == name)


@pytest.mark.parametrize("dataclass_type", DOCUMENTED)
def test_documented_defaults_are_the_real_ones(dataclass_type):
    documented = documented_defaults(dataclass_type)
    assert len(documented) >= 8
    for name, value in documented.items():
        real = default_of(dataclass_type, name)
        switches: dict[str, object] = {"on": True, "off": False}
        expected = switches[value] if value in switches else value if isinstance(real, str) else float(value)
        assert real == expected, name


@pytest.mark.parametrize("dataclass_type", DOCUMENTED)
def test_every_default_that_differs_is_documented(dataclass_type):
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name: field.default for field in dataclasses.fields(dataclass_type)}
    of_all = {*inspect.get_annotations(SigphiTrainingArguments), *inspect.get_annotations(StageArguments)}
    differing = {name for name in theirs if ours[name] != theirs[name]} - of_all - {"output_dir"}
    assert differing == set(documented_defaults(dataclass_type))


# Checks --------------------------------------------------------------------------------------------------------------


def test_a_quantised_base_without_bitsandbytes_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(arguments_module, "is_bitsandbytes_available", lambda: False)
    for bits in (4, 8):
        with pytest.raises(UserError, match=rf"--bits {bits} needs .*pip install 'sigphi\[qlora\]'"):
            VlmModelArguments(siglip_checkpoint="encoder", bits=bits)
    assert VlmModelArguments(siglip_checkpoint="encoder", bits=16).bits == 16
    with pytest.raises(UserError, match=r"--text-tower-dtype nf4 needs .*pip install 'sigphi\[qlora\]'"):
        SiglipModelArguments(text_tower_dtype="nf4")


def test_full_tuning_needs_16_bits():
    with pytest.raises(UserError, match="--tuning full .*4-bit .*--bits 16"):
        VlmModelArguments(siglip_checkpoint="encoder", tuning="full")
    assert VlmModelArguments(siglip_checkpoint="encoder", tuning="full", bits=16).tuning == "full"


def test_the_optimizers_of_bitsandbytes_need_it(monkeypatch, tmp_path):
    options = {"output_dir": str(tmp_path), "report_to": "none"}
    names = [*_BITSANDBYTES_OPTIMIZERS]
    assert set(BITSANDBYTES_OPTIMIZERS) == {name.value for name in names}
    VlmTrainingArguments(optim="paged_adamw_8bit", **options)
    monkeypatch.setattr(arguments_module, "is_bitsandbytes_available", lambda: False)
    VlmTrainingArguments(**options)
    with pytest.raises(UserError, match=r"--optim paged_adamw_8bit needs .*pip install 'sigphi\[qlora\]'"):
        VlmTrainingArguments(optim="paged_adamw_8bit", **options)


@pytest.mark.parametrize(
    ("dataclass_type", "values", "message"),
    [
        (VlmModelArguments, {}, "--siglip-checkpoint is needed"),
        (VlmModelArguments, {"siglip_checkpoint": "e", "bits": 2}, "--bits must be one of 4, 8, 16, got 2"),
        (VlmModelArguments, {"siglip_checkpoint": "e", "tuning": "half"}, "--tuning must be .*'half'"),
        (VlmModelArguments, {"siglip_checkpoint": "e", "attn_implementation": "x"}, "--attn-implementation .*'x'"),
        (VlmModelArguments, {"siglip_checkpoint": "e", "image_cache": "auto"}, "--image-cache .*'auto'"),
        (
            VlmModelArguments,
            {"siglip_checkpoint": "e", "bits": 16, "tuning": "full", "use_dora": True},
            "--use-dora is a kind of LoRA",
        ),
        (
            VlmModelArguments,
            {"siglip_checkpoint": "e", "bits": 8, "use_dora": True},
            "--use-dora needs the whole weights .*--bits 4 or --bits 16",
        ),
        (
            VlmTrainingArguments,
            {"tokens_per_batch": 64, "per_device_train_batch_size": 4},
            "--batch-size 4: a step has --tokens-per-batch 64 positions",
        ),
        (DataArguments, {}, "--input-csv is needed"),
        (EncoderDataArguments, {}, "--input-csv is needed"),
        (EncoderDataArguments, {"input_csv": "a", "dataset": "d"}, "--input-csv has no use with --dataset"),
        (EncoderDataArguments, {"images": "a", "dataset": "d"}, "--images has no use with --dataset"),
        (EncoderDataArguments, {"input_csv": "a", "text_column": "t"}, "--text-column has no use without --dataset"),
        (EncoderDataArguments, {"dataset": "d", "eval_fraction": 1.0}, "--eval-fraction must .*1.0"),
        (EncoderDataArguments, {"dataset": "d", "image_store": "x"}, "--image-store must .*'x'"),
        (DataArguments, {"input_csv": "a", "eval_fraction": 1.0}, "--eval-fraction must .*1.0"),
        (DataArguments, {"input_csv": "a", "image_split": "val"}, "--image-split must .*train, test, got 'val'"),
        (DataArguments, {"input_csv": "a", "on_faulty_answers": "x"}, "--on-faulty-answers must .*'x'"),
        (SiglipModelArguments, {"stem": "x"}, "--stem must .*'x'"),
        (SiglipModelArguments, {"downsampling": "x"}, "--downsampling must .*'x'"),
        (SiglipModelArguments, {"layer_type": "x"}, "--layer-type must .*'x'"),
        (SiglipModelArguments, {"text_pooling": "x"}, "--text-pooling must .*'x'"),
        (SiglipModelArguments, {"depths": [1]}, r"--hidden-sizes and --depths .*\[1\]"),
        (SiglipModelArguments, {"vision_model": "r", "depths": [1, 1]}, "--depths has no use with --vision-model"),
        (SiglipModelArguments, {"vision_model": "r", "layer_type": "basic"}, "--layer-type has no use with --vision"),
        (SiglipModelArguments, {"vision_model": "r", "siglip_checkpoint": "e"}, "--vision-model and --siglip-checkp"),
        (
            VlmModelArguments,
            {"siglip_checkpoint": "e", "image_cache": "off", "image_cache_dir": "d"},
            "--image-cache-dir has no use with --image-cache off",
        ),
        (SiglipModelArguments, {"text_cache": "x"}, "--text-cache must .*'x'"),
        (SiglipModelArguments, {"text_tower_dtype": "float16"}, "--text-tower-dtype must .*'float16'"),
        (SiglipModelArguments, {"text_cache": "on", "train_text_tower": True}, "--text-cache on needs a frozen"),
        (
            SiglipModelArguments,
            {"text_cache": "off", "text_cache_dir": "d"},
            "--text-cache-dir has no use with --text-cache off",
        ),
        (
            SiglipModelArguments,
            {"train_text_tower": True, "text_cache_dir": "d"},
            "--text-cache-dir has no use with --train-text-tower",
        ),
        (
            SiglipModelArguments,
            {"train_text_tower": True, "text_tower_dtype": "bfloat16"},
            "--text-tower-dtype bfloat16 needs a frozen",
        ),
    ],
)
def test_refused_values(dataclass_type, values, message):
    with pytest.raises(UserError, match=message):
        dataclass_type(**values)


# Launching -----------------------------------------------------------------------------------------------------------


class Launch:
    """What `check_launch` reads of the training arguments."""

    def __init__(self, world_size: int = 1, n_gpu: int = 0) -> None:
        self.world_size, self.n_gpu = world_size, n_gpu


def test_one_process_and_matching_processes_may_start(monkeypatch):
    check_launch(Launch())
    check_launch(Launch(n_gpu=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(Launch(world_size=2))


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="WORLD_SIZE is 4, but 1 process trains.*--nproc_per_node 4.*--use_cpu"):
        check_launch(Launch())


def test_data_parallel_is_refused():
    with pytest.raises(UserError, match="2 GPUs are visible to one process.*--num_processes 2"):
        check_launch(Launch(n_gpu=2))


# Parsing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("installed", "expected"), [(True, ["tensorboard"]), (False, [])])
def test_the_default_tracker_is_tensorboard_where_installed(monkeypatch, caplog, tmp_path, installed, expected):
    monkeypatch.setattr(arguments_module, "is_tensorboard_available", lambda: installed)
    assert SiglipTrainingArguments(output_dir=str(tmp_path)).report_to == expected
    assert ("TensorBoard is not installed" in caplog.text) == (not installed)
    assert SiglipTrainingArguments(output_dir=str(tmp_path), report_to="none").report_to == []


@pytest.mark.parametrize("arguments_class", [SiglipTrainingArguments, VlmTrainingArguments])
@pytest.mark.parametrize(
    ("use_cpu", "processor_has_it", "expected"), [(True, True, True), (True, False, False), (False, False, True)]
)
def test_bfloat16_is_left_where_the_processor_has_none(
    monkeypatch, caplog, tmp_path, arguments_class, use_cpu, processor_has_it, expected
):
    monkeypatch.setattr(arguments_module, "cpu_has_bfloat16", lambda: processor_has_it)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: not use_cpu)
    # What transformers asks a GPU for; there is none here.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda *_, **__: True)
    options = arguments_class(output_dir=str(tmp_path), report_to="none", bf16=True, use_cpu=use_cpu)
    assert options.bf16 == expected
    assert ("training is in float32" in caplog.text) == (not expected)


@pytest.fixture
def gpu_without_bfloat16(monkeypatch):
    """As on a T4, where torch emulates bfloat16."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    # What the Trainer's options would set up there.
    plugins = {"deepspeed_plugin": None, "fsdp_plugin_args": None}
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: vars(self).update(plugins))


@pytest.mark.parametrize("arguments_class", [SiglipTrainingArguments, VlmTrainingArguments])
def test_a_gpu_without_bfloat16_is_told_what_it_can_do(gpu_without_bfloat16, tmp_path, arguments_class):
    options: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": []}
    with pytest.raises(UserError, match=r"--bf16: this GPU \(Tesla T4\) .* --bf16 false --fp16 true"):
        arguments_class(**options, bf16=True)
    given = arguments_class(**options, bf16=False, fp16=True)
    assert not given.has_bfloat16 and weights_dtype(given) == torch.float16
    assert weights_dtype(arguments_class(**options, bf16=False)) == torch.float32


def test_options_are_recorded_on_a_gpu_without_bfloat16(gpu_without_bfloat16, tmp_path):
    given = VlmTrainingArguments(output_dir=str(tmp_path), report_to=[], bf16=False, fp16=True)
    recorded = recorded_options(given)
    assert (recorded["bf16"], recorded["fp16"]) == (False, True)
    assert VlmTrainingArguments(**recorded).to_dict() == given.to_dict()


@pytest.mark.parametrize("arguments_class", [SiglipTrainingArguments, VlmTrainingArguments])
def test_options_are_rebuilt_from_what_is_recorded(arguments_class, tmp_path):
    options = {"bf16": False, "gradient_checkpointing": False, "optim": "sgd", "optim_args": "momentum=0.5"}
    options |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "save_strategy": "steps", "save_steps": 7}
    given = arguments_class(output_dir=str(tmp_path), report_to="none", use_cpu=True, hub_token="hf_x", **options)
    recorded = json.loads(json.dumps(recorded_options(given)))
    assert recorded["save_steps"] == 7 and "hub_token" not in recorded and "adam_beta1" not in recorded
    assert arguments_class(**recorded).to_dict() == given.to_dict()


def test_float16_needs_a_gpu_and_takes_the_place_of_bfloat16(tmp_path, monkeypatch):
    options: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "fp16": True}
    with pytest.raises(UserError, match="--fp16 true add --bf16 false"):
        VlmTrainingArguments(**options)
    with pytest.raises(UserError, match="--fp16 needs a GPU"):
        VlmTrainingArguments(**options, bf16=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "nope"}, "--metric-for-best-model nope: evaluations .* give loss, gain. Name one"),
        ({"metric_for_best_model": "eval_nope"}, "--metric-for-best-model eval_nope: "),
        ({"save_strategy": "best"}, "--save-strategy best needs --metric-for-best-model: .* give loss, gain"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_named(options, message, tmp_path):
    given = {"output_dir": str(tmp_path), "report_to": "none"}
    with pytest.raises(UserError, match=message):
        check_best_metric(VlmTrainingArguments(**given, **options), ["loss", "gain"])
    named = [{"metric_for_best_model": name} for name in ("eval_gain", "gain")]
    for fine in ({"load_best_model_at_end": True}, *named):
        check_best_metric(VlmTrainingArguments(**given, **fine), ["loss", "gain"])
    check_best_metric(VlmTrainingArguments(**given, metric_for_best_model="nope", eval_strategy="no"), ["loss"])


@pytest.mark.parametrize("trackers", ["no_such_tracker", ["tensorboard", "no_such_tracker"]])
def test_a_tracker_that_is_not_there_is_named_before_anything_loads(trackers, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="--report-to no_such_tracker: .* installed here: tensorboard"):
        VlmTrainingArguments(output_dir=str(tmp_path), report_to=trackers)


def test_a_tracker_s_name_does_not_steer_the_terminal(tmp_path):
    with pytest.raises(UserError, match=r"--report-to no\\u202ene: ") as error:
        VlmTrainingArguments(output_dir=str(tmp_path), report_to="no\u202ene")
    assert str(error.value).isprintable()


def test_trackers_that_are_installed_reach_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", lambda: ["wandb", "trackio"])
    options = VlmTrainingArguments(output_dir=str(tmp_path), report_to=["wandb", "trackio"])
    assert options.report_to == ["wandb", "trackio"]


@pytest.mark.parametrize("style", ["-", "_"])
@pytest.mark.parametrize("types", [SIGLIP, VLM])
def test_the_names_of_the_earlier_scripts_parse(types, style, tmp_path):
    flags = {
        "--input-csv": "qa.csv",
        "--batch-size": "12",
        "--num-epochs": "3",
        "--learning-rate": "5e-5",
        "--siglip-checkpoint": "encoder",
        "--output-dir": str(tmp_path),
    }
    argv = [word for flag, value in flags.items() for word in ("--" + flag[2:].replace("-", style), value)]
    model, data, training = parse_arguments(types, argv, "sigphi train")
    assert data.input_csv == "qa.csv"
    assert training.per_device_train_batch_size == 12
    assert training.num_train_epochs == 3
    assert training.learning_rate == 5e-5
    assert model.siglip_checkpoint == "encoder"


def test_the_image_cache_has_a_second_name():
    argv = ["--siglip-checkpoint", "encoder", "--feature-cache", "off"]
    assert parse_arguments([VlmModelArguments], argv, "sigphi train-vlm")[0].image_cache == "off"
    argv = ["--siglip-checkpoint", "encoder", "--feature-cache-dir", "folder"]
    assert parse_arguments([VlmModelArguments], argv, "sigphi train-vlm")[0].image_cache_dir == "folder"


def test_gradient_checkpointing_is_not_reentrant(tmp_path):
    options = VlmTrainingArguments(output_dir=str(tmp_path))
    assert options.gradient_checkpointing and options.gradient_checkpointing_kwargs == {"use_reentrant": False}
    given = VlmTrainingArguments(output_dir=str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": True})
    assert given.gradient_checkpointing_kwargs == {"use_reentrant": True}


RECIPE_TYPES = {"base": BASE, "siglip": SIGLIP, "vlm": VLM}


@pytest.mark.parametrize("recipe", sorted(quickstart.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe: Path, tmp_path):
    stage = next((name for name in RECIPE_TYPES if name in recipe.stem.split("_")), "siglip")
    stage = "vlm" if recipe in vlm.RECIPES else stage
    types = RECIPE_TYPES[stage]
    argv = ["--config", str(recipe), "--input-csv", "qa.csv", "--output-dir", str(tmp_path)]
    if types is VLM:
        argv += ["--siglip-checkpoint", "encoder"]
    parsed = parse_arguments(types, argv, "sigphi train")
    text = recipe.read_text(encoding="utf-8")
    batch_size = re.search(r"^batch_size: (\d+)", text, re.MULTILINE)
    assert batch_size is None or parsed[2].per_device_train_batch_size == int(batch_size[1])
    learning_rate = re.search(r"^learning_rate: (\S+)", text, re.MULTILINE)
    assert learning_rate is None or parsed[2].learning_rate == float(learning_rate[1])


def test_there_are_recipes_for_every_stage():
    stems = [path.stem for path in quickstart.RECIPES.glob("*.yaml")]
    assert {f"quickstart_{name}" for name in RECIPE_TYPES} <= set(stems)
    assert {"cpu-small", "resnet50-32", "resnet50-224-pretrained"} == {path.stem for path in siglip.RECIPES}
    assert {"vlm-6gb", "vlm-12gb", "vlm-24gb", "h200"} == {path.stem for path in vlm.RECIPES}


@pytest.mark.parametrize("command", [siglip.main, partial(plan.plan, "siglip")])
def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do(command):
    with pytest.raises(
        UserError, match="invalid choice: 'cpu-large' .*cpu-small.*resnet50-32.*resnet50-224-pretrained"
    ):
        command(["--input-csv", "qa.csv", "--recipe", "cpu-large"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cutout": -1}, "--cutout must be 0 .off. or a number of pixels, got -1"),
        ({"color_jitter": 1.5}, "--color-jitter must be from 0 .off. to 1, got 1.5"),
        ({"muon": True, "fp16": True}, "--muon does not know the loss scaling of --fp16"),
        ({"muon": True, "optim": "sgd"}, "--muon goes with --optim adamw_torch .* not sgd"),
    ],
)
def test_what_does_not_go_together_in_the_training_of_the_encoder(options, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        SiglipTrainingArguments(output_dir=str(tmp_path), report_to="none", **options)


def test_texts_without_facts_cannot_be_ignored_for_their_facts(tmp_path):
    training = SiglipTrainingArguments(output_dir=str(tmp_path), report_to="none", duplicate_texts="ignored")
    check_duplicates(EncoderDataArguments(input_csv="qa.csv"), training)
    with pytest.raises(UserError, match="--duplicate-texts ignored .*of the texts of a --dataset no facts are known"):
        check_duplicates(EncoderDataArguments(dataset="pictures"), training)
