import re
from pathlib import Path

import numpy as np
import pytest

from sigphi.train import synthetic
from sigphi.train.facts import (
    CARRYING_PEOPLE,
    CLASS_NAMES,
    COLOR_NAMES,
    COLOR_SHADES,
    FLYING,
    HABITATS,
    NOT_SWIMMING,
    SWIMMING,
    batch_facts,
    image_facts,
    nearest_colors,
    srgb_to_lab,
)
from sigphi.train.synthetic import synthetic_images


def color_name(*rgb: int) -> str:
    return COLOR_NAMES[nearest_colors(np.array(rgb, dtype=np.uint8))]


def image(background: tuple[int, ...], center: tuple[int, ...], size: int = 32) -> np.ndarray:
    pixels = np.full((size, size, 3), background, dtype=np.uint8)
    pixels[size // 4 : -(size // 4), size // 4 : -(size // 4)] = center
    return pixels


@pytest.mark.parametrize(
    ("rgb", "lab"),
    # The values that are commonly published for sRGB under D65.
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((128, 128, 128), (53.59, 0.0, 0.0)),
    ],
)
def test_srgb_to_lab_has_the_published_values(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    assert srgb_to_lab(np.array(rgb, dtype=np.uint8)) == pytest.approx(np.array(lab), abs=0.06)


def test_every_shade_has_the_name_of_its_color() -> None:
    for name, shades in COLOR_SHADES.items():
        for shade in shades:
            assert color_name(*bytes.fromhex(shade)) == name, shade


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((10, 12, 8), "black"),
        ((250, 250, 245), "white"),
        ((120, 121, 119), "gray"),
        ((200, 20, 20), "red"),
        ((255, 140, 0), "orange"),
        ((240, 220, 40), "yellow"),
        ((40, 120, 40), "green"),
        ((135, 180, 230), "blue"),
        ((110, 40, 150), "purple"),
        ((110, 70, 30), "brown"),
        ((255, 150, 190), "pink"),
    ],
)
def test_colors_have_their_common_name(rgb: tuple[int, ...], name: str) -> None:
    assert color_name(*rgb) == name


def test_facts_follow_the_documented_rules() -> None:
    facts = image_facts(image(background=(3, 67, 223), center=(229, 0, 0)), label=9)
    assert (facts.object_name, facts.category) == ("truck", "vehicle")
    assert (facts.background_color, facts.dominant_color) == ("blue", "red")
    luma_blue, luma_red = 0.2126 * 3 + 0.7152 * 67 + 0.0722 * 223, 0.2126 * 229
    assert facts.luminance == pytest.approx(0.75 * luma_blue + 0.25 * luma_red)
    assert facts.brightness == "dark"


@pytest.mark.parametrize(("value", "level"), [(109, "dark"), (110, "medium"), (134, "medium"), (135, "bright")])
def test_brightness_thresholds(value: int, level: str) -> None:
    gray = (value,) * 3
    assert image_facts(image(gray, gray), 0).brightness == level


def test_background_is_the_median_of_three_border_pixels() -> None:
    pixels = image((255, 255, 255), (0, 0, 0))
    pixels[:3] = (229, 0, 0)  # fewer than half of the border's pixels
    pixels[3:-3, 3:-3] = (21, 176, 26)
    assert image_facts(pixels, 0).background_color == "white"
    pixels[-3:] = pixels[:, :3] = (229, 0, 0)
    assert image_facts(pixels, 0).background_color == "red"


def test_dominant_color_is_the_most_frequent_name_not_the_mean() -> None:
    pixels = image((0, 0, 0), (255, 255, 255))
    pixels[8:14, 8:24] = (0, 0, 0)  # six of sixteen rows: the mean would be gray
    assert image_facts(pixels, 0).dominant_color == "white"


def test_a_batch_gives_the_facts_of_its_images_in_other_sizes_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2003, 8, 6, 3), dtype=np.uint8)
    labels = [i % 10 for i in range(2003)]
    facts = batch_facts(pixels, labels)
    for i in (0, 1, 1999, 2000, 2002):
        assert facts[i] == image_facts(pixels[i], labels[i])


def test_pixels_and_labels_out_of_range_are_refused() -> None:
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"got float32 of shape \(2, 32, 32, 3\)"):
        batch_facts(pixels.astype(np.float32), [0, 1])
    with pytest.raises(ValueError, match="and 1 labels"):
        batch_facts(pixels, [0])
    with pytest.raises(ValueError, match="got 0 to 10"):
        batch_facts(pixels, [0, 10])


def split_image(top: int, bottom: int) -> np.ndarray:
    pixels = np.full((32, 32, 3), top, dtype=np.uint8)
    pixels[16:] = bottom
    return pixels


@pytest.mark.parametrize(("difference", "level"), [(85, "low"), (86, "medium"), (113, "medium"), (114, "high")])
def test_contrast_thresholds(difference: int, level: str) -> None:
    # Half of the pixels at each of two values: the standard deviation is half of their difference.
    assert image_facts(split_image(20, 20 + difference), 0).contrast == level


@pytest.mark.parametrize(("chroma", "level"), [(21, "dull"), (22, "moderate"), (37, "moderate"), (38, "vivid")])
def test_vividness_thresholds(chroma: int, level: str) -> None:
    color = (100, 100 + chroma, 110)
    assert image_facts(image(color, color), 0).vividness == level


def test_vividness_is_the_mean_chroma_and_no_lightness_matters() -> None:
    black_and_white = split_image(0, 255)
    assert image_facts(black_and_white, 0).vividness == "dull"
    # A quarter of the pixels in pure red: mean chroma 64.
    assert image_facts(image((90, 90, 90), (255, 0, 0)), 0).vividness == "vivid"


@pytest.mark.parametrize(
    ("top", "bottom", "half"), [(110, 100, "top"), (109, 100, ""), (100, 110, "bottom"), (100, 109, ""), (7, 7, "")]
)
def test_a_half_is_brighter_from_ten_on(top: int, bottom: int, half: str) -> None:
    assert image_facts(split_image(top, bottom), 0).brighter_half == half


@pytest.mark.parametrize(("center", "border", "area"), [(110, 100, "center"), (100, 110, "border"), (109, 100, "")])
def test_an_area_is_brighter_from_ten_on(center: int, border: int, area: str) -> None:
    assert image_facts(image((border,) * 3, (center,) * 3), 0).brighter_area == area


def test_what_follows_from_the_class() -> None:
    gray = image((90, 90, 90), (90, 90, 90))
    table = {name: image_facts(gray, label) for label, name in enumerate(CLASS_NAMES)}
    assert {name for name, facts in table.items() if facts.can_fly == "yes"} == set(FLYING) == {"airplane", "bird"}
    assert {name for name, facts in table.items() if facts.carries_people == "yes"} == set(CARRYING_PEOPLE)
    for answer, names in (("yes", SWIMMING), ("no", NOT_SWIMMING), ("", ("bird", "cat", "ship"))):
        assert {name for name, facts in table.items() if facts.can_swim == answer} == set(names)
    assert {name: facts.habitat for name, facts in table.items()} == HABITATS
    assert {name for name, facts in table.items() if facts.living == "yes"} == {
        name for name, facts in table.items() if facts.category == "animal"
    }
    assert (table["bird"].legs, table["bird"].wings) == ("two", "two")
    assert (table["airplane"].legs, table["airplane"].wings) == ("zero", "two")
    assert (table["horse"].legs, table["horse"].wings) == ("four", "zero")
    assert (table["truck"].legs, table["truck"].wings) == ("zero", "zero")


def plain_luma(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(float), -1, 0)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_levels_and_brighter_parts_as_a_naive_twin_has_them() -> None:
    images = synthetic_images("train", 200)
    pixels = np.stack([np.asarray(row["img"]) for row in images])
    for i, facts in enumerate(batch_facts(pixels, images["label"][:])):
        luma = plain_luma(pixels[i])
        border = np.concatenate([luma[:3].ravel(), luma[-3:].ravel(), luma[3:-3, :3].ravel(), luma[3:-3, -3:].ravel()])
        area = luma[8:24, 8:24].mean() - border.mean()
        half = luma[:16].mean() - luma[16:].mean()
        chroma = np.mean([max(pixel) - min(pixel) for pixel in pixels[i].reshape(-1, 3).tolist()])
        assert facts.luminance == pytest.approx(luma.mean())
        assert facts.contrast == ["low", "medium", "high"][int(luma.std() >= 43) + int(luma.std() >= 57)]
        assert facts.vividness == ["dull", "moderate", "vivid"][int(chroma >= 22) + int(chroma >= 38)]
        assert facts.brighter_half == ("" if abs(half) < 10 else "top" if half > 0 else "bottom")
        assert facts.brighter_area == ("" if abs(area) < 10 else "center" if area > 0 else "border")


def test_the_pictures_drawn_in_code_share_nothing_with_the_rules_but_the_names_of_the_classes() -> None:
    source = Path(synthetic.__file__).read_text(encoding="utf-8")
    assert re.findall(r"^(?:from|import) sigphi.*", source, re.MULTILINE) == [
        "from sigphi.train.facts import CLASS_NAMES"
    ]
