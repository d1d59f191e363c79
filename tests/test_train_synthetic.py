import warnings

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from sigphi.train.facts import CLASS_NAMES, batch_facts
from sigphi.train.synthetic import synthetic_images


def pixels_and_labels(images: Dataset) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([np.asarray(row["img"]) for row in images]), np.array(images["label"][:])


@pytest.fixture(scope="module")
def train() -> tuple[np.ndarray, np.ndarray]:
    return pixels_and_labels(synthetic_images("train", 2000))


@pytest.fixture(scope="module")
def test() -> tuple[np.ndarray, np.ndarray]:
    return pixels_and_labels(synthetic_images("test", 1000))


def test_features_are_those_of_cifar10() -> None:
    images = synthetic_images("train", 3)
    assert images.features == {"img": Image(), "label": ClassLabel(names=list(CLASS_NAMES))}
    assert images[0]["img"].size == (32, 32) and images[0]["img"].mode == "RGB"


def test_every_ten_pictures_hold_each_class_once(train: tuple[np.ndarray, np.ndarray]) -> None:
    blocks = np.sort(train[1].reshape(-1, 10), axis=1)
    assert (blocks == np.arange(10)).all()
    assert not (train[1].reshape(-1, 10) == np.arange(10)).all()


def test_same_arguments_give_same_pictures_and_a_larger_set_starts_with_the_smaller() -> None:
    first, longer, reseeded = (synthetic_images("train", *args) for args in ((13,), (25,), (13, 1)))
    pixels = pixels_and_labels(first)[0]
    assert (pixels == pixels_and_labels(longer)[0][:13]).all()
    assert first["label"][:] == longer["label"][:13]
    assert (pixels != pixels_and_labels(reseeded)[0]).any(axis=(1, 2, 3)).all()


def test_no_picture_occurs_twice_or_in_both_splits(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> None:
    pictures = [picture.tobytes() for picture in (*train[0], *test[0])]
    assert len(set(pictures)) == 3000


def test_a_linear_model_on_pixels_does_not_learn_the_class(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> None:
    inputs, test_inputs = (split[0].reshape(len(split[0]), -1) / 255 for split in (train, test))
    with warnings.catch_warnings():
        # Further iterations fit the training pictures only.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(max_iter=60).fit(inputs, train[1])
    assert probe.score(inputs, train[1]) > 0.4
    assert probe.score(test_inputs, test[1]) < 0.5


def test_the_mean_color_says_nothing_about_the_class(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> None:
    inputs, test_inputs = (split[0].mean(axis=(1, 2)) / 255 for split in (train, test))
    assert LogisticRegression().fit(inputs, train[1]).score(test_inputs, test[1]) < 0.2


def test_silhouettes_of_two_classes_differ_more_than_those_of_one() -> None:
    """With polarity removed, the mean silhouette of the nearest class is mostly the right one."""

    def silhouettes(images: Dataset) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = pixels_and_labels(images)
        border = np.median(pixels[:, 0].reshape(len(pixels), -1, 3), axis=1)[:, None, None]
        is_object = np.abs(pixels.astype(int) - border).max(axis=-1) > 60
        rows, columns = np.indices((32, 32))
        centered = []
        for mask in is_object:
            top, left = rows[mask].min(), columns[mask].min()
            height, width = rows[mask].max() - top + 1, columns[mask].max() - left + 1
            grid = mask[top + np.arange(16) * height // 16][:, left + np.arange(16) * width // 16]
            centered.append((grid | grid[:, ::-1]).ravel())
        return np.array(centered, dtype=float), labels

    masks, labels = silhouettes(synthetic_images("train", 500))
    test_masks, test_labels = silhouettes(synthetic_images("test", 300))
    means = np.stack([masks[labels == label].mean(axis=0) for label in range(10)])
    nearest = ((test_masks[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == test_labels).mean() > 0.85


def test_colors_and_brightness_are_varied_and_mostly_tell_object_from_background(
    train: tuple[np.ndarray, np.ndarray],
) -> None:
    facts = batch_facts(train[0], train[1].tolist())
    for name, num_values in (("dominant_color", 11), ("background_color", 11), ("brightness", 3)):
        values, counts = np.unique([getattr(fact, name) for fact in facts], return_counts=True)
        assert len(values) == num_values, name
        assert counts.max() < 0.55 * len(facts), name
    assert np.mean([fact.dominant_color != fact.background_color for fact in facts]) > 0.5


@pytest.mark.parametrize(("split", "num_images"), [("validation", 10), ("train", 0)])
def test_arguments_out_of_range_are_refused(split: str, num_images: int) -> None:
    with pytest.raises(ValueError, match=f"got {split!r}, {num_images}"):
        synthetic_images(split, num_images)  # type: ignore[arg-type]
