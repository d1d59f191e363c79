"""A request for a chat completion as OpenAI's clients write it: what is read of it, and what is refused."""

import base64
import binascii
import re
import reprlib
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sigphi.train.pictures import LargePictureError, PictureError, decode_picture

# A picture is made small for the model anyway; in memory one of this size takes a few hundred MB.
MAX_IMAGE_PIXELS = 2**26
# At most so many answers to a request, which are made together.
MAX_CHOICES = 16
# Below, dividing by it leaves the numbers that are computed with.
LEAST_TEMPERATURE = 0.01

# What clients send along for options that they do not use: the server does just this, and nothing else.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_cache_key": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "user": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}

_DATA_URL = re.compile(r"data:image/(?:png|jpe?g);base64,", re.IGNORECASE)


class ApiError(Exception):
    """
    What a client is told instead of an answer, in the shape of OpenAI's errors.

    Args:
        message (`str`): what is wrong, and the remedy.
        param (`str`, *optional*): the part of the request, such as `"messages[0].content[1].image_url.url"`.
        code (`str`, *optional*): a short name of the fault.
        status (`int`, *optional*, defaults to 400): of HTTP.
        kind (`str`, *optional*, defaults to `"invalid_request_error"`): OpenAI's kind of error.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Part(BaseModel):
    """A part of a request: what it does not name is refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(_Part):
    """Where an image is: always a data URL. All images are seen at the one size of the model."""

    url: str
    detail: Literal["auto"] | None = None


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


def _in_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _in_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[list[TextPart], BeforeValidator(_in_parts), Field(min_length=1)]
Parts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
    BeforeValidator(_in_parts),
    Field(min_length=1),
]


class SystemMessage(_Part):
    role: Literal["system", "developer"]
    content: Texts


class UserMessage(_Part):
    role: Literal["user"]
    content: Parts


class AssistantMessage(_Part):
    """An earlier answer, also as the client's object of it, which names what this server never gives."""

    role: Literal["assistant"]
    content: Texts
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Part):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class CompletionRequest(_Part):
    """The body of `POST /v1/chat/completions`. `null` is the default of each option, see docs/serve.md."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            BeforeValidator(_in_list),
            Field(max_length=4),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_options(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name not in _NEUTRAL or not _is_one_of(value, _NEUTRAL[name])
        }

    def chat(self) -> list[dict[str, Any]]:
        """The messages as a processor's chat template takes them, with their images read."""
        return [_in_template_form(message, f"messages[{place}]") for place, message in enumerate(self.messages)]


def _is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    # False equals 0, and is no number here.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)


def read_request(body: bytes, image_token: str) -> CompletionRequest:
    """
    Read and check a request, but for its images.

    Args:
        body (`bytes`): JSON.
        image_token (`str`): the placeholder that stands for an image in the model's texts.

    Raises:
        ApiError: for anything that is not understood or not supported.
    """
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _api_error(error) from error
    _check_together(request)
    _check_messages(request.messages, image_token)
    return request


def _api_error(error: ValidationError) -> ApiError:
    """The first fault that was found."""
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "json_invalid":
        return ApiError(f"The body is not JSON ({fault['msg']}).")
    param = _param(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return ApiError(
            f"`{param}`, or this value of it, is not supported by this server; leave it out.",
            param,
            "unsupported_parameter",
        )
    if fault["type"] == "missing":
        return ApiError(f"`{param}` is missing.", param, "missing_required_parameter")
    given = "" if isinstance(fault["input"], (dict, list)) else f", got {reprlib.repr(fault['input'])}"
    return ApiError(f"`{param or 'the body'}`: {fault['msg']}{given}.", param or None, "invalid_value")


def _param(location: tuple[int | str, ...]) -> str:
    """A place such as `messages[0].content`. Behind the number of a message or part pydantic may write its kind."""
    name = ""
    for place, step in enumerate(location):
        is_kind = place > 0 and isinstance(location[place - 1], int) and place + 1 < len(location)
        if isinstance(step, int):
            name += f"[{step}]"
        elif not is_kind:
            name += f".{step}"
    return name.removeprefix(".")


def _check_together(request: CompletionRequest) -> None:
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            "`max_tokens` and `max_completion_tokens` differ; give one of them.", "max_tokens", "invalid_value"
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError("`stream_options` needs `stream: true`.", "stream_options", "invalid_value")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("`top_logprobs` needs `logprobs: true`.", "top_logprobs", "invalid_value")
    if request.temperature is not None and 0 < request.temperature < LEAST_TEMPERATURE:
        raise ApiError(
            f"`temperature`: {request.temperature} is too low; give 0 for the likeliest answer, or at least "
            f"{LEAST_TEMPERATURE}.",
            "temperature",
            "invalid_value",
        )


def _check_messages(messages: list[Any], image_token: str) -> None:
    if messages[-1].role != "user":
        raise ApiError(
            f"The last message has to be the user's, got the role {messages[-1].role!r}.", "messages", "invalid_value"
        )
    images = 0
    for place, message in enumerate(messages):
        for number, part in enumerate(message.content):
            images += part.type == "image_url"
            if part.type == "text" and image_token in part.text:
                raise ApiError(
                    f"A text holds {image_token!r}, which stands for the image; leave it out.",
                    f"messages[{place}].content[{number}].text",
                    "invalid_value",
                )
    if images != 1:
        raise ApiError(
            f"The conversation has {images} images, and this model answers about exactly one: send one `image_url` in "
            "one user message, also with later turns.",
            "messages",
            "invalid_value",
        )


def _in_template_form(message: Any, place: str) -> dict[str, Any]:
    if message.role != "user":
        role = "system" if message.role == "developer" else message.role
        return {"role": role, "content": [{"type": "text", "text": "".join(part.text for part in message.content)}]}
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(message.content):
        if part.type == "text":
            parts.append({"type": "text", "text": part.text})
        else:
            image = read_data_url(part.image_url.url, f"{place}.content[{number}].image_url.url")
            parts.append({"type": "image", "image": image})
    return {"role": "user", "content": parts}


def read_data_url(url: str, param: str) -> Image.Image:
    """
    The image in a data URL.

    Args:
        url (`str`): `data:image/png;base64,...`, or the same with `jpeg`.
        param (`str`): where it stands in the request, for messages.

    Returns:
        `PIL.Image.Image`: RGB, upright.

    Raises:
        ApiError: for every other URL, for what is no base64, no PNG or JPEG, cut off, or of more than
            `MAX_IMAGE_PIXELS`.
    """
    start = _DATA_URL.match(url)
    if start is None:
        kind = url.split(":", 1)[0].lower() if ":" in url[:16] else ""
        shown = "an address, which this server does not fetch" if kind in ("http", "https") else "not such a data URL"
        raise ApiError(
            f"The image is {shown}: send it as data:image/png;base64,... or data:image/jpeg;base64,...",
            param,
            "invalid_image_url",
        )
    try:
        # Line breaks are what the command `base64` writes.
        data = base64.b64decode("".join(url[start.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"The image is not base64 ({error}).", param, "invalid_base64") from error
    return read_image(data, param)


def read_image(data: bytes, param: str) -> Image.Image:
    """
    As [`read_data_url`], of a file's bytes. The pixels of a picture that is too large are not made.
    """
    try:
        return decode_picture(data, ("PNG", "JPEG"), MAX_IMAGE_PIXELS)
    except LargePictureError as error:
        pixels = "too many pixels" if error.__cause__ else error  # PIL's own limit, or the one above
        raise ApiError(f"The image has {pixels}: make it smaller.", param, "image_too_large") from error
    except PictureError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise ApiError("The image is neither PNG nor JPEG.", param, "invalid_image") from error
        raise ApiError(f"The image is cut off or damaged ({str(error)[:100]}).", param, "invalid_image") from error


__all__ = [
    "LEAST_TEMPERATURE",
    "MAX_CHOICES",
    "MAX_IMAGE_PIXELS",
    "ApiError",
    "CompletionRequest",
    "read_data_url",
    "read_image",
    "read_request",
]
