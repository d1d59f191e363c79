"""One image, and a conversation about it."""

import sys
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES
from PIL import Image

from sigphi.modeling.modeling_sigphi import CACHE
from sigphi.train import ask, describe
from sigphi.train.chat import AnswerStreamer, Conversation, load_vlm, open_image
from sigphi.train.errors import UserError
from sigphi.train.images import load_images
from sigphi.train.predictions import ABSTAINED, Given


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "cat.png"
    Image.new("RGBA", (5, 4), (255, 0, 0, 0)).save(path)
    return str(path)


def test_a_file_is_opened_in_rgb(picture):
    image = open_image(picture, TOY_IMAGES)
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert image.getpixel((0, 0)) == (255, 255, 255), "what is transparent lies over white"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_of_an_image_set_is_opened(split):
    expected = load_images(TOY_IMAGES, split)[7]["img"]
    assert open_image(f"{split}:7", TOY_IMAGES).tobytes() == expected.convert("RGB").tobytes()


def test_a_row_out_of_range_names_the_rows_there_are():
    with pytest.raises(UserError, match="IMAGE train:200: synthetic:200 has 200 train images, rows 0 to 199"):
        open_image("train:200", TOY_IMAGES)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.png: there is no such file.*test:12"):
        open_image(str(tmp_path / "nothing.png"), TOY_IMAGES)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    text = tmp_path / "cat.png"
    text.write_text("a cat")
    for name in (text, tmp_path):
        with pytest.raises(UserError, match="this is no picture that can be read"):
            open_image(str(name), TOY_IMAGES)


def test_a_picture_that_is_cut_off_is_refused(picture, tmp_path):
    whole = (tmp_path / "cat.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(UserError, match="this is no picture that can be read"):
        open_image(str(tmp_path / "half.png"), TOY_IMAGES)


class Scripted:
    """In place of `generate`: notes what it is given, and answers with its number."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.prompts: list[str] = []
        self.pixels: list[torch.Tensor] = []
        self.options: list[dict[str, Any]] = []

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_processor: Any, **options: Any
    ) -> torch.Tensor:
        self.prompts.append(self.processor.tokenizer.decode(input_ids[0]))
        self.pixels.append(options.pop("pixel_values"))
        self.options.append(options)
        answer = self.processor.tokenizer(f" answer {len(self.prompts)}<|endoftext|>", return_tensors="pt")
        logits_processor[0].steps = [torch.tensor([0.5]).log()] * answer["input_ids"].shape[1]
        return torch.cat([input_ids, answer["input_ids"]], dim=1)


@pytest.fixture
def scripted(tiny_vlm, tiny_vlm_processor, monkeypatch) -> Scripted:
    script = Scripted(tiny_vlm_processor)
    monkeypatch.setattr(tiny_vlm, "generate", script)
    monkeypatch.setattr(tiny_vlm.config.text_config, "max_position_embeddings", 90)
    return script


@pytest.fixture
def conversation(scripted, tiny_vlm, tiny_vlm_processor, images) -> Conversation:
    return Conversation(tiny_vlm, tiny_vlm_processor, images[0], max_new_tokens=10)


def test_the_history_is_in_view_of_each_question(conversation, scripted):
    assert conversation.ask("What is it?") == Given("answer 1", pytest.approx(0.5))
    assert conversation.ask("Which color?").text == "answer 2"
    assert conversation.turns == [("What is it?", "answer 1"), ("Which color?", "answer 2")]
    first, second = scripted.prompts
    assert first == "<image>Question: What is it?\nAnswer:"
    assert second == ("<image>Question: What is it?\nAnswer: answer 1<|endoftext|>\nQuestion: Which color?\nAnswer:")
    del scripted.options[0][CACHE]
    assert scripted.options[0] == {"max_new_tokens": 10, "do_sample": False, "streamer": None}
    assert all(pixels.shape == (1, 3, 32, 32) for pixels in scripted.pixels)


def test_the_oldest_turns_are_left_out_at_the_end_of_the_context(conversation, scripted):
    questions = [f"Number {number}, is this a ship, a truck or a deer?" for number in range(6)]
    for question in questions:
        conversation.ask(question)
    assert len(conversation.turns) == 6
    last = scripted.prompts[-1]
    kept = [number for number, question in enumerate(questions) if question in last]
    assert kept == list(range(kept[0], 6)) and 0 < kept[0] < 5
    assert last.startswith(f"<image>Question: {questions[kept[0]]}") and last.count("<image>") == 1
    lengths = [len(conversation.processor.tokenizer(prompt)["input_ids"]) for prompt in scripted.prompts]
    assert max(lengths) <= 80
    # One turn more would not have fitted.
    turn = f"Question: {questions[kept[0] - 1]}\nAnswer: answer {kept[0]}<|endoftext|>\n"
    assert lengths[-1] + len(conversation.processor.tokenizer(turn)["input_ids"]) > 80


def test_a_question_that_does_not_fit_is_refused(conversation, scripted):
    conversation.ask("What is it?")
    with pytest.raises(UserError, match="the question has .* tokens, the model reads at most 80. Shorten it"):
        conversation.ask("is this a ship " * 60)
    assert len(conversation.turns) == 1 and len(scripted.prompts) == 1


def test_the_placeholder_in_a_question_is_refused(conversation, scripted):
    with pytest.raises(UserError, match="'<image>', which stands for the image"):
        conversation.ask("What is <image> this?")
    assert scripted.prompts == []


def test_a_real_model_answers_as_generate_does(tiny_vlm, tiny_vlm_processor, images):
    conversation = Conversation(tiny_vlm, tiny_vlm_processor, images[1], max_new_tokens=6)
    answer = conversation.ask("What color is the dog?").text
    text = "<image>Question: What color is the dog?\nAnswer:"
    inputs = tiny_vlm_processor(images=images[1], text=text, return_tensors="pt")
    tokens = tiny_vlm.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == tiny_vlm_processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() != ""


def test_a_turn_of_little_confidence_is_not_in_view_of_later_ones(conversation, scripted):
    conversation.abstain_below = 0.6
    conversation.ask("What is it?")
    conversation.ask("Which color?")
    assert conversation.turns == []
    assert scripted.prompts[1] == "<image>Question: Which color?\nAnswer:"


# With what was read before -------------------------------------------------------------------------------------------


def fresh_answer(model: Any, processor: Any, image: Any, turns: list[tuple[str, str]], question: str) -> Given:
    """The answer of a conversation that has read nothing, with these turns behind it."""
    return Conversation(model, processor, image, 8, turns=list(turns)).ask(question)


def test_a_conversation_that_keeps_what_it_has_read_answers_as_one_that_reads_all_again(
    tiny_vlm, tiny_vlm_processor, images
):
    seen: list[int] = []
    positions: list[int] = []
    tiny_vlm.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    tiny_vlm.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    conversation = Conversation(tiny_vlm, tiny_vlm_processor, images[0], max_new_tokens=8)
    answers, read = [], []
    for question in ("What is it?", "What color is the dog?", "Is this a ship on the sea?", "A deer?", "A truck?"):
        turns = list(conversation.turns)
        positions.clear()
        given = conversation.ask(question)
        read.append((positions[0], len(seen)))
        answers.append((turns, question, given))
    assert [images_read for _, images_read in read] == [1] * 5
    for (turns, question, given), (first, _) in zip(answers, read, strict=True):
        positions.clear()
        expected = fresh_answer(tiny_vlm, tiny_vlm_processor, images[0], turns, question)
        assert given.text == expected.text
        assert given.confidence == pytest.approx(expected.confidence, rel=1e-4)
        assert first < positions[0] or not turns


def test_a_generation_that_was_broken_off_leaves_nothing_behind(tiny_vlm, tiny_vlm_processor, images, monkeypatch):
    conversation = Conversation(tiny_vlm, tiny_vlm_processor, images[0], max_new_tokens=8)
    conversation.ask("What is it?")
    turns = list(conversation.turns)

    class Stopped(BaseException):
        pass

    class Stop(AnswerStreamer):
        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                raise Stopped
            super().put(value)

    with pytest.raises(Stopped):
        conversation.ask("Which color?", Stop(tiny_vlm_processor.tokenizer))
    assert conversation.turns == turns
    expected = fresh_answer(tiny_vlm, tiny_vlm_processor, images[0], turns, "A deer?")
    assert conversation.ask("A deer?").text == expected.text


# Streaming -----------------------------------------------------------------------------------------------------------


def test_an_answer_appears_token_by_token(tiny_vlm, tiny_vlm_processor, images, monkeypatch):
    conversation = Conversation(tiny_vlm, tiny_vlm_processor, images[1], max_new_tokens=30)
    written: list[tuple[int, str]] = []
    steps: list[int] = []
    tiny_vlm.lm_head.register_forward_hook(lambda *_: steps.append(1))
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append((len(steps), text)))
    given = conversation.ask("What color is the dog?", AnswerStreamer(tiny_vlm_processor.tokenizer))
    monkeypatch.undo()
    assert "".join(text for _, text in written) == given.text + "\n"
    moments = [step for step, text in written if text]
    assert len(set(moments)) > 5 and moments[0] < 15


@pytest.mark.parametrize("text", [" It is  a cat.\n\nAnd a dog. ", "\n \n", "", "  a\n"])
def test_what_is_streamed_is_the_answer_without_white_space_around_it(text, tokenizer, capsys):
    streamer = AnswerStreamer(tokenizer)
    for _ in range(2):
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert capsys.readouterr().out == text.strip() + "\n"


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vlm_folder(tiny_vlm, tiny_vlm_processor, tmp_path) -> str:
    folder = tmp_path / "vlm"
    tiny_vlm.save_pretrained(folder)
    tiny_vlm_processor.save_pretrained(folder)
    return str(folder)


def test_ask_prints_one_answer(vlm_folder, picture, capsys):
    ask.main([vlm_folder, picture, "-q", "What color is the dog?", "--max-new-tokens", "5"])
    model, processor = load_vlm(vlm_folder)
    expected = Conversation(model, processor, open_image(picture, TOY_IMAGES), 5).ask("What color is the dog?")
    assert capsys.readouterr().out == expected.text + "\n"


def test_ask_without_a_question_is_a_chat_until_an_empty_line(vlm_folder, picture, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", iter(["What is it?\n", "What color?\n", "\n", "not asked\n"]))
    ask.main([vlm_folder, picture, "--max-new-tokens", "3"])
    assert capsys.readouterr().out.count("> ") == 3


def test_describe_names_the_images_when_there_are_several(vlm_folder, picture, capsys):
    describe.main([vlm_folder, picture, "--max-new-tokens", "4"])
    alone = capsys.readouterr().out
    describe.main([vlm_folder, picture, "train:3", "--images", TOY_IMAGES, "--max-new-tokens", "4"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{picture}: {alone.rstrip()}"
    assert second.startswith("train:3: ")


def test_confidence_is_shown_on_demand(vlm_folder, picture, capsys, monkeypatch):
    argv = [vlm_folder, picture, "--max-new-tokens", "3", "--show-confidence"]
    model, processor = load_vlm(vlm_folder)
    expected = Conversation(model, processor, open_image(picture, TOY_IMAGES), 3).ask("What is it?")
    ask.main([*argv, "-q", "What is it?"])
    assert capsys.readouterr().out == f"{expected.text}\n(confidence {expected.confidence:.2f})\n"
    monkeypatch.setattr("sys.stdin", iter(["What is it?\n", "\n"]))
    ask.main(argv)
    assert f"> {expected.text}\n(confidence {expected.confidence:.2f})\n> " in capsys.readouterr().out
    describe.main(argv)
    assert capsys.readouterr().out.count("(confidence 0.") == 1


def test_an_unsure_model_abstains(vlm_folder, picture, capsys, monkeypatch):
    argv = [vlm_folder, picture, "--max-new-tokens", "3"]
    model, processor = load_vlm(vlm_folder)
    given = Conversation(model, processor, open_image(picture, TOY_IMAGES), 3).ask("What is it?")
    assert 0.01 < given.confidence < 0.99
    for below, shown in ((given.confidence - 0.005, given.text), (given.confidence + 0.005, ABSTAINED)):
        ask.main([*argv, "-q", "What is it?", "--abstain-below", str(below)])
        assert capsys.readouterr().out == f"{shown}\n"
        monkeypatch.setattr("sys.stdin", iter(["What is it?\n"]))
        ask.main([*argv, "--abstain-below", str(below)])
        assert f"> {shown}\n> " in capsys.readouterr().out
    describe.main([*argv, "--abstain-below", "1"])
    assert capsys.readouterr().out == f"{ABSTAINED}\n"
