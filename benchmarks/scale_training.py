"""What a training step takes and sends, with one process and with two: a part of benchmarks/scale.py."""

import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from scale_loss import gradient_bytes, join, leave, loss_bytes, sent_bytes
from scale_processes import in_processes, tell
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sigphi import SiglipResNetConfig, SiglipResNetModel
from sigphi.train.losses import global_sigmoid_loss

BATCH, TURNS = 64, 2
STEPS, WARM_UP = 3, 1
# The image tower of the recipe cpu-small, and texts as wide as those of its small text tower.
TOWER = {
    "vision_config": {
        "layer_type": "basic",
        "embedding_size": 64,
        "hidden_sizes": [64, 256, 256],
        "depths": [1, 1, 1],
        "downsample_in_first_stage": True,
        "stem": "cifar",
        "image_size": 32,
    },
    "text_config": {"model_type": "phi", "hidden_size": 256, "num_attention_heads": 4},
    "include_text_tower": False,
}


def _train(rank: int, processes: int, batch: int, folder: str) -> dict[str, float]:
    """Steps of a training on made-up images, with the batch shared out: seconds, of the processor too, and bytes."""
    join(rank, processes, folder)
    torch.manual_seed(0)
    model: Any = SiglipResNetModel(SiglipResNetConfig(**TOWER))
    wrapped: nn.Module = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    own = batch // processes
    pixels = torch.randn(own, 3, 32, 32).to(memory_format=torch.channels_last)
    features = torch.randn(own, TOWER["text_config"]["hidden_size"])  # type: ignore[index]
    walls, processor, before = [], 0.0, 0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            if processes > 1:
                dist.barrier()
            processor, before = time.process_time(), sent_bytes()
        start = time.perf_counter()
        outputs = wrapped(pixel_values=pixels, text_features=features, return_logits=False)
        embeds = (outputs.image_embeds, outputs.text_embeds)
        global_sigmoid_loss(*embeds, model.logit_scale, model.logit_bias).backward()
        optimizer.step()
        optimizer.zero_grad()
        walls.append(time.perf_counter() - start)
    processor = (time.process_time() - processor) / STEPS
    if processes > 1:
        dist.barrier()
    sent = (sent_bytes() - before) / STEPS
    leave(processes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": min(walls[WARM_UP:]), "processor": processor, "sent": sent, "parameters": parameters}


def training() -> dict[str, Any]:
    """
    A step with one process and with two of one thread each, at the same batch, in turns.

    Returns:
        `dict`: `rows`, with `seconds` (of the quickest step of all turns), `processor_seconds` (of all processes
        together, the least of the turns), and the bytes that each process sent and should have sent; and the number
        of `default_parameters`, those of a ResNet-50 with a frozen Phi-2.
    """
    found: dict[int, list[list[dict[str, float]]]] = {1: [], 2: []}
    for _ in range(TURNS):
        for processes, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(in_processes(_train, processes, BATCH, folder))
    rows = []
    for processes, runs in found.items():
        parameters = int(runs[0][0]["parameters"])
        expected = loss_bytes("ring", BATCH, processes) + gradient_bytes(parameters, processes)
        rows.append(
            {
                "processes": processes,
                "batch": BATCH,
                "parameters": parameters,
                "seconds": min(max(one["seconds"] for one in run) for run in runs),
                "processor_seconds": min(sum(one["processor"] for one in run) for run in runs),
                "sent_bytes": round(min(run[0]["sent"] for run in runs) / processes),
                "formula_bytes": round(expected),
            }
        )
    return {"rows": rows, "default_parameters": trainable_parameters()}


def trainable_parameters() -> int:
    """Those of the default encoder, a ResNet-50 whose text tower is Phi-2 and frozen."""
    with torch.device("meta"):
        model = SiglipResNetModel(SiglipResNetConfig(include_text_tower=False))
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    tell({"training": training})
