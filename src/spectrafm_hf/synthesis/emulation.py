# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""From a grid of synthetic spectra to an emulator of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.linalg import eigh
from scipy.ndimage import gaussian_filter1d
from tqdm.auto import tqdm

from ..data.schema import LABEL_UNITS, label_names_of
from ..models import SpectrumEmulator, SpectrumEmulatorConfig
from ..models.modeling_emulator import Coefficients, quantize
from .sampling import APSTAR_WAVELENGTH


#: Names of labels in the grids that came before this project, and here.
OTHER_NAMES = {"feh": "fe_h", "vmic": "vmicro"} | {
    element: f"{element}_fe" for element in ("c", "n", "o", "mg", "si", "al", "ca", "ti", "mn", "ni")
}


@dataclass(frozen=True)
class Grid:
    """
    Synthetic spectra on one wavelength grid.

    Attributes
    ----------
    label_names : list of str
    labels : array of shape (stars, labels)
        In the units of [`LABEL_UNITS`].
    wavelength : array of shape (pixels,), float64
        Angstrom, vacuum.
    flux : array of shape (stars, pixels)
        Divided by the continuum.
    continuum : array of shape (stars, pixels), or None
        Surface flux density in erg s-1 cm-2 Angstrom-1.
    """

    label_names: list[str]
    labels: np.ndarray
    wavelength: np.ndarray
    flux: np.ndarray
    continuum: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, stars) -> "Grid":
        continuum = None if self.continuum is None else self.continuum[stars]
        return Grid(self.label_names, self.labels[stars], self.wavelength, self.flux[stars], continuum)


def read_grid(path: str | Path) -> Grid:
    """
    A grid as `scripts/synthesize_grid.py` writes it, or an .npz file with `labels`, `label_names`, `norm_u16` (flux
    times 65535 / 1.2), perhaps `continuum`, and `wavelength` (without it: the apStar grid of APOGEE).

    Raises
    ------
    ValueError
        If a part is missing, or the spectra do not share a wavelength grid.
    """
    if str(path).endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in file.files}
        if missing := {"labels", "label_names", "norm_u16"} - set(parts):
            raise ValueError(f"{path}: expected arrays labels, label_names and norm_u16, got none for {missing}")
        flux = (parts["norm_u16"] * (1.2 / 65535)).astype(np.float32)
        wavelength = parts.get("wavelength", APSTAR_WAVELENGTH[: flux.shape[1]])
        names = [OTHER_NAMES.get(str(name), str(name)) for name in parts["label_names"]]
        return Grid(names, parts["labels"].astype(float), wavelength, flux, parts.get("continuum"))
    files = sorted(Path(path, "data").glob("*.parquet"))
    if not files:
        raise ValueError(f"{path}: expected a folder with data/*.parquet, got none of these files")
    names = label_names_of(pq.read_schema(files[0]).names)
    pixels: dict[str, list[np.ndarray]] = {"flux": [], "continuum": []}
    labels, wavelength = [], None
    for file in files:  # one after the other: a library at high resolution fills the memory
        table = pq.read_table(file, columns=["wavelength", *pixels, *names])
        labels.append(np.stack([table[name].to_numpy().astype(float) for name in names], axis=1))
        for name in ("wavelength", *pixels):
            column = table[name].combine_chunks()
            rows = column.flatten().to_numpy(zero_copy_only=False)
            if rows.size % len(table):
                raise ValueError(f"{path}: {name}: expected one wavelength grid for all spectra")
            rows = rows.reshape(len(table), -1)
            if name != "wavelength":
                pixels[name].append(rows)
                continue
            wavelength = rows[0] if wavelength is None else wavelength
            if rows.shape[1] != wavelength.size or np.any(rows != wavelength):
                raise ValueError(f"{path}: wavelength: expected one grid for all spectra")
    flux, continuum = (np.concatenate(parts) for parts in pixels.values())
    return Grid(names, np.concatenate(labels), wavelength.astype(float), flux, continuum)


def fit_emulator(
    grid: Grid,
    component_groups: Sequence[int] = (8, 32, 110),
    resolving_power: float = 0.0,
    steps: int = 250,
) -> SpectrumEmulator:
    """
    An emulator of the spectra of a grid.

    Principal components of the spectra (and of the logarithm of the continuum); their weights are Gaussian processes
    over the labels, whose covariance functions, one for each group of components, maximise the marginal likelihood.
    Nothing is drawn at random.

    Parameters
    ----------
    grid : Grid
    component_groups : sequence of int
        Numbers of components that share a covariance function, strongest first.
    resolving_power : float
        What is known of the spectra, for the config.
    steps : int
        Of Adam, for each group.

    Raises
    ------
    ValueError
        If the grid has fewer components.
    """
    limit = min(len(grid) - 1, len(grid.wavelength))
    if sum(component_groups) > limit:
        raise ValueError(f"component_groups: expected at most {limit} for this grid, got {list(component_groups)}")
    outputs = grid.flux.astype(np.float64)
    if grid.continuum is not None:
        outputs = np.concatenate((outputs, np.log(grid.continuum.astype(np.float64))), axis=1)
    mean = outputs.mean(axis=0)
    components = np.linalg.svd(outputs - mean, full_matrices=False)[2][: sum(component_groups)]
    targets = torch.from_numpy((outputs - mean) @ components.T)
    emulator = SpectrumEmulator(
        make_config(grid, num_stars=len(grid), component_groups=list(component_groups), resolving_power=resolving_power)
    )
    features = set_labels(emulator, grid.labels)
    emulator.wavelength.copy_(torch.from_numpy(grid.wavelength))
    emulator.mean.copy_(torch.from_numpy(mean))
    emulator.components.copy_(torch.from_numpy(components))
    fit_groups(emulator.groups, component_groups, features, targets, steps, "components")
    return emulator.eval()


def make_config(grid: Grid, **settings) -> SpectrumEmulatorConfig:
    """The config of an emulator of a grid, whose further fields are `settings`."""
    low, high = grid.labels.min(axis=0), grid.labels.max(axis=0)
    return SpectrumEmulatorConfig(
        label_names=list(grid.label_names),
        label_units=[LABEL_UNITS[name] for name in grid.label_names],
        # Rounded, for messages, to float32, which the grid is in.
        label_minimum=[float(f"{value:.7g}") for value in low],
        label_maximum=[float(f"{value:.7g}") for value in high],
        num_pixels=len(grid.wavelength),
        fluxed=grid.continuum is not None,
        flux_unit="erg s-1 cm-2 Angstrom-1" if grid.continuum is not None else "",
        **settings,
    )


def set_labels(emulator: SpectrumEmulator, table: np.ndarray) -> torch.Tensor:
    """Give an emulator the labels (stars, labels) of its grid; returns them standardised, float64."""
    labels = torch.from_numpy(table)
    features = emulator.standardize(labels)
    emulator.center.copy_(features.mean(dim=0))
    emulator.scale.copy_(features.std(dim=0))
    emulator.stars.copy_(emulator.standardize(labels))
    features = emulator.stars.double()
    neighbours = torch.cdist(features[:, :3], features[:, :3]).fill_diagonal_(torch.inf).amin(dim=1)
    emulator.config.max_distance = round(float(neighbours.max()), 4)
    return features


def fit_interval_emulator(
    grid: Grid,
    component_groups: Sequence[int] = (8, 32, 110),
    resolving_power: float = 0.0,
    steps: int = 250,
    *,
    interval_pixels: int = 480,
    directions: int = 48,
    continuum_directions: int = 3,
    continuum_components: int = 10,
    regime_teff: Sequence[float] = (4450.0,),
    regime_overlap: float = 150.0,
) -> SpectrumEmulator:
    """
    An emulator of long spectra at high resolution, for which components of the whole spectrum would be too large.

    Each interval of the spectrum has a basis of its own; the coefficients of all intervals together have principal
    components, whose weights are the Gaussian processes of [`fit_emulator`], one set for each regime of Teff. Nothing
    is drawn at random.

    Parameters
    ----------
    grid, component_groups, resolving_power, steps
        See [`fit_emulator`]; the components are those of one regime.
    interval_pixels, directions, continuum_directions, continuum_components
    regime_teff, regime_overlap
        See [`SpectrumEmulatorConfig`]. The continuum of `grid` may be None. More directions cost bytes
        (`directions` for each pixel) and lower the error that no Gaussian process can correct.

    Raises
    ------
    ValueError
        If the grid, or a regime of it, has too few stars for the components or directions.
    """
    order = np.argsort(grid.labels[:, 0], kind="stable")
    grid, teff = grid[order], grid.labels[order, 0]
    edges = [-np.inf, *regime_teff, np.inf]
    # A regime learns from stars beyond its blends as well, so that it need not extrapolate there.
    parts = [
        [int(bound) for bound in np.searchsorted(teff, (low - 2 * regime_overlap, high + 2 * regime_overlap))]
        for low, high in pairwise(edges)
    ]
    limit = min(last - first for first, last in parts) - 1
    for name, number in (
        ("component_groups", sum(component_groups)),
        ("continuum_components", continuum_components),
        ("directions", directions),
    ):
        if number > limit:
            raise ValueError(f"{name}: expected at most {limit}, one less than the stars of a regime, got {number}")
    emulator = SpectrumEmulator(
        make_config(
            grid,
            num_stars=len(grid),
            component_groups=list(component_groups),
            resolving_power=resolving_power,
            interval_pixels=interval_pixels,
            directions=directions,
            continuum_directions=continuum_directions,
            continuum_components=continuum_components,
            regime_teff=[float(value) for value in regime_teff],
            regime_overlap=float(regime_overlap),
            regime_stars=parts,
        )
    )
    features = set_labels(emulator, grid.labels)
    emulator.wavelength.copy_(torch.from_numpy(grid.wavelength))
    level = grid.flux.mean(axis=0, dtype=np.float64)
    basis, coefficients = interval_basis(grid.flux - level.astype(np.float32), interval_pixels, directions)
    for target, source in zip((emulator.basis, emulator.basis_steps), quantize(basis, torch.int8), strict=True):
        target.copy_(source)
    if grid.continuum is not None:
        log_continuum = np.log(grid.continuum, dtype=np.float32)
        continuum_level = log_continuum.mean(axis=0, dtype=np.float64)
        log_continuum -= continuum_level.astype(np.float32)
        continuum_basis, continuum = interval_basis(log_continuum, interval_pixels, continuum_directions)
        emulator.continuum_basis.copy_(continuum_basis)
        level = np.concatenate((level, continuum_level))
    emulator.mean.copy_(torch.from_numpy(level))
    for number, (first, last) in enumerate(parts):
        chosen, of = slice(first, last), f"regime {number + 1} of {len(parts)}"
        groups = list(component_groups)
        fit_coefficients(
            cast(Coefficients, emulator.regimes[number]), groups, features[chosen], coefficients[chosen], steps, of
        )
        if grid.continuum is not None:
            regime, groups = cast(Coefficients, emulator.continuum_regimes[number]), [continuum_components]
            fit_coefficients(regime, groups, features[chosen], continuum[chosen], steps, f"continuum, {of}")
    return emulator.eval()


def interval_basis(spectra: np.ndarray, size: int, directions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Bases of the intervals of spectra, (intervals, directions, size), and the coefficients of the spectra in them,
    (stars, intervals, directions).

    Spectra (stars, pixels), float32, are deviations from a mean; the last interval is filled with zeros.
    """
    intervals = -(-spectra.shape[1] // size)
    # Deviations of cool stars are twice as large: without weights the bases would be theirs.
    weights = 1 / np.sqrt(np.mean(spectra**2, axis=1, keepdims=True)).clip(min=1e-6)
    bases, coefficients = torch.zeros(intervals, directions, size), torch.empty(len(spectra), intervals, directions)
    for i in range(intervals):
        part = spectra[:, i * size : (i + 1) * size]
        width = part.shape[1]
        weighted = (part * weights).astype(np.float64)
        products = weighted.T @ weighted  # there may be thousands of stars, but an interval is short
        first = max(0, width - directions)
        basis = eigh(products, subset_by_index=(first, width - 1))[1].T[::-1]
        bases[i, : len(basis), :width] = torch.from_numpy(basis.copy())
        coefficients[:, i] = torch.from_numpy(part) @ bases[i, :, :width].T
    return bases, coefficients


def fit_coefficients(
    regime: Coefficients,
    component_groups: Sequence[int],
    features: torch.Tensor,
    coefficients: torch.Tensor,
    steps: int,
    description: str,
) -> None:
    """
    Fit one regime.

    Parameters
    ----------
    features : tensor of shape (stars, labels), float64
        Standardised.
    coefficients : tensor of shape (stars, intervals, directions)
    """
    mean = coefficients.mean(dim=0)
    regime.mean.copy_(mean)
    deviations = (coefficients - mean).double().flatten(1)
    # The components from the stars' products with each other: there are fewer stars than coefficients.
    _, vectors = torch.linalg.eigh(deviations @ deviations.T)
    strongest = vectors[:, -sum(component_groups) :].flip(1)
    components = torch.nn.functional.normalize(strongest.T @ deviations, dim=1)
    integers, row_steps = quantize(components.unflatten(1, mean.shape), torch.int16)
    regime.components.copy_(integers)
    regime.steps.copy_(row_steps)
    targets = deviations @ components.T
    fit_groups(regime.groups, component_groups, features, targets, steps, f"components, {description}")


def fit_groups(groups, sizes: Sequence[int], features, targets, steps: int, what: str) -> None:
    """Fit covariance groups to targets (stars, components) in turn."""
    for number, (group, part) in enumerate(zip(groups, targets.split(list(sizes), dim=1), strict=True), start=1):
        fit_group(group, features, part, steps, f"fitting {what}, group {number} of {len(groups)}")


def fit_group(group, features: torch.Tensor, targets: torch.Tensor, steps: int, description: str) -> None:
    """
    Find the covariance function of a group, and its weights for these stars.

    Parameters
    ----------
    group : CovarianceGroup
    features : tensor of shape (stars, labels)
    targets : tensor of shape (stars, components)
    """
    spread = targets.std(dim=0)
    share = spread / spread.sum()
    log_noise = torch.tensor(-6.0, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        # Temperature, gravity and metallicity act on all lines, an abundance on its own.
        group.log_length.fill_(1.0)
        group.log_length[:3] = 0.0
        group.log_scale.fill_(-1.0)
        group.log_scale[:3] = 0.0
        group.log_amplitude.copy_(torch.tensor([-1.0, -3.0, 0.0]))
    group.double()
    learned = [group.log_length, group.log_scale, group.log_amplitude, log_noise]
    optimizer = torch.optim.Adam(learned, lr=0.06)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    identity = torch.eye(len(features), dtype=torch.float64)
    standardised = targets / spread

    def solve():
        factor = torch.linalg.cholesky(group.covariance(features, features) + (log_noise.exp() + 1e-8) * identity)
        return factor, torch.cholesky_solve(standardised, factor)

    for _ in tqdm(range(steps), desc=description, delay=2, disable=None):
        factor, weights = solve()
        misfit = ((standardised * weights).sum(dim=0) * share).sum()
        loss = 0.5 * misfit + torch.log(torch.diagonal(factor)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        # The weights that go with the covariance function as it is saved.
        group.float()
        group.weight.copy_(solve()[1] * spread)


def emulator_errors(emulator: SpectrumEmulator, grid: Grid) -> np.ndarray:
    """
    Rms over pixels of emulated - synthesised flux, in shape (stars,): of the continuum-normalised flux, or in units
    of the mean flux of the star where the emulator is fluxed.
    """
    labels = dict(zip(grid.label_names, grid.labels.T, strict=True))
    _, flux = emulator.synthesize(**labels)
    truth = grid.flux.astype(np.float64)
    if emulator.config.fluxed and grid.continuum is not None:
        truth = truth * grid.continuum
        flux, truth = flux / truth.mean(axis=1, keepdims=True), truth / truth.mean(axis=1, keepdims=True)
    return np.sqrt(np.mean((flux - truth) ** 2, axis=1))


def resolution_errors(
    emulator: SpectrumEmulator, grid: Grid, resolving_power: float, ranges: Sequence[tuple[float, float]]
) -> np.ndarray:
    """
    Rms of emulated - synthesised flux, divided by the continuum, at a resolving power.

    Parameters
    ----------
    grid : Grid
        Evenly sampled in ln(wavelength).
    ranges : sequence of (float, float)
        Angstrom, vacuum.

    Returns
    -------
    array of shape (stars, len(ranges) + 1)
        Of the pixels in each range, and last of all pixels.
    """
    step = np.log(grid.wavelength[-1] / grid.wavelength[0]) / (len(grid.wavelength) - 1)
    sigma = 1 / (resolving_power * 2 * np.sqrt(2 * np.log(2)) * step)
    chosen = [(grid.wavelength >= low) & (grid.wavelength <= high) for low, high in ranges]
    errors = np.empty((len(grid), len(ranges) + 1))
    for star, labels in enumerate(grid.labels):  # one by one, as a spectrum is long
        _, flux = emulator.synthesize(normalized=True, **dict(zip(grid.label_names, labels, strict=True)))
        deviation = gaussian_filter1d(flux[0].astype(np.float64) - grid.flux[star], sigma, mode="nearest") ** 2
        errors[star] = np.sqrt([*(deviation[pixels].mean() for pixels in chosen), deviation.mean()])
    return errors
