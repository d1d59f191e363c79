"""The errors that a user can mend, and how a command ends on one."""

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from sigphi.hub_card.errors import UserError

logger = logging.getLogger(__name__)

# What a shell reports for a process that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED = 130
# How the message begins that PyTorch makes of an error in a worker and the worker's traceback.
_FROM_WORKER = "Caught UserError in DataLoader worker"
# A full disk, a quota that is used up, a file that may not grow.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_gradio(option: str) -> None:
    """Raise a [`UserError`] unless gradio is installed, which `option` needs."""
    if find_spec("gradio") is None:
        raise UserError(f"{option} needs gradio: pip install 'sigphi[demo]'.")


def printable(text: str) -> str:
    """`text` on one line, with what would steer a terminal written out, such as `\\x1b`."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split()))


@contextlib.contextmanager
def worker_errors(what: str, remedy: str) -> Iterator[None]:
    """
    Within it the death of a data loader's worker is a [`UserError`], and so is, in one line, one that a worker raises.

    PyTorch raises the first wherever this process is at that moment: what uses the loader's batches has to be within.

    Args:
        what (`str`): what has died, in words.
        remedy (`str`): one or two sentences.
    """
    try:
        yield
    except UserError as error:
        if not str(error).startswith(_FROM_WORKER):
            raise
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"{what} has died ({printable(str(error))[:200].rstrip('.')}). {remedy}") from error


@contextlib.contextmanager
def full_disks(place: str | None = None, remedy: str = "Make room, and run it again.") -> Iterator[None]:
    """
    Within it a full disk is a [`UserError`].

    A thread that meets one ends without a traceback of its own: that of TensorBoard's writer raises its error once
    more where the writer is called next.

    Args:
        place (`str`, *optional*): what cannot be written, such as `"--output-dir outputs"`; by default the file.
        remedy (`str`, *optional*): one or two sentences.
    """
    before = threading.excepthook
    in_threads: list[OSError] = []

    def take_down(arguments: Any) -> None:
        if _is_full_disk(arguments.exc_value):
            in_threads.append(arguments.exc_value)
        else:
            before(arguments)

    threading.excepthook = take_down
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        what = place or error.filename or "a file"
        raise UserError(f"{what} cannot be written: {error.strerror}. {remedy}") from error
    else:
        for found in in_threads:
            logger.warning("%s was not written to its end: %s", place or found.filename or "a file", found.strerror)
    finally:
        threading.excepthook = before


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def run_command(main: Callable[[], None], program: str) -> None:
    """Run `main` and end the process with code 2 and the message's lines, without a traceback, on a [`UserError`].

    A full disk is one, too. Ctrl-C ends it with code 130. Under a launcher only rank 0 prints, so that the lines
    appear once. Every other exception passes through: a failure that is not the user's keeps its traceback.

    Args:
        main (`Callable`): the command's body.
        program (`str`): the name that starts the printed line, such as `"sigphi train-siglip"`.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    _show_log(logging.INFO if is_first else logging.ERROR)
    try:
        with full_disks():
            main()
    except UserError as error:
        if is_first:
            sys.stderr.write(f"{program}: error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _show_log(level: int) -> None:
    """Let this package's log reach standard error, also that of a module that runs as the program itself."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("sigphi", "__main__"):
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers = [handler]
    # At import it warns that an optional kernel for CPUs is missing, in front of whatever the command has to say.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


__all__ = ["INTERRUPTED", "UserError", "check_gradio", "full_disks", "printable", "run_command", "worker_errors"]
