"""Ask a VLM about pictures on a page in the browser, on this machine.

sigphi demo outputs/vlm
sigphi demo outputs/vlm --siglip-checkpoint outputs/siglip --images uoft-cs/cifar10 --port 7861
"""

import ipaddress
import logging
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.markdown import one_line
from sigphi.train.chat import load_vlm
from sigphi.train.checkpoints import read_config
from sigphi.train.errors import UserError, check_gradio, run_command
from sigphi.train.parser import parse_arguments

logger = logging.getLogger(__name__)


@dataclass
class DemoArguments:
    """Options of `sigphi demo`."""

    _argument_group_name = "demo"

    host: str = HfArg(
        help="Address to listen on. Others than this machine's own let everybody in who reaches it.",
        default="127.0.0.1",
    )
    port: int = HfArg(help="Port to listen on; 0 takes a free one.", default=7860)
    siglip_checkpoint: str | None = HfArg(
        help="The encoder that the model was made from, for the classes that it sees; by default the recorded one.",
        default=None,
    )
    images: str | None = HfArg(
        help="Set of images whose test pictures to choose from: a Hub id, a folder, or 'synthetic'; by default those "
        "of the model's evaluation, or else drawn ones.",
        default=None,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UserError(f"--port {self.port}: it has to be 0 to 65535.")


def free_port(host: str, port: int) -> int:
    """
    A port on which nobody listens.

    Args:
        host (`str`): address to listen on.
        port (`int`): the one that is wanted; 0 for any.

    Raises:
        UserError: if it is taken, or this machine has no such address.
    """
    try:
        # As servers do: what a connection that has ended leaves behind is no obstacle.
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            return server.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}). Give another --port, such as 0."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str] | None = None) -> None:
    """`sigphi demo MODEL`: a page on 127.0.0.1 until Ctrl-C; its address is printed when it can be opened."""
    options, name = parse_arguments([DemoArguments], argv, "sigphi demo", [("model", None, "VLM: a folder or Hub id")])
    check_gradio("sigphi demo")
    read_config(name, "MODEL", SigPhiConfig.model_type)
    if options.siglip_checkpoint is not None:
        read_config(options.siglip_checkpoint, "--siglip-checkpoint", SiglipResNetConfig.model_type)
    port = free_port(options.host, options.port)
    if not is_loopback(options.host):
        logger.warning("--host %s: everybody who reaches this machine can use the page.", options.host)
    show(name, options, port)


def show(name: str, options: DemoArguments, port: int) -> None:
    """Serve the page about a VLM until the process is interrupted."""
    from sigphi.hub_card import app
    from sigphi.hub_card.space import write_examples
    from sigphi.train.demo_content import classes_of, example_pictures, example_questions

    pictures = example_pictures(name, options.images)
    model, processor = load_vlm(name)
    classes = classes_of(name, model.model.vision_tower.state_dict(), options.siglip_checkpoint)
    with tempfile.TemporaryDirectory(prefix="sigphi-") as folder:
        examples = write_examples(Path(folder, app.EXAMPLES), pictures)
        demo = app.Demo(model, processor, classes)
        page = app.make_page(demo, one_line(name), examples, example_questions(name))
        address = app.serve(page, server_name=options.host, server_port=port, prevent_thread_lock=True, quiet=True)
        try:
            sys.stdout.write(f"{address}\nCtrl-C ends it.\n")
            sys.stdout.flush()
            wait_forever()
        finally:
            page.close()


def wait_forever() -> None:
    """Do nothing until the process is interrupted; the server has threads of its own."""
    threading.Event().wait()


__all__ = ["DemoArguments", "free_port", "is_loopback", "main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.demo")
