"""Predictions in batches, their flags, and their tables."""

import copy
import json
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from astropy.io import fits
from astropy.table import Table
from huggingface_hub import constants, hf_hub_download
from test_upload import hub  # noqa: F401
from transformers import pipeline

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import batched, read_spectra
from spectrafm_hf.data.schema import valid_pixels
from spectrafm_hf.inference.prediction import TOKENS_AT_ONCE, batches_of, predict_batches
from spectrafm_hf.inference.spectrum import SpectrumPredictor
from spectrafm_hf.inference.tables import PredictionWriter
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.inference.velocities import settled
from spectrafm_hf.models import vacuum_to_air
from spectrafm_hf.models.gate_spectrafm import FRAME_UNSTATED, MEDIUM_UNSTATED


NAMES = ["teff", "logg", "fe_h", "alpha_m"]
UNITS = {"teff": "K", "logg": "dex", "fe_h": "dex", "alpha_m": "dex"}


def predict(model, tokenizer, rows, size=2, **kwargs):
    parts = list(predict_batches(model, tokenizer, batched(rows, size), **kwargs))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_predictions_are_those_of_the_model_star_by_star(tiny_model, tiny_tokenizer, stars):
    predicted = predict(tiny_model, tiny_tokenizer, stars)
    assert list(predicted) == ["object_id", *(n for name in NAMES for n in (name, f"{name}_err")), "flags", "reason"]
    assert predicted["object_id"].tolist() == [f"star-{i}" for i in range(5)]
    assert set(predicted["flags"]) == {""}
    with torch.no_grad():
        for i, star in enumerate(stars):
            output = tiny_model(**tiny_tokenizer(star))
            np.testing.assert_allclose([predicted[name][i] for name in NAMES], output.predictions[0], rtol=1e-5)
            np.testing.assert_allclose(
                [predicted[f"{name}_err"][i] for name in NAMES], output.prediction_errors[0], rtol=1e-5
            )


def test_requests_choose_the_labels_and_unknown_ones_are_refused(tiny_model, tiny_tokenizer, stars):
    everything = predict(tiny_model, tiny_tokenizer, stars)
    some = predict(tiny_model, tiny_tokenizer, stars, requests=["fe_h", "teff"])
    assert list(some) == ["object_id", "fe_h", "fe_h_err", "teff", "teff_err", "flags", "reason"]
    np.testing.assert_allclose(some["teff"], everything["teff"], rtol=1e-6)
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.requests = ["logg"]
    assert list(predict(tiny_model, tokenizer, stars)) == ["object_id", "logg", "logg_err", "flags", "reason"]
    with pytest.raises(ValueError, match=r"requests: expected names out of .*teff.*, got \['age'\]"):
        predict(tiny_model, tiny_tokenizer, stars, requests=["age"])


def test_the_units_of_the_tokenizer_do_not_touch_rows_of_the_schema(tiny_model, tiny_tokenizer, stars):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.wavelength_unit, tokenizer.wavelength_medium, tokenizer.error_type = "nm", "air", "ivar"
    expected = predict(tiny_model, tiny_tokenizer, stars)
    for name, column in predict(tiny_model, tokenizer, stars).items():
        np.testing.assert_array_equal(column, expected[name])
    assert tokenizer.wavelength_unit == "nm"


def test_bad_stars_get_nan_and_a_reason_and_leave_the_others_alone(tiny_model, tiny_tokenizer, stars):
    expected = predict(tiny_model, tiny_tokenizer, [stars[0], stars[4]])
    stars[1]["mask"][:] = True
    stars[2]["flux"] = stars[2]["flux"][:-1]
    stars[3]["flux_error"][7] = -1.0
    predicted = predict(tiny_model, tiny_tokenizer, stars, size=5, training_range=TrainingRange({"teff": (0.0, 1e6)}))
    reasons = predicted["reason"].tolist()
    assert set(predicted["flags"]) == {""}
    assert reasons[0] == reasons[4] == ""
    assert reasons[1] == "no valid pixel"
    assert "expected" in reasons[2]
    assert reasons[3] == "flux_error: expected positive numbers, got -1"
    for name in NAMES:
        for column in (name, f"{name}_err"):
            assert np.isnan(predicted[column][1:4]).all()
            np.testing.assert_allclose(predicted[column][[0, 4]], expected[column], rtol=1e-5)


def test_a_spectrum_that_is_not_at_rest_is_flagged_within_any_training_range(tiny_model, tiny_tokenizer, stars):
    stars[1]["rest_frame"], stars[2]["rest_frame"] = False, True
    for training_range, before in ((None, ""), (TrainingRange({"teff": (1e6, 2e6)}), "teff<1e+06")):
        flags = predict(tiny_model, tiny_tokenizer, stars, training_range=training_range)["flags"].tolist()
        assert flags[1] == ";".join(filter(None, ["not_at_rest", before]))
        assert {flags[i] for i in (0, 2, 3, 4)} == {before}


def test_an_empty_spectrum_and_a_batch_of_nothing_but_bad_stars_do_not_stop_the_run(tiny_model, tiny_tokenizer, stars):
    empty = {"object_id": "nothing", **{name: np.zeros(0) for name in ("wavelength", "flux", "flux_error", "mask")}}
    predicted = predict(tiny_model, tiny_tokenizer, [empty, empty, stars[0]])
    assert predicted["reason"].tolist() == ["no valid pixel", "no valid pixel", ""]
    assert np.isfinite(predicted["teff"]).tolist() == [False, False, True]


def test_stars_without_errors_share_a_batch_with_others(tiny_model, tiny_tokenizer, stars):
    stars[1]["flux_error"] = np.full_like(stars[1]["flux_error"], np.nan)
    predicted = predict(tiny_model, tiny_tokenizer, stars, size=5)
    assert set(predicted["flags"]) == {""}
    alone = {name: stars[1][name] for name in ("wavelength", "flux", "mask")}
    with torch.no_grad():
        output = tiny_model(**tiny_tokenizer(alone))
    np.testing.assert_allclose(predicted["teff"][1], output.predictions[0, 0], rtol=1e-5)
    np.testing.assert_array_equal(valid_pixels(stars[1]), ~stars[1]["mask"])


def test_a_prediction_that_is_not_finite_is_flagged(tiny_model, tiny_tokenizer, stars):
    with torch.no_grad():
        tiny_model.readout.mean.bias.fill_(torch.inf)
    predicted = predict(tiny_model, tiny_tokenizer, stars)
    assert set(predicted["reason"]) == {"prediction not finite"}
    assert np.isnan(predicted["teff_err"]).all()


@pytest.mark.parametrize(
    "limits", [((3360.0, 10200.0), (20.0, 20.0)), (((3360.0, 10200.0), (15152.0, 16960.0)), ((20.0, 20.0), (0.2, 0.3)))]
)
def test_the_training_range_is_saved_and_loaded_and_is_none_without_a_file(tmp_path, limits):
    assert TrainingRange.load(tmp_path) is None
    training_range = TrainingRange({"teff": (3000.0, 8000.0)}, *limits)
    assert training_range.save(tmp_path).name == "training_range.json"
    assert TrainingRange.load(tmp_path) == training_range
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_range.json"]


def test_offline_the_cache_of_the_hub_is_used_for_the_training_range(hub, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "some").mkdir()
    training_range = TrainingRange({"teff": (3000.0, 8000.0)})
    training_range.save(tmp_path / "some")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    for name in ("some", "none", "unknown"):
        hub.commit(f"somebody/{name}", tmp_path / name.replace("unknown", "none"))
    assert TrainingRange.load("somebody/some") == training_range
    assert TrainingRange.load("somebody/none") is None
    hf_hub_download("somebody/unknown", "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    n_requests = len(hub.log)
    assert TrainingRange.load("somebody/some") == training_range
    assert TrainingRange.load("somebody/none") is None
    with pytest.raises(OSError, match=r"^somebody/unknown: expected the hub, or its cache, to know .*, got .*offline"):
        TrainingRange.load("somebody/unknown")
    assert len(hub.log) == n_requests


@pytest.mark.parametrize(
    "content",
    [
        "[1, 2]",
        "{",
        '{"wavelength": [1, 2]}',
        '{"labels": {"teff": [2, 1]}}',
        '{"labels": {}, "colour": [0, 1]}',
        '{"labels": {}, "two\\nlines": [0, 1]}',
        '{"labels": {}, "wavelength": [[1, 2], [4, 3]]}',
        '{"labels": {}, "wavelength": [[1, 2], [3, 4]], "wavelength_step": [1, 1]}',
    ],
)
def test_a_damaged_training_range_is_a_clear_error(tmp_path, content):
    (tmp_path / "training_range.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"training_range.json: expected labels, wavelength and wavelength_step, got"
    ) as error:
        TrainingRange.load(tmp_path)
    assert "\n" not in str(error.value)


def star_at(wavelength) -> dict:
    wavelength = np.asarray(wavelength, np.float32)
    ones = np.ones_like(wavelength)
    return {"object_id": "x", "wavelength": wavelength, "flux": ones, "flux_error": ones, "mask": ones == 0}


def test_flags_name_labels_outside_the_training_range():
    training_range = TrainingRange(
        {"teff": (3500.0, 6500.0), "logg": (0.0, 5.0)}, wavelength=(4000.0, 5000.0), wavelength_step=(2.0, 2.0)
    )
    inside = {"teff": 5000.0, "logg": 3.0}
    whole = star_at(np.arange(4000, 5001, 2))
    assert training_range.flags(whole, inside) == []
    assert training_range.flags(whole, {"teff": 6501.0, "logg": -0.1}) == ["teff>6500", "logg<0"]
    assert training_range.flags(whole, {"logg": 3.0}) == []
    assert training_range.flags(star_at(np.arange(4000, 4900, 2)), inside) == ["wavelength"]
    assert training_range.flags(star_at(np.arange(3900, 5001, 2)), inside) == ["wavelength"]
    assert training_range.flags(star_at(np.arange(15100, 17000, 2)), inside) == ["wavelength"]
    assert training_range.flags(star_at(np.arange(4000, 5001, 1)), inside) == ["wavelength_step"]
    # Order does not matter, nor does a Doppler shift of 100 km/s.
    assert training_range.flags(star_at(np.arange(4000, 5001, 2)[::-1] * (1 + 1e2 / 3e5)), inside) == []
    whole["mask"][: len(whole["mask"]) // 2] = True
    assert training_range.flags(whole, inside) == ["wavelength"]


def test_a_spectrum_of_one_of_several_instruments_is_judged_by_that_one():
    training_range = TrainingRange({}, ((4000.0, 5000.0), (15000.0, 16000.0)), ((2.0, 2.0), (0.2, 0.3)))
    optical, infrared = np.arange(4000, 5001, 2), np.arange(15000, 16000, 0.25)
    assert training_range.flags(star_at(optical), {}) == training_range.flags(star_at(infrared), {}) == []
    assert training_range.flags(star_at(infrared[::8]), {}) == ["wavelength_step"]
    assert training_range.flags(star_at(optical[:400]), {}) == ["wavelength"]
    assert training_range.flags(star_at(np.arange(6000, 14000, 2)), {}) == ["wavelength"], "between the two"
    assert "wavelength" in training_range.flags(star_at(np.concatenate([optical, infrared])), {}), "both at once"


def test_flags_of_a_star_are_joined_in_the_table(tiny_model, tiny_tokenizer, stars):
    training_range = TrainingRange({"teff": (1e6, 2e6), "logg": (-2e6, -1e6)})
    predicted = predict(tiny_model, tiny_tokenizer, stars, training_range=training_range)
    assert set(predicted["flags"]) == {"teff<1e+06;logg>-1e+06"}


def read_table(path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return pd.read_csv(
            path, dtype={"object_id": str}, keep_default_na=False, na_values={name: ["", "nan"] for name in NAMES}
        )
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pandas()
    table = Table.read(path, mask_invalid=False)
    table.convert_bytestring_to_unicode()
    return table.to_pandas()


def batches_of_predictions():
    for start in range(0, 7, 3):
        n = min(3, 7 - start)
        numbers = {
            f"{name}{suffix}": np.arange(start, start + n) + np.float32(0.1)
            for name in NAMES
            for suffix in ("", "_err")
        }
        numbers["teff"][0] = np.nan
        ids = np.array([f"star {i} α" if i == 5 else "s" * i for i in range(start, start + n)], dtype=object)
        flags = np.array(["a;b,c", "", '"quoted"'][:n], dtype=object)
        yield {"object_id": ids, **numbers, "flags": flags, "reason": np.array(["", "", "no; star"][:n], dtype=object)}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits"])
def test_a_table_holds_all_batches_and_no_temporary_file_is_left(tmp_path, suffix):
    path = tmp_path / f"labels{suffix}"
    path.write_text("an older file")
    with PredictionWriter(path, NAMES, UNITS) as writer:
        for batch in batches_of_predictions():
            writer.write(batch)
        assert path.read_text() == "an older file"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    table = read_table(path)
    expected = [text for batch in batches_of_predictions() for text in batch["object_id"]]
    if suffix == ".fits":  # ASCII only
        expected[5] = "star 5 \\u03b1"
    assert table["object_id"].tolist() == expected
    assert table["flags"].tolist() == ["a;b,c", "", '"quoted"', "a;b,c", "", '"quoted"', "a;b,c"]
    assert np.isnan(table["teff"]).tolist() == [True, False, False] * 2 + [True]
    np.testing.assert_allclose(table["alpha_m_err"], np.arange(7) + 0.1, rtol=1e-6)
    if suffix == ".fits":
        assert str(Table.read(path)["teff_err"].unit) == "K"


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits"])
def test_two_writers_of_one_table_do_not_meet_though_their_process_numbers_are_the_same(tmp_path, suffix):
    path = tmp_path / f"labels{suffix}"
    with PredictionWriter(path, NAMES, UNITS) as one:
        with PredictionWriter(path, NAMES, UNITS) as other:
            for batch in batches_of_predictions():
                one.write(batch)
                other.write(batch)
        assert len(read_table(path)) == 7
        path.unlink()
    assert len(read_table(path)) == 7


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits"])
def test_an_error_halfway_leaves_no_file_and_the_older_one_alone(tmp_path, suffix):
    path = tmp_path / f"labels{suffix}"
    path.write_text("an older file")
    with pytest.raises(RuntimeError, match="halfway"), PredictionWriter(path, NAMES, UNITS) as writer:
        writer.write(next(batches_of_predictions()))
        raise RuntimeError("halfway")
    assert path.read_text() == "an older file"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_output_that_cannot_be_is_refused_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"output: expected a name that ends in .csv, .parquet, .fits, got .*labels.txt"
    ):
        PredictionWriter(tmp_path / "labels.txt", NAMES, UNITS)
    with pytest.raises(ValueError, match=r"output: expected a folder that exists, got .*nowhere"):
        PredictionWriter(tmp_path / "nowhere" / "labels.csv", NAMES, UNITS)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=r"output: expected the name of a file, got the folder"):
        PredictionWriter(tmp_path / "folder.csv", NAMES, UNITS)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_stars(tmp_path):
    # 20,000 spectra of 343 pixels are 90 MB as Parquet holds them, 200 MB as rows. In a process of its own, as the
    # peak of the memory cannot be set back.
    script = textwrap.dedent(
        """
        import resource, sys
        import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
        from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
        from spectrafm_hf.data.schema import pixel_column
        from spectrafm_hf.inference.prediction import predict_batches
        from spectrafm_hf.inference.tables import PredictionWriter
        from spectrafm_hf.data.readers import batched, read_spectra

        def write(path, groups):
            random = np.random.default_rng(0)
            wavelength = np.tile(np.arange(3360.0, 10201.0, 20.0), (1000, 1))
            writer = None
            for group in range(groups):
                flux = random.normal(1, 0.1, wavelength.shape)
                pixels = {"wavelength": wavelength, "flux": flux, "flux_error": flux * 0 + 0.1, "mask": flux > 9}
                table = pa.table(
                    {"object_id": [f"{group}-{i}" for i in range(1000)]}
                    | {name: pixel_column(values) for name, values in pixels.items()}
                )
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
            writer.close()

        def predict(path, output):
            stars = 0
            with PredictionWriter(output, names, {}) as table:
                for batch in predict_batches(model, tokenizer, batched(read_spectra([path]), 128)):
                    table.write(batch)
                    stars += len(batch["flags"])
            return stars, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        torch.set_num_threads(1)
        folder = sys.argv[1]
        config = SpectraFMConfig(
            hidden_size=16, encoder_attention_heads=[2], encoder_ffn_dim=[16],
            decoder_attention_heads=[2], decoder_ffn_dim=[16], readout_dims=[8],
        )
        model, tokenizer = SpectraFMForPrediction(config), SpectraFMTokenizer(max_length=7)
        names = config.label_names
        write(f"{folder}/small.parquet", 2)
        write(f"{folder}/large.parquet", 20)
        for size in ("small", "large"):
            for suffix in (".csv", ".fits"):  # which is Parquet first
                print(*predict(f"{folder}/{size}.parquet", f"{folder}/{size}{suffix}"))
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    stars, peaks = np.array(result.stdout.split(), float).reshape(4, 2).T
    assert stars.tolist() == [2000, 2000, 20000, 20000]
    assert peaks[-1] - peaks[1] < 30, f"{peaks[1]:.0f} MB after 2,000 stars, {peaks[-1]:.0f} MB after 20,000"
    assert len(read_table(tmp_path / "large.csv")) == len(read_table(tmp_path / "large.fits")) == 20000


def test_a_saved_range_is_plain_json(tmp_path):
    TrainingRange({"teff": (3000.0, 8000.0)}, (3360.0, 10200.0)).save(tmp_path)
    content = json.loads((tmp_path / "training_range.json").read_text())
    assert content == {"labels": {"teff": [3000.0, 8000.0]}, "wavelength": [3360.0, 10200.0], "wavelength_step": None}


def test_a_first_batch_of_few_stars_does_not_make_the_next_ones_smaller(tiny_model, tiny_tokenizer, stars):
    sizes = []
    tiny_model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["flux"])), with_kwargs=True
    )
    list(predict_batches(tiny_model, tiny_tokenizer, [stars[:1], stars, stars[:2]]))
    assert sorted(sizes) == [1, 2, 5]


def make_star(n_pixels, number=0):
    flux = np.random.default_rng(number).normal(1.0, 0.1, n_pixels)
    wavelength = np.linspace(5000.0, 6000.0, n_pixels)
    error, mask = np.full(n_pixels, 0.1), np.zeros(n_pixels, bool)
    return {"object_id": str(number), "wavelength": wavelength, "flux": flux, "flux_error": error, "mask": mask}


def given_shapes(model):
    """Shapes of the fluxes that the model gets, in a list that grows."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["flux"].shape)), with_kwargs=True
    )
    return shapes


def test_a_long_spectrum_does_not_stretch_the_short_ones_of_its_batch(tiny_model, tiny_tokenizer):
    rows = [make_star(40, i) for i in range(60)]
    rows[7] = make_star(4_000, 7)
    expected = [predict(tiny_model, tiny_tokenizer, [row])["teff"][0] for row in rows]
    shapes = given_shapes(tiny_model)
    np.testing.assert_allclose(predict(tiny_model, tiny_tokenizer, rows, size=60)["teff"], expected, rtol=1e-5)
    assert shapes == [(59, 40), (1, 4_000)]


def test_one_bad_star_is_found_by_halves(tiny_model, tiny_tokenizer):
    rows = [make_star(40, i) for i in range(64)]
    rows[20]["mask"][:] = True
    shapes = given_shapes(tiny_model)
    predicted = predict(tiny_model, tiny_tokenizer, rows, size=64)
    assert predicted["reason"].tolist() == ["no valid pixel" if i == 20 else "" for i in range(64)]
    assert np.isnan(predicted["teff"]).tolist() == [i == 20 for i in range(64)]
    assert sum(n for n, *_ in shapes) == 63 and len(shapes) == 6


def test_a_star_that_does_not_fit_into_memory_is_flagged_and_others_are_predicted(tiny_model, tiny_tokenizer, stars):
    def allocate(module, args, inputs):
        if inputs["flux"].shape[1] > 1000:
            torch.empty(2**50)  # what the allocator says of it is real

    tiny_model.register_forward_pre_hook(allocate, with_kwargs=True)
    predicted = predict(tiny_model, tiny_tokenizer, [stars[0], make_star(20_000, 1), stars[1]], size=3)
    assert predicted["reason"].tolist() == ["", "too large for the memory", ""]
    assert np.isnan(predicted["teff"]).tolist() == [False, True, False]


def test_a_batch_has_as_many_stars_as_the_model_is_fast_with(tiny_tokenizer):
    rows = [make_star(10, i) for i in range(2 * TOKENS_AT_ONCE // 10)]
    sizes = [len(batch) for batch in batches_of(rows, tiny_tokenizer)]
    assert sizes == [205, 204]
    assert [len(batch) for batch in batches_of(rows[:7], tiny_tokenizer, 3)] == [3, 3, 1]
    long = [make_star(5 * TOKENS_AT_ONCE, i) for i in range(2)]
    assert [len(batch) for batch in batches_of(long, tiny_tokenizer)] == [1, 1]


def test_flags_do_not_depend_on_the_order_of_the_pixels(stars):
    training_range = TrainingRange({}, (5000.0, 6000.0), (20.0, 30.0))
    star = make_star(41)
    order = np.random.default_rng(0).permutation(41)
    mixed = {**star, **{name: star[name][order] for name in ("wavelength", "flux", "flux_error", "mask")}}
    assert training_range.flags(star, {}) == training_range.flags(mixed, {}) == []
    for steps in ((26.0, 30.0), (20.0, 24.0)):
        wrong = TrainingRange({}, (5000.0, 6000.0), steps)
        assert wrong.flags(star, {}) == wrong.flags(mixed, {}) == ["wavelength_step"]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_batches_side_by_side_come_in_their_order_and_leave_the_threads_as_they_were(
    tiny_model, tiny_tokenizer, two_threads
):
    rows = [make_star(40 + 4 * (i % 5), i) for i in range(60)]
    threads = set()
    tiny_model.register_forward_pre_hook(lambda *args: threads.add((threading.get_ident(), torch.get_num_threads())))
    together = predict(tiny_model, tiny_tokenizer, rows, size=3)
    assert together["object_id"].tolist() == [str(i) for i in range(60)]
    assert 1 <= len(threads) <= 2 and {number for _, number in threads} == {1}
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2, "also in new threads"
    alone = [predict(tiny_model, tiny_tokenizer, [row])["teff"][0] for row in rows]
    np.testing.assert_allclose(together["teff"], alone, rtol=1e-5)


def test_an_error_in_one_of_several_threads_is_an_error(tiny_model, tiny_tokenizer, two_threads):
    def stumble(module, args, inputs):
        if len(inputs["flux"]) == 2:
            raise RuntimeError("stumbled")

    tiny_model.register_forward_pre_hook(stumble, with_kwargs=True)
    rows = [make_star(40, i) for i in range(30)]
    batches = [rows[:5], rows[5:7], *([row] for row in rows[7:])]
    with pytest.raises(RuntimeError, match="stumbled"):
        list(predict_batches(tiny_model, tiny_tokenizer, batches))
    assert torch.get_num_threads() == 2


def test_no_more_batches_are_read_than_are_worked_on(tiny_model, tiny_tokenizer, two_threads):
    read = []

    def batches():
        for i in range(30):
            read.append(i)
            yield [make_star(40, i)]

    for number, _ in enumerate(predict_batches(tiny_model, tiny_tokenizer, batches())):
        assert len(read) <= number + 3


@pytest.fixture(scope="module")
def base():
    return load_checkpoint("spectrafm-base")


def optical_row(wavelength, flags, rest_frame=None):
    """A star like the Sun at R = 5,000, on wavelengths that are said to be these."""
    true = np.arange(4500.0, 6500.0, 0.4)
    found = SpectrumPredictor().from_labels(
        {"teff": 5700.0, "logg": 4.4, "fe_h": -0.1}, wavelength=true, resolving_power=5000.0
    )
    (row,) = found.rows(["sun"])
    noise = np.random.default_rng(0).normal(0.0, 0.01, true.size)
    return {
        **{"object_id": "sun", "survey": "", "flux": row["flux"] + noise, "flux_error": np.full(true.size, 0.01)},
        **{"wavelength": wavelength(true), "mask": np.zeros(true.size, bool), "resolving_power": 5000.0},
        **{"rest_frame": rest_frame, "flags": list(flags), "refused": ""},
    }


@pytest.mark.parametrize(
    ("wavelength", "flags", "rest_frame", "expected"),
    [
        (vacuum_to_air, [MEDIUM_UNSTATED, FRAME_UNSTATED], None, ["medium_measured"]),
        (lambda true: true * (1 + 60.0 / 299792.458), [FRAME_UNSTATED], None, ["velocity_measured"]),
        (
            lambda true: true * (1 - 83.0 / 299792.458),
            [FRAME_UNSTATED],
            None,
            ["velocity_measured"],
        ),  # not in air
        (lambda true: true * (1 + 60.0 / 299792.458), [], False, ["velocity_measured"]),
        (lambda true: true, [MEDIUM_UNSTATED, FRAME_UNSTATED], None, []),
    ],
)
def test_unstated_frame_and_medium_are_measured_from_lines(base, wavelength, flags, rest_frame, expected):
    row = optical_row(wavelength, flags, rest_frame)
    (found,) = settled([row], *base)
    assert found["flags"] == expected
    assert found["rest_frame"] is True
    true = optical_row(lambda true: true, [])["wavelength"]
    assert np.abs(found["wavelength"] / true - 1).max() * 299792.458 < 2.0
    (batch,) = predict_batches(base[0], base[1], [[found]], ["teff", "fe_h"])
    assert abs(batch["teff"][0] - 5700) < 3 * batch["teff_err"][0]
    assert set(expected) <= set(batch["flags"][0].split(";")) if expected else batch["flags"][0] == ""


def test_stated_frames_are_not_measured_and_spectra_without_lines_are_not_changed(base):
    stated = optical_row(vacuum_to_air, [], True)
    assert next(settled([stated], *base)) is stated
    empty = optical_row(vacuum_to_air, [MEDIUM_UNSTATED])
    empty["flux"] = np.random.default_rng(1).normal(1.0, 0.01, empty["flux"].size)
    assert next(settled([empty], *base)) is empty


def test_a_file_has_the_labels_and_flags_of_the_command_line_in_the_pipeline(base, tmp_path):
    row = optical_row(vacuum_to_air, [])
    columns = [fits.Column(name, "D", array=row[name]) for name in ("wavelength", "flux", "flux_error")]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "sun.fits")
    predict = pipeline("stellar-labels", model=base[0], tokenizer=base[1], device="cpu")
    (answer,) = predict(str(tmp_path / "sun.fits"), flags=True)
    assert answer["flags"] == ["medium_measured"]
    files = settled(read_spectra([tmp_path / "sun.fits"]), *base)
    (batch,) = predict_batches(base[0], base[1], [list(files)], ["teff", "fe_h"])
    assert answer["teff"] == pytest.approx(float(batch["teff"][0]), rel=1e-5)
    # What is not measured is said as well.
    found = predict(str(tmp_path / "sun.fits"), flags=True, radial_velocity=-83.0)
    assert found[0]["flags"] == ["medium_unstated", "frame_unstated"]
    (sharper,) = predict(str(tmp_path / "sun.fits"), resolving_power=2000.0)
    assert sharper["teff"] != answer["teff"]
