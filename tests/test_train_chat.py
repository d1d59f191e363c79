"""One image, and a conversation about it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES
from PIL import Image

from sigphi.train import ask, describe
from sigphi.train.chat import Conversation, load_vlm, open_image
from sigphi.train.errors import UserError
from sigphi.train.images import load_images


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


class FakeModel:
    """Notes the prompts that it is given, and answers with its number."""

    device = torch.device("cpu")

    def __init__(self, processor: Any, context: int) -> None:
        self.processor = processor
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=context))
        self.prompts: list[str] = []
        self.pixels: list[torch.Tensor] = []
        self.options: list[dict[str, Any]] = []

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: Any, **options: Any
    ) -> Any:
        self.prompts.append(self.processor.tokenizer.decode(input_ids[0]))
        self.pixels.append(pixel_values)
        self.options.append(options)
        answer = self.processor.tokenizer(f" answer {len(self.prompts)}<|endoftext|>", return_tensors="pt")
        return torch.cat([input_ids, answer["input_ids"]], dim=1)


@pytest.fixture
def conversation(tiny_vlm_processor, images) -> Conversation:
    model = FakeModel(tiny_vlm_processor, context=90)
    return Conversation(model, tiny_vlm_processor, images[0], max_new_tokens=10)


def test_the_history_is_in_view_of_each_question(conversation):
    assert conversation.ask("What is it?") == "answer 1"
    assert conversation.ask("Which color?") == "answer 2"
    assert conversation.turns == [("What is it?", "answer 1"), ("Which color?", "answer 2")]
    first, second = conversation.model.prompts
    assert first == "<image>Question: What is it?\nAnswer:"
    assert second == ("<image>Question: What is it?\nAnswer: answer 1<|endoftext|>\nQuestion: Which color?\nAnswer:")
    assert conversation.model.options[0] == {"max_new_tokens": 10, "do_sample": False}
    assert all(pixels.shape == (1, 3, 32, 32) for pixels in conversation.model.pixels)


def test_the_oldest_turns_are_left_out_at_the_end_of_the_context(conversation):
    questions = [f"Number {number}, is this a ship, a truck or a deer?" for number in range(6)]
    for question in questions:
        conversation.ask(question)
    assert len(conversation.turns) == 6
    last = conversation.model.prompts[-1]
    kept = [number for number, question in enumerate(questions) if question in last]
    assert kept == list(range(kept[0], 6)) and 0 < kept[0] < 5
    assert last.startswith(f"<image>Question: {questions[kept[0]]}") and last.count("<image>") == 1
    lengths = [len(conversation.processor.tokenizer(prompt)["input_ids"]) for prompt in conversation.model.prompts]
    assert max(lengths) <= 80
    # One turn more would not have fitted.
    turn = f"Question: {questions[kept[0] - 1]}\nAnswer: answer {kept[0]}<|endoftext|>\n"
    assert lengths[-1] + len(conversation.processor.tokenizer(turn)["input_ids"]) > 80


def test_a_question_that_does_not_fit_is_refused(conversation):
    conversation.ask("What is it?")
    with pytest.raises(UserError, match="the question has .* tokens, the model reads at most 80. Shorten it"):
        conversation.ask("is this a ship " * 60)
    assert len(conversation.turns) == 1 and len(conversation.model.prompts) == 1


def test_the_placeholder_in_a_question_is_refused(conversation):
    with pytest.raises(UserError, match="'<image>', which stands for the image"):
        conversation.ask("What is <image> this?")
    assert conversation.model.prompts == []


def test_a_real_model_answers_as_generate_does(tiny_vlm, tiny_vlm_processor, images):
    conversation = Conversation(tiny_vlm, tiny_vlm_processor, images[1], max_new_tokens=6)
    answer = conversation.ask("What color is the dog?")
    text = "<image>Question: What color is the dog?\nAnswer:"
    inputs = tiny_vlm_processor(images=images[1], text=text, return_tensors="pt")
    tokens = tiny_vlm.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == tiny_vlm_processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() != ""


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
    assert capsys.readouterr().out == expected + "\n"


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
