"""Model cards, rendered from what the model's folder records."""

import json
from pathlib import Path
from string import Template
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def write_card(folder: Path, model_id: str | None = None) -> None:
    """
    Write `README.md` into a model's folder, from its `config.json`, `eval_results.json`, `training_data.json` and
    `parity.json`.

    Facts that the folder does not hold are said to be unknown; nothing is made up.

    Args:
        folder (`Path`): holds at least `config.json` of one of this package's models.
        model_id (`str`, *optional*): the repository id in the loading code, by default the folder's name.
    """
    config = _read_json(folder / "config.json")
    results = _read_json(folder / "eval_results.json")
    training = _read_json(folder / "training_data.json")
    facts = {
        "model_id": model_id or folder.resolve().name,
        "projection_dim": config.get("projection_dim", 512),
        "num_image_tokens": config.get("num_image_tokens", 1),
        "image_size": config["vision_config"].get("image_size", 224),
        "text_tower": _text_tower(config),
        "form": _form(config) + _parity(_read_json(folder / "parity.json")),
        "results": _results(results),
        "scope": _scope(results),
        "classes": _classes(_read_json(folder / "confusion_matrix.json"), (folder / "confusion_matrix.png").exists()),
        "training": _training(training),
        "limits": _limits(training, config["vision_config"].get("image_size", 224)),
    }
    template = Template((TEMPLATES / f"{config['model_type']}.md").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(template.substitute(facts), encoding="utf-8")


def _limits(training: dict[str, Any], image_size: int) -> str:
    what = (
        f"the images and texts of `{training['dataset']}` alone"
        if "dataset" in training
        else "pictures of ten classes (airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck)"
    )
    return (
        f"Trained on {what}, at {image_size} x {image_size} pixels. It knows nothing else, and its scores on other "
        "pictures mean little."
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _text_tower(config: dict[str, Any]) -> str:
    if config.get("include_text_tower", True):
        return "The text tower is inside: `AutoModelForZeroShotImageClassification` and its pipeline work too."
    name = config.get("text_model_name_or_path")
    return (
        f"The frozen text tower `{name}` is not inside: call `model.load_text_tower()` before embedding texts "
        f"(images need nothing else)."
    )


def _form(config: dict[str, Any]) -> str:
    base = config.get("base_language_model")
    if config.get("quantization_config") is not None:
        return (
            "This is the nf4 form: all weights are inside, those of the language model's layers in 4 bits (NF4). "
            "Loading needs `bitsandbytes`."
        )
    if base is None:
        return "All weights are inside."
    bits = config.get("base_bits", 16)
    needs = (
        "`peft`" if bits == 16 else "`peft` and `bitsandbytes` (`base_bits=16` as an argument does without the latter)"
    )
    return (
        f"This is the adapter form: image tower, projector and LoRA weights are inside, the language model `{base}` "
        f"is read from its own place, in {bits} bits as in training. Loading needs {needs}."
    )


def _parity(parity: dict[str, Any]) -> str:
    """What the model that this one was made of would have said to the same questions."""
    if not parity:
        return ""
    source, base, metadata = parity["compared_with"], parity["base"], parity["metadata"]
    bits = f" (language model in {source['base_bits']} bits)" if source["form"] == "adapter" else ""
    weights = {"dequantized": "the de-quantised weights", "original": "the weights before they were quantised"}
    merged = "" if base is None else f", LoRA merged into {weights[base]}"
    return (
        f"\n\nCompared with the {source['form']} form{bits} that it was made of{merged}: of {parity['questions']} "
        f"questions from {metadata['questions_from']}, {parity['identical_answers']} get the same greedy answer. "
        f"Along these answers, at {parity['logit_positions']} tokens, the likeliest next token is the same for "
        f"{parity['next_token_agreement']:.4f} of them, the distribution of the next token differs by "
        f"{parity['mean_kl']:.2g} nats (Kullback-Leibler divergence, mean), and logits by "
        f"{parity['max_abs_logit_difference']:.2g} at most. All figures: `parity.json`."
    )


def _results(results: dict[str, Any]) -> str:
    # An encoder's recalls stand in the table of its classes.
    figures = {name: value for name, value in results.items() if not name.startswith("recall/")}
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    rows = [f"| `{name}` | {figure_text(value)} |" for name, value in numbers.items()]
    if not rows:
        return "Not evaluated yet: `sigphi evaluate` writes the figures."
    form = results.get("metadata", {}).get("form")
    if form is not None:
        rows += ["", f"Measured on the {form} form, which this one was made of: `sigphi evaluate` measures it anew."]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def figure_text(value: float) -> str:
    """A figure as tables show it: a count as it is, any other number with four decimals."""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _scope(results: dict[str, Any]) -> str:
    """On which images an encoder was evaluated, and what the classifiers on its embeddings were fitted on."""
    metadata = results.get("metadata", {})
    lines = []
    if "images" in metadata and "image_splits" in metadata:
        lines.append(f"Over {metadata['images']} images of split {' and '.join(metadata['image_splits'])}.")
    if "dataset" in metadata:
        lines.append(f"Over {metadata['images']} images of `{metadata['dataset']}` and their texts.")
    if "probe" in metadata and "probe_count" in results:
        lines.append(
            f"`knn_top1` and `linear_probe_top1` are of classifiers fitted on the embeddings of "
            f"{results['probe_count']} labelled images of {metadata['probe']}, none of which is evaluated."
        )
    if "human_labels" in metadata:
        lines.append("`human_...` are measured against the labels that people gave to the same images.")
    if lines:
        lines.append("`majority/...` and `chance/...` are what is reached without looking.")
    return "\n".join(lines)


def _classes(confusion: dict[str, Any], has_picture: bool) -> str:
    """How well each class is told from the others; nothing where that was not measured."""
    if not confusion:
        return ""
    lines = ["| class | precision | recall | F1 | images |", "| --- | --- | --- | --- | --- |"]
    for name, scores in confusion["per_class"].items():
        shown = ["-" if scores[key] is None else f"{scores[key]:.3f}" for key in ("precision", "recall", "f1")]
        lines.append(f"| {name} | {' | '.join(shown)} | {scores['support']} |")
    if has_picture:
        lines += ["", "![How often each class was taken for which](confusion_matrix.png)"]
    return "\n".join(["", *lines, ""])


def _training(data: dict[str, Any]) -> str:
    if not data:
        return "What it was trained on is not recorded."
    facts = {name: value for name, value in data.items() if value is not None and not isinstance(value, dict)}
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items()]
    return "\n".join(["| fact | value |", "| --- | --- |", *rows])


__all__ = ["figure_text", "write_card"]
