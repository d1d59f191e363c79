"""ROUGE-L and BLEU, computed by rouge_score and sacrebleu through `evaluate`, without a network."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

# They travel with the package: by a bare name `evaluate` would look for them on the Hub.
METRIC_MODULES = Path(__file__).parent / "metric_modules"
_NEEDED = ("evaluate", "rouge_score", "sacrebleu")


def text_metrics_available() -> bool:
    """Whether the packages of the extra `eval` are there; without them one warning says what is left out."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        logger.warning("rougeL and bleu are left out (no %s): pip install 'sigphi[eval]'", ", ".join(missing))
    return not missing


def wording_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    How close the wording of answers is to that of the references.

    Not for truth: a wrong color in an otherwise equal sentence costs one word.

    Args:
        answers, references (`Sequence[str]`): equally many, at least one.

    Returns:
        `dict`: `rougeL`, the mean F-measure of the longest common subsequence of words, and `bleu`, over all rows as
        one corpus; both 0 to 1.

    Raises:
        ImportError: without the packages of the extra `eval`, see [`text_metrics_available`].
    """
    import evaluate

    handlers = logging.root.handlers[:]
    scores: dict[str, float] = {}
    for name in ("rouge_l", "bleu"):
        metric = evaluate.load(str(METRIC_MODULES / name), keep_in_memory=True)
        scores |= metric.compute(predictions=list(answers), references=list(references))
    # rouge_score logs by absl, which gives the root logger a handler where it has none: then all lines come twice.
    logging.root.handlers[:] = handlers
    return scores


__all__ = ["METRIC_MODULES", "text_metrics_available", "wording_scores"]
