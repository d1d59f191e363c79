"""A frozen text tower says each text once; training without it is the same as with it."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES
from hub_stub import HubStub
from safetensors.torch import load_file

from sigphi import SiglipResNetModel, SiglipTrainer
from sigphi.train import encoder_evaluation, evaluation, siglip, text_tower
from sigphi.train.arguments import SiglipModelArguments
from sigphi.train.collators import SiglipCollator
from sigphi.train.data import load_cifar10_qa
from sigphi.train.encoder_evaluation import class_embeddings, class_texts, pool_texts
from sigphi.train.errors import UserError
from sigphi.train.pairs import pair_masks
from sigphi.train.text_tower import TextTower, cached_text_features, pooled_batches, text_tower_of, token_ids

TEXTS = ["A small frog sits on a green leaf.", "A dog.", "The sea is blue and wide.", "cat", "It is a ship."]
ROWS: list[dict[str, Any]] = [
    {
        "image_index": 0,
        "texts": ["A small frog.", "It is green."],
        "facts": ["object=frog", ""],
        "known": ["object=frog"],
    },
    {"image_index": 1, "texts": ["The dog is brown."], "facts": ["object=dog"], "known": ["object=dog"]},
]


@pytest.fixture
def tower_folder(tiny_encoder: SiglipResNetModel, tmp_path: Path) -> Path:
    """The text tower of `tiny_encoder`; its config names it."""
    tiny_encoder.text_model.language_model.save_pretrained(tmp_path / "tower")
    tiny_encoder.config.text_model_name_or_path = str(tmp_path / "tower")
    return tmp_path / "tower"


class Marking:
    """As a pickle, it makes a file when it is read as any pickle is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_tower_in_a_pickle_is_read_and_nothing_in_it_runs(tower_folder, tmp_path):
    expected = TextTower(str(tower_folder)).load().state_dict()
    weights = load_file(tower_folder / "model.safetensors")
    (tower_folder / "model.safetensors").unlink()
    torch.save(weights, tower_folder / "pytorch_model.bin")
    found = TextTower(str(tower_folder)).load().state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    torch.save(weights | {"more": Marking(tmp_path / "run")}, tower_folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.?only"):
        TextTower(str(tower_folder)).load()
    assert not (tmp_path / "run").exists()
    torch.load(tower_folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "run").exists(), "the test would see it"


# The same loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_cached_texts_give_the_loss_and_gradients_of_the_texts(
    tiny_encoder, tiny_encoder_processor, tower_folder, tmp_path, precision, pooling
):
    tiny_encoder.config.text_pooling = pooling
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    texts = [text for row in ROWS for text in row["texts"]] + ["a SMALL frog. ", "An unused text."]
    arguments = SiglipModelArguments(
        text_model=str(tower_folder), text_cache_dir=str(tmp_path / "cache"), text_tower_dtype=precision
    )
    on, off = (SiglipCollator(tiny_encoder_processor, pixels) for _ in range(2))
    tiny_encoder.config.include_text_tower = False
    siglip.cache_texts(on, texts, tiny_encoder.config, arguments)
    assert len(on.text_features) == 4 + len(class_texts())
    tower = TextTower(str(tower_folder)).load(precision)
    results = []
    for collator, language_model in ((on, None), (off, tower)):
        tiny_encoder.text_model.language_model = language_model
        tiny_encoder.zero_grad()
        batch = collator(ROWS)
        assert ("text_features" in batch) == (collator is on)
        positives, ignored = pair_masks(**batch.pop("pairs"))
        loss = tiny_encoder(**batch, positives=positives, ignored=ignored).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in tiny_encoder.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (cached_loss, cached_gradients), (loss, gradients) = results
    # In bfloat16, padding to another length changes the last of 8 bits.
    relative = 1e-6 if precision == "float32" else 2e-2
    torch.testing.assert_close(cached_loss, loss, rtol=relative, atol=0)
    assert cached_gradients.keys() == gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert (cached_gradients[name] - gradient).norm() <= relative * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_file_holds_what_the_tower_says_of_each_text_alone(
    tiny_encoder, tiny_encoder_processor, tower_folder, tmp_path, precision
):
    config = tiny_encoder.config
    tokens = token_ids(tiny_encoder_processor.tokenizer, TEXTS, 64)
    given = cached_text_features(TextTower(str(tower_folder)), config, tokens, precision, str(tmp_path / "cache"))
    tiny_encoder.text_model.language_model.to(given.dtype)
    with torch.no_grad():
        alone = torch.cat([tiny_encoder.text_model.pool(torch.tensor([ids]))[1] for ids in tokens])
    assert alone.dtype == given.dtype == getattr(torch, precision)
    exact = precision == "float32"
    torch.testing.assert_close(given, alone, rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)


def test_four_bits_are_near_to_all_of_them(tiny_encoder, tiny_encoder_processor, tower_folder, tmp_path):
    tokens = token_ids(tiny_encoder_processor.tokenizer, TEXTS, 64)
    exact, coarse = (
        cached_text_features(TextTower(str(tower_folder)), tiny_encoder.config, tokens, precision, str(tmp_path / "c"))
        for precision in ("float32", "nf4")
    )
    assert coarse.dtype == torch.bfloat16
    error = (coarse - exact).norm() / exact.norm()
    assert 0.01 < error < 0.3


# Batches -------------------------------------------------------------------------------------------------------------


def test_batches_hold_each_text_once_by_length_and_stay_within_both_limits(monkeypatch):
    monkeypatch.setattr(text_tower, "TOKENS_A_BATCH", 20)
    lengths = torch.randint(1, 15, (40,)).tolist() + [30]  # the last one is longer than a batch
    seen: list[torch.Size] = []

    def pool(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(ids.shape)
        return ids, (ids * mask).sum(1, keepdim=True)

    tokens = [[row] * length for row, length in enumerate(lengths)]
    parts = list(pooled_batches(pool, tokens, torch.device("cpu"), batch_size=4))
    assert sorted(row for rows, _ in parts for row in rows) == list(range(41))
    assert all(value == row * lengths[row] for rows, part in parts for row, value in zip(rows, part, strict=True))
    assert all(size <= 4 and (size * length <= 20 or size == 1) for size, length in seen)
    assert max(size for size, _ in seen) == 4
    ordered = [lengths[row] for rows, _ in parts for row in rows]
    assert ordered == sorted(ordered)


def test_texts_are_distinct_whatever_their_order_and_number():
    texts = ["a dog. ", "A dog.", "A cat.", "A dog."]
    assert siglip.distinct_texts(texts) == {"a cat.": "A cat.", "a dog.": "A dog."}
    assert siglip.distinct_texts(texts[::-1] * 2) == siglip.distinct_texts(texts)
    assert list(siglip.distinct_texts(texts)) == ["a cat.", "a dog."]


def test_class_embeddings_need_no_tower_where_the_states_are_known(tiny_encoder, tiny_encoder_processor):
    expected = class_embeddings(tiny_encoder, tiny_encoder_processor)
    features = pool_texts(tiny_encoder, tiny_encoder_processor, class_texts())
    tiny_encoder.text_model.language_model = None
    given = class_embeddings(tiny_encoder, tiny_encoder_processor, features=features)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    assert not given.requires_grad


# What names the file -------------------------------------------------------------------------------------------------


def test_what_the_tower_says_depends_on_names_its_file(tiny_encoder, tiny_encoder_processor, tower_folder, tmp_path):
    cache, config = tmp_path / "cache", tiny_encoder.config

    def num_files(
        tower: Path = tower_folder, precision: str = "float32", max_length: int = 64, texts: Any = TEXTS
    ) -> int:
        tokens = token_ids(tiny_encoder_processor.tokenizer, texts, max_length)
        cached_text_features(TextTower(str(tower)), config, tokens, precision, str(cache))
        return len(list(cache.iterdir()))

    assert num_files() == 1
    shutil.copytree(tower_folder, tmp_path / "copy")
    assert num_files(tmp_path / "copy") == 1, "the same weights elsewhere"
    assert num_files(max_length=40) == 1, "no text is so long"
    assert num_files(max_length=3) == 2
    assert num_files(texts=TEXTS[1:]) == 3
    assert num_files(precision="bfloat16") == 4
    config.text_pooling = "mean"
    assert num_files() == 5
    config.text_layer = 0
    assert num_files() == 6
    tower = tiny_encoder.text_model.language_model
    with torch.no_grad():
        tower.get_input_embeddings().weight[0, 0] += 1e-3
    tower.save_pretrained(tower_folder)
    assert num_files() == 7, "other weights under the same name"


@pytest.mark.slow
def test_a_tower_on_the_hub_is_known_by_its_commit(tiny_encoder, tmp_path, run_child):
    tiny_encoder.text_model.language_model.save_pretrained(tmp_path / "tower")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tower").iterdir()}
    code = """
from sigphi.train.text_tower import TextTower
tower = TextTower("tester/tower")
tower.load()
print(tower.identity())
"""
    with HubStub() as hub:
        identities = []
        for number in range(2):
            hub.add("tester/tower", files | {"notes.txt": str(number).encode()})
            environment = hub.environment(tmp_path / f"home{number}") | {"HF_HUB_OFFLINE": "0"}
            identities += run_child(code, **environment).split()
    assert all(identity.startswith("tester/tower@") and len(identity) == 53 for identity in identities)
    assert identities[0] != identities[1]


# Whole runs ----------------------------------------------------------------------------------------------------------

COMMON = ["--images", TOY_IMAGES, "--eval-fraction", "0.2", "--report-to", "none", "--disable-tqdm", "true"]
COMMON += ["--batch-size", "12", "--max-steps", "3", "--logging-steps", "1", "--save-strategy", "steps"]
COMMON += ["--save-steps", "2", "--layer-type", "basic", "--embedding-size", "8", "--hidden-sizes", "8", "16"]
COMMON += ["--depths", "1", "1", "--projection-dim", "32"]


def train(folder: Path, csv: Path, *argv: str, **patches: Any) -> SimpleNamespace:
    """Run `sigphi train-siglip` without its last evaluation; gives losses, and what lies in memory at each step."""
    seen: dict[str, Any] = {"towers": []}

    class Recorded(SiglipTrainer):
        def compute_loss(self, model: Any, *values: Any, **options: Any) -> Any:
            seen["towers"].append(model.text_model.language_model)
            return super().compute_loss(model, *values, **options)

        def train(self, *values: Any, **options: Any) -> Any:
            seen["trainer"] = self
            return super().train(*values, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "SiglipTrainer": Recorded,
            "evaluate_folder": lambda *_, **__: {"none": 0.0},
            **patches,
        }.items():
            patch.setattr(siglip, name, value)
        siglip.main([*COMMON, "--input-csv", str(csv), "--output-dir", str(folder), *argv])
    history = seen["trainer"].state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    accuracies = [entry["eval_zero_shot_top1"] for entry in history if "eval_zero_shot_top1" in entry]
    return SimpleNamespace(
        folder=folder,
        weights=load_file(folder / "model.safetensors"),
        losses=losses,
        norms=norms,
        accuracies=accuracies,
        towers=seen["towers"],
    )


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def cached_run(toy_csv: Path, toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("cached")
    options = ["--text-model", str(toy_base), "--text-cache-dir", str(folder / "cache"), "--save-text-tower", "true"]
    return train(folder / "model", toy_csv, *options)


def test_training_holds_no_tower_and_leaves_one_where_it_is_wanted(cached_run, toy_base):
    assert cached_run.towers and all(tower is None for tower in cached_run.towers)
    config, checkpoint = config_of(cached_run.folder), config_of(cached_run.folder / "checkpoint-2")
    assert config["include_text_tower"] is True and checkpoint["include_text_tower"] is False
    assert config["text_model_name_or_path"] == checkpoint["text_model_name_or_path"] == str(toy_base)
    tower = TextTower(str(toy_base)).load().state_dict()
    for name, tensor in tower.items():
        assert torch.equal(cached_run.weights[f"text_model.language_model.{name}"], tensor)


def test_a_second_run_loads_no_tower_and_ends_with_the_same_weights(cached_run, toy_csv, toy_base, tmp_path):
    cache = cached_run.folder.parent / "cache"
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTower, "load", lambda *_: pytest.fail("the tower is loaded"))
        again = train(tmp_path / "model", toy_csv, "--text-model", str(toy_base), "--text-cache-dir", str(cache))
    assert file.stat().st_mtime_ns == written and list(cache.iterdir()) == [file]
    own = {name: tensor for name, tensor in cached_run.weights.items() if ".language_model." not in name}
    assert again.weights.keys() == own.keys()
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in own.items())
    assert again.losses == cached_run.losses


def test_without_the_file_training_is_the_same(cached_run, toy_csv, toy_base, tmp_path):
    off = train(tmp_path, toy_csv, "--text-model", str(toy_base), "--text-cache", "off", "--save-text-tower", "true")
    assert all(tower is not None for tower in off.towers)
    assert config_of(tmp_path) == config_of(cached_run.folder)
    assert off.weights.keys() == cached_run.weights.keys()
    # Texts are padded otherwise, and whitening enlarges what that changes in the last bits.
    assert off.losses == pytest.approx(cached_run.losses, rel=1e-4)
    assert off.norms == pytest.approx(cached_run.norms, rel=1e-3)
    assert off.accuracies == cached_run.accuracies


def test_a_trained_tower_starts_from_the_same_loss(cached_run, toy_csv, toy_base, tmp_path):
    trained = train(tmp_path, toy_csv, "--text-model", str(toy_base), "--train-text-tower", "true")
    assert trained.losses[0] == pytest.approx(cached_run.losses[0], rel=1e-4)
    assert trained.losses[-1] != pytest.approx(cached_run.losses[-1], rel=1e-4)


def test_a_coarse_tower_is_saved_as_it_was(toy_csv, toy_base, tmp_path):
    options = ["--text-model", str(toy_base), "--save-text-tower", "true", "--text-tower-dtype", "nf4"]
    on = train(tmp_path / "on", toy_csv, *options, "--text-cache-dir", str(tmp_path / "cache"))
    off = train(tmp_path / "off", toy_csv, *options, "--text-cache", "off")
    assert off.losses == pytest.approx(on.losses, rel=2e-2)
    tower = TextTower(str(toy_base)).load().state_dict()
    for run in (on, off):
        assert config_of(run.folder)["include_text_tower"] is True
        assert all(torch.equal(run.weights[f"text_model.language_model.{name}"], tower[name]) for name in tower)


def test_a_checkpoint_s_own_tower_is_cached_and_kept(cached_run, toy_csv, tmp_path):
    """A tower inside an encoder may have been trained: it, and not the one it came from, says the texts."""
    encoder = tmp_path / "encoder"
    shutil.copytree(cached_run.folder, encoder)
    model = SiglipResNetModel.from_pretrained(encoder)
    with torch.no_grad():
        model.text_model.language_model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(encoder)
    options = ["--siglip-checkpoint", str(encoder)]
    on = train(tmp_path / "on", toy_csv, *options, "--text-cache-dir", str(tmp_path / "cache"))
    off = train(tmp_path / "off", toy_csv, *options, "--text-cache", "off")
    assert all(tower is None for tower in on.towers)
    assert on.losses == pytest.approx(off.losses, rel=1e-4)
    assert config_of(on.folder) == config_of(off.folder)
    assert config_of(on.folder)["text_model_name_or_path"] == config_of(encoder)["text_model_name_or_path"]
    own = {
        name: tensor for name, tensor in load_file(encoder / "model.safetensors").items() if ".language_model." in name
    }
    assert len(own) > 20 and all(torch.equal(on.weights[name], tensor) for name, tensor in own.items())
    half = config_of(on.folder / "checkpoint-2")
    assert half["include_text_tower"] is False and half["text_model_name_or_path"] is None
    with pytest.raises(UserError, match=r"checkpoint-2 has no text tower and names none.*give the folder"):
        train(tmp_path / "x", toy_csv, "--siglip-checkpoint", str(on.folder / "checkpoint-2"))


def test_a_tower_that_is_gone_is_named_before_any_weights_load(tiny_encoder, tmp_path):
    config = copy.deepcopy(tiny_encoder.config)
    config.include_text_tower, config.text_model_name_or_path = False, str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"--siglip-checkpoint e: its text tower .*gone: there is no model folder"):
        text_tower_of(config, "e")


@pytest.mark.parametrize(
    ("continues", "options"),
    [(False, []), (False, ["--text-cache", "off"]), (False, ["--train-text-tower", "true"]), (True, [])],
)
def test_only_a_new_text_projection_is_whitened(continues, options, cached_run, toy_csv, toy_base, tmp_path):
    calls: list[torch.Tensor] = []
    source = ["--siglip-checkpoint", str(cached_run.folder)] if continues else ["--text-model", str(toy_base)]
    train(tmp_path, toy_csv, *source, *options, whiten_text_projection=lambda _, features: calls.append(features))
    assert len(calls) == (0 if continues else 1)
    if calls:
        data = load_cifar10_qa(toy_csv, TOY_IMAGES)
        assert len(calls[0]) == len(siglip.distinct_texts(text for part in data.values() for text in part["answer"]))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_texts_are_cut_in_evaluations_where_training_has_cut_them(cache, toy_csv, toy_base, tmp_path, monkeypatch):
    longest: list[int] = []

    def watched(pool: Any, tokens: Any, *rest: Any) -> Any:
        longest.append(max(map(len, tokens)))
        return pooled_batches(pool, tokens, *rest)

    for module in (text_tower, encoder_evaluation):
        monkeypatch.setattr(module, "pooled_batches", watched)
    options = ["--text-model", str(toy_base), "--text-cache", cache, "--text-cache-dir", str(tmp_path / "cache")]
    options = options[: -2 if cache == "off" else None]
    train(tmp_path / "run", toy_csv, *options, "--max-text-length", "5", "--save-text-tower", "true")
    count = len(longest)
    evaluation.main([str(tmp_path / "run"), "--input-csv", str(toy_csv), "--images", TOY_IMAGES])
    assert 0 < count < len(longest) and set(longest) == {5}


def test_texts_that_are_all_the_same_are_refused(tiny_encoder, tiny_encoder_processor):
    collator = SiglipCollator(tiny_encoder_processor, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="every image has the same text, 'a cat': the loss compares texts"):
        siglip.start_text_projection(tiny_encoder, collator, ["A cat", " a cat "])
    siglip.start_text_projection(tiny_encoder, collator, ["A cat", "a dog"])
    assert torch.isfinite(tiny_encoder.text_model.projection.weight).all()


@pytest.mark.parametrize("saved_with_tower", [True, False])
@pytest.mark.parametrize("train_text_tower", [True, False])
def test_continuing_trains_the_text_tower_on_demand_alone(
    tiny_encoder, tiny_encoder_processor, tower_folder, tmp_path, saved_with_tower, train_text_tower
):
    tiny_encoder.config.include_text_tower = saved_with_tower
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    tiny_encoder_processor.save_pretrained(tmp_path / "encoder")
    arguments = SiglipModelArguments(
        siglip_checkpoint=str(tmp_path / "encoder"), train_text_tower=train_text_tower, text_cache="off"
    )
    model = siglip.build_encoder(arguments, siglip.encoder_config(arguments))
    assert {tensor.requires_grad for tensor in model.text_model.language_model.parameters()} == {train_text_tower}
    # A tower that was trained is another one than that of its source, so it has to be saved.
    assert model.config.include_text_tower is (saved_with_tower or train_text_tower)
