"""Putting the VLM together for training: quantised base, LoRA layers, what is trained and what is frozen."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetVisionModel
from sigphi.modeling.modeling_sigphi import SigPhiForConditionalGeneration, base_quantization, keep_4bit_weights
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.checkpoints import check_whole, loading
from sigphi.train.errors import UserError
from sigphi.train.records import durable_name

logger = logging.getLogger(__name__)


def load_language_model(
    arguments: VlmModelArguments,
    dtype: torch.dtype,
    attn_implementation: str,
    device: torch.device,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """
    The causal language model in the precision that is asked for, on the device of this process.

    Args:
        arguments (`VlmModelArguments`): names the model, its revision and `bits`.
        dtype (`torch.dtype`): of the weights that are not quantised, and of the arithmetic.
        attn_implementation (`str`): `"eager"`, `"sdpa"` or `"flash_attention_2"`.
        device (`torch.device`): where to put it. One model lies whole on one device, since the Trainer runs one
            process a device; `device_map="auto"` would spread it.
        storage (`torch.dtype`, *optional*, defaults to `torch.uint8`): what 4-bit weights are packed into, see
            [`base_quantization`].
    """
    with loading(f"--language-model {arguments.language_model}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            arguments.language_model,
            revision=arguments.language_model_revision or "main",
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=base_quantization(arguments.bits, dtype, storage),
            device_map={"": device},
            output_loading_info=True,
            trust_remote_code=False,
        )
    check_whole(f"--language-model {arguments.language_model}", info["missing_keys"])
    keep_4bit_weights(model)
    return model


def linear_names(language_model: nn.Module) -> list[str]:
    """
    The last names of all linear layers of a language model, sorted: for Phi dense, fc1, fc2 and q, k, v_proj.

    They are found by their kind: `nn.Linear`, those of bitsandbytes in its place, and the `Conv1D` of GPT-2. Experts
    that are one tensor for all are no layers, and routers of a class of their own none of these.

    Args:
        language_model (`nn.Module`): without its head.
    """
    return sorted({name.rpartition(".")[2] for name, module in language_model.named_modules() if _is_linear(module)})


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def build_vlm(
    vision_tower: SiglipResNetVisionModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: VlmModelArguments,
    image_token: str = "<image>",
) -> SigPhiForConditionalGeneration:
    """
    Image tower (frozen), new projector (trained), language model (LoRA, or trained in full), as one model.

    Args:
        vision_tower (`SiglipResNetVisionModel`): the trained encoder's.
        language_model (`PreTrainedModel`): from [`load_language_model`].
        tokenizer (`PreTrainedTokenizerBase`): with `image_token` and a padding token.
        arguments (`VlmModelArguments`): the tuning, the LoRA numbers and what the saved config has to name.
        image_token (`str`, *optional*, defaults to `"<image>"`): the placeholder.

    Raises:
        UserError: if the language model is no sum of its parts, see [`check_parts`].
    """
    text_config = language_model.config.get_text_config().to_dict()
    text_config.pop("quantization_config", None)  # recorded as `base_bits`; the parts outside the base have none
    config = SigPhiConfig(
        vision_config=vision_tower.config,
        text_config=text_config,
        num_image_tokens=arguments.num_image_tokens,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        pad_token_id=tokenizer.pad_token_id,
        lm_head_bias=language_model.get_output_embeddings().bias is not None,
        tie_word_embeddings=bool(text_config.get("tie_word_embeddings", False)),
        # Cohere multiplies, IBM Granite divides.
        logit_scale=(text_config.get("logit_scale") or 1.0) / (text_config.get("logits_scaling") or 1.0),
        logit_softcapping=text_config.get("final_logit_softcapping"),
    )
    model = SigPhiForConditionalGeneration.from_parts(config, vision_tower, language_model)
    check_parts(model, language_model, arguments.language_model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    train_language_model(model, arguments)
    return model


def train_language_model(model: SigPhiForConditionalGeneration, arguments: VlmModelArguments) -> None:
    """Make a composed model ready for training, by new LoRA layers or in full, see [`only_trains`]."""
    if arguments.tuning == "lora":
        _add_lora(model, arguments)
    only_trains(model, arguments.tuning)


def only_trains(model: SigPhiForConditionalGeneration, tuning: str) -> None:
    """
    Freeze all but the projector and the LoRA weights (`"lora"`), or the image tower alone (`"full"`); what is trained
    is brought to float32.
    """
    for name, parameter in model.named_parameters():
        is_trained = "lora_" in name if tuning == "lora" else not name.startswith("model.vision_tower.")
        parameter.requires_grad_(is_trained or name.startswith("model.multi_modal_projector."))
    # float32 master weights of what is trained: an update of 1e-4 is below bfloat16's resolution. PEFT gives LoRA the
    # precision of a base that is not quantised.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


@torch.no_grad()
def check_parts(model: SigPhiForConditionalGeneration, language_model: PreTrainedModel, name: str) -> None:
    """
    Check, on a few tokens, that embedding, layers and head make the same logits in the VLM as in the language model.

    Some language models do more than that: they scale their logits, or look at the token ids in every layer. A model
    without weights, on the meta device, is not checked.

    Args:
        model (`SigPhiForConditionalGeneration`): without LoRA.
        language_model (`PreTrainedModel`): whose parts it has.
        name (`str`): the language model's, for the message.

    Raises:
        UserError: if they differ.
    """
    embedding: Any = model.get_input_embeddings().weight  # (vocab_size, hidden_size)
    if embedding.is_meta:
        return
    special = (model.config.image_token_id, model.config.pad_token_id)
    tokens = [token for token in range(min(32, len(embedding))) if token not in special]
    input_ids = torch.tensor([tokens], device=embedding.device)
    expected = language_model(input_ids=input_ids).logits.float()
    found = model(input_ids=input_ids).logits.float()
    if not (found - expected).norm() <= 0.01 * expected.norm():
        raise UserError(
            f"--language-model {name}: a model of the kind {language_model.config.model_type!r} does more than its "
            f"embedding, layers and head, which are what a VLM is made of. Choose one of another kind."
        )


def _add_lora(model: SigPhiForConditionalGeneration, arguments: VlmModelArguments) -> None:
    model.config.base_language_model = durable_name(arguments.language_model)
    model.config.base_language_model_revision = arguments.language_model_revision
    model.config.base_bits = arguments.bits
    targets = linear_names(model.model.language_model)
    model.add_lora(
        {
            "r": arguments.lora_r,
            "lora_alpha": arguments.lora_alpha,
            "lora_dropout": arguments.lora_dropout,
            "use_rslora": arguments.use_rslora,
            "use_dora": arguments.use_dora,
            # The weights of GPT-2's layers lie the other way round.
            "fan_in_fan_out": any(type(module) is Conv1D for module in model.model.language_model.modules()),
            "target_modules": targets,
        }
    )
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and p.requires_grad)
    kind = "DoRA" if arguments.use_dora else "LoRA"
    logger.info("%s r=%d on %s: %d parameters", kind, arguments.lora_r, targets, trained)


__all__ = [
    "build_vlm",
    "check_parts",
    "linear_names",
    "load_language_model",
    "only_trains",
    "train_language_model",
]
