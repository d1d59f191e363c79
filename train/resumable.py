"""A Trainer that loses nothing: exact resuming, checkpoints that are whole, an end at the first NaN."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sigphi.hub_card.cards import check_records
from sigphi.train.arguments import NEWEST
from sigphi.train.checkpoint_files import (
    ASIDE,
    checkpoints,
    fault_of,
    publish,
    reading,
    recorded_run,
    remove_old,
    seal,
    sole_run,
    write_errors,
)
from sigphi.train.errors import UserError, full_disks, worker_errors
from sigphi.train.nonfinite import Finding, NonFiniteError, Step, all_finite, examine
from sigphi.train.random_state import RandomState, random_state, set_random_state
from sigphi.train.replay_file import Replay, replay_path, weights_of, write_replay
from sigphi.train.run_identity import describe_run, differences, same_content
from sigphi.train.stopping import StopOnSignal

logger = logging.getLogger(__name__)

_MAKE_ROOM = "Make room, and go on with --resume from the last checkpoint."


class ResumableTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose runs go on, after any kind of end, as if there had been none.

    - A checkpoint is written aside, brought to the disk, and renamed: what has its name is whole. It records the run,
      see [`describe_run`]; only the same run goes on from it. Older ones are removed behind that.
    - `train(resume_from_checkpoint=...)` takes the folder of a checkpoint, or `True` or `"newest"` for the newest one
      of `args.output_dir` that is whole and of this run, or for a new start where there is none yet. A stream
      (`IterableDataset`) is read again up to there, which has to be in its first pass.
    - SIGTERM and SIGINT save and stop, see [`StopOnSignal`].
    - The first loss or gradient that is no number raises a [`NonFiniteError`]; the step is kept in a replay file.

    Args:
        options (`dict`, *optional*): what rebuilds this trainer without its data, for `sigphi replay`; as JSON can
            hold it.
        kwargs: those of [`~transformers.Trainer`].
    """

    def __init__(self, *, options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = options
        self.stopping = StopOnSignal(self.accelerator)
        self.add_callback(self.stopping)
        self.first_random: RandomState | None = None  # of a step that is replayed
        self._run: dict[str, Any] = {}
        self._is_saving = False
        self._step = Step()
        self._updates_per_epoch = 0

    # Resuming --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's; see the class for `resume_from_checkpoint`.

        Raises:
            UserError: if the folder of the output cannot be written, is in use, or holds the checkpoints of an earlier
                run that this one does not go on with; and if a checkpoint is not whole or of another run.
            NonFiniteError: if a loss or a gradient is no number.
        """
        output_dir = Path(self.args.output_dir)
        with sole_folder(self, output_dir):
            chosen = first_process(self, lambda: self._choose_checkpoint(output_dir, resume_from_checkpoint))
            with self.stopping.listening(), self._told():
                return super().train(chosen, *args, **kwargs)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Within it what ends a training from outside is a [`UserError`]."""
        remedy = "Go on with --resume; fewer --dataloader-num-workers need less memory."
        place = f"--output-dir {self.args.output_dir}"
        try:
            # Trackers write between the checkpoints, TensorBoard into the same folder.
            with worker_errors("a worker of the data loader", remedy), full_disks(place, _MAKE_ROOM):
                yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory behind step {self.state.global_step}, outside the batches (the optimizer, or an "
                f"evaluation): use an 8-bit --optim, or a smaller --per-device-eval-batch-size."
            ) from error

    def _choose_checkpoint(self, output_dir: Path, asked: str | bool | None) -> str | None:
        # Whatever the strategy of saving: a run that is stopped leaves a checkpoint.
        self._run = describe_run(self)
        if not asked:
            check_no_checkpoints(output_dir)
            return None
        if asked is True or asked == NEWEST:
            chosen = newest_checkpoint(output_dir, self._run)
        else:
            chosen = Path(str(asked))
            check_checkpoint(chosen, output_dir, self._run)
        if chosen is None:
            logger.info("no checkpoint in %s yet: training starts at its beginning", output_dir)
            return None
        if isinstance(self.train_dataset, IterableDataset | datasets.IterableDataset):
            check_first_pass(chosen)
        logger.info("training goes on from %s", chosen)
        for change in differences(recorded_run(chosen), self._run)[1]:
            logger.warning("%s: the weights will not be, bit for bit, those of a run that was never stopped", change)
        return str(chosen)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """As the Trainer's, which would make one step more where a checkpoint is of the last step."""
        self._updates_per_epoch = num_update_steps_per_epoch
        with reading(Path(str(args[0]))):
            epochs, steps = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, *args
            )
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs, steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(str(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(str(checkpoint))):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the Trainer's; what is trained and not in the checkpoint would go on from where it began."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing = sorted(trained & set(load_result.missing_keys))
        if missing:
            raise ValueError(f"its weights lack {', '.join(missing[:3])}")
        super()._issue_warnings_after_load(load_result)

    # Saving ----------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, written aside by all processes, then sealed and renamed by the first one."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial))
        with write_errors(folder, _MAKE_ROOM):
            with self._writing_aside():
                aside = Path(self._get_output_dir(trial), name)
                super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(aside):
                self.state.best_model_checkpoint = str(folder / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(aside, TRAINER_STATE_NAME))
                seal(aside, self._run)
                publish(aside, folder / name)
                remove_old(folder / name, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    @contextlib.contextmanager
    def _writing_aside(self) -> Iterator[None]:
        self._is_saving, only_model = True, self.args.save_only_model
        # What a stop leaves is to be gone on from.
        self.args.save_only_model = only_model and not self.stopping.is_stopping
        try:
            yield
        finally:
            self._is_saving, self.args.save_only_model = False, only_model

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._is_saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, but not before the checkpoint is whole."""
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As the Trainer's; a run that is stopped is saved by --save-strategy best whatever its score."""
        return super()._determine_best_metric(*args, **kwargs) or self.stopping.is_stopping

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which behind a stop would load the best checkpoint and may remove the last one."""
        if self.stopping.is_stopping:
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    # Numbers that are none -------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As the Trainer's; a step begins."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._step = Step(batches, num_items)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """[`one_batch`], taken down for a replay."""
        if self._step.random is None:
            if self.first_random is not None:
                set_random_state(self.first_random)
                self.first_random = None
            self._step.random = random_state()
        loss = self._within_memory(model, inputs, num_items_in_batch)
        self._step.losses.append(loss)
        return loss

    def _within_memory(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """[`one_batch`]; where memory does not hold it, the step so far once more, in smaller parts."""
        again: list[dict[str, Any]] = []
        loss = None
        while loss is None or again:
            try:
                for batch in again:
                    self.one_batch(model, batch, num_items_in_batch)
                again = []
                loss = self.one_batch(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError:
                # Here nothing is done about it: what has failed is in memory until this block is left.
                loss = None
            if loss is None:
                self._take_less(inputs)
                # The gradients may hold a part of what has failed.
                model.zero_grad()
                assert self._step.random is not None, "a step begins with its random numbers"
                set_random_state(self._step.random)
                again = self._step.batches[: len(self._step.losses)]
        return loss

    def _take_less(self, inputs: dict[str, Any]) -> None:
        clear_device_cache(garbage_collection=True)
        place = f"out of memory at step {self.state.global_step + 1}"
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(f"{place}, in a job of several processes: {self.memory_advice(inputs)}")
        said = self.take_less(inputs)
        if said is None:
            raise UserError(f"{place}: {self.memory_advice(inputs)}")
        logger.warning("%s: %s from now on; the batch of an update stays the same", place, said)

    def take_less(self, inputs: dict[str, Any]) -> str | None:
        """Let [`one_batch`] take less at a time, and say what; `None` where it cannot."""
        return None

    def memory_advice(self, inputs: dict[str, Any]) -> str:
        """What the user can do about memory that does not suffice."""
        return "use a smaller --batch-size, with as many more --gradient-accumulation-steps."

    def one_batch(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's own `training_step`; a Trainer that has another one overrides this."""
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the Trainer's, which calls it when all gradients are there, and the weights still those before."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A scaler steps over gradients that overflow, and lowers its factor.
        checked = None if self.accelerator.scaler is not None else grad_norm
        if not all_finite(self._step.losses, checked):
            raise self._non_finite(model, grad_norm)
        return grad_norm

    def _non_finite(self, model: nn.Module, grad_norm: Any) -> NonFiniteError:
        """Keep the step, and say what it was."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return self._non_finite_in_shards(grad_norm)
        finding = examine(self, model, self._step, grad_norm)
        rows = self._rows_of_step()
        about = {
            "epoch": self.state.epoch or 0.0,
            "world_size": self.args.world_size,
            "rank": self.args.process_index,
            "rows": rows,
            "contents": None if rows is None else [[self.train_dataset[row] for row in part] for part in rows],
            "options": self.options,
        }
        path = replay_path(Path(self.args.output_dir), finding.step, self.args.process_index)
        weights = weights_of(self.accelerator.unwrap_model(model))
        with write_errors(Path(self.args.output_dir)):
            write_replay(path, Replay(self._step, weights, finding, about))
        return NonFiniteError(
            f"{finding.what()}. Likely: {finding.cause}\nThe step is kept: sigphi replay {path}", finding
        )

    def _non_finite_in_shards(self, grad_norm: Any) -> NonFiniteError:
        """No process has whole weights to keep, and DeepSpeed has updated them already."""
        losses = [loss.detach().cpu() for loss in self._step.losses]
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm).detach().cpu()
        finding = Finding(self.state.global_step + 1, losses, norm, "", False, "not examined")
        return NonFiniteError(
            f"{finding.what()}. The step is not kept, since under DeepSpeed and FSDP no process has whole weights.\n"
            f"Try a lower --learning-rate; without --deepspeed and --fsdp the step is kept, and its cause looked for.",
            finding,
        )

    def _rows_of_step(self) -> list[list[int]] | None:
        """The rows of each batch of the step, which are drawn anew; `None` where that gives other batches."""
        if not isinstance(self.train_dataset, datasets.Dataset):
            return None
        epoch, update = divmod(self.state.global_step, self._updates_per_epoch)
        loader: Any = self.get_train_dataloader()
        loader.set_epoch(epoch)
        first = update * self.args.gradient_accumulation_steps
        rows = list(islice(loader.batch_sampler, first, first + len(self._step.batches)))
        drawn = [self.data_collator([self.train_dataset[row] for row in part]) for part in rows]
        return rows if same_content(drawn, self._step.batches) else None


def first_process(trainer: Trainer, function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, in all of them; so is the [`UserError`] that it raises there."""
    answer: list[Any] = [None, None]
    if trainer.is_world_process_zero():
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def sole_folder(trainer: Trainer, folder: Path) -> contextlib.ExitStack:
    """
    Within what is returned no other run may write into the folder, see [`sole_run`]; it keeps no hold of the trainer.

    Raises:
        UserError: that of the first process, in all of them.
    """
    stack = contextlib.ExitStack()
    first_process(trainer, lambda: stack.enter_context(sole_run(folder)))
    return stack


# Which checkpoint ----------------------------------------------------------------------------------------------------


def newest_checkpoint(output_dir: Path, run: dict[str, Any]) -> Path | None:
    """
    The newest checkpoint of a folder that is whole and of this run. What is passed over for it is said.

    Args:
        output_dir (`Path`): the run's.
        run (`dict`): of [`describe_run`].

    Returns:
        `Path`, or `None` where there are no checkpoints at all.

    Raises:
        UserError: if there are some and none will do.
    """
    found = checkpoints(output_dir)
    for folder in reversed(found):
        reason = _reason_against(folder, run)
        if reason is None:
            return folder
        logger.warning("%s is passed over: %s", folder, reason)
    if found:
        raise UserError(
            f"--resume: no checkpoint in {output_dir} will do. {found[-1].name}: {_reason_against(found[-1], run)}.\n"
            f"Give the options of its run, or name another --output-dir, or remove these checkpoints to start anew."
        )
    return None


def check_checkpoint(folder: Path, output_dir: Path, run: dict[str, Any]) -> None:
    """
    Check the checkpoint that a user names.

    Args:
        folder (`Path`): the checkpoint.
        output_dir, run: as of [`newest_checkpoint`].

    Raises:
        UserError: if it is not whole, of another run, or older than others of the same folder, which would be mixed
            with those that follow it.
    """
    option = f"--resume-from-checkpoint {folder}"
    if not folder.is_dir():
        raise UserError(f"{option}: there is no such folder. Without a value it means the newest checkpoint.")
    reason = _reason_against(folder, run)
    if reason is not None:
        raise UserError(f"{option}: {reason}.\nGive the options of its run, or start a new one without it.")
    if folder.resolve().parent == output_dir.resolve() and folder.resolve() != checkpoints(output_dir)[-1].resolve():
        raise UserError(
            f"{option}: {output_dir} has newer ones, up to {checkpoints(output_dir)[-1].name}. Remove them, or name "
            f"another --output-dir."
        )


def check_first_pass(folder: Path) -> None:
    """
    Raise a [`UserError`] if a checkpoint of a training on a stream is of the second pass over it, or of a later one.

    Of a stream the Trainer knows no length: it reads the first pass again, and steps over all batches in that one.
    """
    epoch = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["epoch"]
    if epoch >= 1:
        raise UserError(
            f"{folder}: the rows are a stream, and this checkpoint is of its pass {int(epoch) + 1}; training can go "
            f"on within the first one alone. Let the stream have no end: `dataset.repeat(None)`."
        )


def check_no_checkpoints(output_dir: Path) -> None:
    """Raise a [`UserError`] if a folder holds checkpoints of an earlier run, with which a new one would be mixed."""
    found = checkpoints(output_dir)
    if found:
        raise UserError(
            f"--output-dir {output_dir} holds {found[-1].name} of an earlier run. Go on with it by --resume, name "
            f"another folder, or remove its checkpoints."
        )


def check_output_dir(arguments: TrainingArguments) -> None:
    """
    Check the folder of a run before anything is loaded; the Trainer checks it again.

    Raises:
        UserError: if it cannot be written, is in use, or holds the checkpoints of a run that this one does not resume,
            or files of a model that are broken and belong to its card.
    """
    if arguments.process_index != 0:
        return
    output_dir = Path(arguments.output_dir)
    if output_dir.is_dir():
        with sole_run(output_dir):
            check_records(output_dir)
            if not arguments.resume_from_checkpoint:
                check_no_checkpoints(output_dir)
        return
    # Nothing is made yet: what follows may still find another mistake.
    place = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "is no folder" if not place.is_dir() else "may not be written to"
        raise UserError(f"--output-dir {output_dir} cannot be made: {place} {reason}. Name another folder.")


def _reason_against(folder: Path, run: dict[str, Any]) -> str | None:
    """Why a run cannot go on from a checkpoint, or `None`."""
    fault = fault_of(folder)
    if fault is not None:
        return fault
    recorded = recorded_run(folder)
    if not recorded:
        return "it does not say of which run it is"
    try:
        refused, _ = differences(recorded, run)
    except (KeyError, TypeError, AttributeError):  # of another form than any that this version or one before writes
        return "what it says of its run cannot be read"
    return f"it is of another run ({'; '.join(refused)})" if refused else None


__all__ = [
    "ResumableTrainer",
    "check_checkpoint",
    "check_first_pass",
    "check_no_checkpoints",
    "check_output_dir",
    "first_process",
    "newest_checkpoint",
    "sole_folder",
]
