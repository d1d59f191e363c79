"""Every artifact, read by somebody who has transformers and nothing of ours, from a folder and from a Hub.

One child process reads all artifacts and leaves what it computed; the tests compare that with what the models gave
here, bit for bit. A second one reads what the first saved again.
"""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from hub_stub import HubStub

from sigphi import SiglipResNetProcessor, SigPhiProcessor

TEXTS = ["a cat", "The dog is brown.", "A small frog sits on a green leaf."]
QUESTIONS = ["What?", "What is the object in the image?", "What color is the dog?"]
ENCODERS = ("encoder", "encoder_without_tower")
VLMS = ("vlm", "vlm_adapter")


def encoder_outputs(model, processor, images, texts):
    """What an encoder and its processor give; runs here and in the child processes."""
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    return {**inputs, "image_embeds": outputs.image_embeds, "logits": outputs.logits_per_image}


def vlm_outputs(model, headless, processor, images, questions):
    """What a VLM, the same without its head, and their processor give; runs here and in the child processes."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    with torch.no_grad():
        logits, hidden = model(**inputs).logits, headless(**inputs).last_hidden_state
    answers = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return {**inputs, "logits": logits, "last_hidden_state": hidden, "answers": answers}


STRANGER = (
    f"""
import torch
{inspect.getsource(encoder_outputs)}
{inspect.getsource(vlm_outputs)}
"""
    + """import json, logging, os
from pathlib import Path
from PIL import Image
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM,
    AutoModelForZeroShotImageClassification, AutoProcessor,
)

torch.set_num_threads(1)
data, root, revision = Path(os.environ["DATA"]), os.environ["ROOT"], os.environ.get("REVISION")
again = os.environ.get("AGAIN")
images = [Image.open(data / f"{i}.png") for i in range(3)]
texts, questions = json.loads(os.environ["TEXTS"]), json.loads(os.environ["QUESTIONS"])
warnings, classes, results = {}, {}, {}

class Collect(logging.Handler):
    def emit(self, record):
        warnings.setdefault(current, []).append(record.getMessage())

logging.getLogger("transformers").addHandler(Collect(logging.WARNING))

def load(auto, name):
    global current
    current = f"{auto.__name__} {name}"
    loaded = auto.from_pretrained(f"{root}/{name}", trust_remote_code=True, revision=revision)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    classes[current] = type(loaded).__name__
    current = "use of " + name
    return loaded

for name in ("encoder", "encoder_without_tower"):
    load(AutoConfig, name)
    model, processor = load(AutoModel, name), load(AutoProcessor, name)
    if again:
        model.save_pretrained(f"{again}/{name}")
        processor.save_pretrained(f"{again}/{name}")
    if name == "encoder_without_tower":
        model.load_text_tower()
    results[name] = encoder_outputs(model, processor, images, texts)
    load(AutoModelForZeroShotImageClassification, name)

for name in ("vlm", "vlm_adapter"):
    load(AutoConfig, name)
    model, processor = load(AutoModelForImageTextToText, name), load(AutoProcessor, name)
    headless = load(AutoModel, name)
    if again:
        model.save_pretrained(f"{again}/{name}")
        processor.save_pretrained(f"{again}/{name}")
    results[name] = vlm_outputs(model, headless, processor, images, questions)
    load(AutoModelForMultimodalLM, name)

for name in ("encoder_processor", "vlm_processor"):
    processor = load(AutoProcessor, name)
    text = ["<image>" + question for question in questions] if name == "vlm_processor" else texts
    results[name] = dict(processor(images=images, text=text, padding=True, return_tensors="pt"))
    if again:
        processor.save_pretrained(f"{again}/{name}")

torch.save({"results": results, "warnings": warnings, "classes": classes}, os.environ["RESULTS"])
"""
)

PUSH = """
import os, tempfile
from huggingface_hub import HfApi
from transformers import AutoModel, AutoModelForCausalLM
from sigphi import SiglipResNetModel, SiglipResNetProcessor, SigPhiForConditionalGeneration, SigPhiProcessor

root, user = os.environ["ROOT"], "tester"
AutoModelForCausalLM.from_pretrained(os.environ["BASE"]).push_to_hub(f"{user}/base")
AutoModel.from_pretrained(f"{root}/tower").push_to_hub(f"{user}/tower")

model = SiglipResNetModel.from_pretrained(f"{root}/encoder")
model.push_to_hub(f"{user}/encoder")
model.save_pretrained(tempfile.mkdtemp(), push_to_hub=True, repo_id=f"{user}/encoder_saved")
model = SiglipResNetModel.from_pretrained(f"{root}/encoder_without_tower")
model.config.text_model_name_or_path, model.config.text_model_revision = f"{user}/tower", "v1"
model.push_to_hub(f"{user}/encoder_without_tower")

vlm = SigPhiForConditionalGeneration.from_pretrained(f"{root}/vlm")
vlm.push_to_hub(f"{user}/vlm")
model = SigPhiForConditionalGeneration.from_pretrained(f"{root}/vlm_adapter")
model.config.base_language_model, model.config.base_language_model_revision = f"{user}/base", "v1"
model.push_to_hub(f"{user}/vlm_adapter")
model.save_pretrained(tempfile.mkdtemp(), push_to_hub=True, repo_id=f"{user}/vlm_adapter_saved")

for name in ("encoder", "encoder_without_tower", "encoder_processor"):
    SiglipResNetProcessor.from_pretrained(f"{root}/{name}").push_to_hub(f"{user}/{name}")
for name in ("vlm", "vlm_adapter", "vlm_processor"):
    SigPhiProcessor.from_pretrained(f"{root}/{name}").push_to_hub(f"{user}/{name}")

artifacts = ("encoder", "encoder_without_tower", "encoder_processor", "vlm", "vlm_adapter", "vlm_processor")
for name in ("base", "tower", *artifacts):
    HfApi().create_tag(f"{user}/{name}", tag="v1")
# What comes after the tag must not reach whoever asks for the tag.
vlm.lm_head.weight.data.zero_()
vlm.push_to_hub(f"{user}/vlm")
base = AutoModelForCausalLM.from_pretrained(os.environ["BASE"])
base.lm_head.weight.data.zero_()
base.push_to_hub(f"{user}/base")
"""


# Artifacts -----------------------------------------------------------------------------------------------------------


def save_encoders(root, shared, images):
    """Save both forms of the encoder, and return what they give."""
    processor = SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"])
    processor.save_pretrained(root / "encoder_processor")
    model = shared["encoder"]
    expected = encoder_outputs(model, processor, images, TEXTS)
    for name in ENCODERS:
        processor.save_pretrained(root / name)
    model.save_pretrained(root / "encoder")
    model.text_model.language_model.save_pretrained(root / "tower")
    model.config.include_text_tower = False
    model.config.text_model_name_or_path = str(root / "tower")
    model.save_pretrained(root / "encoder_without_tower")
    inputs = processor(images=images, text=TEXTS, padding=True, return_tensors="pt")
    return {"encoder": expected, "encoder_without_tower": expected, "encoder_processor": dict(inputs)}


def save_vlms(root, shared, make_vlm, make_lora_vlm, images):
    """Save both forms of the VLM, and return what they give."""
    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"], num_image_tokens=4)
    processor.save_pretrained(root / "vlm_processor")
    texts = ["<image>" + question for question in QUESTIONS]
    expected = {"vlm_processor": dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))}
    for name, make in zip(VLMS, (make_vlm, make_lora_vlm), strict=True):
        model = make(num_image_tokens=4)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        expected[name] = vlm_outputs(model, model.model, processor, images, QUESTIONS)
    return expected


@pytest.fixture(scope="module")
def artifacts(shared, make_vlm, make_lora_vlm, images, tmp_path_factory):
    """Folders with every artifact, and what each gives here."""
    root = tmp_path_factory.mktemp("artifacts")
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    expected = save_encoders(root, shared, images) | save_vlms(root, shared, make_vlm, make_lora_vlm, images)
    return SimpleNamespace(root=root, expected=expected)


@pytest.fixture(scope="module")
def read(artifacts, run_stranger):
    """`read(root, **env)`: what a stranger computes from the artifacts there."""

    def run(root, **env):
        results = artifacts.root / f"results_{len(list(artifacts.root.glob('results_*')))}.pt"
        texts = {"TEXTS": json.dumps(TEXTS), "QUESTIONS": json.dumps(QUESTIONS)}
        run_stranger(STRANGER, DATA=artifacts.root, ROOT=root, RESULTS=results, **texts, **env)
        return torch.load(results)

    return run


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(artifacts, read):
    """What a stranger computes from the saved folders."""
    return read(artifacts.root, AGAIN=artifacts.root / "again")


@pytest.fixture(scope="module")
def second(artifacts, first, read):
    """What another one computes from what the first has saved."""
    return read(artifacts.root / "again")


@pytest.fixture(scope="module")
def hub():
    with HubStub() as stub:
        yield stub


@pytest.fixture(scope="module")
def pushed(artifacts, base_folder, hub, run_child, tmp_path_factory):
    """The stand-in Hub after everything was pushed to it and tagged, and changed once more."""
    home = tmp_path_factory.mktemp("pusher")
    run_child(PUSH, ROOT=artifacts.root, BASE=base_folder, **hub.environment(home))
    return hub


@pytest.fixture(scope="module")
def reader_home(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def online(pushed, read, reader_home):
    """What a stranger computes from the Hub, at a tag."""
    return read("tester", REVISION="v1", **pushed.environment(reader_home))


@pytest.fixture(scope="module")
def offline(pushed, online, read, reader_home):
    """What the same computes later from the cache, without a network."""
    requests = len(pushed.log)
    results = read("tester", REVISION="v1", **{**pushed.environment(reader_home), "HF_HUB_OFFLINE": "1"})
    assert len(pushed.log) == requests
    return results


ARTIFACTS = (*ENCODERS, *VLMS, "encoder_processor", "vlm_processor")
READERS = ("first", pytest.param("second", marks=pytest.mark.slow), "online", "offline")


@pytest.mark.parametrize("artifact", ARTIFACTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_stranger_computes_the_same_bit_for_bit(artifacts, request, reader, artifact):
    results = request.getfixturevalue(reader)["results"][artifact]
    expected = artifacts.expected[artifact]
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name


@pytest.mark.parametrize("reader", READERS)
def test_the_auto_classes_give_these_classes(request, reader):
    classes = request.getfixturevalue(reader)["classes"]
    for name in ENCODERS:
        assert classes[f"AutoConfig {name}"] == "SiglipResNetConfig"
        assert classes[f"AutoModel {name}"] == "SiglipResNetModel"
        assert classes[f"AutoModelForZeroShotImageClassification {name}"] == "SiglipResNetModel"
        assert classes[f"AutoProcessor {name}"] == "SiglipResNetProcessor"
    for name in VLMS:
        assert classes[f"AutoConfig {name}"] == "SigPhiConfig"
        assert classes[f"AutoModel {name}"] == "SigPhiModel"
        assert classes[f"AutoModelForImageTextToText {name}"] == "SigPhiForConditionalGeneration"
        assert classes[f"AutoModelForMultimodalLM {name}"] == "SigPhiForConditionalGeneration"
        assert classes[f"AutoProcessor {name}"] == "SigPhiProcessor"


@pytest.mark.parametrize("reader", READERS)
def test_loading_warns_of_nothing(request, reader):
    # Above all not of the head, which a VLM's folder holds and AutoModel does not load.
    assert request.getfixturevalue(reader)["warnings"] == {}


def test_the_artifacts_differ(artifacts):
    vlm, adapter = (artifacts.expected[name] for name in VLMS)
    assert (vlm["logits"] - adapter["logits"]).abs().max() > 1e-2
    assert len({tuple(row.tolist()) for row in vlm["answers"]}) == 3


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_is_saved_again_is_complete(artifacts, first, name):
    def files(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}

    assert files(artifacts.root / "again" / name) == files(artifacts.root / name)


# Hub -----------------------------------------------------------------------------------------------------------------


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_push_uploads_what_a_folder_holds(artifacts, pushed, name):
    uploaded = set(pushed.files(f"tester/{name}")) - {"README.md", ".gitattributes"}
    assert uploaded == names_in(artifacts.root / name)


@pytest.mark.parametrize("name", ["encoder", "vlm_adapter"])
def test_saving_with_push_to_hub_uploads_all_of_the_model(pushed, name):
    uploaded, saved = (pushed.files(repo) for repo in (f"tester/{name}", f"tester/{name}_saved"))
    processor_files = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert saved.keys() >= {"config.json", "model.safetensors", "hub_code.py"}
    missing = uploaded.keys() - saved.keys() - processor_files
    assert not {file for file in missing if not file.startswith("processing_")}


def test_nothing_was_asked_of_the_hub_that_it_does_not_serve(online, pushed):
    assert not [entry for entry in pushed.log if entry[2] == 501]
