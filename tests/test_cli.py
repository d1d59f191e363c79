"""`sigphi <command> ...`."""

import subprocess
import sys
import types

import pytest

import sigphi
from sigphi import cli
from sigphi.train.errors import UserError


def exit_code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code


@pytest.fixture
def fake_command(monkeypatch):
    """Install a command `fake` whose module runs the given function."""

    def install(main) -> None:
        monkeypatch.setitem(sys.modules, "fake_command", types.SimpleNamespace(main=main))
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "does nothing"))

    return install


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(argv, capsys):
    cli.main(argv)
    captured = capsys.readouterr()
    assert captured.err == ""
    for command, (_, line) in cli.COMMANDS.items():
        assert f"  {command} " in captured.out
        assert line in captured.out


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"sigphi {sigphi.__version__}\n"


def test_unknown_command_names_the_closest(capsys):
    assert exit_code(["train-vml", "--config", "x.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "sigphi: error: there is no command `train-vml`. Did you mean `train-vlm`? See `sigphi --help`.\n"
    )


def test_unknown_command_far_from_all(capsys):
    assert exit_code(["xyz"]) == 2
    assert capsys.readouterr().err == "sigphi: error: there is no command `xyz`. See `sigphi --help`.\n"


def test_a_command_gets_the_words_after_it(fake_command):
    words = []
    fake_command(words.extend)
    cli.main(["fake", "model", "--help"])
    assert words == ["model", "--help"]


def test_main_reads_the_words_of_the_process(fake_command, monkeypatch):
    words = []
    fake_command(words.extend)
    monkeypatch.setattr(sys, "argv", ["sigphi", "fake", "model"])
    cli.main()
    assert words == ["model"]


def test_a_user_error_is_one_line_and_code_2(fake_command, capsys):
    def main(argv):
        raise UserError("`a.csv`, row 3: no such image")

    fake_command(main)
    assert exit_code(["fake"]) == 2
    assert capsys.readouterr().err == "sigphi fake: error: `a.csv`, row 3: no such image\n"


def test_another_error_keeps_its_traceback(fake_command):
    def main(argv):
        raise ZeroDivisionError

    fake_command(main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_an_interrupt_is_quiet(fake_command, capsys):
    def main(argv):
        raise KeyboardInterrupt

    fake_command(main)
    assert exit_code(["fake"]) == 130
    assert capsys.readouterr().err == ""


def test_as_a_process_help_is_light():
    code = (
        "import sys, sigphi.cli; sigphi.cli.main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'yaml')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, "`sigphi --help` imported a large package"
    assert result.stdout.startswith("usage: sigphi <command>")


def test_as_a_process_data_check_loads_nothing_of_models():
    code = (
        "import sys, sigphi.train.data_check; "
        "sys.exit(any(name in sys.modules for name in ('torchvision', 'peft', 'sigphi.processing')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr or "`sigphi data check` imported a package that takes seconds"


def test_as_a_process_the_exit_code_arrives():
    result = subprocess.run([sys.executable, "-m", "sigphi", "nope"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    assert exit_code([command, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"sigphi {command}" in captured.out
    assert "Traceback" not in captured.err
