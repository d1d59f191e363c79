"""Bad input of six kinds: it ends in success or in a user error, soon and in little memory."""

import io
import json
import resource
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sigphi.train.arguments import DataArguments, VlmModelArguments, VlmTrainingArguments
from sigphi.train.chat import open_image
from sigphi.train.checkpoint_files import RECORD, checkpoints, fault_of, seal
from sigphi.train.checkpoints import read_config
from sigphi.train.csv_lines import LONGEST_LINE
from sigphi.train.data_check import check_csv
from sigphi.train.errors import UserError
from sigphi.train.evaluation import load_for_evaluation
from sigphi.train.parser import parse_arguments
from sigphi.train.qa_csv import read_qa_csv

ROOT = Path(__file__).parents[1]
NUM_IMAGES = {"train": 10, "test": 10}
HEADER = "Dataset_Index,Split," + ",".join(f"{letter}{pair}" for pair in range(1, 6) for letter in "QA")
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fuzz

    return fuzz


# Of each way to change an input. `benchmarks/fuzz.py` makes hundreds of each.
SAMPLES = {"csv": 2, "image": 12, "config": 4, "yaml": 3, "checkpoint": 1, "model folder": 1}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_of_changed_inputs_ends_as_it_should(kind, fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nothing may be asked
    inputs = fuzz.Fuzz(kind, tmp_path, seed=1)
    tallies = [inputs.run(name, change, SAMPLES[kind]) for name, change in fuzz.mutations()[kind].items()]
    assert not inputs.faults
    outcomes = [tally.outcomes for tally in tallies]
    assert sum(one["success"] for one in outcomes) and sum(one["user error"] for one in outcomes)
    assert sum(tally.parsed for tally in tallies) > sum(tally.inputs for tally in tallies) / 3


@pytest.mark.parametrize("kind", ["csv", "image", "config", "yaml", "model folder"])
def test_the_seeds_themselves_are_sound(kind, fuzz, tmp_path):
    inputs = fuzz.Fuzz(kind, tmp_path)
    outcomes = [inputs.one(files) for files in inputs.seeds]
    assert {outcome for outcome, _, _, _ in outcomes} == {"success"}, outcomes
    assert all(parsed for _, parsed, _, _ in outcomes)


def test_the_fuzz_objects_to_faults_and_to_inputs_that_no_parser_takes(fuzz, tmp_path, monkeypatch, capsys):
    def result(faults: dict[str, int], *parsed: int) -> dict[str, Any]:
        tallies = [fuzz.Tally(inputs=10, parsed=number).as_json() for number in parsed]
        return {"seeds": 1, "seconds": 0.1, "mutations": dict(zip("abc", tallies, strict=False)), "faults": faults}

    assert fuzz.objections("csv", result({}, 3, 10)) == []
    assert fuzz.objections("csv", result({"hang: x": 2}, 10, 2, 0)) == [
        "csv: 2 times hang: x",
        "csv, b: the parser took 20% of the inputs, fewer than 30%",
        "csv, c: the parser took 0% of the inputs, fewer than 30%",
    ]
    options = ["fuzz.py", "--output-dir", str(tmp_path), "--results", str(tmp_path / "fuzz.json")]
    monkeypatch.setattr(sys, "argv", [*options, "--kinds", "csv", "image"])
    monkeypatch.setattr(fuzz, "be_quiet", lambda: None)
    for shares, code in (({"csv": [9], "image": [3]}, 0), ({"csv": [9], "image": [9, 2]}, 1)):
        monkeypatch.setattr(fuzz, "run_kind", lambda kind, arguments, shares=shares: result({}, *shares[kind]))
        with pytest.raises(SystemExit) as ended:
            fuzz.main()
        assert ended.value.code == code
    assert "image, b: the parser took 20%" in capsys.readouterr().out


# CSV -----------------------------------------------------------------------------------------------------------------


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_refused_at_line_3(path: Path, what: str, most_memory: int) -> None:
    """A file whose third line begins a line or row without end is refused in so many bytes; the row before counts."""
    before = peak()
    with pytest.raises(UserError, match=f"line 3: this is not CSV .the {what} has more than 10,000,000 characters"):
        read_qa_csv(path, None, NUM_IMAGES)
    report = check_csv(path)
    [problem] = [one for one in report.problems if one.kind == "malformed row"]
    assert problem.places == ("line 3",) and report.num_pairs == 1
    assert peak() - before < most_memory


@pytest.mark.parametrize("size", [5 * LONGEST_LINE, pytest.param(10**9, marks=pytest.mark.slow)])
def test_a_line_without_end_is_refused_in_little_memory(size, tmp_path):
    path = tmp_path / "qa.csv"
    with path.open("wb") as file:
        file.write(f"{HEADER}\n0,train,What is it?,A cat.{',' * 8}\n".encode())
        file.truncate(size)  # a hole, which reads as NUL
    check_refused_at_line_3(path, "line", 300_000_000)


def test_what_is_behind_a_line_that_is_too_long_is_checked(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text(f"{HEADER}\n{'x' * (LONGEST_LINE + 5)}\n0,train,What is it?,{',' * 8}\n")
    places = {problem.kind: problem.places for problem in check_csv(path).problems}
    assert places["malformed row"] == ("line 2",)
    assert places["half-empty pair"] == ("line 3 column A1",)


# Each piece, over and over, is one row: cells of two lines, and quotes that every line closes and opens.
@pytest.mark.parametrize("piece", [b'"aa\n",', b'a","\n'])
@pytest.mark.parametrize("size", [3 * LONGEST_LINE, pytest.param(10**9, marks=pytest.mark.slow)])
def test_a_row_without_end_is_refused_in_little_memory(piece, size, tmp_path):
    path = tmp_path / "qa.csv"
    with path.open("wb") as file:
        file.write(f"{HEADER}\n0,train,What is it?,A cat.{',' * 8}\n".encode())
        for _ in range(size // 10_000_000):
            file.write(piece * (10_000_000 // len(piece)))
    check_refused_at_line_3(path, "row", 500_000_000)


def test_a_million_columns_are_refused(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text(HEADER + ",x" * 1_000_000 + "\n0,train,What is it?,A cat." + "," * 1_000_008 + "\n")
    before = peak()
    with pytest.raises(UserError, match="the header has 1000012 columns"):
        read_qa_csv(path, None, NUM_IMAGES)
    assert "too many columns" in {problem.kind for problem in check_csv(path).problems}
    assert peak() - before < 600_000_000


def test_a_header_of_many_lines_is_shown_on_one(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text('"a\nb\x1b[2J",c\n1,2\n')
    with pytest.raises(UserError) as error:
        read_qa_csv(path, None, NUM_IMAGES)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@QUICK
@given(rows=st.lists(st.tuples(st.integers(0, 9), CELLS, CELLS), min_size=1, max_size=4))
def test_any_texts_are_read_as_they_are_or_refused(rows, tmp_path):
    import csv

    path = tmp_path / "qa.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER.split(","), *([index, "train", q, a, *[""] * 8] for index, q, a in rows)])
    expected = [(index, q.strip(), a.strip()) for index, q, a in rows if q.strip() or a.strip()]
    try:
        table = read_qa_csv(path, None, NUM_IMAGES)
    except UserError as error:
        assert "\n" not in str(error).split("\nMend")[0]
        halves = any(not q or not a for _, q, a in expected)
        twice = len({one[:2] for one in expected}) < len(expected)
        assert not expected or halves or twice or "<image>" in str(rows) or "ERROR" in str(rows)
    else:
        taken = table.rows[["dataset_index", "question", "answer"]].itertuples(index=False, name=None)
        assert list(taken) == expected


# Pictures ------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes, more: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    chunks = (head, *more, (b"IDAT", data), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows_of_zeros(width: int, height: int) -> bytes:
    packer = zlib.compressobj()
    return b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()


def broken_pictures() -> dict[str, tuple[bytes, str]]:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    small = rows_of_zeros(4, 4)
    bomb = b"a\0\0" + zlib.compress(bytes(5_000_000))
    return {
        "a claim": (png(100_000, 100_000, small), "exceeds limit"),
        "a bomb": (png(12_000, 12_000, rows_of_zeros(12_000, 12_000)), "exceeds limit"),
        "a bomb of text": (png(4, 4, small, ((b"zTXt", bomb),)), "too large"),
        "a cut JPEG": (file.getvalue()[:-500], "truncated"),
        "an empty file": (b"", "cannot identify"),
        "a PostScript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot identify"),
    }


@pytest.mark.parametrize("name", broken_pictures())
def test_a_picture_that_lies_is_refused_in_little_memory(name, tmp_path):
    content, reason = broken_pictures()[name]
    (tmp_path / "picture").write_bytes(content)
    before = peak()
    with pytest.raises(UserError, match=f"this is no picture that can be read .*{reason}"):
        open_image(str(tmp_path / "picture"), "synthetic")
    assert peak() - before < 100_000_000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_gray_that_is_no_number_is_refused(value, tmp_path):
    image = Image.new("F", (3, 2), 1.0)
    image.putpixel((1, 1), value)
    image.save(tmp_path / "picture.tiff")
    with pytest.raises(UserError, match="a pixel is NaN, infinite"):
        open_image(str(tmp_path / "picture.tiff"), "synthetic")


# YAML ----------------------------------------------------------------------------------------------------------------

VLM = [VlmModelArguments, DataArguments, VlmTrainingArguments]
SOUND = "input_csv: qa.csv\nsiglip_checkpoint: encoder\nreport_to: none\nbits: 16\n"


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "options.yaml"
    path.write_text(SOUND + text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        parse_arguments(VLM, ["--config", str(path)], "sigphi train-vlm")
    assert len(str(error.value)) < 1010 and "\n" not in str(error.value)
    return str(error.value)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "line 6: write the value out in place of the alias"),
        ("label_names: &a [*a]\n", "in place of the alias"),
        (f"label_names: {'[' * 9999}{']' * 9999}\n", "nested more than 20 deep"),
        ("seed: 1\nseed: 2\n", "line 6: `seed` was given before"),
        ("batch-size: 4\nper_device_train_batch_size: 8\n", "was given before"),
        ("lr_scheduler_kwargs: {a: 2020-01-01}\n", "lr_scheduler_kwargs"),
        ("lr_scheduler_kwargs: {a: !!python/name:os.system x}\n", "could not determine a constructor"),
        ('output_dir: "a\\0b"\n', "holds a NUL character"),
        ("learning_rate: nan\n", "--learning-rate nan: it has to be a number"),
        ("weight_decay: 1e999\n", "--weight-decay inf: it has to be a number"),
        (f"seed: {'9' * 30}\n", "--seed 99999999999999999999: it has to be a number up to"),
        (f"seed: {'9' * 5000}\n", "invalid int value"),
        ("accelerator_config: none.json\n", "No such file"),
        (f"tuning: {'a' * 5000}\n", "--tuning must be one of lora, full"),
        ("seed: -1\n", "--seed -1: it has to be from 0"),
        ("per_device_train_batch_size: 0\n", "--per-device-train-batch-size 0: it has to be 1 or more"),
        ("num_train_epochs: -1\n", "--num-train-epochs -1"),
        ("lora_r: 0\n", "--lora-r 0: it has to be 1 or more"),
        ("lora_dropout: 1.5\n", "--lora-dropout 1.5: it has to be at least 0 and below 1"),
        (f"# {'x' * 1_000_001}\n", "has more than 1,000,000 characters"),
        (f"{'k' * 900}: 1\n", "there is no option `kkk"),
    ],
)
def test_options_that_grow_nest_or_are_no_numbers_are_refused(text, reason, tmp_path):
    assert reason in refusal(tmp_path, text)


@QUICK
@given(value=st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.lists(st.integers())))
def test_any_value_of_an_option_is_taken_for_itself_or_refused(value, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(SOUND + f"max_steps: {json.dumps(value)}\n", encoding="utf-8")
    try:
        _, _, arguments = parse_arguments(VLM, ["--config", str(path)], "sigphi train-vlm")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert arguments.max_steps == int(value)


# Configs and models --------------------------------------------------------------------------------------------------


@pytest.fixture
def vlm_folder(tiny_vlm: Any, tiny_vlm_processor: Any, tmp_path: Path) -> Path:
    tiny_vlm.save_pretrained(tmp_path / "vlm")
    tiny_vlm_processor.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"projector_hidden_act": 3}, "projector_hidden_act"),
        ({"logit_scale": float("nan")}, "`logit_scale` in its configuration is NaN"),
        ({"image_token_id": 10**30}, "`image_token_id` in its configuration is beyond"),
        (
            {"text_config": {"model_type": "phi", "num_hidden_layers": 10**9}},
            "`num_hidden_layers` in its configuration",
        ),
        ({"text_config": {"model_type": "nothing"}}, "nothing"),
        ({"vision_config": {"hidden_sizes": [-8, 16], "depths": [1, 1]}}, "`hidden_sizes` must hold numbers from 1"),
        ({"vision_config": {"hidden_sizes": [8], "depths": [1, 1]}}, "must name the same stages"),
        ({"vision_config": 3}, "cannot be read"),
        ({"output_hidden_states": 0.5}, "`output_hidden_states` in its configuration has to be true or false"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, reason, vlm_folder):
    change_json(vlm_folder / "config.json", **values)
    with pytest.raises(UserError, match="MODEL .*vlm: cannot be read") as error:
        read_config(str(vlm_folder), "MODEL")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "content", ["[1]", "3", "{", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "\0", " " * 10**7 + "{}"]
)
def test_a_config_of_another_form_is_refused(content, vlm_folder):
    (vlm_folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="MODEL .*vlm: cannot be read"):
        read_config(str(vlm_folder), "MODEL")


def test_a_config_of_a_larger_model_than_the_weights_is_refused_before_it_is_made(vlm_folder):
    config = json.loads((vlm_folder / "config.json").read_text())
    change_json(vlm_folder / "config.json", text_config=config["text_config"] | {"intermediate_size": 2**30})
    before = peak()
    with pytest.raises(UserError, match="its config.json describes .* parameters, and its files of weights hold"):
        load_for_evaluation(str(vlm_folder))
    assert peak() - before < 200_000_000


def test_weights_that_are_missing_are_not_drawn_at_random(vlm_folder):
    weights = load_file(vlm_folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, vlm_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 of its weights are missing .lm_head.weight"):
        load_for_evaluation(str(vlm_folder))


def test_nor_are_those_that_the_base_of_the_adapter_form_lacks(
    make_lora_vlm, tiny_vlm_processor, base_folder, tmp_path
):
    base = shutil.copytree(base_folder, tmp_path / "base")
    model = make_lora_vlm(base_language_model=str(base))
    model.save_pretrained(tmp_path / "adapter")
    tiny_vlm_processor.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_for_evaluation(str(tmp_path / "adapter"))
    expected = {name: tensor.float() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor.cpu().float(), expected[name]) for name, tensor in loaded.state_dict().items())
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.mlp.fc1.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing .model.language_model.layers.0.mlp.fc1.weight"):
        load_for_evaluation(str(tmp_path / "adapter"))


@pytest.mark.parametrize("length", [0, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_weights_with_an_absurd_length_is_refused(length, vlm_folder):
    path = vlm_folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(UserError, match="MODEL .*vlm: cannot be read"):
        load_for_evaluation(str(vlm_folder))


def test_a_chat_template_that_is_none_is_refused_when_the_model_is_loaded(vlm_folder):
    (vlm_folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="MODEL .*vlm: cannot be read"):
        load_for_evaluation(str(vlm_folder))


def test_a_tokenizer_of_a_larger_model_is_refused(vlm_folder, tokenizer):
    tokenizer.add_tokens([f"token {number}" for number in range(300)])
    tokenizer.add_tokens(["What"])
    tokenizer.save_pretrained(vlm_folder)
    with pytest.raises(UserError, match="its tokenizer has tokens up to .*, its model reads 512"):
        load_for_evaluation(str(vlm_folder))


def test_a_tokenizer_whose_image_token_is_another_one_is_refused(vlm_folder):
    path = vlm_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["z"]  # what was added behind the vocabulary moves by one
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its tokenizer gives an image 0 of its model's 1 tokens"):
        load_for_evaluation(str(vlm_folder))


@pytest.mark.parametrize("token", ["x", 1.5, [0, "x"]])
def test_a_token_that_ends_answers_and_is_no_number_is_refused(token, vlm_folder):
    path = vlm_folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": token}))
    with pytest.raises(UserError, match="generation_config.json has the eos_token_id .*no token's number"):
        load_for_evaluation(str(vlm_folder))


def test_code_that_a_folder_names_is_neither_run_nor_asked_about(vlm_folder, monkeypatch):
    class Asked:
        def readline(self, *args: Any) -> str:
            pytest.fail("a question was asked")

    monkeypatch.setattr(sys, "stdin", Asked())
    (vlm_folder / "evil.py").write_text("raise SystemExit('run')\n")
    change_json(vlm_folder / "processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.Evil"})
    change_json(vlm_folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(UserError, match="MODEL .*vlm"):
        load_for_evaluation(str(vlm_folder))


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(fuzz: Any, tmp_path: Path) -> Path:
    from fuzz_seeds import tiny_trainer

    tiny_trainer(tmp_path / "run").train()
    return tmp_path / "run" / "checkpoint-4"


@pytest.mark.parametrize(
    "record", ["[]", "{}", '{"run": {}, "files": []}', '{"run": 3, "files": {}}', "[" * 100_000, "\0"]
)
def test_a_record_of_another_form_is_a_fault(record, checkpoint):
    (checkpoint / RECORD).write_text(record)
    assert fault_of(checkpoint) == f"its {RECORD} or trainer_state.json cannot be read"


@pytest.mark.parametrize(("name", "value"), [("log_history", {}), ("total_flos", []), ("global_step", "4")])
def test_a_state_that_has_something_else_than_a_number_is_a_fault(name, value, checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    seal(checkpoint, {"options": {}})
    assert fault_of(checkpoint) == f"its {RECORD} or trainer_state.json cannot be read"


def test_a_checkpoint_that_was_renamed_or_has_no_optimizer_is_a_fault(checkpoint):
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-9"))
    assert "it was renamed: its trainer_state.json is of step 4" == fault_of(checkpoints(checkpoint.parent)[-1])
    (checkpoint / "optimizer.pt").unlink()
    seal(checkpoint, {"options": {}})
    assert fault_of(checkpoint) == "it holds no state of the optimizer, as with --save-only-model"


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_is_recorded_and_none_ends_in_a_user_error(name, checkpoint):
    from fuzz_seeds import tiny_trainer

    shutil.rmtree(checkpoint)
    checkpoint = checkpoint.with_name("checkpoint-2")
    run = json.loads((checkpoint / RECORD).read_text())["run"]
    (checkpoint / name).write_bytes(b"nothing")
    seal(checkpoint, run)
    with pytest.raises(UserError, match="--resume .*checkpoint-2: cannot be read"):
        tiny_trainer(checkpoint.parent).train(resume_from_checkpoint="newest")
