"""Whether arithmetic in bfloat16 pays on the device at hand."""

import torch


def cpu_has_bfloat16() -> bool:
    """
    Whether this processor computes in bfloat16, by oneDNN: with AVX-512 or AMX on x86, with BF16 on Arm.

    Others convert number by number, twenty times slower than in float32.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def inference_dtype() -> torch.dtype | str:
    """The `dtype` to load a model with: the one it was saved in, but float32 on a CPU that has no bfloat16."""
    return "auto" if torch.accelerator.is_available() or cpu_has_bfloat16() else torch.float32


__all__ = ["cpu_has_bfloat16", "inference_dtype"]
