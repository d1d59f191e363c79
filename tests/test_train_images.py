import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Image

from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images, load_images
from sigphi.train.synthetic import IMAGE_FEATURES, synthetic_images

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_folder(folder: Path, images: Dataset, split: str = "train") -> str:
    folder.mkdir(exist_ok=True)
    images.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def same_pictures(first: Dataset, second: Dataset) -> bool:
    rows = range(len(first))
    return len(first) == len(second) and torch.equal(decode_images(first, rows), decode_images(second, rows))


def test_synthetic_has_default_and_given_sizes() -> None:
    small = load_images("synthetic:20", "train")
    assert same_pictures(small, synthetic_images("train", 20))
    assert small.features == IMAGE_FEATURES
    assert len(load_images("synthetic:20", "test")) == 1000


@pytest.mark.parametrize("source", ["synthetic:", "synthetic:0", "synthetic:many"])
def test_a_wrong_synthetic_size_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=f"images '{source}': write 'synthetic', or 'synthetic:8000'"):
        load_images(source, "train")


def test_a_folder_of_parquet_files_is_read_in_order(tmp_path: Path) -> None:
    images = synthetic_images("train", 12)
    loaded = load_images(write_folder(tmp_path / "set", images), "train")
    assert loaded.features == IMAGE_FEATURES
    assert loaded["label"][:] == images["label"][:]
    assert same_pictures(loaded, images)


# YAML that is broken, and YAML that says something else than a card does.
CARDS = ["a: [", "a: \x00", "configs: [3]", "dataset_info: [1]", "configs: [{config_name: a, features: 3}]"]


@pytest.mark.parametrize("head", CARDS)
def test_a_broken_card_is_named(head: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", synthetic_images("train", 12))
    (tmp_path / "set" / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(UserError, match=f"images '{folder}': .*cannot read this folder .*README.md") as error:
        load_images(folder, "train")
    assert "\n" not in str(error.value)


def test_the_column_image_and_bare_class_indices_are_taken(tmp_path: Path) -> None:
    images = synthetic_images("train", 12)
    plain = images.cast_column("label", datasets.Value("int64")).rename_column("img", "image")
    plain = plain.add_column("id", list(range(12)))
    loaded = load_images(write_folder(tmp_path / "set", plain), "train")
    assert loaded.column_names == ["img", "label"]
    assert loaded.features["label"] == ClassLabel(names=list(CLASS_NAMES))
    assert loaded["label"][:] == images["label"][:]


def test_a_folder_of_pictures_for_each_class_is_taken(tmp_path: Path) -> None:
    for row in synthetic_images("train", 10):
        folder = tmp_path / "set" / "train" / CLASS_NAMES[row["label"]]
        folder.mkdir(parents=True)
        row["img"].save(folder / "0.png")
    loaded = load_images(str(tmp_path / "set"), "train")
    assert loaded["label"][:] == list(range(10))
    assert decode_images(loaded, [3, 3]).shape == (2, 3, 32, 32)


def test_torchvision_download_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10 as TorchvisionCifar10

    monkeypatch.setattr(TorchvisionCifar10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels.reshape(4, -1), "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASS_NAMES)}))
    loaded = load_images(str(tmp_path), "test")
    assert loaded["label"][:] == [3, 1, 4, 1]
    assert torch.equal(decode_images(loaded, range(4)), torch.from_numpy(pixels))


def test_torchvision_folder_with_missing_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match="the files in cifar-10-batches-py are not whole; download them again"):
        load_images(str(tmp_path), "train")


def test_a_missing_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", synthetic_images("train", 10))
    with pytest.raises(UserError, match="have no split 'test'; give --image-split one of train"):
        load_images(folder, "test")
    with pytest.raises(UserError, match="images 'synthetic' have no split 'all'; .* one of train, test"):
        load_images("synthetic", "all")


def test_missing_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    images = synthetic_images("train", 10).rename_column("label", "coarse")
    with pytest.raises(UserError, match="split train: no column label, only img, coarse; the schema is that of"):
        load_images(write_folder(tmp_path / "set", images), "train")


def test_other_classes_are_refused(tmp_path: Path) -> None:
    images = synthetic_images("train", 10).cast_column("label", ClassLabel(names=list("abcdefghij")))
    with pytest.raises(UserError, match="the classes are a, b, c, .*; they have to be those of CIFAR-10"):
        load_images(write_folder(tmp_path / "set", images), "train")
    plain = Dataset.from_dict(
        {"img": [synthetic_images("train", 1)[0]["img"]], "label": [10]},
        features=datasets.Features({"img": Image(), "label": datasets.Value("int64")}),
    )
    with pytest.raises(UserError, match="split train, row 0: label 10 is no class index of CIFAR-10"):
        load_images(write_folder(tmp_path / "hundred", plain), "train")
    named = plain.remove_columns("label").add_column("label", ["mushroom"])
    with pytest.raises(UserError, match="column label has to hold the class names or indices .*mushroom"):
        load_images(write_folder(tmp_path / "named", named), "train")


def test_a_column_img_without_images_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", Dataset.from_dict({"img": ["a.png"], "label": [1]}))
    with pytest.raises(UserError, match=r"column img holds Value\('string'\), it has to be a `datasets.Image`"):
        load_images(folder, "train")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read this folder .*doesn't contain any data files.*parquet"):
        load_images(str(tmp_path), "train")


def test_a_source_that_is_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(UserError, match="images './no/such/folder': there is no such folder, and a set on the Hub"):
        load_images("./no/such/folder", "train")


def test_an_unreachable_hub_is_named_with_the_way_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(source: str) -> None:
        raise ConnectionError(f"Couldn't reach {source!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="images 'uoft-cs/cifar10': .*the Hub cannot be reached; give a local folder"):
        load_images("uoft-cs/cifar10", "train")


def test_an_unknown_hub_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(source: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{source}' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(UserError, match="images 'uoft-cs/cifar11': .*no set of this id on the Hub"):
        load_images("uoft-cs/cifar11", "train")


def test_decode_images_keeps_order_and_repeats_and_gives_rgb() -> None:
    images = synthetic_images("train", 6)
    decoded = decode_images(images, [4, 0, 4])
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 3, 32, 32)
    for row, index in enumerate((4, 0, 4)):
        assert (decoded[row].permute(1, 2, 0).numpy() == np.asarray(images[index]["img"])).all()
    gray = Dataset.from_dict({"img": [images[0]["img"].convert("L")]}, features=datasets.Features({"img": Image()}))
    assert decode_images(gray, [0]).shape == (1, 3, 32, 32)


def test_decode_images_refuses_differing_sizes_and_no_images() -> None:
    pictures = [synthetic_images("train", 1)[0]["img"].resize(size) for size in ((32, 32), (48, 32))]
    images = Dataset.from_dict({"img": pictures}, features=datasets.Features({"img": Image()}))
    with pytest.raises(UserError, match="image 1 is 48x32 pixels, image 0 is 32x32"):
        decode_images(images, [1, 0])
    with pytest.raises(ValueError, match="`indices` has to hold at least one row"):
        decode_images(images, [])


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no CIFAR-10 at {CIFAR10}")
def test_local_cifar10_has_its_order() -> None:
    images = load_images(str(CIFAR10), "test")
    assert len(images) == 10_000
    assert [CLASS_NAMES[label] for label in images["label"][:5]] == ["cat", "ship", "ship", "airplane", "frog"]
    assert decode_images(images, [0, 9_999]).shape == (2, 3, 32, 32)
