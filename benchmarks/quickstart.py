"""The quickstart's figures and seconds, as a result file.

    python benchmarks/quickstart.py --output-dir runs/quickstart

A folder whose report is there already is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from provenance import commit

from sigphi.train.records import write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "quickstart.json"


def main() -> None:
    """Run the quickstart where it has not run, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    folder = parser.parse_args().output_dir
    if not (folder / "report.json").exists():
        subprocess.run([sys.executable, "-m", "sigphi", "quickstart", "--output-dir", str(folder)], check=True)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    write_json(RESULTS, {"commit": commit(), "cores": os.cpu_count(), **report})


if __name__ == "__main__":
    main()
