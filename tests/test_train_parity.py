"""How far two models say the same."""

import copy

import pytest
import torch
from conftest import TOY_IMAGES

from sigphi.train.errors import UserError
from sigphi.train.parity import ParityArguments, Transcript, compare, load_questions, transcript


def test_figures_by_hand():
    before = Transcript(["a", "b", "c"], [torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    after = Transcript(["a", "B", "c"], [torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0]])])
    found = compare(before, after)
    log_before, log_after = torch.tensor([[3.0, 0.0], [3.0, 4.0]]).double().log_softmax(-1)
    divergence = (log_before.exp() * (log_before - log_after)).sum().item()
    assert found == {
        "questions": 3,
        "identical_answers": 2,
        "logit_questions": 2,
        "logit_positions": 3,
        "next_token_agreement": pytest.approx(2 / 3),
        "mean_kl": pytest.approx(divergence / 3, rel=1e-5),
        "max_abs_logit_difference": 4.0,
        "mean_abs_logit_difference": pytest.approx(4 / 6),
    }


def test_questions_of_a_csv_are_drawn_and_those_about_drawn_pictures_need_none(toy_csv):
    of_csv = load_questions(ParityArguments(input_csv=str(toy_csv), images=TOY_IMAGES, parity_questions=12))
    assert len(of_csv.texts) == len(of_csv.image_indices) == 12 and of_csv.source == "qa.csv"
    assert len(set(of_csv.image_indices)) == len(of_csv.pixels) > 3, "drawn, not the first rows"
    drawn = load_questions(ParityArguments(parity_questions=12))
    assert len(drawn.texts) == 12 and len(drawn.pixels) == 3 and drawn.source == "drawn pictures"
    again = load_questions(ParityArguments(parity_questions=12))
    assert drawn.texts == again.texts and torch.equal(drawn.pixels, again.pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "folder"}, "--images and --image-split have no use without --input-csv"),
        ({"parity_questions": -1}, "--parity-questions must be 0 .* got -1"),
        ({"parity_batch_size": 0}, "--parity-batch-size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        ParityArguments(**options)


def test_a_model_agrees_with_itself_and_not_with_another(tiny_vlm, tiny_vlm_processor, monkeypatch):
    questions = load_questions(ParityArguments(parity_questions=10))
    options = {"batch_size": 4, "max_new_tokens": 6}
    before = transcript(tiny_vlm, tiny_vlm_processor, questions, **options)
    assert len(before.answers) == len(before.logits) == 10 and all(before.answers)
    same = compare(before, transcript(tiny_vlm, tiny_vlm_processor, questions, before.answers, **options))
    assert (same["identical_answers"], same["next_token_agreement"]) == (10, 1.0)
    assert same["mean_kl"] == same["max_abs_logit_difference"] == 0.0
    other = copy.deepcopy(tiny_vlm)
    torch.nn.init.normal_(other.model.multi_modal_projector.linear_2.weight, std=0.5)
    found = compare(before, transcript(other, tiny_vlm_processor, questions, before.answers, **options))
    assert found["identical_answers"] < 10 and found["mean_kl"] > 0 and found["max_abs_logit_difference"] > 0.1
    assert found["logit_positions"] == same["logit_positions"] == sum(len(logits) for logits in before.logits)
    monkeypatch.setattr("sigphi.train.parity.LOGITS_KEPT", before.logits[0].numel() + before.logits[1].numel())
    assert len(transcript(tiny_vlm, tiny_vlm_processor, questions, **options).logits) == 2
