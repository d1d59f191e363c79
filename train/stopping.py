"""SIGTERM and SIGINT end a training at its next step, behind a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """
    Lets a training end well when it is told to: at the next step it is saved and stops.

    All processes of a job stop at the same step, whichever of them got the signal. A second Ctrl-C ends a job of one
    process at once. What belongs to the end of an epoch is done before its last step is saved, so that a run that is
    resumed there has not missed an evaluation, which draws random numbers.

    Args:
        accelerator (`Accelerator`): the Trainer's.

    Raises:
        KeyboardInterrupt: at the end of a training that SIGINT has stopped.
        SystemExit: with code 143 at the end of one that SIGTERM has stopped.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self.is_stopping = False
        self._is_postponed = False  # the checkpoint of an epoch's last step
        self._saved_step = -1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the two signals are taken down. Only the main thread of a process can do that."""
        self.received, self.is_stopping, self._saved_step = None, False, -1
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._note) for number in _SIGNALS} if is_main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT and self.accelerator.num_processes == 1:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self.accelerator.is_main_process:
            # Not by the logger, in whose middle the signal may have come.
            os.write(2, f"\n{self.received.name}: this step is finished and saved, then training stops\n".encode())

    def _is_asked(self) -> bool:
        """Whether any process got a signal."""
        if self.accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, if that is asked for; the last step of an epoch is saved at its end."""
        self.is_stopping = self.is_stopping or self._is_asked()
        control.should_training_stop |= self.is_stopping
        if is_whole_epoch(state):
            self._is_postponed = control.should_save
            control.should_save = False
        else:
            control.should_save |= self.is_stopping

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer calls it behind a stop in the middle of an epoch too."""
        if is_whole_epoch(state):
            control.should_save |= self._is_postponed or self.is_stopping
            self._is_postponed = False
        elif self.is_stopping:
            control.should_log = control.should_evaluate = False
            control.should_save = self._saved_step != state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A signal that came while a checkpoint was written needs no other one, unless that is of the model alone."""
        if args.save_only_model and not self.is_stopping:
            return
        self._saved_step = state.global_step
        self.is_stopping = self.is_stopping or self._is_asked()
        control.should_training_stop |= self.is_stopping

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the process as the signal would have, past what others do at the end of a whole training."""
        if not self.is_stopping:
            return
        if self.accelerator.is_main_process:
            place = f"saved in {args.output_dir}/checkpoint-{state.global_step}"
            where = place if self._saved_step == state.global_step else "not saved since the last checkpoint"
            text = f"stopped at step {state.global_step} of {state.max_steps}, {where}; go on with --resume\n"
            os.write(2, text.encode())
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


def is_whole_epoch(state: TrainerState) -> bool:
    """Whether the last step has ended an epoch."""
    return float(state.epoch or 0.0).is_integer()


__all__ = ["StopOnSignal", "is_whole_epoch"]
