# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Write the card of a checkpoint from its weights, its recipe and its evaluations, without figures typed by hand.

    python scripts/generate/make_model_card.py CHECKPOINT RECIPE.yaml EVALUATION.json [EVALUATION.json ...]
    python scripts/generate/make_model_card.py CHECKPOINT    # again, with the files that the first command wrote

It writes CHECKPOINT/README.md, .eval_results, recipe.yaml and evaluation.json, which `spectrafm push` needs.
Evaluations are written by `scripts/paper/evaluate.py --output`; the first one is the main table, and one of other
models on the same stars adds their rows. The bundled card, of which model_cards/spectrafm-base.md is a copy, was made
in model_cards/evaluations by

    python ../../scripts/generate/make_model_card.py ../../src/spectrafm_hf/resources/checkpoints/spectrafm-base \
        ../../scripts/recipes/base.yaml spectrafm-base.json

An evaluation has checksums of weights and settings (`spectrafm_hf.hub.cards.checksums`). Some settings without an
effect on predictions were removed later; `settings_sha256` of the bundled evaluations is that of the remaining ones.

Text between `<!-- free text: NAME -->` and `<!-- end of free text -->` is kept when the card is written again. For a
bundled checkpoint, edit either copy (the newer one wins) and run the command. It warns if the text was written for
other weights.
"""

import argparse
import json
import sys
from pathlib import Path

from spectrafm_hf.files import complete_file
from spectrafm_hf.free_text import free_part, free_texts, keep_free_texts
from spectrafm_hf.hub.cards import read_evaluations, write_model_card


ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "src" / "spectrafm_hf" / "resources" / "checkpoints"
CARDS = ROOT / "model_cards"


def bring_together(card: Path, copy: Path) -> None:
    """Give `card` the free texts of both; of two that differ, that of the newer file."""
    if not copy.exists():
        return
    text = copy.read_text(encoding="utf-8")
    if card.exists():
        own = card.read_text(encoding="utf-8")
        files = [(card.stat().st_mtime, free_texts(own)), (copy.stat().st_mtime, free_texts(text))]
        merged: dict[str, str] = {}
        for _, texts in sorted(files, key=lambda file: file[0]):
            merged |= {name: part for name, part in texts.items() if part}
        text = keep_free_texts(own, "\n".join(free_part(name, part) for name, part in merged.items()))
    write(card, text)


def write(path: Path, text: str) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("evaluations", type=Path, nargs="*")
    parser.add_argument("--license", metavar="ID", help="licence of the weights [default: that in the card]")
    arguments = parser.parse_args()
    card = arguments.checkpoint.resolve() / "README.md"
    copy = CARDS / f"{card.parent.name}.md" if card.parent.parent == BUNDLED else None
    try:
        if copy is not None:
            bring_together(card, copy)
        evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.evaluations]
        write_model_card(
            arguments.checkpoint,
            recipe=arguments.recipe or arguments.checkpoint / "recipe.yaml",
            evaluations=evaluations or read_evaluations(arguments.checkpoint),
            license=arguments.license,
        )
        if copy is not None:
            write(copy, card.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        print(f"make_model_card.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"written: {arguments.checkpoint / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
