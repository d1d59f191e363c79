"""Merge LoRA into the language model: `sigphi export` with `--form merged`.

sigphi merge outputs/vlm outputs/vlm-merged
"""

from sigphi.train.errors import run_command
from sigphi.train.export import run


def main(argv: list[str] | None = None) -> None:
    """`sigphi merge MODEL OUTPUT`."""
    run(argv, "sigphi merge", "merged")


__all__ = ["main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.merge")
