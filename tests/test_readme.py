"""The README says what the result files say, and its code runs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{name}.md" for name in ("encoder", "plan", "scale", "vlm"))])
def test_figures_are_those_of_the_committed_files(file: str) -> None:
    code = f"import readme; print(readme.render({file!r}), end='')"
    rendered = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    ).stdout
    assert rendered == (ROOT / file).read_text(encoding="utf-8")
    assert re.search(r"<!-- ([\w-]+) -->\n\|.*<!-- /\1 -->", rendered, re.DOTALL)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.slow
def test_quickstart_reaches_its_figures_and_the_readme_loads_what_it_leaves(
    tmp_path: Path, run_stranger: Callable[..., str]
) -> None:
    folder = tmp_path / "runs" / "quickstart"
    command = [sys.executable, "-m", "sigphi", "quickstart", "--output-dir", str(folder), "--test-images", "200"]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    ).stdout
    figures = {name: float(value) for name, value in re.findall(r"\| (\S+) \| (-?\d\.\d+) \|", output)}
    assert figures["zero_shot_top1"] >= 0.90
    assert figures["class_accuracy"] >= 0.85
    assert figures["image_gain"] >= 0.40
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    answer = run_stranger(f"import os; os.chdir({str(tmp_path)!r})\n" + "\n".join(blocks))
    assert len(answer.split()) >= 3
