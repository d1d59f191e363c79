"""What the page of a model shows beside answers: what its encoder sees, and pictures and questions to choose from.

Needs gradio: import it where that is known to be there.
"""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from safetensors import safe_open

from sigphi.hub_card.app import MAX_QUESTION, Classes
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel
from sigphi.processing.processing_siglip_resnet import to_rgb
from sigphi.train.encoder_evaluation import class_embeddings
from sigphi.train.errors import UserError, printable
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import load_images
from sigphi.train.predictions import PREDICTIONS, SAMPLES, SAMPLES_COLUMNS
from sigphi.train.records import file_of, training_record
from sigphi.train.report import pictures_of_grid
from sigphi.train.search_index import load_encoder
from sigphi.train.synthetic import synthetic_images

logger = logging.getLogger(__name__)

TOWER = "model.vision_tower."
MOST_PICTURES, MOST_QUESTIONS = 8, 6
# For a model of which no evaluation tells what it is asked.
QUESTIONS = ("What is the main object in this image?", "Describe this image in detail.")


def classes_of(model: str, tower: dict[str, torch.Tensor], given: str | None) -> Classes | None:
    """
    The class texts of the encoder that a VLM was made from. The VLM has its image tower, and nothing of its texts.

    Args:
        model (`str`): a VLM's folder or Hub id, whose record names the encoder.
        tower (`dict[str, torch.Tensor]`): the weights of the VLM's image tower.
        given (`str`, *optional*): the encoder, if the user has named it by `--siglip-checkpoint`.

    Returns:
        `Classes`, or `None` where the encoder, or its text tower, is not at hand; the log says why.

    Raises:
        UserError: if that is the one that the user has named, or it has another image tower.
    """
    name, revision = (given, None) if given is not None else recorded_encoder(training_record(model))
    if name is None:
        reason = f"{model} does not record its encoder"
    else:
        try:
            return _classes(name, revision, tower)
        except (UserError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            if given is not None:
                raise UserError(reason) from error
    logger.warning("The page does not show classes: %s. --siglip-checkpoint names an encoder.", printable(reason))
    return None


def recorded_encoder(facts: dict[str, Any]) -> tuple[str | None, str | None]:
    """Name and commit of the encoder that a VLM, or the one that it was trained from, was made from, if recorded."""
    while facts and facts.get("siglip_checkpoint") is None:
        facts = facts.get("vlm_checkpoint") or {}
    return facts.get("siglip_checkpoint"), facts.get("siglip_checkpoint_revision")


def _classes(name: str, revision: str | None, tower: dict[str, torch.Tensor]) -> Classes:
    encoder, processor = load_encoder(name, "--siglip-checkpoint", revision)
    if not has_tower(encoder, tower):
        raise UserError(
            f"--siglip-checkpoint {name} has another image tower than MODEL: give the encoder that it was made from."
        )
    if not encoder.config.include_text_tower:
        encoder.load_text_tower()
    embeds = class_embeddings(encoder, processor).float().contiguous()  # (10, projection_dim)
    return Classes(list(CLASS_NAMES), embeds, encoder.logit_scale.item(), encoder.logit_bias.item())


def has_tower(encoder: SiglipResNetModel, tower: dict[str, torch.Tensor]) -> bool:
    """Whether an encoder's image tower is this one, but for the rounding to 16 bits of either."""
    own = encoder.vision_model.state_dict()
    return own.keys() == tower.keys() and all(
        own[name].shape == weights.shape
        and torch.allclose(own[name].cpu().float(), weights.cpu().float(), rtol=2**-7, atol=1e-6)
        for name, weights in tower.items()
    )


def stored_tower(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the image tower in a VLM's folder, by their names in the tower; nothing else is read."""
    tower: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(TOWER)]
            tower |= {name.removeprefix(TOWER): file.get_tensor(name) for name in names}
    return tower


def example_pictures(model: str, images: str | None = None) -> list[Image.Image]:
    """
    At most eight pictures to ask about.

    Args:
        model (`str`): a VLM's folder or Hub id. If an evaluation has left pictures of its surest answers, wrong and
            right, half of the examples are of each.
        images (`str`, *optional*): take one of each class of the test split of these instead, see [`load_images`].

    Returns:
        `list[PIL.Image.Image]`: of any size, RGB; drawn in code where there are no others.
    """
    if images is None:
        path = file_of(model, f"{SAMPLES}.png")
        if path is not None:
            with Image.open(path) as grid:
                shown = pictures_of_grid(grid.convert("RGB"), SAMPLES_COLUMNS)
            if shown:
                half = MOST_PICTURES // 2
                return shown if len(shown) <= MOST_PICTURES else shown[:half] + shown[-half:]
    rows = synthetic_images("test", 60) if images is None else load_images(images, "test")
    labels = rows["label"][:]
    firsts = [labels.index(label) for label in sorted(set(labels))][:MOST_PICTURES]
    return [to_rgb(rows[row]["img"]) for row in firsts]


def example_questions(model: str) -> list[str]:
    """
    At most six questions to ask: those that an evaluation of the model has asked most, of as many types as there are.

    Args:
        model (`str`): a VLM's folder or Hub id.
    """
    path = file_of(model, PREDICTIONS)
    if path is None:
        return list(QUESTIONS)
    asked = pd.read_parquet(path, columns=["question_type", "question"])
    asked = asked[asked["question"].str.len() <= MAX_QUESTION]
    counts = asked.value_counts(sort=True).reset_index()  # the commonest question first
    first_of_type = counts.drop_duplicates("question_type")
    return pd.concat([first_of_type, counts])["question"].drop_duplicates().tolist()[:MOST_QUESTIONS]


__all__ = [
    "classes_of",
    "example_pictures",
    "example_questions",
    "has_tower",
    "recorded_encoder",
    "stored_tower",
]
