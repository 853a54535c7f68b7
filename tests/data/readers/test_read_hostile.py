"""Damaged and unusual files: each gives one line with file and cause, and the others are read."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from forked import run_forked

from spectrafm_hf.data.readers import Failure, find_files, formats, read_spectra
from spectrafm_hf.data.schema import pixel_column


PIXELS = 200


def image(flux=None):
    hdu = fits.PrimaryHDU(np.ones(PIXELS) if flux is None else flux)
    hdu.header.update(TPLLIB="MILES", CRPIX1=1, CRVAL1=3540.5, CDELT1=0.9)
    return hdu


def fits_bytes(tmp_path, hdu):
    hdu.writeto(tmp_path / "whole.fits", overwrite=True)
    return (tmp_path / "whole.fits").read_bytes()


def truncated(tmp_path, file):
    file.write_bytes(fits_bytes(tmp_path, image(np.ones(5000)))[:9000])


def negative_size(tmp_path, file):
    """Which astropy goes back by, to read the same again without end."""
    whole = fits_bytes(tmp_path, fits.HDUList([image(), fits.ImageHDU(np.ones(PIXELS))]))
    count = b"GCOUNT  = %20d"
    assert count % 1 in whole
    file.write_bytes(whole.replace(count % 1, count % -2))


def more_axes_than_fits_has(tmp_path, file):
    """Which astropy looks for one by one."""
    whole = fits_bytes(tmp_path, fits.HDUList([image(), fits.ImageHDU(np.ones(PIXELS))]))
    axes = b"NAXIS   = %20d"
    file.write_bytes(gzip.compress(whole.replace(axes % 1, axes % 999999999999)))


def more_columns_than_fits_has(tmp_path, file):
    table = fits.BinTableHDU.from_columns([fits.Column("flux", "E", array=np.ones(PIXELS))])
    columns = b"TFIELDS = %20d"
    file.write_bytes(fits_bytes(tmp_path, table).replace(columns % 1, columns % 999999999999))


def zero_length(tmp_path, file):
    np.savez(file, wavelength=np.zeros(0), flux=np.zeros(0))


def all_nan(tmp_path, file):
    image(np.full(PIXELS, np.nan)).writeto(file)


def png_as_fits(tmp_path, file):
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)


def gzip_garbage(tmp_path, file):
    file.write_bytes(b"\x1f\x8b\x08\x00" + bytes(range(256)) * 20)


def gzip_cut_off(tmp_path, file):
    noise = np.random.default_rng(0).random(PIXELS * 20)
    file.write_bytes(gzip.compress(fits_bytes(tmp_path, image(noise)))[:20_000])


def empty(tmp_path, file):
    file.write_bytes(b"")


def without_columns(tmp_path, file):
    fits.BinTableHDU.from_columns([fits.Column("ra", "D", array=np.ones(3))]).writeto(file)


def no_rows(tmp_path, file):
    table = {"wavelength": pixel_column(np.zeros((0, 3))), "flux": pixel_column(np.zeros((0, 3)))}
    pq.write_table(pa.table(table), file)


def half_a_parquet(tmp_path, file):
    columns = {name: pixel_column(np.ones((50, PIXELS))) for name in ("wavelength", "flux")}
    pq.write_table(pa.table(columns), file)
    file.write_bytes(file.read_bytes()[:-40])


def scattered_ids(tmp_path, file):
    file.write_text("object_id,wavelength,flux\na,1,1\nb,1,1\na,2,1\n")


def latin_1(tmp_path, file):
    file.write_bytes("Wellenlänge,flux\n1,1\n".encode("latin-1"))


def a_link_to_nothing(tmp_path, file):
    file.symlink_to(tmp_path / "nowhere")


HOSTILE = {
    truncated: ("a.fits", "truncated"),
    negative_size: ("a.fits", "expected a FITS file, got HDU 1 with data of a negative size"),
    more_axes_than_fits_has: ("a.fits.gz", "expected a FITS file, got HDU 0 with NAXIS = 999999999999"),
    more_columns_than_fits_has: ("a.fits", "expected a FITS file, got HDU 1 with TFIELDS = 999999999999"),
    zero_length: ("a.npz", "expected pixels with a flux, got none"),
    all_nan: ("a.fits", "expected pixels with a flux, got 200 that are masked or not finite"),
    png_as_fits: ("a.fits", "expected a FITS, Parquet, .* or text file, got one of another kind"),
    gzip_garbage: ("a.fits.gz", "expected a file that can be read, got "),
    gzip_cut_off: ("a.fits.gz", "expected a (FITS file|file that can be read), got "),
    empty: ("a.fits", "got an empty one"),
    without_columns: ("a.fits", "expected a table with columns wavelength and flux, .* got the columns ra"),
    no_rows: ("a.parquet", "expected at least one spectrum, got none"),
    half_a_parquet: ("a.parquet", "expected a Parquet file, got "),
    scattered_ids: ("a.csv", "expected the lines of a star together in .*, got 'a' again"),
    latin_1: ("a.csv", "expected a column of this name in .* got Wellenlänge, flux"),
    a_link_to_nothing: ("a.csv", "got nothing of this name"),
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_bad_file_gives_one_line_and_the_others_are_read(tmp_path, make):
    name, cause = HOSTILE[make]
    bad, good = tmp_path / name, [tmp_path / "m0001V.fits", tmp_path / "m0002V.fits"]
    make(tmp_path, bad)
    for file in good:
        image().writeto(file)
    failures: list[Failure] = []
    rows = list(read_spectra(find_files([good[0], bad, good[1]], failures=failures), failures=failures))
    assert [row["file"] for row in rows if row["file"] in good] == good
    (failure,) = failures
    assert failure.file == bad
    assert name in failure.cause
    assert "\n" not in failure.cause
    with pytest.raises(ValueError, match=cause) as error:
        list(read_spectra(find_files([bad])))
    assert "\n" not in str(error.value)


def test_paths_that_are_not_there_are_failures_and_the_others_are_found(tmp_path):
    image().writeto(tmp_path / "m0001V.fits")
    (tmp_path / "empty").mkdir()
    failures: list[Failure] = []
    paths = [tmp_path / "nowhere", tmp_path / "m0001V.fits", tmp_path / "empty"]
    assert find_files(paths, failures=failures) == [tmp_path / "m0001V.fits"]
    assert [failure.file.name for failure in failures] == ["nowhere", "empty"]


def test_a_folder_gives_all_files_of_spectra_in_and_below_it_but_hidden_ones(tmp_path):
    for name in ("b.fits", "sub/a.csv", "sub/.part.fits", ".build/c.fits", "notes.md", "d.FITS.GZ"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.relative_to(tmp_path).as_posix() for file in find_files([tmp_path])] == [
        "b.fits",
        "d.FITS.GZ",
        "sub/a.csv",
    ]


def test_a_file_without_read_permission_is_one_line(tmp_path):
    file = tmp_path / "m0001V.fits"
    image().writeto(file)
    image().writeto(tmp_path / "first.fits")
    file.chmod(0)
    command = (
        "import os, sys\n"
        "from spectrafm_hf.data.readers import read_spectra\n"
        "list(read_spectra(sys.argv[2:]))\n"  # what is imported late may be in a folder of root
        "if os.geteuid() == 0: os.seteuid(65534)\n"  # nobody: root may read everything
        "failures = []\n"
        "print(list(read_spectra(sys.argv[1:2], failures=failures)), failures[0].cause)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    run = run_forked(command, file, tmp_path / "first.fits")
    assert run.stdout.startswith(f"[] {file}: expected a file that can be read, got [Errno 13] Permission denied"), (
        run.stderr
    )


def test_stars_before_a_bad_one_are_read(tmp_path):
    scattered_ids(tmp_path, tmp_path / "a.csv")
    failures: list[Failure] = []
    rows = list(read_spectra([tmp_path / "a.csv"], failures=failures))
    assert [row["object_id"] for row in rows] == ["a", "b"]
    assert len(failures) == 1


def test_a_file_of_another_format_than_was_named_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("wavelength,flux\n1,1\n")
    for name in [format.name for format in formats() if format.name not in ("text", "ecsv")]:
        with pytest.raises(ValueError, match=r"a\.csv") as error:
            list(read_spectra([tmp_path / "a.csv"], format=name))
        assert "\n" not in str(error.value)


def test_a_bad_star_in_a_table_leaves_the_others_of_the_table(tmp_path):
    flux = np.ones((3, 5))
    flux[1] = np.nan
    columns = {
        "object_id": pa.array(["α Cen", "dupe", "dupe"]),
        "wavelength": pixel_column(np.tile(np.arange(5.0) + 5000, (3, 1))),
    }
    pq.write_table(pa.table({**columns, "flux": pixel_column(flux)}), tmp_path / "a.parquet")
    rows = list(read_spectra([tmp_path / "a.parquet"]))
    assert [row["object_id"] for row in rows] == ["α Cen", "dupe", "dupe"]
    assert [bool(row["mask"].all()) for row in rows] == [False, True, False]
