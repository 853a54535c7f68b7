# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Write the card of a checkpoint from its weights, its recipe and its evaluation, so that no figure is typed by hand.

    python scripts/make_model_card.py CHECKPOINT EVALUATION.json RECIPE.yaml

The card goes to CHECKPOINT/README.md and model_cards/NAME.md; remarks on it are read from model_cards/NAME.remarks.md
if there is such a file.
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
            scatter = f"**{scatter}**" if figures["robust_scatter"] == best else scatter
            bias, rmse = number(label, figures["bias"]), number(label, figures["rmse"])
            cells.append(f"{scatter} ({bias}, {rmse}, {figures['robust_z']:.2f})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_card(checkpoint: Path, evaluation: dict, recipe: str, remarks: str) -> str:
    model, _ = load_checkpoint(checkpoint)
    name = checkpoint.name
    weights = checkpoint / "model.safetensors"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    if evaluation["models"][name]["model_sha256"] != checksum:
        raise ValueError(f"evaluation: expected one of the weights {checksum}, got one of other weights")
    labels = list(model.config.label_names)
    units = dict(zip(labels, model.config.label_units, strict=True))
    ranges = json.loads((checkpoint / "training_range.json").read_text())
    tables = [
        f"### {title} ({evaluation['stars'][title]} stars)\n\n{table(results, labels, units)}"
        for title, results in evaluation["results"].items()
    ]
    main = next(iter(evaluation["results"]))
    card = ModelCardData(
        language=None,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="other",
        tags=["astronomy", "spectroscopy", "stellar-labels", "spectrafm", "gaia-xp", "apogee"],
        datasets=["gaia-xp"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="tabular-regression",
                task_name="stellar labels",
                dataset_type="gaia-xp",
                dataset_name="Gaia XP x APOGEE DR17",
                dataset_split=evaluation["split"],
                metric_type=figure,
                metric_name=f"{text} of {label}, {main}",
                metric_value=round(evaluation["results"][main][name][label][figure], 5),
            )
            for label in labels
            for figure, text in FIGURES
        ],
    )
    body = (
        (ROOT / "model_cards" / "template.md")
        .read_text()
        .format(
            name=name,
            labels=", ".join(labels),
            ranges="\n".join(
                "| {} | {} | {:.5g} to {:.5g} |".format(label, units[label], *ranges["labels"][label])
                for label in labels
            ),
            split=evaluation["split"],
            split_rule=evaluation["split_rule"],
            tables="\n\n".join(tables),
            command=evaluation["command"],
            versions=", ".join(f"{key} {value}" for key, value in evaluation["versions"].items()),
            data_sha256=evaluation["data_sha256"][evaluation["split"]][:16],
            model_sha256=checksum[:16],
            remarks=remarks.strip(),
            parameters=f"{model.num_parameters():,}",
            size=f"{weights.stat().st_size / 1e6:.1f}",
            recipe=recipe,
            curves=recipe.replace(".yaml", ".curves.csv"),
        )
    )
    return f"---\n{card.to_yaml()}\n---\n\n{body}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("recipe", type=Path)
    arguments = parser.parse_args()
    remarks = ROOT / "model_cards" / f"{arguments.checkpoint.name}.remarks.md"
    card = make_card(
        arguments.checkpoint,
        json.loads(arguments.evaluation.read_text()),
        arguments.recipe.name,
        remarks.read_text() if remarks.exists() else "",
    )
    for path in (arguments.checkpoint / "README.md", ROOT / "model_cards" / f"{arguments.checkpoint.name}.md"):
        with complete_file(path) as temporary:
            temporary.write_text(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
