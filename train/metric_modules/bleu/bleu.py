"""Corpus BLEU of the package sacrebleu as a metric of `evaluate` that loads without a network."""

import datasets
import evaluate
import sacrebleu

_DESCRIPTION = """
BLEU-4 over all rows together (Papineni et al., 2002), with sacrebleu's own tokens and exponential smoothing, 0 to 1
(sacrebleu prints 0 to 100). Measures wording, not truth, and depends on which rows are in the corpus: not for
comparing data sets.
"""


class Bleu(evaluate.Metric):
    """`evaluate.load(".../bleu").compute(predictions=texts, references=texts)` gives `{"bleu": float}`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Post, 2018: A call for clarity in reporting BLEU scores. arXiv 1804.08771.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score / 100}
