"""Sets of images and texts as others publish them."""

import csv
import io
import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.train.errors import UserError
from sigphi.train.image_texts import StoredImages, hold_out, load_image_texts


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """`size` is width and height."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows_of(numbers: list[int | None], texts: list[Any], **names: str) -> datasets.Dataset:
    pictures = [None if number is None else picture(number) for number in numbers]
    columns = {names.get("image", "image"): pictures, names.get("text", "text"): texts}
    return datasets.Dataset.from_dict(columns).cast_column(names.get("image", "image"), datasets.Image())


def saved(folder: Path, rows: datasets.Dataset) -> str:
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    return str(folder)


def pixels_of(rows: datasets.Dataset) -> list[np.ndarray]:
    return [np.asarray(image) for image in rows.cast_column("image", datasets.Image(mode="RGB"))["image"]]


def test_rows_of_one_image_become_one(tmp_path):
    loaded = load_image_texts(saved(tmp_path / "set", rows_of([7, 8, 7], ["a cat", " a dog\n", "an animal"])))
    assert loaded["texts"][:] == [["a cat", "an animal"], ["a dog"]]
    for pixels, number in zip(pixels_of(loaded), (7, 8), strict=True):
        assert (pixels == np.asarray(picture(number))).all()


def test_lists_of_texts_and_other_names_are_taken(tmp_path):
    rows = rows_of([1, 2], [["one", None, "  "], ["two", "zwei"]], image="jpg", text="captions")
    loaded = load_image_texts(saved(tmp_path / "set", rows), image_column="jpg", text_column="captions")
    assert loaded["texts"][:] == [["one"], ["two", "zwei"]]


def test_names_may_be_swapped(tmp_path):
    rows = rows_of([1, 2], ["one", "two"], image="text", text="image")
    loaded = load_image_texts(saved(tmp_path / "set", rows), image_column="text", text_column="image")
    assert loaded["texts"][:] == [["one"], ["two"]]


def test_rows_without_image_or_text_are_left_out_and_counted(tmp_path, caplog):
    rows = rows_of([1, None, 3, 4], ["one", "none", None, " "])
    with caplog.at_level(logging.WARNING):
        loaded = load_image_texts(saved(tmp_path / "set", rows))
    assert loaded["texts"][:] == [["one"]]
    assert "3 of 4 rows" in caplog.text


def test_a_folder_of_pictures_with_metadata_is_read(tmp_path):
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "text"))
        for number in range(3):
            picture(number).save(tmp_path / f"{number}.png")
            writer.writerow((f"{number}.png", f"picture {number}"))
    loaded = load_image_texts(str(tmp_path))
    assert sorted(loaded["texts"][:]) == [[f"picture {number}"] for number in range(3)]


@pytest.mark.parametrize("head", ["a: [", "configs: [3]"])
def test_a_broken_card_is_named(tmp_path, head):
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(UserError, match=f"--dataset {tmp_path}: it cannot be loaded .*README.md") as error:
        load_image_texts(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_zipped_folder_of_pictures_is_read(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture(5).save(pictures / "5.png")
    (pictures / "metadata.csv").write_text("file_name,text\n5.png,five\n")
    shutil.make_archive(str(tmp_path / "set" / "train"), "zip", pictures)
    loaded = load_image_texts(str(tmp_path / "set"))
    assert loaded["texts"][:] == [["five"]]
    assert (pixels_of(loaded)[0] == np.asarray(picture(5))).all()


@pytest.mark.parametrize("several", [False, True])
def test_a_set_saved_to_disk_is_read(tmp_path, several):
    rows = rows_of([1, 2], ["one", "two"])
    (datasets.DatasetDict(train=rows) if several else rows).save_to_disk(tmp_path / "set")
    files = sorted(path.name for path in (tmp_path / "set").rglob("*"))
    assert load_image_texts(str(tmp_path / "set"))["texts"][:] == [["one"], ["two"]]
    assert sorted(path.name for path in (tmp_path / "set").rglob("*")) == files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "has no split 'test'; give --dataset-split one of train"),
        ({"image_column": "img"}, "has no column 'img'; give --image-column one of image, text"),
        ({"text_column": "caption"}, "has no column 'caption'; give --text-column one of image, text"),
        ({"image_column": "text"}, "column text: .*it has to be images"),
        ({"text_column": "image"}, "column image: .*it has to be texts or lists of texts"),
        ({"config": "other"}, "cannot be loaded"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, options, message):
    source = saved(tmp_path / "set", rows_of([1], ["one"]))
    with pytest.raises(UserError, match=message):
        load_image_texts(source, **options)


def test_sets_that_cannot_be_read_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="--dataset nobody/nothing"):
        load_image_texts("nobody/nothing")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_image_texts(str(tmp_path))
    with pytest.raises(UserError, match="no row has both"):
        load_image_texts(saved(tmp_path / "set", rows_of([None, 2], ["one", ""])))


def test_an_image_is_held_out_whatever_stands_beside_it(tmp_path):
    rows = load_image_texts(saved(tmp_path / "all", rows_of(list(range(200)), [f"number {n}" for n in range(200)])))
    parts = hold_out(rows, 0.25, seed=1)
    held = {digest for digest in parts["eval"]["digest"]}
    assert 30 <= len(held) <= 70 and len(held) + len(parts["train"]) == 200
    fewer = load_image_texts(saved(tmp_path / "few", rows_of(list(range(100, 0, -1)), ["again"] * 100)))
    again = hold_out(fewer, 0.25, seed=1)
    assert set(again["eval"]["digest"]) == held & set(fewer["digest"])
    assert set(hold_out(rows, 0.25, seed=2)["eval"]["digest"]) != held
    assert list(hold_out(rows, 0.0, seed=1)) == ["train"]
    with pytest.raises(UserError, match="--eval-fraction 0.001 leaves no image for eval"):
        hold_out(rows.select(range(3)), 0.001, seed=1)


def test_images_are_what_the_processor_makes_of_them(tmp_path, shared):
    processor = SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"])
    clear = picture(2, (9, 70)).convert("RGBA")
    clear.putalpha(picture(3, (9, 70)).convert("L"))
    deep = Image.fromarray(257 * np.asarray(picture(4).convert("L")).astype(np.uint16))  # 16 bits
    pictures = [picture(0, (50, 20)), picture(1, (32, 32)).convert("L"), clear, picture(5).convert("P"), deep]
    rows = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
    stored = StoredImages(rows, processor.image_processor)
    assert len(stored) == 5 and stored[torch.tensor([2, 0])].dtype == torch.uint8
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(stored.all() / 127.5 - 1, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(stored[torch.tensor([2, 0])], stored.all()[[2, 0]], atol=0, rtol=0)


@pytest.mark.parametrize("content", [b"no picture", b"half"])
def test_an_image_that_cannot_be_decoded_is_named(image_processor, content):
    if content == b"half":
        file = io.BytesIO()
        picture(1).save(file, "png")
        content = file.getvalue()[: len(file.getvalue()) // 2]
    rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    stored = StoredImages(rows.cast_column("image", datasets.Image()), image_processor)
    with pytest.raises(UserError, match="image 0 of .* cannot be decoded"):
        stored[torch.tensor([0])]
