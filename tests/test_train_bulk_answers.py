"""Answers about many images in a file: what it holds, and that no kill changes it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import Originals
from PIL import Image

from sigphi.train import ask, describe
from sigphi.train.answering import Answerer
from sigphi.train.batch_log import finished_batches
from sigphi.train.chat import Conversation, load_vlm, open_image
from sigphi.train.data import load_cifar10_qa
from sigphi.train.describe import DESCRIBE
from sigphi.train.errors import UserError
from sigphi.train.predictions import Given

IMAGES, LONGEST = "synthetic:30", 6
CSV = """\
Image_Number,Dataset_Index,Q1,A1,Q2,S2,Split
one,3,What is it?,a wrong answer,"Which color, please?",red,train
two,5,What is it?,,,,test
three,3,"Is it
a dog?",,,,train
"""


@pytest.fixture(scope="module")
def vlm_folder(make_vlm: Any, shared: Originals, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny VLM. Read only."""
    from sigphi import SigPhiProcessor

    folder = tmp_path_factory.mktemp("bulk") / "vlm"
    make_vlm().save_pretrained(folder)
    SigPhiProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.csv"
    path.write_text(CSV)
    return path


@pytest.fixture
def many_questions(tmp_path: Path) -> Path:
    """Three questions about each of twelve images."""
    path = tmp_path / "many.csv"
    asked = ("What is it?", "Which color is the dog?", "Is this a ship on the blue sea?")
    with path.open("w", newline="") as file:
        rows = [[index, "train", *asked] for index in range(12)]
        csv.writer(file).writerows([["Dataset_Index", "Split", "Q1", "Q2", "Q3"], *rows])
    return path


def run(vlm_folder: str, source: list[str], output: Path, *options: str, command: Any = ask) -> list[dict[str, str]]:
    """The rows of the file that a command writes."""
    command.main([vlm_folder, *source, "--output", str(output), "--max-new-tokens", str(LONGEST), *options])
    assert sorted(path.name for path in output.parent.glob(f"{output.name}*")) == [output.name, f"{output.name}.json"]
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def alone(vlm_folder: str, image: Any, question: str) -> Given:
    """What `sigphi ask MODEL IMAGE -q QUESTION` answers."""
    model, processor = load_vlm(vlm_folder)
    image = open_image(image, IMAGES) if isinstance(image, str) else image
    return Conversation(model, processor, image, LONGEST).ask(question)


# What the file holds -------------------------------------------------------------------------------------------------


def test_a_csv_is_answered_as_each_question_alone(vlm_folder, questions, tmp_path, capsys):
    rows = run(vlm_folder, ["--csv", str(questions), "--images", IMAGES], tmp_path / "answers.csv")
    assert capsys.readouterr().out == f"{tmp_path / 'answers.csv'}: 4 questions about 2 images\n"
    header = ["Image_Number", "Dataset_Index", "Q1", "A1", "Q2", "S2", "Split", "A2", "Q3", "A3", "Q4", "A4"]
    header += ["Q5", "A5", *(f"Confidence{pair}" for pair in range(1, 6))]
    assert list(rows[0]) == header
    assert [row["Image_Number"] for row in rows] == ["one", "two", "three"]
    assert rows[0]["S2"] == "red" and rows[2]["Q1"] == "Is it\na dog?"
    asked = [(0, 1, "train:3"), (0, 2, "train:3"), (1, 1, "test:5"), (2, 1, "train:3")]
    for row, pair, image in asked:
        expected = alone(vlm_folder, image, rows[row][f"Q{pair}"])
        assert rows[row][f"A{pair}"] == expected.text
        assert float(rows[row][f"Confidence{pair}"]) == pytest.approx(expected.confidence, abs=2e-4)
    filled = sum(row[f"{name}{pair}"] != "" for row in rows for name in ("A", "Confidence") for pair in range(1, 6))
    assert filled == 2 * len(asked)


def test_the_answers_can_be_evaluated_and_trained_on(vlm_folder, questions, tmp_path):
    run(vlm_folder, ["--csv", str(questions), "--images", IMAGES], tmp_path / "answers.csv")
    data = load_cifar10_qa(tmp_path / "answers.csv", IMAGES, eval_fraction=0)["train"]
    assert list(zip(data["split"], data["dataset_index"], strict=True)) == [
        ("train", 3),
        ("train", 3),
        ("test", 5),
        ("train", 3),
    ]


def test_a_split_that_an_option_names_is_written(vlm_folder, tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text("Dataset_Index,Q1\n7,What is it?\n")
    source = ["--csv", str(path), "--images", IMAGES, "--image-split", "test"]
    (row,) = run(vlm_folder, source, tmp_path / "answers.csv")
    assert row["Split"] == "test" and row["A1"] == alone(vlm_folder, "test:7", "What is it?").text


def test_withheld_answers_are_kept_and_marked(vlm_folder, questions, tmp_path, capsys):
    source = ["--csv", str(questions), "--images", IMAGES]
    plain = run(vlm_folder, source, tmp_path / "plain.csv")
    sure = sorted(float(row["Confidence1"]) for row in plain)
    below = (sure[0] + sure[1]) / 2
    capsys.readouterr()
    rows = run(vlm_folder, source, tmp_path / "marked.csv", "--abstain-below", str(below))
    assert f"answers with less confidence than {below}\n" in capsys.readouterr().out
    assert [{name: row[name] for name in plain[0]} for row in rows] == plain
    for row in rows:
        assert row["Abstained1"] == ("yes" if float(row["Confidence1"]) < below else "no")
        assert row["Abstained3"] == ""
    assert {row["Abstained1"] for row in rows} == {"yes", "no"}


def test_descriptions_of_a_csv_are_a_csv_of_each_image_once(vlm_folder, questions, tmp_path):
    source = ["--csv", str(questions), "--images", IMAGES]
    rows = run(vlm_folder, source, tmp_path / "descriptions.csv", command=describe)
    assert [(row["Dataset_Index"], row["Split"]) for row in rows] == [("3", "train"), ("5", "test")]
    for row, image in zip(rows, ("train:3", "test:5"), strict=True):
        assert row["Q1"] == DESCRIBE and row["A1"] == alone(vlm_folder, image, DESCRIBE).text
    assert len(load_cifar10_qa(tmp_path / "descriptions.csv", IMAGES, eval_fraction=0)["train"]) == 2


@pytest.fixture
def picture_set(tmp_path: Path, images: list[Image.Image]) -> tuple[str, list[Image.Image | None]]:
    """A saved set of pictures of several sizes: one is there twice, and one row has none."""
    pictures = [*images, None, images[0]]
    asked = ["What is it?", "Which color?", None, "A dog?", "Which color?"]
    features = datasets.Features({"photo": datasets.Image(), "asked": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"photo": pictures, "asked": asked}, features=features)
    datasets.DatasetDict({"all": rows}).save_to_disk(tmp_path / "set")
    return str(tmp_path / "set"), pictures


def test_a_question_is_asked_of_each_image_of_a_set(vlm_folder, picture_set, tmp_path, caplog):
    name, pictures = picture_set
    source = ["--dataset", name, "--dataset-split", "all", "--image-column", "photo"]
    rows = run(vlm_folder, source, tmp_path / "answers.csv", "-q", "What is it?")
    assert list(rows[0]) == ["Row", "Question", "Answer", "Confidence"]
    assert [row["Row"] for row in rows] == ["0", "1", "2", "4"]
    assert "1 of 5 rows have no image or no question: left out" in caplog.text
    for row in rows:
        assert row["Answer"] == alone(vlm_folder, pictures[int(row["Row"])], "What is it?").text
    described = run(vlm_folder, source, tmp_path / "descriptions.csv", command=describe)
    assert [row["Question"] for row in described] == [DESCRIBE] * 4


def test_a_set_brings_its_own_questions(vlm_folder, picture_set, tmp_path):
    name, pictures = picture_set
    source = ["--dataset", name, "--dataset-split", "all", "--image-column", "photo", "--question-column", "asked"]
    rows = run(vlm_folder, source, tmp_path / "answers.csv", "--abstain-below", "1")
    assert [(row["Row"], row["Question"]) for row in rows] == [
        ("0", "What is it?"),
        ("1", "Which color?"),
        ("4", "Which color?"),
    ]
    for row in rows:
        assert row["Answer"] == alone(vlm_folder, pictures[int(row["Row"])], row["Question"]).text
        assert row["Abstained"] == "yes"


# Going on ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a process where it stands."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """`killed_after(count)`: the batch behind so many is the last thing that this process tries."""
    real = Answerer.answer

    def arrange(count: int | None) -> list[int]:
        done: list[int] = []

        def answer(self: Answerer, pairs: Any) -> Any:
            if len(done) == count:
                raise Killed
            done.append(1)
            return real(self, pairs)

        monkeypatch.setattr(Answerer, "answer", answer)
        return done

    return arrange


def test_a_killed_run_goes_on_behind_its_finished_batches(vlm_folder, many_questions, tmp_path, killed_after):
    source = ["--csv", str(many_questions), "--images", IMAGES, "--batch-size", "4"]
    whole = killed_after(None)
    run(vlm_folder, source, tmp_path / "whole.csv")
    output = tmp_path / "broken.csv"
    for count in (2, 0, 3):
        killed_after(count)
        with pytest.raises(Killed):
            run(vlm_folder, source, output)
        assert not output.exists()
    assert len(finished_batches(tmp_path / "broken.csv.parts")) == 5
    rest = killed_after(None)
    run(vlm_folder, source, output)
    assert len(whole) == 9 and len(rest) == 4
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    again = killed_after(0)
    run(vlm_folder, source, output)
    assert again == []


def test_other_settings_do_not_go_on_and_do_not_overwrite(vlm_folder, many_questions, tmp_path, killed_after):
    source = ["--csv", str(many_questions), "--images", IMAGES]
    output = tmp_path / "answers.csv"
    killed_after(1)
    with pytest.raises(Killed):
        run(vlm_folder, source, output, "--batch-size", "4")
    killed_after(None)
    with pytest.raises(UserError, match=r"answers.csv.parts holds an unfinished run .*--batch-size: 4 before, 5 now"):
        run(vlm_folder, source, output, "--batch-size", "5")
    with pytest.raises(UserError, match="unfinished run .*--max-new-tokens: 6 before, 5 now"):
        run(vlm_folder, source, output, "--batch-size", "4", "--max-new-tokens", "5")
    # What is withheld is decided when all is answered.
    run(vlm_folder, source, output, "--batch-size", "4", "--abstain-below", "0.5")
    for options in (["--batch-size", "4"], ["--batch-size", "5", "--abstain-below", "0.5"]):
        with pytest.raises(UserError, match="--output .*answers.csv exists, and was not made with these settings"):
            run(vlm_folder, source, output, *options)
    facts = json.loads((tmp_path / "answers.csv.json").read_text())
    assert facts["questions"] == 36 and facts["settings"]["--abstain-below"] == "0.5"


def test_a_picture_that_cannot_be_read_is_named_and_what_is_answered_is_kept(vlm_folder, images, tmp_path):
    pictures: list[Any] = [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in range(3)]
    for number, picture in enumerate(images):
        picture.save(tmp_path / f"{number}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    rows = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "set")
    source = ["--dataset", str(tmp_path / "set"), "-q", "What is it?", "--batch-size", "1"]
    with pytest.raises(UserError, match=r"--dataset .*set, row 2: the image cannot be decoded .*mend or remove it"):
        run(vlm_folder, source, tmp_path / "answers.csv")
    assert len(finished_batches(tmp_path / "answers.csv.parts")) == 2


# A process that has imported everything forks one child a run, so that kills fall into the run and not into imports.
KILLING = """
import os, random, shutil, signal, time
from pathlib import Path
from sigphi.train.answer_options import AnswerArguments
from sigphi.train.bulk_answers import CsvQuestions, answer_to_file

folder, kills = Path("out"), int(os.environ["KILLS"])
arguments = AnswerArguments(
    csv=os.environ["CSV"], images="synthetic:30", batch_size=2, max_new_tokens=6, output=str(folder / "answers.csv")
    ) if folder.mkdir() is None else None

def start():
    pid = os.fork()
    if pid == 0:
        answer_to_file(os.environ["MODEL"], CsvQuestions(arguments), arguments)
        os._exit(0)
    return pid

def results():
    return {path.name: path.read_bytes() for path in folder.iterdir()}

durations = []
for _ in range(2):  # the first run reads what the next ones find in memory
    begin = time.monotonic()
    assert os.waitpid(start(), 0)[1] == 0
    durations.append(time.monotonic() - begin)
    expected = results()
    shutil.rmtree(folder), folder.mkdir()
moments, landed, resumed, completed = random.Random(0), 0, 0, 0
while landed < kills:
    pid = start()
    time.sleep(moments.uniform(0.3, 1) * min(durations))
    os.kill(pid, signal.SIGKILL)
    landed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    resumed += (folder / "answers.csv.parts").exists()
    if moments.random() < 0.3 or landed == kills:  # killed runs go on, several times in a row, until one may end
        assert os.waitpid(start(), 0)[1] == 0
        assert results() == expected
        completed += 1
        shutil.rmtree(folder), folder.mkdir()
print(landed, resumed, completed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_kills_at_random_moments_change_nothing(kills, vlm_folder, many_questions, run_child):
    printed = run_child(KILLING, MODEL=vlm_folder, CSV=many_questions, KILLS=str(kills))
    landed, resumed, completed = map(int, printed.split()[-3:])
    assert landed == kills and resumed > 0 and completed > 0
