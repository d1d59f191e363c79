"""Questions as token ids, as the processor makes them at inference."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import datasets
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sigphi.processing.processing_sigphi import SigPhiProcessor


def tokenize_questions(processor: SigPhiProcessor, questions: Sequence[str]) -> list[list[int]]:
    """
    Token ids of prompts, with the image placeholders in them; equal questions are tokenised once.

    Args:
        processor (`SigPhiProcessor`): with the chat template.
        questions (`Sequence[str]`): what is asked about one image each.
    """

    @cache
    def ids(question: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompt = prompt.replace(processor.image_token, processor.image_token * processor.num_image_tokens)
        return processor.tokenizer(prompt)["input_ids"]

    return [ids(question) for question in questions]


def context_length(language_config: PreTrainedConfig) -> float:
    """The most tokens that a language model reads; infinity where its positions have no end, as BLOOM's."""
    return getattr(language_config, "max_position_embeddings", math.inf)


def tokenized_rows(
    processor: SigPhiProcessor, dataset: datasets.Dataset, image_indices: Sequence[int]
) -> list[dict[str, Any]]:
    """
    Rows for the VLM's collator: the prompt's ids as at inference, and the answer's ids with the end-of-text token.
    """
    prompts = tokenize_questions(processor, dataset["question"])
    tokenizer = processor.tokenizer
    answers = tokenizer([f" {answer.strip()}" for answer in dataset["answer"]], add_special_tokens=False)["input_ids"]
    return [
        {"image_index": image, "prompt_ids": prompt, "answer_ids": answer + [tokenizer.eos_token_id]}
        for image, prompt, answer in zip(image_indices, prompts, answers, strict=True)
    ]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>") -> PreTrainedTokenizerBase:
    """
    Add the image placeholder, and a padding token that is not the end-of-text token, where they are missing.

    With one token for both, the end of an answer would be masked like padding, and the model would never learn to
    stop.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): changed in place.
        image_token (`str`, *optional*, defaults to `"<image>"`): the placeholder.
    """
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([image_token], special_tokens=True)
    tokenizer.padding_side = "left"
    return tokenizer


__all__ = ["context_length", "prepare_tokenizer", "tokenize_questions", "tokenized_rows"]
