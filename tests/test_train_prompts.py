"""Prompts and rows as at inference."""

import math

import datasets
import pytest
from transformers import BloomConfig, GPT2Config, MambaConfig, PhiConfig

from sigphi.train.prompts import context_length, prepare_tokenizer, tokenize_questions, tokenized_rows


@pytest.mark.parametrize("num_image_tokens", [1, 4])
def test_prompts_are_the_ids_of_the_chat_template(tiny_vlm_processor, images, num_image_tokens):
    tiny_vlm_processor.num_image_tokens = num_image_tokens
    questions = ["What color is the dog?", " Is this a ship? ", "What color is the dog?"]
    for question, ids in zip(questions, tokenize_questions(tiny_vlm_processor, questions), strict=True):
        content = [{"type": "image", "image": images[0]}, {"type": "text", "text": question}]
        inputs = tiny_vlm_processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert ids == list(inputs["input_ids"][0])
        assert ids.count(tiny_vlm_processor.image_token_id) == num_image_tokens


def test_training_rows_are_the_ids_of_the_whole_conversation(tiny_vlm_processor, images):
    rows = datasets.Dataset.from_dict({"question": ["What is it?"], "answer": [" It is a cat. "]})
    (row,) = tokenized_rows(tiny_vlm_processor, rows, [3])
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "It is a cat."}]},
    ]
    inputs = tiny_vlm_processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert row["prompt_ids"] + row["answer_ids"] == list(inputs["input_ids"][0])
    assert row["answer_ids"][-1] == tiny_vlm_processor.tokenizer.eos_token_id
    assert row["image_index"] == 3


def test_the_tokenizer_gets_a_placeholder_and_a_padding_token_of_its_own(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    size = len(tokenizer)
    prepared = prepare_tokenizer(tokenizer, image_token="<picture>")
    assert prepared.pad_token_id != prepared.eos_token_id
    assert prepared.tokenize("a<picture>b").count("<picture>") == 1
    assert prepared.padding_side == "left"
    assert len(prepare_tokenizer(prepared, image_token="<picture>")) == len(prepared) <= size + 2


def test_a_language_model_reads_as_much_as_its_config_says_or_without_end():
    assert [context_length(config) for config in (PhiConfig(), GPT2Config(n_positions=77))] == [2048, 77]
    assert [context_length(config) for config in (BloomConfig(), MambaConfig())] == [math.inf, math.inf]
