"""Model cards, rendered from what the model's folder records."""

import json
from pathlib import Path
from string import Template
from typing import Any

from sigphi.hub_card.card_header import base_models, card_header, eval_results, header_yaml
from sigphi.hub_card.files import read_record, write_whole
from sigphi.hub_card.markdown import code, is_local, name_of, table

TEMPLATES = Path(__file__).parent / "templates"
CARD = "README.md"
# Of the training's options, those that say how it went.
_OPTIONS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "tokens_per_batch",
    "learning_rate",
    "projector_learning_rate",
    "logit_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "muon",
    "weight_decay",
    "ema_decay",
    "bf16",
    "fp16",
    "seed",
)


def write_card(
    folder: Path, model_id: str | None = None, revision: str | None = None, license: str = "apache-2.0"
) -> None:
    """
    Write `README.md` into a model's folder, from what other files of it record: `config.json`, `eval_results.json`,
    `parity.json`, `training_data.json`, `training_args.json`, and the pictures that are there.

    Facts that the folder does not hold are said to be unknown; nothing is made up. Paths on this machine are not told.

    Args:
        folder (`Path`): holds at least `config.json` of one of this package's models.
        model_id (`str`, *optional*): the repository id in the loading code, by default the folder's name.
        revision (`str`, *optional*): the commit that the loading code is pinned to.
        license (`str`, *optional*, defaults to `"apache-2.0"`): of the model, as the Hub writes it.

    Raises:
        UserError: if one of these files is broken, see [`check_records`].
    """
    config = read_record(folder / "config.json")
    results = read_record(folder / "eval_results.json")
    training = read_record(folder / "training_data.json")
    image_size = config["vision_config"].get("image_size", 224)
    name = model_id or folder.resolve().name
    header = card_header(folder, config, results, training)
    facts = {
        "header": header_yaml(header, license, name.rpartition("/")[2], eval_results(config, results)),
        "model_id": json.dumps(name, ensure_ascii=False),
        "pinned": "" if revision is None else f', revision="{revision}"',
        "pin": _pin(revision),
        "packages": " ".join(packages(config)),
        "projection_dim": config.get("projection_dim", 512),
        "num_image_tokens": config.get("num_image_tokens", 1),
        "image_size": image_size,
        "text_tower": _text_tower(config),
        "text_code": _text_code(config),
        "form": _form(config) + _parity(read_record(folder / "parity.json")),
        "results": _results(results),
        "samples": _samples(folder),
        "scope": _scope(results),
        "classes": _classes(read_record(folder / "confusion_matrix.json"), (folder / "confusion_matrix.png").exists()),
        "training": _training(training),
        "origin": _origin(base_models(config, training), config, training),
        "run": _run(read_record(folder / "training_args.json"), training.get("environment", {})),
        "curve": _curve(folder),
        "limits": _limits(training, image_size),
        "license": code(license),
    }
    template = Template((TEMPLATES / f"{config['model_type']}.md").read_text(encoding="utf-8"))
    write_whole(folder / CARD, template.substitute(facts))


def check_records(folder: Path) -> None:
    """Raise a [`UserError`] if a file that the card is rendered from is there, and no JSON object."""
    for name in ("config", "eval_results", "parity", "confusion_matrix", "training_data", "training_args"):
        read_record(folder / f"{name}.json")


def _pin(revision: str | None) -> str:
    if revision is None:
        return "`revision=` of a commit pins files and code; without it they are what the repository holds now."
    return (
        "`revision` pins weights and code to the commit that was published with this card; without it they are what "
        "the repository holds now. `trust_remote_code=True` runs the Python files of that commit: read them first."
    )


def packages(config: dict[str, Any]) -> list[str]:
    """The packages that loading a model needs, by the content of its `config.json`."""
    # Without torchvision transformers resizes by Pillow, and a gray level differs from what was trained on.
    names = ["torch", "torchvision", "transformers", "pillow"]
    if config.get("base_language_model"):
        names.append("peft")
    if config.get("base_bits", 16) != 16 or config.get("quantization_config"):
        names += ["accelerate", "bitsandbytes"]
    return names


def _text_code(config: dict[str, Any]) -> str:
    """What the text tower needs before it can embed texts, as a line of code."""
    return "" if config.get("include_text_tower", True) else "model.load_text_tower()  # images need nothing of it\n"


def _samples(folder: Path) -> str:
    """The grid of answered questions, where an evaluation has left one."""
    if not (folder / "eval_samples.png").exists():
        return ""
    return (
        "\nThe answers that the model was surest of, right and wrong; the texts are in "
        "[eval_samples.md](eval_samples.md):\n\n![Pictures, numbered](eval_samples.png)\n"
    )


def _curve(folder: Path) -> str:
    return "\n![Loss by step](loss_curve.png)\n" if (folder / "loss_curve.png").exists() else ""


def _origin(models: list[str], config: dict[str, Any], training: dict[str, Any]) -> str:
    """What the model was made from, each with the commit where one is recorded."""
    revisions = {
        config.get("base_language_model"): config.get("base_language_model_revision"),
        config.get("text_model_name_or_path"): config.get("text_model_revision"),
        training.get("language_model"): training.get("language_model_revision"),
        training.get("siglip_checkpoint"): training.get("siglip_checkpoint_revision"),
    }
    rows = [[code(name), code(revisions.get(name) or "") or "not recorded"] for name in models]
    return "\n" + table(["made from", "commit"], rows) + "\n" if rows else ""


def _run(options: dict[str, Any], environment: dict[str, Any]) -> str:
    """How the training was run, on what, and with which versions."""
    rows = [
        [name.replace("_", " "), _fact(options[name])]
        for name in _OPTIONS
        if options.get(name) not in (None, False, 0, -1)
    ]
    rows += [[name, _fact(value)] for name, value in environment.items()]
    return "\n" + table(["training", "value"], rows) + "\n" if rows else ""


def _fact(value: Any) -> str:
    """A recorded value in a cell: numbers as they are, texts as code."""
    return str(value) if isinstance(value, (int, float)) else name_of(str(value))


def _limits(training: dict[str, Any], image_size: int) -> str:
    what = (
        f"the images and texts of {name_of(training['dataset'])} alone"
        if "dataset" in training
        else "pictures of ten classes (airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck)"
    )
    return (
        f"Trained on {what}, at {image_size} x {image_size} pixels. It knows nothing else, and its scores on other "
        "pictures mean little."
    )


def _text_tower(config: dict[str, Any]) -> str:
    if config.get("include_text_tower", True):
        return "The text tower is inside: `AutoModelForZeroShotImageClassification` and its pipeline work too."
    name = config.get("text_model_name_or_path")
    if name is None:
        return "The text tower is not inside, and nothing records which it was: this encoder embeds images only."
    return (
        f"The frozen text tower {_placed(name)} is not inside: call `model.load_text_tower()` before embedding texts "
        f"(images need nothing else)."
    )


def _placed(name: str) -> str:
    """A model that is read from its own place: a Hub id as code, and nothing of a path."""
    return "(a local folder)" if is_local(name) else code(name)


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
        "This is the adapter form: image tower, projector and LoRA weights are inside, the language model "
        f"{_placed(base)} is read from its own place, in {bits} bits as in training. Loading needs {needs}."
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
        f"questions from {name_of(metadata['questions_from'])}, {parity['identical_answers']} get the same greedy "
        f"answer. Along these, at {parity['logit_positions']} tokens, the likeliest next token is the same for "
        f"{parity['next_token_agreement']:.4f} of them, the distribution of the next token differs by "
        f"{parity['mean_kl']:.2g} nats (Kullback-Leibler divergence, mean), and logits by "
        f"{parity['max_abs_logit_difference']:.2g} at most. All figures: `parity.json`."
    )


def _results(results: dict[str, Any]) -> str:
    # An encoder's recalls stand in the table of its classes.
    figures = [(name, value) for name, value in results.items() if not name.startswith("recall/")]
    # The names hold types of questions, which come from whoever wrote the CSV.
    numbers = [(name, value) for name, value in figures if isinstance(value, (int, float))]
    rows = [[code(name, 100), figure_text(value)] for name, value in numbers]
    if not rows:
        return "Not evaluated yet: `sigphi evaluate` writes the figures."
    form = results.get("metadata", {}).get("form")
    measured = f"\n\nMeasured on the {form} form, which this one was made of: `sigphi evaluate` measures it anew."
    return table(["metric", "value"], rows) + (measured if form is not None else "")


def figure_text(value: float) -> str:
    """A figure as tables show it: a count as it is, any other number with four decimals."""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _scope(results: dict[str, Any]) -> str:
    """On which images an encoder was evaluated, and what the classifiers on its embeddings were fitted on."""
    metadata = results.get("metadata", {})
    lines = []
    if "images" in metadata and "image_splits" in metadata:
        splits = " and ".join(code(split) for split in metadata["image_splits"])
        lines.append(f"Over {metadata['images']} images of split {splits}.")
    if "dataset" in metadata:
        lines.append(f"Over {metadata['images']} images of {name_of(metadata['dataset'])} and their texts.")
    if "probe" in metadata and "probe_count" in results:
        lines.append(
            f"`knn_top1` and `linear_probe_top1` are of classifiers fitted on the embeddings of "
            f"{results['probe_count']} labelled images of {_probe(metadata['probe'])}, none of which is evaluated."
        )
    if "human_labels" in metadata:
        lines.append("`human_...` are measured against the labels that people gave to the same images.")
    if lines:
        lines.append("`majority/...` and `chance/...` are what is reached without looking.")
    return "\n".join(lines)


def _probe(text: str) -> str:
    """Where the labelled images come from: a source, a comma, and which of its images."""
    source, comma, which = text.partition(",")
    return name_of(source) + (f", {code(which)}" if comma else "")


def _classes(confusion: dict[str, Any], has_picture: bool) -> str:
    """How well each class is told from the others; nothing where that was not measured."""
    if not confusion:
        return ""
    lines = ["| class | precision | recall | F1 | images |", "| --- | --- | --- | --- | --- |"]
    for name, scores in confusion["per_class"].items():
        shown = ["-" if scores[key] is None else f"{scores[key]:.3f}" for key in ("precision", "recall", "f1")]
        lines.append(f"| {code(name)} | {' | '.join(shown)} | {scores['support']} |")
    if has_picture:
        lines += ["", "![How often each class was taken for which](confusion_matrix.png)"]
    return "\n".join(["", *lines, ""])


def _training(data: dict[str, Any]) -> str:
    if not data:
        return "What it was trained on is not recorded."
    facts = {name: value for name, value in data.items() if value is not None and not isinstance(value, dict)}
    return table(["fact", "value"], [[name.replace("_", " "), _fact(value)] for name, value in facts.items()])


__all__ = ["CARD", "TEMPLATES", "check_records", "figure_text", "packages", "write_card"]
