"""The guides' commands run, in order, at toy size on a CPU, and end as the guides say."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Originals
from hub_stub import HubStub

from sigphi import SiglipResNetModel, cli
from sigphi.hub_card.release import stage
from sigphi.train.images import load_images

ROOT = Path(__file__).parents[1]
GUIDES = ("one_gpu", "many_gpus", "without_make", "troubleshooting")
# What a guide says to do before anything else, and what only a person can do.
BEFOREHAND = ("pip install", "-m pip install", "-m venv", "hf auth login")
OWNER = "alice"


def guide(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def toy_options(text: str) -> dict[str, list[str]]:
    """The options that a guide says are added to its commands, by a part of each command."""
    (table,) = re.findall(r"<!-- toy -->\n(.*?)<!-- /toy -->", text, re.DOTALL)
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", table, re.MULTILINE)
    assert rows
    return {part: options.split() for part, options in rows}


def commands(text: str) -> list[str]:
    """The lines of all blocks of shell commands, with the toy options at their ends."""
    added = toy_options(text)
    lines = [line for block in blocks(text, "bash") for line in block.strip().splitlines()]
    lines = [line.split("  #")[0] for line in lines if not any(word in line for word in BEFOREHAND)]
    unused = [part for part in added if not any(part in line for line in lines)]
    assert unused == []
    result = []
    for line in lines:
        words, background = line.removesuffix(" &"), line[len(line.removesuffix(" &")) :]
        options = [option for part, options in added.items() if part in line for option in options]
        result.append(" ".join([words, *options]) + background)
    return result


@pytest.fixture(scope="module")
def hub(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStub]:
    """A Hub where the models and images that the commands take by default are toys."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures = {}
    for split, count in (("train", 200), ("test", 100)):
        load_images("synthetic:200", split).select(range(count)).to_parquet(folder / split)
        pictures[f"data/{split}-00000-of-00001.parquet"] = (folder / split).read_bytes()
    with HubStub(OWNER) as stub:
        stub.add("uoft-cs/cifar10", pictures, "datasets")
        stub.add("microsoft/phi-2", {path.name: path.read_bytes() for path in toy_base.iterdir() if path.is_file()})
        yield stub


@pytest.fixture(scope="module")
def environment(hub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands find: this Python first, the stand-in Hub, a home of their own."""
    home = tmp_path_factory.mktemp("home")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | hub.environment(home / "hf") | given


def shell(lines: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run lines of a shell, which ends at the first that fails."""
    for line in lines:
        if line.endswith(" &"):
            line = line.removesuffix(" &")
            beside = subprocess.Popen(shlex.split(line), cwd=folder, env=environment, stderr=subprocess.DEVNULL)
            continue
        result = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stderr[-3000:]}"
        if "--node_rank 1" in line:
            assert beside.wait(60) == 0


@pytest.mark.slow
def test_from_a_csv_to_the_hub_on_one_gpu(
    hub: HubStub, environment: dict[str, str], run_stranger: Callable[..., str], tmp_path: Path
) -> None:
    text = guide("one_gpu")
    shell(commands(text), tmp_path, environment)
    names = ("cifar10-siglip", "cifar10-vlm", "cifar10-vlm-merged")
    assert all("README.md" in hub.files(f"{OWNER}/{name}") for name in names)
    (code,) = blocks(text, "python")
    picture = "from PIL import Image\nImage.new('RGB', (32, 32), 'red').save('picture.png')\n"
    answer = run_stranger(picture + code, **hub.environment(tmp_path / "reader"))
    assert answer.endswith("\n")


@pytest.mark.slow
def test_on_many_gpus(environment: dict[str, str], toy_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_bytes(toy_csv.read_bytes())
    shell(commands(guide("many_gpus")), tmp_path, environment)
    names = ("siglip", "vlm", "ddp", "two")
    assert all((tmp_path / "outputs" / name / "model.safetensors").exists() for name in names)


@pytest.mark.slow
def test_without_make(environment: dict[str, str], tmp_path: Path) -> None:
    text = guide("without_make")
    lines = [line for block in blocks(text, "bash") for line in block.splitlines() if "pip" not in line]
    lines = [line for line in lines if "-m venv" not in line]
    assert lines == [".venv/bin/python -m sigphi --help"]
    (code,) = blocks(text, "python")
    shell([f"{sys.executable} -m sigphi --help", f"{sys.executable} -c {shlex.quote(code)}"], tmp_path, environment)
    assert (tmp_path / "qa.csv").exists()
    targets = re.findall(r"^\| `make ([\w-]+)`", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


# Troubleshooting -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(
    shared: Originals,
    save_toy_vlm: Callable[..., Path],
    toy_csv: Path,
    toy_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder in which the guide's mistakes can be made."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "qa.csv").write_bytes(toy_csv.read_bytes())
    header = ",".join(["Dataset_Index", *(f"{letter}{pair}" for letter in "QA" for pair in range(1, 6))])
    for name, index, answer in (("old", 7, "A cat."), ("failed", 7, "ERROR: timeout"), ("far", 10000, "A cat.")):
        (folder / f"{name}.csv").write_text(f"{header}\n{index},What is it?,,,,,{answer},,,,\n")
    save_toy_vlm(folder / "outputs" / "vlm", bits=16)
    (folder / "base").symlink_to(toy_base)
    config = folder / "outputs" / "vlm" / "config.json"
    config.write_text(config.read_text().replace(str(toy_base), str(folder / "base")))
    (folder / "outputs" / "started" / "checkpoint-5").mkdir(parents=True)
    shared["encoder"].save_pretrained(folder / "encoder")
    (folder / "outputs" / "altered").mkdir()
    stage(folder / "encoder", folder / "outputs" / "altered", {})
    with (folder / "outputs" / "altered" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"x")
    return folder


def mistakes() -> list[tuple[str, str]]:
    """The commands of the troubleshooting guide, and what each says."""
    found = []
    for block in blocks(guide("troubleshooting"), "console"):
        command, _, message = block.partition("\n")
        found.append((command.removeprefix("$ "), message))
    assert found
    return found


def said(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The error that a command ends with, and code 2; paths are cut to begin in `folder`."""
    words = shlex.split(command)
    monkeypatch.chdir(folder)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words.pop(0) == "sigphi"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    # Above it may stand what the command has found until then.
    return re.sub(r"^.*(?=^sigphi \S+: error: )", "", capsys.readouterr().err, flags=re.DOTALL | re.MULTILINE).replace(
        f"{folder}/", ""
    )


@pytest.mark.parametrize("number", range(len(mistakes())))
def test_a_mistake_gets_the_message_of_the_guide(
    bench: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, message = mistakes()[number]
    assert said(command, bench, monkeypatch, capsys) == message


def test_the_guide_quotes_what_loading_says_of_altered_weights(bench: Path) -> None:
    (quoted,) = blocks(guide("troubleshooting"), "text")
    with pytest.raises(OSError, match="is not the file that was published") as caught:
        SiglipResNetModel.from_pretrained(bench / "outputs" / "altered")
    found = re.sub(r"[0-9a-f]{12}", "...", str(caught.value).replace(f"{bench}/", ""))
    assert f"OSError: {found}\n" == quoted


# The pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere_and_the_readme_leads_here(name: str) -> None:
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", guide(name))
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []
    assert f"(docs/{name}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
