"""The tables of docs/scale.md, from benchmarks/results/scale.json."""

import json
from pathlib import Path
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


def span(hours: float) -> str:
    """Hours as a person reads them."""
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.0f} days"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lines of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def pairs_table() -> str:
    """What more pairs come to."""
    projected = found("projection")
    columns = projected["by_pairs"]
    lines: dict[str, Any] = {
        f"steps of an epoch at a batch of {projected['batch']:,}": lambda one: f"{one['steps']:,}",
        "text cache, float32": lambda one: size(one["text_cache_float32_bytes"]),
        "text cache, bfloat16 or nf4": lambda one: size(one["text_cache_bfloat16_bytes"]),
        "`--image-store memory`, 32 pixels": lambda one: size(one["image_store_32_bytes"]),
        "`--image-store memory`, 224 pixels": lambda one: size(one["image_store_224_bytes"]),
        "before the first step: one core": lambda one: span(one["whole_set_core_hours"]),
        "before the first step: memory": lambda one: size(one["whole_set_held_bytes"]),
        "copy that `datasets` makes on the disk": lambda one: size(one["whole_set_copied_bytes"]),
        "cores that read and decode a stream in a day": lambda one: f"{one['cores_to_read_in_a_day']:,.1f}",
        "to read half a stream again, undecoded: one core": lambda one: span(one["hours_to_skip_half"]),
    }
    rows = [[name, *(cell(one) for one in columns)] for name, cell in lines.items()]
    return table(["", *(f"{one['pairs']:.0e} pairs".replace("e+0", "e").replace("e+", "e") for one in columns)], rows)


def constants_table() -> str:
    """The measured constants that the projection multiplies."""
    whole, caches = found("loading"), found("caches")
    rows = [
        [
            f"row of the {one['kind']} cache, {one['numbers_of_a_row']:,} numbers of {one['dtype']}",
            f"{one['formula_bytes'] / one['rows']:,.0f} bytes",
            f"{one['file_bytes'] / one['rows']:,.1f} bytes",
        ]
        for one in caches
    ]
    for one in found("image_store"):
        formula = f"{3 * one['size'] ** 2:,.0f} bytes"
        rows.append([f"image in memory at {one['size']} pixels", formula, f"{one['bytes']:,.0f} bytes"])
        rows.append([f"decoding and resizing it to {one['size']} pixels", "", f"{1e6 * one['seconds']:,.0f} µs"])
    rows.append(["row of `--dataset`: copy on the disk", "", f"{whole['copied_bytes']:,.0f} bytes"])
    rows.append(["row of `--dataset`: memory held", "", f"{whole['held_bytes']:,.0f} bytes"])
    rows.append(["row of `--dataset`: making the copy", "", f"{1e6 * whole['copy_seconds']:,.0f} µs"])
    rows.append(["row of `--dataset`: hashes, texts, held-out share", "", f"{1e6 * whole['seconds']:,.0f} µs"])
    few, many = whole["rows"]
    return (
        f"{table(['', 'formula', 'measured'], rows)}\nSeconds are those of one core. Images of `--dataset`: JPEG "
        f"files of 64 pixels, one text each; {few:,} rows against {many:,} (benchmarks/scale.py).\n"
    )


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
    projected = found("projection")
    links = list(projected["by_processes"][0]["seconds_of_ring_and_gradients"])
    head = [
        "processes",
        "`ring`",
        "`gather`",
        "gradients",
        *(f"ring and gradients at {link} Gbit/s" for link in links),
    ]
    rows = [
        [
            str(one["processes"]),
            *(size(one[f"{name}_bytes"]) for name in ("ring", "gather", "gradient")),
            *(f"{1000 * one['seconds_of_ring_and_gradients'][link]:,.0f} ms" for link in links),
        ]
        for one in projected["by_processes"]
    ]
    return (
        f"{table(head, rows)}\nComputed: bytes that each process sends in a step with {projected['batch']:,} images "
        f"and as many distinct texts, {projected['parameters'] / 1e6:.1f} M trained parameters in float32; both: "
        f"`ring` and gradients, bytes over the speed of a link, without latency (benchmarks/scale.py).\n"
    )


def training_table() -> str:
    """One process against two."""
    one, two = found("training")["rows"]
    rows = [
        [
            str(case["processes"]),
            f"{case['batch'] / case['seconds']:,.0f}",
            f"{1000 * case['processor_seconds'] / case['batch']:.2f}",
            f"{case['sent_bytes'] / 1e6:,.2f} MB",
            f"{case['formula_bytes'] / 1e6:,.2f} MB",
        ]
        for case in (one, two)
    ]
    head = ["processes", "images/s", "ms of a core for an image", "sent by each", "formula"]
    return (
        f"{table(head, rows)}\nThe image tower of the recipe `cpu-small` in float32, {one['batch']} images in a step, "
        f"processes of one thread: the quickest step (images/s) and the least time of the cores "
        f"(benchmarks/scale.py).\n"
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


def reading_table() -> str:
    """Rows a second from shards."""
    cases = found("reading")
    rows = [
        [
            str(one["shards"]),
            str(one["processes"]),
            "decoded" if one["decoded"] else "as files",
            f"{one['rows_per_second']:,.0f}",
            f"{one['processor_seconds_per_1000_rows']:.2f} s",
        ]
        for one in cases
    ]
    total = sum(cases[0]["rows_of_each"])
    head = ["shards", "processes", "images", "rows/s", "of the cores for 1,000 rows"]
    return (
        f"{table(head, rows)}\n{total:,} rows of JPEG files of 64 pixels in parquet; the best of several turns "
        f"(benchmarks/scale.py).\n"
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


TABLES = {
    "pairs": pairs_table,
    "constants": constants_table,
    "bytes": bytes_table,
    "processes": processes_table,
    "training": training_table,
    "loss": loss_table,
    "reading": reading_table,
    "resuming": resuming_table,
}
