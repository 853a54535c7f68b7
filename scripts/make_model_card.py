# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Write the card of a checkpoint from its weights, its recipe and its evaluations, so that no figure is typed by hand.

    python scripts/make_model_card.py CHECKPOINT RECIPE.yaml EVALUATION.json [EVALUATION.json ...]

The card goes to CHECKPOINT/README.md and model_cards/NAME.md. Its text is model_cards/template.md or, if there is such
a file, model_cards/NAME.template.md; remarks on it are read from model_cards/NAME.remarks.md. The first evaluation is
the one for the index of the hub.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.files import complete_file


ROOT = Path(__file__).parents[1]
DATA_NAMES = {
    "gaia-xp": "Gaia XP x APOGEE DR17",
    "synthetic-apogee": "synthetic APOGEE spectra",
    "synthetic-apogee-apstar": "synthetic apStar spectra",
    "synthetic-gaia-xp": "synthetic Gaia XP spectra",
}
FIGURES = (("robust_scatter", "1.4826 MAD"), ("bias", "median error"), ("rmse", "RMSE"), ("robust_z", "error/sigma"))


def number(label: str, value: float) -> str:
    return f"{value:.1f}" if label == "teff" else f"{value:.3f}"


def table(results: dict, labels: list[str], units: dict[str, str]) -> str:
    """Markdown: a row for each model, a column for each label."""
    heads = [f"{label} [{units[label]}]" for label in labels]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(labels) + 1) + "|"]
    for model, by_label in results.items():
        cells = []
        for label in labels:
            figures = by_label[label]
            best = min(other[label]["robust_scatter"] for other in results.values())
            scatter = number(label, figures["robust_scatter"])
            scatter = f"**{scatter}**" if figures["robust_scatter"] == best and len(results) > 1 else scatter
            bias, rmse = number(label, figures["bias"]), number(label, figures["rmse"])
            cells.append(f"{scatter} ({bias}, {rmse}, {figures['robust_z']:.2f})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluated_labels(results: dict, name: str) -> list[str]:
    return [label for label, figures in results[name].items() if figures["robust_scatter"] is not None]


def make_tables(evaluation: dict, name: str, units: dict[str, str]) -> str:
    tables = []
    for title, results in evaluation["results"].items():
        labels = evaluated_labels(results, name)
        if labels:
            tables.append(f"### {title} ({evaluation['stars'][title]} stars)\n\n{table(results, labels, units)}")
    return "\n\n".join(tables)


def make_card(checkpoint: Path, evaluations: list[dict], recipe: str, template: str, remarks: str) -> str:
    model, tokenizer = load_checkpoint(checkpoint)
    name = checkpoint.name
    weights = checkpoint / "model.safetensors"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    for evaluation in evaluations:
        if evaluation["models"][name]["model_sha256"] != checksum:
            raise ValueError(f"evaluation: expected one of the weights {checksum}, got one of other weights")
    labels = list(tokenizer.requests or model.config.label_names)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    ranges = json.loads((checkpoint / "training_range.json").read_text())
    first = evaluations[0]
    main = next(iter(first["results"]))
    data = first.get("data", "gaia-xp")
    card = ModelCardData(
        language=None,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="other",
        tags=["astronomy", "spectroscopy", "stellar-labels", "spectrafm", "gaia-xp", "apogee"],
        datasets=[evaluation.get("data", "gaia-xp") for evaluation in evaluations],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="tabular-regression",
                task_name="stellar labels",
                dataset_type=data,
                dataset_name=DATA_NAMES.get(data, data),
                dataset_split=first["split"],
                metric_type=figure,
                metric_name=f"{text} of {label}, {main}",
                metric_value=round(first["results"][main][name][label][figure], 5),
            )
            for label in evaluated_labels(first["results"][main], name)
            for figure, text in FIGURES
        ],
    )
    parts = [
        f"{make_tables(evaluation, name, units)}\n\n`{evaluation['command']}`, with "
        + ", ".join(f"{key} {value}" for key, value in evaluation["versions"].items())
        + f". Data: SHA-256 of the {evaluation['split']} split {evaluation['data_sha256'][evaluation['split']][:16]}; "
        f"weights: SHA-256 {checksum[:16]}."
        for evaluation in evaluations
    ]
    if len(parts) > 1:
        titles = [DATA_NAMES.get(evaluation["data"], evaluation["data"]) for evaluation in evaluations]
        parts = [f"**{title}**\n\n{part}" for title, part in zip(titles, parts, strict=True)]
    body = template.format(
        name=name,
        labels=", ".join(labels),
        ranges="\n".join(
            "| {} | {} | {:.5g} to {:.5g} |".format(label, units[label], *ranges["labels"][label]) for label in labels
        ),
        split=first["split"],
        split_rule=first["split_rule"],
        evaluations="\n\n".join(parts),
        remarks=remarks.strip(),
        parameters=f"{model.num_parameters():,}",
        size=f"{weights.stat().st_size / 1e6:.1f}",
        recipe=recipe,
        curves=recipe.replace(".yaml", ".curves.csv"),
    )
    return f"---\n{card.to_yaml()}\n---\n\n{body}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("evaluations", type=Path, nargs="+")
    arguments = parser.parse_args()
    cards = ROOT / "model_cards"
    name = arguments.checkpoint.name
    remarks, template = (cards / f"{name}.{kind}.md" for kind in ("remarks", "template"))
    card = make_card(
        arguments.checkpoint,
        [json.loads(path.read_text()) for path in arguments.evaluations],
        arguments.recipe.name,
        (template if template.exists() else cards / "template.md").read_text(),
        remarks.read_text() if remarks.exists() else "",
    )
    for path in (arguments.checkpoint / "README.md", cards / f"{name}.md"):
        with complete_file(path) as temporary:
            temporary.write_text(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
