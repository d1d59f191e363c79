"""What makes a training the run that it is: a checkpoint of another one does not fit."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer

from sigphi.train.arguments import VlmTrainingArguments
from sigphi.train.fingerprints import digest, tensor_parts
from sigphi.train.random_state import own_random_numbers
from sigphi.train.records import environment
from sigphi.train.sharding import OTHER_NUMBER, reason_against, way_of

# Options that change neither weights nor random numbers.
_WITHOUT_EFFECT = """
output_dir do_train do_eval do_predict per_device_eval_batch_size prediction_loss_only eval_do_concat_batches
eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub
hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
metric_for_best_model greater_is_better restore_callback_states_from_checkpoint enable_jit_checkpoint
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context remove_unused_columns label_names resume_from_checkpoint local_rank debug
skip_memory_metrics torch_empty_cache_steps ddp_timeout ddp_backend auto_find_batch_size use_cache stop_if_blind
""".split()
# Those that may change on the way; the weights are then other ones than those of an unbroken run, which is said.
_MAY_CHANGE = """
num_train_epochs max_steps gradient_accumulation_steps eval_strategy eval_steps eval_delay eval_on_start eval_samples
ignore_data_skip bf16 fp16 tf32 use_cpu gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
activation_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode full_determinism
loss_variant loss_chunk_size micro_batch_size channels_last ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
""".split()
# Where a model and its parts lie: what they are is compared by itself.
_PLACES = {"base_language_model", "base_language_model_revision", "text_model_name_or_path", "text_model_revision"}
_PLACES |= {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map", "architectures"}
_MOST_ROWS = 1_000_000
_SAMPLE = 64


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """
    What the weights at the end of a training depend on, as JSON can hold it.

    Args:
        trainer (`Trainer`): before it trains, with a model that is not wrapped.

    Returns:
        `dict`: `options`; `step_size` (rows of an update over all processes; positions where these are the budget);
        `model` (its config, and hashes over the names and shapes of what is trained and over a part of what is
        frozen); `data` (number of rows, a hash over at most a million of them, and one over what the collator makes of
        64, images and features included; nothing of a stream); `sharding` (see [`way_of`]); `environment` (versions,
        processes, devices).
    """
    arguments = trainer.args
    by_positions = isinstance(arguments, VlmTrainingArguments) and arguments.tokens_per_batch > 0
    per_device = arguments.tokens_per_batch if by_positions else arguments.train_batch_size
    # The batch counts over all devices, by `step_size`.
    names = {field.name for field in dataclasses.fields(arguments)} - {*_WITHOUT_EFFECT, "per_device_train_batch_size"}
    described = {
        "options": {name: value for name, value in arguments.to_dict().items() if name in names},
        "step_size": per_device * arguments.world_size * arguments.gradient_accumulation_steps,
        "model": _model(trainer.model),
        "data": _data(trainer.train_dataset, trainer.data_collator),
        "sharding": way_of(arguments),
        "environment": environment() | {"processes": str(arguments.world_size)},
    }
    return json.loads(json.dumps(described, default=str))


def _model(model: Any) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items() if p.requires_grad}
    # The first rows tell two models apart. Quantised ones may come out otherwise on another device.
    frozen = {name: p[:1] for name, p in parameters.items() if not p.requires_grad and p.ndim}
    # A whitened stem is computed before the checkpoint brings its own, and comes out otherwise on another machine.
    frozen = {name: rows for name, rows in frozen.items() if not name.startswith("vision_model.embedder.")}
    frozen = {name: rows for name, rows in frozen.items() if rows.is_floating_point()}
    return {
        "config": _without_places(model.config.to_dict()) if isinstance(model, PreTrainedModel) else {},
        "trained": digest([repr(sorted(shapes.items())).encode()]),
        "frozen": digest(tensor_parts(frozen)),
    }


def _without_places(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _without_places(value) for name, value in config.items() if name not in _PLACES}
    return config


def _data(dataset: Any, collator: Any) -> dict[str, Any]:
    if isinstance(dataset, IterableDataset | datasets.IterableDataset):
        return {}
    rows = len(dataset)
    content = digest(_row_parts(dataset)) if isinstance(dataset, datasets.Dataset) else None
    with own_random_numbers():  # those of the training stay as they are, whatever the collator draws
        batch = collator([dataset[row] for row in range(0, rows, max(1, rows // _SAMPLE))][:_SAMPLE])
    return {"rows": rows, "content": content, "sample": digest(_tree_parts(batch))}


def _row_parts(dataset: datasets.Dataset) -> Iterator[bytes]:
    """Arrow's own bytes of the rows, of which many are looked at and not all."""
    step = -(-len(dataset) // _MOST_ROWS)
    chosen = dataset if step == 1 else dataset.select(range(0, len(dataset), step))
    for table in chosen.with_format("arrow").iter(batch_size=10_000):
        plain = table.replace_schema_metadata(None).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, plain.schema) as writer:
            writer.write_table(plain)
        yield sink.getvalue()


def _tree_parts(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        for name, value in sorted(batch.items()):
            yield name.encode()
            yield from _tree_parts(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tree_parts(value)
    elif isinstance(batch, torch.Tensor):
        yield from tensor_parts({"": batch})
    else:
        yield repr(batch).encode()


def same_content(some: Any, others: Any) -> bool:
    """Whether two nested structures of tensors are equal, bit for bit, wherever these lie."""
    return digest(_tree_parts(some)) == digest(_tree_parts(others))


def differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """
    What differs between two runs.

    Args:
        before, now (`dict`): of [`describe_run`].

    Returns:
        `tuple`: what makes them two runs, and what only makes the weights other ones than those of an unbroken run; as
        halves of sentences for the user.
    """
    refused: list[str] = []
    said: list[str] = []
    for name, value in now["options"].items():
        old = before["options"].get(name, value)  # an older version did not know the option
        if old != value:
            change = f"--{name.replace('_', '-')} was {old}, is {value}"
            (said if name in _MAY_CHANGE else refused).append(change)
    if before["step_size"] != now["step_size"]:
        refused.append(f"an update had a batch of {before['step_size']} over all processes, has {now['step_size']}")
    refused += _other_model(before["model"], now["model"]) + _other_data(before["data"], now["data"])
    refused += _other_sharding(before, now)
    for name, value in now["environment"].items():
        old = before["environment"].get(name, value)
        if old != value:
            said.append(f"{name} was {old}, is {value}")
    return refused, said


def _other_model(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    fields = sorted(
        name for name in {**before["config"], **now["config"]} if before["config"].get(name) != now["config"].get(name)
    )
    if fields:
        return [f"the model has another {', '.join(fields)}"]
    if before["trained"] != now["trained"]:
        return ["other parameters of the model are trained"]
    return ["the frozen weights are of another model"] if before["frozen"] != now["frozen"] else []


def _other_sharding(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """DeepSpeed's files are those of as many processes; what DDP and FSDP2 write any number can read."""
    way = before.get("sharding", now["sharding"])
    if way != now["sharding"]:
        return [f"it was written under {way}, whose files {now['sharding']} cannot read"]
    processes = [run["environment"]["processes"] for run in (before, now)]
    if reason_against(way, OTHER_NUMBER) is not None and processes[0] != processes[1]:
        return [f"it was written under {way} by {processes[0]} processes: launch as many, not {processes[1]}"]
    return []


def _other_data(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if before.get("rows") != now.get("rows"):
        return [f"the data had {before.get('rows')} rows for training, has {now.get('rows')}"]
    if before.get("content") != now.get("content"):
        return ["the rows for training are other ones"]
    return ["the images, texts or features of the rows are other ones"] if before != now else []


__all__ = ["describe_run", "differences", "same_content"]
