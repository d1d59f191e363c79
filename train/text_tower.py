"""The text tower of an encoder: where its weights are, and what it says of texts while it is frozen."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, pooled_states
from sigphi.modeling.modeling_sigphi import base_quantization
from sigphi.train.checkpoints import hub_commit, read_config
from sigphi.train.errors import UserError
from sigphi.train.feature_cache import cached_features
from sigphi.train.fingerprints import digest, folder_digest

# Precision of the tower -> type of what it says.
TOWER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
# What decides what a model in a folder computes.
_WEIGHT_FILES = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin")
# A large tower keeps the states of all its layers for a batch: at hidden size 2560 and 32 layers 0.7 GB in bfloat16.
TOKENS_A_BATCH = 4096
TEXTS_A_BATCH = 1024

# From token ids and mask `(texts, length)` to states and pooled states, as [`SiglipResNetTextModel.pool`].
Pool = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TextTower:
    """
    Where the weights of a text tower are.

    Args:
        name (`str`): a folder or Hub id.
        revision (`str`, *optional*): of a Hub id.
        inside_encoder (`bool`, *optional*, defaults to `False`): whether `name` is a whole encoder, the tower a part.
    """

    name: str
    revision: str | None = None
    inside_encoder: bool = False

    def load(self, precision: str = "float32", device: torch.device | None = None) -> PreTrainedModel:
        """
        The tower, frozen, in evaluation mode.

        Args:
            precision (`str`, *optional*, defaults to `"float32"`): `"float32"`, `"bfloat16"`, or `"nf4"`: weights in 4
                bits, arithmetic in bfloat16.
            device (`torch.device`, *optional*): where to put it, by default the CPU.
        """
        dtype = TOWER_DTYPES[precision]
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device or torch.device("cpu")}}
        if precision == "nf4":
            options["quantization_config"] = base_quantization(4, dtype)
        if self.inside_encoder:
            tower: Any = SiglipResNetModel.from_pretrained(self.name, **options).text_model.language_model
        else:
            tower = AutoModel.from_pretrained(
                self.name, revision=self.revision or "main", trust_remote_code=False, **options
            )
        return tower.requires_grad_(False).eval()

    def identity(self) -> str:
        """What is another when the weights are others: a Hub id with its commit, or a hash over a folder's files."""
        if not Path(self.name).is_dir():
            return f"{self.name}@{hub_commit(self.name, self.revision)}"
        return folder_digest(Path(self.name), _WEIGHT_FILES)


def text_tower_of(config: SiglipResNetConfig, siglip_checkpoint: str | None) -> TextTower:
    """
    Where the text tower of an encoder is.

    Args:
        config (`SiglipResNetConfig`): the encoder's.
        siglip_checkpoint (`str`, *optional*): the folder or Hub id of an encoder that is there already.

    Raises:
        UserError: if that encoder's tower is not there.
    """
    name = config.text_model_name_or_path
    if siglip_checkpoint is None:
        assert name is not None, "a new encoder has a text tower"
        return TextTower(name, config.text_model_revision)
    if config.include_text_tower:
        return TextTower(siglip_checkpoint, inside_encoder=True)
    place = f"--siglip-checkpoint {siglip_checkpoint}"
    if name is None:
        raise UserError(
            f"{place} has no text tower and names none, as a checkpoint-* folder of an encoder that has its own; give "
            f"the folder that the training began with, or that it left."
        )
    read_config(name, f"{place}: its text tower", revision=config.text_model_revision)
    return TextTower(name, config.text_model_revision)


def token_ids(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """What the text tower reads of each text: at most `max_length` tokens, by default the tokenizer's own length."""
    return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]


@torch.no_grad()
def pooled_batches(
    pool: Pool, tokens: Sequence[list[int]], device: torch.device, batch_size: int = TEXTS_A_BATCH
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """
    What the text projection reads of each text; texts of about the same length together.

    Args:
        pool (`Callable`): the tower.
        tokens (`Sequence[list[int]]`): the token ids of each text.
        device (`torch.device`): the tower's.
        batch_size (`int`, *optional*, defaults to 1024): texts at a time, at most; long ones are fewer.

    Yields:
        `tuple`: positions in `tokens`, and their pooled states `(len(positions), hidden_size)`, on the CPU.
    """
    batches = length_batches([len(ids) for ids in tokens], batch_size)
    for rows in tqdm(batches, "texts", disable=None, leave=False):
        sequences = [torch.tensor(tokens[row]) for row in rows]
        ids = pad_sequence(sequences, batch_first=True)  # (texts, length)
        mask = pad_sequence([torch.ones_like(one) for one in sequences], batch_first=True)
        yield rows, pool(ids.to(device), mask.to(device))[1].cpu()


def length_batches(lengths: Sequence[int], batch_size: int = TEXTS_A_BATCH) -> list[list[int]]:
    """Positions by ascending length, in batches of at most so many texts and [`TOKENS_A_BATCH`] padded tokens."""
    batches: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        size = len(batches[-1])
        if size == batch_size or (size > 0 and (size + 1) * lengths[row] > TOKENS_A_BATCH):
            batches.append([])
        batches[-1].append(row)
    return batches


def cached_text_features(
    tower: TextTower,
    config: SiglipResNetConfig,
    tokens: Sequence[list[int]],
    precision: str = "float32",
    folder: str | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """
    What the text projection reads of each text, from a file; the tower is loaded only where there is no file yet.

    Args:
        tower (`TextTower`): where the tower is.
        config (`SiglipResNetConfig`): the encoder's; says how the tower's states are pooled.
        tokens (`Sequence[list[int]]`): the token ids of each text, at least one text.
        precision (`str`, *optional*, defaults to `"float32"`): see [`TextTower.load`].
        folder (`str`, *optional*): see [`cached_features`].
        device (`torch.device`, *optional*): where the tower runs, by default the CPU.

    Returns:
        `torch.Tensor` of shape `(texts, hidden_size)`, float32 or bfloat16: see [`cached_features`].

    Raises:
        UserError: if the file cannot be written.
    """
    device = device or torch.device("cpu")
    # Token ids stand for the texts, the tokenizer, and where texts are cut.
    lengths, ids = np.array([len(one) for one in tokens]), np.concatenate([np.array(one) for one in tokens])
    about = {
        "kind": "text",
        "tokens": digest([lengths.astype("<i8"), ids.astype("<i8")]),
        "tower": tower.identity(),
        "layer": config.text_layer,
        "pooling": config.text_pooling,
        "precision": precision,
    }

    def compute() -> Iterator[tuple[list[int], torch.Tensor]]:
        loaded = tower.load(precision, device)
        return pooled_batches(partial(pooled_states, loaded, config), tokens, device)

    text_config: Any = config.text_config
    shape = (len(tokens), text_config.hidden_size)
    return cached_features("--text-cache", folder, about, shape, TOWER_DTYPES[precision], compute)


__all__ = [
    "TEXTS_A_BATCH",
    "TOKENS_A_BATCH",
    "TOWER_DTYPES",
    "TextTower",
    "cached_text_features",
    "length_batches",
    "pooled_batches",
    "text_tower_of",
    "token_ids",
]
