"""ROUGE-L of the package rouge_score as a metric of `evaluate` that loads without a network."""

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

_DESCRIPTION = """
Mean over the rows of ROUGE-L's F-measure (Lin, 2004): the longest common subsequence of words, in lower case, without
stemming, 0 to 1. Measures wording, not truth.
"""


class RougeL(evaluate.Metric):
    """`evaluate.load(".../rouge_l").compute(predictions=texts, references=texts)` gives `{"rougeL": float}`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Lin, 2004: ROUGE: A package for automatic evaluation of summaries.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scorer = RougeScorer(["rougeL"])
        pairs = list(zip(predictions, references, strict=True))
        # Templated answers repeat, and each costs a table of words by words.
        scores = {pair: scorer.score(target=pair[1], prediction=pair[0])["rougeL"].fmeasure for pair in set(pairs)}
        return {"rougeL": float(np.mean([scores[pair] for pair in pairs]))}
