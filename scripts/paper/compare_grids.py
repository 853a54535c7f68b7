"""Compare two grids of synthetic spectra star by star, where their labels agree.

    python scripts/paper/compare_grids.py grid reference.npz

A grid is a folder that `scripts/synthesize_grid.py` wrote, or an npz with `labels`, `norm_u16` (flux over continuum *
65535 / 1.2) and, if it is not on the apStar pixels, `wavelength` and `continuum`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spectrafm_cli.arguments import Parser
from spectrafm_hf.data.schema import flat_pixels
from spectrafm_hf.synthesis.labels import LABEL_NAMES
from spectrafm_hf.synthesis.sampling import APSTAR_WAVELENGTH


# How far labels may differ that count as equal: files keep them as float32.
TOLERANCE = np.array([0.01 if name == "teff" else 1e-4 for name in LABEL_NAMES])
# Pixels at the ends that a line spread function has mixed with what lies outside.
EDGE = 30


class Grid(NamedTuple):
    labels: NDArray[np.float64]  # (stars, labels)
    wavelength: NDArray[np.float64]  # (pixels,) Angstrom, vacuum
    flux: NDArray[np.float64]  # (stars, pixels), divided by the continuum
    continuum: NDArray[np.float64] | None  # (stars, pixels) erg/s/cm2/Angstrom


def read_grid(path: Path) -> Grid:
    """A grid from a folder of Parquet shards or from an npz."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            wavelength = arrays.get("wavelength", APSTAR_WAVELENGTH)
            continuum = arrays["continuum"].astype(np.float64) if "continuum" in arrays else None
            return Grid(arrays["labels"].astype(np.float64), wavelength, arrays["norm_u16"] * (1.2 / 65535), continuum)
    shards = sorted(path.glob("data/*.parquet"))
    if not shards:
        raise ValueError(f"{path}: expected a folder with data/*.parquet, found none there")
    table = pq.read_table(shards)
    labels = np.stack([table[name].to_numpy().astype(np.float64) for name in LABEL_NAMES], axis=1)
    pixels = [flat_pixels(table[name])[0].reshape(len(table), -1) for name in ("wavelength", "flux", "continuum")]
    wavelength, flux, continuum = (values.astype(np.float64) for values in pixels)
    return Grid(labels, wavelength[0], flux, continuum)


def compare(grid: Grid, reference: Grid) -> list[str]:
    """Lines of a table: the differences of each star that both have, then their medians in ranges of Teff."""
    if len(grid.wavelength) != len(reference.wavelength) or not np.allclose(
        grid.wavelength, reference.wavelength, rtol=1e-6
    ):
        raise ValueError(
            f"wavelength: expected the {len(reference.wavelength)} pixels of the reference, got {len(grid.wavelength)} "
            "others; synthesise without --native"
        )
    # Where all spectra of the reference stay as at its end, its synthesis had ended.
    changing = np.flatnonzero((np.diff(reference.flux, axis=1) != 0).any(axis=0))
    inside = slice(changing[0] + EDGE, changing[-1] + 1 - EDGE)
    rows: list[list[float]] = []
    for star, labels in enumerate(grid.labels):
        same = np.flatnonzero((np.abs(reference.labels - labels) < TOLERANCE).all(axis=1))
        if not len(same):
            continue
        ours, theirs = grid.flux[star, inside], reference.flux[same[0], inside]
        row: list[float] = [
            *labels[:3],
            (ours - theirs).std(),
            np.median(np.abs(ours - theirs)),
            np.corrcoef(ours, theirs)[0, 1],
        ]
        if grid.continuum is not None and reference.continuum is not None:
            ratio = grid.continuum[star, inside] / reference.continuum[same[0], inside]
            fluxed = ratio * ours / theirs
            row += [fluxed.std(), np.median(fluxed) - 1]
        rows.append(row)
    if not rows:
        raise ValueError("labels: expected at least one star in both grids, got none")
    header = f"{'teff':>6} {'logg':>6} {'fe_h':>6} {'rms %':>7} {'median %':>9} {'corr.':>7}"
    fluxed_header = f" {'fluxed rms %':>13} {'offset %':>9}"
    lines = [header + (fluxed_header if len(rows[0]) > 6 else "")]
    for star_teff, logg, fe_h, star_rms, median, correlation, *fluxes in rows:
        line = f"{star_teff:6.0f} {logg:6.2f} {fe_h:6.2f} {100 * star_rms:7.3f} {100 * median:9.3f} {correlation:7.4f}"
        lines.append(line + (f" {100 * fluxes[0]:13.3f} {100 * fluxes[1]:9.3f}" if fluxes else ""))
    teff, rms = np.array(rows)[:, 0], np.array(rows)[:, 3]
    for low, high in ((0, 3500), (3500, 4000), (4000, 5000), (5000, 6000), (6000, 9000)):
        chosen = (teff >= low) & (teff < high)
        if chosen.any():
            lines.append(f"{low}-{high} K: {chosen.sum()} stars, median rms {100 * np.median(rms[chosen]):.3f} %")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for bad input (one line on stderr)."""
    parser = Parser(prog="compare_grids.py", description="Compare two grids of synthetic spectra, star by star.")
    parser.add_argument("grid", type=Path)
    parser.add_argument("reference", type=Path)
    arguments = parser.parse_args(argv)
    try:
        print("\n".join(compare(read_grid(arguments.grid), read_grid(arguments.reference))))
    except (ValueError, OSError, KeyError) as error:
        print(f"compare_grids.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
