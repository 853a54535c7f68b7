# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The spectrum tokenizer: (wavelength, flux, flux error) of any instrument -> tokens of SpectraFM.

It is not a text tokenizer, but has the same role and loads through the same Auto classes. All spectra of a
call are handled together, as padded (stars, pixels) arrays; for stars with the same wavelengths, everything that
depends only on wavelength is computed once.

Settings and their files come first, then a call. `inputs_spectrafm` converts the forms of input to arrays, and
`tokens_spectrafm` converts these to tokens.
"""

import copy
import inspect
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import cached_file

from .basis_spectrafm import SpectrumBasis
from .configuration_spectrafm import FIRST_LABEL_ID, FLUX_ID, PADDING_ID
from .gate_spectrafm import ANGSTROM_PER_UNIT, air_to_vacuum, vacuum_to_air
from .inputs_spectrafm import (
    Columns,
    check_range,
    columns_of_call,
    distinct_names,
    no_pixels,
    number,
    number_table,
    optional_per_star,
    plain_numbers,
    random_generator,
    read_pixels,
    request_rows,
    whole_number,
)
from .objects_spectrafm import as_columns, pixel_columns
from .tokens_spectrafm import (
    EvidenceOnGrid,
    Standardisation,
    evidence_inputs,
    evidence_on_grids,
    flux_inputs,
    fluxes_over_median,
    label_inputs,
    scalar_inputs,
    scalars_with_errors,
)
from .velocity_spectrafm import VelocityMeter


CHOICES = {
    "wavelength_unit": tuple(ANGSTROM_PER_UNIT),
    "wavelength_medium": ("vacuum", "air"),
    "error_type": ("sigma", "ivar"),
    "sampling": ("even", "random"),
}
BASIS_FILE = "basis.safetensors"
NO_BASIS = "radial_velocity: expected a model on evidence (token_embedding='basis') to measure it with"
# Entries of the saved files for the Auto classes, in addition to the settings.
FOREIGN_KEYS = {"auto_map", "feature_extractor_type", "processor_class", "tokenizer_class"}


class SpectraFMTokenizer(FeatureExtractionMixin):
    """
    Turn spectra into the inputs of [`SpectraFMModel`].

    In order: units to Angstrom, air to vacuum, to the rest frame, mask unusable pixels, sort. Then, with a basis,
    the evidence of each interval; without one, as in the paper, a token for each pixel: standardise, mask what is out
    of range, keep at most `max_length` pixels, pad.

    Parameters
    ----------
    label_names : list[str]
        The vocabulary of the checkpoint, in the order of its config.
    requests : list[str], optional
        Default requests of a call; by default all labels.
    wavelength_unit : {"Angstrom", "nm", "um", "mm", "cm", "m"}
        Unit of plain numbers; quantities have their own.
    wavelength_medium : {"vacuum", "air"}
        Medium of the input wavelengths; below 2,000 Angstrom they are always in vacuum.
    error_type : {"sigma", "ivar"}
        Kind of `flux_error`: one-sigma errors, or inverse variances (0 = masked).
    valid_flux : [low, high], optional
        Pixels with a flux outside are masked.
    standardize_wavelength, standardize_center, standardize_scale : list[float] or float
        Flux becomes (flux - center) / scale. With `standardize_wavelength` (Angstrom, increasing) the two are tables,
        interpolated linearly; without it, two numbers.
    clip : float, optional
        Pixels with a standardised flux beyond +-clip are masked.
    max_length : int, optional
        Maximum number of pixels, chosen by `sampling`.
    sampling : {"even", "random"}
        Keep pixels evenly spread over the spectrum, or at random.
    seed : int
        Seed of random sampling, for calls without a generator; every call draws new pixels.
    basis_file : str, optional
        Name of the file of a [`SpectrumBasis`] in the folder of the settings. With one, tokens are the coefficients of
        fixed intervals of ln wavelength, and the settings from `valid_flux` to `seed` are not used.
    basis : SpectrumBasis, optional
        The basis itself, which is saved in its own file.
    pixel_wavelength : list[list[float]], optional
        With a basis: grids in Angstrom, increasing, on which fluxes are additional inputs of the model, for labels
        learnt from them.
    scalar_names : list[str], optional
        With a basis: scalars, such as a parallax, that are inputs of some labels.

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
        scalar_names: Sequence[str] | None = None,
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
        self.scalar_names = None if scalar_names is None else distinct_names("scalar_names", scalar_names)
        self.pixel_wavelength: list[Any] | None = None
        if pixel_wavelength is not None:
            self.pixel_wavelength = [number_table("pixel_wavelength", grid) for grid in pixel_wavelength]
        self._check_settings()
        #: Measures velocities; a pipeline sets one with the templates of its model.
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
        rising = all(np.ndim(grid) == 1 and np.all(np.diff(grid) > 0) for grid in self.pixel_wavelength or [])
        demand(rising, "pixel_wavelength", "lists of increasing wavelengths")
        self._standardisation()
        if self.requests is not None:
            self.label_ids(self.requests)

    def _standardisation(self) -> Standardisation:
        return Standardisation(self.standardize_wavelength, self.standardize_center, self.standardize_scale)

    # ------------------------------------------------------------------------------------------------ the vocabulary

    def label_ids(self, names: Sequence[str], field: str = "requests") -> list[int]:
        """Rows of the vocabulary; `ValueError` naming the known labels for an unknown name."""
        unknown = [name for name in names if name not in self.label_names]
        if unknown:
            raise ValueError(f"{field}: expected names out of {self.label_names}, got {unknown}")
        return [FIRST_LABEL_ID + self.label_names.index(name) for name in names]

    def add_label(self, name: str):
        """Add a label that was added to the model with `add_label`."""
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
        """As in transformers; the basis is read from its file in the folder of the settings."""
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
        """The settings only."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(part) for part in value]
            return value.tolist() if isinstance(value, np.ndarray) else copy.deepcopy(value)

        return {name: plain(getattr(self, name)) for name in self.setting_names()}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """
        Write the settings where each Auto class looks for them, and the modules that read them.

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
        # With these names the Auto classes find the installed class, without trust_remote_code.
        names = dict.fromkeys(("feature_extractor_type", "processor_class", "tokenizer_class"), type(self).__name__)
        settings = {**self.to_dict(), **names, "auto_map": auto_map}
        files = ["preprocessor_config.json", "tokenizer_config.json"]
        if self.basis is not None:
            temporary = folder / f".{BASIS_FILE}.{secrets.token_hex(8)}"
            save_file(self.basis.arrays(), temporary)
            temporary.replace(folder / BASIS_FILE)
        for file in files:
            _write_atomically(folder / file, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for module in {__file__, *get_relative_import_files(__file__)}:
            _write_atomically(folder / Path(module).name, Path(module).read_text(encoding="utf-8"))
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
        Tokenize one spectrum or a batch, for `model(**inputs)`.

        Parameters
        ----------
        wavelength : array of shape (pixels,) or (stars, pixels), list of arrays, astropy quantity
            In any order. Or rows of a data set in the project's schema (a mapping, or a list of mappings) with
            `wavelength`, `flux`, and optionally `flux_error`, `mask`, `resolving_power` and `normalised`; or a
            `specutils.Spectrum`, a pandas DataFrame or row, an astropy Table or Row, an Arrow table, a Dataset, a path,
            or a list of these. Then the next three stay None. None for stars with scalars only.
        flux : like `wavelength`
            Many spectra may share one `wavelength`. Quantities may have any unit.
        flux_error : like `flux`, optional
            In the unit of flux, or a quantity. Without errors (None, or NaN at all valid pixels of a spectrum) they are
            unknown to the model.
        mask : like `flux`, of bool or int, optional
            True or not 0 where a pixel is bad. Pixels with NaN or infinite flux, and those with zero, infinite or
            single NaN errors, count as masked as well.
        scalars : mapping of name to number or array of shape (stars,)
            Known values in physical units, NaN where unknown; with rows, a list of column names. With `scalar_names`
            these scalars, and `<name>_err` for known errors; by default the columns of the rows.
        requests : sequence of names or wavelengths
            Labels, or wavelengths of fluxes (in `wavelength_unit`, or quantities; in the rest frame). The same for
            every star, or a list for each star.
        labels, label_errors : like `scalars`
            True values for the loss, NaN where unknown; with rows, a list of column names, errors in `<name>_err`.
            They are the default of `requests`.
        radial_velocity : float, array of shape (stars,), quantity or "measure"
            km/s, positive for a receding star; the spectrum is shifted to the rest frame. With a basis it can be
            measured from the lines of each spectrum.
        max_length : int, optional
            Replaces the setting.
        generator : numpy.random.Generator or int, optional
            Source of random sampling, or its seed.
        return_tensors : {"pt", "np"}
        resolving_power : float or array of shape (stars,), optional
            With a basis: wavelength / FWHM of the spectra. Default, and where it is NaN: that of the basis.
        normalised : bool or array of shape (stars,), optional
            With a basis: whether the flux is over the continuum. Default, and where it is NaN: where its level is
            near 1.
        return_quality : bool
            With a basis: whether to add the input of [`star_flags`], (stars,) each: `clipped`, the share of pixels
            left out because no star has such fluxes; `signal`, the mean flux over its error; `shift`, the velocity of
            the lines in km/s if the spectrum does not look like a star, else 0; and measured `radial_velocity` and
            `radial_velocity_err`, if any. They are not inputs of the model.
        return_grids : bool
            With a basis: whether to add `grids`, a list of [`EvidenceOnGrid`]. It is not an input of the model.

        Returns
        -------
        BatchFeature
            With a basis `coefficients`, `reliability`, `estimate`, `pull` (stars, intervals, coefficients),
            `information` (stars, intervals, coefficients, coefficients), `misfit`, `interval_ids` and `attention_mask`
            (stars, intervals), see [`Evidence`]; with `pixel_wavelength` the fluxes there over their median, `pixels`,
            and with `scalar_names` values and errors, `scalars`. Without one `flux`, `wavelength` and `attention_mask`.
            `request_ids` (stars, requests), and if needed `request_wavelength`, `flux_center`, `flux_scale`, `labels`,
            `label_errors` in its shape; `scalar_ids`, `scalar_values` (stars, scalars). Wavelengths are Angstrom,
            vacuum, rest frame. A predicted flux is `mean * flux_scale + flux_center` in the units of the input.

        Raises
        ------
        ValueError
            Naming field, expectation and value.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors: expected 'pt' or 'np', got {return_tensors!r}")
        max_length = self.max_length if max_length is None else whole_number("max_length", max_length, 1)
        rng = self._generator if generator is None else random_generator(generator)

        columns = (wavelength, flux, flux_error, mask)
        call = Columns(columns, self._units(), scalars, labels, label_errors, resolving_power, normalised)
        call = columns_of_call(call, radial_velocity is None, self.scalar_names or ())
        self.label_ids(list(call.labels), "labels")
        pixels, measured = self._read(call, radial_velocity)
        n_stars = len(pixels["flux"])
        if self.basis is not None:
            grids = evidence_on_grids(self.basis, pixels, call.resolving_power, call.normalised)
            inputs = evidence_inputs(self.basis, grids, pixels, return_quality)
            if self.pixel_wavelength:
                inputs["pixels"] = fluxes_over_median(grids, np.concatenate(self.pixel_wavelength), n_stars)
            if return_quality:
                inputs |= measured
        else:
            drawn = rng if self.sampling == "random" else None
            standard = self._standardisation()
            inputs = flux_inputs(pixels, standard, self.valid_flux, self.clip, max_length, drawn)
        if self.scalar_names:
            inputs |= scalars_with_errors(call.scalars, self.scalar_names, n_stars)
        elif call.scalars:
            inputs |= scalar_inputs(call.scalars, np.array(self.label_ids(list(call.scalars), "scalars")), n_stars)
        inputs |= self._requests(list(call.labels) if requests is None and call.labels else requests, n_stars)
        if call.labels:
            ids = dict(zip(call.labels, self.label_ids(list(call.labels), "labels"), strict=True))
            inputs |= label_inputs(call.labels, call.label_errors, ids, inputs["request_ids"])
        features = BatchFeature(inputs, tensor_type=return_tensors)
        if return_grids and self.basis is not None:
            features["grids"] = grids
        return features

    def _units(self) -> tuple[str, float, str]:
        """Kind of errors, Angstrom per unit of wavelength, and medium of plain numbers."""
        return self.error_type, ANGSTROM_PER_UNIT[self.wavelength_unit], self.wavelength_medium

    def _read(self, call: Columns, radial_velocity: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Pixels at rest; and the velocities of the stars, where they are measured."""
        if call.pixels[0] is None and call.pixels[1] is None:
            return no_pixels(call.scalars), {}
        if not isinstance(radial_velocity, str):
            return read_pixels(call.pixels, call.units, radial_velocity), {}
        found = self._velocities(read_pixels(call.pixels, call.units), radial_velocity, call.resolving_power)
        return read_pixels(call.pixels, call.units, found["radial_velocity"]), found

    def _velocities(self, pixels: dict[str, np.ndarray], method: str, resolving_power) -> dict[str, np.ndarray]:
        """Velocity of each star from its lines, and its error, (stars,) in km/s."""
        if method != "measure":
            raise ValueError(f"radial_velocity: expected km/s or 'measure', got {method!r}")
        if self.basis is None:
            raise ValueError(NO_BASIS)
        meter = self.velocity_meter or VelocityMeter(self.basis)
        powers = optional_per_star("resolving_power", resolving_power, len(pixels["flux"]))
        values, errors = meter.of_stars(pixels, powers)
        return {"radial_velocity": values, "radial_velocity_err": errors}

    # ------------------------------------------------------------------------------------------------------ evidence

    def evidence(self, rows, resolving_power=None, normalised=None) -> list[EvidenceOnGrid]:
        """
        The evidence of rows of a data set, with their pixels. Needs a basis.

        Parameters
        ----------
        rows, resolving_power, normalised
            As in a call.

        Returns
        -------
        list of EvidenceOnGrid
            Each has stars that share their wavelengths.
        """
        basis: Any = self.basis
        pixels = read_pixels(pixel_columns(as_columns(rows)), self._units())
        return evidence_on_grids(basis, pixels, resolving_power, normalised)

    # ----------------------------------------------------------------------------------------- scalars and requests

    def _requests(self, requests, n_stars: int) -> dict[str, np.ndarray]:
        """Ids of the requests; for flux also the wavelength, and center and scale in the units of the input."""
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

        center, scale = self._standardisation().at(where)
        return {
            "request_ids": ids,
            "request_wavelength": where.astype(np.float32),
            "flux_center": np.where(is_flux, center, 0.0).astype(np.float32),
            "flux_scale": np.where(is_flux, scale, 1.0).astype(np.float32),
        }


def _write_atomically(path: Path, text: str):
    """Write atomically: to a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


__all__ = ["SpectraFMTokenizer", "air_to_vacuum", "vacuum_to_air"]
