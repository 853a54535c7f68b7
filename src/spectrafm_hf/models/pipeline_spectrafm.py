# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The task `stellar-labels` of `transformers.pipeline`: labels with one-sigma errors from spectra."""

import importlib.util
import inspect
import math
from collections.abc import Generator, Iterator, Mapping, Sequence, Sized
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .flags_spectrafm import QUALITY, star_flags
from .gate_spectrafm import NOT_AT_REST
from .objects_spectrafm import GatedRow, is_spectrum, is_table, rows_of_table
from .spectrum_spectrafm import best_fits
from .tokenization_spectrafm import NO_BASIS, SpectraFMTokenizer
from .velocity_spectrafm import VelocityMeter, settled_row


# Keys that do not go through the model.
ABOUT = ("object_id", "names", "spectrum", "chosen", "measured", "fit", "flags", "reason")
ON_ERROR = ("reason", "raise")
# Rows read at a time from a streamed data set.
ROWS_AT_ONCE = 256


class _Numbered(NamedTuple):
    """One of several spectra, so that an error can name it."""

    number: int
    spectrum: Any
    velocity: Any = None


class Answer(dict):
    """
    Labels of a star and their errors, by name. Numbers are rounded only when printed, to two digits of the error.
    """

    def __init__(self, values=(), units: Mapping[str, str] | None = None):
        super().__init__(values)
        self.units = dict(units or {})

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: {self._text(name)}" for name in self) + "}"

    def _text(self, name: str) -> str:
        value = self[name]
        if not isinstance(value, float) or not math.isfinite(value):
            return repr(value)
        return f"{value:.{decimals(self.get(name.removesuffix('_err') + '_err', value))}f}"

    def to_pandas(self):
        """See [`Answers.to_pandas`]."""
        return Answers([self]).to_pandas()

    def to_table(self):
        """See [`Answers.to_table`]."""
        return Answers([self]).to_table()


class Answers(list):
    """Answers of several stars."""

    def _columns(self) -> tuple[dict[str, list], dict[str, str]]:
        """Columns of all names, NaN for missing labels, and the units of those that have one."""
        names = list(dict.fromkeys(name for answer in self for name in answer))
        texts = ("object_id", "reason")
        columns = {name: [answer.get(name, "" if name in texts else np.nan) for answer in self] for name in names}
        columns.pop("spectrum", None)  # not a number
        if "flags" in columns:
            columns["flags"] = [";".join(flags) if isinstance(flags, list) else "" for flags in columns["flags"]]
        units: dict[str, str] = {}
        for answer in self:
            known = getattr(answer, "units", {})
            units |= {name: known.get(name.removesuffix("_err"), "") for name in answer}
        return columns, {name: unit for name, unit in units.items() if unit}

    def to_pandas(self):
        """A `DataFrame`, a row for each star; units in its `attrs["units"]`, by column."""
        import pandas as pd

        columns, units = self._columns()
        table = pd.DataFrame(columns)
        table.attrs["units"] = units
        return table

    def to_table(self):
        """An astropy `QTable`-ready `Table`, a row for each star, with units and as many digits as errors allow."""
        from astropy.table import Table
        from astropy.units import Unit

        columns, units = self._columns()
        table = Table(columns)
        for name in table.colnames:
            if table[name].dtype.kind != "f":
                continue
            table[name].unit = Unit(units[name]) if name in units else None
            errors = columns.get(name.removesuffix("_err") + "_err", columns[name])
            known = [error for error in errors if math.isfinite(error)]
            table[name].format = f".{decimals(float(np.median(known)) if known else 1.0)}f"
        return table


def decimals(error: float) -> int:
    """Number of decimals that shows an error with two digits."""
    return max(0, 1 - math.floor(math.log10(abs(error)))) if error and math.isfinite(error) else 2


class StellarLabelsPipeline(Pipeline):
    """
    Stellar labels, with one-sigma errors, from spectra.

    One spectrum is a row of a data set in the project's schema (a mapping with `wavelength`, `flux` and where known
    `flux_error`, `mask` and `object_id`), a tuple (wavelength, flux[, flux_error[, mask]]), a `specutils.Spectrum`, a
    row of a pandas DataFrame or an astropy Table, or a table of one spectrum with a pixel in each row. Tables with a
    spectrum in each row (pandas, astropy, Arrow), paths, tuples with fluxes (stars, pixels) and lists of all these
    return a list of results; a data set or a generator is streamed and returns an iterator. Results are dictionaries;
    they and their lists have `to_pandas()` and `to_table()`.

    Examples
    --------
    >>> from transformers import pipeline
    >>> predict = pipeline("stellar-labels", model=folder, trust_remote_code=True)  # doctest: +SKIP
    >>> predict((wavelength, flux, flux_error))  # doctest: +SKIP
    {'teff': 4801.2, 'teff_err': 43.0, 'logg': 2.61, 'logg_err': 0.11, ...}
    """

    # The tokenizer is loaded as a feature extractor: for a "tokenizer" the base class expects a padding token, and for
    # a "processor" its own base class.
    _load_feature_extractor = None
    _load_tokenizer: Any = False
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False

    def __init__(self, model, tokenizer=None, feature_extractor=None, processor=None, **kwargs):
        parts = [part for part in (feature_extractor, tokenizer, processor) if part is not None]
        parts = parts or [_tokenizer_of(model)]
        places = getattr(model, "hf_device_map", None)
        if places is not None:  # the base class takes the first of them, which may be the disk
            model.hf_device_map = {"": model.device}
        try:
            super().__init__(model=model, feature_extractor=parts[0], **kwargs)
        finally:
            if places is not None:
                model.hf_device_map = places

    def __call__(self, inputs, **kwargs):  # type: ignore[override]
        """
        Parameters
        ----------
        inputs : see the class
        requests : sequence of names or wavelengths, optional
            Labels to predict; by default those of the checkpoint. For a number, the flux at this wavelength (in the
            unit of the tokenizer) is predicted.
        scalars : sequence of str, optional
            Columns of the rows that are inputs of the model in addition to the spectrum.
        flags : bool, optional
            Whether to add `flags`, a list of warnings about a star, see `FLAGS`; for a model on evidence. Labels that
            the spectrum does not constrain are then NaN, not an error.
        spectrum : bool, optional
            Whether to add `spectrum`, a [`BestFit`]: the data, the best-fit star, chi^2, and ranges with significant
            residuals; for a model on evidence.
        radial_velocity : float, sequence of float or "measure", optional
            Velocity in km/s of all stars, or of each, by which spectra are shifted to the rest frame. With "measure"
            (for a model on evidence) it is measured from the lines and added as `radial_velocity` with its error.
        resolving_power : float, optional
            Wavelength / FWHM of all spectra, instead of their own; for a model on evidence.
        on_error : {"reason", "raise"}, optional
            For a spectrum that cannot be predicted: return a row with labels of NaN and a `reason`, or raise an error.
            Default: an error for a single spectrum, and a row with the reason for one of several.
        batch_size : int, optional
            Batch size; 1 by default.
        num_workers : int, optional
            Additional processes that tokenize; 0 by default.

        Returns
        -------
        dict, list of dict, or iterator of dict
            For each star `object_id`, if known, and value and error of each request in physical units, as `teff` and
            `teff_err`; a flux at 15000 Angstrom as `flux_15000` and `flux_15000_err`.

        Raises
        ------
        ValueError
            For an unknown request; and, if errors are raised, for a bad spectrum or a prediction that is not finite.
            Names the field, the expectation, the value, and the spectrum by `object_id` or index (from 0).
        """
        if isinstance(inputs, list) and not inputs:
            return Answers()
        if not hasattr(inputs, "with_format"):
            inputs = _spectra_of(inputs, getattr(self.feature_extractor, "scalar_names", None) or ())
        if hasattr(inputs, "with_format"):
            # The base class would treat a Dataset as one input.
            inputs = _rows_of_data_set(inputs)
        elif isinstance(inputs, Iterator):
            # The only iterators it supports are generators.
            inputs = (row for row in inputs)
        if isinstance(inputs, list | Generator | Dataset):
            kwargs.setdefault("on_error", self._preprocess_params.get("on_error", "reason"))
        velocity = kwargs.get("radial_velocity")
        if velocity is not None and not isinstance(velocity, str) and np.ndim(velocity):
            if not isinstance(inputs, list) or len(inputs) != len(velocity):
                what = f"{len(inputs)} spectra" if isinstance(inputs, list) else "no list of spectra"
                raise ValueError(f"radial_velocity: expected one for each, got {len(velocity)} for {what}")
            inputs = list(map(_Numbered, range(len(inputs)), inputs, kwargs.pop("radial_velocity")))
        elif isinstance(inputs, list):
            inputs = list(map(_Numbered, range(len(inputs)), inputs))
        elif isinstance(inputs, Generator):
            inputs = (_Numbered(number, spectrum) for number, spectrum in enumerate(inputs))
        found = super().__call__(inputs, **kwargs)
        return Answers(found) if isinstance(found, list) else found

    def _sanitize_parameters(  # type: ignore[override]
        self,
        requests: Sequence[Any] | None = None,
        scalars: Sequence[str] | None = None,
        flags: bool | None = None,
        spectrum: bool | None = None,
        radial_velocity: Any = None,
        resolving_power: float | None = None,
        on_error: str | None = None,
        **unknown: Any,
    ):
        if unknown:
            *known, _ = inspect.signature(self._sanitize_parameters).parameters
            accepted = ", ".join([*known, "batch_size", "num_workers"])
            raise TypeError(f"keywords: expected names out of {accepted}, got {', '.join(unknown)}")
        if on_error not in (None, *ON_ERROR):
            raise ValueError(f"on_error: expected one of {ON_ERROR}, got {on_error!r}")
        settings = {"requests": requests, "scalars": scalars, "flags": flags, "radial_velocity": radial_velocity}
        settings |= {"spectrum": spectrum, "on_error": on_error, "resolving_power": resolving_power}
        last = {} if on_error is None else {"on_error": on_error}
        return {name: value for name, value in settings.items() if value is not None}, {}, last

    def get_iterator(
        self, inputs: Any, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Any:
        """As in the base class; the stars of a batch are joined in [`_forward`], which knows their shapes."""
        if isinstance(inputs, Sized):
            stars: Any = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:  # of which each process would read all
            stars, num_workers = PipelineIterator(inputs, self.preprocess, preprocess_params), min(num_workers, 1)
        collate = itemgetter(0) if batch_size == 1 else list
        loader: Any = DataLoader(stars, num_workers=num_workers, batch_size=batch_size, collate_fn=collate)
        found: Any = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(found, self.postprocess, postprocess_params)

    def preprocess(  # type: ignore[override]
        self,
        input_,
        requests=None,
        scalars=None,
        flags=None,
        spectrum=None,
        radial_velocity=None,
        resolving_power=None,
        on_error="raise",
    ) -> dict[str, Any]:
        tokenizer: Any = self.feature_extractor
        for field, wanted in (("flags", flags), ("spectrum", spectrum)):
            if wanted and tokenizer.basis is None:
                raise ValueError(f"{field}: expected a model on evidence (token_embedding='basis'), got one without")
        name = None
        if isinstance(input_, _Numbered):
            radial_velocity = radial_velocity if input_.velocity is None else input_.velocity
            name, input_ = f"spectrum {input_.number}", input_.spectrum
        if radial_velocity is None and tokenizer.basis is not None:
            input_ = self._settled(input_)
        object_id = input_.get("object_id") if isinstance(input_, Mapping) else None
        if isinstance(object_id, np.generic):
            object_id = object_id.item()
        name = name if object_id is None else object_id
        arguments = input_ if isinstance(input_, tuple) else (input_,)
        if scalars is not None and not isinstance(input_, Mapping):
            raise ValueError(f"scalars: expected rows that hold {list(scalars)}, got a {type(input_).__name__}")
        measures = isinstance(radial_velocity, str)
        if measures and tokenizer.basis is None:
            raise ValueError(NO_BASIS)
        tokenizer._requests(requests, 1)  # an unknown request is an error of the call, not of a star
        if not tokenizer.scalar_names:
            tokenizer.label_ids(list(scalars or ()), "scalars")
        chosen = requests is not None
        if requests is None:
            requests = tokenizer.label_names if tokenizer.requests is None else tokenizer.requests
        names = [request if isinstance(request, str) else f"flux_{request}" for request in requests]
        about = {
            "object_id": object_id,
            "names": names,
            "spectrum": name,
            "chosen": chosen,
            "measured": [],
            "fit": None,
        }
        about |= {"flags": _stated_flags(input_) if flags else None, "reason": ""}
        if measures:
            self._velocity_meter()
        settings = {"scalars": scalars, "requests": requests, "radial_velocity": radial_velocity}
        settings["resolving_power"] = resolving_power
        try:
            if isinstance(input_, Mapping) and input_.get("refused"):
                raise ValueError(input_["refused"])
            inputs = tokenizer(
                *arguments, **settings, return_quality=bool(flags) or measures, return_grids=bool(spectrum)
            )
        except ValueError as error:
            # For the tokenizer it is a single spectrum.
            cause = str(error).removesuffix(" in spectrum 0")
            if on_error == "reason":
                return {**about, "reason": cause}
            raise ValueError(cause if name is None else f"{cause} ({name})") from error
        if (n_spectra := len(inputs["attention_mask"])) != 1:
            raise ValueError(f"flux: expected one spectrum, or a list of them, got {n_spectra} in one")
        measured = [float(inputs.pop(key)[0]) for key in ("radial_velocity", "radial_velocity_err") if measures]
        if not flags:
            for key in QUALITY:
                inputs.pop(key, None)
        fit = None
        if (grids := inputs.pop("grids", None)) is not None:
            (fit,) = best_fits(self.model, tokenizer.basis, grids)
        return {**inputs, **about, "measured": measured, "fit": fit}

    def _velocity_meter(self) -> VelocityMeter:
        tokenizer: Any = self.feature_extractor
        if tokenizer.velocity_meter is None:
            tokenizer.velocity_meter = VelocityMeter(tokenizer.basis, self.model)
        return tokenizer.velocity_meter

    def _settled(self, spectrum: Any) -> Any:
        """Shift a spectrum from a file as `spectrafm predict` does; the frame of arrays in memory is as stated."""
        if not (isinstance(spectrum, GatedRow) and "file" in spectrum):
            return spectrum
        return GatedRow(settled_row(self._velocity_meter(), spectrum))

    def _forward(self, model_inputs: Any) -> dict[str, Any]:  # type: ignore[override]
        """One star, or a list, which is batched by shape."""
        if not isinstance(model_inputs, list):
            return {name: value[0] for name, value in self._forward([model_inputs]).items()}
        none = {"values": None, "errors": None}
        found = [{name: star[name] for name in ABOUT} | none for star in model_inputs]
        alike: dict[Any, list[int]] = {}
        for number, star in enumerate(model_inputs):
            if not star["reason"]:
                intervals = star["interval_ids"].tolist() if "interval_ids" in star else ()
                alike.setdefault((tuple(star), str(intervals)), []).append(number)
        for numbers in alike.values():
            stars = [model_inputs[number] for number in numbers]
            inputs = {
                name: pad_sequence([star[name][0] for star in stars], batch_first=True)
                for name in stars[0]
                if name not in (*ABOUT, *QUALITY)
            }
            quality = {name: [float(star[name][0]) for star in stars] for name in QUALITY if name in stars[0]}
            outputs = self.model(**inputs)
            for i, number in enumerate(numbers):
                found[number]["values"] = outputs.predictions[i].tolist()
                found[number]["errors"] = outputs.prediction_errors[i].tolist()
            if quality:  # all have the same requests
                flags = star_flags(self.model, inputs, outputs, quality, stars[0]["names"])
                for number, own in zip(numbers, flags, strict=True):
                    found[number]["flags"] = list(dict.fromkeys([*found[number]["flags"], *own]))
        return {name: [star[name] for star in found] for name in found[0]}

    def postprocess(self, model_outputs: dict[str, Any], on_error: str = "raise") -> Answer:  # type: ignore[override]
        object_id = model_outputs["object_id"]
        config = self.model.config
        star = Answer(
            {} if object_id is None else {"object_id": object_id},
            dict(zip(config.label_names, config.label_units, strict=True)),
        )
        if measured := model_outputs["measured"]:
            star["radial_velocity"], star["radial_velocity_err"] = measured
            star.units["radial_velocity"] = "km/s"
        names, chosen, flags = (model_outputs[key] for key in ("names", "chosen", "flags"))
        values, errors, reason = (model_outputs[key] for key in ("values", "errors", "reason"))
        if reason:
            # The labels of the network itself, without requests.
            some = [name for name in names if chosen or name in (config.network_labels or names)]
            star.update({key: math.nan for name in some for key in (name, f"{name}_err")})
            return Answer({**star, **({} if flags is None else {"flags": flags}), "reason": reason}, star.units)
        known = [math.isfinite(value) and math.isfinite(error) for value, error in zip(values, errors, strict=True)]
        for name, value, error in zip(names, values, errors, strict=True):
            if not chosen and any(known) and not math.isfinite(value):
                continue  # the spectrum does not constrain it, and it was not requested
            if flags is None and not (math.isfinite(value) and math.isfinite(error)):
                cause = f"{name}: expected a finite prediction, got {value} with the error {error}"
                if on_error == "raise":
                    which = f" ({spectrum})" if (spectrum := model_outputs["spectrum"]) is not None else ""
                    raise ValueError(f"{cause}{which}")
                reason, value, error = reason or cause, math.nan, math.nan
            star[name] = value
            star[f"{name}_err"] = error
        if flags is not None:
            star["flags"] = flags
        if model_outputs["fit"] is not None:
            star["spectrum"] = model_outputs["fit"]
        if reason:
            star["reason"] = reason
        return star


def _stated_flags(spectrum: Any) -> list[str]:
    """Flags that a reader has set for a spectrum."""
    if not isinstance(spectrum, GatedRow):
        return []
    return [*([NOT_AT_REST] if spectrum.get("rest_frame") is False else []), *(spectrum.get("flags") or ())]


def _tokenizer_of(model: Any) -> SpectraFMTokenizer:
    """The tokenizer of the checkpoint from which a model was loaded."""
    try:
        if not model.name_or_path:
            raise OSError
        revision = getattr(model.config, "_commit_hash", None)
        tokenizer = SpectraFMTokenizer.from_pretrained(model.name_or_path, revision=revision)
    except OSError as error:
        raise ValueError(
            "tokenizer: expected a SpectraFMTokenizer, or a checkpoint that holds one (preprocessor_config.json), "
            "got None"
        ) from error
    if list(tokenizer.label_names) != list(model.config.label_names):
        raise ValueError(
            f"tokenizer: expected one for the labels of the model, {list(model.config.label_names)}, which is "
            "no longer that of its checkpoint, got None"
        )
    return tokenizer


def _spectra_of(inputs, scalars=()):
    """Tables, paths and arrays of several stars as lists of spectra; other inputs are unchanged."""
    if is_table(inputs):
        rows, one = rows_of_table(inputs, True, scalars)
        return rows[0] if one else rows
    if isinstance(inputs, tuple) and len(inputs) > 1 and getattr(inputs[1], "ndim", 1) == 2:
        n_stars = len(inputs[1])
        parts = [part if getattr(part, "ndim", 1) == 2 else [part] * n_stars for part in inputs]
        return [tuple(part[star] for part in parts) for star in range(n_stars)]
    if is_spectrum(inputs) and inputs.flux.ndim == 2:
        return [inputs[star] for star in range(len(inputs.flux))]
    if isinstance(inputs, list) and any(is_table(each) or _is_several(each) for each in inputs):
        found = [_spectra_of(each, scalars) for each in inputs]
        return [spectrum for each in found for spectrum in (each if isinstance(each, list) else [each])]
    return inputs


def _rows_of_data_set(data) -> Iterator:
    """
    Rows of a Dataset, streamed, with its other columns, which may be scalars. Its format "numpy" is not used, because
    it has single precision.
    """
    if importlib.util.find_spec("spectrafm_hf") is None:
        yield from data.with_format("numpy")
        return
    for table in data.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        rows, _ = rows_of_table(table, keep_refused=True)
        if len(rows) != len(table):  # pixels in rows, of which a part would be cut
            yield from rows_of_table(data, keep_refused=True)[0]
            return
        others = [field.name for field in table.schema if not field.type.num_fields]
        for row, about in zip(rows, table.select(others).to_pylist(), strict=True):
            yield type(row)({**{name: value for name, value in about.items() if value is not None}, **row})


def _is_several(value) -> bool:
    fluxes = value[1] if isinstance(value, tuple) and len(value) > 1 else getattr(value, "flux", None)
    return getattr(fluxes, "ndim", 1) == 2


__all__ = ["Answer", "Answers", "StellarLabelsPipeline"]
