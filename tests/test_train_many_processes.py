"""Jobs of several processes: DDP, FSDP2, ZeRO-2 and ZeRO-3 train like one process, and what cannot work is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import TOY_IMAGES, Originals, child_environment
from safetensors.torch import load_file
from toy_runs import write_parts

from sigphi import SiglipTrainingArguments, VlmTrainingArguments
from sigphi.train.errors import UserError
from sigphi.train.sharding import OTHER_NUMBER, SAVE_TEXT_TOWER, check_way, reason_against

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "train" / "launch"
WAYS = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'sigphi[deepspeed]'"
)
each_way = pytest.mark.parametrize(
    "way", ["DDP", "FSDP2", *(pytest.param(way, marks=needs_deepspeed) for way in ("ZeRO-2", "ZeRO-3"))]
)

SAVED = {"save_strategy": "steps", "save_steps": 4}
WATCHED = {**SAVED, "eval_strategy": "epoch"}
# By the name of a row of the table in docs/many_gpus.md, where it has one.
CASES: dict[str, dict[str, Any]] = {
    "`train-siglip`": {"stage": "encoder", "options": {"max_steps": 10, **WATCHED}},
    "`train-siglip --bf16 true`": {"stage": "encoder", "options": {"max_steps": 3, "bf16": True}, "rel": 2e-2},
    "`--ema-decay`": {"stage": "encoder", "options": {"max_steps": 3, "ema_decay": 0.9}},
    "`--micro-batch-size`": {"stage": "encoder", "options": {"max_steps": 3, "micro_batch_size": 3}},
    "`--muon true`": {"stage": "encoder", "options": {"max_steps": 3, "muon": True}},
    "kernels in channels-last order": {"stage": "encoder", "options": {"max_steps": 3}, "channels_last": True},
    "`train-vlm --bits 16`": {"stage": "vlm", "options": {"max_steps": 10, **WATCHED}},
    "`train-vlm --bits 4`": {"stage": "vlm", "options": {"max_steps": 3, **SAVED, "save_steps": 2}, "nf4": True},
    "`train-vlm --bf16 true`": {"stage": "vlm", "options": {"max_steps": 3, "bf16": True}, "rel": 2e-2},
    "`--tuning full`": {"stage": "vlm", "options": {"max_steps": 3}, "full": True},
    "`--packing on`": {"stage": "vlm", "options": {"max_steps": 3}, "tokens_per_row": 64},
    # Enough for all rows: a batch of two processes holds others than one of one, unless it holds all.
    "`--tokens-per-batch`": {
        "stage": "vlm",
        "options": {"max_steps": 3, "tokens_per_batch": 4096},
        "tokens_per_row": 32,
    },
    "accumulated": {"stage": "vlm", "options": {"max_steps": 3, "gradient_accumulation_steps": 2}},
    "the best of several": {
        "stage": "vlm",
        "options": {"max_steps": 8, "save_strategy": "epoch", "eval_strategy": "epoch"}
        | {"load_best_model_at_end": True, "greater_is_better": True},
    },
}


def cases_of(way: str) -> dict[str, Any]:
    """Those that go with a way of sharing."""
    return {name: case for name, case in CASES.items() if reason_against(way, name) is None}


@pytest.fixture(scope="module")
def parts(shared: Originals, make_vlm: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts") / "parts.pt", shared, make_vlm, base_folder)


def launcher(way: str, processes: int) -> list[str]:
    """What begins the command of a job."""
    config = LAUNCH / f"{WAYS[way]}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--num_processes", str(processes), "--main_process_port", "0"]


def environment(folder: Path) -> dict[str, str]:
    return child_environment(folder / "hf_home") | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT / "tests")}


def train(command: list[str], parts: Path, folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """What came of `cases`, in the processes that `command` starts."""
    folder.mkdir(exist_ok=True)
    words = [str(ROOT / "tests" / "launched.py"), str(parts), str(folder), json.dumps(cases)]
    result = subprocess.run(
        [*command, *words], env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What one process makes of the cases, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return train([sys.executable], parts, folder, CASES), folder


_jobs: dict[str, tuple[dict[str, Any], Path]] = {}


@pytest.fixture
def job(way: str, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What two processes make of the cases, and their folder."""
    if way not in _jobs:
        folder = tmp_path_factory.mktemp(WAYS[way])
        _jobs[way] = train(launcher(way, 2), parts, folder, cases_of(way)), folder
    return _jobs[way]


# What goes with what -----------------------------------------------------------------------------------------------


def table() -> dict[str, dict[str, str]]:
    """The cells of the table in the guide, by the names of its rows and columns."""
    text = (ROOT / "docs" / "many_gpus.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- ways -->\n(.*?)<!-- /ways -->", text, re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.strip().splitlines()]
    return {row[0]: dict(zip(lines[0][1:], row[1:], strict=True)) for row in lines[2:]}


def test_the_table_of_the_guide_is_what_the_code_decides():
    rows = table()
    assert set(rows) == {name for name in CASES if "`" in name} | {OTHER_NUMBER, SAVE_TEXT_TOWER}
    for name, row in rows.items():
        assert row == {way: "yes" if reason_against(way, name) is None else "no" for way in WAYS}, name


@pytest.mark.parametrize(("way", "name"), WAYS.items())
def test_a_configuration_launches_what_it_is_called(way, name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    kinds = {"DDP": "MULTI_GPU", "FSDP2": "FSDP"}
    assert config.distributed_type == kinds.get(way, "DEEPSPEED")
    assert config.fsdp_config.get("fsdp_version") == (2 if way == "FSDP2" else None)
    assert config.deepspeed_config.get("zero_stage") == {"ZeRO-2": 2, "ZeRO-3": 3}.get(way)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`launched(way)`: from then on options are read as `accelerate launch` leaves it to a process of that way."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def launch(way: str) -> None:
        if way.startswith("FSDP"):
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            monkeypatch.setenv("FSDP_VERSION", way[-1])
        elif way.startswith("ZeRO"):
            monkeypatch.setattr("sigphi.train.sharding.way_of", lambda arguments: way)

    return launch


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("ZeRO-2", {"ema_decay": 0.9}),
        ("ZeRO-2", {"micro_batch_size": 4}),
        ("ZeRO-2", {"muon": True}),
        ("ZeRO-2", {"bf16": True}),
    ],
)
def test_an_option_that_does_not_go_with_the_launch_is_refused(way, options, launched, tmp_path):
    launched(way)
    (name,) = options
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}.* under {way} .*launch with ddp.yaml"):
        SiglipTrainingArguments(output_dir=str(tmp_path), report_to="none", **options)


@pytest.mark.parametrize("stage", [SiglipTrainingArguments, VlmTrainingArguments])
def test_fsdp_that_accelerate_would_leave_out_is_refused(stage, launched, tmp_path):
    launched("FSDP2")
    with pytest.raises(UserError, match="FSDP2 in one process without a launcher: accelerate leaves it out there"):
        stage(output_dir=str(tmp_path), report_to="none")
    launched("FSDP1")
    with pytest.raises(UserError, match="FSDP1 is not supported: say fsdp_version: 2"):
        stage(output_dir=str(tmp_path), report_to="none")


def test_what_would_leave_folders_without_a_model_is_refused(launched, tmp_path, monkeypatch):
    launched("FSDP2")
    several = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    given = {"fsdp_plugin_args": None, "deepspeed_plugin": None, "distributed_state": several}
    with pytest.raises(UserError, match="SHARDED_STATE_DICT: folders would hold no model.*fsdp_state_dict_type: FULL"):
        check_way(SimpleNamespace(**given))
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    check_way(SimpleNamespace(**given))
    plugin = SimpleNamespace(zero_stage=3, zero3_save_16bit_model=False)
    with pytest.raises(UserError, match="ZeRO-3 without zero3_save_16bit_model: folders would hold no model"):
        check_way(SimpleNamespace(**given | {"deepspeed_plugin": plugin}))


@pytest.mark.slow
def test_fsdp_on_cpus_is_refused_in_one_line_before_anything_is_read(tmp_path):
    words = ["-m", "sigphi.train.vlm", "--use_cpu", "--input-csv", "none.csv", "--siglip-checkpoint", "none"]
    command = [*launcher("FSDP2", 2), *words]
    result = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("python -m sigphi.train.vlm: error: FSDP2 on CPUs: accelerate leaves it out") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "a file of JSON is needed"),
        ("{", "a file of JSON is needed"),
        ('{"optimizer": {"type": "AdamW"}}', "its 'optimizer' would take the place of the training's own"),
        ('{"scheduler": {"type": "WarmupLR"}}', "its 'scheduler' would take the place of the training's own"),
    ],
)
def test_a_file_for_deepspeed_that_would_not_do_is_refused(content, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("sigphi.train.sharding.find_spec", lambda name: name)
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"--deepspeed {path}: .*{expected}"):
        VlmTrainingArguments(output_dir=str(tmp_path), report_to="none", deepspeed=str(path))


def test_without_deepspeed_its_option_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sigphi.train.sharding.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-build-isolation 'sigphi.deepspeed.'"):
        VlmTrainingArguments(output_dir=str(tmp_path), report_to="none", deepspeed="zero.json")


# One process and two -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_way
def test_two_processes_train_like_one(way, alone, job):
    wrapper = {"DDP": "DistributedDataParallel", "FSDP2": "FSDPModule"}.get(way, "DeepSpeedEngine")
    for name, case in cases_of(way).items():
        found, expected = job[0][name], alone[0][name]
        assert wrapper in found["classes"] and wrapper not in expected["classes"]
        assert found["zero_stage"] == {"ZeRO-2": 2, "ZeRO-3": 3}.get(way)
        assert len(found["losses"]) == case["options"]["max_steps"]
        assert bool(found["eval_losses"]) == ("eval_strategy" in case["options"])
        for key in ("losses", "grad_norms", "eval_losses"):
            assert found[key] == pytest.approx(expected[key], rel=case.get("rel", 1e-5)), (name, key)


@pytest.mark.slow
@each_way
def test_what_two_processes_leave_is_what_one_leaves(way, alone, job, run_stranger):
    for name in cases_of(way):
        if "bf16" in name:
            continue
        own, others = (tensors(folder / name) for folder in (alone[1], job[1]))
        assert own.keys() == others.keys()
        for key, tensor in own.items():
            assert others[key].shape == tensor.shape and others[key].dtype == tensor.dtype, key
            own_values, values = tensor.double(), others[key].double()  # BatchNorm counts its batches in whole numbers
            assert (values - own_values).norm() <= 1e-4 * own_values.norm() + 1e-5, (name, key)
    code = f"""
from transformers import AutoModel
model = AutoModel.from_pretrained({str(job[1] / "`train-siglip`")!r}, trust_remote_code=True)
print(min(parameter.numel() for parameter in model.vision_model.parameters()) > 0, model.logit_scale.shape)
"""
    assert run_stranger(code).split("\n")[0] == "True torch.Size([])"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model's folder."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("lora/*.safetensors")]
    return {f"{path.name}:{key}": tensor for path in paths for key, tensor in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FSDP2"])
def test_fsdp2_divides_all_weights_those_of_4_bits_too(way, job):
    assert job[0]["`train-vlm --bits 4`"]["whole"] == []


@pytest.mark.slow
@each_way
def test_the_commands_run_to_their_end(way, toy_csv, toy_base, tmp_path, run_stranger):
    common = ["--use_cpu", "--input-csv", str(toy_csv), "--images", TOY_IMAGES]
    common += ["--batch-size", "8", "--max-steps", "4"]
    common += ["--report-to", "none", "--eval-fraction", "0.2", "--bf16", "false"]
    tower = ["--text-model", str(toy_base), "--layer-type", "basic", "--embedding-size", "8"]
    tower += ["--hidden-sizes", "8", "16", "--depths", "1", "1"]
    tower += ["--save-text-tower"] if reason_against(way, SAVE_TEXT_TOWER) is None else []
    base = ["--siglip-checkpoint", str(tmp_path / "train-siglip"), "--language-model", str(toy_base)]
    for name, options in {"train-siglip": tower, "train-vlm": base}.items():
        words = [str(ROOT / "tests" / "launched.py"), name, *common, *options, "--output-dir", str(tmp_path / name)]
        result = subprocess.run(
            [*launcher(way, 2), *words], env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-4000:]
        assert json.loads((tmp_path / name / "eval_results.json").read_text())
    config = json.loads((tmp_path / "train-siglip" / "config.json").read_text())
    assert config["include_text_tower"] == (reason_against(way, SAVE_TEXT_TOWER) is None)
    code = f"""
from transformers import AutoModel, AutoModelForImageTextToText
encoder = AutoModel.from_pretrained({str(tmp_path / "train-siglip")!r}, trust_remote_code=True)
vlm = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "train-vlm")!r}, trust_remote_code=True)
print(all(parameter.numel() > 0 for model in (encoder, vlm) for parameter in model.parameters()))
"""
    assert run_stranger(code).endswith("True\n")


# Going on ------------------------------------------------------------------------------------------------------------


def go_on(command: list[str], parts: Path, folder: Path, job: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    """What came of going on from the fourth of ten steps."""
    cases = {name: CASES[name] | {"resume": "newest"} for name in ("`train-siglip`", "`train-vlm --bits 16`")}
    for name in cases:
        shutil.copytree(job[1] / name / "checkpoint-4", folder / name / "checkpoint-4")
    return train(command, parts, folder, cases)


@pytest.mark.slow
@each_way
def test_as_many_processes_go_on_as_if_they_had_not_been_stopped(way, job, parts, tmp_path):
    resumed = go_on(launcher(way, 2), parts, tmp_path, job)
    for name, found in resumed.items():
        assert found["losses"] == job[0][name]["losses"]
        own, others = tensors(tmp_path / name), tensors(job[1] / name)
        assert own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "processes"), [("DDP", 1), ("FSDP2", 4)])
def test_another_number_of_processes_goes_on(way, processes, job, parts, tmp_path):
    command = [sys.executable] if processes == 1 else launcher(way, processes)
    for name, found in go_on(command, parts, tmp_path, job).items():
        assert found["losses"] == pytest.approx(job[0][name]["losses"], rel=1e-4)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("way", ["ZeRO-2", "ZeRO-3"])
def test_another_number_of_processes_is_refused_under_deepspeed(way, job, parts, tmp_path):
    for found in go_on(launcher(way, 1), parts, tmp_path, job).values():
        assert f"it was written under {way} by 2 processes: launch as many, not 1" in found["error"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FSDP2"])
def test_one_way_does_not_go_on_with_the_files_of_another(way, job, parts, tmp_path):
    for found in go_on([sys.executable], parts, tmp_path, job).values():
        assert "it was written under FSDP2, whose files DDP cannot read" in found["error"]


def processes_of(launcher_id: int) -> dict[int, psutil.Process]:
    """The processes that a launcher has started, by their ranks."""
    children = psutil.Process(launcher_id).children(recursive=True)
    return {int(one.environ()["RANK"]): one for one in children if "RANK" in one.environ()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_job_which_one_process_finishes(rank, parts, tmp_path):
    case = {"stage": "vlm", "options": {"max_steps": 120, "save_strategy": "steps", "save_steps": 20}}
    whole = train([sys.executable], parts, tmp_path / "whole", {"vlm": case})["vlm"]
    folder = tmp_path / "killed"
    folder.mkdir()
    words = [str(ROOT / "tests" / "launched.py"), str(parts), str(folder), json.dumps({"vlm": case})]
    job = subprocess.Popen(
        [*launcher("DDP", 2), *words], env=environment(folder), cwd=folder, stderr=subprocess.PIPE, text=True
    )
    while not (folder / "vlm" / "checkpoint-40").exists():
        assert job.poll() is None
        time.sleep(0.01)
    begin = time.monotonic()
    processes_of(job.pid)[rank].send_signal(signal.SIGKILL)
    message = job.communicate(timeout=60)[1]
    assert time.monotonic() - begin < 60 and job.returncode != 0
    assert "Signal 9 (SIGKILL)" in message
    assert not (folder / "results.json").exists()
    resumed = train([sys.executable], parts, folder, {"vlm": case | {"resume": "newest"}})["vlm"]
    assert len(resumed["losses"]) == 120
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-4)


# Two machines --------------------------------------------------------------------------------------------------------


def ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True, check=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, as 10.77.0.1 and 10.77.0.2."""
    names = [f"sigphi-{os.getpid()}-{number}" for number in range(2)]
    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine lets no network namespaces be made: {error}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_machines_train_like_one_process(machines, alone, parts, tmp_path):
    cases = {name: CASES[name] for name in ("`train-siglip`", "`train-vlm --bits 16`")}
    words = [str(ROOT / "tests" / "launched.py"), str(parts), str(tmp_path), json.dumps(cases)]
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    run += ["--master_addr", "10.77.0.1", "--master_port", "29511"]
    jobs = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *run, "--node_rank", str(number), *words],
            env=environment(tmp_path) | {"GLOO_SOCKET_IFNAME": "cable", "TP_SOCKET_IFNAME": "cable"},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, name in enumerate(machines)
    ]
    for job in jobs:
        message = job.communicate(timeout=600)[1]
        assert job.returncode == 0, message[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    for name in cases:
        assert "DistributedDataParallel" in found[name]["classes"]
        assert found[name]["losses"] == pytest.approx(alone[0][name]["losses"], rel=1e-5)
