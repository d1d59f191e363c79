"""How images with texts are read: whole by `sigphi train-siglip --dataset`, and as a stream of shards by `datasets`.

Parts of benchmarks/scale.py.
"""

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from loss_memory import memory
from PIL import Image
from scale_loss import in_processes
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import SiglipImageProcessor

from sigphi.train.arguments import EncoderDataArguments
from sigphi.train.encoder_data import encoder_source
from sigphi.train.image_texts import StoredImages, read_set

PIXELS = 64  # of a side
WORDS = "a small photo of one red truck and two brown dogs under green trees by the blue lake at noon".split()
BATCH = 50
SEED = 0


def _picture(row: int) -> bytes:
    """A JPEG file of smooth noise, another one for each row."""
    coarse = np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _text(row: int) -> str:
    words = np.random.default_rng(row).choice(WORDS, 10)
    return f"{' '.join(words)} {row}"


def _write(rank: int, processes: int, folder: Path, rows: int, shards: int) -> dict[str, float]:
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "row": datasets.Value("int64")}
    )
    content = {"image": [{"bytes": _picture(row), "path": None} for row in range(rows)]}
    content |= {"text": [_text(row) for row in range(rows)], "row": list(range(rows))}
    table = datasets.Dataset.from_dict(content, features)
    for shard in range(shards):
        # As large as those of sets of images on the Hub: a hundred rows can be read without those before them.
        part = table.shard(shards, shard, contiguous=True)
        part.to_parquet(str(folder / f"train-{shard:05}-of-{shards:05}.parquet"), batch_size=100)
    return {"bytes_per_image": sum(len(one["bytes"]) for one in content["image"]) / rows}


def write_shards(folder: Path, rows: int, shards: int) -> Path:
    """A folder of parquet files with the columns `image`, `text` and `row`."""
    place = folder / f"{rows}-rows-{shards}-shards"
    if not place.exists():
        place.mkdir(parents=True)
        in_processes(_write, 1, place, rows, shards)
    return place


def stream(folder: Path, decoded: bool = False) -> datasets.IterableDataset:
    """The shards of a folder in order."""
    found = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
    return found if decoded else found.cast_column("image", datasets.Image(decode=False))


# The whole set -------------------------------------------------------------------------------------------------------


def _load_whole(rank: int, processes: int, folder: Path, cache: Path) -> dict[str, float]:
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    start = time.process_time()
    read_set(str(folder))
    prepared = time.process_time()
    copied = sum(path.stat().st_size for path in cache.rglob("*.arrow"))
    before = memory("RssAnon")
    arguments = EncoderDataArguments(dataset=str(folder), image_store="arrow")
    source, make_rows = encoder_source(arguments)
    rows = {name: make_rows(part) for name, part in source.items()}
    held = memory("RssAnon") - before
    seconds = time.process_time() - prepared
    assert sum(len(texts) for texts, _ in rows.values()) == sum(map(len, source.values()))
    return {"copy_seconds": prepared - start, "seconds": seconds, "held_bytes": held, "copied_bytes": copied}


def loading(folder: Path, few: int, many: int) -> dict[str, Any]:
    """
    What `--dataset` costs a row before training begins, by the difference between a small set and a large one.

    Returns:
        `dict`: `copied_bytes` on the disk, `copy_seconds` and `seconds` of the processor (the Arrow copy of
        `datasets`, and then all else), and `held_bytes` of memory, each for a row.
    """
    found = [
        in_processes(_load_whole, 1, write_shards(folder, rows, 1), folder / f"cache-{rows}")[0]
        for rows in (few, many)
    ]
    return {"rows": [few, many]} | {name: (found[1][name] - found[0][name]) / (many - few) for name in found[0]}


def _store(rank: int, processes: int, folder: Path, size: int) -> dict[str, float]:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet([str(path) for path in folder.glob("*.parquet")], cache_dir=f"{folder}-cache")
    processor = SiglipImageProcessor(size={"height": size, "width": size})
    start = time.process_time()
    images = StoredImages(rows, processor).all()
    return {"size": size, "bytes": images.nbytes / len(images), "seconds": (time.process_time() - start) / len(images)}


def image_store(folder: Path, rows: int, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """`--image-store memory`: bytes of an image, and seconds of the processor to decode and resize it."""
    place = write_shards(folder, rows, 1)
    return [in_processes(_store, 1, place, size)[0] for size in sizes]


# A stream ------------------------------------------------------------------------------------------------------------


def _read(rank: int, processes: int, folder: Path, decoded: bool) -> dict[str, float]:
    rows = split_dataset_by_node(stream(folder, decoded), rank, processes)
    start, processor = time.perf_counter(), time.process_time()
    count = sum(1 for _ in rows)
    return {
        "rows": count,
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
    }


def reading(folder: Path, rows: int, shards: tuple[int, ...], turns: int) -> list[dict[str, Any]]:
    """
    Rows a second of one process and of two that share the shards, images decoded or as files; the best of the turns.
    """
    cases = [(count, processes, decoded) for count in shards for processes in (1, 2) for decoded in (True, False)]
    found: dict[tuple[int, int, bool], list[list[dict[str, float]]]] = {case: [] for case in cases}
    for _ in range(turns):
        for count, processes, decoded in cases:
            place = write_shards(folder, rows, count)
            found[count, processes, decoded].append(in_processes(_read, processes, place, decoded))
    return [
        {
            "shards": count,
            "processes": processes,
            "decoded": decoded,
            "rows_of_each": [one["rows"] for one in runs[0]],
            "rows_per_second": rows / min(max(one["seconds"] for one in run) for run in runs),
            "processor_seconds_per_1000_rows": 1000 / rows * min(sum(one["processor"] for one in run) for run in runs),
        }
        for (count, processes, decoded), runs in found.items()
    ]


# Where a stream was left ---------------------------------------------------------------------------------------------


def _plain(folder: Path) -> Any:
    return stream(folder)


def _shuffled(folder: Path, buffer_size: int) -> Any:
    return stream(folder).shuffle(seed=SEED, buffer_size=buffer_size)


def _loader(rows: Any) -> Any:
    return StatefulDataLoader(rows, batch_size=BATCH, num_workers=2, collate_fn=_row_numbers)


def _row_numbers(rows: list[dict[str, Any]]) -> list[int]:
    return [row["row"] for row in rows]


def _numbers(source: Any) -> Iterator[int]:
    for one in source:
        yield from one if isinstance(one, list) else [one["row"]]


# A buffer of one row shuffles nothing but the order of the shards.
READERS: dict[str, Callable[[Path], Any]] = {
    "in order": _plain,
    "shards in another order": lambda folder: _shuffled(folder, 1),
    "buffer of 1,000 rows": lambda folder: _shuffled(folder, 1000),
    "two workers": lambda folder: _loader(_plain(folder)),
    "two workers, shards in another order": lambda folder: _loader(_shuffled(folder, 1)),
    "two workers, buffer of 1,000 rows": lambda folder: _loader(_shuffled(folder, 1000)),
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


def resuming(folder: Path, rows: int, shards: int, left_after: int) -> list[dict[str, Any]]:
    """
    Each reader is left in the middle of a shard, and another process goes on from its state.

    Returns:
        `list` of `dict`: whether all rows came as without the stop (`identical`), how many did not come (`lost`) or
        twice (`repeated`), the size of the state as JSON, and seconds to the first row behind the stop.
    """
    place = write_shards(folder, rows, shards)
    found = []
    for name in READERS:
        whole = in_processes(_all, 1, name, place)[0]
        first, state = in_processes(_until, 1, name, place, left_after)[0]
        rest, seconds = in_processes(_from, 1, name, place, state)[0]
        seen = Counter(first + rest)
        found.append(
            {
                "reader": name,
                "left_after": left_after,
                "identical": first + rest == whole,
                "lost": len(set(whole) - set(seen)),
                "repeated": sum(count - 1 for count in seen.values()),
                "state_bytes": len(json.dumps(state, default=str)),
                "seconds_to_first_row": seconds,
            }
        )
    return found
