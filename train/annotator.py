"""A vision-language model of any family that transformers knows, as one that answers questions about pictures."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import sigphi.modeling  # noqa: F401  registers our model with the Auto classes
import sigphi.processing  # noqa: F401  and its processor
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.train.checkpoints import hub_commit, read_config
from sigphi.train.errors import UserError
from sigphi.train.fingerprints import folder_digest
from sigphi.train.qa_csv import IMAGE_PLACEHOLDER

_AUTO_CLASS = "AutoModelForImageTextToText"
# What decides the answers of a model folder; cards and results may change beside it.
_MODEL_FILES = ("**/*.safetensors", "*.bin", "*config.json", "*token*.json", "*.jinja", "*.model", "*.py")


class Answer(NamedTuple):
    """What a model answered.

    Args:
        text (`str`): without white space around it.
        fault (`str`): why it is no answer, empty for a sound one.
    """

    text: str
    fault: str


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Args:
        name (`str`): a folder or Hub id.
        revision (`str`, *optional*, defaults to `"main"`): of a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with the model may run.
    """

    name: str
    revision: str = "main"
    trust_remote_code: bool = False

    @property
    def kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` is told beside the name."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class Annotator:
    """A model with its processor, that answers greedily.

    Args:
        model (`PreTrainedModel`): in evaluation mode, with `generate`.
        processor (`ProcessorMixin`): with a chat template; pads on the left.
        max_new_tokens (`int`): longest answer in tokens.
    """

    model: Any
    processor: Any
    max_new_tokens: int

    @torch.inference_mode()
    def answer(self, pictures: list[Image.Image], questions: list[str]) -> list[Answer]:
        """Answer one question about each picture, all in one batch.

        The same batch gives the same answers; in another one an answer may differ, because padding changes the
        last bits of sums.

        Args:
            pictures (`list[PIL.Image.Image]`): RGB, at least one.
            questions (`list[str]`): as many.
        """
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
            for picture, question in zip(pictures, questions, strict=True)
        ]
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, dtype=self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        new = tokens[:, inputs["input_ids"].shape[1] :]  # (questions, new tokens)
        ends = torch.tensor(self.model.generation_config.eos_token_id, device=new.device)
        is_whole = torch.isin(new, ends).any(dim=1).tolist()  # (questions,)
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [judged_answer(text, whole, self.max_new_tokens) for text, whole in zip(texts, is_whole, strict=True)]


def judged_answer(text: str, is_whole: bool, max_new_tokens: int) -> Answer:
    """Tell an answer from what would be a fault in a CSV of answers. A refusal to answer is an answer.

    Args:
        text (`str`): as it was generated.
        is_whole (`bool`): whether the model ended it.
        max_new_tokens (`int`): where it was cut otherwise.
    """
    # Some versions of `csv` leave a lone carriage return without quotes, which then ends the row.
    text = re.sub(r"\r\n?", "\n", text).strip()
    faults = {
        f"cut at {max_new_tokens} tokens, before its end": not is_whole,
        "empty": not text,
        "begins with ERROR": text.startswith("ERROR"),
        f"holds {IMAGE_PLACEHOLDER}": IMAGE_PLACEHOLDER in text,
    }
    return Answer(text, next((fault for fault, applies in faults.items() if applies), ""))


def read_annotator_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of a model that answers questions about images, before any weights load.

    Raises:
        UserError: if there is no such model, or it is of another kind.
    """
    try:
        config = read_config(source.name, "--model", **source.kwargs)
    except UserError as error:
        if "trust_remote_code" in str(error.__cause__):
            raise UserError(
                f"--model {source.name} comes with code of its own: read it, and let it run by --trust-remote-code."
            ) from error
        raise
    is_known = config.model_type in (*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, SigPhiConfig.model_type)
    brings_code = source.trust_remote_code and _AUTO_CLASS in config.to_dict().get("auto_map", {})
    if not is_known and not brings_code:
        raise UserError(
            f"--model {source.name} is a {config.model_type!r} model; give one that answers questions about images "
            "(image-text-to-text)."
        )
    return config


def model_fingerprint(source: ModelSource) -> str:
    """What tells a model from another of the same name: the commit of a Hub id, the hash of a folder's files."""
    folder = Path(source.name)
    if not folder.is_dir():
        return hub_commit(source.name, source.revision)
    return folder_digest(folder, _MODEL_FILES)


def load_processor(source: ModelSource, image_options: dict[str, Any]) -> Any:
    """The processor of a model, with a chat template, padding on the left.

    Args:
        source (`ModelSource`): of the model.
        image_options (`dict`): settings of the image processor to change.

    Raises:
        UserError: if it cannot be loaded, has no chat template, or does not know a setting.
    """
    try:
        processor = AutoProcessor.from_pretrained(source.name, **source.kwargs, **image_options)
    except (OSError, ValueError, ImportError) as error:
        remedy = " `pip install 'sigphi[annotate]'` brings what the default model needs."
        raise UserError(
            f"--model {source.name}: its processor cannot be loaded ({' '.join(str(error).split())[:300]})."
            f"{remedy if isinstance(error, ImportError) else ''}"
        ) from error
    if processor.chat_template is None:
        raise UserError(
            f"--model {source.name}: its processor has no chat template; give a model that is made for chats."
        )
    known = processor.image_processor.to_dict()
    unknown = [option for option in image_options if option not in known]
    if unknown:
        raise UserError(
            f"--image-options: the image processor of {source.name} has no {', '.join(unknown)}, only "
            f"{', '.join(known)}."
        )
    processor.tokenizer.padding_side = "left"
    return processor


def load_annotator(
    source: ModelSource, processor: Any, dtype: str, device: torch.device, max_new_tokens: int
) -> Annotator:
    """Load the weights of a model onto one device.

    Args:
        source (`ModelSource`): of the model.
        processor: of [`load_processor`].
        dtype (`str`): `"auto"` for that of the file, or the name of a torch dtype.
        device (`torch.device`): where to.
        max_new_tokens (`int`): longest answer in tokens.

    Raises:
        UserError: if weights are missing, which transformers would draw at random.
    """
    kwargs = {**source.kwargs, "dtype": dtype, "device_map": {"": device}}
    model, info = AutoModelForImageTextToText.from_pretrained(source.name, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"--model {source.name}: its files lack weights of the model, such as {names}.")
    generation = model.generation_config
    if generation.eos_token_id is None:
        # Where a model's own file is silent, what it was trained to end with stands in its text configuration.
        generation.eos_token_id = model.config.get_text_config().eos_token_id or processor.tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = processor.tokenizer.pad_token_id
    # Greedy decoding has no use for these, and would warn of them.
    generation.temperature = generation.top_p = generation.top_k = None
    return Annotator(model.eval(), processor, max_new_tokens)


__all__ = [
    "Annotator",
    "Answer",
    "ModelSource",
    "judged_answer",
    "load_annotator",
    "load_processor",
    "model_fingerprint",
    "read_annotator_config",
]
