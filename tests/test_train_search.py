"""`sigphi search`: an index of pictures, queries by text and by picture, and what goes wrong."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from sigphi import SiglipResNetProcessor, cli
from sigphi.processing.processing_siglip_resnet import to_rgb
from sigphi.train import search_index
from sigphi.train.encoder_evaluation import class_embeddings, embed_texts
from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.search import nearest, result_grid, result_table, search_image, search_text
from sigphi.train.search_index import build_index, load_index, stored_pictures

SET = "synthetic:30"


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """Encoders, pictures and indexes. Read only."""
    place = tmp_path_factory.mktemp("search")
    model = shared["encoder"]
    processor = SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"])
    for name in ("encoder", "retrained", "without_tower", "towerless"):
        processor.save_pretrained(place / name)
    model.save_pretrained(place / "encoder")
    model.text_model.language_model.save_pretrained(place / "tower")
    model.config.include_text_tower = False
    for name, tower in (("without_tower", "tower"), ("towerless", "gone")):
        model.config.text_model_name_or_path = str(place / tower)
        model.save_pretrained(place / name)
    model.config.include_text_tower, model.config.text_model_name_or_path = True, None
    bias = model.vision_model.projection.bias
    bias.data[0] += 0.01
    model.save_pretrained(place / "retrained")
    bias.data[0] -= 0.01
    write_pictures(place / "pictures")
    build_index(place / "files.index", str(place / "encoder"), str(place / "pictures"), batch_size=4)
    build_index(place / "set.index", str(place / "encoder"), SET, "train", batch_size=8)
    return place


def write_pictures(place):
    """Nine pictures of every kind, in subfolders, and files beside them that are none of them."""
    (place / "test" / "deep").mkdir(parents=True)
    (place / ".thumbnails").mkdir()
    colors = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(colors)
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    picture.save(place / "b rotated.JPG", exif=exif)
    picture.save(place / "test" / "a.png")
    picture.convert("RGBA").save(place / "test" / "deep" / "rgba.webp")
    picture.convert("L").save(place / "gray.png")
    picture.convert("P").save(place / "palette.gif")
    Image.fromarray(colors[..., 0].astype(np.uint16) * 257).save(place / "16 bit.tiff")
    picture.convert("CMYK").save(place / "cmyk.jpg")
    picture.convert("1").save(place / "ünï\u202fcode \x1b[31m.bmp")
    Image.new("RGB", (1, 900), "red").save(place / "line.png")
    picture.save(place / ".thumbnails" / "a.png")
    (place / "notes.txt").write_text("no picture")


def run(capsys, *words):
    cli.main(["search", *map(str, words)])
    return capsys.readouterr().out


def fails(capsys, *words):
    """The message of a command that ends on a user's mistake."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["search", *map(str, words)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    message = error[error.index("sigphi search: error: ") :]
    assert message.count("\n") <= 2 and "Traceback" not in error
    return message


# The index -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_indexed_file_by_file(folder, tiny_encoder, tiny_encoder_processor):
    index = load_index(folder / "files.index")
    names = ["16 bit.tiff", "b rotated.JPG", "cmyk.jpg", "gray.png", "line.png", "palette.gif", "test/a.png"]
    assert index.names == [*names, "test/deep/rgba.webp", "ünï\u202fcode \x1b[31m.bmp"]
    assert index.labels == [None] * 9
    assert (index.facts.images, index.facts.image_split) == (str(folder / "pictures"), None)
    for name, embedding in zip(index.names, index.embeddings, strict=True):
        inputs = tiny_encoder_processor(images=str(folder / "pictures" / name), return_tensors="pt")
        with torch.no_grad():
            expected = tiny_encoder(**inputs).image_embeds[0]
        torch.testing.assert_close(torch.tensor(embedding), expected, rtol=1e-4, atol=1e-5)


def test_pictures_lie_upright_and_are_found_again(folder):
    index = load_index(folder / "files.index")
    row = index.names.index("b rotated.JPG")
    (picture,) = stored_pictures(index, [row])
    assert (picture.size, picture.mode) == ((40, 60), "RGB")
    assert picture.tobytes() == to_rgb(str(folder / "pictures" / "b rotated.JPG")).tobytes()


def test_a_set_is_indexed_with_its_labels(folder):
    index = load_index(folder / "set.index")
    assert index.names == [f"train:{row}" for row in range(30)]
    assert sorted(index.labels[:10]) == sorted(set(index.labels)) and len(set(index.labels)) == 10
    assert index.facts.image_split == "train"
    assert index.embeddings.shape == (30, 32)
    np.testing.assert_allclose(np.linalg.norm(index.embeddings, axis=1), 1, rtol=1e-5)


def test_the_test_split_is_what_a_set_gives_by_default(monkeypatch):
    asked = []
    rows = search_index.load_images(SET, "train")
    monkeypatch.setattr(search_index, "load_images", lambda source, split: asked.append((source, split)) or rows)
    pictures = search_index.find_pictures("somebody/a-set", None)
    assert (asked, pictures.split) == ([("somebody/a-set", "test")], "test")


def test_a_folder_with_parquet_files_or_a_split_is_a_set(tmp_path):
    rows = search_index.load_images(SET, "train")
    rows.to_parquet(tmp_path / "test-0.parquet")
    Image.new("RGB", (4, 4)).save(tmp_path / "logo.png")
    pictures = search_index.find_pictures(str(tmp_path), None)
    assert (pictures.names[:2], pictures.split) == (["test:0", "test:1"], "test")
    assert isinstance(pictures.cells.features["img"], ImageFeature)


def test_any_set_is_indexed_by_its_column_of_pictures(folder, tmp_path, capsys):
    pictures = search_index.load_images(SET, "train")["img"][:4]
    rows = Dataset.from_dict({"jpg": [*pictures, None], "caption": [["a"], [], ["b"], ["c"], ["d"]]})
    DatasetDict({"odd": rows.cast_column("jpg", ImageFeature())}).save_to_disk(tmp_path / "captions")
    words = ["build", tmp_path / "x.index", "--encoder", folder / "encoder", "--dataset", tmp_path / "captions"]
    assert "no column 'image'" in fails(capsys, *words, "--dataset-split", "odd")
    words += ["--dataset-split", "odd", "--image-column", "jpg"]
    assert "picture odd:4 cannot be read (the row has no picture)" in fails(capsys, *words)
    assert "4 images of" in run(capsys, *words, "--skip-broken", "true")
    index, same = load_index(tmp_path / "x.index"), load_index(folder / "set.index")
    assert (index.names, index.labels) == ([f"odd:{row}" for row in range(4)], [None] * 4)
    np.testing.assert_allclose(index.embeddings, same.embeddings[:4], atol=1e-5)
    run(capsys, tmp_path / "x.index", "--image", "odd:2", "--grid", tmp_path / "grid.png")
    assert [one.tobytes() for one in stored_pictures(index, [3, 1])] == [pictures[3].tobytes(), pictures[1].tobytes()]


def test_the_batch_size_does_not_matter(folder, tmp_path):
    build_index(tmp_path / "one.index", str(folder / "encoder"), SET, "train", batch_size=30)
    one, many = load_index(tmp_path / "one.index"), load_index(folder / "set.index")
    assert one.facts == many.facts and one.digests == many.digests
    np.testing.assert_allclose(one.embeddings, many.embeddings, atol=1e-5)


def test_an_index_without_a_text_tower_is_the_same(folder, tmp_path):
    build_index(tmp_path / "x.index", str(folder / "towerless"), SET, "train")
    facts = load_index(tmp_path / "x.index").facts
    assert facts.encoder_sha256 == load_index(folder / "set.index").facts.encoder_sha256
    assert facts.encoder == str(folder / "towerless")


def test_an_index_is_data_that_other_tools_read(folder):
    table = pq.read_table(folder / "set.index")
    assert table.column_names == ["name", "label", "digest", "embedding"]
    facts = json.loads(table.schema.metadata[b"sigphi_search"])
    assert facts["images"] == SET


@pytest.mark.parametrize("skip", [False, True])
def test_broken_pictures_are_named(folder, tmp_path, capsys, caplog, skip):
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    whole = (tmp_path / "pictures" / "gray.png").read_bytes()
    (tmp_path / "pictures" / "gray.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pictures" / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    words = ["build", tmp_path / "x.index", "--encoder", folder / "encoder", "--images", tmp_path / "pictures"]
    if not skip:
        message = fails(capsys, *words)
        assert "gray.png cannot be read" in message and "--skip-broken" in message
        assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
        return
    out = run(capsys, *words, "--skip-broken", "true")
    assert out.endswith("x.index: 8 images of " + str(tmp_path / "pictures") + ", 2 left out that cannot be read\n")
    index = load_index(tmp_path / "x.index")
    assert len(index.names) == 8 and not {"gray.png", "x.jpg"} & set(index.names)


def test_nothing_but_broken_pictures_is_an_error(folder, tmp_path, capsys):
    (tmp_path / "x.jpg").write_text("")
    words = ["--encoder", folder / "encoder", "--images", tmp_path, "--skip-broken", "true"]
    assert "none of its 1 pictures can be read" in fails(capsys, "build", tmp_path / "x.index", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jpg"]


def test_an_index_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    build_index(tmp_path / "x.index", str(folder / "encoder"), SET, "train")
    before = (tmp_path / "x.index").read_bytes()
    calls = []

    def embed(model, pixels):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.zeros((len(pixels), 32), np.float32)

    monkeypatch.setattr(search_index, "embed_pixels", embed)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "x.index", str(folder / "encoder"), SET, "train", batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["x.index"]
    assert (tmp_path / "x.index").read_bytes() == before


# Queries -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 7, 100])
def test_nearest_equals_its_naive_twin(top):
    embeddings = torch.nn.functional.normalize(torch.randn(50, 8), dim=-1).numpy()
    query = embeddings[17] + 0.1
    hits = nearest(embeddings, query, top)
    cosines = [sum(float(a) * float(b) for a, b in zip(row, query, strict=True)) for row in embeddings]
    expected = sorted(range(50), key=lambda row: -cosines[row])[:top]
    assert [hit.row for hit in hits] == expected
    assert [hit.cosine for hit in hits] == pytest.approx([cosines[row] for row in expected], abs=1e-6)


def test_a_text_ranks_by_the_models_own_scores(folder, tiny_encoder, tiny_encoder_processor):
    index = load_index(folder / "set.index")
    hits = search_text(index, "a {dog}", 30, templates=["It is {}.", "{}"])
    texts = embed_texts(tiny_encoder, tiny_encoder_processor, ["It is a {dog}.", "a {dog}"], 2)
    cosines = torch.tensor(index.embeddings) @ torch.nn.functional.normalize(texts.mean(0), dim=0)
    assert [hit.row for hit in hits] == cosines.argsort(descending=True).tolist()
    logits = cosines * tiny_encoder.logit_scale.exp() + tiny_encoder.logit_bias
    expected = logits.sigmoid().sort(descending=True).values.tolist()
    assert [hit.probability for hit in hits] == pytest.approx(expected, rel=1e-4)


def test_a_text_is_worded_as_for_zero_shot_classification(folder, tiny_encoder, tiny_encoder_processor):
    index = load_index(folder / "set.index")
    cats = class_embeddings(tiny_encoder, tiny_encoder_processor)[CLASS_NAMES.index("cat")]
    (best,) = search_text(index, "a cat", top=1)
    assert best.cosine == pytest.approx(float((torch.tensor(index.embeddings) @ cats).max()), abs=1e-5)


def test_a_file_finds_itself(folder):
    index = load_index(folder / "files.index")
    for name in ("16 bit.tiff", "b rotated.JPG", "test/a.png"):
        hits = search_image(index, str(folder / "pictures" / name), top=2)
        assert hits[0].cosine == pytest.approx(1, abs=1e-4)
        assert index.embeddings[hits[0].row] == pytest.approx(index.embeddings[index.names.index(name)], abs=1e-3)


def test_an_image_of_the_index_needs_no_encoder(folder, tmp_path, capsys):
    index = load_index(folder / "set.index")
    index.facts.encoder = "/gone"
    hits = search_image(index, "train:12", top=3)
    assert (hits[0].row, hits[0].probability) == (12, None)
    with pytest.raises(UserError, match="--encoder is of no use.*train:12"):
        search_image(index, "train:12", encoder=str(folder / "encoder"))


def test_the_text_tower_is_loaded_where_it_was_left_out(folder):
    index = load_index(folder / "set.index")
    expected = search_text(index, "a cat", 5)
    found = search_text(index, "a cat", 5, encoder=str(folder / "without_tower"))
    assert [hit.row for hit in found] == [hit.row for hit in expected]
    assert [hit.cosine for hit in found] == pytest.approx([hit.cosine for hit in expected], abs=1e-5)


def test_table_and_grid(folder, tmp_path, capsys):
    grid = tmp_path / "results.png"
    lines = run(capsys, folder / "set.index", "a cat", "--top", "7", "--grid", grid).splitlines()
    assert lines[0].split() == ["rank", "cosine", "probability", "label", "image"]
    assert [line.split()[0] for line in lines[1:-1]] == [str(rank) for rank in range(1, 8)]
    index = load_index(folder / "set.index")
    for hit, line in zip(search_text(index, "a cat", 7), lines[1:], strict=False):
        assert line.split()[1:] == [
            f"{hit.cosine:.4f}",
            f"{hit.probability:.4f}",
            index.labels[hit.row],
            index.names[hit.row],
        ]
    assert lines[-1] == f"{grid}: written"
    with Image.open(grid) as picture:
        assert (picture.format, picture.size) == ("PNG", (5 * 152 + 8, 2 * 168 + 8))
        best = search_index.load_images(SET, "train")[search_text(index, "a cat", 1)[0].row]["img"]
        assert picture.crop((8, 8, 152, 152)).tobytes() == best.resize((144, 144), Image.Resampling.NEAREST).tobytes()


def test_columns_that_say_nothing_are_left_out_and_names_cannot_steer_a_terminal(folder):
    index = load_index(folder / "files.index")
    table = result_table(index, search_image(index, "line.png", top=9))
    assert table.splitlines()[0].split() == ["rank", "cosine", "image"]
    assert "\x1b" not in table and "\\x1b[31m" in table


def test_a_grid_takes_pictures_of_any_shape(folder):
    index = load_index(folder / "files.index")
    grid = result_grid(index, search_image(index, "line.png", top=9), columns=3)
    assert grid.size == (3 * 152 + 8, 3 * 168 + 8)
    assert grid.getpixel((8 + 71, 8 + 72)) == (255, 0, 0)


def test_a_changed_picture_is_noticed(folder, tmp_path, caplog):
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    index = load_index(folder / "files.index")
    index.facts.images = str(tmp_path / "pictures")
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "gray.png")
    stored_pictures(index, range(9))
    assert [record.message.split(" ")[0] for record in caplog.records] == ["gray.png"]
    (tmp_path / "pictures" / "gray.png").unlink()
    with pytest.raises(UserError, match="gray.png cannot be read any more"):
        stored_pictures(index, range(9))


def test_a_set_that_has_shrunk_is_noticed(folder):
    index = load_index(folder / "set.index")
    index.facts.images = "synthetic:20"
    with pytest.raises(UserError, match="synthetic:20 has no image train:25 any more"):
        stored_pictures(index, [3, 25])


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("{set.index}", ["give a text or --image"]),
        ("{set.index} cat --image {cat.png}", ["one of both"]),
        ("{set.index} cat --top 0", ["--top must be at least 1, got 0"]),
        ("{set.index} cat --template a", ["--template 'a'", "{}"]),
        ("{set.index} --image {cat.png} --template {}", ["--template", "--image", "leave one"]),
        ("{set.index} cat --grid results.jpg", ["--grid results.jpg", ".png"]),
        ("{set.index} cat --grid {none}/a.png", ["--grid {none}/a.png", "create it first"]),
        ("{none} cat", ["INDEX {none}", "sigphi search build"]),
        ("{encoder} cat", ["INDEX {encoder}", "no such file"]),
        ("{encoder}/config.json cat", ["no file that `sigphi search build` wrote"]),
        ("{plain.parquet} cat", ["no file that `sigphi search build` wrote"]),
        ("{later.index} cat", ["version 9.9", "build it again"]),
        ("{nan.index} cat", ["no finite numbers"]),
        ("{columns.index} cat", ["its columns are not those"]),
        ("{set.index} --image {none}", ["--image {none}", "no such image in the index"]),
        ("{set.index} --image {encoder}/config.json", ["config.json", "no picture"]),
        ("{set.index} --image {encoder}", ["{encoder}", "no picture"]),
        ("{set.index} cat --encoder {none}", ["--encoder {none}", "config.json"]),
        ("{set.index} cat --encoder {retrained}", ["--encoder {retrained}", "not the one", "build the index again"]),
        ("{set.index} cat --encoder {tower}", ["--encoder {tower}", "'phi'"]),
        ("{set.index} cat --encoder {towerless}", ["without its text tower", "{gone}", "--image"]),
        ("build {x} --encoder {none} --images synthetic", ["--encoder {none}"]),
        ("build {x} --images synthetic", ["--encoder"]),
        ("build {x} --encoder {encoder} --images {empty}", ["--images {empty}", "no picture in this folder"]),
        ("build {x} --encoder {encoder} --images {none}", ["{none}", "no such folder"]),
        ("build {x} --encoder {encoder} --images synthetic --image-split dev", ["'dev'", "--image-split", "train"]),
        ("build {x} --encoder {encoder} --images synthetic --image-column jpg", ["--image-column has no use without"]),
        ("build {x} --encoder {encoder} --images synthetic --dataset {empty}", ["--images has no use with --dataset"]),
        ("build {x} --encoder {encoder} --dataset {none}", ["--dataset {none}: it cannot be loaded"]),
        ("build {x} --encoder {encoder} --images synthetic --batch-size 0", ["--batch-size must be at least 1"]),
        ("build {none}/x --encoder {encoder} --images synthetic", ["INDEX {none}/x", "create it first"]),
        ("build {cat.png} --encoder {encoder} --images synthetic", ["{cat.png} exists and is no index"]),
    ],
)
def test_a_mistake_ends_with_code_2_and_what_to_do(words, parts, folder, tmp_path, capsys):
    names = {name: str(folder / name) for name in ("set.index", "encoder", "retrained", "tower", "towerless", "gone")}
    names |= {name: str(tmp_path / name) for name in ("none", "empty", "x", "cat.png")}
    names |= {name: str(tmp_path / name) for name in bad_indexes(folder, tmp_path)}
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")

    def filled(text):
        for name, path in names.items():
            text = text.replace(f"{{{name}}}", path)
        return text

    message = fails(capsys, *map(filled, words.split()))
    for part in parts:
        assert filled(part) in message
    assert not (tmp_path / "x").exists()


def bad_indexes(folder, place):
    """Write files that look like an index, and return their names."""
    table = pq.read_table(folder / "set.index")
    facts = json.loads(table.schema.metadata[b"sigphi_search"])
    values = table["embedding"].combine_chunks().flatten().to_numpy().copy()
    values[5] = np.nan
    nan = table["embedding"].type
    column = type(table["embedding"].combine_chunks()).from_arrays(values, nan.list_size)
    later = {b"sigphi_search": json.dumps(facts | {"format": 2, "sigphi": "9.9"})}
    tables = {
        "plain.parquet": table.replace_schema_metadata({}),
        "later.index": table.replace_schema_metadata(later),
        "nan.index": table.set_column(3, table.schema.field("embedding"), column),
        "columns.index": table.drop_columns("digest"),
    }
    for name, content in tables.items():
        pq.write_table(content, place / name)
    return tables


@pytest.mark.parametrize(("text", "part"), [(" ", "is empty"), ("cat " * 129, "tokens, the encoder reads 128")])
def test_a_text_that_cannot_be_read_is_refused(folder, text, part):
    with pytest.raises(UserError, match=part):
        search_text(load_index(folder / "set.index"), text)


def test_without_faiss_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr("sigphi.train.search.is_faiss_available", lambda: False)
    assert "pip install 'sigphi[search]'" in fails(capsys, folder / "set.index", "a cat")


def test_build_has_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["search", "build", "--help"])
    assert "--skip-broken" in capsys.readouterr().out
