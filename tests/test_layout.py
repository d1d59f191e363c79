"""The rules of the folders: who imports whom, what a hub file may import, what lies at the top level."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parent.parent

# Folder -> the folders of ours that it may import, besides itself.
MAY_IMPORT = {
    "configuration": set(),
    "modeling": {"configuration"},
    "processing": {"configuration"},
    "hub_card": {"configuration", "modeling", "processing"},
    "train": {"configuration", "modeling", "processing", "hub_card"},
    "sigphi": {"configuration", "modeling", "processing", "hub_card", "train"},
}

# Hub files travel to people who have these and nothing else; safetensors comes with transformers.
HUB_FOLDERS = ("configuration", "modeling", "processing")
HUB_LIBRARIES = {"torch", "transformers", "numpy", "PIL", "safetensors", "sigphi"} | sys.stdlib_module_names

TOP_LEVEL = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "benchmarks",
    "configuration",
    "docs",
    "hub_card",
    "modeling",
    "processing",
    "pyproject.toml",
    "setup.cfg",
    "sigphi",
    "tests",
    "train",
}


def python_files(*folders: str) -> list[Path]:
    # Templates are files for other places, such as a Space's app.py, and not modules of the package.
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if "templates" not in path.parts]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of every import of a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from sigphi import modeling` imports sigphi.modeling.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "sigphi" else [module]
            yield from ((node.lineno, name) for name in names)


def faults_of_import(folder: str, name: str) -> str | None:
    top, *rest = name.split(".")
    if name.startswith("."):
        return "a relative import"
    if top in MAY_IMPORT and top != "sigphi":
        return f"write `sigphi.{name}`"
    if top != "sigphi":
        return None
    target = rest[0] if rest and rest[0] in MAY_IMPORT else "sigphi"
    allowed = MAY_IMPORT[folder] | {folder}
    return None if target in allowed else f"{folder} must not import {target}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder):
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {fault}"
        for path in python_files(folder)
        for line, name in imports(path)
        if (fault := faults_of_import(folder, name))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("folder", "name", "allowed"),
    [
        ("configuration", "torch.nn", True),
        ("configuration", "sigphi.configuration.hub_code", True),
        ("configuration", "sigphi.modeling.modeling_sigphi", False),
        ("modeling", "sigphi.configuration.configuration_sigphi", True),
        ("modeling", "sigphi.processing.processing_sigphi", False),
        ("modeling", "sigphi.SigPhiConfig", False),
        ("modeling", "configuration.configuration_sigphi", False),
        ("modeling", ".modeling_siglip_resnet", False),
        ("hub_card", "sigphi.train.errors", False),
        ("train", "sigphi.hub_card.cards", True),
    ],
)
def test_the_import_rule_itself(folder, name, allowed):
    assert (faults_of_import(folder, name) is None) == allowed


def test_imports_inside_functions_are_seen(tmp_path):
    source = tmp_path / "file.py"
    source.write_text("def f():\n    from sigphi import modeling\n    import torch.nn as nn\n")
    assert list(imports(source)) == [(2, "sigphi.modeling"), (3, "torch.nn")]


def test_hub_files_need_only_what_a_reader_has():
    # get_imports is what decides at loading time: it passes over `try:` and `if is_x_available():`.
    excess = {
        str(path.relative_to(ROOT)): sorted(foreign)
        for path in python_files(*HUB_FOLDERS)
        if path.name != "__init__.py" and (foreign := set(get_imports(path)) - HUB_LIBRARIES)
    }
    assert not excess


def test_hub_files_have_names_of_their_own():
    names = [path.name for path in python_files(*HUB_FOLDERS) if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names)), "an exported folder is flat, so one of these would overwrite the other"


def test_no_file_of_train_hides_a_package():
    # `python train/x.py` puts train/ first on the path, so that `import datasets` would find train/datasets.py.
    imported = {name.split(".")[0] for path in python_files("train") for _, name in imports(path)}
    stems = {path.stem for path in python_files("train")}
    assert not stems & (imported | sys.stdlib_module_names)


def test_nothing_else_lies_at_the_top_level():
    tracked = tracked_files()
    entries = {path.split("/")[0] for path in tracked}
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL


def test_tools_that_a_clone_runs_are_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    return (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.rstrip("\0").split("\0")
    )
