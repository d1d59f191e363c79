"""SiglipTrainer: the same training in one process and in several, in one pass and in two."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import Originals
from processes import run_processes
from torch import nn
from transformers import SiglipConfig, SiglipModel, TrainerCallback

from sigphi import (
    SiglipResNetModel,
    SiglipResNetProcessor,
    SiglipTrainer,
    SiglipTrainingArguments,
)
from sigphi.train.collators import SiglipCollator, preprocess
from sigphi.train.errors import UserError
from sigphi.train.pairs import pair_masks
from sigphi.train.trainers import lay_out_for_shards

GOLDEN = Path(__file__).parent / "golden" / "siglip.json"
NUM_ROWS, STEPS = 64, 20
NAMES = ("cat", "dog", "ship", "deer")
WORDINGS = ("It is a {}.", "A {} is here.", "This shows a {}.")


def make_rows() -> datasets.Dataset:
    """Images with one to five texts, of which many repeat, in the same and in other words."""
    rows = []
    for index in range(NUM_ROWS):
        name = NAMES[index % 4]
        texts = [WORDINGS[index % 3].format(name), f"Picture {index // 2} of 32."]
        facts = [f"object={name}", ""]
        if index % 5 == 0:
            texts += ["I cannot tell.", f"It looks like {index}.", "The color is red."]
            facts += ["nothing", "", "color=red"]
        rows.append(
            {"image_index": index, "texts": texts, "facts": facts, "known": sorted({*facts} - {"", "nothing"})}
        )
    return datasets.Dataset.from_list(rows)


def make_images() -> torch.Tensor:
    """A color and a pattern each, so that their embeddings and the statistics of two halves of a batch differ."""
    generator = torch.Generator().manual_seed(3)
    colors = torch.randint(128, (NUM_ROWS, 3, 1, 1), dtype=torch.uint8, generator=generator)
    pattern = torch.randint(128, (NUM_ROWS, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return colors + pattern.repeat_interleave(8, -1).repeat_interleave(8, -2)


class Recorder(TrainerCallback):
    """Keeps the gradients of each update."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({n.removeprefix("module."): p.grad.clone() for n, p in named if p.grad is not None})


def make_trainer(
    folder: Path,
    model: nn.Module,
    collator: Callable[..., Any],
    rows: datasets.Dataset | None = None,
    processor: SiglipResNetProcessor | None = None,
    **options: Any,
) -> SiglipTrainer:
    """A constant learning rate, so that the first steps of a long run are those of a short one."""
    fixed: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "eval_strategy": "no", "save_strategy": "no"}
    fixed |= {"logging_steps": 1, "max_steps": STEPS, "augment": False, "use_cpu": True}
    fixed |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    fixed |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 32}
    return SiglipTrainer(
        model=model,
        args=SiglipTrainingArguments(output_dir=str(folder), **fixed | options),
        train_dataset=rows or make_rows(),
        eval_dataset=rows or make_rows(),
        data_collator=collator,
        processing_class=processor,
    )


def train(folder: Path, model: nn.Module, collator: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Loss and gradient norm of each step, the gradients of the first update, and the final evaluation."""
    trainer, recorder = make_trainer(folder, model, collator, **options), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"log": log, "gradients": recorder.gradients[0], "eval_loss": trainer.evaluate()["eval_loss"]}


def train_encoder(
    folder: Path, encoder: SiglipResNetModel, processor: SiglipResNetProcessor, **options: Any
) -> dict[str, Any]:
    encoder.text_model.language_model.requires_grad_(False)
    return train(folder, encoder, SiglipCollator(processor, make_images()), processor=processor, **options)


def close(measured: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same losses and gradient norms to 1e-4, as far as `measured` goes, and the same first gradients."""
    steps = len(measured["log"])
    torch.testing.assert_close(measured["log"], expected["log"][:steps], rtol=1e-4, atol=0)
    if steps == len(expected["log"]):
        assert measured["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert measured["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert (measured["gradients"][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def frozen_norm(encoder: SiglipResNetModel) -> SiglipResNetModel:
    """A copy whose BatchNorm stays in evaluation mode, where an image does not depend on its batch."""
    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True: None
    return encoder.eval()


def tiny_siglip(**vision: Any) -> SiglipModel:
    """transformers' own model."""
    torch.manual_seed(2)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 100, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return SiglipModel(
        SiglipConfig(text_config=common | text, vision_config=common | {"image_size": 32, "patch_size": 16} | vision)
    )


def couples(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch for `SiglipModel`: image i belongs to text i."""
    indices = torch.tensor([row["image_index"] for row in rows])
    return {
        "pixel_values": make_images()[indices] / 127.5 - 1,
        "input_ids": (indices[:, None] * torch.arange(3, 9)) % 97 + 3,
        "return_loss": True,
    }


@pytest.fixture(scope="module")
def processor(shared: Originals) -> SiglipResNetProcessor:
    return SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"])


@pytest.fixture(scope="module")
def whole(shared: Originals, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, one pass."""
    return train_encoder(tmp_path_factory.mktemp("whole"), frozen_norm(shared["encoder"]), processor)


AUGMENTED = {"augment": True, "cutout": 8, "color_jitter": 0.3, "max_steps": 5}  # two epochs and a half


@pytest.fixture(scope="module")
def augmented(shared: Originals, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, one pass, augmented."""
    folder = tmp_path_factory.mktemp("augmented")
    return train_encoder(folder, frozen_norm(shared["encoder"]), processor, **AUGMENTED)


@pytest.fixture(scope="module")
def whole_siglip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("whole"), tiny_siglip(), couples, max_steps=3)


def test_twenty_steps_are_those_of_the_committed_file(whole, request):
    steps = [{"loss": loss, "grad_norm": norm} for loss, norm in whole["log"]]
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(steps, indent=1) + "\n")
    assert len(steps) == STEPS
    for step, expected in zip(steps, json.loads(GOLDEN.read_text()), strict=True):
        assert step == pytest.approx(expected, rel=1e-4)


def several_trainings(folder: Path, processor: SiglipResNetProcessor) -> list[dict[str, Any]]:
    encoder = SiglipResNetModel.from_pretrained(folder)
    sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    others = {"loss_variant": "gather", "micro_batch_size": 7, "max_steps": 3}
    return [
        train_encoder(folder, frozen_norm(encoder), processor, loss_chunk_size=5, **sizes),
        train_encoder(folder, frozen_norm(encoder), processor, **sizes, **others),
        train(folder, tiny_siglip(), couples, max_steps=3, **sizes),
    ]


def test_two_processes_train_like_one(shared, processor, whole, whole_siglip, tmp_path):
    shared["encoder"].save_pretrained(tmp_path)
    for measured in run_processes(several_trainings, 2, tmp_path, tmp_path, processor):
        for one, expected in zip(measured, (whole, whole, whole_siglip), strict=True):
            close(one, expected)


def test_augmentation_changes_what_is_learnt_and_not_what_is_evaluated(whole, augmented, shared, processor, tmp_path):
    assert augmented["log"][0][0] != pytest.approx(whole["log"][0][0], rel=1e-4)
    losses = [
        make_trainer(
            tmp_path,
            frozen_norm(shared["encoder"]),
            SiglipCollator(processor, make_images()),
            processor=processor,
            **options,
        ).evaluate()["eval_loss"]
        for options in ({}, AUGMENTED)
    ]
    assert losses[0] == losses[1]


def test_pixels_of_floats_are_not_augmented(tmp_path):
    with pytest.raises(ValueError, match="of floats are not augmented"):
        train(tmp_path, tiny_siglip(), couples, augment=True, max_steps=1)


# Two passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 13, 32])
def test_parts_of_a_batch_train_like_the_whole(shared, processor, whole, tmp_path, micro_batch_size):
    options = {"micro_batch_size": micro_batch_size, "max_steps": 3}
    close(train_encoder(tmp_path, frozen_norm(shared["encoder"]), processor, **options), whole)


def test_parts_of_an_augmented_batch_train_like_the_whole(shared, processor, augmented, tmp_path):
    options = {**AUGMENTED, "micro_batch_size": 13}
    close(train_encoder(tmp_path, frozen_norm(shared["encoder"]), processor, **options), augmented)


def test_both_passes_draw_the_same_numbers_and_statistics_move_once(tiny_encoder, processor, tmp_path):
    embeds: list[torch.Tensor] = []
    model = tiny_siglip(attention_dropout=0.5)
    model.register_forward_hook(lambda module, inputs, outputs: embeds.append(outputs.image_embeds.detach()))
    trainer = make_trainer(tmp_path, model, couples, max_steps=1, micro_batch_size=12)
    trainer.train()
    assert [len(one) for one in embeds] == [11, 11, 10, 10, 11, 11]
    assert all(torch.equal(first, second) for first, second in zip(embeds[:3], embeds[:2:-1], strict=True))
    assert not torch.equal(model.train()(**couples(make_rows())).image_embeds[:1], embeds[0][:1])
    train_encoder(tmp_path, tiny_encoder, processor, max_steps=1, micro_batch_size=12)
    counts = [m.num_batches_tracked.item() for m in tiny_encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) == {3}


def test_more_parts_than_texts(shared, processor, tmp_path):
    """A batch of few distinct texts leaves none for some of its parts."""
    runs = []
    for micro_batch_size in (0, 2):
        encoder = frozen_norm(shared["encoder"])
        collator = SiglipCollator(processor, make_images())
        rows = make_rows().map(lambda row: {"texts": row["texts"][:1], "facts": row["facts"][:1]})
        options = {"max_steps": 2, "micro_batch_size": micro_batch_size}
        runs.append(train(tmp_path, encoder, collator, rows=rows, processor=processor, **options))
    close(runs[1], runs[0])


# The loss ------------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_averaged(shared, processor, whole, tmp_path):
    """Each of them compares its own pairs."""
    encoder = frozen_norm(shared["encoder"])
    options = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
    }
    order: list[dict[str, Any]] = []
    collator = SiglipCollator(processor, make_images())
    measured = train(
        tmp_path, encoder, lambda rows: order.append(collator(rows)) or order[-1], processor=processor, **options
    )
    reference = frozen_norm(shared["encoder"])
    losses = []
    for batch in order[1:3]:  # the first one tells what data the run is of
        positives, ignored = pair_masks(**batch["pairs"])
        inputs = {name: value for name, value in batch.items() if name != "pairs"}
        inputs["pixel_values"] = preprocess(processor, batch["pixel_values"])
        losses.append(reference(**inputs, positives=positives, ignored=ignored).loss)
    loss = sum(losses) / 2
    gradient = torch.autograd.grad(loss, reference.vision_model.projection.weight)[0]
    assert measured["log"][0][0] == pytest.approx(loss.item(), rel=1e-5)
    assert (measured["gradients"]["vision_model.projection.weight"] - gradient).norm() <= 1e-4 * gradient.norm()


def alone(folder: Path) -> str:
    """What a trainer says whose model is not prepared for its two processes."""
    trainer = make_trainer(folder, tiny_siglip(), couples, max_steps=1)
    trainer.accelerator.prepare_model = lambda model, *_, **__: model
    trainer.accelerator.prepare = lambda *parts, **_: parts if len(parts) > 1 else parts[0]
    with pytest.raises(UserError) as error:
        trainer.train()
    return str(error.value)


def test_processes_whose_gradients_nothing_shares_are_refused(tmp_path):
    told = run_processes(alone, 2, tmp_path, tmp_path)
    assert all("2 processes, and nothing shares the gradients of the model" in one for one in told)


def test_transformers_own_model_is_saved_and_loads_again(tmp_path):
    model = tiny_siglip()
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.0}
    trainer = make_trainer(tmp_path / "run", model, couples, **options)
    trainer.train()
    trainer.save_model()
    assert not [*tmp_path.rglob("README.md")]  # a card of ours would tell how to load another model
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "run"):
        again = SiglipModel.from_pretrained(folder)
        assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


def test_the_loss_of_transformers_own_model_is_its_own(whole_siglip, tmp_path):
    order: list[dict[str, Any]] = []
    model = tiny_siglip()
    train(tmp_path, tiny_siglip(), lambda rows: order.append(couples(rows)) or order[-1], max_steps=1)
    expected = model(**order[1]).loss  # the first batch tells what data the run is of
    assert whole_siglip["log"][0][0] == pytest.approx(expected.item(), rel=1e-5)


def test_an_image_is_encoded_once_with_all_its_texts(tiny_encoder, processor, tmp_path):
    given: dict[str, list[int]] = {"images": [], "texts": []}
    tiny_encoder.vision_model.register_forward_pre_hook(lambda _, inputs: given["images"].append(len(inputs[0])))
    tiny_encoder.text_model.register_forward_pre_hook(lambda _, inputs: given["texts"].append(len(inputs[0])))
    rows = make_rows().map(lambda row: {"texts": [f"Text {i} of {row['image_index']}." for i in range(5)]})
    rows = rows.map(lambda row: {"facts": [""] * 5})
    collator = SiglipCollator(processor, make_images())
    trainer = make_trainer(tmp_path, tiny_encoder, collator, rows=rows, processor=processor, max_steps=2)
    trainer.train()
    assert given == {"images": [32, 32], "texts": [160, 160]}


def test_synchronised_batch_norm_is_refused_on_cpu(tmp_path):
    with pytest.raises(UserError, match="--sync-batch-norm needs GPUs"):
        SiglipTrainingArguments(output_dir=str(tmp_path), report_to="none", sync_batch_norm=True)


@pytest.mark.gpu
def test_synchronised_batch_norm_of_one_process_is_batch_norm(shared, processor, tmp_path):
    runs = []
    for sync_batch_norm in (False, True):
        encoder = shared["encoder"]
        options = {"max_steps": 3, "use_cpu": False, "sync_batch_norm": sync_batch_norm}
        runs.append(train_encoder(tmp_path, encoder, processor, **options))
    close(runs[1], runs[0])


# In shards -----------------------------------------------------------------------------------------------------------


def test_parameters_are_laid_out_for_shards(tiny_encoder):
    tiny_encoder.vision_model.to(memory_format=torch.channels_last)
    before = {name: parameter.detach().clone() for name, parameter in tiny_encoder.named_parameters()}
    assert lay_out_for_shards(tiny_encoder) == ["logit_scale", "logit_bias"]
    for name, parameter in tiny_encoder.named_parameters():
        assert parameter.ndim > 0 and parameter.stride()[-1] == 1, name
        assert torch.equal(parameter.reshape(before[name].shape), before[name])
