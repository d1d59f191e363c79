"""What benchmarks/scale.py computes; that the bytes of its formula are sent; and that streams go on as it says."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text(encoding="utf-8"))


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scale_loss
    import scale_processes
    import scale_tables

    return SimpleNamespace(loss=scale_loss, processes=scale_processes, tables=scale_tables)


def sent_in_ring(texts: int, processes: int, dim: int) -> int:
    """Bytes that one process hands on: its texts and their gradients, then those of each other process in turn."""
    passes = [2 * (texts // processes) * dim * 4 for _ in range(processes)]
    ids = [(texts // processes) * 3 * 8 for _ in range(processes - 1)]
    return sum(passes) + sum(ids)


def sent_gathered(texts: int, processes: int, dim: int) -> int:
    """Of rings: each part goes past all others, once to be known; sums go round twice, once added up and once told."""
    part = (texts // processes) * dim * 4
    ids = (texts // processes) * 3 * 8
    known = [part + ids for _ in range(processes - 1)]
    added = [part for _ in range(processes - 1)]
    told = [part for _ in range(processes - 1)]
    return sum(known + added + told)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_formula_is_the_sum_over_what_is_handed_on(benchmarks, processes):
    texts, dim = 48 * processes, 16
    handed_on = {"ring": sent_in_ring, "gather": sent_gathered}
    for variant, count in handed_on.items():
        expected = 0 if processes == 1 else count(texts, processes, dim)
        assert benchmarks.loss.loss_bytes(variant, texts, processes, dim) == pytest.approx(expected)


def test_what_was_sent_is_what_the_formula_says(benchmarks):
    rows = RESULTS["communication"]["found"]
    assert {(row["variant"], row["processes"]) for row in rows} >= {("ring", 2), ("gather", 2), ("ring", 4)}
    for row in rows:
        formula = benchmarks.loss.loss_bytes(row["variant"], row["texts"], row["processes"])
        assert row["formula_bytes"] == round(formula)
        assert row["sent_bytes"] == pytest.approx(formula, rel=0.02), row


def test_the_caches_are_as_large_as_the_page_says():
    for row in RESULTS["caches"]["found"]:
        header = row["file_bytes"] - row["formula_bytes"]
        assert 0 < header < 1_000, row


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_000, "1.0 kB"), (10_240e6, "10.2 GB"), (102.4e12, "102 TB")]
    + [(1_505e12, "1,505 TB")],
)
def test_bytes_as_a_person_reads_them(benchmarks, count, text):
    assert benchmarks.tables.size(count) == text


def test_processes_read_each_row_once():
    rows = RESULTS["reading"]["found"]
    assert {(row["shards"], row["processes"]) for row in rows} == {(s, p) for s in (1, 2, 4) for p in (1, 2)}
    for row in rows:
        assert len(row["rows_of_each"]) == row["processes"] and sum(row["rows_of_each"]) == 2_000, row


def test_speeds_are_compared_within_their_turn():
    alone, *others = RESULTS["training"]["found"]
    assert (alone["processes"], alone["threads"]) == (1, 1) and set(alone["over"]) == {1.0}
    assert [(one["processes"], one["threads"]) for one in others] == [(1, 2), (2, 1)]
    for one in others:
        turns = zip(one["images_per_second"], alone["images_per_second"], strict=True)
        assert one["over"] == pytest.approx([speed / base for speed, base in turns])


@pytest.mark.slow
def test_bytes_are_counted_anew_and_fit(benchmarks):
    in_own_network = benchmarks.processes.in_own_network
    command = in_own_network([sys.executable, str(ROOT / "benchmarks" / "scale_loss.py"), "communication"])
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode != 0 and "unshare" in found.stderr:
        pytest.skip("no network namespaces here")
    for row in json.loads(found.stdout):
        assert row["sent_bytes"] == pytest.approx(row["formula_bytes"], rel=0.03), row
