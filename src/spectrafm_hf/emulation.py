# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""From a grid of synthetic spectra to an emulator of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from tqdm.auto import tqdm

from .data.schema import LABEL_UNITS, label_names_of
from .models import SpectrumEmulator, SpectrumEmulatorConfig
from .synthesis.sampling import APSTAR_WAVELENGTH


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
    rows = load_dataset(str(path), split="train").with_format("numpy")
    names = label_names_of(rows.column_names)
    columns = {name: rows[name][:] for name in ("wavelength", "flux", *names)}
    wavelength = np.asarray(columns["wavelength"])
    if wavelength.dtype == object or np.any(wavelength != wavelength[0]):
        raise ValueError(f"{path}: wavelength: expected one grid for all spectra")
    labels = np.stack([np.asarray(columns[name], dtype=float) for name in names], axis=1)
    continuum = np.asarray(rows["continuum"][:]) if "continuum" in rows.column_names else None
    return Grid(names, labels, wavelength[0].astype(float), np.asarray(columns["flux"]), continuum)


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
        If the grid has not so many components.
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
    low, high = grid.labels.min(axis=0), grid.labels.max(axis=0)
    config = SpectrumEmulatorConfig(
        label_names=list(grid.label_names),
        label_units=[LABEL_UNITS[name] for name in grid.label_names],
        # Rounded, for messages, to float32, which the grid is in.
        label_minimum=[float(f"{value:.7g}") for value in low],
        label_maximum=[float(f"{value:.7g}") for value in high],
        num_stars=len(grid),
        num_pixels=len(grid.wavelength),
        component_groups=list(component_groups),
        fluxed=grid.continuum is not None,
        flux_unit="erg s-1 cm-2 Angstrom-1" if grid.continuum is not None else "",
        resolving_power=resolving_power,
    )
    emulator = SpectrumEmulator(config)
    labels = torch.from_numpy(grid.labels)
    features = emulator.standardize(labels)
    emulator.center.copy_(features.mean(dim=0))
    emulator.scale.copy_(features.std(dim=0))
    emulator.stars.copy_(emulator.standardize(labels))
    features = emulator.stars.double()
    emulator.wavelength.copy_(torch.from_numpy(grid.wavelength))
    emulator.mean.copy_(torch.from_numpy(mean))
    emulator.components.copy_(torch.from_numpy(components))
    neighbours = torch.cdist(features[:, :3], features[:, :3]).fill_diagonal_(torch.inf).amin(dim=1)
    config.max_distance = round(float(neighbours.max()), 4)

    start = 0
    for number, (size, group) in enumerate(zip(component_groups, emulator.groups, strict=True), start=1):
        description = f"fitting component group {number} of {len(component_groups)}"
        fit_group(group, features, targets[:, start : start + size], steps, description)
        start += size
    return emulator.eval()


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
