"""The schema of spectra: features, checks, and conversion to and from the Multimodal Universe layout."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from spectrafm_hf.data.schema import (
    LABEL_UNITS,
    SCALAR_UNITS,
    flat_pixels,
    from_multimodal_universe,
    label_names_of,
    pixel_column,
    spectrum_features,
    to_multimodal_universe,
    validate_table,
)


LENGTHS = np.array([5, 3, 7])


@pytest.fixture
def table() -> pa.Table:
    """Three spectra of different lengths, with a masked pixel, an unknown label and an unknown error."""
    random = np.random.default_rng(0)
    pixels = int(LENGTHS.sum())
    mask = np.zeros(pixels, bool)
    mask[[1, 9]] = True
    flux_error = random.uniform(0.01, 0.1, pixels).astype(np.float32)
    flux_error[4] = np.nan
    columns = {
        "object_id": ["a", "b", "c"],
        "survey": ["test"] * 3,
        "wavelength": pixel_column(np.linspace(15000, 17000, pixels), LENGTHS),
        "flux": pixel_column(random.normal(1, 0.1, pixels), LENGTHS),
        "flux_error": pixel_column(flux_error, LENGTHS),
        "mask": pixel_column(mask, LENGTHS),
        "snr": np.array([50, 60, 70], np.float32),
        "teff": np.array([4500, np.nan, 5500], np.float32),
        "teff_err": np.array([20, np.nan, 30], np.float32),
        "radial_velocity": np.array([1, 2, 3], np.float32),
    }
    schema = spectrum_features(["teff"], ["radial_velocity"]).arrow_schema
    return pa.Table.from_arrays([pa.array(columns[name]) for name in schema.names], schema=schema)


def replaced(table: pa.Table, name: str, values: object) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def with_pixel(table: pa.Table, name: str, index: int, value: float) -> pa.Table:
    values, lengths = flat_pixels(table[name])
    values = values.copy()
    values[index] = value
    return replaced(table, name, pixel_column(values, lengths))


def test_features_hold_each_label_with_its_error_and_each_scalar_once():
    features = spectrum_features(["teff", "fe_h"], ["j"])
    assert list(features) == [
        *("object_id", "survey", "wavelength", "flux", "flux_error", "mask", "snr"),
        *("teff", "teff_err", "fe_h", "fe_h_err", "j"),
    ]
    assert features["flux"] == datasets.List(datasets.Value("float32"))
    assert features["mask"] == datasets.List(datasets.Value("bool"))
    assert label_names_of(features) == ["teff", "fe_h"]


def test_every_label_and_scalar_known_by_name_has_a_unit_and_a_lower_case_name():
    for name, unit in {**LABEL_UNITS, **SCALAR_UNITS}.items():
        assert name == name.lower()
        assert unit


@pytest.mark.parametrize(("labels", "scalars"), [(["TEFF"], []), (["flux"], []), (["teff"], ["teff"]), ([], ["snr"])])
def test_names_that_are_upper_case_or_taken_are_refused(labels, scalars):
    with pytest.raises(ValueError, match=r"label_names, scalar_names: expected .*, got '"):
        spectrum_features(labels, scalars)


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">i2", bool])
def test_a_pixel_column_holds_the_values_of_any_byte_order(dtype):
    values = np.array([[0, 1, 2], [3, 0, 5]]).astype(dtype)
    column = pixel_column(values)
    flat, lengths = flat_pixels(column)
    assert column.type == pa.list_(pa.bool_() if dtype is bool else pa.float32())
    np.testing.assert_array_equal(flat.reshape(2, 3), values)
    np.testing.assert_array_equal(lengths, [3, 3])


def test_pixel_columns_refuse_lengths_that_do_not_add_up():
    with pytest.raises(ValueError, match="lengths: expected a sum of 4, the number of values, got 5"):
        pixel_column(np.ones(4), [2, 3])
    with pytest.raises(ValueError, match=r"values: expected shape \(rows, pixels\) .*, got \(4,\)"):
        pixel_column(np.ones(4))


def test_a_table_of_ragged_spectra_with_masked_pixels_is_valid(table):
    validate_table(table)
    validate_table(table[1:])  # a slice, whose lists do not begin at the first pixel
    validate_table(table[:0])
    validate_table(with_pixel(table, "flux", 1, np.nan))  # masked


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("flux", 6, np.nan, r"flux: expected finite where mask is False, got nan in row 1 \(object_id b\)"),
        ("flux_error", 14, 0.0, r"flux_error: expected positive, or NaN, .*, got 0.0 in row 2 \(object_id c\)"),
        ("wavelength", 0, -1.0, r"wavelength: expected finite and positive .*, got -1.0 in row 0 \(object_id a\)"),
    ],
)
def test_a_bad_pixel_is_named_with_its_value_and_row(table, name, index, value, message):
    with pytest.raises(ValueError, match=message):
        validate_table(with_pixel(table, name, index, value))


def test_a_bad_column_is_named_with_what_was_expected(table):
    with pytest.raises(ValueError, match=r"flux_error: expected a column of this name, got \['object_id'"):
        validate_table(table.drop_columns("flux_error"))
    with pytest.raises(ValueError, match="snr: expected type float32, got double"):
        validate_table(replaced(table, "snr", [1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="object_id: expected type string, got int64"):
        validate_table(replaced(table, "object_id", [1, 2, 3]))
    with pytest.raises(ValueError, match=r"mask: expected type list<bool>, got list<"):
        validate_table(replaced(table, "mask", [[0], [1], [1]]))
    with pytest.raises(ValueError, match="mask: expected 5 pixels as in wavelength, got 6 in row 0"):
        validate_table(replaced(table, "mask", pixel_column(np.zeros(15, bool), [6, 2, 7])))
    with pytest.raises(ValueError, match="teff_err: expected no negative value, got -1.0 in row 2"):
        validate_table(replaced(table, "teff_err", np.array([1, 1, -1], np.float32)))


def test_going_to_the_multimodal_universe_and_back_changes_nothing_that_both_hold(table):
    universe = to_multimodal_universe(table)
    assert [field.name for field in universe.schema.field("spectrum").type] == [
        *("flux", "ivar", "lsf_sigma", "lambda", "mask")
    ]
    back = from_multimodal_universe(universe)
    assert back.column_names == table.column_names
    for name in set(table.column_names) - {"flux_error"}:
        np.testing.assert_equal(back[name].to_pylist(), table[name].to_pylist())
    mask, error = flat_pixels(table["mask"])[0], flat_pixels(table["flux_error"])[0]
    error_back = flat_pixels(back["flux_error"])[0]
    np.testing.assert_allclose(error_back[~mask], error[~mask], rtol=1e-6)
    assert np.isnan(error_back[mask]).all()

    again = to_multimodal_universe(back)
    for part in ("flux", "ivar", "lambda", "mask"):
        a, b = (np.concatenate([row[part] for row in t["spectrum"].to_pylist()]) for t in (universe, again))
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_masked_pixels_are_those_of_inverse_variance_zero(table):
    rows = to_multimodal_universe(table)["spectrum"].to_pylist()
    ivar = np.concatenate([row["ivar"] for row in rows])
    np.testing.assert_array_equal(ivar == 0, flat_pixels(table["mask"])[0])


def test_a_dataset_a_table_and_rows_are_all_accepted(table):
    data = datasets.Dataset(table)
    expected = to_multimodal_universe(table).to_pylist()
    np.testing.assert_equal(to_multimodal_universe(data).to_pylist(), expected)
    np.testing.assert_equal(to_multimodal_universe(data.to_list()).to_pylist(), expected)


def test_rows_of_the_multimodal_universe_lose_their_padding_and_get_an_unknown_label_error():
    row = {
        "spectrum": {
            "flux": [1.0, 2.0, np.nan, 0.0],
            "ivar": [4.0, 0.0, 1.0, 0.0],
            "lsf_sigma": [1.0] * 4,
            "lambda": [15000.0, 15001.0, 15002.0, -1.0],
            "mask": [False, False, False, True],
        },
        "object_id": "2M0000",
        "teff": 4500.0,
        "logg": None,
        "radial_velocity": 12.0,
        "restframe": True,
    }
    table = from_multimodal_universe([row], survey="apogee")
    result = table.to_pylist()[0]
    assert result["wavelength"] == [15000, 15001, 15002]
    assert result["mask"] == [False, True, True]
    np.testing.assert_equal(result["flux_error"], [0.5, np.nan, np.nan])
    assert (result["survey"], result["teff"], result["radial_velocity"]) == ("apogee", 4500, 12)
    assert np.isnan([result["teff_err"], result["logg"], result["logg_err"], result["snr"]]).all()
    assert set(table.schema.types) == {pa.string(), pa.float32(), pa.list_(pa.float32()), pa.list_(pa.bool_())}


def test_rows_that_lack_a_part_or_are_not_at_rest_are_refused():
    spectrum = {"flux": [1.0], "ivar": [1.0], "lambda": [15000.0]}
    row = {"spectrum": spectrum, "object_id": "a", "survey": "s"}
    from_multimodal_universe([row])
    cases = [
        ({"spectrum": [1.0]}, "spectrum: expected a struct of lists"),
        ({"spectrum": {"flux": [1.0], "ivar": [1.0]}}, r"spectrum.lambda: expected among .*\['flux', 'ivar'\]"),
        ({"restframe": False}, "restframe: expected True in every row, got False"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            from_multimodal_universe([row | change])
    with pytest.raises(ValueError, match="survey: expected a name"):
        from_multimodal_universe([{"spectrum": spectrum, "object_id": "a"}])
    with pytest.raises(ValueError, match="object_id: expected a column of this name"):
        from_multimodal_universe([{"spectrum": spectrum}], survey="s")


def test_an_error_too_small_for_a_float32_inverse_variance_is_refused(table):
    with pytest.raises(ValueError, match="flux_error: expected above 1e-19, .*; rescale the flux"):
        to_multimodal_universe(with_pixel(table, "flux_error", 0, 1e-21))
