"""Evaluation against ground truth, and the command `sigphi evaluate MODEL`.

sigphi evaluate outputs/vlm --input-csv test.csv --images uoft-cs/cifar10
"""

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.hf_argparser import HfArg

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.cards import write_card
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, pairwise_logits
from sigphi.modeling.modeling_sigphi import SigPhiForConditionalGeneration
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.arguments import QaArguments
from sigphi.train.checkpoints import check_token_counts, read_config
from sigphi.train.collators import VlmCollator, preprocess, text_key
from sigphi.train.data import distinct_images, held_out, load_cifar10_qa
from sigphi.train.errors import UserError, run_command
from sigphi.train.images import decode_images
from sigphi.train.metrics import (
    has_label_derangement,
    label_derangement,
    majority_share,
    recall_at_k,
    token_f1,
    top1_accuracy,
)
from sigphi.train.parser import parse_arguments
from sigphi.train.prompts import tokenize_questions, tokenized_rows
from sigphi.train.questions import CLASS_NAMES, asks_for_object, is_correct
from sigphi.train.records import EVAL_RESULTS, TRAINING_DATA, environment, write_json

logger = logging.getLogger(__name__)

# The wordings in which answers name the object. An embedding is averaged over all of them (Radford et al., arXiv
# 2103.00020, section 3.1.4).
ZERO_SHOT_PROMPTS = (
    "The main object in this image is {}.",
    "This image shows {}.",
    "It is a picture of {}.",
    "It is {}.",
    "The picture shows {}.",
    "Yes, this image shows {}.",
)
RETRIEVAL_KS = (1, 5, 10)


# Encoder ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed_images(model: SiglipResNetModel, processor: Any, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """L2-normalised image embeddings, float32, of shape `(images, projection_dim)`, on the CPU."""
    batches = [preprocess(processor, part).to(model.device) for part in images.split(batch_size)]
    return torch.cat([model(pixel_values=batch).image_embeds.cpu() for batch in batches])


@torch.no_grad()
def pool_texts(
    model: SiglipResNetModel, processor: Any, texts: Sequence[str], batch_size: int = 256, max_length: int = 64
) -> torch.Tensor:
    """
    What the text projection reads, float32, of shape `(texts, hidden_size)`, on the CPU; similar lengths together.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    pooled = torch.empty(len(texts), model.text_model.projection.in_features)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        part = [texts[row] for row in rows]
        tokens = processor.tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        tokens = tokens.to(model.device)
        pooled[rows] = model.text_model.pool(tokens["input_ids"], tokens["attention_mask"])[1].float().cpu()
    model.train(was_training)
    return pooled


@torch.no_grad()
def embed_texts(model: SiglipResNetModel, processor: Any, texts: Sequence[str], batch_size: int) -> torch.Tensor:
    """L2-normalised text embeddings, float32, of shape `(texts, projection_dim)`, on the CPU."""
    pooled = pool_texts(model, processor, texts, batch_size).to(model.device)
    return model(text_features=pooled).text_embeds.cpu()


def class_embeddings(model: SiglipResNetModel, processor: Any, batch_size: int = 64) -> torch.Tensor:
    """One L2-normalised embedding a class, of shape `(10, projection_dim)`: the mean over [`ZERO_SHOT_PROMPTS`]."""
    texts = [prompt.format(with_article(name)) for name in CLASS_NAMES for prompt in ZERO_SHOT_PROMPTS]
    embeds = embed_texts(model, processor, texts, batch_size)  # (classes * prompts, dim)
    mean = embeds.view(len(CLASS_NAMES), len(ZERO_SHOT_PROMPTS), -1).mean(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def with_article(noun: str) -> str:
    """`noun` behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def evaluate_encoder(
    model: SiglipResNetModel,
    processor: SiglipResNetProcessor,
    dataset: datasets.Dataset,
    batch_size: int = 256,
    max_retrieval_images: int = 1000,
) -> dict[str, float]:
    """
    Zero-shot classification and retrieval.

    Args:
        model (`SiglipResNetModel`): with its text tower.
        processor (`SiglipResNetProcessor`): the model's.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`]; the images behind its rows are classified.
        batch_size (`int`, *optional*, defaults to 256): images or texts in a step.
        max_retrieval_images (`int`, *optional*, defaults to 1000): retrieval ranks the first so many images and all
            their distinct texts. Recall depends on this number.

    Returns:
        `dict`: `zero_shot_top1` beside `majority/zero_shot`, and `image_to_text_r1`, `_r5`, `_r10`,
        `text_to_image_r1`, `_r5`, `_r10`: the share of queries with a right item among the first k, where equal texts
        are one item that all their images share.
    """
    was_training = model.training
    model.eval()
    images, positions = distinct_images(dataset)
    pixels = decode_images(images, range(len(images)))
    embeds = embed_images(model, processor, pixels, batch_size)  # (images, dim)
    labels = torch.tensor(images["label"])
    scores = embeds @ class_embeddings(model, processor, batch_size).t()  # (images, classes)
    results = {
        "zero_shot_top1": top1_accuracy(scores, labels),
        "majority/zero_shot": majority_share([CLASS_NAMES[label] for label in labels.tolist()]),
    }
    pairs = [(i, a) for i, a in zip(positions, dataset["answer"], strict=True) if i < max_retrieval_images]
    results |= _retrieval(model, processor, embeds[:max_retrieval_images], pairs, batch_size)
    model.train(was_training)
    return results


def _retrieval(
    model: SiglipResNetModel, processor: Any, embeds: torch.Tensor, pairs: list[tuple[int, str]], batch_size: int
) -> dict[str, float]:
    texts: dict[str, int] = {}
    for _, text in pairs:
        texts.setdefault(text_key(text), len(texts))
    relevant = torch.zeros(len(embeds), len(texts), dtype=torch.bool)  # (images, texts)
    for image, text in pairs:
        relevant[image, texts[text_key(text)]] = True
    spellings = {text_key(text): text for _, text in reversed(pairs)}
    first_spelling = [spellings[key] for key in texts]
    text_embeds = embed_texts(model, processor, first_spelling, batch_size)
    scores = pairwise_logits(embeds, text_embeds, model.logit_scale.cpu(), model.logit_bias.cpu()).detach()
    found = {f"image_to_text_r{k}": value for k, value in recall_at_k(scores, relevant, RETRIEVAL_KS).items()}
    return found | {
        f"text_to_image_r{k}": value for k, value in recall_at_k(scores.t(), relevant.t(), RETRIEVAL_KS).items()
    }


# VLM -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_images(
    model: SigPhiForConditionalGeneration, processor: Any, images: torch.Tensor, batch_size: int = 256
) -> torch.Tensor:
    """What the projector reads, `(images, num_image_tokens, feature_size)`, on the CPU: once an image."""
    was_training = model.model.vision_tower.training
    model.model.vision_tower.eval()
    parts = [
        model.model.get_vision_features(preprocess(processor, part).to(model.device)).cpu()
        for part in images.split(batch_size)
    ]
    model.model.vision_tower.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def generate_answers(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    image_features: torch.Tensor,
    image_indices: Sequence[int],
    questions: Sequence[str],
    batch_size: int = 64,
    max_new_tokens: int = 80,
) -> list[str]:
    """
    Greedy answers.

    Args:
        model, processor: of the VLM.
        image_features (`torch.Tensor` of shape `(images, num_image_tokens, feature_size)`): see [`encode_images`].
        image_indices (`Sequence[int]`): for each question the row of `image_features`.
        questions (`Sequence[str]`): one a row. Equal questions are answered together, since their answers are about
            equally long.
        batch_size (`int`, *optional*, defaults to 64): questions in a step.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
    """
    prompts = tokenize_questions(processor, questions)
    order = sorted(range(len(questions)), key=lambda row: (questions[row], row))
    answers = [""] * len(questions)
    for start in tqdm(range(0, len(order), batch_size), desc="answering", disable=None, leave=False):
        rows = order[start : start + batch_size]
        padded = processor.tokenizer.pad({"input_ids": [prompts[row] for row in rows]}, padding_side="left")
        inputs = {name: torch.tensor(padded[name], device=model.device) for name in ("input_ids", "attention_mask")}
        features = image_features[[image_indices[row] for row in rows]].to(model.device)
        tokens = model.generate(**inputs, image_features=features, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


@torch.no_grad()
def supervised_loss(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    image_features: torch.Tensor,
    image_indices: Sequence[int],
    dataset: datasets.Dataset,
    batch_size: int,
) -> float:
    """Mean cross-entropy in nats over all supervised tokens of `dataset`, however they are batched."""
    rows = tokenized_rows(processor, dataset, image_indices)
    collate = VlmCollator(pad_token_id=processor.tokenizer.pad_token_id, image_features=image_features)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["prompt_ids"]) + len(rows[row]["answer_ids"]))
    total = tokens = 0.0
    for start in range(0, len(order), batch_size):
        batch = collate([rows[row] for row in order[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch, logits_to_keep=1).loss.item() * supervised
        tokens += supervised
    return total / tokens


@dataclass
class _Row:
    """One question with what its answer is judged by."""

    question: str
    answer: str
    question_type: str
    short_answer: str
    class_name: str
    asks_object: bool

    def judge(self, given: str) -> bool:
        return is_correct(given, self.short_answer, self.question_type)

    def judge_class(self, given: str) -> bool:
        return is_correct(given, self.class_name, "object")


def evaluate_vlm(
    model: SigPhiForConditionalGeneration,
    processor: SigPhiProcessor,
    dataset: datasets.Dataset,
    batch_size: int = 64,
    max_new_tokens: int = 80,
    seed: int = 0,
) -> dict[str, float]:
    """
    Loss, accuracy against ground truth, and what looking at the image is worth.

    Each question is answered three times: with its image, with the image of another row (a seeded permutation of the
    images in which none keeps its label), and with a gray one.

    Args:
        model (`SigPhiForConditionalGeneration`): the VLM.
        processor (`SigPhiProcessor`): its processor.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].
        batch_size (`int`, *optional*, defaults to 64): questions in a step.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
        seed (`int`, *optional*, defaults to 0): of the permutation.

    Returns:
        `dict`: `eval_loss` (nats per supervised token) and `token_f1`; over rows with a short answer
        `answer_accuracy`, `answer_count`, `accuracy/<type>` beside `majority/<type>`; over rows that ask for the
        object `class_accuracy`, `class_count`, `majority/class`; each accuracy also with `_shuffled_image` and
        `_blank_image`; and `image_gain`, `image_gain/<type>`, `class_image_gain`: real minus shuffled. Keys without
        rows are absent.

    Raises:
        ValueError: if one class has more than half of the images, so that no permutation changes every label.
    """
    was_training = model.training
    model.eval()
    images, positions = distinct_images(dataset)
    pixels = decode_images(images, range(len(images)))
    gray = torch.full_like(pixels[:1], 128)
    features = encode_images(model, processor, torch.cat([pixels, gray]))  # (images + 1, tokens, size)
    indices = {"": positions, "_blank_image": [len(images)] * len(positions)}
    if has_label_derangement(images["label"]):
        indices["_shuffled_image"] = label_derangement(images["label"], seed)[positions].tolist()
    else:
        logger.warning("one class has more than half of the images, so there is no shuffled figure and no image_gain")
    rows = _judged_rows(dataset)
    results = {"eval_loss": supervised_loss(model, processor, features, positions, dataset, batch_size)}
    for suffix, image_indices in indices.items():
        answers = generate_answers(
            model, processor, features, image_indices, dataset["question"], batch_size, max_new_tokens
        )
        results |= {f"{name}{suffix}": value for name, value in _accuracies(rows, answers).items()}
    model.train(was_training)
    return _summarise(results, rows)


def _judged_rows(dataset: datasets.Dataset) -> list[_Row]:
    columns = ("question", "answer", "question_type", "short_answer", "label")
    return [
        _Row(
            question,
            answer,
            kind,
            short,
            CLASS_NAMES[label],
            kind == "object" or not kind and asks_for_object(question),
        )
        for question, answer, kind, short, label in zip(*(dataset[name] for name in columns), strict=True)
    ]


def _accuracies(rows: list[_Row], answers: list[str]) -> dict[str, float]:
    """Mean scores of `answers`, by metric name without suffix."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row, given in zip(rows, answers, strict=True):
        scores["token_f1"].append(token_f1(given, row.answer))
        if row.short_answer:
            scores["answer_accuracy"].append(row.judge(given))
            scores[f"accuracy/{row.question_type}"].append(row.judge(given))
        if row.asks_object:
            scores["class_accuracy"].append(row.judge_class(given))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _summarise(results: dict[str, float], rows: list[_Row]) -> dict[str, float]:
    """Keep the promised keys, and add counts, majority figures and gains."""
    kinds = sorted({row.question_type for row in rows if row.short_answer})
    kept = {name: value for name, value in results.items() if not (name.startswith("accuracy/") and "_image" in name)}
    for kind in kinds:
        kept[f"majority/{kind}"] = majority_share([row.short_answer for row in rows if row.question_type == kind])
    classes = [row.class_name for row in rows if row.asks_object]
    if kinds:
        kept["answer_count"] = sum(bool(row.short_answer) for row in rows)
    if classes:
        kept["class_count"] = len(classes)
        kept["majority/class"] = majority_share(classes)
    gains = {f"accuracy/{kind}": f"image_gain/{kind}" for kind in kinds}
    gains |= {"answer_accuracy": "image_gain", "class_accuracy": "class_image_gain"}
    for name, gain in gains.items():
        if f"{name}_shuffled_image" in results:
            kept[gain] = results[name] - results[f"{name}_shuffled_image"]
    return kept


# Folders and the command ------------------------------------------------------------------------------------------


def load_for_evaluation(name: str) -> tuple[PreTrainedModel, Any]:
    """
    A model of this package and its processor, on the accelerator where there is one, in evaluation mode.

    Raises:
        UserError: if `name` is no model of ours, or its processor does not fit it.
    """
    config = read_config(name, "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    processor = AutoProcessor.from_pretrained(name)
    if config.model_type == SigPhiConfig.model_type:
        check_token_counts(config, processor, name)
        model = AutoModelForImageTextToText.from_pretrained(name)
    else:
        model = AutoModel.from_pretrained(name)
        if not config.include_text_tower:
            model.load_text_tower()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval(), processor


def evaluate_folder(name: str, dataset: datasets.Dataset, **options: Any) -> dict[str, Any]:
    """
    Load a model as a stranger would, evaluate it, and record the results in its folder and card.

    Args:
        name (`str`): a folder (which gets `eval_results.json` and a new card) or a Hub id.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].
        options: of [`evaluate_encoder`] or [`evaluate_vlm`].
    """
    model, processor = load_for_evaluation(name)
    evaluate = evaluate_vlm if model.config.model_type == SigPhiConfig.model_type else evaluate_encoder
    results: dict[str, Any] = dict(evaluate(model, processor, dataset, **options))
    results["metadata"] = {
        "rows": len(dataset),
        "images": len(set(zip(dataset["split"], dataset["dataset_index"], strict=True))),
        "image_splits": sorted(set(dataset["split"])),
        **environment(),
    }
    if Path(name).is_dir():
        write_json(Path(name, EVAL_RESULTS), results)
        write_card(Path(name))
    return results


def only_unseen(dataset: datasets.Dataset, model: str) -> datasets.Dataset:
    """
    The rows whose images the model was not trained on, as its folder records.

    Raises:
        UserError: if no row is left.
    """
    record = Path(model, TRAINING_DATA)
    if not record.exists():
        logger.warning("%s does not record what it was trained on; scores may cover images that it has seen.", model)
        return dataset
    facts = json.loads(record.read_text(encoding="utf-8"))
    # A VLM has seen its own training images, and its image tower those of the encoder.
    sources = [facts, facts["encoder"]] if facts.get("encoder") else [facts]
    keys = zip(dataset["split"], dataset["dataset_index"], strict=True)
    keep = [row for row, (split, index) in enumerate(keys) if not any(_saw(one, split, index) for one in sources)]
    if not keep:
        raise UserError(
            f"{model} or its encoder was trained on all images of this CSV; evaluate it on a CSV of other images."
        )
    if len(keep) < len(dataset):
        logger.warning(
            "%d of %d rows are about images that %s was trained on: left out.",
            len(dataset) - len(keep),
            len(dataset),
            model,
        )
    return dataset.select(keep)


def _saw(facts: dict[str, Any], split: str, index: int) -> bool:
    """Whether a training that is recorded as `facts` had this image."""
    if split not in facts["images_per_split"]:
        return False
    return not held_out(index, split, facts["eval_fraction"], facts["split_seed"])


@dataclass
class EvaluateArguments:
    """How to evaluate."""

    _argument_group_name = "evaluation"

    batch_size: int = HfArg(help="Images or questions in a step.", default=128)
    max_new_tokens: int = HfArg(help="Longest answer in tokens (VLM).", default=80)
    max_images: int | None = HfArg(help="Evaluate on the first so many images of the CSV.", default=None)


def results_table(results: dict[str, Any]) -> str:
    """The figures as aligned lines, one a metric."""
    figures = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    width = max(map(len, figures))
    return "".join(f"{name:<{width}}  {value:.4f}\n" for name, value in figures.items())


def main(argv: list[str] | None = None) -> None:
    """`sigphi evaluate MODEL --input-csv FILE`: every metric, to `eval_results.json` and a table."""
    data, options, model = parse_arguments(
        [QaArguments, EvaluateArguments], argv, "sigphi evaluate", [("model", None, "a folder or Hub id")]
    )
    config = read_config(model, "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    dataset = load_cifar10_qa(data.input_csv, data.images, data.image_split, 1.0, 0, data.on_faulty_answers)["eval"]
    dataset = only_unseen(dataset, model)
    if options.max_images is not None:
        _, positions = distinct_images(dataset)
        dataset = dataset.select([row for row, position in enumerate(positions) if position < options.max_images])
    kwargs = {"batch_size": options.batch_size}
    if config.model_type == SigPhiConfig.model_type:
        kwargs["max_new_tokens"] = options.max_new_tokens
    sys.stdout.write(results_table(evaluate_folder(model, dataset, **kwargs)))


__all__ = ["evaluate_encoder", "evaluate_folder", "evaluate_vlm", "generate_answers", "main", "results_table"]

if __name__ == "__main__":
    run_command(main, "sigphi evaluate")
