"""`sigphi data build` and `sigphi data check` at full size: seconds and memory.

    python benchmarks/data.py --images uoft-cs/cifar10 --output-dir runs/data

Builds five questions about each train image, checks that file, and checks one of twenty rows an image in which no
question comes twice: a million rows of the whole of CIFAR-10. Each command runs in a process of its own, its start and
imports included. Beside other work the seconds of the clock say nothing and those of the processor little: both are
written, and the load. The result goes to benchmarks/results/data.json.
"""

import argparse
import csv
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from provenance import provenance

from sigphi.train.qa_csv import PAIRS
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "data.json"
REPEATS = 20

# Memory is that of the command and of the process that reads for it, shared pages counted once, ten times a second.
WATCHER = """
import json, resource, subprocess, sys, time
import psutil
command, peak = subprocess.Popen(sys.argv[1:]), 0
first = psutil.Process(command.pid)
while command.poll() is None:
    try:
        peak = max(peak, sum(one.memory_full_info().pss for one in [first, *first.children(recursive=True)]))
    except psutil.Error:  # it has just ended
        pass
    time.sleep(0.1)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"processor_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_bytes": peak}))
sys.exit(command.returncode)
"""

logger = logging.getLogger(__name__)


def write_repeated(source: Path, target: Path, repeats: int) -> None:
    """Write all rows of `source` so many times, each time with other questions."""
    with source.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    questions = [header.index(f"Q{pair}") for pair in PAIRS]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for number in range(1, repeats + 1):
            for row in rows:
                asked = {column: f"Number {number}. {row[column]}" for column in questions}
                writer.writerow([asked.get(column, cell) for column, cell in enumerate(row)])


def measured(words: list[str]) -> dict[str, Any]:
    """Run `sigphi` with these words: seconds, peak memory, and the line that ends its output."""
    load, start = os.getloadavg()[0], time.perf_counter()
    command = [sys.executable, "-c", WATCHER, sys.executable, "-m", "sigphi", *words]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip().split("\n")
    facts = {
        "seconds": round(time.perf_counter() - start, 1),
        **json.loads(output[-1]),
        "load_before": round(load, 1),
        "last_line": output[-2],
    }
    logger.info("%s: %s", " ".join(words[:2]), json.dumps(facts))
    return facts


def main() -> None:
    """Run the three commands, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="uoft-cs/cifar10")
    parser.add_argument("--num-images", type=int)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/data"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    plain, repeated = options.output_dir / "plain.csv", options.output_dir / "repeated.csv"
    size = [] if options.num_images is None else ["--num-images", str(options.num_images)]
    images = ["--images", options.images]
    facts = {"build": measured(["data", "build", *images, "--image-split", "train", "--output", str(plain), *size])}
    facts["check"] = measured(["data", "check", str(plain), *images])
    write_repeated(plain, repeated, REPEATS)
    facts["check_repeated"] = measured(["data", "check", str(repeated), *images])
    options.results.parent.mkdir(exist_ok=True)
    write_json(options.results, facts | provenance())


if __name__ == "__main__":
    main()
