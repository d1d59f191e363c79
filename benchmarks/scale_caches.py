"""Files of features, as training writes them: a part of benchmarks/scale.py."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from scale_processes import tell

from sigphi.train.feature_cache import cached_features

# Phi-2's states; an image as one token, and as 49 of a ResNet-50's last stage.
CACHES = [
    ("text", (2_000, 2560), torch.float32),
    ("text", (2_000, 2560), torch.bfloat16),
    ("image", (2_000, 1, 512), torch.float32),
    ("image", (200, 49, 2048), torch.bfloat16),
]


def caches() -> list[dict[str, Any]]:
    """Files of features as training writes them, against rows x numbers of a row x bytes of a number."""
    found = []
    for kind, shape, dtype in CACHES:
        with tempfile.TemporaryDirectory() as folder:
            rows = torch.zeros(shape, dtype=dtype)
            about = {"kind": kind, "shape": list(shape)}
            option = f"--{kind}-cache"
            cached_features(option, folder, about, shape, dtype, lambda rows=rows: [(range(len(rows)), rows)])
            size = next(Path(folder).iterdir()).stat().st_size
        names = {"kind": kind, "numbers_of_a_row": rows[0].numel(), "dtype": str(dtype).removeprefix("torch.")}
        formula = rows.numel() * dtype.itemsize
        found.append(names | {"rows": len(rows), "file_bytes": size, "formula_bytes": formula})
    return found


if __name__ == "__main__":
    tell({"caches": caches})
