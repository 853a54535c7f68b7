"""
No code comes out of data: whatever is put where the program reads files, nothing is unpickled and no module of a
checkpoint is imported. Each file here would leave a trace if it were.
"""

import ast
import contextlib
import gzip
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from astropy.io import fits
from conftest import make_tiny_model
from datasets import load_dataset
from hub_server import serve
from huggingface_hub import constants, snapshot_download
from test_conversion import wavelengths_of
from test_trainer import make_arguments, make_stars, recipe_from_nothing
from transformers import AutoConfig, AutoModel, AutoModelForTimeSeriesPrediction, AutoTokenizer, pipeline

import spectrafm_cli
import spectrafm_hf
from spectrafm_hf import SpectrumEmulator, bundled, bundled_names, load_checkpoint, save_checkpoint
from spectrafm_hf.data.labels import read_labels
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.schema import pixel_column
from spectrafm_hf.hub.conversion import convert_original_checkpoint, read_wavelengths
from spectrafm_hf.inference.similar import read_embeddings
from spectrafm_hf.synthesis.emulation import read_grid
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.training.recipe import last_checkpoint, read_recipe
from spectrafm_hf.training.trainer import train


ROOT = Path(__file__).parents[2]
MODELS = Path(spectrafm_hf.__file__).parent / "models"
PIXELS = {"wavelength": np.arange(5000.0, 5040.0), "flux": np.linspace(0.9, 1.1, 40)}
#: The modules that unpickle: stars on their way between processes of one run (no file), and names of errors.
PICKLE = {
    "src/spectrafm_hf/hub/conversion.py": {"UnpicklingError"},
    "src/spectrafm_hf/synthesis/synthetic.py": {"dumps", "loads"},
    "src/spectrafm_hf/training/trainer.py": {"UnpicklingError"},
    "scripts/train_accelerate.py": {"UnpicklingError"},
}


class Poison:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def poison(trace):
    """The bytes of a pickle, and a check at the end that nobody unpickled it."""
    yield pickle.dumps(Poison(trace))
    assert not trace.exists(), "something was unpickled or run"


def code(trace: Path) -> str:
    return f"import os\nos.mkdir({str(trace)!r})\n"


def test_the_poison_works(tmp_path, trace):
    """Every kind of it, where it is read as it must not be."""
    import yaml

    content = pickle.dumps(Poison(trace))
    torch.save(Poison(trace), tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array([Poison(trace)], dtype=object), allow_pickle=True)
    for read in (
        lambda: pickle.loads(content),
        lambda: torch.load(tmp_path / "a.pt", weights_only=False),
        lambda: np.load(tmp_path / "a.npy", allow_pickle=True),
        lambda: yaml.unsafe_load(tagged(trace)),
        lambda: exec(code(trace)),
    ):
        read()
        assert trace.is_dir()
        trace.rmdir()


def tagged(trace: Path) -> str:
    """YAML that makes a folder in a loader that is not safe."""
    return f"!!python/object/apply:os.mkdir [{str(trace)!r}]"


# ------------------------------------------------------------------------------------------------------------- spectra


def raw(name):
    return lambda folder, trace: (folder / name).write_bytes(pickle.dumps(Poison(trace)))


def zipped(folder, trace):
    (folder / "a.fits.gz").write_bytes(gzip.compress(pickle.dumps(Poison(trace))))


def objects_npy(folder, trace):
    np.save(folder / "a.npy", np.array([Poison(trace)], dtype=object), allow_pickle=True)


def objects_npz(folder, trace):
    np.savez(folder / "a.npz", **PIXELS, object_id=np.array([Poison(trace)], dtype=object))


def torch_npz(folder, trace):
    torch.save({**PIXELS, "flux_error": Poison(trace)}, folder / "a.npz")  # a zip, as npz is


def yaml_ecsv(folder, trace):
    columns = "# datatype:\n# - {name: wavelength, datatype: float64}\n# - {name: flux, datatype: float64}\n"
    text = f"# %ECSV 1.0\n# ---\n{columns}# meta: {tagged(trace)}\n# schema: astropy-2.0\nwavelength flux\n5000 1\n"
    (folder / "a.ecsv").write_text(text)


def serialized_fits(folder, trace, name="XP_SAMPLED 1234567890123456789.fits"):
    """What astropy writes beside columns that FITS cannot hold, read by `Table.read`."""
    columns = [
        fits.Column(name, "D", array=values) for name, values in {**PIXELS, "flux_error": PIXELS["flux"]}.items()
    ]
    table = fits.BinTableHDU.from_columns(columns)
    for line in ("--BEGIN-ASTROPY-SERIALIZED-COLUMNS--", tagged(trace), "--END-ASTROPY-SERIALIZED-COLUMNS--"):
        for start in range(0, len(line), 70):
            rest = "\\" if start + 70 < len(line) else ""
            table.header.add_comment(line[start : start + 70] + rest)
    table.writeto(folder / name)


REFUSED = {
    **{name: raw(name) for name in ("a.npy", "a.npz", "a.fits", "a.parquet", "a.csv", "a.ecsv", "a.txt", "a.xml")},
    **{name: raw(name) for name in ("a.pkl", "a.pt", "a.pth", "a.bin", "a.json")},
    "objects.npy": objects_npy,
    "objects.npz": objects_npz,
    "torch.npz": torch_npz,
    "gzip.fits.gz": zipped,
    "yaml.ecsv": yaml_ecsv,
    "serialized.fits": serialized_fits,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_poisoned_file_of_spectra_is_refused_in_one_line(tmp_path, trace, poison, name, capsys):
    folder = tmp_path / "files"
    folder.mkdir()
    REFUSED[name](folder, trace)
    (path,) = folder.iterdir()
    with pytest.raises(ValueError, match=path.name) as error:
        list(read_spectra([path], grid=PIXELS["wavelength"]))
    assert "\n" not in str(error.value)
    for words in (["predict", path], ["plot", path], ["data", "from-files", path, "--out", tmp_path / "set"]):
        assert spectrafm_cli.main([str(word) for word in words]) == 2
        assert path.name in capsys.readouterr().err


def with_pickles(path: Path, poison: bytes) -> Path:
    """Good spectra in Parquet, with pickles wherever a reader of pickles has looked for them."""
    columns = {name: pixel_column(values[None]) for name, values in PIXELS.items()}
    table = pa.table({"object_id": ["star"], **columns, "teff": pa.array([5000.0]), "extra": pa.array([poison])})
    # pyarrow before 14.0.1 unpickled this on reading.
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": poison}
    fields = [field.with_metadata(extension) if field.name == "extra" else field for field in table.schema]
    metadata = {b"pandas": poison, b"spectrafm_model": poison, b"huggingface": poison, **extension}
    pq.write_table(table.cast(pa.schema(fields, metadata=metadata)), path)
    return path


def test_pickles_next_to_good_spectra_are_ignored(tmp_path, poison):
    (row,) = read_spectra([with_pickles(tmp_path / "a.parquet", poison)])
    np.testing.assert_allclose(row["flux"], PIXELS["flux"], rtol=1e-6)
    columns = [fits.Column(name, "D", array=values) for name, values in PIXELS.items()]
    cell = np.array([np.frombuffer(poison, np.uint8)] * 40, dtype=object)
    fits.BinTableHDU.from_columns([*columns, fits.Column("pickle", "PB()", array=cell)]).writeto(tmp_path / "a.fits")
    (row,) = read_spectra([tmp_path / "a.fits"])
    np.testing.assert_allclose(row["flux"], PIXELS["flux"], rtol=1e-6)
    np.savez(tmp_path / "a.npz", **PIXELS, extra=np.frombuffer(poison, np.uint8))
    (row,) = read_spectra([tmp_path / "a.npz"])
    assert row["flux"].size == 40


# ------------------------------------------------------------------------------------------- tables, recipes, data sets


@pytest.mark.parametrize("name", ["a.csv", "a.ecsv", "a.fits", "a.parquet"])
def test_a_poisoned_table_of_labels_is_refused(tmp_path, poison, name):
    (tmp_path / name).write_bytes(poison)
    with pytest.raises(ValueError, match=name):
        read_labels(tmp_path / name)


def test_yaml_in_tables_of_labels_makes_no_objects(tmp_path, trace, poison):
    yaml_ecsv(tmp_path, trace)
    serialized_fits(tmp_path, trace, "a.fits")
    for name in ("a.ecsv", "a.fits"):
        with pytest.raises(ValueError, match=name):
            read_labels(tmp_path / name)
    assert "extra" in read_labels(with_pickles(tmp_path / "a.parquet", poison)).column_names


def test_poisoned_recipes_and_instruments_are_refused(tmp_path, trace, poison):
    for content in (tagged(trace), f"data: {tagged(trace)}", poison.decode("latin-1")):
        (tmp_path / "a.yaml").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=r"a\.yaml"):
            read_recipe(tmp_path / "a.yaml", ["--output_dir", str(tmp_path / "run")])
        with pytest.raises(ValueError, match=r"a\.yaml"):
            Instrument.load(tmp_path / "a.yaml")


def test_poisoned_wavelengths_and_grids_are_refused(tmp_path, trace, poison):
    objects_npy(tmp_path, trace)
    np.savez(tmp_path / "a.npz", wavelength=np.array([Poison(trace)], dtype=object), norm_u16=np.zeros(1), labels=[0])
    (tmp_path / "a.txt").write_bytes(poison)
    for name in ("a.npy", "a.npz", "a.txt"):
        with pytest.raises(ValueError, match=r"wavelengths: expected"):
            read_wavelengths(tmp_path / name)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_grid(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="--grid: expected numbers"):
        spectrafm_cli.arguments._read_grid(tmp_path / "a.npy")


def test_poisoned_known_stars_are_refused(tmp_path, poison, capsys):
    spectra = ROOT / "src" / "spectrafm_hf" / "resources" / "gaia_xp_demo.parquet"
    (tmp_path / "raw.parquet").write_bytes(poison)
    with_pickles(tmp_path / "metadata.parquet", poison)
    assert read_embeddings(tmp_path / "raw.parquet", make_tiny_model()) is None
    for name in ("raw", "metadata"):
        assert spectrafm_cli.main(["similar", str(spectra), "--to", str(tmp_path / f"{name}.parquet")]) == 2
        assert f"{name}.parquet" in capsys.readouterr().err


def test_code_and_pickles_in_the_folder_of_a_data_set_are_not_run(tmp_path, trace, poison):
    folder = tmp_path / "stars"
    (folder / "data").mkdir(parents=True)
    with_pickles(folder / "data" / "train-00000-of-00001.parquet", poison)
    for name in ("stars.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(code(trace))
    for name in ("stars.pkl", "state.pkl"):
        (folder / name).write_bytes(poison)
    assert spectrafm_cli.main(["predict", str(folder), "--output", str(tmp_path / "labels.csv")]) in (0, 1)
    try:
        load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    except Exception as error:  # whatever datasets says of its own metadata; it is not run
        assert "pickle" not in type(error).__name__.lower()


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def put_pickles(folder: Path, poison: bytes) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "a.pkl"):
        (folder / name).write_bytes(poison)


def test_pickles_next_to_the_weights_are_ignored(checkpoint, poison):
    put_pickles(checkpoint, poison)
    model, _ = load_checkpoint(checkpoint)
    assert all(a.equal(b) for a, b in zip(model.parameters(), make_tiny_model().parameters(), strict=True))
    for auto_class in (AutoModel, AutoModelForTimeSeriesPrediction):
        auto_class.from_pretrained(checkpoint)


def test_pickles_in_the_place_of_weights_are_refused(checkpoint, trace, poison):
    (checkpoint / "model.safetensors").write_bytes(poison)
    with pytest.raises(ValueError, match="the weight file is truncated or damaged"):
        load_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    for save in (lambda path: path.write_bytes(poison), lambda path: torch.save({"a": Poison(trace)}, path)):
        save(checkpoint / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load_checkpoint(checkpoint)
        with pytest.raises(Exception, match=r"[Ww]eights|safetensors|pickle"):
            AutoModelForTimeSeriesPrediction.from_pretrained(checkpoint)


def test_an_emulator_of_pickles_is_refused(tmp_path, trace, poison):
    name = bundled_names("spectrafm-emulator")[0]
    shutil.copytree(bundled(name), tmp_path / "emulator", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"a": Poison(trace)}, tmp_path / "emulator" / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights|safetensors|pickle"):
        SpectrumEmulator.from_pretrained(tmp_path / "emulator")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_run_does_not_resume_from_pickles(tmp_path_factory, trace, poison, name, run):
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(run, folder / "checkpoint-2")
    torch.save({"a": Poison(trace)}, folder / "checkpoint-2" / name)
    (folder / "checkpoint-2" / "training_args.bin").write_bytes(poison)
    arguments = make_arguments(
        folder, max_steps=4, eval_strategy="no", save_strategy="no", load_best_model_at_end=False
    )
    arguments.resume_from_checkpoint = last_checkpoint(folder)
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: expected numbers in .*checkpoint-2, got Weights only"
    ):
        train(recipe_from_nothing(), arguments, make_stars(64, 1), make_stars(32, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Where a run was interrupted."""
    folder = tmp_path_factory.mktemp("run")
    arguments = make_arguments(folder, max_steps=2, save_strategy="steps", save_steps=2, eval_strategy="no",
                               load_best_model_at_end=False)  # fmt: skip
    train(recipe_from_nothing(), arguments, make_stars(64, 1), make_stars(32, 2))
    return folder / "checkpoint-2"


@pytest.mark.filterwarnings("ignore")
def test_the_plain_loop_resumes_without_the_pickles_of_accelerate(tmp_path, trace, poison, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_accelerate

    def go(max_steps: int, **changes) -> list[dict]:
        arguments = make_arguments(tmp_path / "run", max_steps=max_steps, eval_strategy="no",
                                   load_best_model_at_end=False, **changes)  # fmt: skip
        return train_accelerate.train(
            recipe_from_nothing(ema_decay=0.9), arguments, make_stars(64, 1), make_stars(32, 2)
        )

    before = go(2, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not list(checkpoint.glob("custom_checkpoint_*"))
    (checkpoint / "custom_checkpoint_0.pkl").write_bytes(poison)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected numbers in .*, got Number of custom"):
        go(4, save_strategy="no", resume_from_checkpoint=str(checkpoint))
    (checkpoint / "custom_checkpoint_0.pkl").unlink()
    after = go(4, save_strategy="no", resume_from_checkpoint=str(checkpoint))
    losses = [[entry["step"] for entry in log if "loss" in entry] for log in (before, after)]
    assert losses == [[1, 2], [1, 2, 3, 4]]
    torch.save({"a": Poison(trace)}, checkpoint / "optimizer.bin")
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: expected numbers in .*checkpoint-2, got Weights only"
    ):
        go(4, save_strategy="no", resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_accelerate_does_not_resume_from_pickles(tmp_path, trace, poison, name):
    """As `scripts/train_accelerate.py` has it do."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / name).is_file()
    torch.save({"a": Poison(trace)}, tmp_path / "state" / name)
    # Of the states of random numbers it says in its log that they cannot be loaded, and goes on.
    refused = pytest.raises(pickle.UnpicklingError, match="Weights only load failed")
    with refused if name == "optimizer.bin" else contextlib.nullcontext():
        accelerator.load_state(str(tmp_path / "state"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_original_checkpoint_of_pickles_is_refused(tmp_path, trace, poison):
    source = tmp_path / "original"
    shutil.copytree(ROOT / "tests" / "fixtures" / "original_tiny", source)
    for content in (poison, None):
        if content is None:
            torch.save({"model_state_dict": {"a": Poison(trace)}}, source / "weights.pt")
        else:
            (source / "weights.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.pt: expected a whole file of weights"):
            convert_original_checkpoint(source, tmp_path / "converted", wavelengths_of(source))


# ------------------------------------------------------------------------------------------------- code of a checkpoint


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.py")}


OURS = digests(MODELS)


def expected_code(kind: str) -> dict[str, str]:
    # The fit of SpectraFM is made of parts of the emulator.
    words = ("emulator",) if kind == "spectrafm-emulator" else ("spectrafm", "emulator")
    return {name: digest for name, digest in OURS.items() if name.split("_")[-1].removesuffix(".py") in words}


@pytest.mark.parametrize("name", bundled_names())
def test_a_bundled_checkpoint_has_no_code_and_no_reference_to_code(name):
    assert digests(Path(bundled(name))) == {} and (Path(bundled(name)) / "config.json").is_file()
    for file in Path(bundled(name)).glob("*config.json"):
        assert not {"auto_map", "custom_pipelines"} & json.loads(file.read_text()).keys()


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_the_code_of_a_checkpoint_that_is_saved_and_pulled_is_that_of_the_package_by_hash(
    checkpoint, tmp_path, monkeypatch
):
    assert digests(checkpoint) == expected_code("spectrafm")
    with serve() as hub:
        hub.commit("somebody/tiny", checkpoint, "main")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        pulled = snapshot_download("somebody/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert digests(Path(pulled)) == expected_code("spectrafm")


def test_with_the_package_no_code_of_a_checkpoint_is_run(checkpoint, trace, poison, stars):
    for path in checkpoint.glob("*.py"):
        path.write_text(code(trace))
    model, tokenizer = load_checkpoint(checkpoint)
    assert type(model).__module__ == "spectrafm_hf.models.modeling_spectrafm"
    for auto_class in (AutoConfig, AutoModel, AutoModelForTimeSeriesPrediction, AutoTokenizer):
        assert type(auto_class.from_pretrained(checkpoint)).__module__.startswith("spectrafm_hf.models.")
    predict = pipeline("stellar-labels", model=str(checkpoint), device="cpu")
    assert predict(stars[0])["teff"] == pytest.approx(model(**tokenizer(stars[0])).predictions[0, 0].item(), rel=1e-5)
    name = bundled_names("spectrafm-emulator")[0]
    emulator = checkpoint.with_name("emulator")
    shutil.copytree(bundled(name), emulator)
    for path in emulator.glob("*.py"):
        path.write_text(code(trace))
    assert isinstance(AutoModel.from_pretrained(emulator), SpectrumEmulator)


# ----------------------------------------------------------------------------------------------------- the source text


def dotted(node: ast.AST) -> str:
    """A name such as `torch.load`; of what is no plain name, the last part."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def loads_code(path: Path) -> list[str]:
    """What in a module could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name, named = dotted(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = (
                name in ("eval", "exec", "__import__")
                or name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load")
                or name.endswith((".read_pickle", ".register_for_checkpointing", ".add_safe_globals"))
                or (name == "torch.load" and named.get("weights_only") != "True")
                or named.get("allow_pickle", "False") != "False"
                or named.get("trust_remote_code", "False") != "False"
            )
            found += [f"{name} in line {node.lineno}"] if unsafe else []
        elif isinstance(node, ast.Attribute) and dotted(node.value) == "pickle":
            found += [dotted(node)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name in ("dill", "cloudpickle", "joblib", "shelve", "marshal")]
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                found += [f"from pickle import {alias.name}" for alias in node.names]
    return found


def test_no_module_unpickles_or_evaluates_what_a_file_holds():
    modules = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    modules = [path for path in modules if "resources" not in path.parts]  # copies, see above
    found = {path.relative_to(ROOT).as_posix(): set(loads_code(path)) for path in modules}
    allowed = {name: {f"pickle.{attribute}" for attribute in attributes} for name, attributes in PICKLE.items()}
    assert {name: names for name, names in found.items() if names} == allowed


def test_the_search_of_the_source_text_works(tmp_path):
    lines = ["eval(x)", "exec(x)", "yaml.load(x)", "torch.load(x)", "torch.load(x, weights_only=False)"]
    lines += ["np.load(x, allow_pickle=True)", "pickle.load(x)", "import joblib", "a.register_for_checkpointing(x)"]
    for line in lines:
        (tmp_path / "a.py").write_text(line)
        assert loads_code(tmp_path / "a.py"), line
