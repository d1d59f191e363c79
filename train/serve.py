"""Serve a VLM to programs that speak OpenAI's chat completions.

sigphi serve outputs/vlm
sigphi serve outputs/vlm --port 0         # a free port, which is printed
SIGPHI_API_KEY=... sigphi serve outputs/vlm --host 0.0.0.0
"""

import ipaddress
import os
import signal
import socket
import sys
from dataclasses import dataclass
from types import FrameType

from transformers.hf_argparser import HfArg

from sigphi.train.chat import load_vlm
from sigphi.train.errors import UserError, run_command
from sigphi.train.parser import parse_arguments
from sigphi.train.prompts import context_length

API_KEY = "SIGPHI_API_KEY"


@dataclass
class ServeArguments:
    """Where to serve, and how."""

    _argument_group_name = "serving"

    host: str = HfArg(
        help="Address to listen on. Others than this machine's own need a key, see docs/serve.md.", default="127.0.0.1"
    )
    port: int = HfArg(help="Port to listen on; 0 is a free one, which is printed.", default=8000)
    served_model_name: str | None = HfArg(
        help="What clients give as `model`; MODEL as it is written here by default.", default=None
    )
    max_new_tokens: int = HfArg(help="Longest answer in tokens, where a request does not say.", default=80)
    max_body_mb: int = HfArg(help="Largest request in MB; an image takes 4/3 of its file's size.", default=20)
    max_waiting: int = HfArg(help="Requests that may wait while another one is answered.", default=32)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: it has to be 0 to 65535.")
        for name in ("max_new_tokens", "max_body_mb", "max_waiting"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: it has to be at least 1.")
        if self.served_model_name == "":
            raise UserError("--served-model-name is empty; write one or leave it out.")


def main(argv: list[str] | None = None) -> None:
    """`sigphi serve MODEL`: `/v1/chat/completions` with images, until Ctrl-C or SIGTERM."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] in ("--api-key", "--api_key") for word in words):
        raise UserError(
            f"--api-key: whoever lists this machine's processes reads a key there; make a new one and set {API_KEY}."
        )
    options, model_name = parse_arguments(
        [ServeArguments], words, "sigphi serve", [("model", None, "VLM: a folder or Hub id")]
    )
    api_key = read_api_key()
    _check_installed()
    with open_socket(options.host, options.port, has_key=api_key is not None) as listening:
        _serve(model_name, options, api_key, listening)


def read_api_key() -> str | None:
    """
    The key in the environment variable `SIGPHI_API_KEY`, or `None`.

    Raises:
        UserError: if it is empty, or no text that a header can hold. The message does not show it.
    """
    key = os.environ.get(API_KEY)
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise UserError(
            f"{API_KEY} has to be printable ASCII without spaces, and not empty: set another one, or none."
        )
    return key


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"sigphi serve needs {error.name}: pip install 'sigphi[serve]'") from error


def open_socket(host: str, port: int, has_key: bool) -> socket.socket:
    """
    A socket that is bound and does not listen yet, so that a port in use is known before weights load.

    Args:
        host (`str`): a name or address of this machine.
        port (`int`): 0 is a free one.
        has_key (`bool`): whether clients have to show a key.

    Raises:
        UserError: if the address is no one of this machine or in use, or others could reach it without a key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or "-", port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: there is no such name or address ({error}).") from error
    if not has_key and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"--host {host}: other machines could reach the model there. Set {API_KEY} to a key that clients have to "
            "show, or serve on 127.0.0.1."
        )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"--host {host} --port {port}: cannot be opened ({error.strerror}). Give another --port; 0 is a free one."
        ) from error
    return bound


def _serve(model_name: str, options: ServeArguments, api_key: str | None, listening: socket.socket) -> None:
    # They import what `_check_installed` has found.
    from sigphi.train.completion_server import CompletionServer, Served
    from sigphi.train.generation_queue import GenerationQueue

    model, processor = load_vlm(model_name)
    name = options.served_model_name or model_name
    with GenerationQueue(model, processor.tokenizer, options.max_waiting) as generations:
        served = Served(
            name,
            generations,
            processor,
            context_length=context_length(model.config.text_config),
            max_new_tokens=options.max_new_tokens,
            max_body_bytes=options.max_body_mb * 10**6,
            api_key=api_key,
        )
        _listen(listening)
        sys.stdout.write(f"Serving {name} at {_address(listening)}/v1; Ctrl-C ends it.\n")
        sys.stdout.flush()
        # uvicorn hands on the signal that has ended it.
        signal.signal(signal.SIGTERM, _terminate)
        CompletionServer(served).run(sockets=[listening])


def _listen(bound: socket.socket) -> None:
    try:
        bound.listen()
    except OSError as error:  # somebody else has bound it meanwhile, and was first to listen
        raise UserError(f"{_address(bound)}: cannot be opened ({error.strerror}). Give another --port.") from error


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


__all__ = ["ServeArguments", "main", "open_socket", "read_api_key"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.serve")
