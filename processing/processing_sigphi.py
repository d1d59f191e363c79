"""Processor of the vision-language model."""

from typing import Any, ClassVar

from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

from sigphi.configuration.hub_code import HubCodeMixin
from sigphi.processing.processing_siglip_resnet import all_to_rgb

# One question and one answer a turn; the form that Phi-2's authors suggest for questions is close to it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- if message['content'] is string -%}{{ ' ' + message['content'] + eos_token }}
{%- else -%}{%- for part in message['content'] -%}{{ ' ' + part['text'] }}{%- endfor -%}{{ eos_token }}{%- endif -%}
{%- else -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- if message['content'] is string -%}
{{ ('' if message['role'] == 'system' else 'Question: ') + message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}{%- endfor -%}
{{ '' if message['role'] == 'system' else 'Question: ' }}
{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}{{ '\\nAnswer:' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""


class SigPhiProcessor(HubCodeMixin, ProcessorMixin):
    r"""
    An image processor, a tokenizer and a chat template, for one image a text.

    Args:
        image_processor (`SiglipImageProcessor`): resizes and normalises images.
        tokenizer (`PreTrainedTokenizerFast`): the language model's, with `image_token` and a padding token; it is
            made to pad on the left.
        chat_template (`str`, *optional*): a Jinja template; by default `Question: ...\nAnswer: ...` turns.
        image_token (`str`, *optional*, defaults to `"<image>"`): the placeholder in texts.
        num_image_tokens (`int`, *optional*, defaults to `1`): how many placeholders one image becomes.
    """

    hub_auto_map: ClassVar[dict[str, str]] = {"AutoProcessor": "sigphi.processing.processing_sigphi.SigPhiProcessor"}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_image_tokens: int = 1,
        **kwargs: Any,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.num_image_tokens = num_image_tokens
        # Answers continue the text at its right end. Tokenizers save no padding side, so each processor sets it anew.
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """
        Prepare texts with an image each.

        Args:
            images: one image or a list, one for each text; pictures of any mode and EXIF orientation are brought to
                RGB.
            text (`str` or `list[str]`): texts that hold `image_token` once.

        Returns:
            `BatchFeature`: `pixel_values` of shape `(images, 3, height, width)`, float32; `input_ids` and
            `attention_mask` of shape `(texts, length)`.

        Raises:
            ValueError: if a text does not hold the placeholder exactly once, or the number of images is another.
        """
        if text is not None:
            self._check_one_image_each(images, [text] if isinstance(text, str) else list(text))
        return super().__call__(images=all_to_rgb(images), text=text, **kwargs)

    def _check_one_image_each(self, images: Any, texts: list[str]) -> None:
        for row, text in enumerate(texts):
            if text.count(self.image_token) != 1:
                raise ValueError(
                    f"Text {row} holds {text.count(self.image_token)} images (`{self.image_token}`), but this model "
                    f"answers about exactly one image a text: give each message one image."
                )
        flat = _flat(images)
        if len(flat) != len(texts):
            raise ValueError(f"Got {len(flat)} images for {len(texts)} texts; give each text one image.")

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """What one placeholder becomes: as many placeholders as the image has soft tokens."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        images = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * images, num_image_patches=[1] * images)


def _flat(images: Any) -> list[Any]:
    """The images of nested lists in order; an array or tensor of four dimensions is a batch."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _flat(part)]
    if not isinstance(images, str) and len(getattr(images, "shape", ())) == 4:
        return list(images)
    return [images]


__all__ = ["CHAT_TEMPLATE", "SigPhiProcessor"]
