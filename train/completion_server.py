"""The HTTP side of `sigphi serve`: OpenAI's routes, errors and streams over a [`GenerationQueue`]."""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sigphi.train.answer_stream import Likely, Piece
from sigphi.train.completion_request import ApiError, CompletionRequest, read_request
from sigphi.train.generation_queue import Finished, Generation, GenerationQueue, QueueFull, QueueStopped, Sampling

logger = logging.getLogger(__name__)

# What a browser writes there when a page has tricked it into asking this machine is that page's own name.
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
# How long answers may go on that are being made when the server is told to end.
SECONDS_TO_END = 5
_SERVER_ERROR = "The server has failed; its log says why."


@dataclass(frozen=True)
class Served:
    """
    A model that is served, and how.

    Args:
        name (`str`): what clients give as `model`.
        generations (`GenerationQueue`): makes its answers.
        processor (`SigPhiProcessor`): of the model. Only this server may use it from then on.
        context_length (`float`): tokens of a prompt with its answer, at most.
        max_new_tokens (`int`): longest answer in tokens, where a request says nothing.
        max_body_bytes (`int`): of a request.
        api_key (`str`, *optional*): what clients have to show.
    """

    name: str
    generations: GenerationQueue
    processor: Any
    context_length: float
    max_new_tokens: int = 80
    max_body_bytes: int = 20_000_000
    api_key: str | None = None


def create_app(served: Served) -> FastAPI:
    """
    The application: `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`.

    Args:
        served (`Served`): what answers.
    """
    app = FastAPI(title="sigphi", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failure)
    about = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "sigphi"}
    preparing = asyncio.Semaphore(1)  # large pictures are read one at a time

    async def check_access(request: Request) -> None:
        _check_access(request, served.api_key)

    @app.get("/health")
    async def health() -> JSONResponse:
        is_alive = served.generations.is_alive
        return JSONResponse({"status": "ok" if is_alive else "failed"}, 200 if is_alive else 503)

    @app.get("/v1/models", dependencies=[Depends(check_access)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(check_access)])
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, served)
        return about

    @app.post("/v1/chat/completions", dependencies=[Depends(check_access)], response_model=None)
    async def chat_completions(request: Request) -> JSONResponse | StreamingResponse:
        body = await _read_body(request, served.max_body_bytes)
        async with preparing:
            asked, inputs, sampling = await run_in_threadpool(prepare, body, served)
        answers = _Answers(served, asked, inputs, sampling)
        answers.submit()
        return _CompletionStream(answers, request) if asked.stream else await _whole_completion(answers, request)

    return app


class CompletionServer(uvicorn.Server):
    """
    The application behind a socket, until SIGINT or SIGTERM. Answers on their way then have some seconds, and none
    with a second signal.

    Args:
        served (`Served`): what answers.
    """

    def __init__(self, served: Served) -> None:
        # Theirs is longer, since what it breaks off fills the log.
        seconds = 2 * SECONDS_TO_END
        super().__init__(
            uvicorn.Config(
                create_app(served), log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=seconds
            )
        )
        self.generations = served.generations

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it, the second one the answers, and a third one leaves it at that."""
        if self.should_exit and self.generations.is_alive:
            self.generations.stop()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait for the answers."""
        timer = asyncio.get_running_loop().call_later(SECONDS_TO_END, self.generations.stop)
        await super().shutdown(sockets)
        timer.cancel()


# Errors --------------------------------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body, error.status, headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}."
    return JSONResponse(ApiError(message).body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> JSONResponse:
    # Nobody reads it. The number is the one that nginx writes into its log.
    return JSONResponse({}, 499)


async def _failure(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(ApiError(_SERVER_ERROR, kind="server_error").body, 500)


# Requests ------------------------------------------------------------------------------------------------------------


def _check_access(request: Request, api_key: str | None) -> None:
    if api_key is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError("The API key is missing or wrong.", code="invalid_api_key", status=401)
    elif _LOCAL_HOST.fullmatch(request.headers.get("host", "")) is None:
        raise ApiError(
            "Without an API key this server answers to localhost alone: use that name, or set SIGPHI_API_KEY.",
            status=403,
            kind="permission_error",
        )


async def _read_body(request: Request, most: int) -> bytes:
    """The body, of JSON: a page in a browser cannot send that elsewhere without being asked for its permission."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"Send the header Content-Type: application/json, not {kind!r}.", status=415)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        # The rest is read all the same: a client that is still sending would not see the answer.
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
    if size > most:
        raise ApiError(
            f"The body has {size} bytes, more than {most}: send a smaller image.", code="body_too_large", status=413
        )
    return b"".join(parts)


def _check_model(name: str, served: Served) -> None:
    if name != served.name:
        raise ApiError(
            f"There is no model {name!r} here; the one that is served is {served.name!r}.",
            "model",
            "model_not_found",
            404,
        )


def prepare(body: bytes, served: Served) -> tuple[CompletionRequest, Any, Sampling]:
    """
    Make a request ready for its turn.

    Args:
        body (`bytes`): JSON.
        served (`Served`): what is to answer.

    Returns:
        `tuple`: the request; what the processor makes of it; and how to answer.

    Raises:
        ApiError: if anything of it cannot be served.
    """
    asked = read_request(body, served.processor.image_token)
    _check_model(asked.model, served)
    try:
        inputs = served.processor.apply_chat_template(
            asked.chat(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except TemplateError as error:
        raise ApiError(
            f"The model's chat template refuses these messages: {error}.", "messages", "invalid_value"
        ) from error
    return asked, inputs, _sampling(asked, inputs["input_ids"].shape[1], served)


def _sampling(asked: CompletionRequest, prompt_tokens: int, served: Served) -> Sampling:
    wanted = asked.max_completion_tokens or asked.max_tokens
    left = served.context_length - prompt_tokens
    if left < (wanted or 1):
        answer = "" if wanted is None else f" and the answer {wanted}"
        raise ApiError(
            f"The model's context holds {served.context_length} tokens; the messages have {prompt_tokens}{answer}. "
            "Shorten them, or ask for a shorter answer.",
            "messages",
            "context_length_exceeded",
        )
    # The likeliest answer, as everywhere in sigphi; `top_p` by itself asks for others.
    default = 0.0 if asked.top_p is None else 1.0
    return Sampling(
        max_new_tokens=wanted or int(min(served.max_new_tokens, left)),
        temperature=default if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stop=asked.stop or (),
        n=asked.n or 1,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )


# Answers -------------------------------------------------------------------------------------------------------------


class _Answers:
    """The answers to a request, as they come from the generating thread."""

    def __init__(self, served: Served, asked: CompletionRequest, inputs: Any, sampling: Sampling) -> None:
        self.served, self.asked, self.sampling = served, asked, sampling
        self.prompt_tokens = inputs["input_ids"].shape[1]
        self.num_tokens = 0
        self._events: asyncio.Queue[Piece | Finished | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self.generation = Generation(inputs, sampling, self._deliver)

    def _deliver(self, event: Piece | Finished | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # where the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def submit(self) -> None:
        """Raises an [`ApiError`] if too many requests wait, or the server is ending."""
        try:
            self.served.generations.submit(self.generation)
        except QueueStopped as error:
            raise _ending() from error
        except QueueFull as error:
            raise ApiError(
                "Too many requests wait already; try again later.",
                code="server_overloaded",
                status=429,
                kind="rate_limit_error",
            ) from error

    async def pieces(self, request: Request) -> AsyncIterator[Piece]:
        """
        What becomes certain of the answers, until they are whole.

        Raises:
            ClientDisconnect: as soon as the client of `request` has gone.
            ApiError: if the generation has failed, or the server is ending.
        """
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            while True:
                event = await self._next(gone)
                if isinstance(event, Finished):
                    self.num_tokens = event.num_tokens
                    break
                if isinstance(event, QueueStopped):
                    raise _ending() from event
                if isinstance(event, Exception):
                    raise ApiError(_SERVER_ERROR, status=500, kind="server_error") from event
                yield event
        finally:
            gone.cancel()
        seconds = time.monotonic() - self._started
        logger.info("%d prompt tokens, %d answer tokens, %.1f s", self.prompt_tokens, self.num_tokens, seconds)

    async def _next(self, gone: asyncio.Future[None]) -> Piece | Finished | Exception:
        event = asyncio.ensure_future(self._events.get())
        try:
            both: list[asyncio.Future[Any]] = [event, gone]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not event.done():
                event.cancel()
        if not event.done():
            raise ClientDisconnect
        return event.result()

    def header(self, kind: str, identity: str, created: int) -> dict[str, Any]:
        return {"id": identity, "object": kind, "created": created, "model": self.served.name}

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.prompt_tokens + self.num_tokens,
        }

    def logprobs(self, tokens: list[list[Likely]]) -> dict[str, Any] | None:
        """Those of some tokens in OpenAI's shape, if they were asked for."""
        if self.sampling.top_logprobs is None:
            return None
        content = [
            {**self._likely(taken), "top_logprobs": [self._likely(one) for one in top]} for taken, *top in tokens
        ]
        return {"content": content, "refusal": None}

    def _likely(self, one: Likely) -> dict[str, Any]:
        tokenizer = self.served.generations.tokenizer
        text = tokenizer.decode([one.token_id], clean_up_tokenization_spaces=False)
        # Of a part of a character the bytes are not known.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": one.logprob, "bytes": data}


def _ending() -> ApiError:
    return ApiError("The server is ending.", code="server_stopped", status=503, kind="server_error")


async def _disconnect(request: Request) -> None:
    """Returns when the client has gone; of a request whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _identity() -> tuple[str, int]:
    return f"chatcmpl-{uuid.uuid4().hex}", int(time.time())


async def _whole_completion(answers: _Answers, request: Request) -> JSONResponse:
    header = answers.header("chat.completion", *_identity())
    texts = [""] * answers.sampling.n
    tokens: list[list[list[Likely]]] = [[] for _ in texts]
    reasons: list[str | None] = [None] * len(texts)
    try:
        async for piece in answers.pieces(request):
            texts[piece.choice] += piece.text
            tokens[piece.choice] += piece.tokens
            reasons[piece.choice] = piece.finish_reason
    finally:
        answers.generation.cancel()
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": answers.logprobs(tokens[index]),
            "finish_reason": reasons[index],
        }
        for index, text in enumerate(texts)
    ]
    return JSONResponse({**header, "choices": choices, "usage": answers.usage()})


class _CompletionStream(StreamingResponse):
    """The answers as server-sent events, each with what has become certain."""

    def __init__(self, answers: _Answers, request: Request) -> None:
        self.answers = answers
        super().__init__(self._events(request), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where the client has gone before the first event
            self.answers.generation.cancel()

    async def _events(self, request: Request) -> AsyncIterator[str]:
        answers, options = self.answers, self.answers.asked.stream_options
        with_usage = options is not None and bool(options.include_usage)
        header = answers.header("chat.completion.chunk", *_identity())
        header |= {"usage": None} if with_usage else {}
        for index in range(answers.sampling.n):
            yield _event({**header, "choices": [_choice(index, {"role": "assistant", "content": ""}, None, None)]})
        try:
            async for piece in answers.pieces(request):
                if piece.text or piece.tokens:
                    delta, logprobs = {"content": piece.text}, answers.logprobs(piece.tokens)
                    yield _event({**header, "choices": [_choice(piece.choice, delta, logprobs, None)]})
                if piece.finish_reason is not None:
                    yield _event({**header, "choices": [_choice(piece.choice, {}, None, piece.finish_reason)]})
        except ApiError as error:
            yield _event(error.body)
            return
        except ClientDisconnect:
            return
        if with_usage:
            yield _event({**header, "choices": [], "usage": answers.usage()})
        yield "data: [DONE]\n\n"


def _choice(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


__all__ = ["SECONDS_TO_END", "CompletionServer", "Served", "create_app", "prepare"]
