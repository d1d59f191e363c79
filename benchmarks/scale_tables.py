"""The tables of docs/scale.md, from benchmarks/results/scale.json."""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scale.json"


def found(part: str) -> Any:
    """What a part of benchmarks/scale.py has found."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))[part]["found"]


def versions(part: str) -> dict[str, str]:
    """The versions of the packages that a part has run with."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))[part]["versions"]


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of ten."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = next((power for power in range(len(units) - 1) if count < 1000 ** (power + 1)), len(units) - 1)
    value = count / 1000**power
    return f"{value:,.{0 if power == 0 or value >= 100 else 1}f} {units[power]}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lines of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def by_pairs(columns: list[dict[str, Any]], lines: dict[str, Any]) -> str:
    """A table with a column for each number of pairs; each line is a function of what is known of that number."""
    names = [f"1e{round(math.log10(one['pairs']))} pairs" for one in columns]
    return table(["", *names], [[line, *(cell(one) for one in columns)] for line, cell in lines.items()])


def sizes_table() -> str:
    """What more pairs take on the disk and in memory."""
    return by_pairs(
        found("sizes"),
        {
            f"steps of an epoch at a batch of {found('traffic')['batch']:,}": lambda one: f"{one['steps']:,}",
            "text cache, float32": lambda one: size(one["text_cache_float32_bytes"]),
            "text cache, bfloat16 or nf4": lambda one: size(one["text_cache_bfloat16_bytes"]),
            "`--image-store memory`, 32 pixels": lambda one: size(one["image_store_32_bytes"]),
            "`--image-store memory`, 224 pixels": lambda one: size(one["image_store_224_bytes"]),
        },
    )


def caches_table() -> str:
    """Files of features against their formula."""
    rows = []
    for one in found("caches"):
        counts = (f"{one[name]:,}" for name in ("rows", "formula_bytes", "file_bytes"))
        rows.append([one["kind"], f"{one['numbers_of_a_row']:,}", one["dtype"], *counts])
    head = ["cache", "numbers of a row", "type", "rows", "formula", "file"]
    return f"{table(head, rows)}\nBytes of files that the writer of the caches has made (benchmarks/scale.py).\n"


def bytes_table() -> str:
    """What the loss sends, by the formula and on the wire."""
    rows = [
        [
            f"`{one['variant']}`",
            str(one["processes"]),
            f"{one['formula_bytes']:,}",
            f"{one['sent_bytes']:,}",
            f"{one['ratio'] - 1:+.2%}",
        ]
        for one in found("communication")
    ]
    texts = found("communication")[0]["texts"]
    return (
        f"{table(['variant', 'processes', 'formula', 'sent', 'difference'], rows)}\nBytes of one process for one loss "
        f"over {texts:,} texts, in float32 on gloo, with the headers of TCP (benchmarks/scale.py).\n"
    )


def processes_table() -> str:
    """What more processes come to."""
    projected = found("traffic")
    links = list(projected["rows"][0]["seconds_of_ring_and_gradients"])
    head = [
        "processes",
        "`ring`",
        "`gather`",
        "gradients",
        *(f"both at {link} Gbit/s" for link in links),
    ]
    rows = [
        [
            str(one["processes"]),
            *(size(one[f"{name}_bytes"]) for name in ("ring", "gather", "gradient")),
            *(f"{1000 * one['seconds_of_ring_and_gradients'][link]:,.0f} ms" for link in links),
        ]
        for one in projected["rows"]
    ]
    return (
        f"{table(head, rows)}\nComputed: bytes that each process sends in a step with {projected['batch']:,} images "
        f"and as many distinct texts, {projected['weights'] / 1e6:.1f} M trained weights in float32; both: "
        f"`ring` and gradients, bytes over the speed of a link, without latency (benchmarks/scale.py).\n"
    )


def loss_table() -> str:
    """Memory of the loss, measured and explained."""
    measured = found("loss_memory")
    logit, arrays = measured["bytes_per_logit"], measured["arrays_of_embeddings"]
    rows = [
        [
            f"{one['batch']:,}",
            f"{one['chunk_size']:,}",
            f"{one['peak_mb']:,.0f} MB",
            f"{one['explained_mb']:,.0f} MB",
            f"{one['seconds']:.2f} s",
        ]
        for one in measured["rows"]
    ]
    return (
        f"{table(['images and texts', 'chunk', 'peak', 'by the constants', 'one core'], rows)}\nThe constants: "
        f"{logit:.1f} bytes for each logit of a chunk, {arrays:.1f} arrays as large as the embeddings of one side; "
        f"the largest error is {measured['largest_error']:.0%} (benchmarks/loss_memory.py, scale.py).\n"
    )


def resuming_table() -> str:
    """What comes behind a stop in the middle of a shard."""
    cases = found("resuming")
    rows = []
    for one in cases:
        cells = [f"fails: `{one['error']}`", "", ""] if "error" in one else []
        cells = cells or ["yes" if one["identical"] else "no", f"{one['lost']:,}", f"{one['repeated']:,}"]
        rows.append([one["reader"], *cells, size(one["state_bytes"])])
    return (
        f"{table(['read', 'same rows, same order', 'lost', 'twice', 'state'], rows)}\nLeft behind "
        f"{cases[0]['left_after']:,} of {cases[0]['rows']:,} rows in {cases[0]['shards']} shards, and gone on from "
        f"`state_dict()` in another process; workers are those of torchdata's `StatefulDataLoader`. datasets "
        f"{versions('resuming')['datasets']}, torchdata {versions('resuming')['torchdata']} (benchmarks/scale.py).\n"
    )


def training_table() -> str:
    """What a second process, or a second thread, brings."""
    cases = found("training")
    rows = []
    for one in cases:
        speed, over = median(one["images_per_second"]), one["over"]
        turns = f"{min(over):.2f} to {max(over):.2f}"
        rows.append([str(one["processes"]), str(one["threads"]), f"{speed:.0f}", f"{median(over):.2f}", turns])
    head = ["processes", "threads of each", "images/s", "over one of one", "turns"]
    return (
        f"{table(head, rows)}\n`--recipe cpu-small` on two cores, {cases[0]['batch']} images a step in all, drawn "
        f"pictures, {len(cases[0]['over'])} turns (benchmarks/scale.py).\n"
    )


def reading_table() -> str:
    """How many rows a second shards give."""
    rows = [
        [
            str(one["shards"]),
            str(one["processes"]),
            "decoded" if one["decoded"] else "as files",
            " + ".join(f"{count:,}" for count in one["rows_of_each"]),
            f"{one['rows_per_second']:,.0f}",
        ]
        for one in found("reading")
    ]
    head = ["shards", "processes", "images", "rows of each", "rows/s"]
    return f"{table(head, rows)}\nJPEG files of 64 pixels in parquet, the best of the turns (benchmarks/scale.py).\n"


TABLES = {
    "sizes": sizes_table,
    "caches": caches_table,
    "bytes": bytes_table,
    "processes": processes_table,
    "loss": loss_table,
    "resuming": resuming_table,
    "training": training_table,
    "reading": reading_table,
}
