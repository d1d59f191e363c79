"""Models, tokenizers and images made in code: nothing is downloaded, and every test gets its own copy."""

import contextlib
import copy
import os
import resource
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read once, when transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from toy_base import write_toy_base
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast, SiglipImageProcessor

from sigphi import (
    SiglipResNetConfig,
    SiglipResNetModel,
    SiglipResNetProcessor,
    SigPhiConfig,
    SigPhiForConditionalGeneration,
    SigPhiProcessor,
)
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.data import distinct_images, load_cifar10_qa
from sigphi.train.data_build import build_csv
from sigphi.train.prompts import prepare_tokenizer
from sigphi.train.qlora import build_vlm, load_language_model

# One thread here and in child processes: a sum in another order differs in the last bit.
torch.set_num_threads(1)

SENTENCES = [
    "Question: What is the object in the image?\nAnswer: The object is a cat.",
    "Question: What color is the dog?\nAnswer: The dog is brown.",
    "Question: Is this a ship, a truck or an airplane?\nAnswer: It is a ship on the blue sea.",
    "A small frog sits on a green leaf. A deer stands in the forest. A horse runs across a field.",
]

# 64 is what bitsandbytes' 4-bit kernels for CPUs need, and what the zero-shot pipeline pads texts to.
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    # Ten times the usual one, so that random weights give answers that depend on the question and on the image.
    "initializer_range": 0.2,
}
VISION_CONFIG: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "stem": "cifar",
    "image_size": 32,
    "projection_dim": 32,
}
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": True,
    "target_modules": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden anew, see `make golden`")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)
    yield


def randomize(model: nn.Module) -> None:
    """Give BatchNorm statistics and biases values that a test can tell from those of a new model."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "lora" not in name and parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def make_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=128
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The special tokens of a text config for this tokenizer."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(autouse=True, scope="session")
def bfloat16() -> Iterator[None]:
    """Tests that ask for bfloat16 get it on every processor: on a few numbers it is fast enough anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sigphi.train.arguments.cpu_has_bfloat16", lambda: True)
        patch.setattr("sigphi.train.precision.cpu_has_bfloat16", lambda: True)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the features in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        yield


class Originals(UserDict[str, Any]):
    """What is made once and read as copies: a forward pass alone can leave hooks in a model, a processor sets the
    padding side of the tokenizer it is given, and no test may see what another one did."""

    def __getitem__(self, name: str) -> Any:
        return copy.deepcopy(super().__getitem__(name))


@pytest.fixture(scope="session")
def shared() -> Originals:
    """The tokenizer, image processor, encoder and language model of the tests, each read as a new copy."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_config = PhiConfig(**TEXT_CONFIG, **token_ids(tokenizer))
    encoder = SiglipResNetModel(
        SiglipResNetConfig(vision_config=VISION_CONFIG, text_config=copy.deepcopy(text_config), projection_dim=32)
    ).eval()
    language_model = PhiForCausalLM(text_config).eval()
    randomize(encoder)
    randomize(language_model)
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    return Originals(
        tokenizer=tokenizer, image_processor=image_processor, encoder=encoder, language_model=language_model
    )


@pytest.fixture
def tokenizer(shared: Originals) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `<|endoftext|>`, `<pad>` and `<image>`."""
    return shared["tokenizer"]


@pytest.fixture
def image_processor(shared: Originals) -> SiglipImageProcessor:
    """For images of 32x32."""
    return shared["image_processor"]


@pytest.fixture
def tiny_encoder(shared: Originals) -> SiglipResNetModel:
    """A dual encoder with two ResNet blocks and a Phi of two layers, in evaluation mode."""
    return shared["encoder"]


@pytest.fixture
def tiny_encoder_processor(shared: Originals) -> SiglipResNetProcessor:
    """The processor that suits `tiny_encoder`."""
    return SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"])


@pytest.fixture
def tiny_language_model(shared: Originals) -> PhiForCausalLM:
    """A Phi of two layers, in evaluation mode."""
    return shared["language_model"]


@pytest.fixture(scope="session")
def base_folder(shared: Originals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny_language_model` and `tokenizer`, the base of the adapter form. Read only."""
    folder = tmp_path_factory.mktemp("base")
    shared["language_model"].save_pretrained(folder)
    shared["tokenizer"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_vlm(shared: Originals) -> Callable[..., SigPhiForConditionalGeneration]:
    """`make_vlm(**fields)`: the tiny VLM, its config with other fields."""

    def make(**fields: Any) -> SigPhiForConditionalGeneration:
        torch.manual_seed(1)
        language_model = shared["language_model"]
        vision_tower = shared["encoder"].vision_model
        config = SigPhiConfig(
            vision_config=vision_tower.config,
            text_config=language_model.config,
            image_token_id=shared["tokenizer"].convert_tokens_to_ids("<image>"),
            pad_token_id=shared["tokenizer"].pad_token_id,
            **fields,
        )
        return SigPhiForConditionalGeneration.from_parts(config, vision_tower, language_model).eval()

    return make


@pytest.fixture
def tiny_vlm(make_vlm: Callable[..., SigPhiForConditionalGeneration]) -> SigPhiForConditionalGeneration:
    """The tower of `tiny_encoder`, a projector to one soft token, `tiny_language_model`; in evaluation mode."""
    return make_vlm()


@pytest.fixture(scope="session")
def make_lora_vlm(
    make_vlm: Callable[..., SigPhiForConditionalGeneration], base_folder: Path
) -> Callable[..., SigPhiForConditionalGeneration]:
    """`make_lora_vlm(**fields)`: the tiny VLM in adapter form, its config with other fields."""

    def make(**fields: Any) -> SigPhiForConditionalGeneration:
        model = make_vlm(**{"base_language_model": str(base_folder), **fields})
        model.add_lora(LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture
def tiny_lora_vlm(make_lora_vlm: Callable[..., SigPhiForConditionalGeneration]) -> SigPhiForConditionalGeneration:
    """`tiny_vlm` in adapter form: LoRA with non-zero weights on every linear layer, its base in `base_folder`."""
    return make_lora_vlm()


@pytest.fixture
def tiny_vlm_processor(shared: Originals) -> SigPhiProcessor:
    """The processor that suits `tiny_vlm`."""
    return SigPhiProcessor(shared["image_processor"], shared["tokenizer"])


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Three pictures of noise, each of another size and colour."""
    noise = np.random.default_rng(0)
    tints = ((255, 40, 40), (40, 255, 40), (40, 40, 255))
    sizes = ((32, 32), (48, 30), (25, 60))
    return [
        Image.fromarray((noise.random((height, width, 3)) * tint).astype(np.uint8))
        for (width, height), tint in zip(sizes, tints, strict=True)
    ]


def child_environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def run_child(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`run_child(code, **env)`: run Python code in a process of its own, away from the checkout; gives stdout.

    Each call has a fresh `HF_HOME` and is offline, unless `env` says otherwise.
    """

    def run(code: str, **env: str | Path) -> str:
        folder = tmp_path_factory.mktemp("child")
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=child_environment(folder / "hf_home") | {name: str(value) for name, value in env.items()},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if result.returncode != 0:
            pytest.fail(f"the child process ended with {result.returncode}:\n{result.stderr[-6000:]}", pytrace=False)
        return result.stdout

    return run


@pytest.fixture(scope="session")
def run_stranger(run_child: Callable[..., str]) -> Callable[..., str]:
    """`run_stranger(code, **env)`: as `run_child`, where this package is not installed."""

    def run(code: str, **env: str | Path) -> str:
        return run_child('import sys\nsys.modules["sigphi"] = None\n' + code, **env)

    return run


# For whole runs of the commands: a CSV about drawn pictures, and a language model whose tokenizer knows its words.
TOY_IMAGES = "synthetic:200"


@pytest.fixture(scope="session")
def toy_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about the first 60 of the train pictures of `TOY_IMAGES`. Read only."""
    path = tmp_path_factory.mktemp("toy") / "qa.csv"
    build_csv(path, TOY_IMAGES, "train", num_images=60)
    return path


@pytest.fixture(scope="session")
def toy_dataset(toy_csv: Path) -> datasets.Dataset:
    """The questions of `toy_csv` about the first 20 pictures, with these."""
    data = load_cifar10_qa(toy_csv, TOY_IMAGES, eval_fraction=1.0)["eval"]
    _, positions = distinct_images(data)
    return data.select([row for row, position in enumerate(positions) if position < 20])


@contextlib.contextmanager
def files_of(size: int) -> Iterator[None]:
    """Within it files may have so many bytes: what comes behind fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files_of_20_kb() -> contextlib.AbstractContextManager[None]:
    """See [`files_of`]."""
    return files_of(20_000)


@pytest.fixture
def small_files() -> Iterator[None]:
    """[`files_of_20_kb`] for a whole test."""
    with files_of_20_kb():
        yield


@pytest.fixture(scope="session")
def toy_base(toy_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Phi of two layers, hidden size 64 and random weights, and its tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("toy_base")
    write_toy_base(toy_csv, TOY_IMAGES, folder)
    return folder


@pytest.fixture(scope="session")
def save_toy_vlm(shared: Originals, toy_base: Path) -> Callable[..., Path]:
    """`save_toy_vlm(folder, **options)`: a VLM in adapter form on `toy_base`, as `train-vlm` would leave it."""

    def save(folder: Path, **options: Any) -> Path:
        torch.manual_seed(2)
        arguments = VlmModelArguments(
            siglip_checkpoint="encoder", language_model=str(toy_base), lora_dropout=0.0, **options
        )
        language_model = load_language_model(arguments, torch.float32, "sdpa", torch.device("cpu"))
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(toy_base))
        model = build_vlm(shared["encoder"].vision_model, language_model, tokenizer, arguments)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
        SigPhiProcessor(shared["image_processor"], tokenizer).save_pretrained(folder)
        return folder

    return save
