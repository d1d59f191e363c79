"""A small language model from nothing: tokenizer, random Phi, and a short text-only warm-up.

Where no pretrained language model can be had (no network, no GPU), this makes one that knows the words of a QA set and
nothing of its images, to be used as `--language-model` and `--text-model`.

    python -m sigphi.train.base_lm --input-csv qa.csv --output-dir outputs/base
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from transformers.hf_argparser import HfArg

from sigphi.train.arguments import DataArguments, SigphiTrainingArguments
from sigphi.train.data import load_data
from sigphi.train.errors import run_command
from sigphi.train.parser import parse_arguments
from sigphi.train.report import write_loss_curve

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer of the kind that Phi-2 uses, learnt from `texts`.

    Args:
        texts (`Iterable[str]`): what it is to read.
        vocab_size (`int`): at most so many tokens, 256 bytes and the end-of-text token among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@dataclass
class BaseModelArguments:
    """The size of the language model."""

    _argument_group_name = "language model"

    vocab_size: int = HfArg(help="Tokens, rounded up to a multiple of 64 for the embedding.", default=1024)
    hidden_size: int = HfArg(help="Width; a multiple of 64.", default=192)
    num_hidden_layers: int = HfArg(help="Layers.", default=4)
    num_attention_heads: int = HfArg(help="Attention heads.", default=4)


def small_phi(arguments: BaseModelArguments, tokenizer: PreTrainedTokenizerFast) -> PhiForCausalLM:
    """A Phi of the given size with random weights and a spare embedding row for the image placeholder."""
    rows = -(-(len(tokenizer) + 1) // 64) * 64
    config = PhiConfig(
        vocab_size=rows,
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return PhiForCausalLM(config)


def qa_texts(questions: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Questions and answers in the form of the processor's chat template, without an image."""
    return [f"Question: {q}\nAnswer: {a.strip()}{END_OF_TEXT}" for q, a in zip(questions, answers, strict=True)]


@dataclass
class BaseTrainingArguments(SigphiTrainingArguments):
    """
    Options of the warm-up.

    Defaults that differ from [`~transformers.TrainingArguments`]: `per_device_train_batch_size` 128,
    `num_train_epochs` 1, `learning_rate` 2e-3, `weight_decay` 0.1, `warmup_steps` 0.1 (a ratio), `lr_scheduler_type`
    `"cosine"`, `save_strategy` `"no"`, `logging_steps` 20.
    """

    _argument_group_name = "training"

    output_dir: str = HfArg(help="Folder of the language model and its tokenizer.", default="outputs/base")
    per_device_train_batch_size: int = HfArg(
        aliases=["--batch-size", "--batch_size"], help="Texts in a step, per device.", default=128
    )
    num_train_epochs: float = HfArg(aliases=["--num-epochs", "--num_epochs"], help="Passes over the data.", default=1)
    learning_rate: float = HfArg(help="Peak learning rate.", default=2e-3)
    weight_decay: float = HfArg(help="Weight decay.", default=0.1)
    warmup_steps: float = HfArg(help="Warm-up, in steps, or as a share of all steps when below 1.", default=0.1)
    lr_scheduler_type: str = HfArg(help="Learning rate schedule.", default="cosine")
    save_strategy: str = HfArg(help="When to save a checkpoint.", default="no")
    logging_steps: float = HfArg(help="Steps between two log lines.", default=20)


def main(argv: list[str] | None = None) -> None:
    """Tokenizer and model from the training rows of a CSV; images that are held out stay out here too."""
    model_arguments, data_arguments, arguments = parse_arguments(
        [BaseModelArguments, DataArguments, BaseTrainingArguments], argv, "python -m sigphi.train.base_lm"
    )
    set_seed(arguments.seed)
    train = load_data(data_arguments)["train"]
    texts = qa_texts(train["question"], train["answer"])
    tokenizer = train_tokenizer(texts, model_arguments.vocab_size)
    ids = tokenizer(texts)["input_ids"]
    trainer = Trainer(
        model=small_phi(model_arguments, tokenizer),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}),
        # Pads labels by -100, where the language modelling collator would mask the token that ends a text as well.
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(arguments.output_dir)
        tokenizer.save_pretrained(arguments.output_dir)
        write_loss_curve(trainer.state.log_history, Path(arguments.output_dir))


__all__ = ["BaseModelArguments", "main", "qa_texts", "small_phi", "train_tokenizer"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.base_lm")
