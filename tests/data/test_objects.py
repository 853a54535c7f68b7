"""Python objects in pipeline and tokenizer give the same predictions as their arrays, to the last digit."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units
from astropy.nddata import StdDevUncertainty
from astropy.table import QTable, Table
from specutils import Spectrum, SpectrumCollection, SpectrumList
from transformers import pipeline

from spectrafm_hf import SpectraFMTokenizer
from spectrafm_hf.data.objects import rows_of


N_PIXELS = 48


@pytest.fixture
def predict(tiny_model, tiny_tokenizer):
    return pipeline("stellar-labels", model=tiny_model, tokenizer=tiny_tokenizer, device="cpu")


@pytest.fixture
def arrays():
    """Wavelength (pixels,), flux and error (stars, pixels)."""
    rng = np.random.default_rng(3)
    flux = rng.normal(1.0, 0.1, (3, N_PIXELS))
    return 5000.0 + 1.7 * np.arange(N_PIXELS), flux, 0.02 * (1 + rng.random(flux.shape))


def vectors(arrays):
    wavelength, flux, error = arrays
    return {"wave": [wavelength] * 3, "flux": list(flux), "err": list(error)}


def pixels(arrays):
    wavelength, flux, error = arrays
    return {"wave": wavelength, "flux": flux[0], "err": error[0]}


def with_units(arrays, kind):
    wavelength, flux, error = arrays
    unit = units.Unit("1e-17 erg s-1 cm-2 AA-1")
    return kind(
        {"wavelength": np.stack([wavelength / 10] * 3) * units.nm, "flux": flux * unit, "flux_error": error * unit}
    )


def spectra(arrays):
    wavelength, flux, error = arrays
    return [
        Spectrum(spectral_axis=wavelength * units.AA, flux=f * units.one, uncertainty=StdDevUncertainty(e))
        for f, e in zip(flux, error, strict=True)
    ]


class OtherTable:
    """A table of a library that hands its columns on as Arrow arrays, as polars does."""

    def __init__(self, columns):
        self.table = pa.table(columns)
        self.columns = [*columns]

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


#: Objects with three stars.
SEVERAL = {
    "DataFrame": lambda arrays: pd.DataFrame(vectors(arrays)),
    "Table": lambda arrays: Table({name: np.stack(values) for name, values in vectors(arrays).items()}),
    "Arrow table": lambda arrays: pa.table(vectors(arrays)),
    "Arrow batch": lambda arrays: pa.RecordBatch.from_pydict({n: pa.array(v) for n, v in vectors(arrays).items()}),
    "list of rows of a DataFrame": lambda arrays: [row for _, row in pd.DataFrame(vectors(arrays)).iterrows()],
    "list of Rows": lambda arrays: list(SEVERAL["Table"](arrays)),
    "list of tables": lambda arrays: [SEVERAL["DataFrame"](arrays).iloc[:1], SEVERAL["Arrow table"](arrays).slice(1)],
    "SpectrumList": lambda arrays: SpectrumList(spectra(arrays)),
    "SpectrumCollection": lambda arrays: SpectrumCollection(
        spectral_axis=np.stack([arrays[0]] * 3) * units.AA,
        flux=arrays[1] * units.Unit("W m-2 nm-1"),
        uncertainty=StdDevUncertainty(arrays[2]),
    ),
    "what speaks Arrow": lambda arrays: OtherTable(vectors(arrays)),
    "Dataset": lambda arrays: datasets.Dataset.from_dict(vectors(arrays)),
    "Dataset of structs": lambda arrays: datasets.Dataset.from_list(
        [
            {"spectrum": dict(zip(("wavelength", "flux", "error"), (arrays[0], *star), strict=True))}
            for star in zip(*arrays[1:], strict=True)
        ]
    ),
    "streamed Dataset": lambda arrays: SEVERAL["Dataset"](arrays).to_iterable_dataset(),
}
#: One star, the first.
ONE = {
    "row of a DataFrame": lambda arrays: pd.DataFrame(vectors(arrays)).iloc[0],
    "Row": lambda arrays: SEVERAL["Table"](arrays)[0],
    "DataFrame of pixels": lambda arrays: pd.DataFrame(pixels(arrays)),
    "Table of pixels": lambda arrays: Table(pixels(arrays)),
    "Arrow table of pixels": lambda arrays: pa.table(pixels(arrays)),
    "Spectrum": lambda arrays: spectra(arrays)[0],
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_stars(predict, arrays, name):
    expected = [predict((arrays[0], flux, error)) for flux, error in zip(*arrays[1:], strict=True)]
    answers = predict(SEVERAL[name](arrays))
    assert [{k: v for k, v in a.items() if k != "object_id"} for a in answers] == expected
    tokens = predict.feature_extractor(SEVERAL[name](arrays))
    for key, values in predict.feature_extractor(*arrays).items():
        np.testing.assert_array_equal(tokens[key], values)


@pytest.mark.parametrize("name", ONE)
def test_one_star_gives_one_answer(predict, arrays, name):
    expected = predict((arrays[0], arrays[1][0], arrays[2][0]))
    answer = predict(ONE[name](arrays))
    assert {key: value for key, value in answer.items() if key != "object_id"} == expected
    tokens = predict.feature_extractor(ONE[name](arrays))
    np.testing.assert_array_equal(tokens["flux"], predict.feature_extractor(arrays[0], arrays[1][0])["flux"])


def test_a_wavelength_with_fluxes_of_several_stars_is_a_list(predict, arrays):
    expected = [predict((arrays[0], flux, error)) for flux, error in zip(*arrays[1:], strict=True)]
    assert predict(arrays) == expected
    assert predict((arrays[0] * units.AA, *arrays[1:])) == expected
    together = Spectrum(spectral_axis=arrays[0] * units.AA, flux=arrays[1] * units.one)
    assert len(predict(together)) == 3


@pytest.mark.parametrize("kind", [Table, QTable])
def test_units_of_columns_count_whatever_the_tokenizer_is_set_to(tiny_model, arrays, kind):
    tokenizer = SpectraFMTokenizer(standardize_scale=0.1, wavelength_unit="um", error_type="ivar")
    predict = pipeline("stellar-labels", model=tiny_model, tokenizer=tokenizer, device="cpu")
    plain = SpectraFMTokenizer(standardize_scale=0.1)
    expected = pipeline("stellar-labels", model=tiny_model, tokenizer=plain, device="cpu")(arrays)
    for answer, other in zip(predict(with_units(arrays, kind)), expected, strict=True):
        assert answer["teff"] == pytest.approx(other["teff"], rel=1e-5)


def test_a_path_and_a_data_set_give_the_same_as_their_file(predict, stars, tmp_path):
    table = pa.Table.from_pylist([{**star, "mask": star["mask"].tolist()} for star in stars])
    pq.write_table(table, tmp_path / "stars.parquet")
    expected = [predict(star) for star in stars]
    assert predict(str(tmp_path / "stars.parquet")) == predict(tmp_path / "stars.parquet") == expected
    assert predict(table) == expected
    tokens = predict.feature_extractor(stars)["flux"]
    np.testing.assert_array_equal(predict.feature_extractor(datasets.Dataset(table))["flux"], tokens)
    np.testing.assert_array_equal(predict.feature_extractor(tmp_path / "stars.parquet")["flux"], tokens)


def test_columns_are_recognised_by_their_names(arrays):
    wavelength, flux, error = arrays
    table = pd.DataFrame({"lambda_air [nm]": [wavelength / 10], "flux": [flux[0]], "ivar": [error[0] ** -2], "id": [7]})
    ((row,), one) = rows_of(table)
    assert not one and row["object_id"] == "7"
    assert row["wavelength"][0] == pytest.approx(5001.394, abs=1e-2)
    np.testing.assert_allclose(row["flux_error"], error[0], rtol=1e-6)


def test_bad_objects_are_one_line_with_what_to_do(predict, arrays):
    with pytest.raises(ValueError, match=r"wavelength: expected a column of this name in DataFrame, got flux, time"):
        predict(pd.DataFrame({"flux": list(arrays[1]), "time": [1.0, 2.0, 3.0]}))
    with pytest.raises(ValueError, match="expected a file or a folder, got nothing"):
        predict("nowhere.fits")
    with pytest.raises(ValueError, match="expected at least one spectrum, got none"):
        predict(SEVERAL["Arrow table"](arrays).slice(0, 0))


def test_answers_become_tables_with_units_and_digits(predict, arrays):
    answers = predict(pd.DataFrame({"source_id": [11, 12, 13], **vectors(arrays)}))
    frame = answers.to_pandas()
    assert frame["object_id"].tolist() == ["11", "12", "13"]
    assert frame["teff"].tolist() == [answer["teff"] for answer in answers]
    assert frame.attrs["units"]["teff"] == "K" and frame.attrs["units"]["teff_err"] == "K"
    table = answers.to_table()
    assert table["teff"].unit == units.K and table["teff"][1] == answers[1]["teff"]
    error = float(np.median(frame["logg_err"]))
    assert len(table["logg"].pformat()[-1].partition(".")[2]) == max(0, 1 - int(np.floor(np.log10(error))))
    assert len(predict((arrays[0], arrays[1][0])).to_table()) == 1
    shown = repr(answers[0])
    assert "'object_id': '11'" in shown and len(shown) < 200


def mapping(arrays):
    wavelength, flux, error = (arrays[0], arrays[1][0], arrays[2][0])
    return {
        "wavelength": wavelength,
        "flux": flux,
        "flux_error": error,
        "object_id": 7,
        "mask": np.zeros(N_PIXELS, bool),
    }


def rows(arrays):
    """As the schema stores them, so that a file keeps every digit."""
    single = [np.asarray(array, np.float32).astype(float) for array in arrays]
    return [
        {"object_id": str(i), "wavelength": single[0], "flux": flux, "flux_error": error, "mask": [False] * N_PIXELS}
        for i, (flux, error) in enumerate(zip(*single[1:], strict=True))
    ]


def saved(arrays, folder):
    for row in rows(arrays):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{row['object_id']}.parquet")
    return folder


#: Rows of the table in docs/objects.md, by what they begin with, and examples of each. Those of Gaia XP are in
#: readers/test_read_gaia_continuous.py.
OBJECTS = {
    "`(wavelength, flux[, flux_error[, mask]])`": (
        lambda arrays: (arrays[0], arrays[1][0], arrays[2][0]),
        lambda arrays: (arrays[0], arrays[1][0], arrays[2][0], np.zeros(N_PIXELS, bool)),
        lambda arrays: (arrays[0] * units.AA, arrays[1][0] * units.one, arrays[2][0] * units.one),
    ),
    "the same with fluxes (stars, pixels)": (lambda arrays: arrays,),
    "a mapping with `wavelength`, `flux`": (mapping,),
    "`specutils.Spectrum`": (
        ONE["Spectrum"],
        lambda arrays: Spectrum(
            spectral_axis=arrays[0] * units.AA,
            flux=arrays[1] * units.one,
            uncertainty=StdDevUncertainty(arrays[2]),
        ),
    ),
    "`SpectrumList`": (SEVERAL["SpectrumList"],),
    "a row of a pandas DataFrame": (ONE["row of a DataFrame"], ONE["Row"]),
    "a DataFrame (of pandas or polars), Table, QTable, Arrow table or batch": (
        *(SEVERAL[name] for name in ("DataFrame", "Table", "Arrow table", "Arrow batch")),
        lambda arrays: QTable({name: np.stack(values) for name, values in vectors(arrays).items()}),
    ),
    "the same with a pixel in each row": (
        *(ONE[name] for name in ("DataFrame of pixels", "Table of pixels", "Arrow table of pixels")),
    ),
    "a path, as text or `Path`": (
        lambda arrays, folder: saved(arrays, folder),
        lambda arrays, folder: str(saved(arrays, folder)),
        lambda arrays, folder: saved(arrays, folder) / "0.parquet",
    ),
    "a list of any of these": (SEVERAL["list of tables"], lambda arrays: [mapping(arrays), ONE["Spectrum"](arrays)]),
    "a `datasets.Dataset`, an iterator or a generator": (
        lambda arrays: datasets.Dataset(pa.Table.from_pylist(rows(arrays))),
        lambda arrays: iter(rows(arrays)),
        lambda arrays: (row for row in rows(arrays)),
    ),
}


def test_every_row_of_the_table_in_the_documentation_has_an_example_here():
    page = Path(__file__).parents[2] / "docs" / "objects.md"
    cells = [line.split("|")[1].strip() for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    left = [cell for cell in cells[2:] if not any(cell.startswith(name) for name in OBJECTS)]
    assert left == ["the same with coefficients of Gaia XP (`bp_coefficients`, ...; extra `gaia`)"]
    assert len(cells) - 2 == len(OBJECTS) + 1


@pytest.mark.parametrize("name", OBJECTS)
def test_each_gives_the_labels_of_the_arrays_to_the_last_digit(predict, arrays, tmp_path, name):
    arrays = tuple(np.asarray(array, np.float32).astype(float) for array in arrays)
    expected = [predict((arrays[0], flux, error)) for flux, error in zip(*arrays[1:], strict=True)]
    for number, make in enumerate(OBJECTS[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        answers = predict(make(arrays, folder) if make.__code__.co_argcount == 2 else make(arrays))
        answers = [answers] if isinstance(answers, dict) else list(answers)
        plain = [{key: value for key, value in answer.items() if key != "object_id"} for answer in answers]
        # Examples of one star have the first; of two, it twice.
        assert plain == (expected if len(plain) == 3 else expected[:1] * len(plain))


def test_rows_of_a_data_set_keep_precision_other_columns_and_errors(predict, arrays):
    columns = {**vectors(arrays), "object_id": ["a", "b", "c"], "quality": [1, 2, 3]}
    columns["flux"] = [arrays[1][0], arrays[1][1] * np.nan, arrays[1][2]]
    answers = list(predict(datasets.Dataset.from_dict(columns)))
    assert [answer["object_id"] for answer in answers] == ["a", "b", "c"]
    assert [bool(answer.get("reason")) for answer in answers] == [False, True, False]
    assert answers[0]["teff"] == predict((arrays[0], arrays[1][0], arrays[2][0]))["teff"]
    # Pixels in rows are one star, however many there are.
    assert len(list(predict(datasets.Dataset.from_dict(pixels(arrays))))) == 1


def test_invalid_spectra_are_refused_with_the_expected_form(predict):
    with pytest.raises(ValueError, match=r"flux: expected.*got None; a spectrum is \(wavelength, flux\), a row"):
        predict.feature_extractor(5)
