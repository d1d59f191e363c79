"""The code that travels with an artifact: how imports are flattened, and which files go along."""

import ast
import sys
from pathlib import Path

import pytest

from sigphi import SiglipResNetConfig, SiglipResNetProcessor, SigPhiConfig, SigPhiProcessor
from sigphi.configuration.hub_code import flatten, hub_files

ENCODER_FILES = {"configuration_siglip_resnet.py", "hub_code.py", "modeling_siglip_resnet.py"}
SIGPHI_MODEL = "sigphi.modeling.modeling_sigphi"


@pytest.mark.parametrize(
    ("source", "flat"),
    [
        ("from sigphi.configuration.hub_code import A", "from .hub_code import A"),
        ("from sigphi.a import b", "from .a import b"),
        ("from sigphi.a.b.c import d as e, f", "from .c import d as e, f"),
        ("from sigphi.a.b import (\n    c,\n    d,\n)", "from .b import (\n    c,\n    d,\n)"),
        ("def f():\n    from  sigphi.a.b  import c\n    return c", "def f():\n    from  .b  import c\n    return c"),
        ("from .b import c", "from .b import c"),
    ],
)
def test_flatten_rewrites_imports_of_this_package(source, flat):
    assert flatten(source) == flat


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nfrom torch import nn\nimport numpy as np",
        "import sigphi_extras\nfrom sigphi_extras.a import b",
        "from other.sigphi.a import b",
        "x = 'from sigphi.a.b'",
    ],
)
def test_flatten_leaves_everything_else(source):
    assert flatten(source) == source


@pytest.mark.parametrize(
    ("source", "line", "statement"),
    [
        ("import sigphi", 1, "import sigphi"),
        ("\nimport sigphi.a.b as b", 2, "import sigphi.a.b as b"),
        ("import os, sigphi.a", 1, "import os, sigphi.a"),
        ("def f():\n    import sigphi.a", 2, "import sigphi.a"),
        ("from sigphi import a", 1, "from sigphi import a"),
        ("from . import x", 1, "from . import x"),
        ("from .. import x", 1, "from .. import x"),
        ("from ..x import y", 1, "from ..x import y"),
        ("from .x.y import z", 1, "from .x.y import z"),
    ],
)
def test_flatten_refuses_what_a_flat_repository_cannot_resolve(source, line, statement):
    with pytest.raises(ValueError, match=rf"line {line}: `{statement}` cannot be shipped to a flat repository"):
        flatten(source)


def test_hub_files_are_the_closure_of_the_imports():
    files = hub_files([SIGPHI_MODEL])
    assert set(files) == ENCODER_FILES | {"configuration_sigphi.py", "modeling_sigphi.py"}


def test_hub_files_take_each_module_once():
    assert hub_files([SIGPHI_MODEL, SIGPHI_MODEL]) == hub_files([SIGPHI_MODEL])


@pytest.mark.parametrize("owner", [SiglipResNetConfig, SigPhiConfig, SiglipResNetProcessor, SigPhiProcessor])
def test_shipped_files_import_nothing_of_this_package_and_only_each_other(owner):
    files = hub_files(name.rpartition(".")[0] for name in owner.hub_auto_map.values())
    for source in files.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != "sigphi"


def test_hub_auto_map_names_what_exists():
    for owner in (SiglipResNetConfig, SigPhiConfig, SiglipResNetProcessor, SigPhiProcessor):
        for name in owner.hub_auto_map.values():
            module, _, attribute = name.rpartition(".")
            assert getattr(sys.modules[module], attribute).__module__ == module


def make_package(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        (path.parent / "__init__.py").touch()


def test_hub_files_refuse_two_files_of_one_name(tmp_path, monkeypatch):
    make_package(tmp_path, {"flatclash/a/same.py": "x = 1\n", "flatclash/b/same.py": "x = 2\n"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"flatclash\.[ab]\.same: same\.py cannot be shipped .* \(name taken"):
        hub_files(["flatclash.a.same", "flatclash.b.same"])


def test_hub_files_refuse_a_package():
    with pytest.raises(ValueError, match=r"sigphi\.configuration: __init__\.py cannot be shipped .* or a package"):
        hub_files(["sigphi.configuration"])


def test_hub_files_refuse_a_module_that_does_not_exist():
    with pytest.raises(ValueError, match=r"sigphi\.configuration\.nothing: there is no such module to ship"):
        hub_files(["sigphi.configuration.nothing"])


@pytest.mark.parametrize("config_class", [SiglipResNetConfig, SigPhiConfig])
def test_saving_a_config_writes_the_flat_files(tmp_path, config_class):
    config = config_class()
    config.save_pretrained(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    assert written == hub_files(name.rpartition(".")[0] for name in config_class.hub_auto_map.values())
    assert config.auto_map["AutoConfig"] == f"configuration_{config_class.model_type}.{config_class.__name__}"
    assert set(config.auto_map) == set(config_class.hub_auto_map)
    for name in config.auto_map.values():
        module, attribute = name.split(".")
        assert f"class {attribute}(" in written[f"{module}.py"]
