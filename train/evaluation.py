"""The command `sigphi evaluate MODEL`, and what a folder of results holds.

sigphi evaluate outputs/vlm --input-csv test.csv --images uoft-cs/cifar10
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.hf_argparser import HfArg

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.cards import write_card
from sigphi.train.answer_scores import judged_rows
from sigphi.train.arguments import QaArguments
from sigphi.train.checkpoints import check_token_counts, read_config
from sigphi.train.data import distinct_images, held_out, load_cifar10_qa
from sigphi.train.encoder_evaluation import evaluate_encoder
from sigphi.train.encoder_options import EncoderEvaluationArguments, encoder_options
from sigphi.train.errors import UserError, run_command
from sigphi.train.parser import parse_arguments
from sigphi.train.predictions import PREDICTIONS, write_samples
from sigphi.train.records import EVAL_RESULTS, TRAINING_DATA, environment, write_json
from sigphi.train.vlm_evaluation import evaluate_vlm

logger = logging.getLogger(__name__)


def load_for_evaluation(name: str) -> tuple[PreTrainedModel, Any]:
    """
    A model of this package and its processor, on the accelerator where there is one, in evaluation mode.

    Raises:
        UserError: if `name` is no model of ours, or its processor does not fit it.
    """
    config = read_config(name, "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    processor = AutoProcessor.from_pretrained(name)
    if config.model_type == SigPhiConfig.model_type:
        check_token_counts(config, processor, name)
        model = AutoModelForImageTextToText.from_pretrained(name)
    else:
        model = AutoModel.from_pretrained(name)
        if not config.include_text_tower:
            model.load_text_tower()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval(), processor


def evaluate_folder(
    name: str, dataset: datasets.Dataset, notes: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """
    Load a model as a stranger would, evaluate it, and record the results in its folder and card.

    Args:
        name (`str`): a folder (which gets `eval_results.json`, a new card, and for an encoder its confusion matrix,
            for a VLM its answers, see [`write_predictions`] and [`write_samples`]) or a Hub id.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].
        notes (`dict`, *optional*): what else the metadata has to hold, such as where the probe images come from.
        options: of [`evaluate_encoder`] or [`evaluate_vlm`].
    """
    model, processor = load_for_evaluation(name)
    is_vlm = model.config.model_type == SigPhiConfig.model_type
    if Path(name).is_dir():
        options |= {"predictions_file": Path(name, PREDICTIONS)} if is_vlm else {"output_dir": name}
    evaluate = evaluate_vlm if is_vlm else evaluate_encoder
    results: dict[str, Any] = dict(evaluate(model, processor, dataset, **options))
    results["metadata"] = {
        "rows": len(dataset),
        "images": len(set(zip(dataset["split"], dataset["dataset_index"], strict=True))),
        "image_splits": sorted(set(dataset["split"])),
        **(notes or {}),
        **environment(),
    }
    if Path(name).is_dir():
        write_json(Path(name, EVAL_RESULTS), results)
        if is_vlm:
            write_samples(Path(name), dataset)
        write_card(Path(name))
    return results


def only_unseen(dataset: datasets.Dataset, model: str) -> datasets.Dataset:
    """
    The rows whose images the model was not trained on, as its folder records.

    Raises:
        UserError: if no row is left.
    """
    record = Path(model, TRAINING_DATA)
    if not record.exists():
        logger.warning("%s does not record what it was trained on; scores may cover images that it has seen.", model)
        return dataset
    facts = json.loads(record.read_text(encoding="utf-8"))
    # A VLM has seen its own training images, and its image tower those of the encoder.
    sources = [facts, facts["encoder"]] if facts.get("encoder") else [facts]
    keys = zip(dataset["split"], dataset["dataset_index"], strict=True)
    keep = [row for row, (split, index) in enumerate(keys) if not any(_saw(one, split, index) for one in sources)]
    if not keep:
        raise UserError(
            f"{model} or its encoder was trained on all images of this CSV; evaluate it on a CSV of other images."
        )
    if len(keep) < len(dataset):
        logger.warning(
            "%d of %d rows are about images that %s was trained on: left out.",
            len(dataset) - len(keep),
            len(dataset),
            model,
        )
    return dataset.select(keep)


def _saw(facts: dict[str, Any], split: str, index: int) -> bool:
    """Whether a training that is recorded as `facts` had this image."""
    if split not in facts["images_per_split"]:
        return False
    return not held_out(index, split, facts["eval_fraction"], facts["split_seed"])


@dataclass
class EvaluateArguments:
    """How to evaluate."""

    _argument_group_name = "evaluation"

    batch_size: int = HfArg(help="Images or questions in a step.", default=128)
    max_new_tokens: int = HfArg(help="Longest answer in tokens (VLM).", default=80)
    max_images: int | None = HfArg(help="Evaluate on the first so many images of the CSV.", default=None)

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def results_table(results: dict[str, Any]) -> str:
    """The figures as aligned lines, one a metric."""
    figures = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    width = max(map(len, figures))
    return "".join(f"{name:<{width}}  {value:.4f}\n" for name, value in figures.items())


def main(argv: list[str] | None = None) -> None:
    """`sigphi evaluate MODEL --input-csv FILE`: every metric, to `eval_results.json` and a table."""
    data, options, encoder, model = parse_arguments(
        [QaArguments, EvaluateArguments, EncoderEvaluationArguments],
        argv,
        "sigphi evaluate",
        [("model", None, "a folder or Hub id")],
    )
    config = read_config(model, "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    is_encoder = config.model_type == SiglipResNetConfig.model_type
    if not is_encoder and encoder != EncoderEvaluationArguments():
        raise UserError(f"--probe-... and --human-labels are for encoders, and {model} is none; leave them out.")
    dataset = load_cifar10_qa(data.input_csv, data.images, data.image_split, 1.0, 0, data.on_faulty_answers)["eval"]
    dataset = only_unseen(dataset, model)
    if options.max_images is not None:
        _, positions = distinct_images(dataset)
        dataset = dataset.select([row for row, position in enumerate(positions) if position < options.max_images])
    kwargs: dict[str, Any] = {"batch_size": options.batch_size}
    if is_encoder:
        kwargs |= encoder_options(encoder, dataset, data.images)
    else:
        judged_rows(dataset)  # refuses what cannot be judged by, before any weights load
        kwargs["max_new_tokens"] = options.max_new_tokens
    sys.stdout.write(results_table(evaluate_folder(model, dataset, **kwargs)))


__all__ = ["evaluate_folder", "load_for_evaluation", "main", "only_unseen", "results_table"]

if __name__ == "__main__":
    run_command(main, "sigphi evaluate")
