"""Which precision pays on the device at hand, and which one weights have in it."""

import torch
from transformers import TrainingArguments


def cpu_has_bfloat16() -> bool:
    """
    Whether this processor computes in bfloat16, by oneDNN: with AVX-512 or AMX on x86, with BF16 on Arm.

    Others convert number by number, twenty times slower than in float32.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def gpu_has_bfloat16() -> bool:
    """Whether the GPU, if there is one, computes in bfloat16 itself: NVIDIA's do from Ampere on."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def weights_dtype(training: TrainingArguments) -> torch.dtype:
    """What a frozen language model, and the arithmetic on its quantised weights, is kept in for a training."""
    if training.bf16:
        return torch.bfloat16
    return torch.float16 if training.fp16 else torch.float32


def tower_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a frozen image tower is kept in beside a language model in `dtype`: a ResNet may overflow in float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def inference_dtype() -> torch.dtype | str:
    """The `dtype` to load a model with: the one it was saved in, but float32 on a CPU that has no bfloat16."""
    return "auto" if torch.accelerator.is_available() or cpu_has_bfloat16() else torch.float32


__all__ = ["cpu_has_bfloat16", "gpu_has_bfloat16", "inference_dtype", "tower_dtype", "weights_dtype"]
