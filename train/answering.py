"""Greedy answers to many questions about images, in batches; what the prompts of an image share is computed once."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.cache_utils import Cache

from sigphi.modeling.modeling_sigphi import CACHE, SigPhiForConditionalGeneration
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.batch_log import BatchLog, finished_batches
from sigphi.train.errors import UserError
from sigphi.train.fingerprints import digest
from sigphi.train.packing import attention_obstacle
from sigphi.train.predictions import Given
from sigphi.train.prompts import tokenize_questions

logger = logging.getLogger(__name__)

# Keys and values of shared tokens in memory at a time; for Phi-2 in 16 bits those of 22 images with 16 tokens.
PREFIX_BYTES = 2**27
# Padding between the image and a question is left out by these for certain.
_MASKED_ATTENTION = ("eager", "sdpa")


class ImageFeatures(Protocol):
    """What the projector reads of images, `(images, num_image_tokens, feature_size)`: a tensor, or made on demand."""

    def __getitem__(self, rows: list[int], /) -> torch.Tensor: ...


class TokenConfidence(LogitsProcessor):
    """Notes how probable the likeliest next token is, which greedy decoding takes."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Kept step by step, since all scores of a long answer over a large vocabulary would fill the memory.
        self.steps.append(scores.float().log_softmax(-1).amax(-1))  # (batch,)
        return scores

    def means(self, is_own: torch.Tensor) -> list[float]:
        """
        The confidence of each answer, see [`Given`].

        Args:
            is_own (`torch.BoolTensor` of shape `(batch, new tokens)`): which tokens belong to the answer; one that has
                ended is padded.
        """
        # On some devices generation makes a step more than it keeps.
        logs = torch.stack(self.steps[: is_own.shape[1]], 1)  # (batch, new tokens)
        return ((logs * is_own).sum(1) / is_own.sum(1).clamp(min=1)).exp().tolist()


def shared_prefix(prompts: Sequence[list[int]], image_token_id: int) -> list[int]:
    """
    The tokens that all prompts begin with, if their whole image is among them; a token of each is left over.

    Args:
        prompts: token ids, see [`tokenize_questions`].
        image_token_id (`int`): the image placeholder.
    """
    common = list(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    holds_image = common.count(image_token_id) == max(prompt.count(image_token_id) for prompt in prompts)
    return common if holds_image else []


def can_share_prefix(model: SigPhiForConditionalGeneration, longest: int) -> bool:
    """
    Whether the language model goes on behind a shared prefix as it would behind its own.

    Args:
        model (`SigPhiForConditionalGeneration`): the VLM.
        longest (`int`): tokens of the longest prompt with its answer.
    """
    config: Any = model.model.language_model.config
    return (
        config._attn_implementation in _MASKED_ATTENTION
        and attention_obstacle(config, longest) is None
        # A model that asks for a cache of its own kind refuses another one.
        and model.generation_config.cache_implementation is None
    )


class Answerer:
    """
    Answers questions about images greedily, some dozens at a time.

    Args:
        model, processor: of the VLM, in evaluation mode.
        image_features: of all images, see [`ImageFeatures`].
        pairs: the questions, each with the row of its image.
        batch_size (`int`, *optional*, defaults to 64): questions in a step.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
        shares_prefix (`bool`, *optional*): whether keys and values of the tokens that all prompts begin with (the
            image, and the text around it) are computed once an image instead of once a question. By default where an
            image has several questions, and where the language model can go on from there.
        torch_compile (`bool`, *optional*, defaults to `False`): run the step from one token to the next by compiled
            code. It takes a cache of fixed size, and batches of one size.
        static_cache (`bool`, *optional*): a cache of fixed size instead of one that grows. By default only for
            compiled code, without which it brings nothing.

    Attributes:
        batches (`list[list[tuple[str, int]]]`): the questions in the order to ask them. Those that end alike come
            together: they ask for the same, and their answers are about equally long.
    """

    def __init__(
        self,
        model: SigPhiForConditionalGeneration,
        processor: SigPhiProcessor,
        image_features: ImageFeatures,
        pairs: Iterable[tuple[str, int]],
        batch_size: int = 64,
        max_new_tokens: int = 80,
        shares_prefix: bool | None = None,
        torch_compile: bool = False,
        static_cache: bool | None = None,
    ) -> None:
        self.model, self.processor, self.image_features = model, processor, image_features
        self.batch_size, self.max_new_tokens, self.torch_compile = batch_size, max_new_tokens, torch_compile
        self.static_cache = torch_compile if static_cache is None else static_cache
        distinct = set(pairs)
        images = sorted({image for _, image in distinct})
        questions = sorted({question for question, _ in distinct})
        self.prompts = dict(zip(questions, tokenize_questions(processor, questions), strict=True))
        self.longest = max(map(len, self.prompts.values()), default=0) + max_new_tokens
        if shares_prefix is None:
            shares_prefix = len(distinct) > len(images) and can_share_prefix(model, self.longest)
        self.prefix = shared_prefix(list(self.prompts.values()), processor.image_token_id) if shares_prefix else []
        self._group_of = self._groups(images)
        self.batches = self._batches(distinct)
        self._rows: dict[int, int] = {}  # where in `_states` an image is
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keys and values of each layer
        self._static: Cache | None = None

    def _groups(self, images: list[int]) -> dict[int, list[int]]:
        """For each image those whose shared tokens are in memory together with its own."""
        if not self.prefix:
            return dict.fromkeys(images, images)
        states = self._prefix_states(images[:1])
        size = max(PREFIX_BYTES // sum(keys.nbytes + values.nbytes for keys, values in states.values()), 1)
        groups = [images[start : start + size] for start in range(0, len(images), size)]
        return {image: group for group in groups for image in group}

    def _batches(self, pairs: set[tuple[str, int]]) -> list[list[tuple[str, int]]]:
        def group(pair: tuple[str, int]) -> int:
            return self._group_of[pair[1]][0]

        ordered = sorted(pairs, key=lambda pair: (group(pair), pair[0][::-1], pair[1]))
        parts = [list(part) for _, part in groupby(ordered, group)]
        return [part[at : at + self.batch_size] for part in parts for at in range(0, len(part), self.batch_size)]

    def answer(self, pairs: Sequence[tuple[str, int]]) -> list[Given]:
        """The answers to one of `batches`."""
        tokens, confidence = self.tokens(pairs)
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        sure = confidence.means(tokens != self.processor.tokenizer.pad_token_id)
        return [Given(*one) for one in zip((text.strip() for text in texts), sure, strict=True)][: len(pairs)]

    @torch.no_grad()
    def tokens(self, pairs: Sequence[tuple[str, int]]) -> tuple[torch.Tensor, TokenConfidence]:
        """
        As [`~Answerer.answer`], before the tokens become text.

        Returns:
            `tuple`: token ids of shape `(questions, longest answer)`, int64, padded behind the end of an answer; and
            the [`TokenConfidence`] that has seen them. Compiled code has batches of one size: behind the questions
            come repeats of the last one.
        """
        if self.torch_compile:
            pairs = [*pairs, *[pairs[-1]] * (max(map(len, self.batches)) - len(pairs))]
        inputs, confidence = self._inputs(pairs), TokenConfidence()
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            disable_compile=not self.torch_compile,
            logits_processor=LogitsProcessorList([confidence]),
        )
        return tokens[:, inputs["input_ids"].shape[1] :], confidence

    def _inputs(self, pairs: Sequence[tuple[str, int]]) -> dict[str, Any]:
        images = [image for _, image in pairs]
        own = [self.prompts[question][len(self.prefix) :] for question, _ in pairs]
        padded = self.processor.tokenizer.pad({"input_ids": own}, padding_side="left", return_tensors="pt")
        shared = torch.tensor(self.prefix, dtype=torch.long).expand(len(pairs), -1)  # (questions, prefix)
        # The padding lies between the shared tokens and the question; positions are counted without it.
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([shared, padded["input_ids"]], 1).to(self.model.device),
            "attention_mask": torch.cat([torch.ones_like(shared), padded["attention_mask"]], 1).to(self.model.device),
        }
        if not self.prefix:
            inputs["image_features"] = self.image_features[images].to(self.model.device)
        if self.prefix or self.static_cache:
            inputs[CACHE] = self._cache(images)
        if self.torch_compile:
            inputs["compile_config"] = compile_config(self.model.device)
        return inputs

    def _cache(self, images: list[int]) -> Cache:
        """A cache that holds the shared tokens of these images."""
        config = self.model.model.language_model.config
        if not self.static_cache:
            cache: Cache = DynamicCache(config=config)
        elif self._static is None:
            cache = StaticCache(config=config, max_cache_len=self.longest)
            self._static = cache if self.torch_compile else None  # code is compiled for the place of its tensors
        else:
            cache = self._static
            cache.reset()
        if self.prefix:
            if images[0] not in self._rows:
                self._begin_group(self._group_of[images[0]])
            rows = [self._rows[image] for image in images]
            for layer, (keys, values) in self._states.items():
                cache.update(keys[rows], values[rows], layer)
        return cache

    def forget_prefix(self) -> None:
        """Free the memory of the keys and values that are shared; they are computed again when they are needed."""
        self._rows, self._states = {}, {}

    def _begin_group(self, images: list[int]) -> None:
        self.forget_prefix()  # the group before makes room
        starts = range(0, len(images), self.batch_size)
        parts = [self._prefix_states(images[start : start + self.batch_size]) for start in starts]
        self._states = {
            layer: (torch.cat([part[layer][0] for part in parts]), torch.cat([part[layer][1] for part in parts]))
            for layer in parts[0]
        }
        self._rows = {image: row for row, image in enumerate(images)}

    @torch.no_grad()
    def _prefix_states(self, images: list[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the shared tokens, `(images, heads, prefix, head size)`, for each layer that has some."""
        outputs = self.model.model(
            input_ids=torch.tensor(self.prefix, device=self.model.device).expand(len(images), -1),
            image_features=self.image_features[images].to(self.model.device),
            use_cache=True,
        )
        # Layers that read another one's have none of their own.
        layers = {number: layer for number, layer in enumerate(outputs[CACHE].layers) if layer.keys is not None}
        return {number: (layer.keys, layer.values) for number, layer in layers.items()}


def compile_config(device: torch.device) -> CompileConfig:
    """How `generate` compiles the step from one token to the next, on this device."""
    config = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    # Of itself it compiles for accelerators alone.
    config._compile_all_devices = True
    return config


def check_compilable(config: Any) -> None:
    """
    Raise a [`UserError`] if `--torch-compile` cannot work for a model or on this machine.

    Args:
        config (`SigPhiConfig`): of the model.
    """
    if config.base_bits != 16 or "quantization_config" in config.to_dict():
        raise UserError("--torch-compile needs weights that are not quantised, and those of MODEL are: leave it out.")
    if attention_obstacle(config.text_config, 0) is not None:
        kind = config.text_config.model_type
        raise UserError(f"--torch-compile does not work with a language model of the kind {kind!r}: leave it out.")
    compiler = os.environ.get("CXX", "g++")
    if not torch.accelerator.is_available() and shutil.which(compiler) is None:
        raise UserError(
            f"--torch-compile needs a C++ compiler, and there is no {compiler}: install one, or leave it out."
        )


def generate_answers(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    image_features: ImageFeatures,
    image_indices: Sequence[int],
    questions: Sequence[str],
    batch_size: int = 64,
    max_new_tokens: int = 80,
    log_folder: Path | None = None,
    torch_compile: bool = False,
    *,
    shares_prefix: bool | None = None,
    log_settings: dict[str, str] | None = None,
) -> list[Given]:
    """
    Greedy answers. The same question about the same image is answered once.

    Args:
        model, processor: of the VLM, in evaluation mode.
        image_features: a tensor of shape `(images, num_image_tokens, feature_size)`, see [`encode_images`], or what
            makes these on demand.
        image_indices (`Sequence[int]`): for each question the row of `image_features`.
        questions (`Sequence[str]`): one a row.
        batch_size, max_new_tokens, torch_compile, shares_prefix: see [`Answerer`].
        log_folder (`Path`, *optional*): keeps the answers of finished batches, so that the same call goes on where a
            killed one stopped. It stays when all are answered.
        log_settings (`dict[str, str]`, *optional*): what else the answers depend on, see [`BatchLog`].

    Raises:
        UserError: if `log_folder` is of other questions or settings, or in use.
    """
    asked = list(zip(questions, image_indices, strict=True))
    answerer = Answerer(
        model, processor, image_features, asked, batch_size, max_new_tokens, shares_prefix, torch_compile
    )
    batches = answerer.batches
    settings = (log_settings or {}) | {"the batches of questions": digest([json.dumps(batches).encode()])}
    with nullcontext() if log_folder is None else BatchLog(log_folder, settings) as log:
        finished = {} if log_folder is None else finished_batches(log_folder)
        if finished:
            logger.info("%d of %d batches were answered before: going on behind them", len(finished), len(batches))
        todo = [number for number in range(len(batches)) if number not in finished]
        for number in tqdm(todo, "answering", len(batches), initial=len(finished), disable=None, leave=False):
            finished[number] = answerer.answer(batches[number])
            if log is not None:
                log.add(number, finished[number])
    answers = [Given(*one) for number in range(len(batches)) for one in finished[number]]
    of_pair = dict(zip((pair for batch in batches for pair in batch), answers, strict=True))
    return [of_pair[pair] for pair in asked]


__all__ = [
    "Answerer",
    "ImageFeatures",
    "TokenConfidence",
    "can_share_prefix",
    "check_compilable",
    "compile_config",
    "generate_answers",
    "shared_prefix",
]
