# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The spectrum tokenizer: (wavelength, flux, flux error) of any instrument -> tokens of SpectraFM.

It is no text tokenizer, but stands where one would stand and loads through the same Auto classes. All spectra of a
call are handled together, as padded (stars, pixels) arrays; what depends on wavelength alone is computed once where
the stars share their wavelengths.

The file reads in the order in which the data flow: settings, reading pixels, continuum, standardisation, patches,
scalars and requests; below the class, what turns the many forms of input into arrays.
"""

import copy
import inspect
import itertools
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import cached_file

from .basis_spectrafm import Evidence, SpectrumBasis
from .configuration_spectrafm import FIRST_LABEL_ID, FLUX_ID, PADDING_ID
from .gate_spectrafm import (
    ANGSTROM_PER_UNIT,
    MAX_WAVELENGTH,
    MIN_WAVELENGTH,
    SPEED_OF_LIGHT,
    GatedRow,
    air_to_vacuum,
    is_spectrum,
    is_table,
    overlaps,
    per_wavelength,
    read_spectrum,
    rows_of_table,
    to_rest,
    vacuum_to_air,
)
from .velocity_spectrafm import VelocityMeter


# Neighbouring steps that differ by more than this factor are a gap or a jump in sampling: patches end there.
STEP_JUMP = 1.2
# A step this many times wider than the usual one separates two detectors for the continuum fit.
DETECTOR_GAP = 20.0
# The model computes in float32: numbers beyond TINY and HUGE count as TINY, and as infinite; of a standardised flux it
# also needs the square.
TINY, HUGE, LARGE = 1e-30, 1e30, 1e12

CHOICES = {
    "wavelength_unit": tuple(ANGSTROM_PER_UNIT),
    "wavelength_medium": ("vacuum", "air"),
    "error_type": ("sigma", "ivar"),
    "continuum": ("none", "median", "percentile", "polynomial"),
    "clip_mode": ("clamp", "mask"),
    "sampling": ("even", "random"),
}
MODULES = (
    "basis_spectrafm.py",
    "configuration_spectrafm.py",
    "gate_spectrafm.py",
    "pipeline_spectrafm.py",
    "tokenization_spectrafm.py",
    "velocity_spectrafm.py",
)
# What stars on one grid share. As tensors these are then one row, expanded: the model sees it, and computes once.
GRID = ("wavelength", "wavelength_step")
BASIS_FILE = "basis.safetensors"
# Of spectra whose errors are unknown, they are taken for this share of the level, and then for what the misfit says.
UNKNOWN_ERROR = 0.02
# What the Auto classes read in the saved files beside the settings.
FOREIGN_KEYS = {"auto_map", "feature_extractor_type", "processor_class", "tokenizer_class"}


@dataclass
class EvidenceOnGrid:
    """
    What stars on one grid say, and how they say it.

    Attributes
    ----------
    stars : int array of shape (B,)
        Which of the stars that were given.
    wavelength : array of shape (pixels,)
        Angstrom, vacuum, rest frame, increasing.
    flux, inverse_variance : array of shape (B, pixels)
        In the unit given; 0 where a pixel does not count.
    resolving_power : float, optional
    evidence : Evidence
    """

    stars: np.ndarray
    wavelength: np.ndarray
    flux: np.ndarray
    inverse_variance: np.ndarray
    resolving_power: float | None
    evidence: Evidence


class SpectraFMTokenizer(FeatureExtractionMixin):
    """
    Turn spectra into the inputs of [`SpectraFMModel`].

    In order: units to Angstrom, air to vacuum, to the rest frame, mask what is not usable, sort, divide by the
    continuum, standardise, clip, cut into patches, keep at most `max_length` of them, pad.

    Parameters
    ----------
    label_names : list[str]
        The vocabulary of the checkpoint, in the order of its config.
    requests : list[str], optional
        What is asked for when a call names nothing; all labels by default.
    patch_size : int
        Consecutive pixels in a token. Patches never bridge a gap or a jump in sampling.
    wavelength_unit : {"Angstrom", "nm", "um", "mm", "cm", "m"}
        Unit of plain numbers; quantities bring their own.
    wavelength_medium : {"vacuum", "air"}
        What the wavelengths given are measured in; air ends at 2,000 Angstrom.
    error_type : {"sigma", "ivar"}
        What `flux_error` holds: one-sigma errors, or inverse variances (0 = masked).
    wavelength_ranges : list of [low, high], optional
        Angstrom, vacuum, rest frame: pixels outside are left out, so that patches start where each range does. For
        spectra that bring pixels of no use, such as apStar files, whose gaps between detectors are filled with zeros.
    valid_flux : [low, high], optional
        Pixels whose flux over the continuum lies outside are masked.
    continuum : {"none", "median", "percentile", "polynomial"}
        What the flux is divided by: nothing; the median of its valid pixels; a running percentile
        (`continuum_percentile` in windows of `continuum_window` in ln wavelength); a polynomial of degree
        `continuum_degree` for each detector, which absorption lines are clipped from. Pixels where it is not positive
        are masked.
    standardize_wavelength, standardize_center, standardize_scale : list[float] or float
        Flux becomes (flux - center) / scale. With `standardize_wavelength` (Angstrom, increasing) the two are tables,
        interpolated linearly; without it, two numbers.
    request_center, request_scale : list[float] or float, optional
        The same for flux that is asked for, in the shape of the other two, where an answer wants another scale than the
        input: a ratio to a typical star says nothing of how much stars differ there. By default the other two. With a
        "median" continuum, `request_center` is a typical star over its median, and where only a part of a spectrum is
        given, its level is found by comparing it with the same part of that star.
    clip : float, optional
        Standardised values beyond +-clip (without one, or with a larger one: +-1e12) are clamped or masked, as
        `clip_mode` says.
    clip_mode : {"clamp", "mask"}
    max_length : int, optional
        Keep at most so many spectrum tokens, as `sampling` says.
    sampling : {"even", "random"}
        Spread evenly over the spectrum, or drawn at random.
    seed : int
        For random sampling, where a call brings no generator; every call draws anew.
    basis_file : str, optional
        Name of the file of a [`SpectrumBasis`] beside the settings. With one, tokens are the coefficients of fixed
        intervals of ln wavelength; continuum, standardisation and patches play no part, and `patch_size` is how many
        pixels count as one token where batches are made.
    basis : SpectrumBasis, optional
        That basis itself; it is no setting, but saved in its file.

    Raises
    ------
    ValueError
        Naming the setting, the expectation and the value.
    """

    model_input_names = ["flux", "flux_error", "pixel_mask", "wavelength", "wavelength_step", "attention_mask"]

    def __init__(
        self,
        label_names: Sequence[str] = ("teff", "logg", "fe_h", "alpha_m"),
        requests: Sequence[str] | None = None,
        patch_size: int = 16,
        wavelength_unit: str = "Angstrom",
        wavelength_medium: str = "vacuum",
        error_type: str = "sigma",
        wavelength_ranges: Sequence[Sequence[float]] | None = None,
        valid_flux: Sequence[float] | None = None,
        continuum: str = "none",
        continuum_percentile: float = 90.0,
        continuum_window: float = 0.01,
        continuum_degree: int = 4,
        standardize_wavelength: Sequence[float] | None = None,
        standardize_center: Sequence[float] | float = 1.0,
        standardize_scale: Sequence[float] | float = 1.0,
        request_center: Sequence[float] | float | None = None,
        request_scale: Sequence[float] | float | None = None,
        clip: float | None = 10.0,
        clip_mode: str = "clamp",
        max_length: int | None = None,
        sampling: str = "even",
        seed: int = 0,
        basis_file: str | None = None,
        basis: SpectrumBasis | None = None,
        **kwargs,
    ):
        if unknown := kwargs.keys() - FOREIGN_KEYS:
            raise ValueError(f"settings: expected names out of {self.setting_names()}, got {sorted(unknown)}")
        super().__init__()
        self.label_names = _names("label_names", label_names)
        self.requests = None if requests is None else _names("requests", requests)
        self.patch_size = _check_integer("patch_size", patch_size, 1)
        self.wavelength_unit = wavelength_unit
        self.wavelength_medium = wavelength_medium
        self.error_type = error_type
        self.wavelength_ranges = _plain("wavelength_ranges", wavelength_ranges)
        self.valid_flux = _plain("valid_flux", valid_flux)
        self.continuum = continuum
        self.continuum_percentile = _number("continuum_percentile", continuum_percentile)
        self.continuum_window = _number("continuum_window", continuum_window)
        self.continuum_degree = _check_integer("continuum_degree", continuum_degree, 0)
        self.standardize_wavelength = _table("standardize_wavelength", standardize_wavelength)
        self.standardize_center = _table("standardize_center", standardize_center)
        self.standardize_scale = _table("standardize_scale", standardize_scale)
        self.request_center = _table("request_center", request_center)
        self.request_scale = _table("request_scale", request_scale)
        self.clip = None if clip is None else _number("clip", clip)
        self.clip_mode = clip_mode
        self.max_length = None if max_length is None else _check_integer("max_length", max_length, 1)
        self.sampling = sampling
        self.seed = _check_integer("seed", seed, 0)
        self.basis = basis
        self.basis_file = BASIS_FILE if basis is not None else basis_file
        self._check_settings()
        #: What measures velocities; a pipeline sets one with the templates of its model.
        self.velocity_meter: VelocityMeter | None = None
        self._generator = np.random.default_rng(self.seed)
        self._last_layout: tuple[np.ndarray, int, Any] = (np.empty((0, 0)), 0, None)

    def _check_settings(self):
        def demand(condition, field, expectation):
            if not condition:
                value = getattr(self, field)
                found = np.array2string(value, threshold=4) if isinstance(value, np.ndarray) else repr(value)
                raise ValueError(f"{field}: expected {expectation}, got {found}")

        for field, known in CHOICES.items():
            demand(getattr(self, field) in known, field, f"one of {known}")
        demand(0 <= self.continuum_percentile <= 100, "continuum_percentile", "0 to 100")
        demand(self.continuum_window > 0, "continuum_window", "a positive width in ln wavelength")
        demand(self.clip is None or self.clip > 0, "clip", "a positive number")
        if self.wavelength_ranges is not None:
            edges = np.asarray(self.wavelength_ranges, dtype=float)
            pairs = edges.ndim == 2 and edges.shape[1] == 2 and len(edges) > 0
            increasing = pairs and np.all(edges > 0) and np.all(np.diff(edges.ravel()) > 0)
            demand(increasing, "wavelength_ranges", "increasing [low, high] that do not overlap")
        limits = self.valid_flux
        demand(limits is None or (np.shape(limits) == (2,) and limits[0] < limits[1]), "valid_flux", "[low, high]")
        shape = () if self.standardize_wavelength is None else (np.size(self.standardize_wavelength),)
        if self.standardize_wavelength is not None:
            increasing = np.ndim(self.standardize_wavelength) == 1 and np.all(np.diff(self.standardize_wavelength) > 0)
            demand(increasing, "standardize_wavelength", "increasing wavelengths")
        fields = ["standardize_center", "standardize_scale"]
        if self.request_center is not None or self.request_scale is not None:
            fields += ["request_center", "request_scale"]
        for field in fields:
            if (value := getattr(self, field)) is None or np.shape(value) != shape:
                actual = None if value is None else np.shape(value)
                raise ValueError(f"{field}: expected the shape of standardize_wavelength, {shape}, got {actual}")
        for field in fields[1::2]:
            if not (lowest := np.min(getattr(self, field))) > 0:
                raise ValueError(f"{field}: expected positive numbers, got {lowest:g}")
        if self.requests is not None:
            self.label_ids(self.requests)

    # ------------------------------------------------------------------------------------------------ the vocabulary

    def label_ids(self, names: Sequence[str], field: str = "requests") -> list[int]:
        """Rows of the vocabulary; `ValueError` naming the known labels for an unknown name."""
        unknown = [name for name in names if name not in self.label_names]
        if unknown:
            raise ValueError(f"{field}: expected names out of {self.label_names}, got {unknown}")
        return [FIRST_LABEL_ID + self.label_names.index(name) for name in names]

    def add_label(self, name: str):
        """Make a label known that was added to the model with `add_label`."""
        if name in self.label_names:
            raise ValueError(f"name: expected a name not yet in {self.label_names}, got {name!r}")
        self.label_names = [*self.label_names, name]

    # -------------------------------------------------------------------------------------------------------- saving

    @classmethod
    def setting_names(cls) -> list[str]:
        """Names of all settings: the arguments of the class."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return [p.name for p in parameters if p.name not in ("self", "basis") and p.kind is not p.VAR_KEYWORD]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As everywhere in transformers; the basis is read from its file beside the settings."""
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if tokenizer.basis_file is not None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            where = {name: kwargs[name] for name in names if name in kwargs}
            path = cached_file(pretrained_model_name_or_path, tokenizer.basis_file, **where)
            tokenizer.basis = SpectrumBasis.from_arrays(load_file(path))
        return tokenizer

    def to_dict(self) -> dict[str, Any]:
        """The settings, and nothing else."""
        settings = {name: getattr(self, name) for name in self.setting_names()}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else copy.deepcopy(value)
            for name, value in settings.items()
        }

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """
        Write the settings where each Auto class looks for them, and the modules that read them beside them.

        The base class would write one file, and a [slow, fast] pair for each Auto class because the name of this one
        contains "Tokenizer"; only `AutoTokenizer` can read such a pair.

        Parameters
        ----------
        save_directory : path
        push_to_hub : bool
            Upload the folder as well, with `kwargs` as in `push_to_hub`; `repo_id` is the folder's name by default.

        Returns
        -------
        list[str]
            The two files of settings, which are the same.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        this_class = f"{Path(__file__).stem}.{type(self).__name__}"
        auto_map = {
            "AutoFeatureExtractor": this_class,
            "AutoProcessor": this_class,
            "AutoTokenizer": [this_class, None],
        }
        # By these names the Auto classes find the installed class, which then needs no trust_remote_code.
        names = dict.fromkeys(("feature_extractor_type", "processor_class", "tokenizer_class"), type(self).__name__)
        settings = {**self.to_dict(), **names, "auto_map": auto_map}
        files = ["preprocessor_config.json", "tokenizer_config.json"]
        if self.basis is not None:
            temporary = folder / f".{BASIS_FILE}.{secrets.token_hex(8)}"
            save_file(self.basis.arrays(), temporary)
            temporary.replace(folder / BASIS_FILE)
        for file in files:
            _write_atomically(folder / file, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for module in MODULES:
            _write_atomically(folder / module, Path(__file__).with_name(module).read_text(encoding="utf-8"))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / file) for file in files]

    # ------------------------------------------------------------------------------------------------------- calling

    def __call__(
        self,
        wavelength: Any = None,
        flux: Any = None,
        flux_error: Any = None,
        mask: Any = None,
        scalars: Mapping[str, Any] | Sequence[str] | None = None,
        requests: Sequence[Any] | None = None,
        labels: Mapping[str, Any] | Sequence[str] | None = None,
        label_errors: Mapping[str, Any] | None = None,
        radial_velocity: Any = None,
        max_length: int | None = None,
        generator: np.random.Generator | int | None = None,
        return_tensors: str | None = "pt",
        resolving_power: Any = None,
        normalised: Any = None,
        return_quality: bool = False,
        return_grids: bool = False,
    ) -> BatchFeature:
        """
        Tokenize one spectrum or a batch. What comes back goes into the model as `model(**inputs)`.

        Parameters
        ----------
        wavelength : array of shape (pixels,) or (stars, pixels), list of arrays, astropy quantity
            In any order. Or a `specutils.Spectrum` or a list of them, or a row or rows of a data set in the project's
            schema (a mapping, or a list of mappings) with `wavelength`, `flux`, and where known `flux_error`, `mask`,
            `resolving_power` and `normalised`; or a pandas DataFrame or row, an astropy Table or Row, an Arrow table,
            a Dataset, a path, a list of these; then the next three stay None. None for stars of which only scalars are
            known.
        flux : like `wavelength`
            One `wavelength` serves for many spectra. Quantities may have any unit.
        flux_error : like `flux`, optional
            In the unit of flux, or a quantity. Where a spectrum has no known error (None, or NaN at all its valid
            pixels) errors are unknown to the model.
        mask : like `flux`, of bool or int, optional
            True or not 0 where a pixel is bad. Pixels with NaN or infinite flux, and those with zero, infinite or
            single NaN errors, count as masked as well.
        scalars : mapping of name to number or array of shape (stars,)
            Known values in physical units, NaN where unknown; with rows, a list of column names.
        requests : sequence of names or wavelengths
            Labels, and wavelengths (in `wavelength_unit`, or quantities; in the rest frame) at which the flux is asked
            for. For every star the same, or a list for each star.
        labels, label_errors : like `scalars`
            True values for the loss, NaN where unknown; with rows, a list of column names, errors in `<name>_err`.
            Without `requests` they are what is asked for.
        radial_velocity : float, array of shape (stars,), quantity or "measure"
            km/s, positive for a star that recedes; the spectrum is moved to the rest frame. Measured, with a basis, it
            is that which the lines of each spectrum tell.
        max_length : int, optional
            Instead of the setting.
        generator : numpy.random.Generator or int, optional
            Source of random sampling, or its seed.
        return_tensors : {"pt", "np"}
        resolving_power : float or array of shape (stars,), optional
            With a basis: wavelength / FWHM of the spectra. Default, and where it is NaN: that of the basis.
        normalised : bool or array of shape (stars,), optional
            With a basis: whether the flux is over the continuum. Default, and where it is NaN: where its level is
            near 1.
        return_quality : bool
            With a basis: whether to add what [`star_flags`] wants and the model does not take, (stars,) each:
            `clipped`, the share of the pixels that are left out as no star could have them, and `shift`, the km/s by
            which lines seem to be away from rest where the spectrum does not look like one of a star, else 0; and where
            they are measured, `radial_velocity` and `radial_velocity_err`.
        return_grids : bool
            With a basis: whether to add `grids`, the list of [`EvidenceOnGrid`] behind the tokens, which the model does
            not take.

        Returns
        -------
        BatchFeature
            `flux`, `flux_error` (0 = unknown), `pixel_mask` (True = counts) of shape (stars, tokens, patch_size);
            `wavelength` (the middle of a full patch), `wavelength_step`, `attention_mask` (stars, tokens);
            `request_ids` (stars, requests), and where there is need for them `request_wavelength`,
            `request_wavelength_step`, `flux_center`, `flux_scale`, `labels`, `label_errors` in its shape;
            `scalar_ids`, `scalar_values` (stars, scalars). Wavelengths are Angstrom, vacuum, rest frame. An answer
            to a request of flux is `mean * flux_scale + flux_center` in the units given.

        Raises
        ------
        ValueError
            Naming field, expectation and value.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors: expected 'pt' or 'np', got {return_tensors!r}")
        max_length = self.max_length if max_length is None else _check_integer("max_length", max_length, 1)
        rng = self._generator if generator is None else _random_generator(generator)

        error_type, unit, medium = self.error_type, ANGSTROM_PER_UNIT[self.wavelength_unit], self.wavelength_medium
        if flux is None and _is_tables(wavelength):
            wavelength = _rows_of_tables(wavelength)
        if isinstance(wavelength, GatedRow) or isinstance(_first(wavelength), GatedRow):
            error_type, unit, medium = "sigma", 1.0, "vacuum"
        if _is_rows(wavelength) or _is_spectra(wavelength):
            for field, value in (("flux", flux), ("flux_error", flux_error), ("mask", mask)):
                if value is not None:
                    raise ValueError(f"{field}: expected None beside rows or spectra, got {type(value).__name__}")
        if _is_rows(wavelength):
            rows = _as_columns(wavelength)
            wavelength, flux, flux_error, mask = _pixel_columns(rows)
            resolving_power = rows.get("resolving_power") if resolving_power is None else resolving_power
            normalised = rows.get("normalised") if normalised is None else normalised
            if labels is not None and not isinstance(labels, Mapping) and label_errors is None:
                names = _names("labels", labels)
                label_errors = {name: rows[f"{name}_err"] for name in names if f"{name}_err" in rows}
            scalars, labels = _label_columns("scalars", scalars, rows), _label_columns("labels", labels, rows)
        elif _is_spectra(wavelength):
            wavelength, flux, flux_error, mask = _read_spectra(
                wavelength, self.wavelength_medium, radial_velocity is None
            )
            error_type = "sigma"
        scalars, labels = _mapping("scalars", scalars), _mapping("labels", labels)
        label_errors = _mapping("label_errors", label_errors)
        self.label_ids(list(labels), "labels")
        if alone := label_errors.keys() - labels.keys():
            raise ValueError(f"label_errors: expected names out of the labels {list(labels)}, got {sorted(alone)}")

        measured = False
        if wavelength is None and flux is None:
            pixels = _no_pixels(scalars)
        else:
            given, how = (wavelength, flux, flux_error, mask), (error_type, unit, medium)
            measured = isinstance(radial_velocity, str)
            pixels = self._read_pixels(*given, None if measured else radial_velocity, *how)
            if measured:
                found = self._velocities(pixels, radial_velocity, resolving_power)
                pixels = self._read_pixels(*given, found["radial_velocity"], *how)
        n_stars = len(pixels["flux"])
        if self.basis is not None:
            continuum = np.ones((n_stars, 1))
            grids = self._evidence_on_grids(pixels, resolving_power, normalised)
            inputs = self._evidence(grids, pixels, return_quality)
            if measured and return_quality:
                inputs |= found
        else:
            continuum = self._divide_by_continuum(pixels)
            self._standardise(pixels)
            inputs = self._patches(pixels, max_length, rng)
        if scalars:
            inputs |= self._scalars(scalars, n_stars)
        if requests is None and labels:
            requests = list(labels)
        inputs |= self._requests(requests, n_stars, pixels, continuum)
        if labels:
            inputs |= self._labels(labels, label_errors, inputs["request_ids"])
        features = BatchFeature(inputs, tensor_type=return_tensors)
        on_one_grid = (
            self.basis is None and n_stars > 1 and all(len(_one_row_if_equal(inputs[name])) == 1 for name in GRID)
        )
        if return_tensors == "pt" and on_one_grid:
            features.update({name: features[name][:1].expand(n_stars, -1) for name in GRID})
        if return_grids and self.basis is not None:
            features["grids"] = grids
        return features

    # ------------------------------------------------------------------------------------------------ reading pixels

    def _read_pixels(
        self, wavelength, flux, flux_error, mask, radial_velocity, error_type: str, unit: float, medium: str
    ) -> dict[str, np.ndarray]:
        """
        Whatever was given -> padded arrays of shape (stars, pixels), sorted by wavelength.

        `flux`, `flux_error` (0 = unknown) and `valid`; where not valid, flux and error are 0. `wavelength` and `step`,
        the distance to the nearer neighbour (0 = there is none), have one row if it serves for all stars. A pixel that
        is absent has an infinite wavelength.
        """
        for field, value in (("wavelength", wavelength), ("flux", flux)):
            if value is None:
                raise ValueError(f"{field}: expected as many numbers as in the other of wavelength and flux, got None")
        flux_unit = _unit(flux)
        flux, lengths = _padded("flux", flux, flux_unit)

        def like_flux(field, values, unit="", factor=1.0):
            """The same shape as flux, or one row for all."""
            array, own_lengths = _padded(field, values, unit, factor)
            if len(array) not in (1, len(flux)) or np.any(own_lengths != lengths):
                expected, actual = (f"{len(n)} spectra of {_range(n)} pixels" for n in (lengths, own_lengths))
                raise ValueError(f"{field}: expected the lengths of flux, {expected}, got {actual}")
            return array

        if len(flux) > 1 and isinstance(wavelength, list) and len(wavelength) == len(flux):
            wavelength = _first_if_equal(wavelength)
        wavelength = like_flux("wavelength", wavelength, "Angstrom", unit)
        wavelength = _one_row_if_equal(wavelength)
        present = np.arange(flux.shape[1]) < _one_row_if_equal(lengths[:, None])
        valid = present & (np.abs(flux) < HUGE)
        if mask is not None:
            valid &= ~like_flux("mask", mask)
        error = np.zeros_like(flux)
        if flux_error is not None:
            error_unit = flux_unit if error_type == "sigma" or not flux_unit else flux_unit**-2
            error, valid = _read_errors(like_flux("flux_error", flux_error, error_unit), valid, error_type)
        if not np.all(good := valid.any(axis=1)):
            raise ValueError(
                f"flux: expected at least one valid pixel in each spectrum, got none in spectrum {np.argmin(good)}"
            )

        if (factor := per_wavelength(flux_unit, wavelength)) is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                flux, error = flux * factor, error * factor
            valid &= np.abs(flux) < HUGE
        if medium == "air":
            wavelength = air_to_vacuum(wavelength)
        in_range = _check_range("wavelength", wavelength, valid)
        if radial_velocity is not None:
            beta = _per_star("radial_velocity", radial_velocity, len(flux), "km/s")[:, None] / SPEED_OF_LIGHT
            if np.any(wrong := ~(np.abs(beta) < 1)):
                value = beta[wrong][0] * SPEED_OF_LIGHT
                raise ValueError(f"radial_velocity: expected km/s below the speed of light, got {value:g}")
            wavelength = to_rest(wavelength, _one_row_if_equal(beta * SPEED_OF_LIGHT))
        if self.wavelength_ranges is not None:
            inside = np.any(
                [(wavelength >= low) & (wavelength <= high) for low, high in self.wavelength_ranges], axis=0
            )
            valid, in_range = valid & inside, in_range & inside
            if not np.all(good := valid.any(axis=1)):
                raise ValueError(
                    f"wavelength: expected valid pixels within {self.wavelength_ranges} Angstrom in each spectrum, "
                    f"got none in spectrum {np.argmin(good)}"
                )
        counted = present if len(present) >= len(wavelength) else np.broadcast_to(present, wavelength.shape)
        left_out = np.stack([overlaps(row) for row in np.where(counted[: len(wavelength)], wavelength, np.nan)])
        present, valid = present & ~left_out, valid & ~left_out
        # Alone in its token, a pixel that does not count is as good as absent. In a patch it keeps its place.
        exists = _one_row_if_equal(valid) if self.patch_size == 1 else present & in_range
        pixels = {
            "wavelength": np.where(exists, wavelength, np.inf),
            "flux": np.where(valid, flux, 0.0),
            "flux_error": np.where(valid, error, 0.0),
            "valid": valid,
        }
        _sort(pixels)
        steps = _steps(pixels["wavelength"])
        nearest = np.minimum(steps[:, :-1], steps[:, 1:])
        pixels["step"] = np.where(np.isfinite(nearest), nearest, 0.0)
        return pixels

    def _velocities(self, pixels: dict[str, np.ndarray], asked: str, resolving_power) -> dict[str, np.ndarray]:
        """What lines tell of the velocity of each star, and its error, (stars,) in km/s."""
        if asked != "measure":
            raise ValueError(f"radial_velocity: expected km/s or 'measure', got {asked!r}")
        if self.basis is None:
            raise ValueError(
                "radial_velocity: expected a model on evidence (token_embedding='basis') to measure it with"
            )
        meter = self.velocity_meter or VelocityMeter(self.basis)
        n_stars = len(pixels["flux"])
        powers = _optional("resolving_power", resolving_power, n_stars)
        found = []
        for star in range(n_stars):
            wavelength = pixels["wavelength"][star % len(pixels["wavelength"])]
            error, valid = pixels["flux_error"][star], pixels["valid"][star]
            error = np.where(error > 0, error, np.nan)
            velocity = meter(wavelength, pixels["flux"][star], error, ~valid, float(powers[star]))
            if velocity.cause:
                raise ValueError(f"{velocity.cause} in spectrum {star}")
            found.append((velocity.value, velocity.error))
        values, errors = np.array(found).T
        return {"radial_velocity": values, "radial_velocity_err": errors}

    # ------------------------------------------------------------------------------------------------------ evidence

    def evidence(self, rows, resolving_power=None, normalised=None) -> list[EvidenceOnGrid]:
        """
        What rows of a data set say, as their tokens have it, beside the pixels that say it. Needs a basis.

        Parameters
        ----------
        rows, resolving_power, normalised
            As in a call.

        Returns
        -------
        list of EvidenceOnGrid
            Each has stars that share their wavelengths.
        """
        wavelength, flux, flux_error, mask = _pixel_columns(_as_columns(rows))
        unit = ANGSTROM_PER_UNIT[self.wavelength_unit]
        pixels = self._read_pixels(
            wavelength, flux, flux_error, mask, None, self.error_type, unit, self.wavelength_medium
        )
        return self._evidence_on_grids(pixels, resolving_power, normalised)

    def _evidence_on_grids(self, pixels: dict[str, np.ndarray], resolving_power, normalised) -> list[EvidenceOnGrid]:
        """Each grid is dealt with once."""
        basis: Any = self.basis
        wavelength, flux, error, valid = (pixels[name] for name in ("wavelength", "flux", "flux_error", "valid"))
        n_stars = len(flux)
        powers = _optional("resolving_power", resolving_power, n_stars)
        if np.any(wrong := ~(np.isnan(powers) | ((powers > 0) & (powers < HUGE)))):
            raise ValueError(f"resolving_power: expected positive numbers, got {powers[wrong][0]:g}")
        normalised = _optional("normalised", normalised, n_stars)
        groups: dict[tuple[bytes, str], list[int]] = {}
        for star in range(n_stars):
            grid = wavelength[star].tobytes() if len(wavelength) > 1 else b""
            groups.setdefault((grid, str(powers[star])), []).append(star)
        found = []
        for stars in groups.values():
            row = wavelength[stars[0] % len(wavelength)]
            here = np.isfinite(row)
            if not here.any():
                continue
            values, sigma, good = (_chosen(array, stars, here) for array in (flux, error, valid))
            own, power = normalised[stars], None if np.isnan(powers[stars[0]]) else float(powers[stars[0]])
            known: Any = (good & (sigma > 0)).any(axis=1)
            if not known.all():
                guess = UNKNOWN_ERROR * np.mean(np.abs(values), axis=1, where=good, keepdims=True)
                sigma = np.where(known[:, None], sigma, np.where(guess > 0, guess, 1.0))
            row, values, weight, power = basis.brought_down(row[here], values, _inverse_variance(sigma, good), power)
            evidence = basis.evidence(row, values, weight, power, own)
            if not known.all():
                misfit = np.array([np.nanmedian(star) if np.isfinite(star).any() else 1.0 for star in evidence.misfit])
                weight /= np.where(known, 1.0, np.maximum(misfit, 1e-6))[:, None]
                evidence = basis.evidence(row, values, weight, power, own)
            found.append(EvidenceOnGrid(np.array(stars), row, values, weight, power, evidence))
        return found

    def _evidence(
        self, found: list[EvidenceOnGrid], pixels: dict[str, np.ndarray], return_quality: bool
    ) -> dict[str, np.ndarray]:
        """Coefficients of all intervals that any of the stars has pixels in."""
        basis: Any = self.basis
        error, valid = pixels["flux_error"], pixels["valid"]
        n_stars = len(valid)
        # All intervals of a rung, so that stars that lack some can be put beside those that lack others.
        rungs = [rung for rung in basis.rungs if any(rung.has(grid.evidence.intervals) for grid in found)]
        intervals = np.concatenate([rung.first_interval + np.arange(rung.n_intervals) for rung in rungs] or [[]])
        intervals = intervals.astype(np.int64)
        shape = (n_stars, len(intervals), basis.n_coefficients)
        inputs = {
            "coefficients": np.zeros(shape, np.float32),
            "reliability": np.zeros(shape, np.float32),
            "interval_ids": np.tile(intervals, (n_stars, 1)),
            "attention_mask": np.zeros(shape[:2], bool),
            "estimate": np.zeros(shape, np.float32),
            "information": np.zeros((shape[1], n_stars, shape[2], shape[2]), np.float32).swapaxes(0, 1),
            "pull": np.zeros(shape, np.float32),
            "misfit": np.full(shape[:2], np.nan, np.float32),
        }
        quality = {name: np.zeros(n_stars, np.float32) for name in ("clipped", "shift")}
        for grid in found:
            stars, evidence = grid.stars, grid.evidence
            columns = np.searchsorted(intervals, evidence.intervals)
            rows = slice(None) if len(stars) == n_stars else np.array(stars)
            for name, values in inputs.items():
                own = evidence.seen if name == "attention_mask" else getattr(evidence, name, None)
                if own is not None and own.shape == values.shape:
                    inputs[name] = own
                elif own is not None:
                    for number, column in enumerate(columns):
                        values[rows, column] = own[:, number]
            share = evidence.clipped.sum(axis=1) / np.maximum(valid[stars].sum(axis=1), 1)
            quality["clipped"][stars] = share
            known = (error[stars] > 0).any(axis=1)
            strange: Any = np.flatnonzero(basis.strange(evidence, share) & known) if return_quality else []
            if len(strange) and basis.tells_velocity(grid.wavelength, grid.resolving_power):
                quality["shift"][stars[strange]] = basis.shifts(
                    grid.wavelength,
                    grid.flux[strange],
                    grid.inverse_variance[strange].astype(np.float64),
                    grid.resolving_power,
                )
        return inputs | (quality if return_quality else {})

    # ---------------------------------------------------------------------------------- continuum, standardisation

    def _divide_by_continuum(self, pixels: dict[str, np.ndarray]) -> np.ndarray:
        """Divide in place; the continuum itself, (stars, pixels), or (stars, 1) where it is one number."""
        wavelength, flux, valid = pixels["wavelength"], pixels["flux"], pixels["valid"]
        continuum = np.ones((len(flux), 1))
        if self.continuum != "none" and flux.shape[1] > 0:
            if self.continuum == "median":
                continuum = _median(flux, valid)
            else:
                fit = self._running_percentile if self.continuum == "percentile" else self._polynomial
                lengths = np.isfinite(wavelength).sum(axis=1)
                if len(wavelength) == 1 and lengths[0] == flux.shape[1]:
                    # Stars that share their wavelengths are fitted together.
                    continuum = fit(wavelength[0], flux, valid)
                else:
                    continuum = np.zeros_like(flux)
                    for rows, n in enumerate(lengths):
                        stars = slice(None) if len(wavelength) == 1 else slice(rows, rows + 1)
                        continuum[stars, :n] = fit(wavelength[rows, :n], flux[stars, :n], valid[stars, :n])
            continuum = continuum.astype(flux.dtype, copy=False)
            positive = continuum > 0
            valid &= positive
            if not np.all(good := valid.any(axis=1)):
                raise ValueError(
                    f"flux: expected a positive continuum ({self.continuum}) in each spectrum, "
                    f"got none in spectrum {np.argmin(good)}"
                )
            continuum[~positive] = 1.0
            with np.errstate(over="ignore"):
                flux /= continuum
                pixels["flux_error"] /= continuum
        if self.valid_flux is not None:
            with np.errstate(over="ignore"):
                low, high = np.asarray(self.valid_flux, flux.dtype)
            valid &= (flux >= low) & (flux <= high)
        return continuum

    def _running_percentile(self, wavelength: np.ndarray, flux: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """(pixels,), (stars, pixels) twice -> percentile in half-overlapping windows, joined by straight lines."""
        position, half = np.log(wavelength), 0.5 * self.continuum_window
        # Windows lie at multiples of their half width, whatever else a spectrum covers. So a window is made of the two
        # cells between its centre and those of its neighbours, each of which is sorted once; of pixels that do not
        # count, first, and of what lies below the percentile of both its windows, nothing is needed.
        centers = half * np.arange(np.floor(position[0] / half), np.floor(position[-1] / half) + 2)
        edges = np.searchsorted(position, centers)
        edges[0], edges[-1] = 0, position.size  # whatever rounding says
        masked = np.where(valid, flux, np.array(-np.inf, flux.dtype))
        counts = np.stack([valid[:, low:high].sum(axis=1) for low, high in itertools.pairwise(edges)], axis=1)
        zeros = np.zeros((len(flux), 1), counts.dtype)
        counts = np.concatenate((zeros, counts), axis=1) + np.concatenate((counts, zeros), axis=1)  # of windows
        above = counts - 1 - np.rint(self.continuum_percentile / 100.0 * np.maximum(counts - 1, 0)).astype(int)
        n_top = int(above.max()) + 1
        cells = [np.sort(masked[:, low:high], axis=1)[:, -n_top:] for low, high in itertools.pairwise(edges)]
        nothing = masked[:, :0]
        heights = np.full((len(flux), centers.size), np.nan, dtype=flux.dtype)
        for window, (left, right) in enumerate(itertools.pairwise([nothing, *cells, nothing])):
            ordered = np.sort(np.concatenate((left, right), axis=1), axis=1)
            rank = ordered.shape[1] - 1 - above[:, [window]]
            known = counts[:, window] > 0
            heights[known, window] = np.take_along_axis(ordered[known], rank[known], axis=1)[:, 0]
        for height, known in zip(heights, np.isfinite(heights), strict=True):
            if not known.all():  # on the line between its neighbours, which changes none
                height[:] = np.interp(centers, centers[known], height[known])
        line = np.empty_like(flux)
        for cell, (low, high) in enumerate(itertools.pairwise(edges)):
            weight = ((position[low:high] - centers[cell]) / half).astype(flux.dtype)
            part, start = line[:, low:high], heights[:, [cell]]
            np.multiply(heights[:, [cell + 1]] - start, weight, out=part)
            part += start
        return line

    def _polynomial(self, wavelength: np.ndarray, flux: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """(pixels,), (stars, pixels) twice -> a polynomial for each detector, fitted again without what is below it."""
        step = np.diff(wavelength)
        ends = np.flatnonzero(step > DETECTOR_GAP * np.median(step)) + 1 if step.size else np.array([], dtype=int)
        continuum = np.empty_like(flux)
        for piece in np.split(np.arange(wavelength.size), ends):
            x, y, good = wavelength[piece], flux[:, piece], valid[:, piece]
            x = 2.0 * (x - x[0]) / max(x[-1] - x[0], 1.0) - 1.0
            basis = np.polynomial.chebyshev.chebvander(x, self.continuum_degree)
            products = (basis[:, :, None] * basis[:, None, :]).reshape(x.size, -1)
            use = good
            for _ in range(6):
                normal = (use @ products).reshape(-1, basis.shape[1], basis.shape[1])
                # The pseudo-inverse also serves a star with fewer pixels than coefficients.
                coefficients = np.linalg.pinv(normal, rcond=1e-10, hermitian=True) @ ((use * y) @ basis)[..., None]
                curve = (basis @ coefficients)[..., 0]
                residual = y - curve
                count = np.maximum(use.sum(axis=1, keepdims=True), 1)
                spread = np.sqrt(np.sum(use * residual**2, axis=1, keepdims=True) / count)
                closer = good & (residual >= -0.5 * spread) & (residual <= 3.0 * spread)
                enough = closer.sum(axis=1, keepdims=True) > 4 * self.continuum_degree
                before, use = use, np.where(enough, closer, use)
                if np.array_equal(use, before):
                    break
            continuum[:, piece] = curve
        return continuum

    def _center_and_scale(self, wavelength: np.ndarray, requested: bool = False) -> tuple[Any, Any]:
        """What standardises the flux at each wavelength, that of the input or that which is asked for."""
        center, scale = self.standardize_center, self.standardize_scale
        if requested and self.request_scale is not None:
            center, scale = self.request_center, self.request_scale
        if self.standardize_wavelength is None:
            return center, scale
        grid = np.asarray(self.standardize_wavelength)
        return np.interp(wavelength, grid, np.asarray(center)), np.interp(wavelength, grid, np.asarray(scale))

    def _standardise(self, pixels: dict[str, np.ndarray]):
        """Centre, scale and clip in place, to float32; what is not valid becomes 0."""
        flux, error, valid = pixels["flux"], pixels["flux_error"], pixels["valid"]
        known = error > 0
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            center, scale = (np.asarray(table, flux.dtype) for table in self._center_and_scale(pixels["wavelength"]))
            clip = np.float32(LARGE if self.clip is None else min(self.clip, LARGE))
            flux -= center
            flux /= scale
            error /= scale
            flux, error = flux.astype(np.float32, copy=False), error.astype(np.float32, copy=False)
        valid &= np.isfinite(flux)
        valid &= np.isfinite(error)
        if self.clip_mode == "mask":
            valid &= np.abs(flux) <= clip
        else:
            np.clip(flux, -clip, clip, out=flux)
        flux[~valid] = 0.0
        # A known error stays known: it may not round to 0.
        np.maximum(error, TINY, out=error)
        error[~(valid & known)] = 0.0
        pixels["flux"], pixels["flux_error"] = flux, error
        if valid.shape[1] and not np.all(good := valid.any(axis=1)):
            raise ValueError(
                f"flux: expected a pixel within valid_flux={self.valid_flux} and clip={self.clip} in each spectrum, "
                f"got none in spectrum {np.argmin(good)}"
            )

    # ------------------------------------------------------------------------------------------------------- patches

    def _patches(self, pixels: dict[str, np.ndarray], max_length, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut into runs of `patch_size` pixels, drop those without a valid pixel, keep `max_length`."""
        slot = np.arange(self.patch_size)

        def at(name, index):
            """(stars or 1, pixels), (stars or 1, ...) -> what is at these pixels."""
            values = pixels[name]
            flat = np.minimum(index, values.shape[1] - 1).reshape(len(index), -1)
            # The stars often share their layout, and this is the faster way.
            taken = values.take(flat[0], axis=1) if len(flat) == 1 else np.take_along_axis(values, flat, axis=1)
            return taken.reshape(len(taken), *index.shape[1:])

        def patches_of(name, start, length):
            """-> (stars, tokens, patch_size), 0 beyond the length of a patch."""
            taken, beyond = at(name, start[..., None] + slot), slot >= length[..., None]
            if len(beyond) == 1:
                taken[:, beyond[0]] = 0
            else:
                taken[beyond] = 0
            return taken

        start, length = self._layout(pixels["wavelength"])
        chosen, keep = self._choose(patches_of("valid", start, length).any(axis=-1), max_length, rng)
        length = np.where(keep, np.take_along_axis(length, chosen, axis=1), 0)
        start = np.take_along_axis(start, chosen, axis=1)
        start, length = _one_row_if_equal(start), _one_row_if_equal(length)

        first, last = at("wavelength", start), at("wavelength", start + np.maximum(length - 1, 0))
        step = np.where(length > 1, (last - first) / np.maximum(length - 1, 1), at("step", start))
        middle = first + 0.5 * (self.patch_size - 1) * step
        return {
            "flux": patches_of("flux", start, length),
            "flux_error": patches_of("flux_error", start, length),
            "pixel_mask": patches_of("valid", start, length),
            "wavelength": np.where(keep, middle, 0.0).astype(np.float32),
            "wavelength_step": np.where(keep, step, 0.0).astype(np.float32),
            "attention_mask": keep,
        }

    def _layout(self, wavelength: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[`_runs`], found once for a survey whose spectra share their wavelengths."""
        of_grid, of_size, found = self._last_layout
        if of_size != self.patch_size or not np.array_equal(of_grid, wavelength):
            found = _runs(wavelength, self.patch_size)
            if len(wavelength) == 1:
                self._last_layout = wavelength, self.patch_size, found
        return found

    def _choose(
        self, usable: np.ndarray, max_length: int | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(stars, tokens) -> indices of the tokens that stay, in order, and which of them are real: (stars, kept)."""
        count = usable.sum(axis=1)
        n_kept = int(count.max(initial=0))
        if max_length is not None and max_length < n_kept:
            n_kept = max_length
            if self.sampling == "random":
                draw = np.where(usable, rng.random(usable.shape), np.inf)
                usable = usable & (draw <= np.partition(draw, n_kept - 1, axis=1)[:, [n_kept - 1]])
                count = usable.sum(axis=1)
        kept = np.minimum(count, n_kept)[:, None]
        position = np.arange(n_kept)
        keep = position < kept
        # Evenly spread among the usable tokens of a star; all of them where all are kept.
        rank = (2 * position + 1) * count[:, None] // np.maximum(2 * kept, 1)
        tokens = np.nonzero(usable)[1]
        before = (np.cumsum(count) - count)[:, None]
        chosen = np.zeros(keep.shape, dtype=int)
        chosen[keep] = tokens[(before + rank)[keep]]
        return chosen, keep

    # ----------------------------------------------------------------------------------------- scalars and requests

    def _scalars(self, scalars: Mapping[str, Any], n_stars: int) -> dict[str, np.ndarray]:
        """Scalars that are known (finite), pushed to the left; padding has id 0."""
        ids = np.array(self.label_ids(list(scalars), "scalars"))
        values = np.stack([_per_star(f"scalars[{name!r}]", scalars[name], n_stars) for name in scalars], axis=1)
        known = np.abs(values) < HUGE
        order = np.argsort(~known, axis=1, kind="stable")[:, : int(known.sum(axis=1).max())]
        known, values = (np.take_along_axis(array, order, axis=1) for array in (known, values))
        return {
            "scalar_ids": np.where(known, ids[order], PADDING_ID),
            "scalar_values": np.where(known, values, 0.0).astype(np.float32),
        }

    def _requests(self, requests, n_stars: int, pixels, continuum) -> dict[str, np.ndarray]:
        """Ids of the requests; for flux also where, over what step, and how to come back to the units given."""
        if requests is None:
            requests = self.label_names if self.requests is None else self.requests
        rows = _request_rows(requests, n_stars)
        factor = ANGSTROM_PER_UNIT[self.wavelength_unit]
        width = max(map(len, rows))
        ids = np.full((len(rows), width), PADDING_ID)
        where = np.zeros((len(rows), width))
        for star, row in enumerate(rows):
            for column, request in enumerate(row):
                if isinstance(request, str):
                    ids[star, column] = self.label_ids([request])[0]
                else:
                    ids[star, column] = FLUX_ID
                    where[star, column] = _number("requests", request, "Angstrom", factor)
        if self.wavelength_medium == "air":
            where = air_to_vacuum(where)
        _check_range("requests", where, ids == FLUX_ID)
        ids, where = (np.broadcast_to(array, (n_stars, width)).copy() for array in (ids, where))
        is_flux = ids == FLUX_ID
        if not is_flux.any():
            return {"request_ids": ids}

        level, step = np.ones(where.shape), np.zeros(where.shape)
        typical = np.ones_like(pixels["wavelength"])
        if self.continuum == "median" and self.request_center is not None:
            typical = typical * self._center_and_scale(pixels["wavelength"], requested=True)[0]
        for star, valid in enumerate(pixels["valid"]):
            if valid.any():
                wavelength, spacing, height = (
                    np.broadcast_to(array[star % len(array)], valid.shape)[valid]
                    for array in (pixels["wavelength"], pixels["step"], continuum)
                )
                typical_level = np.median(typical[star % len(typical)][valid])
                level[star] = np.interp(where[star], wavelength, height) / (typical_level if typical_level > 0 else 1.0)
                step[star] = np.interp(where[star], wavelength, spacing)
        center, scale = self._center_and_scale(where, requested=True)
        return {
            "request_ids": ids,
            "request_wavelength": where.astype(np.float32),
            "request_wavelength_step": np.where(is_flux, step, 0.0).astype(np.float32),
            "flux_center": np.where(is_flux, center * level, 0.0).astype(np.float32),
            "flux_scale": np.where(is_flux, scale * level, 1.0).astype(np.float32),
        }

    def _labels(self, labels, label_errors, request_ids: np.ndarray) -> dict[str, np.ndarray]:
        """True values and their errors in the shape of the requests; NaN where unknown."""
        outputs = {}
        for field, columns in (("labels", labels), ("label_errors", label_errors)):
            table = np.full((len(request_ids), FIRST_LABEL_ID + len(self.label_names)), np.nan)
            for name, values in columns.items():
                column = _per_star(f"{field}[{name!r}]", values, len(request_ids))
                lowest = -HUGE if field == "labels" else 0.0
                if np.any(wrong := (column < lowest) | (column > HUGE)):
                    expected = "finite numbers" if field == "labels" else "positive numbers"
                    raise ValueError(f"{field}[{name!r}]: expected {expected} or NaN, got {column[wrong][0]:g}")
                table[:, self.label_ids([name])[0]] = column
            # Errors too where none are known: the Trainer evaluates what has all labels that `forward` names.
            outputs[field] = np.take_along_axis(table, request_ids, axis=1).astype(np.float32)
        return outputs


# --------------------------------------------------------------------------------------------------- settings, files


def _names(field: str, names) -> list[str]:
    """Settings: different names, as JSON can hold them."""
    listed = np.iterable(names) and not isinstance(names, str)
    if not (listed and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)):
        raise ValueError(f"{field}: expected a list of different names, got {names!r}")
    return [str(name) for name in names]


def _plain(field: str, values):
    """Settings: a finite number or a list of such, as JSON can hold them."""
    if values is None:
        return None
    array = _array(field, values)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{field}: expected finite numbers, got {array[~np.isfinite(array)][0]}")
    return array.tolist()


def _table(field: str, values):
    """Settings: a finite number, or an array of such, which stays one, as a list takes longer to read than to use."""
    plain = _plain(field, values)
    return np.array(plain) if isinstance(plain, list) else plain


def _check_integer(field: str, value, lowest: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{field}: expected a whole number of at least {lowest}, got {value!r}")
    return int(value)


def _random_generator(generator) -> np.random.Generator:
    if isinstance(generator, np.random.Generator):
        return generator
    if not isinstance(generator, int | np.integer) or generator < 0:
        raise ValueError(f"generator: expected a numpy.random.Generator or a seed, got {generator!r}")
    return np.random.default_rng(generator)


def _write_atomically(path: Path, text: str):
    """Write to a temporary name, then rename: never half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------- rows, spectra


def _first(values):
    return values[0] if isinstance(values, Sequence) and len(values) else None


def _is_tables(value) -> bool:
    return is_table(value) or (isinstance(value, list) and bool(value) and all(map(is_table, value)))


def _rows_of_tables(value) -> list[GatedRow]:
    """Those columns of all rows that count here."""
    found = [row for each in (value if isinstance(value, list) else [value]) for row in rows_of_table(each)[0]]
    names = set.intersection(*(set(row) for row in found))
    return [GatedRow((name, row[name]) for name in row if name in names) for row in found]


def _is_rows(value) -> bool:
    return isinstance(value, Mapping) or isinstance(_first(value), Mapping)


def _is_spectra(value) -> bool:
    return is_spectrum(value) or is_spectrum(_first(value))


def _as_columns(rows) -> Mapping[str, Any]:
    """One row, a list of rows, or columns -> columns."""
    if isinstance(rows, Mapping):
        return rows
    names = rows[0].keys()
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or row.keys() != names:
            got = list(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"wavelength: expected rows with the columns {list(names)}, got {got} in row {number}")
    return {name: [row[name] for row in rows] for name in names}


def _pixel_columns(rows: Mapping[str, Any]) -> tuple:
    for name in ("wavelength", "flux"):
        if name not in rows:
            raise ValueError(f"{name}: expected among the columns of the rows, got {list(rows)}")
    return rows["wavelength"], rows["flux"], rows.get("flux_error"), rows.get("mask")


def _label_columns(field: str, names, rows: Mapping[str, Any]):
    """A list of names -> these columns; values that were given stay."""
    if names is None or isinstance(names, Mapping):
        return names
    names = _names(field, names)
    if missing := [name for name in names if name not in rows]:
        raise ValueError(f"{field}: expected names out of the columns {list(rows)}, got {missing}")
    return {name: rows[name] for name in names}


def _mapping(field: str, values) -> Mapping[str, Any]:
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"{field}: expected a mapping of names to numbers, got {type(values).__name__}")
    return values or {}


def _read_spectra(spectra, medium: str, shift: bool) -> tuple:
    """`specutils.Spectrum`, one (of any number of stars) or a list -> wavelength, flux, error (sigma), mask."""
    if is_spectrum(spectra):
        return read_spectrum(spectra, medium, shift)
    return tuple(map(list, zip(*(read_spectrum(spectrum, medium, shift) for spectrum in spectra), strict=True)))


def _request_rows(requests, n_stars: int) -> list[list]:
    """One list of requests for all stars, or one for each."""
    if isinstance(requests, str | Mapping) or not np.iterable(requests):
        raise ValueError(f"requests: expected a list of names or wavelengths, got {requests!r}")
    rows = list(requests)
    if not any(_is_sequence(row) for row in rows):
        rows = [rows]
    elif not all(_is_sequence(row) for row in rows):
        raise ValueError("requests: expected names and wavelengths, or a list of them for each star, got both")
    elif len(rows) != n_stars:
        raise ValueError(f"requests: expected one list for each of {n_stars} stars, got {len(rows)}")
    for star, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"requests: expected at least one, got none for star {star}")
    return [list(row) for row in rows]


def _no_pixels(scalars: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Stars without a spectrum, as many as there are scalars."""
    if not scalars:
        raise ValueError("wavelength: expected a spectrum, rows or scalars, got None")
    n_stars = max(_array(f"scalars[{name!r}]", values).size for name, values in scalars.items())
    columns = [_per_star(f"scalars[{name!r}]", values, n_stars) for name, values in scalars.items()]
    known = np.any(np.abs(columns) < HUGE, axis=0)
    if not (known.all() and n_stars):
        raise ValueError(f"scalars: expected a known value for each star without a spectrum, got {dict(scalars)}")
    empty = np.zeros((n_stars, 0))
    return {name: empty.copy() for name in ("wavelength", "flux", "flux_error", "step")} | {"valid": empty > 0}


# ------------------------------------------------------------------------------------------------------------ arrays


def _is_sequence(value) -> bool:
    """Something with elements: a list, a tuple, an array or tensor of at least one dimension."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def _unit(values):
    """Unit of a quantity, or of the first one of a list; "" where there is none."""
    unit = getattr(_first(values) if isinstance(values, list | tuple) else values, "unit", None)
    return "" if unit is None else unit


def _array(field: str, values, unit: Any = "", factor: float = 1.0) -> np.ndarray:
    """
    Numbers of any kind in `unit` (plain ones times `factor`) -> float64, NaN where masked; bool for a mask. Flux of
    single precision stays so: it takes half the time. It may be what was given itself, and is not to be written to.
    """
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        values = list(values)
    if isinstance(values, list) and _unit(values):
        return np.array([_array(field, value, unit, factor) for value in values])
    hidden = values.mask if isinstance(values, np.ndarray) and hasattr(values, "mask") else False
    if _unit(values):
        try:
            if not hasattr(values, "to_value"):
                values = values.quantity  # the column of a table
            values = values.to_value(unit)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{field}: expected {unit or 'numbers without a unit'}, got {values.unit}") from error
        factor = 1.0
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
        if isinstance(values, list) and array.dtype == object:
            # Data sets give missing numbers as None.
            array = np.asarray([np.nan if value is None else value for value in values])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{field}: expected an array of numbers, got {type(values).__name__} ({error})") from error
    kinds = "biu" if field == "mask" else "fiu"
    if array.dtype.kind not in kinds:
        expected = "True and False" if field == "mask" else "real numbers"
        found = " ".join(np.array2string(array, threshold=4).split())
        raise ValueError(f"{field}: expected {expected}, got {array.dtype} {found[:200]}")
    if field == "mask":
        return array.astype(bool) | hidden
    with np.errstate(over="ignore"):
        single = field in ("flux", "flux_error") and array.dtype.kind == "f" and array.dtype.itemsize == 4
        array = array.astype(np.float32 if single else np.float64, copy=False)
        array = array if factor == 1.0 else array * factor
    return np.where(hidden, np.nan, array) if np.any(hidden) else array


def _number(field: str, value, unit: Any = "", factor: float = 1.0) -> float:
    array = _array(field, value, unit, factor)
    if array.ndim:
        raise ValueError(f"{field}: expected a number, got shape {array.shape}")
    return float(array)


def _per_star(field: str, values, n_stars: int, unit: Any = "") -> np.ndarray:
    """One number for each star, (stars,); None is NaN."""
    array = _array(field, np.nan if values is None else values, unit)
    if array.ndim > 1 or array.size not in (1, n_stars):
        raise ValueError(f"{field}: expected one number or one for each of {n_stars} stars, got shape {array.shape}")
    return np.broadcast_to(array, n_stars)


def _optional(field: str, values, n_stars: int) -> np.ndarray:
    """One number or truth for each star, (stars,), float64; None is NaN."""
    if isinstance(values, list | tuple):
        values = [np.nan if value is None else value for value in values]
    if isinstance(values, bool | np.bool_ | list | tuple | np.ndarray):
        values = np.asarray(values)
        values = values.astype(float) if values.dtype == bool else values
    return _per_star(field, values, n_stars)


def _padded(field: str, values, unit: Any = "", factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """One spectrum or many, of equal or different length -> (stars, pixels), padded, and the lengths (stars,)."""
    # Many spectra come as a list, a column of a data set, or an array of arrays.
    holds_objects = _is_sequence(values) and getattr(values, "dtype", None) == np.dtype(object)
    if (isinstance(values, Sequence) or holds_objects) and any(_is_sequence(row) for row in values):
        first = values[0]
        if (
            type(first) is np.ndarray
            and first.dtype != object
            and first.ndim == 1
            and all(type(row) is np.ndarray and row.shape == first.shape and row.dtype == first.dtype for row in values)
        ):
            return _padded(field, np.stack(values), unit, factor)  # at once, as each by itself takes longer
        rows = [_array(field, row, unit, factor) for row in values]
        shapes = {row.shape for row in rows}
        if any(len(shape) != 1 for shape in shapes):
            raise ValueError(f"{field}: expected a list of one-dimensional spectra, got shapes {sorted(shapes)}")
        lengths = np.array([row.size for row in rows])
        if len(shapes) == 1:
            array = np.stack(rows)
        else:
            array = np.zeros((len(rows), lengths.max()), dtype=rows[0].dtype)
            for row, target in zip(rows, array, strict=True):
                target[: row.size] = row
    else:
        array = _array(field, values, unit, factor)
        if array.ndim not in (1, 2):
            raise ValueError(f"{field}: expected one or two dimensions, (stars, pixels), got shape {array.shape}")
        array = np.atleast_2d(array)
        lengths = np.full(len(array), array.shape[1])
    if array.size == 0 or lengths.min() == 0:
        raise ValueError(f"{field}: expected at least one pixel in each spectrum, got shape {array.shape}")
    return array, lengths


def _range(numbers: np.ndarray) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _one_row_if_equal(array: np.ndarray) -> np.ndarray:
    """(stars, n) -> (1, n) where all rows are the same."""
    return array[:1] if len(array) > 1 and np.all(array == array[0]) else array


def _first_if_equal(rows: list) -> Any:
    """The first of plain arrays that are all the same, which takes less time than to stack them; else all."""
    first = rows[0]
    plain = type(first) is np.ndarray and first.ndim == 1 and first.dtype.kind in "fiu"
    if not plain or any(type(row) is not np.ndarray or row.dtype != first.dtype for row in rows):
        return rows
    content = first.tobytes()
    return first if all(row is first or row.tobytes() == content for row in rows) else rows


def _chosen(array: np.ndarray, stars: Any, pixels: np.ndarray) -> np.ndarray:
    """(stars, pixels) -> those of some stars and pixels; a view where these are all."""
    array = array if len(stars) == len(array) else array[stars]
    return array if pixels.all() else array[:, pixels]


def _inverse_variance(error: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of the shape of both, 0 where a pixel does not count; float64 where float32 could not hold it."""
    error = np.where(counts, error, 1.0)
    if error.dtype == np.float32 and not (error.min() > 1e-9 and error.max() < 1e9):
        error = error.astype(np.float64)
    return np.where(counts, error**-2, 0.0).astype(error.dtype, copy=False)


def _median(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(stars, pixels) twice -> (stars, 1), of what is valid; like `np.nanmedian`, which goes star by star."""
    ordered = np.sort(np.where(valid, values, np.inf), axis=1)
    count = valid.sum(axis=1, keepdims=True)
    middle = np.take_along_axis(ordered, np.concatenate(((count - 1) // 2, count // 2), axis=1), axis=1)
    return middle.mean(axis=1, keepdims=True)


def _read_errors(error: np.ndarray, valid: np.ndarray, error_type: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Sigma or inverse variance -> sigma (0 = unknown), and `valid` without pixels whose error says they are bad; at
    pixels that are not valid sigma is anything.
    """
    if not np.min(error) >= 0 and np.any(valid & (error < 0)):
        raise ValueError(f"flux_error: expected positive numbers, got {np.where(valid, error, 0.0).min():g}")
    if error_type == "ivar":
        with np.errstate(divide="ignore", invalid="ignore"):
            error = 1.0 / np.sqrt(error)
    known = valid & (error > 0) & (error < HUGE)
    if np.all(some := known.any(axis=1, keepdims=True)):
        return error, known
    none_known = valid & ~some
    if np.any(wrong := np.any(none_known & ~np.isnan(error), axis=1)):
        raise ValueError(
            f"flux_error: expected positive numbers, got only zeros or infinities in spectrum {np.argmax(wrong)}"
        )
    return np.where(known, error, 0.0), known | none_known


def _check_range(field: str, wavelength: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which wavelengths (Angstrom) have the right size; all that count must have it."""
    in_range = (wavelength >= MIN_WAVELENGTH) & (wavelength <= MAX_WAVELENGTH)
    wrong = np.asarray(counts & ~in_range)
    if wrong.any():
        value = np.broadcast_to(wavelength, wrong.shape)[wrong][0]
        raise ValueError(
            f"{field}: expected {MIN_WAVELENGTH:g} to {MAX_WAVELENGTH:g} Angstrom, got {value:g}"
            + (" (are these nanometres or microns? set wavelength_unit)" if value < MIN_WAVELENGTH else "")
        )
    return in_range


def _sort(pixels: dict[str, np.ndarray]):
    """By wavelength, in place, absent pixels last; of several at one wavelength only one may be valid, and stays."""
    wavelength = pixels["wavelength"]
    if np.all((wavelength[:, 1:] > wavelength[:, :-1]) | (wavelength[:, 1:] == np.inf)):
        return
    pixels["wavelength"] = np.broadcast_to(wavelength, pixels["valid"].shape)
    order = np.lexsort((~pixels["valid"], pixels["wavelength"]))
    for name, values in pixels.items():
        pixels[name] = np.take_along_axis(values, order, axis=1)
    wavelength = pixels["wavelength"]
    again = (wavelength[:, 1:] == wavelength[:, :-1]) & np.isfinite(wavelength[:, 1:])
    if np.any(twice := again & pixels["valid"][:, 1:]):
        value = wavelength[:, 1:][twice][0]
        raise ValueError(f"wavelength: expected different wavelengths in a spectrum, got {value:g} Angstrom twice")
    if again.any():
        wavelength[:, 1:][again] = np.inf
        _sort(pixels)


def _runs(wavelength: np.ndarray, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, pixels) -> first pixel and number of pixels of each patch, (rows, tokens); 0 pixels are padding."""
    n_rows, n_pixels = wavelength.shape
    exists = np.isfinite(wavelength)
    steps = _steps(wavelength)
    # A run of even sampling begins after a step that is wider than one of the steps beside it.
    begins = np.zeros(exists.shape, dtype=bool)
    begins[:, 1:] = steps[:, 1:-1] > STEP_JUMP * np.minimum(steps[:, :-2], steps[:, 2:])
    pixel = np.arange(n_pixels)
    run = np.maximum.accumulate(np.where(begins, pixel, 0), axis=1)
    row, first = np.nonzero(exists & ((pixel - run) % patch_size == 0))

    end = exists.sum(axis=1, keepdims=True)
    n_tokens = np.bincount(row, minlength=n_rows)
    token = np.arange(row.size) - np.repeat(np.cumsum(n_tokens) - n_tokens, n_tokens)
    start = np.tile(end, (1, int(n_tokens.max(initial=0))))
    start[row, token] = first
    # A patch ends where the next one starts.
    return start, np.diff(start, axis=1, append=end)


def _steps(wavelength: np.ndarray) -> np.ndarray:
    """(rows, pixels) sorted -> (rows, pixels + 1): distances to the left and right neighbours, inf without one."""
    steps = np.full((len(wavelength), wavelength.shape[1] + 1), np.inf)
    with np.errstate(invalid="ignore"):
        steps[:, 1:-1] = np.diff(wavelength, axis=1)
    steps[np.isnan(steps)] = np.inf
    return steps


__all__ = ["SpectraFMTokenizer", "air_to_vacuum", "vacuum_to_air"]
