import csv
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from sigphi.train.base_lm import train_tokenizer
from sigphi.train.data import distinct_images, load_cifar10_qa, main
from sigphi.train.data_build import build_csv
from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES, ImageFacts, batch_facts, image_facts
from sigphi.train.images import decode_images, load_images
from sigphi.train.judging import competing_values, is_correct
from sigphi.train.metrics import label_derangement
from sigphi.train.qa_csv import read_qa_csv
from sigphi.train.questions import YES_NO_TYPES, QuestionAnswer, make_questions
from sigphi.train.synthetic import IMAGE_FEATURES

SHARED = Path(__file__).parents[2] / "shared" / "data"
SIZES = {"train": 20, "test": 10}
SYNTHETIC = "synthetic:20"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "qa.csv"
    build_csv(path, "synthetic:200", "train")
    return path


def test_a_built_csv_is_in_the_contract_and_true_to_its_images(built: Path) -> None:
    columns = pd.read_csv(built, nrows=0).columns.tolist()
    assert columns == [
        *("Dataset_Index", "Split", "Class_Label"),
        *(f"{letter}{pair}" for pair in range(1, 6) for letter in "QATS"),
    ]
    dataset = load_cifar10_qa(built, "synthetic:200", eval_fraction=0)["train"]
    for joined in dataset.select(range(200)):
        facts = image_facts(np.asarray(joined["image"]), joined["label"])
        if joined["question_type"] in ("dominant_color", "background_color", "brightness", "contrast", "vividness"):
            assert joined["short_answer"] == getattr(facts, joined["question_type"])
        if joined["question_type"] == "object":
            assert joined["short_answer"] == CLASS_NAMES[joined["label"]]
        assert is_correct(joined["answer"], joined["short_answer"], joined["question_type"])


def test_questions_of_an_image_depend_on_the_seed_only(tmp_path: Path, built: Path) -> None:
    def lines(**options: Any) -> list[str]:
        build_csv(tmp_path / "qa.csv", "synthetic:200", "train", **options)
        return (tmp_path / "qa.csv").read_text(encoding="utf-8").split("\n")

    whole = built.read_text(encoding="utf-8").split("\n")
    assert lines() == whole
    assert lines(num_images=50)[:51] == whole[:51]
    assert lines(num_images=50, seed=1)[1:51] != whole[1:51]
    assert lines(num_images=50, phrasing="held-out")[1:51] != whole[1:51]


def test_no_question_of_the_held_out_phrasing_is_one_of_training(tmp_path: Path, built: Path) -> None:
    output = str(tmp_path / "qa.csv")
    main(["build", "--images", "synthetic:200", "--output", output, "--phrasing", "held-out"])
    train, held_out = pd.read_csv(built), pd.read_csv(output)
    for pair in range(1, 6):
        # The same types about the same image, in other words.
        assert (train[f"T{pair}"] == held_out[f"T{pair}"]).all()
    asked = [{text for pair in range(1, 6) for text in table[f"Q{pair}"]} for table in (train, held_out)]
    assert not asked[0] & asked[1]


def test_fewer_questions_leave_the_other_pairs_empty(tmp_path: Path) -> None:
    build_csv(tmp_path / "qa.csv", SYNTHETIC, "train", questions_per_image=2)
    table = read_qa_csv(tmp_path / "qa.csv", None, SIZES)
    assert (len(table.rows), table.num_empty) == (40, 60)
    assert table.rows.groupby("line")["question_type"].agg(lambda types: "object" in set(types)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "--num-images 0: synthetic:20, split train, has 1 to 20 to give"),
        ({"num_images": 21}, "--num-images 21"),
        ({"questions_per_image": 6}, "`questions_per_image` is 6; a row holds 1 to 5 questions"),
        ({"split": "val"}, "have no split 'val'"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_csv(tmp_path / "qa.csv", SYNTHETIC, **{"split": "train"} | options)
    assert os.listdir(tmp_path) == []


def test_a_csv_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "qa.csv"
    output.write_text("old")

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match="--output .*qa.csv cannot be written: No space left on device"):
        build_csv(output, SYNTHETIC, "train")
    assert output.read_text() == "old" and os.listdir(tmp_path) == ["qa.csv"]
    with pytest.raises(UserError, match="there is no folder .*none; create it first"):
        build_csv(tmp_path / "none" / "qa.csv", SYNTHETIC, "train")


def test_the_command_builds_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "qa.csv")
    main(["build", "--images", "synthetic:30", "--image-split", "train", "--output", output, "--num-images", "12"])
    table = pd.read_csv(output)
    assert table["Dataset_Index"].tolist() == list(range(12))
    assert table["Class_Label"].tolist() == [CLASS_NAMES[i] for i in load_images("synthetic:12", "train")["label"]]
    assert capsys.readouterr().out == f"{output}: written\n"


def test_a_tokenizer_of_the_training_texts_reads_held_out_questions_as_well(tmp_path: Path, built: Path) -> None:
    build_csv(tmp_path / "qa.csv", "synthetic:200", "train", phrasing="held-out")
    asked = [
        [text for pair in range(1, 6) for text in pd.read_csv(path)[f"Q{pair}"]]
        for path in (built, tmp_path / "qa.csv")
    ]
    tokenizer = train_tokenizer(asked[0], 1024)
    tokens_per_word = [
        sum(map(len, tokenizer(texts)["input_ids"])) / sum(len(text.split()) for text in texts) for texts in asked
    ]
    assert tokens_per_word[1] < 1.1 * tokens_per_word[0]


# ---------------------------------------------------------------------------------------------------------------------
# Against a truth that is known by construction

# Plain words for plain colors; nothing here comes from the rules that are tested.
PLAIN_COLORS = {
    "black": (12, 12, 12),
    "white": (245, 245, 245),
    "gray": (135, 135, 135),
    "red": (215, 20, 20),
    "orange": (250, 125, 20),
    "yellow": (248, 232, 40),
    "green": (30, 150, 40),
    "blue": (30, 75, 210),
    "purple": (125, 35, 155),
    "brown": (105, 60, 20),
    "pink": (250, 140, 195),
}
ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}
WHERE = dict(zip(CLASS_NAMES, "sky road sky house forest house pond farm sea road".split(), strict=True))


def level(value: float, low: float, high: float, names: tuple[str, str, str]) -> str:
    return names[0] if value < low else names[1] if value < high else names[2]


def brighter(first: float, second: float, names: tuple[str, str]) -> str:
    return "" if abs(first - second) < 10 else names[0] if first > second else names[1]


def known_picture(rng: random.Random) -> tuple[np.ndarray, dict[str, str]]:
    """A square on a plain background, lighter or darker below, and what is true of it."""
    background, center = rng.choice(list(PLAIN_COLORS)), rng.choice(list(PLAIN_COLORS))
    pixels = np.empty((32, 32, 3), dtype=np.uint8)
    pixels[:] = [min(255, max(0, value + rng.randint(-8, 8))) for value in PLAIN_COLORS[background]]
    pixels[6:26, 6:26] = [min(255, max(0, value + rng.randint(-8, 8))) for value in PLAIN_COLORS[center]]
    pixels[5:16, 3:29] = rng.choice((pixels[5:16, 3:29], pixels[20, 20], pixels[0, 0]))
    pixels[8:24, 8:24] = pixels[20, 20]
    luma = pixels @ np.array([0.2126, 0.7152, 0.0722])
    chroma = np.ptp(pixels.astype(int), axis=-1)
    frame = [luma[y, x] for y in range(32) for x in range(32) if min(x, y) < 3 or max(x, y) > 28]
    name = rng.choice(CLASS_NAMES)
    yes_no = {True: "yes", False: "no"}
    truth = {
        "object": name,
        "comparison": name,
        "category": "animal" if name in ANIMALS else "vehicle",
        "living": yes_no[name in ANIMALS],
        "habitat": WHERE[name],
        "can_fly": yes_no[name in ("bird", "airplane")],
        "can_swim": yes_no[name in ("deer", "dog", "frog", "horse")],
        "carries_people": yes_no[name in {"airplane", "automobile", "horse", "ship", "truck"}],
        "legs": {"bird": "two"}.get(name, "four" if name in ANIMALS else "zero"),
        "wings": "two" if name in ("bird", "airplane") else "zero",
        "dominant_color": center,
        "background_color": background,
        "brightness": level(luma.mean(), 110, 135, ("dark", "medium", "bright")),
        "contrast": level(luma.std(), 43, 57, ("low", "medium", "high")),
        "vividness": level(chroma.mean(), 22, 38, ("dull", "moderate", "vivid")),
        "brighter_half": brighter(luma[:16].mean(), luma[16:].mean(), ("top", "bottom")),
        "brighter_area": brighter(luma[8:24, 8:24].mean(), float(np.mean(frame)), ("center", "border")),
    }
    return pixels, truth


def true_value(truth: dict[str, str], question_type: str, question: str) -> str:
    if question_type == "yes_no_class":
        return "yes" if truth["object"] in question else "no"
    if question_type == "counting":
        return truth["wings" if "wings" in question else "legs"]
    if question_type == "description":
        names = "object category habitat dominant_color background_color brightness contrast vividness".split()
        return "; ".join(f"{name}={truth[name]}" for name in names)
    return "cannot tell" if question_type == "refusal" else truth[question_type]


@pytest.mark.parametrize("phrasing", ["train", "held-out"])
def test_all_answers_about_pictures_known_by_construction_are_true(tmp_path: Path, phrasing: Any) -> None:
    rng = random.Random(0)
    pictures = [known_picture(rng) for _ in range(400)]
    images = datasets.Dataset.from_dict(
        {
            "img": [datasets.Image().encode_example(pixels) for pixels, _ in pictures],
            "label": [CLASS_NAMES.index(truth["object"]) for _, truth in pictures],
        },
        features=IMAGE_FEATURES,
    )
    (tmp_path / "set").mkdir()
    images.to_parquet(tmp_path / "set" / "train.parquet")
    build_csv(tmp_path / "qa.csv", str(tmp_path / "set"), "train", phrasing=phrasing)
    types = Counter()
    for _, row in pd.read_csv(tmp_path / "qa.csv").iterrows():
        for pair in range(1, 6):
            question, answer, kind, short = (row[f"{letter}{pair}"] for letter in "QATS")
            truth = true_value(pictures[row["Dataset_Index"]][1], kind, question)
            assert short == truth != "", (question, answer)
            assert is_correct(answer, truth, kind), (question, answer)
            types[kind] += 1
    assert len(types) == 19 and min(types.values()) > 30


# ---------------------------------------------------------------------------------------------------------------------
# Over real images


@pytest.fixture(scope="module")
def cifar10_facts() -> list[ImageFacts]:
    if not SHARED.is_dir():
        pytest.skip(f"no CIFAR-10 at {SHARED}")
    images = load_images(str(SHARED / "cifar10"), "test")
    pixels = decode_images(images, range(len(images))).permute(0, 2, 3, 1).numpy()
    return batch_facts(pixels, images["label"][:])


def test_levels_are_filled_about_evenly(cifar10_facts: list[ImageFacts]) -> None:
    for name in ("brightness", "contrast", "vividness"):
        shares = Counter(getattr(facts, name) for facts in cifar10_facts)
        assert len(shares) == 3 and all(0.3 < count / 10_000 < 0.36 for count in shares.values()), name


def expected_score(asked: QuestionAnswer, other: ImageFacts) -> float:
    """How often a perfect model is right that is shown another image; where that leaves it open, it guesses."""
    kind, question = asked.question_type, asked.question
    if kind == "refusal":
        return 1.0
    if kind in ("object", "comparison"):
        return float(asked.short_answer == other.object_name)
    if kind == "yes_no_class":
        return float(asked.short_answer == ("yes" if other.object_name in question else "no"))
    name = ("wings" if "wings" in question else "legs") if kind == "counting" else kind
    value = getattr(other, name)
    return float(asked.short_answer == value) if value else 1 / len(competing_values(kind))


@pytest.mark.parametrize("phrasing", ["train", "held-out"])
def test_looking_at_the_image_is_needed(cifar10_facts: list[ImageFacts], phrasing: Any) -> None:
    shuffled = label_derangement([facts.label for facts in cifar10_facts], seed=0)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    scores = []
    for i, facts in enumerate(cifar10_facts):
        for asked in make_questions(facts, random.Random(f"0:test:{i}"), 5, phrasing):
            answers[asked.question_type][asked.short_answer] += 1
            if asked.question_type != "description":
                scores.append(expected_score(asked, cifar10_facts[shuffled[i]]))
    # This is the image gain of a perfect model.
    assert 1 - np.mean(scores) > 0.55
    for name in YES_NO_TYPES:
        assert 0.45 < answers[name]["yes"] / answers[name].total() < 0.55, name
    for name, counts in answers.items():
        assert name == "refusal" or counts.most_common(1)[0][1] < 0.9 * counts.total(), name


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no CIFAR-10 at {SHARED}")
def test_a_csv_over_local_cifar10(tmp_path: Path) -> None:
    build_csv(tmp_path / "qa.csv", str(SHARED / "cifar10"), "test", num_images=100)
    dataset = load_cifar10_qa(tmp_path / "qa.csv", str(SHARED / "cifar10"))
    assert len(dataset["train"]) + len(dataset["eval"]) == 500
    images, _ = distinct_images(dataset["train"])
    assert decode_images(images, range(len(images))).shape == (len(images), 3, 32, 32)
    first = dataset["train"][0]
    assert (first["dataset_index"], CLASS_NAMES[first["label"]]) == (0, "cat")


def test_the_types_of_the_questions_can_be_chosen(tmp_path: Path) -> None:
    words = ["--images", "synthetic", "--num-images", "30", "--output", str(tmp_path / "qa.csv")]
    types = ["object", "category", "comparison", "counting", "habitat"]
    main(["build", *words, "--question-types", *types])
    with (tmp_path / "qa.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row[f"T{pair}"] for row in rows for pair in range(1, 6)} == set(types)


@pytest.mark.parametrize(
    ("types", "message"),
    [(["object", "smell"], "--question-types smell: it has to be of"), (["object"], "1 of these fit every image")],
)
def test_types_that_do_not_suffice_are_user_errors(types: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main(["build", "--images", "synthetic", "--output", str(tmp_path / "qa.csv"), "--question-types", *types])
