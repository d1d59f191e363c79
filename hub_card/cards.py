"""Model cards, rendered from what the model's folder records."""

import json
from pathlib import Path
from string import Template
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def write_card(folder: Path, model_id: str | None = None) -> None:
    """
    Write `README.md` into a model's folder, from its `config.json`, `eval_results.json` and `training_data.json`.

    Facts that the folder does not hold are said to be unknown; nothing is made up.

    Args:
        folder (`Path`): holds at least `config.json` of one of this package's models.
        model_id (`str`, *optional*): the repository id in the loading code, by default the folder's name.
    """
    config = _read_json(folder / "config.json")
    facts = {
        "model_id": model_id or folder.resolve().name,
        "projection_dim": config.get("projection_dim", 512),
        "num_image_tokens": config.get("num_image_tokens", 1),
        "image_size": config["vision_config"].get("image_size", 224),
        "text_tower": _text_tower(config),
        "form": _form(config),
        "results": _results(_read_json(folder / "eval_results.json")),
        "training": _training(_read_json(folder / "training_data.json")),
    }
    template = Template((TEMPLATES / f"{config['model_type']}.md").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(template.substitute(facts), encoding="utf-8")


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


def _results(results: dict[str, Any]) -> str:
    rows = [f"| `{name}` | {value:.4f} |" for name, value in results.items() if isinstance(value, (int, float))]
    if not rows:
        return "Not evaluated yet: `sigphi evaluate` writes the figures."
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def _training(data: dict[str, Any]) -> str:
    if not data:
        return "What it was trained on is not recorded."
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in data.items() if not isinstance(value, dict)]
    return "\n".join(["| fact | value |", "| --- | --- |", *rows])


__all__ = ["write_card"]
