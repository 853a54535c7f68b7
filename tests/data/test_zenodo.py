"""A data set from small copies of the arrays of the paper."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from spectrafm_cli import main
from spectrafm_hf.data.zenodo import FEATURES, LABELS, build_original_zenodo


STARS = {"train": 23, "test": 7}
WAVELENGTH = 10 ** (4.179 + 6e-6 * np.arange(246, 296))


def flux_of(kind: str, split: str) -> np.ndarray:
    flux = np.random.default_rng(len(kind + split)).uniform(0.5, 1.1, (STARS[split], WAVELENGTH.size))
    flux[::3, 5:7] = np.nan
    return flux


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "zenodo"
    folder.mkdir()
    np.savetxt(folder / "apogee_wavelength_sol.csv", WAVELENGTH, delimiter=",")
    for split, n in STARS.items():
        random = np.random.default_rng(n)
        np.save(folder / f"labels_{split}.npy", random.normal(size=(n, 5)))
        np.save(folder / f"label_errs_{split}.npy", random.uniform(0.1, 1, (n, 5)))
        for kind in ("aspcap_spectra", "synspec"):
            np.save(folder / f"{kind}_{split}.npy", flux_of(kind, split))
    return folder


def test_the_data_set_has_the_values_of_the_arrays(source, tmp_path):
    out = build_original_zenodo(tmp_path / "out", source, shard_rows=10)
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    streamed = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"), streaming=True)
    assert {split: len(loaded[split]) for split in loaded} == {"train": 46, "test": 14}
    assert loaded["train"].features == FEATURES
    for split, n in STARS.items():
        np.testing.assert_equal(list(streamed[split]), loaded[split].to_list())
        stars = loaded[split].with_format("numpy")[:]
        flux = np.concatenate([flux_of(kind, split) for kind in ("aspcap_spectra", "synspec")])
        np.testing.assert_array_equal(stars["flux"], flux.astype(np.float32))
        np.testing.assert_array_equal(stars["mask"], np.isnan(flux))
        np.testing.assert_allclose(stars["wavelength"], np.tile(WAVELENGTH, (2 * n, 1)), rtol=1e-7)
        assert stars["object_id"].tolist() == [f"{split}-{i}" for i in range(n)] * 2
        assert stars["survey"].tolist() == ["apogee-dr17"] * n + ["apogee-dr17-synthetic"] * n
        for suffix, name in (("", "labels"), ("_err", "label_errs")):
            values = np.tile(np.load(source / f"{name}_{split}.npy"), (2, 1)).astype(np.float32)
            for i, label in enumerate(LABELS):
                np.testing.assert_array_equal(stars[f"{label}{suffix}"], values[:, i])


def test_a_folder_with_observed_test_stars_alone_is_enough_and_micrometres_are_understood(source, tmp_path):
    for path in {*source.glob("synspec*"), *source.glob("*train*"), source / "apogee_wavelength_sol.csv"}:
        path.unlink()
    np.save(source / "apogee_wavelength_sol.npy", WAVELENGTH / 1e4)
    table = pq.read_table(build_original_zenodo(tmp_path / "out", source) / "data")
    assert len(table) == STARS["test"]
    np.testing.assert_allclose(table["wavelength"][0].as_py(), WAVELENGTH, rtol=1e-7)


def test_the_card_names_the_files_by_their_checksums(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "original-zenodo", "--source", str(source), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 46 train, 14 test\n"
    card = (out / "README.md").read_text()
    assert "| train | 46 |" in card
    assert card.count(".npy`: `") == 8
    for name in FEATURES:
        assert f"| `{name}` |" in card


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_an_array_with_a_program_in_it_is_refused_and_the_program_does_not_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(source / "labels_test.npy", np.array([Bomb()] * 7, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"labels_test\.npy: expected an array of numbers, got: "):
        build_original_zenodo(tmp_path / "out", source)
    assert not (tmp_path / "exploded").exists()


def test_missing_and_wrong_columns_are_named(source, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_original_zenodo(tmp_path / "out", source)
        assert not (tmp_path / "out").exists()

    np.save(source / "label_errs_test.npy", np.zeros((6, 5)))
    refused(r"label_errs_test\.npy: expected floats of shape \(7, 5\), got float64 of shape \(6, 5\)")
    (source / "label_errs_test.npy").unlink()
    refused(r"label_errs_test\.npy: expected an array of numbers, got: .*No such file")
    (source / "aspcap_spectra_train.npy").write_bytes((source / "aspcap_spectra_train.npy").read_bytes()[:1000])
    refused(r"aspcap_spectra_train\.npy: expected an array of numbers, got: ")
    np.savetxt(source / "apogee_wavelength_sol.csv", WAVELENGTH[::-1])
    refused(r"apogee_wavelength_sol\.csv: expected rising wavelengths of APOGEE in Angstrom or micrometres, got ")
    (source / "apogee_wavelength_sol.csv").unlink()
    refused(r"source: expected one of apogee_wavelength_sol\.csv, .* in .*zenodo, found none")
    with pytest.raises(ValueError, match="source: expected a folder, got nowhere"):
        build_original_zenodo(tmp_path / "out", "nowhere")
