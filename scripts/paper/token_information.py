"""Loss of information in tokens: the bound of labels from coefficients, over that from the pixels.

    python scripts/paper/token_information.py --directions 8 16 24 --width 0.0024 0.0048

Whole APOGEE spectra of held-out synthetic stars of 4,000-6,000 K and [Fe/H] > -1, white noise, S/N 100, all labels of
the emulator free. With `--free-level` the level of each interval is unknown, as where a spectrum is not over the
continuum.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.rungs_spectrafm import Rung
from spectrafm_hf.synthesis.bases import HBAND, hband_rung
from spectrafm_hf.synthesis.bounds import OTHER_PRIOR, PRIORS, cramer_rao, emulate, held_out_labels
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import load_emulator


SHOWN = ("teff", "logg", "fe_h", "mg_fe", "o_fe", "c_fe", "n_fe")
SNR = 100.0
RANGES = {"teff": (4000.0, 6000.0), "fe_h": (-1.0, 0.6)}


def token_information(
    rung: Rung, wavelength: NDArray[np.float64], jacobian: NDArray[np.float64], *, free_level: bool
) -> NDArray[np.float64]:
    """Fisher matrices (stars, labels, labels) of what least squares keeps of derivatives (stars, labels, pixels)."""
    design = SpectrumBasis([rung]).design(wavelength)
    found = np.zeros((len(jacobian), jacobian.shape[1], jacobian.shape[1]))
    for pixels, rows in zip(design.pixels, design.rows, strict=True):
        table = rows.double().numpy()
        # An orthonormal basis of the directions: white noise stays white in it.
        left, sizes, right = np.linalg.svd(table, full_matrices=False)
        kept = right[sizes > 1e-9 * sizes.max()]
        part = jacobian[:, :, pixels]
        if free_level:
            level = table[0] / np.linalg.norm(table[0])
            kept = kept - np.outer(kept @ level, level)
        projected = part @ kept.T
        inverse = np.linalg.pinv(kept @ kept.T, rcond=1e-9, hermitian=True)
        found += SNR**2 * projected @ inverse @ projected.transpose(0, 2, 1)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="token_information.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--directions", type=int, nargs="+", default=[8, 16, 24], metavar="K")
    parser.add_argument("--width", type=float, nargs="+", default=[HBAND["width"]], metavar="LN_WAVELENGTH")
    parser.add_argument("--stars", type=int, default=40)
    parser.add_argument("--free-level", action="store_true")
    arguments = parser.parse_args(argv)
    emulator = load_emulator("emulator-hband")
    names = list(emulator.config.label_names)
    _, derivatives = emulate(emulator, held_out_labels(emulator, arguments.stars, 0, RANGES), derivatives=True)
    assert derivatives is not None
    instrument = Instrument.load("apogee")
    matrix = instrument.response(emulator.wavelength.double().numpy(), emulator.config.resolving_power)
    jacobian = np.stack([(matrix @ star.T).T for star in np.asarray(derivatives, np.float64)])
    prior = np.array([PRIORS.get(name, OTHER_PRIOR) for name in names])
    ivar = np.full(jacobian.shape[::2], SNR**2)
    pixels = np.sqrt(np.diagonal(cramer_rao(jacobian, ivar, prior), axis1=1, axis2=2))
    shown = [names.index(name) for name in SHOWN]
    print(f"{'width':>8} {'directions':>10} " + " ".join(f"{name:>7}" for name in SHOWN))
    print(f"{'pixels':>8} {'':>10} " + " ".join(f"{value:7.4g}" for value in np.median(pixels, axis=0)[shown]))
    for width in arguments.width:
        n_intervals = int(np.ceil(HBAND["width"] * HBAND["n_intervals"] / width))
        most = hband_rung(0, width=width, n_intervals=n_intervals, n_directions=max(arguments.directions))
        for n in arguments.directions:
            rung = dataclasses.replace(most, directions=most.directions[:, :n], prior=most.prior[:, :n])
            information = token_information(rung, instrument.wavelength, jacobian, free_level=arguments.free_level)
            covariance = np.linalg.inv(information + np.diag(prior**-2.0))
            ratio = np.median(np.sqrt(np.diagonal(covariance, axis1=1, axis2=2)) / pixels, axis=0)[shown]
            print(f"{width:8g} {n:10d} " + " ".join(f"{value:7.3f}" for value in ratio), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
