import numpy as np
import pytest

from spectrafm_hf.synthesis.atmospheres import MarcsGrid, _parse, effective_metallicity


def test_a_node_of_the_grid_is_returned_unchanged(tiny_grid):
    star = tiny_grid.interpolate(5000, 2, 0)
    assert star.temperature == pytest.approx(5000 * (0.8 + 0.1 * np.arange(4)))
    assert star.log_pg == pytest.approx(4 + np.arange(4))
    assert star.radius == pytest.approx(1e11 - 1e9 * (np.arange(4) - 1))


def test_between_nodes_all_layers_are_linear_in_all_labels(tiny_grid):
    star = tiny_grid.interpolate(4250, 1.3, -0.4)
    assert star.temperature == pytest.approx(4250 * (0.8 + 0.1 * np.arange(4)))
    assert star.log_pe == pytest.approx(1.3 + 0.5 * np.arange(4) - 2)
    assert star.log_pg == pytest.approx(2.6 - 0.4 + np.arange(4))
    assert star.log_tau == pytest.approx(np.arange(4) - 3)
    assert star.radius[1] == pytest.approx(10**11.7)


def test_a_plane_parallel_neighbour_makes_the_radius_zero_at_the_surface(tiny_grid):
    assert tiny_grid.interpolate(5000, 3.0, 0).radius == pytest.approx(-1e9 * (np.arange(4) - 1))


def test_the_edges_of_the_grid_are_inside(tiny_grid):
    assert tiny_grid.interpolate(6000, 4, 0).temperature[2] == pytest.approx(6000)
    assert tiny_grid.interpolate(4000, 1, -1).temperature[2] == pytest.approx(4000)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((3999, 2, 0), "teff: expected 4000 to 6000, the range of the model atmospheres, got 3999"),
        ((5000, 4.1, 0), "logg: expected 1 to 4, the range of the model atmospheres, got 4.1"),
        ((5000, 2, -1.5), "m_h: expected -1 to 0, the range of the model atmospheres, got -1.5"),
        ((5000, float("nan"), 0), "logg: expected 1 to 4, the range of the model atmospheres, got nan"),
    ],
)
def test_labels_outside_the_grid_are_refused_by_name_value_and_range(tiny_grid, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_grid.interpolate(*labels)


def test_labels_that_touch_a_missing_model_are_refused_and_the_model_is_named(tiny_grid):
    message = "got teff 5500, logg 1.5, m_h -0.5; there is none of teff 6000, logg 1, m_h -1"
    with pytest.raises(ValueError, match=message):
        tiny_grid.interpolate(5500, 1.5, -0.5)
    assert tiny_grid.interpolate(5500, 2, -0.5).teff == 5500  # of the same cell, but without weight on that model


def test_the_file_that_turbospectrum_reads_holds_all_layers(tiny_grid, tmp_path):
    tiny_grid.interpolate(5000, 2, 0).write(tmp_path / "model", vmicro=1.5)
    header, *rows = (tmp_path / "model").read_text().splitlines()
    assert header.split() == ["'sphINTERPOL'", "4", "5000.", "2.00", "0", "0."]
    table = np.array([row.split() for row in rows], float)
    assert table[2] == pytest.approx([-1, 5000, 1, 6, 1.5, 9.9e10])


def test_alpha_elements_make_the_atmosphere_metal_rich():
    assert effective_metallicity(-1.0, 0.0) == pytest.approx(-1.0)
    assert effective_metallicity(-1.0, 0.4) == pytest.approx(-1 + np.log10(0.638 * 10**0.4 + 0.362))


def marcs_text(temperature: float) -> str:
    head = ["name", "Teff", "Flux", "Gravity", "xi", "Mass", "Metallicity", "1.0000E+12 Radius"]
    rows = [f"{k} 0.0 {k / 10:.3f} {k}E+08 {temperature + k:.1f} 1.0E+01 1.0E+03 0 0" for k in range(56)]
    return "\n".join([*head, "Model structure", " k lgTauR", *rows])


def test_models_whose_header_disagrees_with_their_name_are_not_trusted():
    names = [
        f"s{t}_g{g}_m1.0_t02_x3_z{z}_a+0.00_c.mod"
        for t in (4000, 5000)
        for g in ("+1.0", "+2.0")
        for z in ("-1.00", "+0.00")
    ]
    kind = [("filename", "U60"), ("nlines", int), ("teff", float), ("logg", float), ("metal", float), ("alpha", float)]
    index = np.array(
        [
            (name, 66, t, g, z, 0.0)
            for name, (t, g, z) in zip(
                names, [(t, g, z) for t in (4000, 5000) for g in (1, 2) for z in (-1, 0)], strict=True
            )
        ],
        dtype=kind,
    )
    index["logg"][1] = 2  # the model of logg 1, [M/H] 0 is a copy of that of logg 2
    index["alpha"][6] = 0.25
    arrays = _parse(index, "\n".join(marcs_text(t) for t in index["teff"]))
    assert arrays["trusted"].tolist() == [[[True, False], [True, True]], [[True, True], [False, True]]]
    assert arrays["layers"].shape == (2, 2, 2, 56, 5)
    assert arrays["layers"][1, 0, 0, 3] == pytest.approx([0.3, 5003, 1, 3, 3e8])
    assert (arrays["radius"] == 1e12).all()


@pytest.mark.slow
@pytest.mark.network
def test_the_grid_of_the_package_has_850_missing_models():
    grid = MarcsGrid.load()
    assert grid.layers.shape == (30, 13, 15, 56, 5)
    assert (~grid.trusted).sum() == 850
    sun = grid.interpolate(5777, 4.44, 0)
    assert np.interp(0, sun.log_tau, sun.temperature) == pytest.approx(6450, abs=80)  # where tau(5,000 A) is 1
