"""`sigphi serve`, asked by OpenAI's own client over a socket."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from sigphi import SigPhiProcessor
from sigphi.train import serve
from sigphi.train.chat import Conversation
from sigphi.train.completion_server import CompletionServer, Served
from sigphi.train.errors import UserError
from sigphi.train.generation_queue import GenerationQueue

QUESTIONS = ["What is it?", "What color is the dog?", "Is this a ship?"]
LONGEST = 12


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user(text: str, image: Image.Image | None = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.append({"type": "image_url", "image_url": {"url": data_url(image)}})
    return {"role": "user", "content": parts}


class Running:
    """A server in a thread of its own, with a client; `slowly` makes each step of the model take that long."""

    def __init__(self, model: Any, processor: Any, max_waiting: int = 32, **options: Any) -> None:
        self.model, self.processor = model, processor
        self.steps = 0
        self.slowly = 0.0
        model.lm_head.register_forward_hook(self._count)
        self.generations = GenerationQueue(model, processor.tokenizer, max_waiting)
        served = Served("tiny/vlm", self.generations, processor, context_length=128, **options)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = CompletionServer(served)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=30)

    def _count(self, *_: Any) -> None:
        self.steps += 1
        time.sleep(self.slowly)

    def __enter__(self) -> "Running":
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.generations.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.generations.__exit__()

    def complete(self, *messages: Any, **options: Any) -> Any:
        options = {"model": "tiny/vlm", "max_tokens": LONGEST} | options
        return self.client.chat.completions.create(messages=list(messages), **options)

    def request(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a plain request."""
        asked = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(asked, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def running(make_vlm, shared):
    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"])
    with Running(make_vlm(), processor, max_body_bytes=300_000) as server:
        yield server


@pytest.fixture(scope="module")
def twin(make_vlm, shared) -> SimpleNamespace:
    """The same model and processor, for what the server has to answer."""
    return SimpleNamespace(model=make_vlm(), processor=SigPhiProcessor(shared["image_processor"], shared["tokenizer"]))


@pytest.fixture(autouse=True)
def quick(running):
    yield
    running.slowly = 0.0


def asked(
    twin: Any, image: Any, question: str, turns: list[tuple[str, str]] | None = None, longest: int = LONGEST
) -> str:
    """The answer of `sigphi ask`."""
    return Conversation(twin.model, twin.processor, image, longest, turns=turns or []).ask(question).text


# Answers -------------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_ask(running, twin, images):
    answers = []
    for image, question in zip(images, QUESTIONS, strict=True):
        completion = running.complete(user(question, image))
        (choice,) = completion.choices
        assert choice.message.role == "assistant" and choice.logprobs is None
        assert choice.message.content == asked(twin, image, question)
        answers.append(choice.message.content)
        prompt = twin.processor.tokenizer(f"<image>Question: {question}\nAnswer:")["input_ids"]
        assert completion.usage.prompt_tokens == len(prompt)
        assert 0 < completion.usage.completion_tokens <= LONGEST
        assert completion.usage.total_tokens == len(prompt) + completion.usage.completion_tokens
        assert choice.finish_reason == ("length" if completion.usage.completion_tokens == LONGEST else "stop")
    assert len(set(answers)) == 3
    assert (completion.object, completion.model) == ("chat.completion", "tiny/vlm")
    assert completion.id.startswith("chatcmpl-")


def test_earlier_turns_are_in_view(running, twin, images):
    first = running.complete(user(QUESTIONS[0], images[0]))
    # As clients do, with the object that they have got.
    second = running.complete(user(QUESTIONS[0], images[0]), first.choices[0].message, user(QUESTIONS[1]))
    turns = [(QUESTIONS[0], first.choices[0].message.content)]
    assert second.choices[0].message.content == asked(twin, images[0], QUESTIONS[1], turns)
    assert second.choices[0].message.content != asked(twin, images[0], QUESTIONS[1])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_goes_where_the_template_puts_it(running, twin, images, role):
    completion = running.complete({"role": role, "content": "A small frog."}, user("What is it?", images[0]))
    prompt = "A small frog.\n<image>Question: What is it?\nAnswer:"
    inputs = twin.processor(images=images[0], text=prompt, return_tensors="pt")
    tokens = twin.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    text = twin.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert completion.choices[0].message.content == text.strip()
    assert completion.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_a_template_may_refuse_messages(running, images, monkeypatch):
    template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' else '<image>' }}"
    monkeypatch.setattr(running.processor, "chat_template", template)
    assert running.complete(user("What?", images[0])).usage.prompt_tokens == 1
    with pytest.raises(openai.BadRequestError, match="no system role"):
        running.complete({"role": "system", "content": "Be short."}, user("What?", images[0]))


def test_the_longest_answer(running, twin, images):
    for option in ("max_tokens", "max_completion_tokens"):
        completion = running.complete(user("What?", images[0]), **{"max_tokens": None, option: 3})
        assert completion.usage.completion_tokens == 3
        assert completion.choices[0].finish_reason == "length"
        assert completion.choices[0].message.content == asked(twin, images[0], "What?", longest=3)
    assert running.complete(user("What?", images[0]), max_tokens=None).usage.completion_tokens == 80


def test_an_answer_ends_at_the_end_of_text(running, twin, images, monkeypatch):
    text = asked(twin, images[0], "What?")
    inputs = twin.processor(images=images[0], text="<image>Question: What?\nAnswer:", return_tensors="pt")
    tokens = twin.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    monkeypatch.setattr(running.model.generation_config, "eos_token_id", [tokens[5].item(), 3])
    completion = running.complete(user("What?", images[0]))
    (choice,) = completion.choices
    assert (choice.finish_reason, completion.usage.completion_tokens) == ("stop", 6)
    assert choice.message.content == twin.processor.tokenizer.decode(tokens[:5]).strip() != text


def test_stop_strings_end_an_answer_and_are_left_out(running, twin, images):
    text = asked(twin, images[0], "What?")
    stop = text[4:6]
    for options in ({"stop": stop}, {"stop": ["xyz", stop]}):
        (choice,) = running.complete(user("What?", images[0]), **options).choices
        assert (choice.finish_reason, choice.message.content) == ("stop", text[: text.index(stop)].rstrip())


@pytest.mark.parametrize("options", [{}, {"stop": "T"}, {"n": 3, "temperature": 1.0, "seed": 5}])
def test_a_stream_gives_the_same_in_pieces(running, images, options):
    whole = running.complete(user("What?", images[0]), **options)
    chunks = list(
        running.complete(user("What?", images[0]), stream=True, stream_options={"include_usage": True}, **options)
    )
    *pieces, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in pieces)
    assert len({chunk.id for chunk in chunks}) == 1 and last.object == "chat.completion.chunk"
    for choice in whole.choices:
        of_choice = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == choice.index]
        assert of_choice[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in of_choice) == choice.message.content
        assert [one.finish_reason for one in of_choice if one.finish_reason] == [choice.finish_reason]
        assert of_choice[-1].finish_reason is not None
    without = list(running.complete(user("What?", images[0]), stream=True, **options))
    assert len(without) == len(pieces) and without[-1].choices


def test_a_stream_ends_with_the_line_that_clients_wait_for(running, images):
    data = {"model": "tiny/vlm", "messages": [user("What?", images[0])], "stream": True, "max_tokens": 3}
    asked = urllib.request.Request(
        f"{running.url}/v1/chat/completions", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])


def test_pieces_come_while_the_answer_is_made(running, images):
    running.slowly = 0.02
    seen = []
    for chunk in running.complete(user("What?", images[0]), stream=True, max_tokens=40):
        if chunk.choices[0].delta.content:
            seen.append(running.steps)
    assert len(set(seen)) > 5


def test_drawn_answers_depend_on_the_seed_alone(running, images):
    def drawn(**options: Any) -> list[str]:
        completion = running.complete(user("What?", images[0]), **options)
        assert [choice.index for choice in completion.choices] == list(range(options.get("n", 1)))
        return [choice.message.content for choice in completion.choices]

    greedy = drawn()
    first = drawn(temperature=1.0, seed=1, n=4)
    assert drawn(temperature=1.0, seed=1, n=4) == first
    assert drawn(temperature=1.0, seed=2, n=4) != first
    assert drawn(temperature=1.0, n=4) != drawn(temperature=1.0, n=4)
    assert len(set(first)) == 4
    assert drawn(temperature=0.01, seed=1) == drawn(temperature=2.0, top_p=0.0, seed=1) == greedy
    assert drawn(top_p=0.9, seed=1) == drawn(top_p=0.9, temperature=1.0, seed=1) != greedy
    assert drawn(n=2) == greedy * 2


def test_any_token_may_be_drawn(running, images):
    """Generation with transformers' defaults would draw from the 50 likeliest."""
    completion = running.complete(
        user("What?", images[0]), temperature=2.0, n=16, max_tokens=12, seed=0, logprobs=True, top_logprobs=20
    )
    tokens = [token for choice in completion.choices for token in choice.logprobs.content]
    unlikely = [token for token in tokens if token.logprob < token.top_logprobs[-1].logprob - 2]
    assert len(unlikely) > 10


def test_logprobs_are_those_of_the_model(running, twin, images):
    options = {"logprobs": True, "top_logprobs": 3}
    (choice,) = running.complete(user("What?", images[0]), **options).choices
    inputs = twin.processor(images=images[0], text="<image>Question: What?\nAnswer:", return_tensors="pt")
    first = None
    assert len(choice.logprobs.content) > 8
    for token in choice.logprobs.content:
        with torch.no_grad():
            logits = twin.model(**inputs).logits[0, -1]
        logits[twin.model.generation_config.suppress_tokens] = -torch.inf
        values, token_ids = logits.log_softmax(-1).topk(3)
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-3)
        assert token.logprob == token.top_logprobs[0].logprob
        assert [one.token for one in token.top_logprobs] == [
            twin.processor.tokenizer.decode([one]) for one in token_ids
        ]
        assert token.bytes in (None, list(token.token.encode())) and (token.bytes is None) == ("\ufffd" in token.token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token_ids[:1, None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        first = logits.log_softmax(-1) if first is None else first
    # Temperature changes what is drawn, and not these.
    (choice,) = running.complete(user("What?", images[0]), temperature=0.3, seed=0, **options).choices
    drawn = choice.logprobs.content[0]
    assert [one.logprob for one in drawn.top_logprobs] == pytest.approx(first.topk(3).values.tolist(), abs=1e-3)
    assert (first - drawn.logprob).abs().min() < 1e-3
    chunks = running.complete(user("What?", images[0]), temperature=0.3, seed=0, stream=True, **options)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == choice.logprobs.content


# Many clients --------------------------------------------------------------------------------------------------------


def test_clients_at_once_all_get_their_own_answers(running, twin, images):
    pairs = [(image, question) for image in images for question in QUESTIONS]
    expected = [asked(twin, image, question) for image, question in pairs]

    def ask(number: int) -> str:
        image, question = pairs[number % len(pairs)]
        if number % 2:
            return running.complete(user(question, image)).choices[0].message.content
        chunks = running.complete(user(question, image), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(9) as clients:
        answers = list(clients.map(ask, range(18)))
    assert answers == expected * 2


def steps_when_idle(running: Running) -> int:
    """The steps that the model has made once it makes none any more."""
    deadline = time.monotonic() + 10
    before = -1
    while before != running.steps:
        assert time.monotonic() < deadline
        before = running.steps
        time.sleep(0.3)
    return before


def test_a_client_that_leaves_a_stream_ends_the_generation(running, images):
    before = steps_when_idle(running)
    running.slowly = 0.05
    stream = running.complete(user("What?", images[0]), stream=True, max_tokens=100)
    assert any(chunk.choices[0].delta.content for chunk in stream)  # up to the first of these
    stream.close()
    assert 0 < steps_when_idle(running) - before < 30


def test_a_client_that_gives_up_waiting_ends_the_generation(running, images):
    before = steps_when_idle(running)
    running.slowly = 0.05
    with pytest.raises(openai.APITimeoutError):
        running.client.with_options(timeout=0.5).chat.completions.create(
            model="tiny/vlm", messages=[user("What?", images[0])], max_tokens=100
        )
    assert 0 < steps_when_idle(running) - before < 40


def test_what_waits_behind_a_client_that_has_left_is_not_made(make_vlm, shared, images):
    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"])
    with Running(make_vlm(), processor, max_waiting=1) as server:
        server.slowly = 0.03
        first = server.complete(user("What?", images[0]), stream=True, max_tokens=40)
        next(iter(first))
        with pytest.raises(openai.APITimeoutError):
            server.client.with_options(timeout=0.3).chat.completions.create(
                model="tiny/vlm", messages=[user("A?", images[0])], max_tokens=40
            )
        # It holds its place until its turn comes, and a third one finds the queue full.
        with pytest.raises(openai.RateLimitError, match="Too many requests wait") as caught:
            server.complete(user("B?", images[0]))
        assert caught.value.body["code"] == "server_overloaded"
        assert sum(1 for _ in first) > 5
        assert steps_when_idle(server) == 40


def test_a_failed_generation_is_an_error_and_the_next_one_is_answered(running, images, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = running.model.model.language_model.register_forward_pre_hook(fail)
    with pytest.raises(openai.InternalServerError) as caught:
        running.complete(user("What?", images[0]))
    assert caught.value.body["type"] == "server_error" and "memory" not in str(caught.value)
    with pytest.raises(openai.APIError, match="has failed"):
        list(running.complete(user("What?", images[0]), stream=True))
    handle.remove()
    assert running.complete(user("What?", images[0])).choices[0].message.content
    assert running.request("/health") == (200, {"status": "ok"})


def test_a_server_that_ends_tells_those_who_wait(make_vlm, shared, images):
    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"])
    with Running(make_vlm(), processor) as server, ThreadPoolExecutor(1) as other:
        server.slowly = 0.05
        stream = server.complete(user("What?", images[0]), stream=True, max_tokens=100)
        assert any(chunk.choices[0].delta.content for chunk in stream)
        waiting = other.submit(server.complete, user("A?", images[0]))
        while server.generations._waiting.qsize() == 0:
            time.sleep(0.01)
        # As the second Ctrl-C, or the first one some seconds later.
        server.server.should_exit = True
        server.server.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.APIError, match="The server is ending"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="The server is ending") as caught:
            waiting.result(timeout=30)
        assert (caught.value.status_code, caught.value.body["code"]) == (503, "server_stopped")
        assert server.steps < 60


# Errors and other routes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "code", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found", "model"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "unsupported_parameter",
            "tools",
        ),
        ({"max_tokens": 128}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"extra_body": {"top_k": 1}}, openai.BadRequestError, "unsupported_parameter", "top_k"),
    ],
)
def test_errors_reach_the_client_in_its_own_classes(running, images, options, kind, code, param):
    with pytest.raises(kind) as caught:
        running.complete(user("What?", images[0]), **options)
    assert (caught.value.body["code"], caught.value.body["param"]) == (code, param)


def test_a_broken_image_is_named_by_its_place(running):
    part = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    with pytest.raises(openai.BadRequestError, match="does not fetch") as caught:
        running.complete({"role": "user", "content": [{"type": "text", "text": "What?"}, part]})
    assert caught.value.body["param"] == "messages[0].content[1].image_url.url"


def test_texts_longer_than_the_context_are_refused(running, images):
    with pytest.raises(openai.BadRequestError, match="holds 128 tokens"):
        running.complete(user("What is it? " * 60, images[0]), max_tokens=None)


def test_a_body_that_is_too_large_is_refused_though_it_is_sent_to_the_end(running):
    large = Image.effect_noise((600, 600), 90).convert("RGB")
    with pytest.raises(openai.APIStatusError) as caught:
        running.complete(user("What?", large))
    assert (caught.value.status_code, caught.value.body["code"]) == (413, "body_too_large")


def test_models_are_listed_and_found(running):
    (model,) = running.client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny/vlm", "model", "sigphi")
    assert running.client.models.retrieve("tiny/vlm") == model
    with pytest.raises(openai.NotFoundError, match="tiny/vlm"):
        running.client.models.retrieve("other")


@pytest.mark.parametrize(
    ("path", "data", "headers", "status"),
    [
        ("/v1/completions", b"{}", {"Content-Type": "application/json"}, 404),
        ("/v1/chat/completions", None, {}, 405),
        ("/v1/chat/completions", b"{", {"Content-Type": "application/json"}, 400),
        ("/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, 415),
        ("/v1/models", None, {"Host": "attacker.example"}, 403),
        ("/v1/chat/completions", b"{}", {"Host": "attacker.example:80", "Content-Type": "application/json"}, 403),
        ("/docs", None, {}, 404),
    ],
)
def test_other_requests_get_an_error_of_the_same_shape(running, path, data, headers, status):
    found, answer = running.request(path, data, **headers)
    assert found == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "127.1.2.3"])
def test_names_of_this_machine_are_served(running, host):
    assert running.request("/v1/models", Host=host)[0] == 200


def test_with_a_key_only_those_who_have_it_are_served(make_vlm, shared, images):
    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"])
    with Running(make_vlm(), processor, api_key="secret-1") as server:
        for key in ("wrong", "secret-", "secret-11", "s\u00e9cret"):
            headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
            status, answer = server.request("/v1/models", **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert "secret-1" not in str(answer)
        assert server.request("/v1/models")[0] == 401
        assert server.request("/health")[0] == 200
        # Behind a proxy it has another name.
        assert server.request("/v1/models", Authorization="Bearer secret-1", Host="vlm.example")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            server.complete(user("What?", images[0]))
        client = server.client.with_options(api_key="secret-1")
        assert [model.id for model in client.models.list()] == ["tiny/vlm"]


# The command ---------------------------------------------------------------------------------------------------------


def test_faults_of_the_command_are_known_before_weights_load(monkeypatch):
    monkeypatch.setattr(serve, "load_vlm", lambda name: pytest.fail("weights were loaded"))
    monkeypatch.delenv(serve.API_KEY, raising=False)
    for argv, message in (
        (["--host", "0.0.0.0"], r"--host 0.0.0.0: other machines could reach the model there. Set SIGPHI_API_KEY"),
        (["--host", "::"], "other machines"),
        (["--host", "no.such.host.invalid"], "there is no such name"),
        (["--host", ""], "there is no such name"),
        (["--host", "192.0.2.1"], "other machines"),
        (["--port", "70000"], "--port 70000: it has to be 0 to 65535"),
        (["--max-waiting", "0"], "--max-waiting 0: it has to be at least 1"),
        (["--api-key", "secret"], "^--api-key: whoever lists this machine's processes reads a key there"),
        (["--api-key=secret"], "set SIGPHI_API_KEY"),
        (["--served-model-name", ""], "is empty"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            serve.main(["model", *argv])
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "line\n", "schl\u00fcssel"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv(serve.API_KEY, key)
    with pytest.raises(UserError, match="SIGPHI_API_KEY has to be printable ASCII") as caught:
        serve.main(["model"])
    assert not key or key.strip() not in str(caught.value)


def test_with_a_key_other_machines_may_ask(monkeypatch):
    monkeypatch.setenv(serve.API_KEY, "secret-1")
    assert serve.read_api_key() == "secret-1"
    with serve.open_socket("0.0.0.0", 0, has_key=True) as bound:
        assert bound.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_names_of_this_machine_need_no_key(host):
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6")
    with serve.open_socket(host, 0, has_key=False) as bound:
        assert bound.getsockname()[1] > 0


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot be opened .*0 is a free one"):
            serve.open_socket("127.0.0.1", port, has_key=False)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_without_its_packages_the_command_says_what_to_install(monkeypatch, package):
    monkeypatch.delenv(serve.API_KEY, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"sigphi serve needs {package}: pip install 'sigphi\[serve\]'"):
        serve.main(["model"])


def start(folder: Path, tmp_path: Path, **env: str) -> tuple[subprocess.Popen, str]:
    """`sigphi serve` in a process of its own, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sigphi", "serve", str(folder), "--port", "0", "--served-model-name", "vlm"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("Serving vlm at http://127.0.0.1:"), process.stderr.read()
    return process, line.split()[3].rstrip(";")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_the_command_serves_until_it_is_told_to_end(make_lora_vlm, shared, images, tmp_path, number, code):
    model, processor = make_lora_vlm(), SigPhiProcessor(shared["image_processor"], shared["tokenizer"])
    model.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    process, url = start(tmp_path / "vlm", tmp_path, SIGPHI_API_KEY="secret-1")
    try:
        client = openai.OpenAI(base_url=url, api_key="secret-1")
        completion = client.chat.completions.create(
            model="vlm", messages=[user("What?", images[0])], max_tokens=LONGEST
        )
        twin = SimpleNamespace(model=model, processor=processor)
        assert completion.choices[0].message.content == asked(twin, images[0], "What?")
        # One that is being made does not keep it.
        stream = client.chat.completions.create(
            model="vlm", messages=[user("What?", images[0])], n=16, max_tokens=100, stream=True
        )
        next(iter(stream))
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code
        assert "Traceback" not in err and "secret-1" not in out + err
    finally:
        process.kill()
        process.wait()
