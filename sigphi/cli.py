"""The `sigphi` command: finds the module of a command and hands it the rest of the line.

```bash
sigphi --help
sigphi quickstart --output-dir runs/quickstart
```
"""

import difflib
import importlib
import sys

from sigphi import __version__
from sigphi.train.errors import INTERRUPTED, UserError, run_command

# Command -> its module and one line of help. Resolved on use, so that `sigphi --help` does not import torch.
COMMANDS = {
    "quickstart": ("sigphi.train.quickstart", "run the whole pipeline with tiny models, on CPU, without network"),
    "data": ("sigphi.train.data", "make, check, annotate and publish CSV files of questions and answers"),
    "plan": ("sigphi.train.plan", "tell before a training whether it fits, how long it takes, and what to change"),
    "train-siglip": ("sigphi.train.siglip", "train the image-text encoder (stage 1)"),
    "train-vlm": ("sigphi.train.vlm", "train the vision-language model on top of it (stage 2)"),
    "evaluate": ("sigphi.train.evaluation", "measure a model and write eval_results.json"),
    "ask": ("sigphi.train.ask", "answer questions about an image"),
    "serve": ("sigphi.train.serve", "answer over HTTP as OpenAI's chat completions do, on 127.0.0.1"),
    "describe": ("sigphi.train.describe", "write a detailed description of each image"),
    "demo": ("sigphi.train.demo", "ask about pictures on a page in the browser, on this machine"),
    "merge": ("sigphi.train.merge", "merge LoRA into the language model, and measure what that changes"),
    "export": ("sigphi.train.export", "write a VLM as adapter, merged or 4-bit model, and measure what that changes"),
    "replay": ("sigphi.train.replay", "run the training step again that a NaN has stopped"),
    "push": ("sigphi.train.push", "publish a model with its card on the Hub"),
    "verify": ("sigphi.train.verify", "compare a model's files with the hashes of its release, and its figures"),
    "search": ("sigphi.train.search", "find pictures by a text or another picture, in an index that it builds"),
}


def main(argv: list[str] | None = None) -> None:
    """Run `sigphi <command> ...`.

    Args:
        argv (`list[str]`, *optional*): the words after `sigphi`, by default those of this process.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if command in ("-h", "--help"):
            sys.stdout.write(help_text())
        elif command == "--version":
            sys.stdout.write(f"sigphi {__version__}\n")
        elif command in COMMANDS:
            run_command(lambda: run_module(command, arguments), f"sigphi {command}")
        else:
            run_command(lambda: reject(command), "sigphi")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def help_text() -> str:
    """Return the text of `sigphi --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return (
        "usage: sigphi <command> [options]\n\n"
        "Train, evaluate and publish small SigLIP + Phi vision-language models.\n\n"
        f"commands:\n{commands}\n\n"
        "`sigphi <command> --help` lists the options of a command, `sigphi --version` the version.\n"
    )


def run_module(command: str, arguments: list[str]) -> None:
    """Import the module of `command` and run its `main`."""
    module, _ = COMMANDS[command]
    importlib.import_module(module).main(arguments)


def reject(command: str) -> None:
    """Raise the [`UserError`] for a word that is no command."""
    closest = difflib.get_close_matches(command, COMMANDS, n=1)
    suggestion = f" Did you mean `{closest[0]}`?" if closest else ""
    raise UserError(f"there is no command `{command}`.{suggestion} See `sigphi --help`.")


__all__ = ["main"]
