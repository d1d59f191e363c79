"""Render the tables of figures in the README and in docs/ from benchmarks/results/*.json.

python benchmarks/readme.py
"""

import json
import re
from pathlib import Path
from typing import Any

import scale_tables

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RECIPES = ROOT / "train" / "recipes"


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """One committed result file."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def row(what: str, figure: str, value: float, chance: float | None) -> str:
    """One line of the table."""
    return f"| {what} | `{figure}` | {value:.3f} | {'' if chance is None else f'{chance:.3f}'} |\n"


def vlm_rows(what: str, results: dict[str, float]) -> str:
    """The lines of one VLM."""
    return (
        row(what, "class_accuracy", results["class_accuracy"], results["majority/class"])
        + row(what, "answer_accuracy", results["answer_accuracy"], results["answer_accuracy_shuffled_image"])
        + row(what, "image_gain", results["image_gain"], 0.0)
    )


def table() -> str:
    """The table, and the sentence on where its figures come from."""
    cifar, quick = read("cifar10"), read("quickstart")
    test = cifar["test"]
    small = read("cpu-small", RECIPES)["test"]
    lines = "| run | figure | value | without looking |\n| --- | --- | --- | --- |\n"
    lines += row("quickstart, encoder", "zero_shot_top1", quick["results"]["siglip"]["zero_shot_top1"], 0.1)
    lines += vlm_rows("quickstart, VLM (QLoRA NF4)", quick["results"]["vlm"])
    lines += row("CIFAR-10 test, encoder of `--recipe cpu-small`", "zero_shot_top1", small["zero_shot_top1"], 0.1)
    lines += row("CIFAR-10 test, encoder of the VLM", "zero_shot_top1", test["siglip"]["zero_shot_top1"], 0.1)
    lines += vlm_rows("CIFAR-10 test, VLM (QLoRA NF4)", test["vlm"])
    if "vlm_full" in test:
        lines += vlm_rows("CIFAR-10 test, VLM (full training)", test["vlm_full"])
    images = quick["results"]["vlm"]["metadata"]["images"]
    return (
        f"{lines}\nFrom random weights on {cifar['cores']} CPU cores. Quickstart: {images} drawn pictures that no "
        f"training saw. CIFAR-10: the {test['vlm']['metadata']['images']:,} test images of a JPEG copy; the language "
        f"model is a tiny Phi made for this run. Beside `answer_accuracy` stands the accuracy with another image. "
        f"Scripts and raw figures: [benchmarks/](benchmarks/).\n"
    )


def types_table() -> str:
    """Each type of question on the CIFAR-10 test images."""
    results = read("cifar10")["test"]["vlm"]
    kinds = [name.partition("/")[2] for name in results if name.startswith("accuracy/")]
    lines = "| questions of type | accuracy | commonest answer | image gain |\n| --- | --- | --- | --- |\n"
    for kind in (kind for kind in kinds if kind != "refusal"):
        figures = (results[f"{column}/{kind}"] for column in ("accuracy", "majority", "image_gain"))
        lines += f"| {kind} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |\n"
    return (
        f"{lines}\nQuestions that no such image can answer have one right answer, a refusal, and are scored by "
        f"confusion: `refusal_f1` {results['refusal_f1']:.3f}. Of the facts that descriptions state, "
        f"{results['description_precision']:.3f} are true, and of the true ones they state "
        f"{results['description_recall']:.3f}.\n"
    )


def memory_table() -> str:
    """The configurations of benchmarks/plan.py."""
    configurations = read("plan")["configurations"]
    lines = "| training | estimated | measured | error | measured, heap of glibc |\n| --- | --- | --- | --- | --- |\n"
    for name, result in configurations.items():
        sizes = [result[f"{kind}_bytes"] / 1e6 for kind in ("estimated", "measured")]
        default = result["measured_bytes_default_heap"] / 1e6
        lines += f"| {name} | {sizes[0]:,.0f} MB | {sizes[1]:,.0f} MB | {result['error']:+.1%} | {default:,.0f} MB |\n"
    return f"{lines}\nPeaks of three training steps on a CPU, above what the imports take (benchmarks/plan.py).\n"


def speed_table() -> str:
    """The contestants of benchmarks/encoder.py."""
    results = read("encoder")
    throughput, towers, race = results["throughput"], results["towers"], results["to_accuracy"]
    accuracy = f"seconds to {race['accuracy']:.2f}"
    lines = f"| trained by | pairs/s | images/s | peak memory | {accuracy} |\n| --- | --- | --- | --- | --- |\n"
    for name, one in throughput["contestants"].items():
        seconds = race["seconds"].get(name)
        cells = [f"{one['pairs_per_second']:,.0f}", f"{one['images_per_second']:,.0f}"]
        cells += [f"{one['peak_bytes'] / 1e6:,.0f} MB", "" if seconds is None else f"{seconds:.0f}"]
        lines += f"| {name} | {' | '.join(cells)} |\n"
    ratios = "".join(
        f"| {one['of']} | {one['to']} | {one['median']:.1f} | {one['least']:.1f} to {one['most']:.1f} |\n"
        for one in throughput["ratios"]
    )
    tower, machine = towers["ratio"], throughput["machine"]
    rival = race["scores"]["open_clip fp32"]
    return (
        f"{lines}\n| pairs/s of | over those of | median | turns |\n| --- | --- | --- | --- |\n{ratios}\n"
        f"The image tower alone, a training step in float32 with images and text embeddings in memory: "
        f"{tower['median']:.2f} times the images/s of timm's in open_clip's order of memory and optimizer (quartiles "
        f"{tower['quartiles'][0]:.2f} and {tower['quartiles'][1]:.2f} of {towers['rounds']} rounds). The same "
        f"architecture and numbers; a forward pass over an image takes "
        f"{towers['forward_flops_per_image']['sigphi'] / 1e6:.0f} and "
        f"{towers['forward_flops_per_image']['open_clip'] / 1e6:.0f} MFLOP, because sigphi leaves out products with "
        f"padding.\n\n"
        f"Zero-shot accuracy: chance is 0.10; open_clip's best in {rival[-1][0]:.0f} s was "
        f"{max(score for _, score in rival):.3f}.\n\n"
        f"{machine['cores']} cores of an {machine['processor']}, {machine['threads']} threads, "
        f"{throughput['turns']} turns; open_clip {machine['open_clip_torch']}, timm {machine['timm']}, transformers "
        f"{machine['transformers']}, torch {machine['torch']} (benchmarks/encoder.py).\n"
    )


def repeats_table() -> str:
    """The cases of benchmarks/repeated_texts.py."""
    results = read("repeated_texts")
    shares = results["share_of_repeats"]
    lines = "| answers | loss | zero-shot top-1 | right side of one half |\n| --- | --- | --- | --- |\n"
    for case in results["summary"]:
        cells = []
        for name in ("zero_shot_top1", "matching_accuracy"):
            found = case[name]
            cells.append(f"{found['mean']:.3f} ({found['least']:.3f} to {found['most']:.3f})")
        share = f"{shares[case['answers']]:.0%} repeat"
        lines += f"| {share} | `{case['loss']}` | {' | '.join(cells)} |\n"
    seeds = results["summary"][0]["seeds"]
    return (
        f"{lines}\nDrawn pictures, {results['test_images']:,} unseen ones, mean, least and most of {seeds} seeds; "
        f"chance is 0.1 and 0.5 (benchmarks/repeated_texts.py).\n"
    )


def vlm_recipes_table() -> str:
    """The recipes of `sigphi train-vlm` and what each needs, by benchmarks/vlm_recipes.py."""
    lines = "| recipe | estimated peak | measured peak | of |\n| --- | --- | --- | --- |\n"
    for recipe in ("vlm-6gb", "vlm-12gb", "vlm-24gb", "h200"):
        found = json.loads((ROOT / "train" / "recipes" / f"{recipe}.json").read_text(encoding="utf-8"))
        measured = f"{found['measured_bytes'] / 1e9:.1f} GB" if "measured_bytes" in found else "not yet"
        limit = f"{found['limit_bytes'] / 1e9:.0f} GB"
        lines += f"| `{recipe}` | {found['estimated_bytes'] / 1e9:.1f} GB | {measured} | {limit} |\n"
    return f"{lines}\nPhi-2, a ResNet-50 at 32 pixels, 16 image tokens (benchmarks/vlm_recipes.py).\n"


def vlm_speed_table() -> str:
    """The contestants of benchmarks/vlm.py."""
    results = read("vlm")
    throughput, operations = results["throughput"], results["operations"]
    lines = "| trained by | questions/s | supervised tokens/s | positions a question | peak memory |\n"
    lines += "| --- | --- | --- | --- | --- |\n"
    for name, one in throughput["contestants"].items():
        cells = [f"{one[key]:.1f}" for key in ("questions_per_second", "supervised_tokens_per_second")]
        cells += [f"{one['positions_per_question']:.1f}", f"{one['peak_bytes'] / 1e6:,.0f} MB"]
        lines += f"| {name} | {' | '.join(cells)} |\n"
    lines += "\n| of | over | questions/s | turns | peak memory |\n| --- | --- | --- | --- | --- |\n"
    for speed, memory in zip(throughput["ratios"], throughput["memory_ratios"], strict=True):
        turns = f"{speed['least']:.2f} to {speed['most']:.2f}"
        lines += f"| {speed['of']} | {speed['to']} | {speed['median']:.2f} | {turns} | {memory['median']:.2f} |\n"
    machine, speeds = throughput["machine"], results["grid"]["questions_per_second"]
    names = [name for name in operations if name.startswith(("sigphi", "TRL"))]
    work = "".join(
        f"| {name} | {operations[name]:.0f} | {operations[name] / operations['TRL default']:.2f} |\n" for name in names
    )
    return (
        f"{lines}\nTRL fastest: {results['grid']['fastest']}, the best of {len(speeds)} settings "
        f"({min(speeds.values()):.1f} to {max(speeds.values()):.1f} questions/s). {machine['cores']} cores of an "
        f"{machine['processor']}, {throughput['turns']} turns; TRL {machine['trl']}, transformers "
        f"{machine['transformers']}, torch {machine['torch']}.\n\n"
        f"Work of a question in training at the size of Phi-2, counted on tensors without data "
        f"(benchmarks/vlm.py):\n\n"
        f"| training | GFLOP a question | of TRL's default |\n| --- | --- | --- |\n{work}"
    )


def generation_table() -> str:
    """The contestants of benchmarks/generation.py."""
    results = read("generation")
    lines = "| answered by | best batch size | questions/s |\n| --- | --- | --- |\n"
    for name, one in results["contestants"].items():
        lines += f"| {name} | {one['best_batch_size']} | {one['questions_per_second']:.1f} |\n"
    ratios = " and ".join(
        f"{one['median']:.2f} times the questions of {one['to']} ({one['least']:.2f} to {one['most']:.2f})"
        for one in results["ratios"]
    )
    return (
        f"{lines}\nsigphi answers {ratios}: {results['questions']} questions about {results['images']} images, "
        f"answers of {results['new_tokens']} tokens, {results['turns']} turns (benchmarks/generation.py).\n"
    )


# Types of questions that no class answers: they ask where in the image something is, or how it looks.
LOOKS = ("background_color", "brighter_area", "brighter_half", "dominant_color", "brightness", "contrast", "vividness")


def image_tokens_table() -> str:
    """The VLMs of benchmarks/image_tokens.py."""
    results = read("image_tokens")
    lines = "| image tokens | class | all questions | image gain | looks | steps per second |\n"
    lines += "| --- | --- | --- | --- | --- | --- |\n"
    for tokens, one in results["num_image_tokens"].items():
        looks = sum(one[f"accuracy/{kind}"] for kind in LOOKS) / len(LOOKS)
        figures = (one["class_accuracy"], one["answer_accuracy"], one["image_gain"], looks)
        cells = [f"{figure:.3f}" for figure in figures] + [f"{results['steps'] / one['train_seconds']:.2f}"]
        lines += f"| {tokens} | {' | '.join(cells)} |\n"
    one = next(iter(results["num_image_tokens"].values()))
    majority = sum(one[f"majority/{kind}"] for kind in LOOKS) / len(LOOKS)
    return (
        f"{lines}\n{results['steps']:,} steps each on real CIFAR-10, scored on {one['test_images']:,} test images; "
        f'the encoder\'s own zero-shot accuracy is {results["encoder_zero_shot_top1"]:.3f}. "Looks" is the mean '
        f"accuracy on {len(LOOKS)} types of questions about colors, brightness and where they are; the commonest "
        f"answers would get {majority:.3f} (benchmarks/image_tokens.py).\n"
    )


# File -> what stands between which marks.
TABLES = {
    "README.md": {"results": table, "types": types_table},
    "docs/plan.md": {"memory": memory_table},
    "docs/encoder.md": {"speed": speed_table, "repeats": repeats_table},
    "docs/scale.md": scale_tables.TABLES,
    "docs/vlm.md": {
        "recipes": vlm_recipes_table,
        "image-tokens": image_tokens_table,
        "speed": vlm_speed_table,
        "generation": generation_table,
    },
}


def render(file: str) -> str:
    """The text of a file of [`TABLES`] with its tables as the result files have them."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for mark, content in TABLES[file].items():
        marked = re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- /{mark} -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"{file} has no line <!-- {mark} --> with its end <!-- /{mark} -->.")
        text = marked.sub(lambda _, content=content: content(), text)
    return text


def main() -> None:
    """Rewrite what stands between the marks."""
    for file in TABLES:
        (ROOT / file).write_text(render(file), encoding="utf-8")


if __name__ == "__main__":
    main()
