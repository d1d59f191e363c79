"""The command `sigphi evaluate MODEL`, and what a folder of results holds.

sigphi evaluate outputs/vlm --input-csv test.csv --images uoft-cs/cifar10
sigphi evaluate outputs/siglip --dataset captions --dataset-split test --text-column caption
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.hf_argparser import HfArg

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.cards import figure_text, write_card
from sigphi.train.answer_scores import judged_rows
from sigphi.train.answering import check_compilable
from sigphi.train.arguments import PairsArguments
from sigphi.train.checkpoints import (
    check_generation,
    check_processor,
    check_token_counts,
    check_weights_suffice,
    check_whole,
    loading,
    read_config,
)
from sigphi.train.data import distinct_images, held_out, load_cifar10_qa
from sigphi.train.encoder_evaluation import evaluate_encoder, evaluate_retrieval
from sigphi.train.encoder_options import EncoderEvaluationArguments, encoder_options
from sigphi.train.errors import UserError, run_command
from sigphi.train.image_texts import hold_out, load_image_texts
from sigphi.train.parser import parse_arguments
from sigphi.train.precision import inference_dtype
from sigphi.train.predictions import PREDICTIONS, write_samples
from sigphi.train.records import EVAL_RESULTS, durable_name, environment, training_record, write_json
from sigphi.train.vlm_evaluation import evaluate_vlm

logger = logging.getLogger(__name__)


def load_for_evaluation(name: str) -> tuple[PreTrainedModel, Any]:
    """
    A model of this package and its processor, on the accelerator where there is one, in evaluation mode.

    Raises:
        UserError: if `name` is no model of ours, or its processor does not fit it.
    """
    config = read_config(name, "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    with loading(f"MODEL {name}"):
        # False, since without it a folder that names code of its own has transformers ask whether to run that.
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if config.model_type == SigPhiConfig.model_type:
            check_token_counts(config, processor, name)
        check_processor(config, processor, name)
        check_weights_suffice(name, config)
        model = _load_whole(name, config)
        if config.model_type == SigPhiConfig.model_type:
            check_generation(model, name)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval(), processor


def _load_whole(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model with all of its weights, none of them drawn at random."""
    loader: Any = AutoModelForImageTextToText if config.model_type == SigPhiConfig.model_type else AutoModel
    model, info = loader.from_pretrained(
        name, dtype=inference_dtype(), output_loading_info=True, trust_remote_code=False
    )
    check_whole(f"MODEL {name}", info["missing_keys"])
    if config.model_type == SiglipResNetConfig.model_type and not config.include_text_tower:
        model.load_text_tower()
    return model


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
    if is_vlm and Path(name).is_dir():
        write_samples(Path(name), dataset)
    _record(name, results)
    return results


def evaluate_pairs_folder(
    name: str, rows: datasets.Dataset, notes: dict[str, Any], batch_size: int = 256
) -> dict[str, Any]:
    """
    As [`evaluate_folder`], of an encoder on images and texts of any set: [`evaluate_retrieval`].

    Args:
        name (`str`): a folder or a Hub id.
        rows (`datasets.Dataset`): of [`load_image_texts`].
        notes (`dict`): what else the metadata has to hold, such as where the images come from.
        batch_size (`int`, *optional*, defaults to 256): images or texts in a step.
    """
    model, processor = load_for_evaluation(name)
    results: dict[str, Any] = dict(evaluate_retrieval(model, processor, rows, batch_size))
    results["metadata"] = {"images": len(rows), **notes, **environment()}
    _record(name, results)
    return results


def _record(name: str, results: dict[str, Any]) -> None:
    if Path(name).is_dir():
        write_json(Path(name, EVAL_RESULTS), results)
        write_card(Path(name))


def only_unseen(dataset: datasets.Dataset, model: str) -> datasets.Dataset:
    """
    The rows whose images the model was not trained on, as its folder records.

    Raises:
        UserError: if no row is left.
    """
    facts = training_record(model)
    if not facts:
        logger.warning("%s does not record what it was trained on; scores may cover images that it has seen.", model)
        return dataset
    # A VLM has seen its own training images, those of the VLM that it started from, and its image tower others.
    sources = list(_trainings(facts))
    if any(source.get("dataset") for source in sources):
        logger.warning("%s or its encoder was trained on another set; scores may cover images of it.", model)
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


def _trainings(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a training and of all that it was built on."""
    yield facts
    for name in ("encoder", "vlm_checkpoint"):
        if facts.get(name):
            yield from _trainings(facts[name])


def _saw(facts: dict[str, Any], split: str, index: int) -> bool:
    """Whether a training that is recorded as `facts` had this image."""
    if split not in facts["images_per_split"]:
        return False
    return not held_out(index, split, facts["eval_fraction"], facts["split_seed"])


def only_unseen_pairs(rows: datasets.Dataset, data: PairsArguments, model: str) -> datasets.Dataset:
    """
    Of the rows of [`load_image_texts`] those whose images the encoder held out, where its folder records that it was
    trained on this very split.

    Raises:
        UserError: if no row is left.
    """
    facts = training_record(model)
    source = (durable_name(data.dataset or ""), data.dataset_config, data.dataset_split)
    if tuple(facts.get(name) for name in ("dataset", "dataset_config", "dataset_split")) != source:
        logger.warning("%s records no training on this split; scores may cover images that it has seen.", model)
        return rows
    if facts["eval_fraction"] == 0:
        raise UserError(f"{model} was trained on all images of this split; give another --dataset-split.")
    return hold_out(rows, facts["eval_fraction"], facts["split_seed"])["eval"]


@dataclass
class EvaluateArguments:
    """How to evaluate."""

    _argument_group_name = "evaluation"

    batch_size: int = HfArg(help="Images or questions in a step.", default=128)
    max_new_tokens: int = HfArg(help="Longest answer in tokens (VLM).", default=80)
    torch_compile: bool = HfArg(
        help="Compile the step from one token to the next (VLM): takes minutes once, pays for many questions.",
        default=False,
    )
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
    return "".join(f"{name:<{width}}  {figure_text(value)}\n" for name, value in figures.items())


def main(argv: list[str] | None = None) -> None:
    """`sigphi evaluate MODEL`: every metric, to `eval_results.json` and a table."""
    data, options, encoder, model = parse_arguments(
        [PairsArguments, EvaluateArguments, EncoderEvaluationArguments],
        argv,
        "sigphi evaluate",
        [("model", None, "a folder or Hub id")],
    )
    sys.stdout.write(results_table(evaluate_as_asked(model, data, options, encoder)))


def evaluate_as_asked(
    model: str, data: PairsArguments, options: EvaluateArguments, encoder: EncoderEvaluationArguments
) -> dict[str, Any]:
    """
    The metrics of a model by the options of `sigphi evaluate`; see [`evaluate_folder`].

    Args:
        model (`str`): a folder or Hub id.
        data (`PairsArguments`): what it is evaluated on.
        options (`EvaluateArguments`): how.
        encoder (`EncoderEvaluationArguments`): how, of an encoder.

    Raises:
        UserError: if the options do not go with the model, or the data cannot be read or judged.
    """
    config = read_config(model, "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    is_encoder = config.model_type == SiglipResNetConfig.model_type
    if encoder != EncoderEvaluationArguments():
        _check_encoder_options(model, is_encoder, data)
    if options.torch_compile and is_encoder:
        raise UserError(f"--torch-compile is for VLMs, and {model} is none; leave it out.")
    if data.dataset is not None:
        return _evaluate_pairs(model, is_encoder, data, options)
    dataset = load_cifar10_qa(data.input_csv, data.images, data.image_split, 1.0, 0, data.on_faulty_answers)["eval"]
    dataset = only_unseen(dataset, model)
    if options.max_images is not None:
        _, positions = distinct_images(dataset)
        dataset = dataset.select([row for row, position in enumerate(positions) if position < options.max_images])
    kwargs: dict[str, Any] = {"batch_size": options.batch_size, "notes": {}}
    if is_encoder:
        kwargs |= encoder_options(encoder, dataset, data.images)
    else:
        judged_rows(dataset)  # refuses what cannot be judged by, before any weights load
        if options.torch_compile:
            check_compilable(config)
        kwargs |= {"max_new_tokens": options.max_new_tokens, "torch_compile": options.torch_compile}
    kwargs["notes"] |= {"image_source": durable_name(data.images)}
    return evaluate_folder(model, dataset, **kwargs)


def _check_encoder_options(model: str, is_encoder: bool, data: PairsArguments) -> None:
    if not is_encoder:
        raise UserError(f"--probe-... and --human-labels are for encoders, and {model} is none; leave them out.")
    if data.dataset is not None:
        raise UserError("--probe-... and --human-labels go with --input-csv, not with --dataset; leave them out.")


def _evaluate_pairs(model: str, is_encoder: bool, data: PairsArguments, options: EvaluateArguments) -> dict[str, Any]:
    if not is_encoder:
        raise UserError(f"--dataset is for encoders, and {model} is none; give --input-csv.")
    assert data.dataset is not None
    names = (data.dataset_config, data.dataset_split, data.image_column, data.text_column)
    rows = only_unseen_pairs(load_image_texts(data.dataset, *names), data, model)
    if options.max_images is not None:
        rows = rows.select(range(min(len(rows), options.max_images)))
    notes = {"dataset": durable_name(data.dataset), "dataset_split": data.dataset_split}
    return evaluate_pairs_folder(model, rows, notes, options.batch_size)


__all__ = [
    "EvaluateArguments",
    "evaluate_as_asked",
    "evaluate_folder",
    "evaluate_pairs_folder",
    "load_for_evaluation",
    "main",
    "only_unseen",
    "results_table",
]

if __name__ == "__main__":
    run_command(main, "sigphi evaluate")
