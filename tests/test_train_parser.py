"""Options from dataclasses and YAML files."""

import dataclasses
from enum import Enum
from typing import Literal

import pytest
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from sigphi.train.errors import UserError
from sigphi.train.parser import parse_arguments


class Pooling(Enum):
    LAST = "last"
    MEAN = "mean"


@dataclasses.dataclass
class DataOptions:
    _argument_group_name = "data"

    input_csv: str = dataclasses.field(metadata={"help": "the CSV of questions and answers"})
    max_images: int | None = None
    names: list[str] = dataclasses.field(default_factory=lambda: ["cat"])
    image_split: Literal["train", "test"] = "train"
    pooling: Pooling = Pooling.LAST
    shuffle: bool = True
    ratio: float = dataclasses.field(default=0.5, metadata={"help": "part of the images, at most 1"})

    def __post_init__(self):
        if self.ratio > 1:
            raise ValueError(f"`ratio` has to be at most 1, got {self.ratio}.\nSecond line.")
        if self.ratio < 0:
            raise UserError(f"`ratio` is {self.ratio}")


@dataclasses.dataclass
class TrainOptions(TrainingArguments):
    _argument_group_name = "our training"

    per_device_train_batch_size: int = HfArg(default=8, aliases=["--batch-size"], help="examples per step")
    learning_rate: float = dataclasses.field(default=3e-4, metadata={"help": "the peak"})
    text_tower: "str | None" = dataclasses.field(default="microsoft/phi-2", metadata={"help": "a repo or folder"})


def parse(*words, types=(DataOptions,)):
    return parse_arguments(types, [str(word) for word in words], "sigphi fake")


def message(*words, types=(DataOptions,)) -> str:
    with pytest.raises(UserError) as error:
        parse(*words, types=types)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def config(tmp_path):
    def write(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_a_recipe_is_a_config_by_name(tmp_path):
    recipes = [tmp_path / "small.yaml", tmp_path / "large-one.yaml"]
    for number, path in enumerate(recipes):
        path.write_text(f"input_csv: {path.stem}\nmax_images: {number}\n")

    def parse(*words: str) -> DataOptions:
        return parse_arguments([DataOptions], list(words), "sigphi train", recipes=recipes)[0]

    chosen = parse("--recipe", "large-one")
    assert (chosen.input_csv, chosen.max_images) == ("large-one", 1)
    assert parse("--recipe", "small", "--max-images", "7").max_images == 7
    with pytest.raises(UserError, match="invalid choice: 'x' .*small.*large-one"):
        parse("--recipe", "x")
    with pytest.raises(UserError, match="--recipe and --config both give defaults: leave one of them out"):
        parse("--recipe", "small", "--config", str(recipes[0]))
    with pytest.raises(UserError, match="there is no option `--recipe`"):
        parse_arguments([DataOptions], ["--recipe", "small"], "sigphi train")


@pytest.mark.parametrize("flag", ["--input_csv", "--input-csv"])
def test_both_spellings(flag):
    (options,) = parse(flag, "a.csv")
    assert options == DataOptions(input_csv="a.csv")


def test_words_of_the_process_are_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prog", "--input-csv", "a.csv"])
    assert parse_arguments([DataOptions], None, "sigphi fake")[0].input_csv == "a.csv"


def test_a_file_beside_the_script_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "prog.args").write_text("--ratio 0.1")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "prog.py"), "--input-csv", "a.csv"])
    assert parse_arguments([DataOptions], None, "sigphi fake")[0].ratio == 0.5


def test_training_arguments_with_alias(tmp_path):
    words = ["--input-csv", "a.csv", "--batch-size", 2, "--output_dir", tmp_path, "--use_cpu", "--max-steps", 3]
    data, train = parse(*words, types=(DataOptions, TrainOptions))
    assert data.input_csv == "a.csv"
    assert (train.per_device_train_batch_size, train.max_steps, train.learning_rate) == (2, 3, 3e-4)
    assert train.output_dir == str(tmp_path)


def test_config_values_are_converted_like_options(config, tmp_path):
    path = config(
        f"output_dir: {tmp_path}\n"
        "learning_rate: 1e-3\n"
        "batch-size: 4\n"
        "save-strategy: no\n"
        "use_cpu: yes\n"
        "lr_scheduler_kwargs:\n  min_lr: 1e-6\n"
        "text_tower: 123\n"
    )
    (train,) = parse("--config", path, types=(TrainOptions,))
    assert (train.learning_rate, train.per_device_train_batch_size, train.text_tower) == (1e-3, 4, "123")
    assert train.save_strategy == "no"
    assert train.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_config_gives_required_options_lists_and_choices(config):
    path = config("input_csv: a.csv\nnames: [dog, -5, no]\nimage-split: test\npooling: mean\nshuffle: no\n")
    (options,) = parse("--config", path)
    assert options.input_csv == "a.csv"
    assert options.names == ["dog", "-5", "no"]
    assert options.image_split == "test"
    assert options.pooling == "mean"
    assert options.shuffle is False


def test_options_override_the_config_wherever_they_stand(config):
    path = config("input_csv: a.csv\nratio: 0.1\nshuffle: false\nnames: [a, b]\n")
    (options,) = parse("--ratio", 0.2, f"--config={path}", "--shuffle", "--names", "c")
    assert (options.ratio, options.shuffle, options.names) == (0.2, True, ["c"])


def test_no_flag_overrides_the_config(config):
    (options,) = parse("--config", config("input_csv: a.csv\nshuffle: true"), "--no-shuffle")
    assert options.shuffle is False


def test_empty_config_changes_nothing(config):
    assert parse("--config", config("# nothing yet\n"), "--input-csv", "a.csv") == (DataOptions(input_csv="a.csv"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ratio: 0.1\ninput_cvs: a", "line 2: there is no option `input_cvs`. Did you mean `input_csv`?"),
        ("no_shuffle: true", "line 1: there is no option `no_shuffle`."),
        ("config: other.yaml", "line 1: there is no option `config`."),
        ("ratio: much", "line 1: `ratio`: invalid float value: 'much'"),
        ("ratio: [1, 2]", "line 1: `ratio`: takes one value, got a list"),
        ("ratio: {a: 1}", "line 1: `ratio`: invalid float value"),
        ("max_images:", "line 1: `max_images`: has no value, give one or remove the line"),
        ("names: []", "line 1: `names`: has no value, give one or remove the line"),
        ("image_split: validation", "line 1: `image_split`: invalid choice: 'validation'"),
        ("shuffle: maybe", "line 1: `shuffle`: Truthy value expected: got maybe"),
        ("- a\n- b", "has to hold lines of the form `name: value`"),
        ("just words", "has to hold lines of the form `name: value`"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_config_is_named(config, text, expected):
    path = config(text)
    found = message("--config", path, "--input-csv", "a.csv")
    assert str(path) in found
    assert expected in found


def test_config_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert message("--config", missing) == f"`--config {missing}` cannot be read: No such file or directory."
    assert "cannot be read: Is a directory" in message("--config", tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read: not a text file" in message("--config", binary)
    assert "expected one argument" in message("--config")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--input-cvs", "a"],
            "there is no option `--input-cvs`. Did you mean `--input-csv`? See `sigphi fake --help`.",
        ),
        (["--input", "a"], "there is no option `--input`."),
        (["--zzz=1"], "there is no option `--zzz`. See `sigphi fake --help`."),
        ([], "the following arguments are required: --input-csv. See `sigphi fake --help`."),
        (["--input-csv", "a", "b"], "unexpected argument `b`."),
        (["--input-csv", "a", "-x"], "unexpected argument `-x`."),
        (["--input-csv", "a", "--max-images", "1.5"], "argument --max-images: invalid int value: '1.5'."),
        (["--input-csv"], "argument --input-csv: expected one argument."),
        (["--input-csv", "a", "--ratio", "2"], "`ratio` has to be at most 1, got 2.0. Second line."),
    ],
)
def test_a_bad_command_line_is_named(words, expected):
    assert expected in message(*words)


def test_a_user_error_of_a_dataclass_passes_unchanged():
    assert message("--input-csv", "a", "--ratio", -1) == "`ratio` is -1.0"


def test_what_training_arguments_refuses_is_a_user_error(tmp_path):
    words = ["--output-dir", tmp_path, "--use_cpu", "--load_best_model_at_end"]
    assert "load_best_model_at_end requires the save and eval strategy" in message(*words, types=(TrainOptions,))


def test_help_shows_ours_first(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", types=(DataOptions, TrainOptions))
    assert stop.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(part) for part in ("--config", "\ndata:", "\nour training:", "TrainingArguments:")]
    assert places == sorted(places)
    ours, theirs = text[: places[-1]], text[places[-1] :]
    assert "--per-device-train-batch-size, --batch-size PER_DEVICE" in ours
    assert "--learning-rate" in ours and "--learning-rate" not in theirs
    assert "--weight-decay" in theirs
    assert text.startswith("usage: sigphi fake [options]\n")


def test_help_shows_defaults_of_the_config(config, capsys):
    with pytest.raises(SystemExit):
        parse("--config", config("input_csv: mine.csv"), "--help")
    assert "(default: mine.csv)" in capsys.readouterr().out
