"""Train both models on drawn pictures, and push the encoder and the VLM in its three forms.

    python tests/matrix_writer.py < job.json

Run by tests/version_matrix.py in environments with sigphi. What each model that was saved gives here, in memory and in
the precision that it is stored in, is left beside, for comparison with what others load.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi
from matrix_reader import answers_of, versions
from toy_base import write_toy_base
from transformers import AutoProcessor

from sigphi import SiglipResNetModel, SigPhiForConditionalGeneration
from sigphi.train import export, merge, push, siglip, vlm
from sigphi.train.data_build import build_csv

IMAGES = "synthetic:200"
TINY = ["--hidden-sizes", "8", "16", "--depths", "1", "1", "--layer-type", "basic", "--embedding-size", "8"]
# The models that were saved last, by class.
SAVED: dict[str, Any] = {}


def keep_what_is_saved(kind: Any) -> None:
    """Let `SAVED` have every model of a class that is saved from now on."""
    save = kind.save_pretrained

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        SAVED[kind.__name__] = self
        return save(self, *args, **kwargs)

    kind.save_pretrained = save_pretrained


def saved_model(folder: Path) -> tuple[Any, Any]:
    """
    The model in memory whose weights lie in `folder`, and its processor.

    Training keeps in float32 what is loaded in the precision that the config names, computes under autocast, and has
    kernels in another order of memory.
    """
    config = json.loads((folder / "config.json").read_text())
    is_encoder = config["model_type"] == "siglip_resnet"
    model = SAVED["SiglipResNetModel" if is_encoder else "SigPhiForConditionalGeneration"]
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    if is_encoder:
        model.load_text_tower()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, config["dtype"])).contiguous()
    return model.eval(), AutoProcessor.from_pretrained(folder)


def push_base(csv: Path, folder: Path, repo: str) -> None:
    """A Phi of two layers that knows the words of the questions, on the Hub."""
    write_toy_base(csv, IMAGES, folder)
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)


def main() -> None:
    """Read a job from standard input, and leave `results.pt` and `report.json` in its folder."""
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    folder, names = Path(job["folder"]), job["repos"]
    keep_what_is_saved(SiglipResNetModel)
    keep_what_is_saved(SigPhiForConditionalGeneration)
    csv = folder / "qa.csv"
    build_csv(csv, IMAGES, "train", num_images=60)
    push_base(csv, folder / "base", names["base"])
    results = {}

    def remember(form: str) -> None:
        results[names[form]] = answers_of(*saved_model(folder / form))

    common = ["--input-csv", str(csv), "--images", IMAGES, "--num-epochs", "2", "--report-to", "none"]
    common += ["--push-to-hub", "--hub-strategy", "end"]
    words = [*common, "--hub-model-id", names["encoder"], "--output-dir", str(folder / "encoder")]
    siglip.main([*words, "--text-model", names["base"], "--batch-size", "32", *TINY])
    remember("encoder")
    words = [*common, "--hub-model-id", names["adapter"], "--output-dir", str(folder / "adapter")]
    words += ["--siglip-checkpoint", names["encoder"], "--language-model", names["base"], "--lora-r", "4"]
    vlm.main([*words, "--batch-size", "64", "--learning-rate", "0.01", "--gradient-checkpointing", "false"])
    remember("adapter")
    for form, command in (("merged", merge), ("nf4", export)):
        options = ["--form", "nf4"] if form == "nf4" else []
        SAVED.clear()
        command.main([str(folder / "adapter"), str(folder / form), "--parity-questions", "10", *options])
        remember(form)
        push.main([str(folder / form), "--repo-id", names[form]])
    torch.save(results, folder / "results.pt")
    (folder / "report.json").write_text(json.dumps({"versions": versions()}))


if __name__ == "__main__":
    main()
