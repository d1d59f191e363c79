"""Requests in OpenAI's form: what is read, and what is refused with which error."""

import base64
import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sigphi.processing.processing_siglip_resnet import to_rgb
from sigphi.train.completion_request import ApiError, read_data_url, read_image, read_request

PIXEL = "data:image/png;base64,aGVsbG8="


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_part(url: str = PIXEL, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [user(text("What?"), image_part())], **fields}).encode()


def refused(data: bytes) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        read_request(data, "<image>")
    assert caught.value.status == 400
    error = caught.value.body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    return error


def test_a_request_is_read():
    messages = [
        {"role": "developer", "content": "Be short."},
        user(image_part(detail="auto"), text("What is it?"), text(" And why?")),
        {"role": "assistant", "content": "A cat.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Which color?"},
    ]
    request = read_request(body(messages=messages, stop="a", temperature=1, seed=-3, n=2, stream=False), "<image>")
    assert [message.role for message in request.messages] == ["developer", "user", "assistant", "user"]
    assert request.messages[3].content[0].text == "Which color?"
    assert (request.stop, request.temperature, request.seed, request.n) == (["a"], 1.0, -3, 2)
    assert (request.max_tokens, request.top_p, request.logprobs) == (None, None, None)


def test_options_that_ask_for_nothing_are_no_fault():
    neutral = {"tools": [], "frequency_penalty": 0.0, "response_format": {"type": "text"}, "user": None, "n": None}
    neutral |= {"store": False, "tool_choice": "none", "logit_bias": {}, "metadata": None, "temperature": None}
    assert read_request(body(**neutral), "<image>").n is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"top_k": 5}, "top_k", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"frequency_penalty": False}, "frequency_penalty", "not supported"),
        ({"user": "alice"}, "user", "not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
        ({"temperature": 0.001}, "temperature", "too low"),
        ({"temperature": "1"}, "temperature", "valid number, got '1'"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": True}, "n", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ""}, "stop[0]", "at least 1 character"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs `stream: true`"),
        ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs: true`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"model": None}, "model", "valid string"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "What?"}, "messages", "valid array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "'tool'"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
        ({"messages": [user(image_part()), {"role": "user"}]}, "messages[1].content", "is missing"),
        ({"messages": [user()]}, "messages[0].content", "at least 1 item"),
        ({"messages": [user(text("What?"))]}, "messages", "has 0 images"),
        ({"messages": [user(image_part(), image_part(), text("?"))]}, "messages", "has 2 images"),
        ({"messages": [user(image_part(), text("an <image>?"))]}, "messages[0].content[1].text", "leave it out"),
        ({"messages": [user({"type": "input_audio"})]}, "messages[0].content[0]", "'input_audio'"),
        ({"messages": [user(image_part(detail="high"))]}, "messages[0].content[0].image_url.detail", "'auto'"),
        (
            {"messages": [user({"type": "image_url", "image_url": PIXEL})]},
            "messages[0].content[0].image_url",
            "an object",
        ),
        ({"messages": [{**user(image_part()), "name": "Bo"}]}, "messages[0].name", "not supported"),
        ({"messages": [{"role": "system", "content": [image_part()]}]}, "messages[0].content[0].type", "'text'"),
        ({"messages": [user(image_part()), {"role": "assistant", "content": "A"}]}, "messages", "'assistant'"),
        (
            {"messages": [user(image_part()), {"role": "assistant", "content": None}]},
            "messages[1].content",
            "valid array",
        ),
        (
            {"messages": [{"role": "assistant", "content": "A", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "null",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_its_place(fields, param, message):
    error = refused(body(**fields))
    assert error["param"] == param
    assert message in error["message"]


def test_what_is_missing_is_named():
    assert refused(b"{}")["param"] == "model"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        b"[]",
        b'"text"',
        b"null",
    ],
)
def test_what_is_no_json_object_is_refused(data):
    assert refused(data)["code"] in (None, "invalid_value", "missing_required_parameter")


def test_numbers_are_finite():
    assert refused(body(temperature=float("nan")))["param"] == "temperature"
    assert refused(body(temperature=float("inf")))["param"] == "temperature"


# Images --------------------------------------------------------------------------------------------------------------


def fault(url: str) -> tuple[str, str]:
    with pytest.raises(ApiError) as caught:
        read_data_url(url, "place")
    error = caught.value.body["error"]
    assert error["param"] == "place"
    return error["code"], error["message"]


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_an_image_is_what_a_file_of_it_is(images, kind, mode, tmp_path):
    if (kind, mode) in (("png", "CMYK"), ("jpeg", "RGBA"), ("jpeg", "P")):
        pytest.skip("no such files")
    data = encoded(images[1].convert(mode), kind)
    (tmp_path / "file").write_bytes(data)
    read = read_data_url(f"data:image/{kind};base64,{base64.encodebytes(data).decode()}", "place")
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), np.asarray(to_rgb(tmp_path / "file")))


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("https://example.org/cat.png", "invalid_image_url", "does not fetch"),
        ("HTTP://example.org/cat.png", "invalid_image_url", "does not fetch"),
        ("file:///etc/passwd", "invalid_image_url", "data:image/png;base64"),
        ("/etc/passwd", "invalid_image_url", "data:image/png;base64"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "invalid_image_url", "data:image/png;base64"),
        ("data:image/png,abc", "invalid_image_url", "data:image/png;base64"),
        ("", "invalid_image_url", "data:image/png;base64"),
        ("data:image/png;base64,a", "invalid_base64", "base64"),
        ("data:image/png;base64,ab$=", "invalid_base64", "base64"),
        ("data:image/png;base64,é", "invalid_base64", "base64"),
        ("data:image/png;base64,", "invalid_image", "neither PNG nor JPEG"),
        (PIXEL, "invalid_image", "neither PNG nor JPEG"),
    ],
)
def test_other_urls_are_refused(url, code, message):
    found = fault(url)
    assert found[0] == code
    assert message in found[1]


def test_other_formats_are_refused_whatever_they_are_called(images):
    for kind in ("gif", "bmp", "tiff", "webp"):
        data = base64.b64encode(encoded(images[0], kind)).decode()
        assert fault(f"data:image/png;base64,{data}")[0] == "invalid_image"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG file that says it has this size, and has no more than a few bytes of pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(2**13 + 1, 2**13), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_pixels_of_a_picture_that_is_too_large_are_not_made(width, height, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("its pixels were read"))
    with pytest.raises(ApiError) as caught:
        read_image(png(width, height), "place")
    assert caught.value.body["error"]["code"] == "image_too_large"


def test_a_text_that_unpacks_to_much_is_refused():
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 * 10**6)))
    with pytest.raises(ApiError, match="Decompressed data too large"):
        read_image(png(2, 2, bomb), "place")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_files_that_are_cut_off_or_damaged_are_an_api_error_or_a_picture(images, kind):
    options = {"exif": Image.Exif()} if kind == "jpeg" else {}
    if options:
        options["exif"][0x0112] = 6
    data = encoded(images[0], kind, **options)
    for length in range(0, len(data) - 20, 7):
        with pytest.raises(ApiError) as caught:
            read_image(data[:length], "place")
        assert caught.value.body["error"]["code"] == "invalid_image"
    draw = random.Random(0)
    outcomes = set()
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        try:
            outcomes.add(read_image(bytes(broken), "place").mode)
        except ApiError as error:
            outcomes.add(error.body["error"]["code"])
    assert {"RGB", "invalid_image"} <= outcomes
