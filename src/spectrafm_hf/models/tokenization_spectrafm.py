# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The spectrum tokenizer: (wavelength, flux, flux error) of any instrument -> tokens of SpectraFM.

It is no text tokenizer, but stands where one would stand and loads through the same Auto classes. All spectra of a
call are handled together, as padded (stars, pixels) arrays; what depends on wavelength alone is computed once where
the stars share their wavelengths.

The file reads in the order in which the data flow: settings, reading pixels, evidence, or fluxes one by one as in the
paper, scalars and requests. What turns the many forms of input into arrays is in `inputs_spectrafm`.
"""

import copy
import inspect
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

from .basis_spectrafm import Evidence, SpectrumBasis, interpolated
from .configuration_spectrafm import FIRST_LABEL_ID, FLUX_ID, PADDING_ID
from .gate_spectrafm import (
    ANGSTROM_PER_UNIT,
    SPEED_OF_LIGHT,
    GatedRow,
    air_to_vacuum,
    overlaps,
    per_wavelength,
    to_rest,
    vacuum_to_air,
)
from .inputs_spectrafm import (
    HUGE,
    are_rows,
    are_spectra,
    are_tables,
    as_columns,
    as_mapping,
    check_range,
    distinct_names,
    extent,
    first_if_equal,
    first_of,
    label_columns,
    no_pixels,
    number,
    number_table,
    one_row_if_equal,
    optional_per_star,
    padded,
    per_star,
    pixel_columns,
    plain_numbers,
    random_generator,
    read_errors,
    read_spectra,
    request_rows,
    rows_of_tables,
    sort_pixels,
    unit_of,
    whole_number,
)
from .velocity_spectrafm import VelocityMeter


LARGE = 1e12  # of a standardised flux the model needs the square, in float32

CHOICES = {
    "wavelength_unit": tuple(ANGSTROM_PER_UNIT),
    "wavelength_medium": ("vacuum", "air"),
    "error_type": ("sigma", "ivar"),
    "sampling": ("even", "random"),
}
MODULES = (
    "basis_spectrafm.py",
    "configuration_spectrafm.py",
    "gate_spectrafm.py",
    "inputs_spectrafm.py",
    "pipeline_spectrafm.py",
    "products_spectrafm.py",
    "tokenization_spectrafm.py",
    "velocity_spectrafm.py",
)
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

    In order: units to Angstrom, air to vacuum, to the rest frame, mask what is not usable, sort. Then, with a basis,
    the evidence of each interval; without one, as in the paper, a token for each pixel: standardise, mask what is out
    of range, keep at most `max_length` pixels, pad.

    Parameters
    ----------
    label_names : list[str]
        The vocabulary of the checkpoint, in the order of its config.
    requests : list[str], optional
        What is asked for when a call names nothing; all labels by default.
    wavelength_unit : {"Angstrom", "nm", "um", "mm", "cm", "m"}
        Unit of plain numbers; quantities bring their own.
    wavelength_medium : {"vacuum", "air"}
        What the wavelengths given are measured in; air ends at 2,000 Angstrom.
    error_type : {"sigma", "ivar"}
        What `flux_error` holds: one-sigma errors, or inverse variances (0 = masked).
    valid_flux : [low, high], optional
        Pixels whose flux lies outside are masked.
    standardize_wavelength, standardize_center, standardize_scale : list[float] or float
        Flux becomes (flux - center) / scale. With `standardize_wavelength` (Angstrom, increasing) the two are tables,
        interpolated linearly; without it, two numbers.
    clip : float, optional
        Pixels whose standardised flux lies beyond +-clip are masked.
    max_length : int, optional
        Keep at most so many pixels, as `sampling` says.
    sampling : {"even", "random"}
        Spread evenly over the spectrum, or drawn at random.
    seed : int
        For random sampling, where a call brings no generator; every call draws anew.
    basis_file : str, optional
        Name of the file of a [`SpectrumBasis`] beside the settings. With one, tokens are the coefficients of fixed
        intervals of ln wavelength, and the settings from `valid_flux` to `seed` play no part.
    basis : SpectrumBasis, optional
        That basis itself; it is no setting, but saved in its file.
    pixel_wavelength : list[list[float]], optional
        With a basis: grids in Angstrom, increasing, on which the fluxes themselves are given to the model as well, for
        labels that were learnt from them.

    Raises
    ------
    ValueError
        Naming the setting, the expectation and the value.
    """

    model_input_names = ["flux", "wavelength", "attention_mask"]

    def __init__(
        self,
        label_names: Sequence[str] = ("teff", "logg", "fe_h", "alpha_m"),
        requests: Sequence[str] | None = None,
        wavelength_unit: str = "Angstrom",
        wavelength_medium: str = "vacuum",
        error_type: str = "sigma",
        valid_flux: Sequence[float] | None = None,
        standardize_wavelength: Sequence[float] | None = None,
        standardize_center: Sequence[float] | float = 1.0,
        standardize_scale: Sequence[float] | float = 1.0,
        clip: float | None = 10.0,
        max_length: int | None = None,
        sampling: str = "even",
        seed: int = 0,
        basis_file: str | None = None,
        basis: SpectrumBasis | None = None,
        pixel_wavelength: Sequence[Sequence[float]] | None = None,
        **kwargs,
    ):
        if unknown := kwargs.keys() - FOREIGN_KEYS:
            raise ValueError(f"settings: expected names out of {self.setting_names()}, got {sorted(unknown)}")
        super().__init__()
        self.label_names = distinct_names("label_names", label_names)
        self.requests = None if requests is None else distinct_names("requests", requests)
        self.wavelength_unit = wavelength_unit
        self.wavelength_medium = wavelength_medium
        self.error_type = error_type
        self.valid_flux = plain_numbers("valid_flux", valid_flux)
        self.standardize_wavelength = number_table("standardize_wavelength", standardize_wavelength)
        self.standardize_center = number_table("standardize_center", standardize_center)
        self.standardize_scale = number_table("standardize_scale", standardize_scale)
        self.clip = None if clip is None else number("clip", clip)
        self.max_length = None if max_length is None else whole_number("max_length", max_length, 1)
        self.sampling = sampling
        self.seed = whole_number("seed", seed, 0)
        self.basis = basis
        self.basis_file = BASIS_FILE if basis is not None else basis_file
        self.pixel_wavelength: list[Any] | None = None
        if pixel_wavelength is not None:
            self.pixel_wavelength = [number_table("pixel_wavelength", grid) for grid in pixel_wavelength]
        self._check_settings()
        #: What measures velocities; a pipeline sets one with the templates of its model.
        self.velocity_meter: VelocityMeter | None = None
        self._generator = np.random.default_rng(self.seed)

    def _check_settings(self):
        def demand(condition, field, expectation):
            if not condition:
                value = getattr(self, field)
                found = np.array2string(value, threshold=4) if isinstance(value, np.ndarray) else repr(value)
                raise ValueError(f"{field}: expected {expectation}, got {found}")

        for field, known in CHOICES.items():
            demand(getattr(self, field) in known, field, f"one of {known}")
        demand(self.clip is None or self.clip > 0, "clip", "a positive number")
        limits = self.valid_flux
        demand(limits is None or (np.shape(limits) == (2,) and limits[0] < limits[1]), "valid_flux", "[low, high]")
        shape = () if self.standardize_wavelength is None else (np.size(self.standardize_wavelength),)
        if self.standardize_wavelength is not None:
            increasing = np.ndim(self.standardize_wavelength) == 1 and np.all(np.diff(self.standardize_wavelength) > 0)
            demand(increasing, "standardize_wavelength", "increasing wavelengths")
        rising = all(np.ndim(grid) == 1 and np.all(np.diff(grid) > 0) for grid in self.pixel_wavelength or [])
        demand(rising, "pixel_wavelength", "lists of increasing wavelengths")
        for field in ("standardize_center", "standardize_scale"):
            if np.shape(value := getattr(self, field)) != shape:
                raise ValueError(
                    f"{field}: expected the shape of standardize_wavelength, {shape}, got {np.shape(value)}"
                )
        if not (lowest := np.min(self.standardize_scale)) > 0:
            raise ValueError(f"standardize_scale: expected positive numbers, got {lowest:g}")
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

    def __repr__(self) -> str:
        """The settings that are not the default, long ones in short, and what the basis covers."""
        parameters = inspect.signature(type(self).__init__).parameters
        shown = {
            name: np.array2string(np.asarray(value), threshold=4) if isinstance(value, np.ndarray) else repr(value)
            for name, value in ((name, getattr(self, name)) for name in self.setting_names())
            if not np.array_equal(value, parameters[name].default)
        }
        if self.basis is not None:
            ranges = (f"{low:.0f}-{high:.0f}" for low, high in (rung.range for rung in self.basis.rungs))
            shown["basis"] = f"<{self.basis.n_intervals} intervals, {', '.join(ranges)} Angstrom>"
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in shown.items())})"

    def to_dict(self) -> dict[str, Any]:
        """The settings, and nothing else."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(part) for part in value]
            return value.tolist() if isinstance(value, np.ndarray) else copy.deepcopy(value)

        return {name: plain(getattr(self, name)) for name in self.setting_names()}

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
            `clipped`, the share of the pixels that are left out as no star could have them, `signal`, the mean flux
            over its error, and `shift`, the km/s by which lines seem to be away from rest where the spectrum does not
            look like one of a star, else 0; and where they are measured, `radial_velocity` and `radial_velocity_err`.
        return_grids : bool
            With a basis: whether to add `grids`, the list of [`EvidenceOnGrid`] behind the tokens, which the model does
            not take.

        Returns
        -------
        BatchFeature
            With a basis `coefficients`, `reliability`, `estimate`, `pull` (stars, intervals, coefficients),
            `information` (stars, intervals, coefficients, coefficients), `misfit`, `interval_ids` and `attention_mask`
            (stars, intervals), see [`Evidence`], and with `pixel_wavelength` the fluxes there over their median,
            `pixels`. Without one `flux`, `wavelength` and `attention_mask` (stars, pixels).
            `request_ids` (stars, requests), and where there is need for them `request_wavelength`,
            `flux_center`, `flux_scale`, `labels`, `label_errors` in its shape;
            `scalar_ids`, `scalar_values` (stars, scalars). Wavelengths are Angstrom, vacuum, rest frame. An answer
            to a request of flux is `mean * flux_scale + flux_center` in the units given.

        Raises
        ------
        ValueError
            Naming field, expectation and value.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors: expected 'pt' or 'np', got {return_tensors!r}")
        max_length = self.max_length if max_length is None else whole_number("max_length", max_length, 1)
        rng = self._generator if generator is None else random_generator(generator)

        error_type, unit, medium = self.error_type, ANGSTROM_PER_UNIT[self.wavelength_unit], self.wavelength_medium
        if flux is None and are_tables(wavelength):
            wavelength = rows_of_tables(wavelength)
        if isinstance(wavelength, GatedRow) or isinstance(first_of(wavelength), GatedRow):
            error_type, unit, medium = "sigma", 1.0, "vacuum"
        if are_rows(wavelength) or are_spectra(wavelength):
            for field, value in (("flux", flux), ("flux_error", flux_error), ("mask", mask)):
                if value is not None:
                    raise ValueError(f"{field}: expected None beside rows or spectra, got {type(value).__name__}")
        if are_rows(wavelength):
            rows = as_columns(wavelength)
            wavelength, flux, flux_error, mask = pixel_columns(rows)
            resolving_power = rows.get("resolving_power") if resolving_power is None else resolving_power
            normalised = rows.get("normalised") if normalised is None else normalised
            if labels is not None and not isinstance(labels, Mapping) and label_errors is None:
                names = distinct_names("labels", labels)
                label_errors = {name: rows[f"{name}_err"] for name in names if f"{name}_err" in rows}
            scalars, labels = label_columns("scalars", scalars, rows), label_columns("labels", labels, rows)
        elif are_spectra(wavelength):
            wavelength, flux, flux_error, mask = read_spectra(
                wavelength, self.wavelength_medium, radial_velocity is None
            )
            error_type = "sigma"
        scalars, labels = as_mapping("scalars", scalars), as_mapping("labels", labels)
        label_errors = as_mapping("label_errors", label_errors)
        self.label_ids(list(labels), "labels")
        if alone := label_errors.keys() - labels.keys():
            raise ValueError(f"label_errors: expected names out of the labels {list(labels)}, got {sorted(alone)}")

        measured = False
        if wavelength is None and flux is None:
            pixels = no_pixels(scalars)
        else:
            given, how = (wavelength, flux, flux_error, mask), (error_type, unit, medium)
            measured = isinstance(radial_velocity, str)
            pixels = self._read_pixels(*given, None if measured else radial_velocity, *how)
            if measured:
                found = self._velocities(pixels, radial_velocity, resolving_power)
                pixels = self._read_pixels(*given, found["radial_velocity"], *how)
        n_stars = len(pixels["flux"])
        if self.basis is not None:
            grids = self._evidence_on_grids(pixels, resolving_power, normalised)
            inputs = self._evidence(grids, pixels, return_quality)
            if self.pixel_wavelength:
                inputs["pixels"] = self._on_grids(grids, n_stars)
            if measured and return_quality:
                inputs |= found
        else:
            inputs = self._fluxes(pixels, max_length, rng)
        if scalars:
            inputs |= self._scalars(scalars, n_stars)
        if requests is None and labels:
            requests = list(labels)
        inputs |= self._requests(requests, n_stars)
        if labels:
            inputs |= self._labels(labels, label_errors, inputs["request_ids"])
        features = BatchFeature(inputs, tensor_type=return_tensors)
        if return_grids and self.basis is not None:
            features["grids"] = grids
        return features

    # ------------------------------------------------------------------------------------------------ reading pixels

    def _read_pixels(
        self, wavelength, flux, flux_error, mask, radial_velocity, error_type: str, unit: float, medium: str
    ) -> dict[str, np.ndarray]:
        """
        Whatever was given -> padded arrays of shape (stars, pixels), sorted by wavelength.

        `flux`, `flux_error` (0 = unknown) and `valid`; where not valid, flux and error are 0. `wavelength` has one row
        if it serves for all stars. A pixel that is absent has an infinite wavelength.
        """
        for field, value in (("wavelength", wavelength), ("flux", flux)):
            if value is None:
                raise ValueError(f"{field}: expected as many numbers as in the other of wavelength and flux, got None")
        flux_unit = unit_of(flux)
        flux, lengths = padded("flux", flux, flux_unit)

        def like_flux(field, values, unit="", factor=1.0):
            """The same shape as flux, or one row for all."""
            array, own_lengths = padded(field, values, unit, factor)
            if len(array) not in (1, len(flux)) or np.any(own_lengths != lengths):
                expected, actual = (f"{len(n)} spectra of {extent(n)} pixels" for n in (lengths, own_lengths))
                raise ValueError(f"{field}: expected the lengths of flux, {expected}, got {actual}")
            return array

        if len(flux) > 1 and isinstance(wavelength, list) and len(wavelength) == len(flux):
            wavelength = first_if_equal(wavelength)
        wavelength = like_flux("wavelength", wavelength, "Angstrom", unit)
        wavelength = one_row_if_equal(wavelength)
        present = np.arange(flux.shape[1]) < one_row_if_equal(lengths[:, None])
        valid = present & (np.abs(flux) < HUGE)
        if mask is not None:
            valid &= ~like_flux("mask", mask)
        error = np.zeros_like(flux)
        if flux_error is not None:
            error_unit = flux_unit if error_type == "sigma" or not flux_unit else flux_unit**-2
            error, valid = read_errors(like_flux("flux_error", flux_error, error_unit), valid, error_type)
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
        in_range = check_range("wavelength", wavelength, valid)
        if radial_velocity is not None:
            beta = per_star("radial_velocity", radial_velocity, len(flux), "km/s")[:, None] / SPEED_OF_LIGHT
            if np.any(wrong := ~(np.abs(beta) < 1)):
                value = beta[wrong][0] * SPEED_OF_LIGHT
                raise ValueError(f"radial_velocity: expected km/s below the speed of light, got {value:g}")
            wavelength = to_rest(wavelength, one_row_if_equal(beta * SPEED_OF_LIGHT))
        counted = present if len(present) >= len(wavelength) else np.broadcast_to(present, wavelength.shape)
        left_out = np.stack([overlaps(row) for row in np.where(counted[: len(wavelength)], wavelength, np.nan)])
        present, valid = present & ~left_out, valid & ~left_out
        pixels = {
            "wavelength": np.where(present & in_range, wavelength, np.inf),
            "flux": np.where(valid, flux, 0.0),
            "flux_error": np.where(valid, error, 0.0),
            "valid": valid,
        }
        sort_pixels(pixels)
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
        powers = optional_per_star("resolving_power", resolving_power, n_stars)
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
        wavelength, flux, flux_error, mask = pixel_columns(as_columns(rows))
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
        powers = optional_per_star("resolving_power", resolving_power, n_stars)
        if np.any(wrong := ~(np.isnan(powers) | ((powers > 0) & (powers < HUGE)))):
            raise ValueError(f"resolving_power: expected positive numbers, got {powers[wrong][0]:g}")
        normalised = optional_per_star("normalised", normalised, n_stars)
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
        quality = {name: np.zeros(n_stars, np.float32) for name in ("clipped", "shift", "signal")}
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
            if return_quality:
                quality["signal"][stars] = self._signal(grid)
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

    def _signal(self, grid: EvidenceOnGrid) -> np.ndarray:
        """Mean flux of all pixels that the tokens come from, over its error, (stars,); infinite without such pixels."""
        basis: Any = self.basis
        rung = basis.rung_for(grid.wavelength, grid.resolving_power)
        if rung is None:
            return np.full(len(grid.stars), np.inf)
        here = (grid.wavelength >= rung.range[0]) & (grid.wavelength <= rung.range[1])
        weight = grid.inverse_variance[:, here].astype(np.float64)
        total, flux = weight.sum(axis=1), np.einsum("sp,sp->s", weight, grid.flux[:, here])
        return np.where(total > 0, flux / np.sqrt(np.where(total > 0, total, 1.0)), np.inf)

    def _on_grids(self, found: list[EvidenceOnGrid], n_stars: int) -> np.ndarray:
        """Fluxes over their medians at `pixel_wavelength`, (stars, pixels of all grids), NaN where unknown."""
        grid = np.concatenate(self.pixel_wavelength or [])
        fluxes = np.full((n_stars, len(grid)), np.nan, np.float32)
        for each in found:
            flux = np.where(each.inverse_variance > 0, each.flux, np.nan)
            nothing = np.isnan(flux).all(axis=1, keepdims=True)
            level = np.nanmedian(np.where(nothing, 1.0, flux), axis=1, keepdims=True)
            fluxes[each.stars] = interpolated(each.wavelength, flux / np.where(level > 0, level, 1.0), grid)
        return fluxes

    # ---------------------------------------------------------------------------------------------- fluxes one by one

    def _center_and_scale(self, wavelength: np.ndarray) -> tuple[Any, Any]:
        """What standardises the flux at each wavelength."""
        center, scale = self.standardize_center, self.standardize_scale
        if self.standardize_wavelength is None:
            return center, scale
        return np.interp(wavelength, self.standardize_wavelength, center), np.interp(
            wavelength, self.standardize_wavelength, scale
        )

    def _fluxes(self, pixels: dict[str, np.ndarray], max_length, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Standardise, drop what does not count, keep `max_length` pixels: (stars, tokens) each."""
        wavelength, flux, valid = pixels["wavelength"], pixels["flux"], pixels["valid"]
        if self.valid_flux is not None:
            with np.errstate(over="ignore"):
                low, high = np.asarray(self.valid_flux, flux.dtype)
            valid = valid & (flux >= low) & (flux <= high)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            center, scale = (np.asarray(table, flux.dtype) for table in self._center_and_scale(wavelength))
            flux = ((flux - center) / scale).astype(np.float32, copy=False)
            valid = valid & (np.abs(flux) <= np.float32(LARGE if self.clip is None else min(self.clip, LARGE)))
        if valid.shape[1] and not np.all(good := valid.any(axis=1)):
            raise ValueError(
                f"flux: expected a pixel within valid_flux={self.valid_flux} and clip={self.clip} in each spectrum, "
                f"got none in spectrum {np.argmin(good)}"
            )
        chosen, keep = self._choose(valid, max_length, rng)
        if valid.shape[1] == 0:
            return {"flux": flux, "wavelength": flux.copy(), "attention_mask": keep}
        taken = (np.take_along_axis(np.broadcast_to(x, valid.shape), chosen, axis=1) for x in (flux, wavelength))
        flux, wavelength = (np.where(keep, values, 0.0).astype(np.float32) for values in taken)
        return {"flux": flux, "wavelength": wavelength, "attention_mask": keep}

    def _choose(
        self, usable: np.ndarray, max_length: int | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(stars, pixels) -> indices of the pixels that stay, in order, and which of them are real: (stars, kept)."""
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
        # Evenly spread among the usable pixels of a star; all of them where all are kept.
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
        values = np.stack([per_star(f"scalars[{name!r}]", scalars[name], n_stars) for name in scalars], axis=1)
        known = np.abs(values) < HUGE
        order = np.argsort(~known, axis=1, kind="stable")[:, : int(known.sum(axis=1).max())]
        known, values = (np.take_along_axis(array, order, axis=1) for array in (known, values))
        return {
            "scalar_ids": np.where(known, ids[order], PADDING_ID),
            "scalar_values": np.where(known, values, 0.0).astype(np.float32),
        }

    def _requests(self, requests, n_stars: int) -> dict[str, np.ndarray]:
        """Ids of the requests; for flux also where, and how to come back to the units given."""
        if requests is None:
            requests = self.label_names if self.requests is None else self.requests
        rows = request_rows(requests, n_stars)
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
                    where[star, column] = number("requests", request, "Angstrom", factor)
        if self.wavelength_medium == "air":
            where = air_to_vacuum(where)
        check_range("requests", where, ids == FLUX_ID)
        ids, where = (np.broadcast_to(array, (n_stars, width)).copy() for array in (ids, where))
        is_flux = ids == FLUX_ID
        if not is_flux.any():
            return {"request_ids": ids}

        center, scale = self._center_and_scale(where)
        return {
            "request_ids": ids,
            "request_wavelength": where.astype(np.float32),
            "flux_center": np.where(is_flux, center, 0.0).astype(np.float32),
            "flux_scale": np.where(is_flux, scale, 1.0).astype(np.float32),
        }

    def _labels(self, labels, label_errors, request_ids: np.ndarray) -> dict[str, np.ndarray]:
        """True values and their errors in the shape of the requests; NaN where unknown."""
        outputs = {}
        for field, columns in (("labels", labels), ("label_errors", label_errors)):
            table = np.full((len(request_ids), FIRST_LABEL_ID + len(self.label_names)), np.nan)
            for name, values in columns.items():
                column = per_star(f"{field}[{name!r}]", values, len(request_ids))
                lowest = -HUGE if field == "labels" else 0.0
                if np.any(wrong := (column < lowest) | (column > HUGE)):
                    expected = "finite numbers" if field == "labels" else "positive numbers"
                    raise ValueError(f"{field}[{name!r}]: expected {expected} or NaN, got {column[wrong][0]:g}")
                table[:, self.label_ids([name])[0]] = column
            # Errors too where none are known: the Trainer evaluates what has all labels that `forward` names.
            outputs[field] = np.take_along_axis(table, request_ids, axis=1).astype(np.float32)
        return outputs


def _write_atomically(path: Path, text: str):
    """Write to a temporary name, then rename: never half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _chosen(array: np.ndarray, stars: Any, pixels: np.ndarray) -> np.ndarray:
    """(stars, pixels) -> those of some stars and pixels; a view where these are all."""
    array = array if len(stars) == len(array) else array[stars]
    return array if pixels.all() else array[:, pixels]


def _inverse_variance(error: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of the shape of both, 0 where a pixel does not count; float64 where float32 could not hold it."""
    error = np.where(counts, error, 1.0)
    if not (error.min() > 1e-9 and error.max() < 1e9):
        error = np.maximum(error.astype(np.float64, copy=False), 1e-100)
    return np.where(counts, 1.0 / error**2, 0.0).astype(error.dtype, copy=False)  # a power of -2 takes longer


__all__ = ["SpectraFMTokenizer", "air_to_vacuum", "vacuum_to_air"]
