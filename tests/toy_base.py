"""The language model of the tests, also where pytest is not installed."""

from pathlib import Path

import torch

from sigphi.train.base_lm import BaseModelArguments, qa_texts, small_phi, train_tokenizer
from sigphi.train.data import load_cifar10_qa


def write_toy_base(csv: Path, images: str, folder: Path) -> None:
    """Save a Phi of two layers, hidden size 64 and random weights, and a tokenizer that knows the words of a CSV."""
    data = load_cifar10_qa(csv, images, eval_fraction=0)["train"]
    tokenizer = train_tokenizer(qa_texts(data["question"], data["answer"]), 500)
    torch.manual_seed(0)
    size = BaseModelArguments(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    small_phi(size, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
