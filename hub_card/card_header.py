"""The header of a model card: what the Hub itself reads."""

import csv
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from sigphi.hub_card.markdown import is_hub_id, one_line

EMISSIONS = "emissions.csv"
PIPELINE_TAGS = {"siglip_resnet": "zero-shot-image-classification", "sigphi": "image-text-to-text"}
# How the Hub calls the figures of ours that go into its index. What is reached without looking is none of them.
_METRIC_TYPES = {
    "eval_loss": "loss",
    "zero_shot_top1": "accuracy",
    "knn_top1": "accuracy",
    "linear_probe_top1": "accuracy",
    "ece": "ece",
    **{f"{way}_r{k}": "recall" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    "answer_accuracy": "accuracy",
    "class_accuracy": "accuracy",
    "image_gain": "image_gain",
    "hallucination_rate": "hallucination_rate",
    "refusal_f1": "f1",
    "description_precision": "precision",
    "description_recall": "recall",
    "token_f1": "f1",
    "rougeL": "rouge",
    "bleu": "bleu",
}


def card_header(
    folder: Path, config: dict[str, Any], results: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    """
    What the Hub reads of a model: task, library, what it was made from, and its figures as a `model-index`.

    Args:
        folder (`Path`): the model's, where `codecarbon` may have left its measurement.
        config (`dict`): content of `config.json`.
        results (`dict`): content of `eval_results.json`, empty where there is none.
        training (`dict`): content of `training_data.json`, empty where there is none.

    Returns:
        `dict`: the fields of [`~huggingface_hub.ModelCardData`].
    """
    kind = config["model_type"]
    sources = base_models(config, training)
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAGS[kind],
        "tags": _tags(config),
        "base_model": sources or None,
        "datasets": training_sets(training) or None,
        "co2_eq_emissions": _emissions(folder / EMISSIONS),
    }
    if kind == "sigphi":
        fields |= {"language": ["en"]}
        if sources:
            fields |= {"base_model_relation": "adapter" if config.get("base_language_model") else "finetune"}
    return fields


def _tags(config: dict[str, Any]) -> list[str]:
    if config["model_type"] == "siglip_resnet":
        return ["siglip", "resnet", "sigphi"]
    language_model = config.get("text_config", {}).get("model_type")
    return ["vision-language", "siglip", *([language_model] if language_model else []), "sigphi"]


def header_yaml(fields: dict[str, Any], license: str, name: str, results: list[EvalResult]) -> str:
    """The header in YAML, without its dashes; `name` is that of the model, for its `model-index`."""
    figures = {"model_name": one_line(name), "eval_results": results} if results else {}
    return ModelCardData(license=license, **fields, **figures).to_yaml()


def base_models(config: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """The models on the Hub that a model was made from."""
    names = [
        config.get("base_language_model") or training.get("language_model"),
        config.get("text_model_name_or_path") or training.get("text_model"),
        training.get("vision_model"),
        training.get("siglip_checkpoint"),
    ]
    return list(dict.fromkeys(name for name in names if name and is_hub_id(name)))


def training_sets(training: dict[str, Any]) -> list[str]:
    """The sets on the Hub that a model, or the encoder in it, was trained on."""
    records = [training, training.get("encoder") or {}]
    names = [record.get(key) for record in records for key in ("dataset", "images")]
    return list(dict.fromkeys(name for name in names if name and is_hub_id(name) and not is_drawn(name)))


def is_drawn(images: str) -> bool:
    """Whether pictures come from `sigphi.train.synthetic`."""
    return images == "synthetic" or images.startswith("synthetic:")


def eval_results(config: dict[str, Any], results: dict[str, Any]) -> list[EvalResult]:
    """
    The figures for the `model-index`: those of all rows together. Others, counts and what is reached without looking
    stand in the card's table.

    Args:
        config (`dict`): content of `config.json`.
        results (`dict`): content of `eval_results.json`.
    """
    metadata = results.get("metadata", {})
    source = metadata.get("dataset") or metadata.get("image_source")
    known = bool(source) and is_hub_id(source) and not is_drawn(source)
    name = source if known else "pictures drawn in code" if source and is_drawn(source) else "a local folder"
    splits = [metadata["dataset_split"]] if "dataset_split" in metadata else metadata.get("image_splits", [])
    return [
        EvalResult(
            task_type=PIPELINE_TAGS[config["model_type"]],
            dataset_type=source if known else "synthetic" if source and is_drawn(source) else "local",
            dataset_name=name if source else "unknown",
            dataset_split=one_line(splits[0]) if len(splits) == 1 else None,
            metric_type=kind,
            metric_name=figure,
            metric_value=results[figure],
        )
        for figure, kind in _METRIC_TYPES.items()
        if figure in results
    ]


def _emissions(path: Path) -> dict[str, Any] | None:
    """What `codecarbon` has measured of the last run, in grams; the rest of its file tells too much of the machine."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    return {
        "emissions": round(float(rows[-1]["emissions"]) * 1000, 3),
        "source": "codecarbon",
        "training_type": "training",
    }


__all__ = ["PIPELINE_TAGS", "base_models", "card_header", "eval_results", "header_yaml", "is_drawn", "training_sets"]
