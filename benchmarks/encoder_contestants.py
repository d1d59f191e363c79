"""One contestant of benchmarks/encoder.py, alone in its process, with a clock at each step of its optimizer.

    python benchmarks/encoder_contestants.py CONTESTANT FOLDER REQUEST.json [its own options ...]

Each is trained by its own entry point: `sigphi train-siglip`, `open_clip_train`, and transformers' `Trainer`. Writes
what the request asks for to standard output: the seconds of each step, or the seconds to a zero-shot accuracy.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    HfArgumentParser,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from turns import EnoughError, resident_bytes, say

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, pooled_states
from sigphi.train import siglip
from sigphi.train.encoder_evaluation import ZERO_SHOT_PROMPTS, class_texts
from sigphi.train.metrics import top1_accuracy

MAX_TEXT_LENGTH = 64
TOWER, PAIRS, HELD_OUT = "tower", "pairs.tsv", "held_out.pt"
MEAN = STD = [0.5] * 3


@dataclass
class Request:
    """The seconds of so many `steps`, or accuracies during so many `seconds` of training or until `accuracy`."""

    steps: int = 0
    seconds: float = 0.0
    accuracy: float = 1.0
    score_every: float = 8.0


@dataclass
class Embedders:
    """The two sides of a model in training: normalised pixels, and pooled states of the text tower, to embeddings."""

    model: nn.Module
    images: Callable[[torch.Tensor], torch.Tensor]
    texts: Callable[[torch.Tensor], torch.Tensor]


class Clock:
    """Called behind each step of the optimizer; the time that scoring takes does not count."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.request, self.folder = request, folder
        self.embedders: Embedders | None = None
        self.start = self.scored_at = time.perf_counter()
        self.steps: list[float] = []
        self.scores: list[tuple[float, float]] = []  # seconds, accuracy

    def __call__(self, *_: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.start)
        if self.request.seconds and now - self.scored_at >= self.request.score_every:
            self.scores.append((self.steps[-1], self.score()))
            self.scored_at = time.perf_counter()
            self.start += self.scored_at - now
            if self.steps[-1] >= self.request.seconds or self.scores[-1][1] >= self.request.accuracy:
                raise EnoughError
        if self.request.steps == len(self.steps):
            raise EnoughError

    @torch.no_grad()
    def score(self) -> float:
        """Zero-shot accuracy on the held-out images, with the same class texts and rounding for everyone."""
        assert self.embedders is not None
        held_out = torch.load(self.folder / HELD_OUT)
        self.embedders.model.eval()
        pixels = (held_out["images"].float() / 255 - MEAN[0]) / STD[0]  # (images, 3, 32, 32)
        images = torch.cat([self.embedders.images(part) for part in pixels.split(250)])  # (images, dim)
        texts = F.normalize(self.embedders.texts(held_out["class_features"]), dim=-1)
        classes = F.normalize(texts.view(-1, len(ZERO_SHOT_PROMPTS), texts.shape[-1]).mean(1), dim=-1)  # (10, dim)
        self.embedders.model.train()
        return top1_accuracy(F.normalize(images, dim=-1) @ classes.t(), held_out["labels"])

    def watch(self, module: Any, function: str, embedders: Callable[[Any], Embedders]) -> None:
        """Take the model from the function of `module` that makes it."""
        make = getattr(module, function)

        def remember(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            self.embedders = embedders(made)
            return made

        setattr(module, function, remember)


@torch.no_grad()
def class_features(folder: Path) -> torch.Tensor:
    """What the text tower says of each of [`class_texts`], mean over real tokens, `(texts, hidden_size)`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / TOWER)
    tower = AutoModel.from_pretrained(folder / TOWER).eval()
    tokens = tokenizer(class_texts(), padding=True, return_tensors="pt")
    config = SiglipResNetConfig(text_config=tower.config, text_pooling="mean")
    return pooled_states(tower, config, tokens["input_ids"], tokens["attention_mask"])[1]


def train_sigphi(clock: Clock, words: list[str]) -> None:
    """`sigphi train-siglip`."""

    def embedders(model: SiglipResNetModel) -> Embedders:
        return Embedders(model, lambda pixels: model.vision_model(pixels).pooler_output, model.text_model.project)

    clock.watch(siglip, "build_encoder", embedders)
    siglip.main(words)


def train_open_clip(clock: Clock, words: list[str]) -> None:
    """`python -m open_clip_train.main`."""
    from open_clip_train import main as open_clip_main

    def embedders(made: tuple[nn.Module, Any, Any]) -> Embedders:
        model: Any = made[0]
        return Embedders(model, model.encode_image, model.text.proj)

    clock.watch(open_clip_main, "create_model_and_transforms", embedders)
    open_clip_main.main(words)


def siglip_model(tower: str) -> SiglipModel:
    """
    transformers' `SiglipModel` with a ResNet-50 for images and the frozen tower for texts.

    Its own image towers are ViTs. Both towers are those of sigphi; forward pass, loss and Trainer are transformers'.
    """
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = SiglipModel(SiglipConfig(text_config=tiny, vision_config=tiny | {"image_size": 32}))
    config = SiglipResNetConfig(
        vision_config={"image_size": 32}, text_config=AutoConfig.from_pretrained(tower), text_pooling="mean"
    )
    towers = SiglipResNetModel(config)
    towers.load_text_tower(tower)
    model.vision_model, model.text_model = towers.vision_model, towers.text_model
    nn.init.constant_(model.logit_scale, math.log(10.0))
    nn.init.constant_(model.logit_bias, -10.0)
    return model


def train_transformers(clock: Clock, words: list[str]) -> None:
    """`SiglipModel` in transformers' `Trainer`, an image-text pair a row, as its examples do it."""
    (arguments,) = HfArgumentParser([TrainingArguments]).parse_args_into_dataclasses(words)  # type: ignore[list-item]
    set_seed(arguments.seed)
    model = siglip_model(str(clock.folder / TOWER))
    clock.embedders = Embedders(
        model, lambda pixels: model.vision_model(pixels).pooler_output, model.text_model.project
    )
    table = pd.read_csv(clock.folder / PAIRS, sep="\t")
    tokenizer = AutoTokenizer.from_pretrained(clock.folder / TOWER)
    tokens = tokenizer(table["title"].tolist(), padding="max_length", truncation=True, max_length=MAX_TEXT_LENGTH)
    columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    rows = datasets.Dataset.from_dict({"image": table["filepath"].tolist()} | columns)
    augment = v2.Compose(
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        + [v2.Normalize(MEAN, STD)]
    )

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": [augment(image) for image in batch.pop("image")]} | batch

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        return default_data_collator(features) | {"return_loss": True}

    rows = rows.cast_column("image", datasets.Image()).with_transform(transform)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()


TRAININGS = {"sigphi": train_sigphi, "open_clip": train_open_clip, "transformers": train_transformers}


def main() -> None:
    """Train until everything is measured, and print it."""
    name, folder, request, *words = sys.argv[1:]
    clock = Clock(Request(**json.loads(request)), Path(folder))
    before = resident_bytes()
    register_optimizer_step_post_hook(clock)
    try:
        TRAININGS[name](clock, words)
    except EnoughError:
        pass
    say({"steps": clock.steps, "scores": clock.scores, "peak_bytes": resident_bytes() - before})


if __name__ == "__main__":
    main()
