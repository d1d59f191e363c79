"""
A page that asks a vision-language model about pictures: what `sigphi demo` shows, and the app of a Space on the Hub.

A Space gets this file as it is, so it needs torch, transformers, gradio and Pillow, and nothing of sigphi. There lie
beside it `demo.json` (`model`, `revision`, `questions`), `examples/*.png`, and, where the model's encoder was at hand,
`classes.safetensors`.
"""

import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

SETTINGS, CLASSES, EXAMPLES = "demo.json", "classes.safetensors", "examples"
# Pillow reads many more, some of them by starting other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000
MAX_QUESTION = 500
# Pictures of 32 pixels are shown as large as there is room, and each pixel of theirs can be seen.
CSS = "#picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }"
CHANGES = "**The answer changes without the picture**"
STAYS = "**The same answer without the picture**: nothing here shows that the model looked"


@dataclass
class Classes:
    """
    What an image embedding is compared with to tell what a picture shows.

    Args:
        names (`list[str]`): of the classes.
        embeds (`torch.FloatTensor` of shape `(classes, dim)`): L2-normalised embeddings of texts about each class, by
            the encoder whose image tower the model has.
        logit_scale, logit_bias (`float`): that encoder's: the logarithm of the temperature, and the bias.
    """

    names: list[str]
    embeds: torch.Tensor
    logit_scale: float
    logit_bias: float

    def write(self, path: Path) -> None:
        """Write a file of safetensors."""
        numbers = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        tensors = {"embeds": self.embeds} | {name: torch.tensor(number) for name, number in numbers.items()}
        save_file(tensors, path, {"names": json.dumps(self.names)})

    @classmethod
    def read(cls, path: Path) -> "Classes":
        """Read what [`~Classes.write`] has written."""
        with safe_open(path, "pt") as file:
            scale, bias = (file.get_tensor(name).item() for name in ("logit_scale", "logit_bias"))
            return cls(json.loads(file.metadata()["names"]), file.get_tensor("embeds"), scale, bias)

    def scores(self, embeds: torch.Tensor) -> dict[str, float]:
        """
        How well each class suits a picture, 0 to 1: the sigmoid that the encoder was trained by. They do not add up to
        1, and where no class suits all are small.

        Args:
            embeds (`torch.FloatTensor` of shape `(1, dim)`): the picture's, not normalised.
        """
        similarity = F.normalize(embeds.float().cpu(), dim=-1) @ self.embeds.t()  # (1, classes)
        logits = similarity * torch.tensor(self.logit_scale).exp() + self.logit_bias
        return dict(zip(self.names, logits.sigmoid()[0].tolist(), strict=True))


@dataclass
class Demo:
    """
    A model that answers the page's questions, greedily, as `sigphi ask` does.

    Args:
        model, processor: of a VLM, in evaluation mode.
        classes (`Classes`, *optional*): the page shows the classes that suit a picture only where these are given.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
    """

    model: Any
    processor: Any
    classes: Classes | None = None
    max_new_tokens: int = 80

    def ask(self, picture: dict[str, Any] | None, question: str | None) -> tuple[str, float, dict[str, float] | None]:
        """
        The answer, its confidence and the scores of the classes.

        Args:
            picture (`dict`, *optional*): an uploaded file as gradio tells of it; its place is under `path`.
            question (`str`, *optional*): about it.

        Raises:
            gradio.Error: with what the page tells the user, if there is no picture or question, or one that cannot be
                read.
        """
        inputs = self._inputs(open_picture(picture), check_question(question, self.processor.image_token))
        answer, confidence = self._generate(inputs)
        if self.classes is None:
            return answer, confidence, None
        with torch.no_grad():
            tower = self.model.model.vision_tower(inputs["pixel_values"])
        return answer, confidence, self.classes.scores(tower.pooler_output)

    def ask_without_picture(self, question: str, answer: str) -> tuple[str, float, str]:
        """
        The answer about a gray picture (the blank one of `sigphi evaluate`), its confidence, and whether it is another
        one than `answer`.
        """
        gray = Image.new("RGB", (32, 32), (128, 128, 128))
        blank, confidence = self._generate(self._inputs(gray, check_question(question, self.processor.image_token)))
        return blank, confidence, STAYS if blank == answer else CHANGES

    def _inputs(self, picture: Image.Image, question: str) -> Any:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        # BLOOM's positions, and Mamba's, have no end.
        context = getattr(self.model.config.text_config, "max_position_embeddings", math.inf)
        longest = context - self.max_new_tokens
        if length > longest:
            raise sorry(f"The question has {length} tokens, and the model reads {longest}. Shorten it.")
        return inputs.to(self.model.device)

    def _generate(self, inputs: Any) -> tuple[str, float]:
        """The answer, and the geometric mean of the probabilities of its tokens."""
        with torch.no_grad():
            given = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
        new = given.sequences[0, inputs["input_ids"].shape[1] :]  # (new tokens,)
        logs = torch.cat(given.scores[: len(new)]).float().log_softmax(-1).amax(-1)  # (new tokens,)
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip(), logs.mean().exp().item()


def sorry(message: str) -> gr.Error:
    """What the page shows when it cannot answer; the log gets no traceback, since nothing is wrong with the app."""
    return gr.Error(html.escape(message), title="No answer", print_exception=False)


def open_picture(file: dict[str, Any] | None) -> Image.Image:
    """
    An uploaded picture as its file has it; the model's processor makes it upright and RGB.

    Args:
        file (`dict`, *optional*): as gradio tells of it; its place is under `path`.

    Raises:
        gradio.Error: if there is none, it is no picture, or it has more than `MAX_PIXELS` pixels.
    """
    if file is None or file["path"] is None:
        raise sorry("There is no picture yet: upload one, or choose one of the examples.")
    try:
        with Image.open(file["path"], formats=FORMATS) as picture:
            if picture.width * picture.height <= MAX_PIXELS:
                picture.load()
                return picture
    except Image.DecompressionBombError:
        pass  # it has even more
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise sorry("This file is no picture that can be read. Upload a whole PNG, JPEG, WebP, BMP or GIF.") from error
    raise sorry(f"The picture has more than {MAX_PIXELS // 1_000_000} million pixels. Make it smaller first.")


def check_question(question: str | None, image_token: str) -> str:
    """The question without white space around it; a `gradio.Error` if there is none, or it holds `image_token`."""
    question = (question or "").strip()
    if not question:
        raise sorry("There is no question yet: write one, or choose one of the examples.")
    if image_token in question:
        raise sorry(f"The question holds {image_token}, which stands for the picture. Leave it out.")
    if len(question) > MAX_QUESTION:
        raise sorry(f"The question has {len(question)} characters, and {MAX_QUESTION} are read. Shorten it.")
    return question


def make_page(demo: Demo, name: str, examples: Sequence[str], questions: Sequence[str]) -> gr.Blocks:
    """
    The page, to be launched.

    Args:
        demo (`Demo`): answers.
        name (`str`): of the model.
        examples (`Sequence[str]`): files of pictures to choose from.
        questions (`Sequence[str]`): to choose from.
    """
    # What is uploaded is deleted within two hours, and all of it when the server ends.
    with gr.Blocks(title="Ask about a picture", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# Ask about a picture")
        gr.Textbox(name, label="Model", interactive=False)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=320, elem_id="picture")
                question = gr.Textbox(label="Question", max_length=MAX_QUESTION, elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                for values, place, label in ((examples, picture, "Pictures"), (questions, question, "Questions")):
                    if values:
                        name_of_place = f"example-{label.lower()}"
                        gr.Examples([[value] for value in values], place, label=label, elem_id=name_of_place)
            with gr.Column():
                answers = _show_answers(demo.classes is not None)
        _connect(demo, picture, question, button, *answers)
    return page


def _show_answers(has_classes: bool) -> tuple[list[Any], list[Any]]:
    """The places for the answer (its text, confidence, classes), and for the one without a picture."""
    answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
    confidence = gr.Number(
        label="Confidence",
        info="Geometric mean of the probabilities of the answer's tokens, 0 to 1. A wrong answer can have a high one.",
        precision=2,
        interactive=False,
        elem_id="confidence",
    )
    blank = gr.Textbox(label="Answer about a blank picture", interactive=False, elem_id="blank")
    blank_confidence = gr.Number(
        label="Confidence about a blank picture", precision=2, interactive=False, elem_id="blank-confidence"
    )
    verdict = gr.Markdown(elem_id="verdict")
    classes = gr.Label(
        label="What the image encoder sees: how well a text about each class suits the picture",
        num_top_classes=3,
        visible=has_classes,
        elem_id="classes",
    )
    if not has_classes:
        gr.Markdown(
            "Which classes the image encoder sees is not shown: that takes the texts of the encoder that this model "
            "was made from, and it was not at hand.",
            elem_id="no-classes",
        )
    return [answer, confidence, classes], [blank, blank_confidence, verdict]


def _connect(demo: Demo, picture: Any, question: Any, button: Any, first: list[Any], second: list[Any]) -> None:
    # Gradio's own reading of a picture would end in a traceback where it is none. That a file was uploaded to this
    # page is checked all the same. And one question is answered at a time: there is one model.
    options: dict[str, Any] = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": 1}
    asked = gr.on([button.click, question.submit], demo.ask, [picture, question], first, api_name="ask", **options)
    asked.success(demo.ask_without_picture, [question, first[0]], second, api_name="ask_without_picture", **options)
    # A new picture or question takes away what was answered about the old one; the browser does that by itself.
    outputs = first + second
    nothing = json.dumps([place.postprocess(None) for place in outputs])
    gr.on([picture.change, question.change], None, None, outputs, js=f"() => {nothing}", queue=False)


def serve(page: gr.Blocks, **options: Any) -> str:
    """
    Serve a page, and tell nobody of it: neither who uses it nor what is asked there is anybody else's business.

    Args:
        page (`gradio.Blocks`): of [`make_page`].
        options: further ones of its `launch`, such as `server_port`.

    Returns:
        `str`: the address on this machine.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    _, address, _ = page.launch(
        share=False,
        max_file_size="20mb",
        footer_links=["api"],
        enable_monitoring=False,
        ssr_mode=False,
        css=CSS,
        **options,
    )
    return address


def load_model(name: str, revision: str) -> tuple[Any, Any]:
    """
    A VLM of the Hub and its processor, on the accelerator where there is one, in evaluation mode.

    Args:
        name (`str`): Hub id.
        revision (`str`): a commit, whose Python files run here.
    """
    where = {"revision": revision, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(name, **where)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=inference_dtype(), **where)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval(), processor


def inference_dtype() -> torch.dtype | str:
    """The precision that a model was saved in, but float32 on a CPU that has no bfloat16 and would take ages."""
    has_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "auto" if torch.accelerator.is_available() or has_bfloat16 else torch.float32


def main() -> None:
    """Serve the Space that lies in this file's folder."""
    folder = Path(__file__).parent
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    classes = Classes.read(folder / CLASSES) if (folder / CLASSES).exists() else None
    demo = Demo(*load_model(settings["model"], settings["revision"]), classes)
    examples = [str(path) for path in sorted((folder / EXAMPLES).glob("*.png"))]
    name = f"{settings['model']}, commit {settings['revision']}"
    serve(make_page(demo, name, examples, settings["questions"]))


__all__ = [
    "CHANGES",
    "CLASSES",
    "EXAMPLES",
    "SETTINGS",
    "STAYS",
    "Classes",
    "Demo",
    "inference_dtype",
    "load_model",
    "make_page",
    "serve",
]

if __name__ == "__main__":
    main()
