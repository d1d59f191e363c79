"""What somebody does who has only the name of a repository, and the packages that its card names.

    python tests/matrix_reader.py < job.json

Run by tests/version_matrix.py in environments without sigphi. The job names repositories and holds the code of their
cards; for each, the model that this code loads embeds or answers, and a new copy of it makes a step of training.
tests/matrix_writer.py lets the models that it has in memory do the same by the functions of this file.
"""

import contextlib
import importlib.util
import io
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TEXTS = ["a cat", "The dog is brown.", "A small frog sits on a green leaf."]
QUESTIONS = ["What is the main object in this image?", "Can it fly?", "What color is the background?"]
NEW_TOKENS = 16
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow")
PACKAGES += ("peft", "accelerate", "bitsandbytes", "torchvision", "datasets", "sigphi")


def versions() -> dict[str, str]:
    """Of the packages that are installed here."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def pictures() -> list[Image.Image]:
    """Noise in three colours: two pictures of the size that the models see, and one that is resized."""
    noise = np.random.default_rng(0)
    sizes = ((32, 32), (32, 32), (48, 40))
    tints = ((255, 40, 40), (40, 255, 40), (40, 40, 255))
    return [
        Image.fromarray((noise.random((height, width, 3)) * tint).astype(np.uint8))
        for (width, height), tint in zip(sizes, tints, strict=True)
    ]


def encoder_inputs(processor: Any) -> dict[str, torch.Tensor]:
    """Texts and pictures."""
    return dict(processor(images=pictures(), text=TEXTS, padding=True, return_tensors="pt"))


def vlm_inputs(processor: Any) -> dict[str, torch.Tensor]:
    """A question about each picture."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(pictures(), QUESTIONS, strict=True)
    ]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    options |= {"return_tensors": "pt", "processor_kwargs": {"padding": True}}
    return dict(processor.apply_chat_template(chats, **options))


@torch.no_grad()
def answers_of(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    """What a model gives for pictures and texts, or answers: its inputs, numbers and tokens by name."""
    if model.config.model_type == "siglip_resnet":
        inputs = encoder_inputs(processor)
        outputs = model(**inputs)
        return inputs | {
            "image_embeds": outputs.image_embeds,
            "text_embeds": outputs.text_embeds,
            "logits": outputs.logits_per_image,
        }
    inputs = vlm_inputs(processor)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return inputs | {"logits": model(**inputs).logits.float(), "tokens": tokens}


def training_losses(model: Any, processor: Any) -> list[float]:
    """The loss of a batch before and after one step on it; what LoRA leaves alone and what is quantised is frozen."""
    is_encoder = model.config.model_type == "siglip_resnet"
    has_lora = any("lora_" in name for name, _ in model.named_parameters())
    trained = []
    for name, parameter in model.named_parameters():
        is_tower = "vision_tower" in name if not is_encoder else "language_model" in name
        is_chosen = not has_lora or "lora_" in name or "multi_modal_projector" in name
        parameter.requires_grad_(parameter.is_floating_point() and is_chosen and not is_tower)
        trained += [parameter] if parameter.requires_grad else []
    inputs: dict[str, Any] = encoder_inputs(processor) if is_encoder else vlm_inputs(processor)
    if is_encoder:
        inputs["return_loss"] = True
    else:
        is_text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != processor.image_token_id)
        inputs["labels"] = inputs["input_ids"].masked_fill(~is_text, -100)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # dropout draws the same twice
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        assert not missing, f"no gradient: {missing[:5]}"
        optimizer.step()
    return losses


def run_card(code: str) -> dict[str, Any]:
    """The names that the code of a card leaves, and under `printed` what it prints."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return names | {"printed": out.getvalue()}


def main() -> None:
    """Read a job from standard input, and leave `results.pt` and `report.json` in its folder."""
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    assert importlib.util.find_spec("sigphi") is None, "sigphi is installed here"
    pictures()[0].save("image.png")
    results, report = {}, {"versions": versions(), "repos": {}}
    for repo, code in job["cards"].items():
        losses = training_losses(*(run_card(code)[name] for name in ("model", "processor")))
        names = run_card(code)
        model = names["model"]
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        results[repo] = answers_of(model, names["processor"])
        dtype = str(model.dtype).removeprefix("torch.")
        report["repos"][repo] = {"printed": names["printed"], "losses": losses, "dtype": dtype}
    torch.save(results, Path(job["folder"], "results.pt"))
    Path(job["folder"], "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
