"""The task `stellar-labels`."""

import datasets
import numpy as np
import pytest
import torch
from astropy import units
from astropy.nddata import StdDevUncertainty
from specutils import Spectrum
from transformers import pipeline

from spectrafm_hf import SpectraFMForPrediction, load_checkpoint, save_checkpoint
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.files import DEMO_STARS


@pytest.fixture
def predict(tiny_model, tiny_tokenizer):
    return pipeline("stellar-labels", model=tiny_model, tokenizer=tiny_tokenizer, device="cpu")


@pytest.fixture(params=["value", "basis"])
def either(request, predict, tiny_evidence):
    """With a model of each kind."""
    model, tokenizer = tiny_evidence
    if request.param == "value":
        return predict
    return pipeline("stellar-labels", model=model, tokenizer=tokenizer, device="cpu")


def same(answers, expected):
    """All numbers to a few units of float32: padding changes the order of sums."""
    assert [list(answer) for answer in answers] == [list(answer) for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert answer.get("object_id") == other.get("object_id")
        assert answer.get("flags") == other.get("flags")
        numbers = [key for key in answer if key not in ("object_id", "flags")]
        np.testing.assert_allclose([answer[key] for key in numbers], [other[key] for key in numbers], rtol=2e-5)
    return True


def test_a_row_gives_each_label_with_its_error(predict, tiny_model, tiny_tokenizer, stars):
    answer = predict(stars[0])
    names = ["teff", "logg", "fe_h", "alpha_m"]
    assert list(answer) == ["object_id", *(key for name in names for key in (name, f"{name}_err"))]
    assert answer["object_id"] == "star-0"
    with torch.no_grad():
        outputs = tiny_model(**tiny_tokenizer(stars[0]))
    assert [answer[name] for name in names] == outputs.predictions[0].tolist()
    assert [answer[f"{name}_err"] for name in names] == outputs.prediction_errors[0].tolist()


def test_predictions_do_not_depend_on_the_form_of_the_input_or_the_batch(either, stars):
    expected = [either(star) for star in stars]
    assert same(either(stars), expected)
    assert same(either(stars, batch_size=2), expected)
    assert same(list(either(star for star in stars)), expected)
    assert same(list(either((star for star in stars), batch_size=3)), expected)
    assert same(list(either(iter(stars), batch_size=3)), expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_streamed(either, stars, streaming):
    table = datasets.Dataset.from_list(stars)
    answers = either(table.to_iterable_dataset() if streaming else table, batch_size=2)
    assert not isinstance(answers, list)
    answers = list(answers)
    assert same(answers, [either(star) for star in stars])
    assert type(answers[0]["object_id"]) is str


def test_a_tuple_and_a_specutils_spectrum_give_the_answer_of_the_row(either, stars):
    star = stars[0]
    expected = {key: value for key, value in either(star).items() if key != "object_id"}
    assert either((star["wavelength"], star["flux"], star["flux_error"], star["mask"])) == expected
    spectrum = Spectrum(
        spectral_axis=star["wavelength"].astype(float) * units.AA,
        flux=star["flux"] * units.dimensionless_unscaled,
        uncertainty=StdDevUncertainty(star["flux_error"]),
        mask=star["mask"],
    )
    assert same([either(spectrum)], [expected])
    assert same(either([spectrum, spectrum], batch_size=2), [expected, expected])


def test_requests_choose_labels_and_wavelengths(predict, stars):
    answers = predict(stars, requests=["fe_h", 5020.5], batch_size=2)
    assert list(answers[0]) == ["object_id", "fe_h", "fe_h_err", "flux_5020.5", "flux_5020.5_err"]
    np.testing.assert_allclose([a["fe_h"] for a in answers], [a["fe_h"] for a in predict(stars)], rtol=2e-5)
    in_kwargs = pipeline(
        "stellar-labels", model=predict.model, tokenizer=predict.feature_extractor, requests=["logg"], device="cpu"
    )
    assert list(in_kwargs(stars[1])) == ["object_id", "logg", "logg_err"]


def test_the_requests_that_a_tokenizer_names_are_the_default(predict, stars):
    predict.feature_extractor.requests = ["logg"]
    assert list(predict(stars[0])) == ["object_id", "logg", "logg_err"]


def test_scalars_of_the_rows_are_inputs_of_the_model(predict, stars):
    rows = [{**star, "teff": teff} for star, teff in zip(stars, (4000.0, np.nan, 5000.0, 4500.0, 6000.0), strict=True)]
    answers = predict(rows, scalars=["teff"], requests=["logg"], batch_size=5)
    without = predict(rows, requests=["logg"])
    changed = [abs(a["logg"] - b["logg"]) > 1e-4 for a, b in zip(answers, without, strict=True)]
    assert changed == [True, False, True, True, True]
    with pytest.raises(ValueError, match=r"scalars: expected rows that hold \['teff'\], got a tuple"):
        predict((stars[0]["wavelength"], stars[0]["flux"]), scalars=["teff"])


def test_an_empty_list_gives_an_empty_list(predict):
    assert predict([]) == []


def test_many_spectra_in_one_row_are_an_error(predict, stars):
    star = stars[0]
    row = {"wavelength": star["wavelength"], "flux": np.stack([star["flux"], star["flux"]])}
    with pytest.raises(ValueError, match="flux: expected one spectrum, or a list of them, got 2 in one"):
        predict(row)


def test_a_bad_spectrum_in_a_list_is_an_error_that_names_the_field(predict, stars):
    stars[3]["wavelength"] = stars[3]["wavelength"] / 10
    with pytest.raises(ValueError, match="wavelength: .*nanometres"):
        predict(stars, batch_size=2, on_error="raise")
    with pytest.raises(ValueError, match="wavelength: .*nanometres"):
        predict(stars[3])


@pytest.mark.parametrize("give", [list, iter, lambda stars: (star for star in stars)])
def test_an_error_names_the_spectrum(predict, stars, give):
    stars[3]["flux"] = np.full_like(stars[3]["flux"], np.nan)
    with pytest.raises(ValueError, match=r"flux: expected .* got none \(star-3\)$"):
        list(predict(give(stars), batch_size=2, on_error="raise"))
    nameless = [(star["wavelength"], star["flux"], star["flux_error"]) for star in stars]
    with pytest.raises(ValueError, match=r"flux: expected .* got none \(spectrum 3\)$"):
        list(predict(give(nameless), batch_size=2, on_error="raise"))
    with pytest.raises(ValueError, match=r"flux: expected .* got none$"):
        predict(nameless[3])


def test_a_pipeline_without_a_tokenizer_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="tokenizer: expected a SpectraFMTokenizer"):
        pipeline("stellar-labels", model=tiny_model, device="cpu")


def test_a_loaded_model_finds_the_tokenizer_of_its_checkpoint(predict, stars, tmp_path):
    predict.save_pretrained(tmp_path / "saved")
    model = SpectraFMForPrediction.from_pretrained(tmp_path / "saved")
    assert pipeline("stellar-labels", model=model, device="cpu")(stars[0]) == predict(stars[0])
    model.add_label("mg_fe")
    with pytest.raises(ValueError, match="tokenizer: expected one for the labels of the model, .*'mg_fe'"):
        pipeline("stellar-labels", model=model, device="cpu")


def test_a_saved_pipeline_is_a_checkpoint(predict, stars, tmp_path):
    predict.save_pretrained(tmp_path / "saved")
    load_checkpoint(tmp_path / "saved")
    assert pipeline("stellar-labels", model=str(tmp_path / "saved"), device="cpu")(stars[0]) == predict(stars[0])


def test_a_prediction_that_is_not_finite_is_an_error(predict, tiny_model, stars):
    with torch.no_grad():
        tiny_model.readout.mean.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"teff: expected a finite prediction, got .* \(star-0\)"):
        predict(stars[0])
    answers = predict(stars)
    assert all(answer["reason"].startswith("teff: expected a finite prediction") for answer in answers)
    assert all(np.isnan(answer["teff"]) for answer in answers)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("give", [list, iter, datasets.Dataset.from_list])
def test_a_bad_spectrum_among_others_is_a_row_with_the_reason_and_the_others_stay(either, stars, give, batch_size):
    expected = [either(star) for star in stars]
    for number in (0, 3):
        stars[number]["flux"] = np.full_like(stars[number]["flux"], np.nan)
    answers = list(either(give(stars), batch_size=batch_size))
    for number, (answer, other) in enumerate(zip(answers, expected, strict=True)):
        if number in (0, 3):
            assert list(answer) == [*other, "reason"] and answer["object_id"] == f"star-{number}"
            assert answer["reason"].startswith("flux: expected at least one valid pixel")
            assert all(np.isnan(answer[key]) for key in other if key != "object_id")
        else:
            same([answer], [other])


def test_on_error_is_an_option_of_the_pipeline_or_of_a_call(tiny_evidence, stars):
    model, tokenizer = tiny_evidence
    bad = {**stars[0], "flux": np.full_like(stars[0]["flux"], np.nan)}
    predict = pipeline("stellar-labels", model=model, tokenizer=tokenizer, device="cpu", on_error="raise")
    with pytest.raises(ValueError, match=r"flux: expected .* \(star-0\)"):
        predict([bad, stars[1]])
    alone = predict(bad, on_error="reason", flags=True, requests=["logg"])
    assert list(alone) == ["object_id", "logg", "logg_err", "flags", "reason"] and alone["flags"] == []
    table = predict([bad, *stars[1:]], on_error="reason", flags=True).to_table()
    assert table["reason"][0] != "" and list(table["reason"][1:]) == [""] * 4
    assert np.isfinite(table["teff"][1:]).all() and np.isnan(table["teff"][0])
    with pytest.raises(ValueError, match=r"on_error: expected one of \('reason', 'raise'\), got 'ignore'"):
        predict(stars, on_error="ignore")


def test_an_unknown_request_is_an_error_and_not_a_row(either, stars):
    for wrong, message in (
        ({"requests": ["age"]}, "requests: expected names out of"),
        ({"requests": [10.0]}, "requests: expected"),
        ({"scalars": ["age"]}, "scalars: expected names out of"),
        ({"radial_velocity": [1.0]}, "radial_velocity: expected one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            either(stars, **wrong)


def test_spectra_of_different_instruments_share_a_batch(tiny_evidence, stars):
    """Those that the model does not take together it takes one after the other."""
    model, tokenizer = tiny_evidence
    predict = pipeline("stellar-labels", model=model, tokenizer=tokenizer, device="cpu")
    first, second = (rung.range for rung in tokenizer.basis.rungs[:2])
    mixed = []
    for star, (low, high) in zip(stars[:4], (first, second, second, first), strict=True):
        wavelength = np.linspace(low * 1.001, high * 0.999, len(star["flux"]))
        mixed.append({**star, "wavelength": wavelength})
    assert same(predict(mixed, batch_size=4, flags=True), [predict(star, flags=True) for star in mixed])


def test_a_model_with_weights_on_disk_predicts_too(tiny_evidence, stars, tmp_path):
    model, tokenizer = tiny_evidence
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    away = SpectraFMForPrediction.from_pretrained(
        tmp_path / "checkpoint", device_map={"": "disk"}, offload_folder=tmp_path / "weights"
    )
    assert {parameter.device.type for parameter in away.parameters()} == {"meta"} and away.device.type == "cpu"
    predict = pipeline("stellar-labels", model=away, tokenizer=tokenizer)
    assert predict(stars) == pipeline("stellar-labels", model=model, tokenizer=tokenizer, device="cpu")(stars)
    assert away.hf_device_map == {"": "disk"}


def test_noise_is_distinguished_from_a_faint_star():
    model, tokenizer = load_checkpoint("spectrafm-base")
    predict = pipeline("stellar-labels", model=model, tokenizer=tokenizer, device="cpu")
    star = next(read_spectra([DEMO_STARS]))
    wavelength, noise = star["wavelength"], np.random.default_rng(0).normal(size=star["flux"].size)
    # Behind the range that is known, it is bright.
    far = np.arange(12000.0, 50000.0, 100.0)
    wavelength = np.concatenate([wavelength, far])
    for signal, flagged in ((0.0, True), (1.5, False)):
        flux = np.concatenate([signal * star["flux"] + noise, np.full(far.size, 100.0)])
        found = predict({"wavelength": wavelength, "flux": flux, "flux_error": np.ones(flux.size)}, flags=True)
        assert ("no_signal" in found["flags"]) is flagged


def test_an_unknown_keyword_is_named_with_the_known_ones(predict, stars):
    expected = "keywords: expected names out of requests, .*, on_error, batch_size, num_workers, got nonsense"
    with pytest.raises(TypeError, match=expected):
        predict(stars[0], nonsense=1)
