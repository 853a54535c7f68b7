"""The page: what it computes and says. What a browser makes of it is in test_app_browser.py."""

import asyncio
import base64
import gzip
import html
import re
import socket
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import make_tiny_model

import spectrafm_cli
from spectrafm_hf import SpectraFMTokenizer, save_checkpoint
from spectrafm_hf.checkpoints import DEFAULT_CHECKPOINT
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.prediction import TrainingRange
from spectrafm_hf.similar import Embedder, EmbeddingWriter


pytest.importorskip("gradio", reason='needs the extra: pip install ".[app]"')

from spectrafm_hf import app


ROOT = Path(__file__).parents[1]
DEMO_STARS = spectrafm_cli.DEMO_STARS


@pytest.fixture(scope="module")
def workbench() -> app.Workbench:
    return app.Workbench()


@pytest.fixture
def demo_file(tmp_path):
    """The first stars of the demo, with other columns where those are given."""

    def write(n: int = 1, **columns) -> Path:
        table = pq.read_table(DEMO_STARS).slice(0, n)
        for name, values in columns.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
        pq.write_table(table, tmp_path / "stars.parquet")
        return tmp_path / "stars.parquet"

    return write


@pytest.fixture
def text_file(tmp_path):
    """A spectrum of 20 Angstrom pixels, or of other wavelengths, as CSV."""

    def write(first=3360.0, last=10_200.0, step=20.0) -> Path:
        wavelength = np.arange(first, last + 0.5 * step, step)
        lines = [f"{x},{1 + 0.1 * np.sin(x / 300)},0.01" for x in wavelength]
        (tmp_path / "mine.csv").write_text("\n".join(["wavelength,flux,flux_error", *lines]))
        return tmp_path / "mine.csv"

    return write


def in_a_loop(call):
    """Where no event loop runs, Gradio makes some and leaves them open."""

    async def run():
        return call()

    return asyncio.run(run())


def text(page: str) -> str:
    """What of HTML is read."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


@pytest.mark.parametrize("name", app.EXAMPLES)
def test_every_example_is_well_known_to_the_model_that_its_wavelengths_choose(workbench, name):
    reading = workbench.example(name)
    (row,) = reading.rows
    assert reading.loaded.name == ("spectrafm-apogee" if "APOGEE" in name else "spectrafm-gaia-xp-small")
    assert reading.flags(0) == []
    assert reading.prediction["teff"][0] == pytest.approx(row["teff"], rel=0.06)
    assert reading.prediction["logg"][0] == pytest.approx(row["logg"], abs=0.5)
    # Its own name would be no news among the known stars.
    nearest = workbench.nearest(reading, 0)
    assert len(nearest) == app.NEIGHBOURS
    assert row["object_id"] not in [star for star, _, _ in nearest]
    assert [cosine for _, cosine, _ in nearest] == sorted((cosine for _, cosine, _ in nearest), reverse=True)


def test_the_table_to_download_is_what_predict_writes(workbench, demo_file, tmp_path, capsys):
    reading = workbench.read(demo_file(3))
    command = ["predict", str(demo_file(3)), "--output", str(tmp_path / "labels.csv")]
    assert spectrafm_cli.main([*command, "--model", DEFAULT_CHECKPOINT]) == 0  # which explains itself, as the app needs
    assert reading.table.read_bytes() == (tmp_path / "labels.csv").read_bytes()


def test_the_table_goes_with_the_reading(workbench, demo_file):
    reading = workbench.read(demo_file())
    table = reading.table
    assert table.is_file()
    del reading
    assert not table.parent.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a FITS, Parquet, VOTable, NumPy or text file, got an empty one"),
        (bytes(range(256)), "got one of another kind"),
        (b"PAR1 and no more", "expected a Parquet file"),
        (b"name,colour\nVega,blue\n", "wavelength: expected among the columns"),
        (b"wavelength,flux\n5000,nan\n5001,nan\n", "expected pixels with a flux"),
        (b"\x1f\x8b and no more", "expected a file that can be read"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0" + 99 * b"no deflated data", "expected a file that can be read"),
    ],
)
def test_a_bad_file_is_answered_in_words_that_do_not_say_where_the_server_keeps_it(
    workbench, tmp_path, content, expected
):
    (tmp_path / "bad.fits").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        workbench.read(tmp_path / "bad.fits")
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_is_too_large_is_refused(workbench, text_file, monkeypatch):
    monkeypatch.setattr(app, "MAX_MEGABYTES", 0.001)
    with pytest.raises(ValueError, match=r"^expected at most 0.001 MB, got"):
        workbench.read(text_file())


@pytest.mark.parametrize("kind", ["gz", "npz", "parquet"])
def test_a_file_that_is_too_large_when_unpacked_is_refused_before_it_is(workbench, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(app, "MAX_UNPACKED_MEGABYTES", 1)
    path = tmp_path / f"bomb.{kind}"
    zeros = np.zeros(200_000)
    if kind == "gz":
        path.write_bytes(gzip.compress(zeros.tobytes()))
    elif kind == "npz":
        np.savez_compressed(path, flux=zeros)
    else:
        # With its dictionary the table is small in itself.
        pq.write_table(pa.table({"flux": zeros}), path)
    with pytest.raises(ValueError, match="expected at most 1 MB when unpacked, got more"):
        workbench.read(path)


BOMB = """
import sys
from pathlib import Path
import torch
from spectrafm_hf import app
from spectrafm_hf.data.readers import read_spectra

def most_memory():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

before = most_memory()
try:
    app.Workbench().read(sys.argv[1])
except ValueError as error:
    print(error)
print(most_memory() - before)
assert next(read_spectra([sys.argv[1]]))["flux"].size == 400_000
print(most_memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell the memory of a process")
def test_a_small_parquet_file_of_very_many_pixels_takes_no_memory(tmp_path):
    """5 kB on disk, 820 MB as numbers: the page refuses it unread, and the command line reads few rows at once."""
    path = tmp_path / "bomb.parquet"
    rows, pixels = 256, 400_000
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * pixels)
    columns = {"wavelength": 5000.0, "flux": 1.0}
    table = pa.table(
        {
            name: pa.ListArray.from_arrays(offsets, pa.array(np.full(rows * pixels, value, np.float32)))
            for name, value in columns.items()
        }
    )
    pq.write_table(table, path, compression="zstd")
    del table
    assert path.stat().st_size < 10_000
    run = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    said, refused, read = run.stdout.splitlines()
    assert said == "expected at most 250 MB when unpacked, got more"
    assert float(refused) < 100 and float(read) < 300, run.stdout  # MB


def test_of_too_many_spectra_the_first_are_used_and_the_page_says_so(workbench, demo_file, monkeypatch):
    assert not workbench.read(demo_file(3)).more
    monkeypatch.setattr(app, "MAX_SPECTRA", 2)
    reading = workbench.read(demo_file(3))
    assert reading.more and len(reading.rows) == len(reading.prediction["teff"]) == 2
    assert "The file holds more spectra: these are the first 2." in text(app.summary_html(reading, 0))


def test_a_spectrum_that_is_too_long_is_refused(workbench, text_file, monkeypatch):
    monkeypatch.setattr(app, "MAX_PIXELS", 300)
    with pytest.raises(ValueError, match="expected spectra of at most 300 pixels, got one of 343"):
        workbench.read(text_file())


def test_unit_and_medium_of_a_bare_table_are_as_the_visitor_says(workbench, text_file):
    path = text_file(500.0, 700.0, 0.1)
    row = workbench.read(path, wavelength_unit="nm").rows[0]
    assert row["wavelength"][0] == 5000.0
    row = workbench.read(path, wavelength_unit="nm", air=True).rows[0]
    assert row["wavelength"][0] == pytest.approx(5001.39, abs=0.01)


def test_labels_of_another_kind_of_spectrum_are_not_to_be_used(workbench, text_file):
    reading = workbench.read(text_file(4000.0, 6999.0, 0.5))
    assert {"wavelength", "wavelength_step"} <= set(reading.flags(0))
    said = text(app.summary_html(reading, 0))
    assert "Do not use these labels." in said
    assert "3,360 to 10,200 Å in steps of 20 Å. This one has 4,000 to 6,999 Å in steps of 0.5 Å." in said


def test_a_label_outside_the_training_range_is_flagged_beside_its_range(workbench, demo_file):
    reading = workbench.read(demo_file())
    assert "outside" not in app.labels_html(reading, 0)
    reading.prediction["flags"][0] = "teff>6500"
    page = app.labels_html(reading, 0)
    assert text(page).count("outside") == 1
    assert "Outside the training range: Teff." in text(app.summary_html(reading, 0))


def test_the_table_of_labels_has_values_errors_ranges_and_what_the_file_says(workbench, demo_file):
    reading = workbench.read(demo_file())
    said = text(app.labels_html(reading, 0))
    low, high = reading.loaded.training_range.labels["teff"]
    teff, error = (reading.prediction[name][0] for name in ("teff", "teff_err"))
    assert f"T eff [K] {teff:.0f} ± {error:.0f} {low:.0f} to {high:.0f} {reading.rows[0]['teff']:.0f}" in said
    assert "[α/M] [dex]" in said and "log g [dex]" in said


def test_masked_pixels_are_counted_and_a_star_without_valid_ones_has_its_reason(workbench, demo_file):
    pixels = len(next(read_spectra([DEMO_STARS]))["flux"])
    masks = [np.arange(pixels) < 7, np.ones(pixels, bool)]
    reading = workbench.read(demo_file(2, mask=[mask.tolist() for mask in masks]))
    assert f"{pixels} pixels, 7 of them masked" in text(app.summary_html(reading, 0))
    assert reading.why_not(0) == ""
    assert "No labels. This spectrum cannot be used: no valid pixel." in text(app.summary_html(reading, 1))


def test_a_star_of_unknown_velocity_is_flagged(workbench, demo_file):
    reading = workbench.read(demo_file())
    reading.prediction["flags"][0] = "not_at_rest"
    assert "No radial velocity of this star is known" in text(app.summary_html(reading, 0))


def test_names_from_a_file_are_text_and_no_markup(workbench, demo_file):
    reading = workbench.read(demo_file(1, object_id=["<script>alert(1)</script>"]))
    explanation = workbench.explain(reading, 0)
    pages = [
        app.summary_html(reading, 0),
        app.picture_html(reading, 0, explanation, "teff"),
        app.neighbours_html(reading, 0, [("<script>", 0.5, {})]),
        app.alert_html("<script>"),
    ]
    assert all("<script" not in page and "&lt;script" in page for page in pages)


def test_the_picture_is_there_for_wide_and_narrow_screens_and_in_words(workbench):
    reading = workbench.example("Red-clump giant, synthetic APOGEE")
    explanation = workbench.explain(reading, 0)
    assert workbench.explain(reading, 0) is explanation
    page = app.picture_html(reading, 0, explanation, "fe_h", (15_700.0, 15_800.0))
    wide, narrow = (
        base64.b64decode(page.split(start)[1].split('"')[0])
        for start in ('src="data:image/png;base64,', 'srcset="data:image/png;base64,')
    )
    sizes = [np.frombuffer(picture[16:24], ">u4").tolist() for picture in (wide, narrow)]
    assert sizes[0][0] > sizes[0][1] and sizes[1][0] < sizes[1][1]
    peaks = [float(number.replace(",", "")) for number in re.findall(r"([\d,]+) Å(?: \(|,|\. A)", text(page))]
    assert peaks and all(15_700 <= peak <= 15_800 for peak in peaks)
    assert re.search(r'alt="[^"]*response[^"]*\[Fe/H\]|alt="[^"]*\[Fe/H\][^"]*"', page)


def test_a_part_of_the_spectrum_must_have_pixels(workbench):
    explanation = workbench.explain(workbench.example(app.EXAMPLES[0]), 0)
    assert app._part(explanation, None, None) is None
    assert app._part(explanation, 5000, None) == (5000, 10_200)
    for limits in ((20_000, None), (6000, 5000), (5000, 5001)):
        with pytest.raises(ValueError, match="Expected a range with pixels between 3,360 and 10,200 Å"):
            app._part(explanation, *limits)


@pytest.fixture
def tiny_checkpoint(tmp_path) -> Path:
    """Random weights, for spectra like no star of the package."""
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(patch_size=4), tmp_path / "tiny")
    TrainingRange({"teff": (3000.0, 7000.0)}, (5000.0, 5100.0), (2.0, 2.0)).save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_model_of_another_instrument_knows_no_stars_unless_it_is_given_some(tiny_checkpoint, stars, tmp_path):
    bench = app.Workbench(str(tiny_checkpoint))
    (row,) = stars[:1]
    reading = bench._predict([row], more=False)
    assert bench.nearest(reading, 0) == []
    assert "No stars with known labels come with this model." in text(app.neighbours_html(reading, 0, []))

    with EmbeddingWriter(tmp_path / "known.parquet", reading.loaded.model) as writer:
        writer.write(Embedder(reading.loaded.model, reading.loaded.tokenizer)(stars)[0])
    bench = app.Workbench(str(tiny_checkpoint), tmp_path / "known.parquet")
    nearest = bench.nearest(bench._predict([row], more=False), 0)
    assert sorted(name for name, _, _ in nearest) == [f"star-{i}" for i in range(1, 5)]
    with pytest.raises(ValueError, match="known: expected what `spectrafm embed` wrote with spectrafm-gaia-xp-small"):
        app.Workbench("spectrafm-gaia-xp-small", tmp_path / "known.parquet")


# ------------------------------------------------------------------------------------------------------------- the page


def test_every_control_has_a_label_and_no_function_is_open_to_programs(workbench):
    page = in_a_loop(lambda: app.build(workbench))
    config = page.config
    controls = [
        part for part in config["components"] if part["type"] in ("radio", "file", "number", "checkbox", "dropdown")
    ]
    assert len(controls) == 9
    assert all(part["props"]["label"] for part in controls)
    assert all(part["api_visibility"] != "public" for part in config["dependencies"])


def test_a_mistake_of_the_program_is_told_as_such_and_logged(workbench, capsys, monkeypatch):
    page = in_a_loop(lambda: app.build(workbench))
    monkeypatch.setattr(workbench, "example", lambda name: 1 / 0)
    answer = next(function.fn for function in page.fns.values() if function.fn is not None)
    words = [value for value in answer(app.EXAMPLES[0], None, None).values() if isinstance(value, str)]
    assert len(words) == 1 and "no fault of the file" in words[0] and "Traceback" not in words[0]
    assert "ZeroDivisionError" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_serving_the_page_reaches_no_other_machine(monkeypatch, capsys):
    asked = []
    connect = socket.socket.connect

    def watched(self, address):
        asked.append(address[0] if isinstance(address, tuple) else "local")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setattr(socket, "getaddrinfo", _local_only(asked, socket.getaddrinfo))
    page = in_a_loop(lambda: app.launch(port=free_port(), block=False))
    try:
        content = urllib.request.urlopen(page.local_url).read().decode()
    finally:
        page.close()
    assert "Stellar labels from a spectrum" in content
    assert asked and set(asked) <= {"127.0.0.1", "localhost", "local"}
    assert page.local_url in capsys.readouterr().out


def _local_only(asked, look_up):
    def answer(host, *arguments, **options):
        asked.append(host if isinstance(host, str) else "127.0.0.1")
        return look_up(host, *arguments, **options)

    return answer


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert in_a_loop(lambda: spectrafm_cli.main(["app", "--port", str(port)])) == 2
    error = capsys.readouterr().err
    assert error.startswith("spectrafm app: ") and str(port) in error and error.count("\n") == 1


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "spectrafm_hf.app")
    monkeypatch.delattr("spectrafm_hf.app")
    assert spectrafm_cli.main(["app"]) == 2
    assert (
        capsys.readouterr().err
        == 'spectrafm app: the page needs Gradio: pip install ".[app]" in a clone of the repository\n'
    )


def test_the_space_asks_for_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "scripts" / "space" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]
    card = yaml.safe_load((ROOT / "scripts" / "space" / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py"
    least = re.fullmatch(r"gradio>=([\d.]+),<7", project["optional-dependencies"]["app"][0])[1]
    assert card["sdk_version"].startswith(least + ".")
    assert len(card["short_description"]) <= 60  # the hub refuses more
