"""What `sigphi train-siglip --dataset` takes for a row before training begins: parts of benchmarks/scale.py."""

import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
from loss_memory import memory
from scale_processes import in_processes, tell
from scale_reading import write_shards
from transformers import SiglipImageProcessor

from sigphi.train.arguments import EncoderDataArguments
from sigphi.train.encoder_data import encoder_source
from sigphi.train.image_texts import StoredImages, read_set

FEW, MANY = 2_000, 10_000
STORED, SIZES = 500, (32, 224)


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


def loading() -> dict[str, Any]:
    """
    What `--dataset` costs a row before training begins, by the difference between a small set and a large one.

    Returns:
        `dict`: `copied_bytes` on the disk, `copy_seconds` and `seconds` of the processor (the Arrow copy of
        `datasets`, and then all else), and `held_bytes` of memory, each for a row.
    """
    with tempfile.TemporaryDirectory() as folder:
        few, many = (
            in_processes(_load_whole, 1, write_shards(Path(folder), rows, 1), Path(folder, f"cache-{rows}"))[0]
            for rows in (FEW, MANY)
        )
    return {"rows": [FEW, MANY]} | {name: (many[name] - few[name]) / (MANY - FEW) for name in few}


def _store(rank: int, processes: int, folder: Path, size: int) -> dict[str, float]:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet([str(path) for path in folder.glob("*.parquet")], cache_dir=f"{folder}-cache")
    processor = SiglipImageProcessor(size={"height": size, "width": size})
    start = time.process_time()
    images = StoredImages(rows, processor).all()
    return {"size": size, "bytes": images.nbytes / len(images), "seconds": (time.process_time() - start) / len(images)}


def image_store() -> list[dict[str, float]]:
    """`--image-store memory`: bytes of an image, and seconds of the processor to decode and resize it."""
    with tempfile.TemporaryDirectory() as folder:
        place = write_shards(Path(folder), STORED, 1)
        return [in_processes(_store, 1, place, size)[0] for size in SIZES]


if __name__ == "__main__":
    tell({"loading": loading, "image_store": image_store})
