"""ROUGE-L and BLEU from the metric modules that travel with the package."""

import importlib.util
import logging
import math
import random
from collections import Counter

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from sigphi.train.text_metrics import METRIC_MODULES, text_metrics_available, wording_scores

ANSWERS = ["The main object in this image is a cat.", "It is gray.", "", "No, it is not a dog but a frog!", "cat"]
REFERENCES = ["This image shows a cat.", "It is gray.", "A ship.", "No, it is a frog.", "The object is a cat, a cat."]


def sentences(seed: int, count: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices("a the cat dog is Gray blue , . it".split(), k=rng.randint(1, 14))) for _ in range(count)
    ]


def naive_rouge_l(answer: str, reference: str) -> float:
    """By the table of longest common subsequences, filled from its definition."""
    given, wanted = ("".join(c if c.isalnum() else " " for c in text.lower()).split() for text in (answer, reference))
    table = [[0] * (len(wanted) + 1) for _ in range(len(given) + 1)]
    for i, one in enumerate(given, 1):
        for j, other in enumerate(wanted, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
    longest = table[-1][-1]
    return 2 * longest / (len(given) + len(wanted)) if longest else 0.0


def naive_bleu(answers: list[str], references: list[str]) -> float:
    """BLEU-4 of texts whose tokens stand between spaces, each order having matches."""
    matched, total = [0] * 4, [0] * 4
    given_length = wanted_length = 0
    for answer, reference in zip(answers, references, strict=True):
        given, wanted = answer.split(), reference.split()
        given_length, wanted_length = given_length + len(given), wanted_length + len(wanted)
        for n in range(1, 5):
            grams, allowed = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (given, wanted))
            matched[n - 1] += (grams & allowed).total()
            total[n - 1] += grams.total()
    assert all(matched)
    brevity = min(1.0, math.exp(1 - wanted_length / given_length))
    return brevity * math.exp(sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / 4)


def test_known_values():
    assert wording_scores(["the cat sat"], ["the cat ran"])["rougeL"] == pytest.approx(2 / 3)
    assert wording_scores(REFERENCES, REFERENCES) == pytest.approx({"rougeL": 1, "bleu": 1})
    assert wording_scores(["", ""], ["A cat.", "A dog."]) == {"rougeL": 0, "bleu": 0}


@pytest.mark.parametrize(("answers", "references"), [(ANSWERS, REFERENCES), (sentences(0), sentences(1))])
def test_rouge_l_is_that_of_rouge_score_and_equals_the_naive_one(answers, references):
    pairs = list(zip(answers, references, strict=True))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    library = sum(scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs) / len(pairs)
    given = wording_scores(answers, references)["rougeL"]
    assert given == pytest.approx(library)
    assert given == pytest.approx(sum(naive_rouge_l(*pair) for pair in pairs) / len(pairs))
    assert 0 < given < 1


@pytest.mark.parametrize(("answers", "references"), [(ANSWERS, REFERENCES), (sentences(0), sentences(1))])
def test_bleu_is_that_of_sacrebleu(answers, references):
    library = sacrebleu.corpus_bleu(answers, [references]).score
    assert wording_scores(answers, references)["bleu"] == pytest.approx(library / 100)


def test_bleu_equals_the_naive_one():
    answers = sentences(2)
    # Some equal, some begun in the same way, some with nothing in common.
    pairs = enumerate(zip(answers, sentences(3), strict=True))
    references = [f"{text.rpartition(' ')[0]} {other}" if number % 3 else text for number, (text, other) in pairs]
    assert wording_scores(answers, references)["bleu"] == pytest.approx(naive_bleu(answers, references))


def test_they_load_without_a_network_in_a_new_home(run_child):
    code = f"""
import evaluate, socket
def refuse(*args, **kwargs):
    raise AssertionError("something wanted the network")
socket.socket.connect = refuse
texts = ["a b c d e"]
for name in ("rouge_l", "bleu"):
    metric = evaluate.load({str(METRIC_MODULES)!r} + "/" + name)
    print(*metric.compute(predictions=texts, references=texts).items())
"""
    assert run_child(code).split() == ["('rougeL',", "1.0)", "('bleu',", "1.0000000000000004)"]


def test_the_warning_names_what_is_missing_and_how_to_get_it(monkeypatch, caplog):
    assert text_metrics_available() and not caplog.records
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
    assert not text_metrics_available()
    (record,) = caplog.records
    assert all(
        part in record.getMessage() for part in ("rougeL", "bleu", "no sacrebleu", "pip install 'sigphi[eval]'")
    )


def test_the_root_logger_gets_no_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    # With one, all that a command logs would be printed twice.
    monkeypatch.setattr(logging.root, "handlers", [])
    wording_scores(["a cat"], ["a cat"])
    assert logging.root.handlers == []
