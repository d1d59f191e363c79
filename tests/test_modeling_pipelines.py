"""The encoder in transformers' pipelines, in a process where this package is not installed."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import pipeline

from sigphi import SiglipResNetProcessor
from sigphi.train import encoder_evaluation
from sigphi.train.collators import preprocess
from sigphi.train.encoder_evaluation import embed_texts, evaluate_encoder, with_article
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import decode_images

LABELS = ["cat", "dog", "small frog on a green leaf"]
PROMPT = "This is a photo of {}."

STRANGER = """
import json, os, warnings
import torch
from PIL import Image
from transformers import pipeline

torch.set_num_threads(1)
data, labels, prompt = os.environ["DATA"], json.loads(os.environ["LABELS"]), os.environ["PROMPT"]
paths = [f"{data}/{i}.png" for i in range(3)]
pictures = [Image.open(path) for path in paths]
results = {}
for form in ("encoder", "encoder_without_tower"):
    classify = pipeline("zero-shot-image-classification", model=f"{data}/{form}", trust_remote_code=True)
    assert type(classify.model).__module__.startswith("transformers_modules.")
    options = {"candidate_labels": labels, "hypothesis_template": prompt}
    try:
        results[form] = {
            "one picture": [classify(pictures[0], **options)],
            "one path": [classify(paths[0], **options)],
            "pictures": classify(pictures, **options),
            "paths": classify(paths, **options),
            "in batches": classify(pictures, batch_size=2, **options),
            "padded by one token": classify(pictures, tokenizer_kwargs={"padding": True}, **options),
            "one label": classify(pictures, candidate_labels=labels[:1], hypothesis_template=prompt),
        }
    except ValueError as error:
        results[form] = str(error)
    extract = pipeline("image-feature-extraction", model=f"{data}/{form}", trust_remote_code=True)
    results["features of " + form] = {
        "one picture": [extract(pictures[0])],
        "one path": [extract(paths[0], pool=True)],
        "pictures": extract(pictures),
        "pooled": extract(pictures, pool=True),
        "in batches": extract(pictures, pool=True, batch_size=2),
        "tensors": [tensor.tolist() for tensor in extract(paths, pool=True, return_tensors=True)],
    }
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def stranger(shared, images, run_stranger, tmp_path_factory):
    """What the pipelines give to somebody who has transformers alone, and what they have to give."""
    folder = tmp_path_factory.mktemp("pipelines")
    model = shared["encoder"]
    processor = SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"])
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    model.save_pretrained(folder / "encoder")
    processor.save_pretrained(folder / "encoder")
    model.text_model.language_model.save_pretrained(folder / "tower")
    model.config.include_text_tower, model.config.text_model_name_or_path = False, str(folder / "tower")
    model.save_pretrained(folder / "encoder_without_tower")
    model.config.include_text_tower = True
    processor.save_pretrained(folder / "encoder_without_tower")
    texts = [PROMPT.format(label) for label in LABELS]
    with torch.no_grad():
        # Without any padding.
        text_embeds = [model(**processor(text=text, return_tensors="pt")).text_embeds for text in texts]
        outputs = model(**processor(images=images, text=texts, padding=True, return_tensors="pt"))
    torch.testing.assert_close(torch.cat(text_embeds), outputs.text_embeds, rtol=1e-4, atol=1e-5)
    printed = run_stranger(STRANGER, DATA=folder, LABELS=json.dumps(LABELS), PROMPT=PROMPT)
    return SimpleNamespace(
        given=json.loads(printed), scores=outputs.logits_per_image.sigmoid(), image_embeds=outputs.image_embeds
    )


@pytest.mark.parametrize(
    "way", ["one picture", "one path", "pictures", "paths", "in batches", "padded by one token", "one label"]
)
def test_zero_shot_scores_are_sigmoids_of_the_logits(stranger, way):
    answers = stranger.given["encoder"][way]
    labels = LABELS[:1] if way == "one label" else LABELS
    assert len(answers) == (1 if way.startswith("one p") else 3)
    for answer, row in zip(answers, stranger.scores, strict=False):
        scores = {item["label"]: item["score"] for item in answer}
        assert [scores[label] for label in labels] == pytest.approx(row[: len(labels)].tolist(), rel=1e-4)
        assert [item["score"] for item in answer] == sorted(scores.values(), reverse=True)


def test_zero_shot_without_a_text_tower_says_what_is_missing(stranger):
    assert "load_text_tower()" in stranger.given["encoder_without_tower"]


@pytest.mark.parametrize("form", ["encoder", "encoder_without_tower"])
@pytest.mark.parametrize("way", ["one picture", "one path", "pictures", "pooled", "in batches", "tensors"])
def test_image_features_are_the_normalised_embeddings(stranger, form, way):
    features = torch.tensor(stranger.given[f"features of {form}"][way]).squeeze(1)  # (images, dim)
    assert features.shape == (1 if way.startswith("one") else 3, 32)
    torch.testing.assert_close(features, stranger.image_embeds[: len(features)], rtol=1e-4, atol=1e-5)


def test_only_images_alone_have_a_pooled_output(tiny_encoder, tiny_encoder_processor, images):
    inputs = tiny_encoder_processor(images=images, text=LABELS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert "pooler_output" not in tiny_encoder(**inputs)
        outputs = tiny_encoder(pixel_values=inputs["pixel_values"])
    assert torch.equal(outputs.pooler_output, outputs.image_embeds)


# Accuracy ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_to_classes(model, processor, dataset):
    """Train the image projection alone, by least squares towards the class texts: enough to tell these pictures."""
    seen = []
    hook = model.vision_model.projection.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(pixel_values=preprocess(processor, decode_images(dataset, range(len(dataset)))))
    hook.remove()
    features = torch.cat([seen[0], torch.ones(len(dataset), 1)], dim=1).double()  # (images, hidden_size + 1)
    classes = embed_texts(model, processor, [PROMPT.format(with_article(name)) for name in CLASS_NAMES], 16).double()
    targets = F.normalize(classes - classes.mean(0), dim=-1)[dataset["label"]]  # (images, dim)
    solution = torch.linalg.lstsq(features, targets).solution.float()  # (hidden_size + 1, dim)
    model.vision_model.projection.weight.copy_(solution[:-1].t())
    model.vision_model.projection.bias.copy_(solution[-1])


def test_accuracy_equals_that_of_sigphi_evaluate(
    tiny_encoder, tiny_encoder_processor, toy_dataset, tmp_path, monkeypatch
):
    images, _ = encoder_evaluation.distinct_images(toy_dataset)
    fit_to_classes(tiny_encoder, tiny_encoder_processor, images)
    tiny_encoder.save_pretrained(tmp_path)
    tiny_encoder_processor.save_pretrained(tmp_path)
    monkeypatch.setattr(encoder_evaluation, "ZERO_SHOT_PROMPTS", (PROMPT,))
    expected = evaluate_encoder(tiny_encoder, tiny_encoder_processor, toy_dataset)["zero_shot_top1"]
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path), trust_remote_code=True)
    names = [with_article(name) for name in CLASS_NAMES]
    answers = classify([row["img"] for row in images], candidate_labels=names, hypothesis_template=PROMPT)
    right = [answer[0]["label"] == names[row["label"]] for answer, row in zip(answers, images, strict=True)]
    assert 0.3 <= expected < 1
    assert sum(right) / len(right) == pytest.approx(expected)
