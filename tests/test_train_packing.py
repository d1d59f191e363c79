"""Rows of many questions: sizes, rows, batches, the collator, and what the model makes of them."""

import copy
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    TrainerCallback,
)

from sigphi import SigPhiConfig, SigPhiForConditionalGeneration, VlmTrainingArguments
from sigphi.train.collators import IGNORE_INDEX, VlmCollator
from sigphi.train.errors import UserError
from sigphi.train.packing import (
    PackedBatches,
    PackingCollator,
    choose_packing,
    even_row_starts,
    packed_row_length,
    question_sizes,
    row_starts,
)
from sigphi.train.trainers import VlmTrainer

IMAGE, PAD = 375, 374  # of the tokenizer in conftest.py
VOCABULARY, TOKENS = 512, 4


def make_rows(num_images: int, seed: int = 0, questions: int = 5) -> list[dict[str, Any]]:
    """Up to `questions` questions an image, of different lengths, those of an image one behind the other."""
    source = random.Random(seed)

    def words(least: int, most: int) -> list[int]:
        return [source.randrange(5, 300) for _ in range(source.randint(least, most))]

    return [
        {"image_index": image, "prompt_ids": [IMAGE] * TOKENS + words(2, 9), "answer_ids": words(1, 8)}
        for image in range(num_images)
        for _ in range(source.randint(1, questions))
    ]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return make_rows(6)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(40, TOKENS, 16)


def packer(features: torch.Tensor, tokens_per_row: int = 64) -> PackingCollator:
    return PackingCollator(PAD, image_features=features, image_token_id=IMAGE, tokens_per_row=tokens_per_row)


# Rows ----------------------------------------------------------------------------------------------------------------


def cost(rows: list[dict[str, Any]]) -> int:
    """Tokens of one packed row, the naive way: neighbours of one image share its tokens."""
    total, before = 0, None
    for row in rows:
        length = len(row["prompt_ids"]) + len(row["answer_ids"])
        total += length if row["image_index"] != before else length - TOKENS
        before = row["image_index"]
    return total


def fewest_rows(rows: list[dict[str, Any]], capacity: int) -> int:
    """Of all ways to cut the order into rows that fit."""
    fewest = [0] + [len(rows)] * len(rows)
    for end in range(1, len(rows) + 1):
        fits = [start for start in range(end) if cost(rows[start:end]) <= capacity]
        fewest[end] = min(fewest[start] for start in fits) + 1
    return fewest[-1]


@pytest.mark.parametrize("capacity", [21, 30, 47, 200])
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_as_few_and_as_short_as_the_order_allows(capacity, seed):
    rows = make_rows(5, seed)
    sizes = question_sizes(rows, IMAGE)
    starts = row_starts(sizes, capacity)
    assert max(cost(rows[start:end]) for start, end in pairwise(starts)) <= capacity
    assert len(starts) - 1 == fewest_rows(rows, capacity)
    even = even_row_starts(sizes, capacity)
    assert len(even) == len(starts)
    longest = max(cost(rows[start:end]) for start, end in pairwise(even))
    if longest > sizes.longest:
        assert fewest_rows(rows, longest - 1) > len(even) - 1


def test_a_question_longer_than_a_row_has_one_of_its_own():
    rows = [{"image_index": 0, "prompt_ids": [IMAGE, *[7] * 9], "answer_ids": [8]} for _ in range(3)]
    assert row_starts(question_sizes(rows, IMAGE), 5) == [0, 1, 2, 3]


def test_a_prompt_that_ends_with_its_image_is_an_error_that_names_the_row(rows):
    rows[2]["prompt_ids"] = [5, IMAGE]
    with pytest.raises(ValueError, match="prompt of row 2 ends with its image"):
        question_sizes(rows, IMAGE)


def test_text_before_the_image_is_shared_where_it_is_the_same():
    prompts = [[9, IMAGE, 5], [9, IMAGE, 6], [8, IMAGE, 6]]
    rows = [{"image_index": 0, "prompt_ids": prompt, "answer_ids": [7]} for prompt in prompts]
    sizes = question_sizes(rows, IMAGE)
    assert (sizes.prefixes.tolist(), sizes.owns.tolist()) == ([2, 2, 2], [2, 2, 2])
    assert [key == sizes.keys[0] for key in sizes.keys] == [True, True, False]


# Batches -------------------------------------------------------------------------------------------------------------


def batches_of(rows: list[dict[str, Any]], world_size: int = 1, epoch: int = 0, **options: Any) -> list[list[int]]:
    fixed = {"tokens_per_row": 64, "rows_per_batch": 3} | options
    return list(PackedBatches(question_sizes(rows, IMAGE), world_size=world_size, epoch=lambda: epoch, **fixed))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [4, 40])
@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_each_question_comes_once_and_no_batch_is_above_the_budget(world_size, num_images, rows_per_batch, features):
    rows = make_rows(num_images)
    batches = batches_of(rows, world_size, rows_per_batch=rows_per_batch)
    assert sorted(question for batch in batches for question in batch) == list(range(len(rows)))
    assert len(batches) % world_size == 0 and all(batches)
    for batch in batches:
        ids = packer(features)([rows[question] for question in batch])["input_ids"]
        assert len(ids) <= rows_per_batch and ids.shape[1] <= 64


def test_every_epoch_has_its_own_batches_and_as_many():
    rows = make_rows(200)
    epochs = [batches_of(rows, epoch=epoch) for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert len(epochs[0]) == len(epochs[2])
    assert batches_of(rows, seed=1) != epochs[0]
    neighbours = [
        {(rows[a]["image_index"], rows[b]["image_index"]) for batch in one for a in batch for b in batch if a < b}
        - {(image, image) for image in range(200)}
        for one in epochs
    ]
    assert len(neighbours[0] & neighbours[2]) < 0.1 * len(neighbours[0]), "images meet others in each epoch"


def test_epochs_differ_also_where_no_order_fits_into_as_many_rows_as_the_first():
    rows = make_rows(200)
    batches = PackedBatches(question_sizes(rows, IMAGE), tokens_per_row=64, rows_per_batch=1)
    batches.most_rows = 0  # no order is short enough
    epochs = []
    for epoch in (0, 1):
        batches.epoch = lambda epoch=epoch: epoch
        epochs.append(list(batches))
    assert epochs[0] != epochs[1]
    for one in epochs:
        assert sorted(map(tuple, one)) == sorted(map(tuple, batches.first_rows))


def test_the_questions_of_an_image_lie_together():
    rows = make_rows(60)
    for batch in batches_of(rows, tokens_per_row=128):
        images = [rows[question]["image_index"] for question in batch]
        assert len(set(images)) == 1 + sum(a != b for a, b in pairwise(images))


def test_an_image_with_more_questions_than_a_row_holds_is_split(features):
    rows = make_rows(1, questions=1) * 40
    batches = batches_of(rows)
    assert sorted(question for batch in batches for question in batch) == list(range(40))
    assert len(batches) > 1


def test_fewer_questions_than_processes_are_a_user_error(rows):
    with pytest.raises(UserError, match=r"2 questions cannot be shared by 3 processes"):
        batches_of(rows[:2], world_size=3)


@pytest.mark.parametrize(
    ("budget", "row", "longest", "expected"),
    [(4096, 512, 100, 512), (1000, 512, 100, 500), (300, 512, 100, 300), (4096, 512, 900, 1024), (600, 512, 590, 600)],
)
def test_the_rows_of_a_budget_hold_the_longest_question(budget, row, longest, expected):
    assert packed_row_length(budget, row, longest, "qa.csv") == expected
    assert longest <= expected <= budget


def test_a_budget_below_the_longest_question_is_a_user_error():
    with pytest.raises(UserError, match=r"--tokens-per-batch 99 .* qa.csv .* 100 tokens"):
        packed_row_length(99, 512, 100, "qa.csv")


# Collator ------------------------------------------------------------------------------------------------------------


def test_a_packed_batch_by_hand(features):
    texts = [(1, [5, 6], [7]), (1, [8], [9, 10]), (0, [11], [12])]
    rows = [
        {"image_index": image, "prompt_ids": [4, IMAGE, *prompt], "answer_ids": answer}
        for image, prompt, answer in texts
    ]
    batch = packer(features, 9)(rows)
    expected = {
        "input_ids": [[4, IMAGE, 5, 6, 7, 8, 9, 10], [4, IMAGE, 11, 12, PAD, PAD, PAD, PAD]],
        "labels": [[-100, -100, -100, -100, 7, -100, 9, 10], [-100, -100, -100, 12, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 4, 2, 3, 4], [0, 1, 2, 3, 0, 0, 0, 0]],
        "segment_ids": [[0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, -1, -1, -1, -1]],
        "prefix_ids": [[0] * 8, [0, 0, 0, 0, -1, -1, -1, -1]],
    }
    assert {name: batch[name].tolist() for name in expected} == expected
    assert torch.equal(batch["image_features"], features[[1, 0]])
    assert batch.keys() == {*expected, "image_features"}


def test_a_packed_row_without_answer_tokens_is_an_error(rows, features):
    rows[3]["answer_ids"] = []
    with pytest.raises(ValueError, match="Row 3 of the batch has no answer tokens"):
        packer(features)(rows)


# The model -----------------------------------------------------------------------------------------------------------


def naive_mask(segments: list[int], prefixes: list[int]) -> list[list[bool]]:
    return [
        [key <= query and segments[key] in (segments[query], prefixes[query]) for key in range(len(segments))]
        for query in range(len(segments))
    ]


@pytest.fixture
def vlm(make_vlm: Callable[..., SigPhiForConditionalGeneration]) -> SigPhiForConditionalGeneration:
    model = make_vlm(num_image_tokens=TOKENS)
    assert (model.config.image_token_id, model.config.pad_token_id) == (IMAGE, PAD)
    return model


def test_the_mask_is_the_naive_one(vlm, rows, features):
    batch = packer(features)(rows)
    embeds = torch.zeros(*batch["input_ids"].shape, 64)
    mask = vlm.model.segment_mask(embeds, batch["segment_ids"], batch["prefix_ids"])
    pairs = zip(batch["segment_ids"].tolist(), batch["prefix_ids"].tolist(), strict=True)
    assert mask[:, 0].tolist() == [naive_mask(*pair) for pair in pairs]


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model: Any, batch: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The loss, and the gradient of each parameter, to a relative error of 1e-5."""
    (loss, gradients), (other_loss, others) = (loss_and_gradients(model, one) for one in (batch, other))
    assert abs(loss - other_loss) <= 1e-5 * abs(loss)
    assert gradients.keys() == others.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        # Adding the same number to all keys changes no attention: that gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            assert gradient.norm() > 0
            assert (gradient - others[name]).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens_per_row", [30, 64, 512])
def test_packed_and_unpacked_training_give_the_same_loss_and_gradients(vlm, rows, features, tokens_per_row, attention):
    vlm.set_attn_implementation({"text_config": attention})
    vlm.train()
    assert_same_training(vlm, VlmCollator(PAD, image_features=features)(rows), packer(features, tokens_per_row)(rows))


def test_packed_images_that_go_through_the_tower_train_as_unpacked_ones(vlm, tiny_vlm_processor, rows):
    vlm.train().model.vision_tower.eval()
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    given = {"images": images, "processor": tiny_vlm_processor}
    packed = PackingCollator(PAD, image_token_id=IMAGE, tokens_per_row=64, **given)
    assert_same_training(vlm, VlmCollator(PAD, **given)(rows), packed(rows))


def test_packed_training_is_the_same_with_gradient_checkpointing(vlm, rows, features):
    batch = packer(features)(rows)
    loss, gradients = loss_and_gradients(vlm.train(), batch)
    vlm.gradient_checkpointing_enable({"use_reentrant": False})
    assert loss_and_gradients(vlm, batch)[0] == loss
    for name, parameter in vlm.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=32),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=32, max_window_layers=1),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=512, resid_pdrop=0.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_language_models_pack_too(tiny_encoder, rows, features, family):
    config = SigPhiConfig(
        vision_config=tiny_encoder.vision_model.config,
        text_config=FAMILIES[family],
        image_token_id=IMAGE,
        pad_token_id=PAD,
        num_image_tokens=TOKENS,
    )
    model = SigPhiForConditionalGeneration(config).eval()
    assert choose_packing(*options(), FAMILIES[family], 21)
    with torch.no_grad():
        loss = model(**VlmCollator(PAD, image_features=features)(rows)).loss.item()
        assert model(**packer(features)(rows)).loss.item() == pytest.approx(loss, rel=1e-5)


def logits_by_question(model: Any, batch: dict[str, torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
    """Logits of each segment, by row and number."""
    with torch.no_grad():
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return {
        (row, number): logits[row, segments == number]
        for row, segments in enumerate(batch["segment_ids"])
        for number in segments.unique().tolist()
        if number >= 0
    }


def test_changing_one_question_changes_no_other_by_a_single_bit(vlm, rows, features):
    collate = packer(features, 128)
    before = logits_by_question(vlm, collate(rows))
    assert len({row for row, _ in before}) > 1
    for changed in range(len(rows)):
        other = [dict(row) for row in rows]
        prompt = other[changed]["prompt_ids"]
        other[changed]["prompt_ids"] = prompt[:TOKENS] + [token + 1 for token in prompt[TOKENS:]]
        after = logits_by_question(vlm, collate(other))
        assert [key for key in before if not torch.equal(before[key], after[key])] == [
            list(question_segments(rows, collate))[changed]
        ]


def question_segments(rows: list[dict[str, Any]], collate: PackingCollator) -> list[tuple[int, int]]:
    """Row and segment of each question."""
    batch = collate(rows)
    is_prefix = batch["segment_ids"] == batch["prefix_ids"]
    return [
        (row, number)
        for row, segments in enumerate(batch["segment_ids"])
        for number in segments[~is_prefix[row]].unique(sorted=True).tolist()
    ]


def test_changing_an_image_changes_the_answers_about_no_other(vlm, rows, features):
    collate = packer(features, 128)
    segments = question_segments(rows, collate)
    before = logits_by_question(vlm, collate(rows))
    features[2] += 1.0
    after = logits_by_question(vlm, packer(features, 128)(rows))
    changed = {place for place in segments if not torch.equal(before[place], after[place])}
    assert changed == {place for place, row in zip(segments, rows, strict=True) if row["image_index"] == 2}


def test_segments_need_their_company_and_an_attention_that_takes_them(vlm, rows, features):
    batch = packer(features)(rows)
    for missing in ("prefix_ids", "position_ids"):
        with pytest.raises(ValueError, match="`segment_ids` come with"):
            vlm(**{name: tensor for name, tensor in batch.items() if name != missing})
    with pytest.raises(ValueError, match="`segment_ids` come with"):
        vlm(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    vlm.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2', which would ignore them"):
        vlm(**batch)


# What can be packed --------------------------------------------------------------------------------------------------


def options(packing: str = "auto", tokens_per_batch: int = 0, attention: str = "auto") -> Any:
    """What of the options decides: of the model, and of the training."""
    return (
        SimpleNamespace(attn_implementation=attention),
        SimpleNamespace(packing=packing, tokens_per_batch=tokens_per_batch),
    )


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        (FalconConfig(), "auto", "kind 'falcon' cannot keep the questions of a row apart"),
        (JambaConfig(), "auto", "kind 'jamba' cannot keep the questions of a row apart"),
        (MistralConfig(sliding_window=8), "auto", "9 tokens, more than the language model's sliding window of 8"),
        (PhiConfig(), "flash_attention_2", "FlashAttention-2 has no mask for shared images"),
    ],
)
def test_what_cannot_be_packed_is_refused_where_packing_is_asked_for(
    config: PreTrainedConfig, attention: str, reason: str
):
    assert not choose_packing(*options(attention=attention), config, 9)
    assert not choose_packing(*options("off"), config, 9)
    with pytest.raises(UserError, match=f"--packing on: .*{reason}"):
        choose_packing(*options("on", attention=attention), config, 9)
    with pytest.raises(UserError, match=f"--tokens-per-batch 64: .*{reason}"):
        choose_packing(*options(tokens_per_batch=64, attention=attention), config, 9)


def test_phi_is_packed_unless_it_is_not_wanted():
    assert choose_packing(*options(), PhiConfig(), 9) and choose_packing(*options("on"), PhiConfig(), 9)
    assert not choose_packing(*options("off"), PhiConfig(), 9)


# The Trainer ---------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Keeps the gradients of each step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        grads = {name.removeprefix("module."): p.grad.clone() for name, p in parameters if p.grad is not None}
        self.gradients.append(grads)


def make_trainer(
    model: Any, collator: Any, rows: list[dict[str, Any]], folder: Path, watch: Watch | None = None, **values: Any
) -> VlmTrainer:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".multi_modal_projector." in name)
    fixed: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "bf16": False, "eval_strategy": "no"}
    fixed |= {"save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0, "use_cpu": True}
    return VlmTrainer(
        model=model,
        args=VlmTrainingArguments(output_dir=str(folder), **fixed | values),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        data_collator=collator,
        callbacks=[watch] if watch else [],
    )


def first_step(
    model: Any, collator: Any, rows: list[dict[str, Any]], folder: Path, **values: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one update over all rows."""
    watch = Watch()
    trainer = make_trainer(model, collator, rows, folder, watch, max_steps=1, **values)
    trainer.train()
    return trainer.state.log_history[0]["loss"], watch.gradients[0]


SETTINGS: dict[str, dict[str, Any]] = {
    "one batch": {"per_device_train_batch_size": 64},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 20},
    "packed": {"per_device_train_batch_size": 64, "packs": 64},
    "packed and accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 20, "packs": 64},
    "by tokens": {"tokens_per_batch": 4096, "packs": 4096},
    "by tokens and accumulated": {"tokens_per_batch": 64, "gradient_accumulation_steps": 20, "packs": 64},
}


IN_TWO_PROCESSES = ("batches of 8", "packed batches of 8", "by tokens", "two rows by tokens")
SETTINGS_OF_TWO: dict[str, dict[str, Any]] = {
    "batches of 8": {"per_device_train_batch_size": 8},
    "packed batches of 8": {"per_device_train_batch_size": 8, "packs": 64},
    "two rows by tokens": {"tokens_per_batch": 4096, "packs": 2048},
}


def step_of(setting: str, model: Any, rows: list[dict[str, Any]], features: torch.Tensor, folder: Path) -> Any:
    values = dict((SETTINGS | SETTINGS_OF_TWO)[setting])
    packs = values.pop("packs", None)
    collator = VlmCollator(PAD, image_features=features) if packs is None else packer(features, packs)
    return first_step(model, collator, rows, folder, **values)


def assert_same_step(step: Any, other: Any) -> None:
    (loss, gradients), (other_loss, others) = step, other
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert others.keys() == gradients.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        # The gradient of a k_proj's LoRA is small beside what it is a difference of.
        assert (others[name] - gradient).norm() <= (1e-4 if "k_proj" in name else 1e-5) * gradient.norm(), name


def test_an_update_is_the_same_for_any_batches_accumulation_padding_and_packing(
    make_lora_vlm, rows, features, tmp_path
):
    steps = {
        setting: step_of(setting, make_lora_vlm(num_image_tokens=TOKENS), rows, features, tmp_path)
        for setting in SETTINGS
    }
    for setting in SETTINGS:
        assert_same_step(steps["one batch"], steps[setting])


def process_steps(model: Any, rows: list[dict[str, Any]], features: torch.Tensor, folder: Path) -> list[Any]:
    return [step_of(setting, copy.deepcopy(model), rows, features, folder) for setting in IN_TWO_PROCESSES]


def test_two_processes_make_the_update_of_one(make_lora_vlm, features, tmp_path):
    rows = make_rows(8)[:16]  # the Trainer's own batches would repeat rows of a number that does not halve
    model = make_lora_vlm(num_image_tokens=TOKENS)
    whole = step_of("one batch", copy.deepcopy(model), rows, features, tmp_path)
    for measured in run_processes(process_steps, 2, tmp_path, model, rows, features, tmp_path):
        for step in measured:
            assert_same_step(whole, step)


def test_training_and_evaluation_make_no_logits_of_unsupervised_positions(make_lora_vlm, features, tmp_path):
    rows = make_rows(10)
    model = make_lora_vlm(num_image_tokens=TOKENS)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    trainer = make_trainer(model, packer(features), rows, tmp_path, max_steps=2, tokens_per_batch=128)
    supervised = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in trainer.get_train_dataloader()]
    with Shapes() as shapes:
        trainer.train()
    assert [tuple(shape) for shape in seen] == [(count, VOCABULARY) for count in supervised[:2]]
    seen.clear()
    with Shapes() as evaluation:
        trainer.evaluate()
    answers = sum(len(row["answer_ids"]) for row in rows)
    assert sum(shape.numel() for shape in seen) == answers * VOCABULARY
    for recorded in (shapes, evaluation):
        with_vocabulary = {shape for shape in recorded.seen if VOCABULARY in shape and 0 not in shape}
        assert (VOCABULARY, 64) in with_vocabulary, "the weights are seen"
        assert not [shape for shape in with_vocabulary if len(shape) > 2]


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(one.shape) for one in tree_leaves((args, result)) if isinstance(one, torch.Tensor)}
        return result


@pytest.mark.parametrize("trains_head", [True, False])
@pytest.mark.parametrize("at_once", [1, 5])
def test_the_loss_in_parts_is_that_of_all_logits_at_once(vlm, rows, features, monkeypatch, at_once, trains_head):
    batch = packer(features)(rows)
    vlm.lm_head.requires_grad_(trains_head)
    loss, gradients = loss_and_gradients(vlm.train(), batch)
    monkeypatch.setattr(SigPhiForConditionalGeneration, "logits_at_once", at_once * VOCABULARY)
    parts = []
    vlm.lm_head.register_forward_hook(lambda module, inputs, output: parts.append(len(output)))
    in_parts, others = loss_and_gradients(vlm, batch)
    assert max(parts) == at_once
    assert sum(parts) == sum(len(row["answer_ids"]) for row in rows), "each position reaches the head once"
    assert in_parts == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == others.keys() and ("lm_head.weight" in others) is trains_head
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_evaluation_loss_is_the_same_however_rows_are_packed(make_lora_vlm, rows, features, tmp_path):
    model = make_lora_vlm(num_image_tokens=TOKENS)
    losses = []
    for collator in (VlmCollator(PAD, image_features=features), packer(features), packer(features, 512)):
        for batch_size in (1, 7, 64):
            trainer = make_trainer(model, collator, rows, tmp_path, per_device_eval_batch_size=batch_size)
            metrics = trainer.evaluate()
            losses.append(metrics["eval_loss"])
            counted = metrics["eval_samples_per_second"] * metrics["eval_runtime"]
            assert counted == pytest.approx(len(rows), rel=0.05), "questions, not packed rows"
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_resuming_goes_on_with_the_batches_that_were_left(make_lora_vlm, features, tmp_path):
    rows = make_rows(12)
    seen: list[list[list[int]]] = []
    for folder, checkpoint in ((tmp_path, None), (tmp_path / "resumed", str(tmp_path / "checkpoint-3"))):
        trainer = make_trainer(
            make_lora_vlm(num_image_tokens=TOKENS),
            Recorded(packer(features)),
            rows,
            folder,
            tokens_per_batch=64,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=3,
            save_total_limit=10,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        seen.append(trainer.data_collator.batches[1:])  # by the first a checkpoint tells what data it is of
    whole, resumed = seen
    assert len(whole) % 2 == 0 and len(whole) > 8
    assert sorted(map(str, whole[: len(whole) // 2])) != sorted(map(str, whole[len(whole) // 2 :]))
    assert resumed == whole[3:]


class Recorded:
    """A collator that keeps what it was given."""

    def __init__(self, collator: PackingCollator) -> None:
        self.collator, self.batches = collator, list[list[Any]]()
        self.image_token_id, self.tokens_per_row = collator.image_token_id, collator.tokens_per_row

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.batches.append([(row["image_index"], row["prompt_ids"]) for row in rows])
        return self.collator(rows)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_data_set_with_an_unsupervised_row_is_refused_by_its_number(rows, name):
    rows[4]["answer_ids"] = []
    with pytest.raises(ValueError, match=f"Row 4 of `{name}` has no answer tokens"):
        VlmTrainer(**{name: datasets.Dataset.from_list(rows)})
