"""Both trainings from the command's `main` to the folder that they leave, and the Trainers themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import TOY_IMAGES, child_environment
from transformers import TrainerCallback

from sigphi import (
    SiglipResNetModel,
    SiglipResNetProcessor,
    SiglipTrainingArguments,
    SigPhiForConditionalGeneration,
    SigPhiProcessor,
    VlmTrainingArguments,
)
from sigphi.train import siglip, vlm
from sigphi.train.callbacks import LooksAtImageCallback
from sigphi.train.collators import SiglipCollator, VlmCollator, preprocess
from sigphi.train.data import distinct_images, load_cifar10_qa
from sigphi.train.encoder_data import qa_rows
from sigphi.train.encoder_evaluation import pool_texts
from sigphi.train.image_texts import StoredImages
from sigphi.train.images import decode_images
from sigphi.train.prompts import tokenized_rows
from sigphi.train.trainers import SiglipTrainer, VlmTrainer
from sigphi.train.vlm_evaluation import encode_images, supervised_loss

EVAL_FRACTION = 0.2
COMMON = [
    "--images",
    TOY_IMAGES,
    "--eval-fraction",
    str(EVAL_FRACTION),
    "--report-to",
    "none",
    "--disable-tqdm",
    "true",
]
COMMON += ["--batch-size", "12", "--max-steps", "4", "--logging-steps", "1", "--eval-strategy", "steps"]
COMMON += ["--eval-steps", "2", "--save-strategy", "steps", "--save-steps", "2", "--save-total-limit", "5"]
ENCODER = ["--layer-type", "basic", "--embedding-size", "8", "--hidden-sizes", "8", "16", "--depths", "1", "1"]
ENCODER += ["--projection-dim", "32"]


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run(module: Any, trainer_class: type, folder: Path, argv: list[str]) -> SimpleNamespace:
    """Run a command's `main`; gives its trainer, the weights before and after training, and its folder."""
    seen: dict[str, Any] = {}

    class Recorded(trainer_class):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            seen["trainer"], seen["before"] = self, copies(self.model)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setattr(module, trainer_class.__name__, Recorded)
        module.main([*COMMON, "--output-dir", str(folder), *argv])
    return SimpleNamespace(folder=folder, after=copies(seen["trainer"].model), **seen)


@pytest.fixture(scope="module")
def encoder_argv(toy_csv: Path, toy_base: Path) -> list[str]:
    return ["--input-csv", str(toy_csv), "--text-model", str(toy_base), *ENCODER]


@pytest.fixture(scope="module")
def encoder_run(encoder_argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return run(siglip, SiglipTrainer, tmp_path_factory.mktemp("siglip"), encoder_argv)


@pytest.fixture(scope="module")
def vlm_argv(encoder_run: SimpleNamespace, toy_csv: Path, toy_base: Path) -> list[str]:
    paths = ["--input-csv", str(toy_csv), "--siglip-checkpoint", str(encoder_run.folder)]
    return [*paths, "--language-model", str(toy_base), "--bf16", "false"]


@pytest.fixture(scope="module")
def vlm_run(vlm_argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return run(vlm, VlmTrainer, tmp_path_factory.mktemp("vlm"), vlm_argv)


@pytest.fixture(scope="module")
def data(toy_csv: Path) -> datasets.DatasetDict:
    return load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=EVAL_FRACTION)


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def moved_names(finished: SimpleNamespace) -> set[str]:
    assert finished.before.keys() == finished.after.keys()
    return {name for name, tensor in finished.after.items() if not torch.equal(tensor, finished.before[name])}


# What is trained -----------------------------------------------------------------------------------------------------


def test_training_the_encoder_moves_what_is_trained_and_nothing_else(encoder_run):
    model = encoder_run.trainer.model
    trained = trained_names(model)
    statistics = {name for name in encoder_run.after if "running_" in name or "num_batches" in name}
    assert {"logit_scale", "logit_bias", "text_model.projection.weight", "vision_model.projection.bias"} <= trained
    assert model.text_model.language_model is None, "what the frozen tower says comes from a file"
    assert moved_names(encoder_run) == trained | statistics


def test_training_the_vlm_moves_lora_and_projector_and_nothing_else(vlm_run):
    trained = trained_names(vlm_run.trainer.model)
    assert all("lora_" in name or ".multi_modal_projector." in name for name in trained)
    assert sum("lora_A" in name for name in trained) == sum("lora_B" in name for name in trained) == 12
    assert sum(".multi_modal_projector." in name for name in trained) == 4
    assert sum(name.endswith(".absmax") for name in vlm_run.after) == 12, "the base is quantised"
    assert moved_names(vlm_run) == trained


def test_the_text_tower_is_trained_on_demand(encoder_argv, tmp_path):
    finished = run(siglip, SiglipTrainer, tmp_path, [*encoder_argv, "--train-text-tower", "true", "--max-steps", "3"])
    # The embedding's padding row and the head's bias aside, every weight of the tower has moved.
    tower = {name for name in finished.after if name.startswith("text_model.language_model.")}
    assert len(tower) > 20 and tower <= trained_names(finished.trainer.model)
    assert tower <= moved_names(finished)
    assert SiglipResNetModel.from_pretrained(tmp_path).text_model.language_model is not None


def test_full_tuning_trains_the_language_model(vlm_argv, tmp_path):
    argv = [*vlm_argv, "--tuning", "full", "--bits", "16", "--max-steps", "3", "--save-strategy", "no"]
    finished = run(vlm, VlmTrainer, tmp_path, argv)
    frozen = {name for name in finished.after if ".vision_tower." in name}
    assert moved_names(finished) == finished.after.keys() - frozen
    assert not (tmp_path / "lora").exists()
    loaded = SigPhiForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in finished.after.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder_run", "vlm_run"])
def test_a_final_folder_is_whole_and_holds_no_pickle(name, request):
    folder = request.getfixturevalue(name).folder
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= files
    assert {"training_args.json", "training_data.json", "eval_results.json", "log_history.json"} <= files
    assert "loss_curve.png" in files
    assert "adapter_config.json" not in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    assert any(name.startswith("modeling_") and name.endswith(".py") for name in files)
    arguments = json.loads((folder / "training_args.json").read_text())
    assert (arguments["max_steps"], arguments["per_device_train_batch_size"]) == (4, 12)
    losses = [entry["loss"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry]
    assert len(losses) == 4
    facts = json.loads((folder / "training_data.json").read_text())
    assert (facts["eval_fraction"], facts["split_seed"], facts["images"]) == (EVAL_FRACTION, 0, TOY_IMAGES)


def test_lora_lies_in_its_own_folder(vlm_run):
    assert {path.name for path in (vlm_run.folder / "lora").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (vlm_run.folder / "model.safetensors").stat().st_size < 200_000


def test_evaluation_results_are_recorded_beside_the_card(encoder_run, vlm_run):
    for finished, key in ((encoder_run, "zero_shot_top1"), (vlm_run, "image_gain")):
        results = json.loads((finished.folder / "eval_results.json").read_text())
        assert f"| `{key}` | {results[key]:.4f} |" in (finished.folder / "README.md").read_text()
        assert results["metadata"]["image_splits"] == ["train"]


def test_the_encoder_is_evaluated_during_training(encoder_run):
    logged = [entry for entry in encoder_run.trainer.state.log_history if "eval_zero_shot_top1" in entry]
    assert len(logged) == 2
    assert all(0 <= entry["eval_zero_shot_top1"] <= 1 for entry in logged)
    names = {name for entry in encoder_run.trainer.state.log_history for name in entry if name.startswith("eval_")}
    speeds = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert names - speeds == {f"eval_{name}" for name in siglip.FIGURES}


def test_checkpoints_of_the_vlm_are_in_adapter_form_and_load(vlm_run, toy_base):
    assert sorted(path.name for path in vlm_run.folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    checkpoint = vlm_run.folder / "checkpoint-4"
    assert not (checkpoint / "adapter_config.json").exists()
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["base_language_model"], config["base_bits"]) == (str(toy_base), 4)
    loaded = SigPhiForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert loaded.keys() == vlm_run.after.keys()
    for name, tensor in vlm_run.after.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_the_saved_encoder_gives_the_trained_embeddings(encoder_run, images):
    loaded = SiglipResNetModel.from_pretrained(encoder_run.folder)
    processor = SiglipResNetProcessor.from_pretrained(encoder_run.folder)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = encoder_run.trainer.model.eval()(pixel_values=pixels).image_embeds
        torch.testing.assert_close(loaded(pixel_values=pixels).image_embeds, expected, rtol=1e-5, atol=1e-6)


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder_run", "vlm_run"])
def test_resuming_ends_where_the_whole_run_ended(name, request, tmp_path):
    whole = request.getfixturevalue(name)
    module, trainer_class = (siglip, SiglipTrainer) if name == "encoder_run" else (vlm, VlmTrainer)
    argv = request.getfixturevalue(name.replace("_run", "_argv"))
    checkpoint = str(whole.folder / "checkpoint-2")
    resumed = run(module, trainer_class, tmp_path, [*argv, "--resume-from-checkpoint", checkpoint])
    assert resumed.trainer.state.global_step == 4
    # The log begins with that of the checkpoint; the steps after it are the same ones.
    losses = [
        {entry["step"]: entry["loss"] for entry in one.trainer.state.log_history if "loss" in entry}
        for one in (whole, resumed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for parameter in trained_names(whole.trainer.model):
        torch.testing.assert_close(resumed.after[parameter], whole.after[parameter], rtol=1e-4, atol=1e-6)


# Optimizer -----------------------------------------------------------------------------------------------------------


def settings_of(trainer: Any) -> dict[str, tuple[float, float]]:
    """Trained parameter -> its peak learning rate and weight decay."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_temperature_and_bias_have_their_own_rate_and_only_matrices_decay(tiny_encoder, tmp_path):
    tiny_encoder.text_model.language_model.requires_grad_(False)
    arguments = SiglipTrainingArguments(
        output_dir=str(tmp_path), report_to="none", eval_strategy="no", learning_rate=1e-3, logit_learning_rate=0.5
    )
    settings = settings_of(SiglipTrainer(model=tiny_encoder, args=arguments))
    assert settings.keys() == trained_names(tiny_encoder)
    for name, parameter in tiny_encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = 0.5 if name in ("logit_scale", "logit_bias") else 1e-3
        assert settings[name] == (rate, 0.05 if parameter.ndim >= 2 else 0.0), name


def test_the_projector_has_its_own_rate(tiny_lora_vlm, tmp_path):
    train_adapter(tiny_lora_vlm)
    arguments = vlm_arguments(tmp_path, learning_rate=1e-4, projector_learning_rate=0.25, weight_decay=0.1)
    settings = settings_of(VlmTrainer(model=tiny_lora_vlm, args=arguments))
    assert settings.keys() == trained_names(tiny_lora_vlm)
    for name, setting in settings.items():
        rate = 0.25 if ".multi_modal_projector." in name else 1e-4
        assert setting == (rate, 0.0 if name.endswith("bias") else 0.1), name


# Loss ----------------------------------------------------------------------------------------------------------------


def vlm_arguments(folder: Path, **values: Any) -> VlmTrainingArguments:
    fixed: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "bf16": False, "eval_strategy": "no"}
    fixed |= {"save_strategy": "no", "logging_steps": 1}
    return VlmTrainingArguments(output_dir=str(folder), **fixed | values)


def train_adapter(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".multi_modal_projector." in name)


@torch.no_grad()
def naive_loss(model: Any, collator: VlmCollator, rows: Any) -> float:
    """The mean over all supervised tokens, row by row, from the model's logits."""
    losses = []
    for row in rows:
        batch = collator([row])
        labels = batch.pop("labels")[0]
        log_probabilities = model.eval()(**batch).logits[0].log_softmax(-1)
        losses += [-log_probabilities[i - 1, labels[i]].item() for i in range(1, len(labels)) if labels[i] != -100]
    assert len(losses) == sum(len(row["answer_ids"]) for row in rows)
    return sum(losses) / len(losses)


def test_evaluation_loss_is_the_mean_per_token_for_every_batch_size(vlm_run, data):
    trainer = vlm_run.trainer
    rows = trainer.eval_dataset.select(range(23))
    expected = naive_loss(trainer.model, trainer.data_collator, rows)
    watching = trainer.pop_callback(LooksAtImageCallback)  # asks questions at each evaluation, and takes its time
    for batch_size in (1, 5, 23, 64):
        trainer.args.per_device_eval_batch_size = batch_size
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.add_callback(watching)


def test_supervised_loss_equals_the_naive_one(vlm_run, data):
    model, processor = vlm_run.trainer.model.eval(), SigPhiProcessor.from_pretrained(vlm_run.folder)
    part = data["eval"].select(range(23))
    images, positions = distinct_images(part)
    features = encode_images(model, processor, decode_images(images, range(len(images))))
    rows = tokenized_rows(processor, part, positions)
    collator = VlmCollator(processor.tokenizer.pad_token_id, image_features=features)
    expected = naive_loss(model, collator, rows)
    for batch_size in (1, 6, 64):
        measured = supervised_loss(model, processor, features, positions, part, batch_size)
        assert measured == pytest.approx(expected, rel=1e-5)


class Gradients(TrainerCallback):
    """Keeps the gradients of each step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})


def uneven_rows(num_rows: int, image_token_id: int) -> datasets.Dataset:
    """Rows whose answers have 1 to `num_rows` tokens, so that a mean of means is another number."""
    return datasets.Dataset.from_list(
        [
            {"image_index": row, "prompt_ids": [image_token_id, 5, 6 + row], "answer_ids": [20 + row] * row + [0]}
            for row in range(num_rows)
        ]
    )


def test_gradient_accumulation_gives_the_loss_and_gradients_of_the_whole_batch(make_lora_vlm, tmp_path):
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = make_lora_vlm()
        train_adapter(model)
        torch.manual_seed(5)
        gradients = Gradients()
        arguments = vlm_arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
        )
        trainer = VlmTrainer(
            model=model,
            args=arguments,
            train_dataset=uneven_rows(8, model.config.image_token_id),
            data_collator=VlmCollator(model.config.pad_token_id, image_features=torch.randn(8, 1, 32)),
            callbacks=[gradients],
        )
        trainer.train()
        runs.append((trainer.state.log_history[0]["loss"], gradients.steps))
    (loss, [whole]), (accumulated_loss, [accumulated]) = runs
    assert accumulated_loss == pytest.approx(loss, rel=1e-4)
    assert whole.keys() == accumulated.keys() and len(whole) > 20
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)


# Texts ---------------------------------------------------------------------------------------------------------------


def encoder_rows() -> list[dict[str, Any]]:
    return [
        {
            "image_index": 0,
            "texts": ["A small frog.", "It is green."],
            "facts": ["object=frog", ""],
            "known": ["object=frog"],
        },
        {"image_index": 1, "texts": ["The dog is brown."], "facts": ["object=dog"], "known": ["object=dog"]},
    ]


def test_whitened_text_projection_decorrelates_the_training_texts(tiny_encoder):
    torch.manual_seed(1)
    features = torch.randn(500, 64) @ torch.randn(64, 64) + 30 * torch.randn(64)
    weight = tiny_encoder.text_model.projection.weight.detach().clone()
    siglip.whiten_text_projection(tiny_encoder, features)
    projected = tiny_encoder.text_model.project(features).detach().double()
    assert projected.mean(0).abs().max() < 1e-2
    # Covariance of W x with whitened x: W W^T, up to what the floor of the variances takes away.
    expected = (weight @ weight.t()).double()
    assert (torch.cov(projected.t()) - expected).norm() / expected.norm() < 0.1


def test_pooled_texts_come_in_the_order_of_the_texts(tiny_encoder, tiny_encoder_processor):
    texts = ["A small frog sits on a green leaf.", "A dog.", "The sea is blue and wide.", "cat"]
    together = pool_texts(tiny_encoder, tiny_encoder_processor, texts, batch_size=3)
    alone = torch.cat([pool_texts(tiny_encoder, tiny_encoder_processor, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# Image batches -------------------------------------------------------------------------------------------------------


def test_one_row_an_image_with_all_its_answers(data, tiny_encoder_processor):
    rows, images = qa_rows(data["train"])
    pixels = StoredImages(images, tiny_encoder_processor.image_processor).all()
    assert len(rows) == len(pixels) == len(set(data["train"]["dataset_index"]))
    answers: dict[int, list[str]] = {}
    for index, answer in zip(data["train"]["dataset_index"], data["train"]["answer"], strict=True):
        answers.setdefault(index, []).append(answer)
    assert rows["texts"][:] == list(answers.values())
    assert all(len(row["texts"]) == len(row["facts"]) for row in rows)
    class_names = data["train"].features["label"].names
    assert all(f"object={class_names[row['label']]}" in row["known"] for row in rows)
    assert max(len(row["known"]) for row in rows) >= 8  # a description knows more than five answers do
    first = data["train"][0]["image"]
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(np.array(first)))


@pytest.mark.parametrize("augment", [True, False])
def test_images_are_augmented_in_training_alone(tiny_encoder, tiny_encoder_processor, tmp_path, augment):
    arguments = SiglipTrainingArguments(
        output_dir=str(tmp_path), report_to="none", eval_strategy="no", augment=augment
    )
    trainer = SiglipTrainer(model=tiny_encoder, args=arguments, processing_class=tiny_encoder_processor)
    given = []
    tiny_encoder.vision_model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = SiglipCollator(tiny_encoder_processor, pixels)(encoder_rows())
    for training in (True, False):
        tiny_encoder.train(training)
        trainer.compute_loss(tiny_encoder, batch)
    plain = preprocess(tiny_encoder_processor, pixels)
    assert torch.equal(given[0], plain) == (not augment)
    assert torch.equal(given[1], plain)
    assert given[0].is_contiguous(memory_format=torch.channels_last)


# Several processes ---------------------------------------------------------------------------------------------------


def run_two_processes(module: str, folder: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = child_environment(folder / "home")
    return subprocess.run(
        [*launcher, "-m", module, *COMMON, *argv, "--use_cpu"],
        env={name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_train_the_encoder(encoder_argv, tmp_path):
    folder = tmp_path / "siglip"
    argv = [*encoder_argv, "--output-dir", str(folder), "--batch-size", "6", "--micro-batch-size", "4"]
    result = run_two_processes("sigphi.train.siglip", tmp_path, argv)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("chance/text_to_image_r10") == 1, "one process evaluates the artifact"
    history = json.loads((folder / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
    assert SiglipResNetModel.from_pretrained(folder).logit_scale.item() != pytest.approx(np.log(10), abs=1e-6)


@pytest.mark.slow
def test_two_processes_train_the_vlm(vlm_argv, tmp_path):
    argv = [*vlm_argv, "--output-dir", str(tmp_path / "vlm"), "--max-steps", "2"]
    result = run_two_processes("sigphi.train.vlm", tmp_path, argv)
    assert result.returncode == 0, result.stderr[-4000:]
    results = json.loads((tmp_path / "vlm" / "eval_results.json").read_text())
    history = json.loads((tmp_path / "vlm" / "log_history.json").read_text())
    held_out = [entry for entry in history if "eval_loss" in entry][-1]
    # Each row counts once, in whichever process; at inference bitsandbytes may use other kernels than in training.
    num_rows = held_out["eval_samples_per_second"] * held_out["eval_runtime"]
    assert num_rows == pytest.approx(results["metadata"]["rows"], abs=1)
    assert results["eval_loss"] == pytest.approx(held_out["eval_loss"], rel=1e-4)
    assert os.path.exists(tmp_path / "vlm" / "lora" / "adapter_model.safetensors")
