import numpy as np
import pytest

from spectrafm_hf.synthesis.lines import (
    Species,
    apply_corrections,
    cached_line_lists,
    damping,
    line_list,
    merge,
    parse_moog,
    thin,
    write_packed,
)


LINES = b"""\
  6707.761    3.0007     0.000    -0.009                                 KURUCZ
 15000.000      26.0     5.000    -1.000
 16000.500      26.1     6.000    -2.000
 15500.000      26.3     6.000    -2.000
 15400.250      26.0     4.000    -0.500              Ba0.10
 15577.100 608.01316     0.400    -6.000              11.092           3023R011
 15600.000 822.01647     0.500    -1.000               6.870                PLEZ
 15610.000     126.0     0.300    -1.500                1.56              KURUCZ
 15620.000   10108.0     0.300    -9.500               5.168              HITRAN
"""


def parsed(low: float = 2000, high: float = 20000) -> dict[tuple[str, int], Species]:
    return {(species.code, species.charge): species for species in parse_moog(LINES, low, high)}


def test_species_get_the_names_of_turbospectrum():
    names = {("3.007", 0), ("26.000", 0), ("26.000", 1), ("608.013016", 0), ("822.000000", 0), ("126.000000", 0)}
    assert set(parsed()) == names | {("10108.000000000", 0)}  # and Fe IV is left out
    assert parsed()["608.013016", 0].number == 608


def test_lines_are_sorted_and_those_outside_the_range_left_out():
    iron = parsed()["26.000", 0]
    assert iron.wavelength.tolist() == [15400.25, 15000.0][::-1]
    assert iron.excitation.tolist() == [5.0, 4.0]
    assert iron.loggf.tolist() == [-1.0, -0.5]
    assert set(parsed(15390, 15410)) == {("26.000", 0)}
    assert parsed(100, 200) == {}


def test_47_tio_replaces_48_tio():
    assert parsed()["822.000000", 0].loggf == pytest.approx([-1 + np.log10(0.8116)])


def read_packed(content: bytes) -> dict[tuple[str, int], tuple[str, np.ndarray, np.ndarray]]:
    found = {}
    while content:
        code, comment = content[:26].decode().strip(), content[34:74].decode().strip()
        ion, n = np.frombuffer(content[26:34], ">i4")
        wavelength = np.frombuffer(content[74 : 74 + 8 * n], ">f8")
        columns = np.frombuffer(content[74 + 8 * n : 74 + 24 * n], ">f4").reshape(4, n)
        found[code, int(ion)] = comment, wavelength, columns
        content = content[74 + 24 * n :]
    return found


def test_a_species_is_written_as_turbospectrum_reads_it(tmp_path):
    for species in parsed().values():
        write_packed(species, tmp_path / "lines")
    found = read_packed((tmp_path / "lines").read_bytes())
    assert set(found) == {(code, charge + 1) for code, charge in parsed()}
    _, wavelength, columns = found["26.000", 1]
    assert wavelength.tolist() == [15000.0, 15400.25]
    assert columns[:, 0] == pytest.approx([5, -1, 1.4, 1e8])  # excitation, log gf, damping by collisions and radiation
    comment, _, columns = found["10108.000000000", 1]
    assert comment.endswith("Barber")  # the partition function it takes
    assert columns[2:, 0] == pytest.approx([0, 1e7])


def test_the_strongest_lines_have_their_own_damping():
    calcium = Species("20.000", 1, np.array([3933.663, 3933.663, 4000.0]), np.array([0.0, 1.0, 0.0]), np.zeros(3))
    collisions, radiation = damping(calcium)
    assert collisions == pytest.approx([234.223, 2.5, 2.5])
    assert radiation == pytest.approx([1.5e8, 1e8, 1e8])
    neutral, _ = damping(Species("20.000", 0, *(calcium.wavelength, calcium.excitation, calcium.loggf)))
    assert neutral == pytest.approx([1.8, 1.8, 1.8])


def test_only_lines_that_agree_are_corrected():
    iron = Species(
        "26.000", 0, np.array([15155.210, 15155.210, 15155.3]), np.array([6.248, 6.0, 6.248]), np.full(3, -0.246)
    )
    assert apply_corrections(iron).loggf == pytest.approx([-0.246 - 0.379, -0.246, -0.246])
    assert iron.loggf == pytest.approx(-0.246)  # what was given stays
    manganese = Species("25.000", 0, iron.wavelength, iron.excitation, iron.loggf)
    assert apply_corrections(manganese).loggf == pytest.approx(-0.246)


def test_merging_keeps_the_summed_strength_and_lines_that_are_apart():
    lines = Species(
        "822.000000",
        0,
        np.array([5000.011, 5000.021, 5000.022, 5000.045]),
        np.array([0.1, 0.1, 1.2, 0.1]),
        np.array([-1.0, -1.0, -1.0, -2.0]),
    )
    merged = merge(lines, 0.03)
    assert merged.wavelength == pytest.approx([5000.016, 5000.022, 5000.045], abs=1e-6)
    assert merged.excitation == pytest.approx([0.1, 1.2, 0.1])
    assert (10**merged.loggf).sum() == pytest.approx((10**lines.loggf).sum())


def test_thinning_keeps_strong_lines_merges_weak_ones_and_drops_the_rest():
    lines = Species(
        "822.000000",
        0,
        np.array([5000.0, 5000.01, 5000.012, 5000.013, 5000.3]),
        np.array([0.1, 0.1, 0.12, 0.1, 0.1]),
        np.array([0.0, -3.0, -3.0, -6.0, -3.0]),
    )
    thinned = thin(lines, 1e-5, -1.5, -4.5)
    assert thinned.wavelength == pytest.approx([5000.0, 5000.011, 5000.3], abs=1e-3)
    strength = 10 ** (lines.loggf - 1.44 * lines.excitation)
    merged = 10 ** (thinned.loggf - 1.44 * thinned.excitation)
    assert merged == pytest.approx([strength[0], strength[1] + strength[2], strength[4]], rel=1e-6)


@pytest.mark.slow
@pytest.mark.network
def test_the_corrections_are_all_of_lines_that_the_package_has():

    plain = {(s.code, s.charge): s.loggf for s in line_list(15100, 17000, corrected=False)}
    tuned = {(s.code, s.charge): s.loggf for s in line_list(15100, 17000)}
    assert sum((plain[key] != tuned[key]).sum() for key in plain) == 383  # one of the 382 is listed twice


@pytest.mark.slow
@pytest.mark.network
def test_a_converted_list_is_written_once():
    first = cached_line_lists(5000, 5010, 0.06)
    times = [path.stat().st_mtime_ns for path in first]
    again = cached_line_lists(5000, 5010, 0.06)
    assert again == first and [path.stat().st_mtime_ns for path in again] == times
    assert first != cached_line_lists(5000, 5010, 0.06, corrected=False)
    relative = cached_line_lists(5000, 5010, 4e-6, relative=True)
    assert relative[0].read_bytes() == first[0].read_bytes()
    assert relative[1].read_bytes() != first[1].read_bytes()  # TiO is merged in another way
