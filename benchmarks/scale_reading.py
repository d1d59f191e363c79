"""How a stream of shards is read and gone on with, by `datasets` alone: parts of benchmarks/scale.py."""

import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from PIL import Image
from scale_processes import in_processes, tell
from torchdata.stateful_dataloader import StatefulDataLoader

PIXELS = 64  # of a side
WORDS = "a small photo of one red truck and two brown dogs under green trees by the blue lake at noon".split()
BATCH = 50
SEED = 0
ROWS, SHARDS, LEFT_AFTER = 2_000, 4, 700
TURNS = 3


def _picture(row: int) -> bytes:
    """A JPEG file of smooth noise, another one for each row."""
    coarse = np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _text(row: int) -> str:
    words = np.random.default_rng(row).choice(WORDS, 10)
    return f"{' '.join(words)} {row}"


def _write(rank: int, processes: int, folder: Path, shards: int) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "row": datasets.Value("int64")}
    )
    content = {"image": [{"bytes": _picture(row), "path": None} for row in range(ROWS)]}
    content |= {"text": [_text(row) for row in range(ROWS)], "row": list(range(ROWS))}
    table = datasets.Dataset.from_dict(content, features)
    for shard in range(shards):
        part = table.shard(shards, shard, contiguous=True)
        part.to_parquet(str(folder / f"train-{shard:05}-of-{shards:05}.parquet"), batch_size=100)


def _plain(folder: Path, decoded: bool = False) -> Any:
    """The shards of a folder in order, images decoded or as files."""
    found = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
    return found.cast_column("image", datasets.Image(decode=decoded))


def _read(rank: int, processes: int, folder: Path, decoded: bool) -> tuple[int, float]:
    """How many rows this process was given, in how many seconds."""
    rows = split_dataset_by_node(_plain(folder, decoded), rank, processes)
    start = time.perf_counter()
    count = sum(1 for _ in rows)
    return count, time.perf_counter() - start


def reading() -> list[dict[str, Any]]:
    """Rows a second of one process and of two that share the shards, images decoded or as files; the best turn's."""
    cases = [(count, processes, decoded) for count in (1, 2, 4) for processes in (1, 2) for decoded in (True, False)]
    found: dict[tuple[int, int, bool], list[list[tuple[int, float]]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 4):
            Path(folder, str(count)).mkdir()
            in_processes(_write, 1, Path(folder, str(count)), count)
        for _ in range(TURNS):
            for (count, processes, decoded), turns in found.items():
                turns.append(in_processes(_read, processes, Path(folder, str(count)), decoded))
    return [
        {
            "shards": count,
            "processes": processes,
            "decoded": decoded,
            "rows_of_each": [rows for rows, _ in turns[0]],
            "rows_per_second": ROWS / min(max(seconds for _, seconds in turn) for turn in turns),
        }
        for (count, processes, decoded), turns in found.items()
    ]


def _shuffled(folder: Path, buffer_size: int) -> Any:
    return _plain(folder).shuffle(seed=SEED, buffer_size=buffer_size)


def _loader(rows: Any) -> Any:
    return StatefulDataLoader(rows, batch_size=BATCH, num_workers=2, collate_fn=_row_numbers)


def _row_numbers(rows: list[dict[str, Any]]) -> list[int]:
    return [row["row"] for row in rows]


def _numbers(source: Any) -> Iterator[int]:
    for one in source:
        yield from one if isinstance(one, list) else [one["row"]]


READERS: dict[str, Callable[[Path], Any]] = {
    "in order": _plain,
    "shuffled, buffer of one row": lambda folder: _shuffled(folder, 1),
    "shuffled, buffer of 400 rows": lambda folder: _shuffled(folder, 400),
    "two workers, in order": lambda folder: _loader(_plain(folder)),
    "two workers, shuffled, buffer of 400 rows": lambda folder: _loader(_shuffled(folder, 400)),
}


def _all(rank: int, processes: int, name: str, folder: Path) -> list[int]:
    return list(_numbers(READERS[name](folder)))


def _until(rank: int, processes: int, name: str, folder: Path, left_after: int) -> tuple[list[int], dict[str, Any]]:
    source = READERS[name](folder)
    return list(islice(_numbers(source), left_after)), source.state_dict()


def _from(rank: int, processes: int, name: str, folder: Path, state: dict[str, Any]) -> tuple[list[int], float]:
    source = READERS[name](folder)
    start = time.perf_counter()
    source.load_state_dict(state)
    numbers = _numbers(source)
    rest = [next(numbers)]
    seconds = time.perf_counter() - start
    return rest + list(numbers), seconds


def resuming() -> list[dict[str, Any]]:
    """
    Each reader is left in the middle of a shard, and another process goes on from its state.

    Returns:
        `list` of `dict`: whether all rows came as without the stop (`identical`), how many did not come (`lost`) or
        twice (`repeated`), the size of the state as JSON, and seconds to the first row behind the stop; `error` where
        the state cannot be gone on from.
    """
    with tempfile.TemporaryDirectory() as folder:
        in_processes(_write, 1, Path(folder), SHARDS)
        return [_left_and_gone_on(name, Path(folder)) for name in READERS]


def _left_and_gone_on(name: str, place: Path) -> dict[str, Any]:
    whole = in_processes(_all, 1, name, place)[0]
    first, state = in_processes(_until, 1, name, place, LEFT_AFTER)[0]
    found = {"reader": name, "rows": ROWS, "shards": SHARDS, "left_after": LEFT_AFTER}
    found["state_bytes"] = len(json.dumps(state, default=str))
    try:
        rest, seconds = in_processes(_from, 1, name, place, state)[0]
    except IndexError as error:  # of datasets 5.2, in a worker
        return found | {"error": type(error).__name__}
    seen = Counter(first + rest)
    return found | {
        "identical": first + rest == whole,
        "lost": len(set(whole) - set(seen)),
        "repeated": sum(count - 1 for count in seen.values()),
        "seconds_to_first_row": seconds,
    }


if __name__ == "__main__":
    tell({"resuming": resuming, "reading": reading})
