"""Watching a VLM while it trains: does it look at the image?"""

import logging
import random
import weakref
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.answer_scores import MIN_IMAGE_GAIN, SHUFFLED, accuracies, judged_rows
from sigphi.train.data import distinct_images
from sigphi.train.metrics import has_label_derangement
from sigphi.train.sharding import divides_weights
from sigphi.train.trainers import VlmTrainer
from sigphi.train.vlm_evaluation import generate_answers, with_other_images

logger = logging.getLogger(__name__)

# Answers that one word decides are shorter; what goes on behind it is cut.
_MAX_NEW_TOKENS = 40


class LooksAtImageCallback(TrainerCallback):
    """
    Asks held-out questions with the right and with another image, at each evaluation and at the end of training.

    Logs `eval_image_gain`, the accuracy with the right image minus that with another, and `eval_class_accuracy`;
    `metric_for_best_model` may name both. Warns when the gain is below 0.05 at two evaluations in a row behind the
    first third of training, or at the end; with `args.stop_if_blind` training stops at the first warning. Changes
    neither weights nor random numbers. All processes ask the same, and the figures of the first one count.

    Args:
        trainer (`VlmTrainer`): whose model is asked.
        processor (`SigPhiProcessor`): the model's.
        dataset (`datasets.Dataset`): what is asked, see [`watched_rows`]; not empty.
        seed (`int`, *optional*, defaults to 0): of the permutation of the images.
    """

    def __init__(
        self, trainer: VlmTrainer, processor: SigPhiProcessor, dataset: datasets.Dataset, seed: int = 0
    ) -> None:
        # The trainer holds its callbacks: a circle would keep the model in memory when both are done with.
        self.trainer = weakref.proxy(trainer)
        self.processor = processor
        self.rows = judged_rows(dataset)
        # Once, since the image tower is frozen.
        self.features, self.image_indices = with_other_images(trainer.model, processor, dataset, seed)
        self.gains: list[tuple[int, float]] = []  # step, gain
        self.is_blind = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where training is resumed, go on from what was measured before."""
        logged = [entry for entry in state.log_history if "eval_image_gain" in entry]
        self.gains = [(entry["step"], entry["eval_image_gain"]) for entry in logged]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure; and judge this and the last measurement, while training is to go on."""
        kwargs["metrics"].update(self.measure())
        is_late = state.max_steps / 3 <= state.global_step < state.max_steps
        self.is_blind = is_late and len(self.gains) > 1 and max(gain for _, gain in self.gains[-2:]) < MIN_IMAGE_GAIN
        if self.is_blind:
            logger.warning("WARNING: %s", self.finding())
            control.should_training_stop |= args.stop_if_blind

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the model that is kept, unless that has been done, and judge it."""
        if self.is_blind and args.stop_if_blind:
            return
        if not self.gains or self.gains[-1][0] != state.global_step or args.load_best_model_at_end:
            self.measure()
        self.is_blind = self.gains[-1][1] < MIN_IMAGE_GAIN
        if self.is_blind:
            logger.warning("WARNING: %s", self.finding())

    def measure(self) -> dict[str, float]:
        """Ask, log the figures, and give them."""
        texts = self._answers()
        real, other = (accuracies(self.rows, part) for part in (texts[: len(self.rows)], texts[len(self.rows) :]))
        name = "answer_accuracy" if "answer_accuracy" in real else "class_accuracy"
        figures = {"eval_image_gain": real[name] - other[name]}
        if "class_accuracy" in real:
            figures["eval_class_accuracy"] = real["class_accuracy"]
        # Rounding may differ between devices, and processes that decide differently wait for each other for ever.
        values = broadcast(torch.tensor(list(figures.values()), device=self.trainer.args.device)).tolist()
        figures = dict(zip(figures, values, strict=True))
        self.gains.append((self.trainer.state.global_step, figures["eval_image_gain"]))
        self.trainer.log(dict(figures))
        return figures

    def _answers(self) -> list[str]:
        """To all questions with their image, then to all with another one."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        images = self.image_indices[""] + self.image_indices[SHUFFLED]
        questions = [row.question for row in self.rows] * 2
        batch_size = self.trainer.args.per_device_eval_batch_size
        # FSDP2 gathers weights for calls of the whole model alone.
        shares_prefix = False if divides_weights(self.trainer.args) else None
        with self.trainer.compute_loss_context_manager():
            given = generate_answers(
                model,
                self.processor,
                self.features,
                images,
                questions,
                batch_size,
                _MAX_NEW_TOKENS,
                shares_prefix=shares_prefix,
            )
        model.train(was_training)
        return [one.text for one in given]

    def finding(self) -> str:
        """What the last measurement says, in one line."""
        step, gain = self.gains[-1]
        return (
            f"at step {step} the model does not look at the image: over {len(self.rows)} held-out questions the right "
            f"one brings {gain:+.3f} accuracy against another one (image_gain)."
        )


def watched_rows(dataset: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """
    A seeded choice of questions with an answer that one word decides and that the image decides; half ask for the
    object, where there are as many.

    Args:
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].
        count (`int`): how many, at most.
        seed (`int`): of the choice.

    Returns:
        `datasets.Dataset`: rows of `dataset`, in its order. Empty when none fits, or when one class has more than half
        of their images, so that there is no other image to show.
    """
    rows = judged_rows(dataset)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    objects = [number for number in order if rows[number].asks_object]
    others = [
        number
        for number in order
        if rows[number].is_checkable and rows[number].question_type not in ("object", "refusal")
    ]
    chosen = objects[: max(count // 2, count - len(others))]
    chosen += others[: count - len(chosen)]
    watched = dataset.select(sorted(chosen))
    can_swap = len(watched) > 0 and has_label_derangement(distinct_images(watched)[0]["label"])
    return watched if can_swap else dataset.select([])


def watched_figures(dataset: datasets.Dataset) -> list[str]:
    """What [`LooksAtImageCallback`] logs of questions that it asks, without prefix."""
    asks_object = any(row.asks_object for row in judged_rows(dataset))
    return ["image_gain", "class_accuracy"] if asks_object else ["image_gain"]


__all__ = ["LooksAtImageCallback", "watched_figures", "watched_rows"]
