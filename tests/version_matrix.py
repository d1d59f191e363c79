"""Does what is trained and pushed with one version of transformers load with another, where sigphi is not installed?

    python tests/version_matrix.py dist/sigphi-0.1.0-py3-none-any.whl --output benchmarks/results/version_matrix.json

Four virtual environments are made: two with sigphi from the wheel, one of which has the lowest versions that setup.cfg
allows and the other the newest, and two without it, for readers, which get from pip just what the cards name, in the
same versions. In each of the first an encoder and the three forms of a VLM are trained and pushed to a stand-in Hub,
then pulled by a new process with a new HOME, asked, and trained one step further. Each of the others runs the code of
all the cards. What is loaded is compared with what the process that saved it had in memory: the same numbers to the
last bit where the versions are the same, 1e-5 (encoder, float32) or the same greedy tokens (VLM) across them.

Packages that make no difference, PyTorch above all, are links to those of the environment that runs this script;
`--torch VERSION` installs another one beside the lowest versions.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from configparser import ConfigParser
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import torch
from hub_stub import HubStub
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
SITE = Path(sysconfig.get_path("purelib"))
EDGES = ("oldest", "newest")
# Their cards name the same packages, and each group's more than those of the group before.
READ_TOGETHER = (("encoder", "merged"), ("nf4",), ("adapter",))
FORMS = [form for forms in READ_TOGETHER for form in forms]
TOLERANCE = 1e-5
FURTHER = """
import sys
from PIL import Image
from sigphi import cli

encoder, adapter, *data = sys.argv[1:]
Image.new("RGB", (32, 32), "red").save("image.png")
cli.main(["train-siglip", "--siglip-checkpoint", encoder, "--batch-size", "32", "--output-dir", "more-encoder", *data])
cli.main(["train-vlm", "--vlm-checkpoint", adapter, "--batch-size", "64", "--output-dir", "more-vlm", *data])
cli.main(["ask", adapter, "image.png", "-q", "What is the main object in this image?"])
"""


def log(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


# Environments --------------------------------------------------------------------------------------------------------


def bounds() -> dict[str, str]:
    """The lowest version that setup.cfg allows, by package; of PyTorch there is none here, see `--torch`."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["qlora"]
    found = {}
    for requirement in map(Requirement, lines.split()):
        lowest = [one.version for one in requirement.specifier if one.operator == ">="]
        if lowest and requirement.name != "torch":
            found[requirement.name] = lowest[0]
    return found


def installed() -> dict[str, Distribution]:
    """What is installed where this script runs, by normalised name."""
    return {normal(one.metadata["Name"]): one for one in distributions(path=[str(SITE)])}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs_of(names: set[str]) -> set[str]:
    """Packages, and all that they need."""
    there, todo, found = installed(), set(names), set()
    while todo:
        name = todo.pop()
        if name in found or name not in there:
            continue
        found.add(name)
        needs = (Requirement(line) for line in there[name].requires or [])
        extras = ["", "cublas", "cudart", "cufft", "cufile", "cupti", "curand", "cusolver", "cusparse", "nvjitlink"]
        extras += ["nvrtc", "nvtx"]  # what PyTorch asks of cuda-toolkit
        todo |= {
            normal(need.name)
            for need in needs
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        }
    return found


def make_environment(folder: Path, shared: set[str]) -> Path:
    """A virtual environment that sees the packages `shared` of this one, and no other; returns its Python."""
    if folder.exists():
        return folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    links = folder / "shared"
    links.mkdir()
    there = installed()
    for name in shared & there.keys():
        tops = {path.parts[0] for path in there[name].files or [] if path.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (links / top).exists():
                (links / top).symlink_to(SITE / top)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(f"{links}\n")
    return folder / "bin" / "python"


def pip_install(python: Path, requirements: list[str], versions: dict[str, str], *options: str) -> None:
    """Install into another environment; `versions` pins what it names."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("".join(f"{name}=={version}\n" for name, version in versions.items()))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--upgrade", "--no-compile"]
        command += ["--disable-pip-version-check", "--constraint", constraints.name]
        subprocess.run([*command, *options, *requirements], check=True)


# Processes -----------------------------------------------------------------------------------------------------------


def run(command: list[Any], home: Path, hub: HubStub, job: dict[str, Any] | None = None) -> str:
    """Run a command in a fresh HOME, where it finds the stand-in Hub; returns what it prints."""
    (home / "work").mkdir(parents=True)
    given = {name: value for name, value in hub.environment(home).items() if name != "HF_HOME"}
    given |= {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    result = subprocess.run(
        list(map(str, command)),
        cwd=home / "work",
        env=given,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stderr[-6000:]}")
    return result.stdout


def result_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a writer or reader has left: tensors by repository and name, and its report."""
    return torch.load(folder / "results.pt"), json.loads((folder / "report.json").read_text())


def write(edge: str, python: Path, scratch: Path, hub: HubStub) -> tuple[dict[str, Any], dict[str, str]]:
    """Train, push, and in new processes ask and train further; gives what the models in memory gave, and versions."""
    folder = scratch / f"written-{edge}"
    folder.mkdir()
    repos = {name: f"tester/{edge}-{name}" for name in ("base", *FORMS)}
    run([python, TESTS / "matrix_writer.py"], scratch / f"home-{edge}", hub, {"folder": str(folder), "repos": repos})
    results, report = result_of(folder)
    data = ["--input-csv", folder / "qa.csv", "--images", "synthetic:200", "--max-steps", "1", "--report-to", "none"]
    command = [python, "-c", FURTHER, repos["encoder"], repos["adapter"], *data]
    run(command, scratch / f"home-{edge}-further", hub)
    return results, report["versions"]


def packages_of(card: str) -> list[str]:
    """What the card tells to install."""
    return re.findall(r"`pip install ([^`]+)`", card)[0].split()


def code_of(card: str) -> str:
    """All blocks of Python of a card."""
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


def read(
    edge: str, python: Path, scratch: Path, hub: HubStub, versions: dict[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the cards' code of all repositories, each with no other packages than its card names and those before."""
    results: dict[str, Any] = {}
    reports = []
    for forms in READ_TOGETHER:
        repos = [f"tester/{writer}-{form}" for form in forms for writer in EDGES]
        cards = {repo: hub.files(repo)["README.md"].decode() for repo in repos}
        (packages,) = {tuple(packages_of(card)) for card in cards.values()}
        log(f"  {edge}, {' and '.join(forms)}: pip install {' '.join(packages)}")
        pip_install(python, list(packages), versions)
        folder = scratch / f"read-{edge}-{forms[0]}"
        job = {"folder": str(folder), "cards": {repo: code_of(card) for repo, card in cards.items()}}
        folder.mkdir()
        run([python, TESTS / "matrix_reader.py"], scratch / f"home-{folder.name}", hub, job)
        found, report = result_of(folder)
        results |= found
        reports.append(report | {"packages": list(packages)})
    return results, reports


# Figures -------------------------------------------------------------------------------------------------------------


def compare(written: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far what was loaded is from what was saved."""
    differences = {
        name: (written[name].double() - found[name].double()).abs().max().item()
        for name in written
        if written[name].shape == found[name].shape
    }
    line: dict[str, Any] = {"max_difference": {name: value for name, value in differences.items() if name != "tokens"}}
    if "tokens" in written:
        line["identical_tokens"] = differences.get("tokens") == 0
    line["equal"] = len(differences) == len(written) and not any(differences.values())
    return line


def is_right(line: dict[str, Any]) -> bool:
    """Whether a comparison is what is promised."""
    if line["writer"] == line["reader"] and not line["other_torch"]:
        return line["equal"]
    if line["form"] == "encoder":
        numbers = ("image_embeds", "text_embeds", "logits")
        return all(line["max_difference"].get(name, 1.0) <= TOLERANCE for name in numbers)
    return line["identical_tokens"]


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All of the file of results."""
    lowest = bounds()
    places = (arguments.environments or scratch).resolve()
    vary = {normal(name) for name in lowest} | {"sigphi", "tokenizers", "safetensors", "hf-xet"}
    pythons, tables = {}, {}
    for edge in EDGES:
        versions = dict(lowest) if edge == "oldest" else {}
        is_other = arguments.torch is not None and edge == "oldest"
        here = {name: installed()[name].version for name in ("torch", "torchvision")}
        versions |= {"torch": arguments.torch} if is_other else here
        heavy = needs_of({"torch", "torchvision"})
        shared = {"write": set(installed()) - vary - {"pip"}, "read": heavy}
        for role in shared:
            packages = (shared[role] - heavy) if is_other else shared[role]
            pythons[edge, role] = make_environment(places / f"{role}-{edge}", packages)
        log(f"{edge}: pip install {arguments.wheel.name}[qlora]" + " with the lowest versions" * (edge == "oldest"))
        wheel = f"sigphi[qlora] @ {arguments.wheel.resolve().as_uri()}"
        pip_install(pythons[edge, "write"], [wheel], versions)
        # An environment of an earlier run may have another wheel of the same version.
        pip_install(pythons[edge, "write"], [wheel], versions, "--force-reinstall", "--no-deps")
        tables[edge] = versions
    with HubStub() as hub:
        written: dict[str, Any] = {}
        versions_of = {}
        for edge in EDGES:
            log(f"{edge}: train, push, ask, train one step further")
            found, versions_of[edge] = write(edge, pythons[edge, "write"], scratch, hub)
            written |= found
        lines, readers = [], {}
        for edge in EDGES:
            log(f"{edge}: read")
            pins = {name: versions_of[edge][name] for name in tables[edge] if name in versions_of[edge]}
            found, readers[edge] = read(edge, pythons[edge, "read"], scratch, hub, pins)
            for repo in found:
                writer, _, form = repo.partition("/")[2].partition("-")
                (report,) = (one["repos"][repo] for one in readers[edge] if repo in one["repos"])
                line = {"form": form, "writer": writer, "reader": edge, "dtype": report["dtype"]}
                line |= {"other_torch": versions_of[writer]["torch"] != readers[edge][0]["versions"]["torch"]}
                line |= compare(written[repo], found[repo]) | {"losses_of_a_step": report["losses"]}
                line["as_promised"] = is_right(line) and report["losses"][1] < report["losses"][0]
                lines.append(line)
    return {
        "writers": versions_of,
        "readers": {
            edge: [{key: one[key] for key in ("packages", "versions")} for one in readers[edge]] for edge in EDGES
        },
        "comparisons": lines,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The comparisons, to be read."""
    rows = ["form      dtype     writer  reader  largest difference of logits  equal  tokens  as promised"]
    for line in lines:
        difference = line["max_difference"].get("logits", float("nan"))
        tokens = {True: "same", False: "OTHER", None: "-"}[line.get("identical_tokens")]
        cells = (line["form"], line["dtype"], line["writer"], line["reader"], f"{difference:.3g}")
        rows.append(
            "{:<9} {:<9} {:<7} {:<7} {:<29} ".format(*cells)
            + f"{'yes' if line['equal'] else 'no':<6} {tokens:<7} {'yes' if line['as_promised'] else 'NO'}"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="of sigphi, see `make wheel`")
    parser.add_argument("--output", type=Path, help="JSON file of results")
    parser.add_argument("--torch", help="version of PyTorch beside the lowest versions, by default the one used here")
    parser.add_argument("--environments", type=Path, help="folder of the environments, for another run to find")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="version-matrix-") as scratch:
        results = measure(arguments, Path(scratch).resolve())
    sys.stdout.write(table(results["comparisons"]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    log(f"{time.monotonic() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    wrong = [line for line in results["comparisons"] if not line["as_promised"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(results['comparisons'])} comparisons are not as promised")


if __name__ == "__main__":
    main()
