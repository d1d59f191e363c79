"""How long a training of the encoder waits for its batches; writes results/input_pipeline.json.

    python benchmarks/input_pipeline.py --recipe cpu-small --images ../shared/data/cifar10 \
        --text-model runs/cifar10/base --input-csv runs/cifar10/train.csv --workers 0 1 2

For each number of workers: the share of the training's seconds that it waits for a batch, over `--steps` steps behind
the first few; and the images a second that the batches come at when nothing is trained.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance

from sigphi.train.arguments import EncoderDataArguments, SiglipModelArguments, SiglipTrainingArguments
from sigphi.train.encoder_data import EncoderData, load_encoder_data
from sigphi.train.parser import parse_arguments
from sigphi.train.records import write_json
from sigphi.train.siglip import RECIPES, build_encoder, encoder_collator, encoder_config, encoder_processor
from sigphi.train.trainers import SiglipTrainer

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"
WARM_UP = 4  # steps


class WatchedTrainer(SiglipTrainer):
    """Notes when it asks for each batch, and when it has it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.waits: list[tuple[float, float]] = []  # asked, got

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        asked = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.waits.append((asked, time.perf_counter()))
        return batches


def waiting_share(waits: list[tuple[float, float]]) -> float:
    """The share of the time from the first batch asked for to the last one that was spent waiting."""
    waited = sum(got - asked for asked, got in waits[:-1])
    return waited / (waits[-1][0] - waits[0][0])


def measure(
    words: list[str], workers: int, steps: int, data: EncoderData | None
) -> tuple[dict[str, Any], EncoderData]:
    """The figures with so many workers; the data are read once."""
    types = [SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments]
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--output-dir", folder, "--eval-strategy", "no", "--disable-tqdm", "true"]
        words += ["--max-steps", str(steps + WARM_UP)]
        model_arguments, data_arguments, arguments = parse_arguments(types, words, "benchmark", recipes=RECIPES)
        arguments.dataloader_num_workers = workers
        if workers == 0:  # a recipe may say how workers prefetch
            arguments.dataloader_prefetch_factor, arguments.dataloader_persistent_workers = None, False
        config, processor = encoder_config(model_arguments), encoder_processor(model_arguments)
        data = data or load_encoder_data(data_arguments, processor.image_processor)
        trainer = WatchedTrainer(
            model=build_encoder(model_arguments, config, arguments.device),
            args=arguments,
            train_dataset=data.rows["train"],
            data_collator=encoder_collator(data, config, processor, model_arguments, arguments.device),
            processing_class=processor,
        )
        batches = itertools.islice(trainer.get_train_dataloader(), steps + WARM_UP)
        loaded = [time.perf_counter() for _ in batches]
        trainer.train()
    batch_size = arguments.train_batch_size
    seconds = loaded[-1] - loaded[WARM_UP - 1]
    return {
        "workers": workers,
        "batch_size": batch_size,
        "waiting_share": waiting_share(trainer.waits[WARM_UP:]),
        "loader_images_per_second": batch_size * steps / seconds,
    }, data


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    options, words = parser.parse_known_args()
    rows, data = [], None
    for workers in options.workers:
        row, data = measure(words, workers, options.steps, data)
        rows.append(row)
    write_json(RESULTS, provenance() | {"options": words, "rows": rows})


if __name__ == "__main__":
    main()
