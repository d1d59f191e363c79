"""Features in a file: written once, whole or not at all, read without filling the memory, and the same as computed."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES
from safetensors import safe_open
from safetensors.torch import load_file

from sigphi.train import vlm
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.errors import UserError
from sigphi.train.feature_cache import cache_folder, cached_features
from sigphi.train.fingerprints import tensor_bytes

ABOUT = {"kind": "text", "tower": "a tower"}


class Computed:
    """Gives the rows of `features` in two parts, the last ones first; counts how often."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features, self.calls = features, 0

    def __call__(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        self.calls += 1
        rows = list(range(len(self.features)))[::-1]
        return ((part, self.features[part]) for part in (rows[:2], rows[2:]))


def cached(folder: Path, computed: Any, features: torch.Tensor, **about: Any) -> torch.Tensor:
    return cached_features("--text-cache", str(folder), ABOUT | about, features.shape, features.dtype, computed)


# The file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3), (7, 2, 4)])
def test_features_are_computed_once_and_read_from_their_file(tmp_path, dtype, shape):
    features = torch.randn(shape).to(dtype)
    computed = Computed(features)
    for _ in range(2):
        given = cached(tmp_path / "new" / "folder", computed, features)
        assert given.dtype == dtype and torch.equal(given, features)
        assert torch.equal(given[[3, 0, 3]], features[[3, 0, 3]])
    assert computed.calls == 1
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name.startswith("text-") and file.suffix == ".safetensors"
    assert torch.equal(load_file(file)["features"], features)  # by the library's own reader
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["about"]) == ABOUT | {"format": 1}


def test_what_the_features_depend_on_names_the_file(tmp_path):
    features = torch.randn(4, 3)
    for layer in (0, 1, 0):
        cached(tmp_path, Computed(features), features, layer=layer)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_by_default_lies_in_the_cache_of_hugging_face(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "sigphi"
    assert cache_folder("~/x") == Path.home() / "x"


def test_a_run_that_stops_leaves_no_file(tmp_path):
    features = torch.randn(5, 3)

    def stopped() -> Iterator[tuple[list[int], torch.Tensor]]:
        yield [0, 1], features[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, stopped, features)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_that_is_read(tmp_path):
    features = torch.randn(5, 3)

    def killed() -> Iterator[tuple[list[int], torch.Tensor]]:
        yield [0, 1], features[:2]
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        cached(tmp_path, killed, features)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    computed = Computed(features)
    assert torch.equal(cached(tmp_path, computed, features), features) and computed.calls == 1


def test_two_processes_at_once_do_no_harm(tmp_path):
    features = torch.randn(6, 3)
    inner: list[torch.Tensor] = []

    def interrupted() -> Iterator[tuple[list[int], torch.Tensor]]:
        yield [0, 1, 2], features[:3]
        inner.append(cached(tmp_path, Computed(features), features))  # another one, from start to end
        yield [3, 4, 5], features[3:]

    outer = cached(tmp_path, interrupted, features)
    assert torch.equal(outer, features) and torch.equal(inner[0], features)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "garbage", "other shape"])
def test_a_damaged_file_is_made_again(tmp_path, damage, caplog):
    features = torch.randn(50, 3)
    cached(tmp_path, Computed(features), features)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    shape = content.replace(b'"shape": [50, 3]', b'"shape": [25, 6]')
    damaged = {"empty": b"", "cut": content[:-4], "longer": content + b"1234", "garbage": b"x" * 900}
    file.write_bytes({**damaged, "other shape": shape}[damage])
    computed = Computed(features)
    with caplog.at_level("WARNING", logger="sigphi"):
        assert torch.equal(cached(tmp_path, computed, features), features)
    assert computed.calls == 1 and "computed again" in caplog.text and str(file) in caplog.text
    assert file.read_bytes() == content


def test_neither_writing_nor_reading_fills_the_memory(tmp_path):
    def kilobytes() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    shape, part = (50_000, 512), torch.ones(1000, 512)
    parts = ((range(start, start + 1000), part) for start in range(0, shape[0], 1000))
    before = kilobytes()
    features = cached_features("--text-cache", str(tmp_path), ABOUT, shape, torch.float32, lambda: parts)
    assert features[[5, 40_000]].sum() == 1024
    assert kilobytes() - before < 20_000, "of 102,400"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 102_400_000


# Folders that cannot be written --------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    computed = Computed(torch.randn(5, 3))
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", Path("/proc/sigphi")):
        with pytest.raises(UserError, match=rf"--text-cache-dir {folder}: cannot be written .*\n.*--text-cache off"):
            cached(folder, computed, computed.features)
    assert computed.calls == 0


def test_a_disk_without_room_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    computed = Computed(torch.randn(5, 3))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 59}))
    with pytest.raises(UserError, match=r"0\.00 GB are needed and 0\.00 GB are free"):
        cached(tmp_path, computed, computed.features)
    assert computed.calls == 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 60}))
    assert torch.equal(cached(tmp_path, computed, computed.features), computed.features)


def test_a_disk_that_fills_up_while_writing_is_named_and_nothing_is_left(tmp_path):
    computed = Computed(torch.ones(1000, 64))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the file would have 256,000 bytes
    try:
        with pytest.raises(UserError, match=rf"--text-cache-dir {tmp_path}: cannot be written \(File too large\)\.\n"):
            cached(tmp_path, computed, computed.features)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert computed.calls == 1 and list(tmp_path.iterdir()) == []


def test_what_goes_wrong_in_the_tower_is_no_fault_of_the_folder(tmp_path):
    def fails() -> Iterator[tuple[list[int], torch.Tensor]]:
        raise FileNotFoundError("no weights here")

    with pytest.raises(FileNotFoundError, match="no weights here"):
        cached(tmp_path, fails, torch.randn(5, 3))


# Images --------------------------------------------------------------------------------------------------------------


def image_arguments(folder: Path, **values: Any) -> VlmModelArguments:
    return VlmModelArguments(siglip_checkpoint="encoder", bits=16, **{"image_cache_dir": str(folder), **values})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_image_tokens", [1, 4])
def test_cached_image_features_give_the_loss_of_the_images(
    make_vlm, tiny_vlm_processor, num_image_tokens, dtype, tmp_path
):
    model = make_vlm(num_image_tokens=num_image_tokens)
    model.model.vision_tower.to(dtype)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    image = [model.config.image_token_id] * num_image_tokens
    rows = [{"image_index": i, "prompt_ids": [*image, 5 + i], "answer_ids": [9 + i, 0]} for i in (2, 0, 1)]
    losses, gradients = [], []
    for arguments in (image_arguments(tmp_path), image_arguments(tmp_path, image_cache="off", image_cache_dir=None)):
        collator = vlm.collator_for(model, tiny_vlm_processor, pixels, arguments)
        batch = collator(rows)
        assert ("pixel_values" in batch) == (arguments.image_cache == "off")
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        parameters = model.model.multi_modal_projector.named_parameters()
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters})
    # A batch of another size may be added up in another order.
    relative = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(losses[0], losses[1], rtol=relative, atol=0)
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= relative * gradient.norm(), name


def test_the_images_are_encoded_once(tiny_vlm, tiny_vlm_processor, tmp_path, monkeypatch):
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    first = vlm.image_features(tiny_vlm, tiny_vlm_processor, pixels, str(tmp_path), batch_size=2)
    monkeypatch.setattr(vlm, "encode_images", lambda *_: pytest.fail("encoded again"))
    again = vlm.image_features(tiny_vlm, tiny_vlm_processor, pixels.clone(), str(tmp_path))
    assert torch.equal(again, first)


def test_other_images_weights_or_tokens_have_another_file(make_vlm, tiny_vlm_processor, tmp_path):
    def num_files(model: Any, pixels: torch.Tensor) -> int:
        vlm.image_features(model, tiny_vlm_processor, pixels, str(tmp_path))
        return len(list(tmp_path.iterdir()))

    model, pixels = make_vlm(), torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    assert num_files(model, pixels) == 1
    pixels[1, 2, 3, 4] += 1
    assert num_files(model, pixels) == 2
    assert num_files(make_vlm(num_image_tokens=4), pixels) == 3
    with torch.no_grad():
        model.model.vision_tower.projection.bias[0] += 1e-6
    assert num_files(model, pixels) == 4
    model.model.vision_tower.to(torch.bfloat16)
    assert num_files(model, pixels) == 5
    tiny_vlm_processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    assert num_files(model, pixels) == 6


def test_the_bytes_of_a_tensor_are_its_numbers():
    for tensor in (torch.randn(2, 3).t(), torch.tensor(7), torch.randn(3).bfloat16(), torch.zeros(0)):
        assert bytes(tensor_bytes(tensor)) == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_a_folder_that_cannot_be_written_ends_stage_two_before_the_models_load(toy_csv, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(vlm, "check_models", lambda _: None)
    monkeypatch.setattr(vlm, "build_model", lambda *_: pytest.fail("models are loaded"))
    words = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--siglip-checkpoint", "e", "--eval-fraction", "0"]
    words += ["--eval-strategy", "no", "--eval-samples", "0", "--bf16", "false", "--image-cache-dir"]
    with pytest.raises(UserError, match="--image-cache-dir .*file/x: cannot be written"):
        vlm.main([*words, str(tmp_path / "file" / "x")])
