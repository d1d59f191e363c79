"""What `import sigphi` costs, and what the wheel holds."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sigphi

ROOT = Path(__file__).parent.parent

# The folder of each package in the checkout, by its place in the wheel.
PACKAGES = {
    "sigphi": "sigphi",
    "sigphi/configuration": "configuration",
    "sigphi/modeling": "modeling",
    "sigphi/processing": "processing",
    "sigphi/train": "train",
    "sigphi/hub_card": "hub_card",
}

EXTRAS = (
    *("bitsandbytes", "deepspeed", "evaluate", "faiss", "gradio", "matplotlib", "open_clip", "rouge_score"),
    *("sacrebleu", "tensorboard"),
)


def run_python(code: str, *options: str, cwd: Path | None = None) -> str:
    """Run `code` in a new process and return what it writes."""
    command = [sys.executable, *options, "-c", code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    code = """
import json, sys, time
start = time.perf_counter()
import sigphi
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""
    seconds, heavy = json.loads(run_python(code))
    assert heavy == []
    assert seconds < 1


def test_dir_lists_the_public_names():
    assert {"__version__", "SigPhiConfig", "SiglipResNetModel", "VlmTrainer", "sigmoid_loss"} <= set(dir(sigphi))
    assert sorted(dir(sigphi)) == sorted(sigphi.__all__)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'sigphi' has no attribute 'SigFi'"):
        _ = sigphi.SigFi


def test_public_names_need_no_extra():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
import sigphi
for name in sigphi.__all__:
    value = getattr(sigphi, name)
    assert name == "__version__" or value.__name__ == name, name
"""
    run_python(code)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the checkout without what git ignores, so that building leaves no trace in it."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    copy = tmp_path_factory.mktemp("sources")
    for name in filter(None, listing.split("\0")):
        # git lists a tracked file that the working tree has lost.
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--no-cache-dir", "--disable-pip-version-check", *map(str, words)]
    result = subprocess.run(command, env={**os.environ, "PIP_NO_INDEX": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_six_packages_and_all_their_files(sources, wheel):
    expected = {
        f"{package}/{path.relative_to(sources / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (sources / folder).rglob("*")
        if path.is_file()
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "sigphi/py.typed" in names


def test_wheel_has_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "sigphi = sigphi.cli:main" in archive.read(entry_points).decode()


def test_installed_wheel_is_what_a_process_imports(wheel, tmp_path):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--target", target, wheel)
    # The import hook of an editable install comes after the path, so the first folder of the path wins. `-I` keeps
    # PYTHONPATH and the current folder out.
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import sigphi, sigphi.cli, sigphi.train.errors
print(sigphi.__file__, sigphi.cli.__file__, sigphi.train.errors.__file__, sep="\\n")
"""
    files = run_python(code, "-I", cwd=tmp_path).split()
    assert files == [str(target / "sigphi" / name) for name in ("__init__.py", "cli.py", "train/errors.py")]
