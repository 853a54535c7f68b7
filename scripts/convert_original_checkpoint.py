"""Convert a checkpoint of the original SpectraFM: `python scripts/convert_original_checkpoint.py INPUT_DIR OUTPUT_DIR`.

INPUT_DIR holds config.json, weights.pt and embed_map.npz. OUTPUT_DIR gets a safetensors checkpoint and its tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spectrafm_hf.hub.conversion import convert_original_checkpoint, read_wavelengths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input_dir", type=Path, metavar="INPUT_DIR")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="new or empty")
    parser.add_argument(
        "--wavelengths",
        type=Path,
        metavar="FILE",
        help="wavelengths of the pixels in Angstrom (vacuum): .npy, .npz with an array `wavelength`, or text; "
        "needed unless the checkpoint has the 7,514 pixels of the published model",
    )
    arguments = parser.parse_args()
    try:
        wavelengths = None if arguments.wavelengths is None else read_wavelengths(arguments.wavelengths)
        convert_original_checkpoint(arguments.input_dir, arguments.output_dir, wavelengths)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
