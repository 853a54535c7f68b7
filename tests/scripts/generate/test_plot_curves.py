"""Curves of several runs in one plot."""

import numpy as np
import pytest
from matplotlib import image
from script_loader import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("generate/plot_curves")


def test_a_run_begins_where_the_one_before_it_ended_and_the_picture_is_drawn(script, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("step,loss,eval_loss,eval_teff_robust_scatter\n50,1.5,,\n100,1.0,0.9,80\n")
    (tmp_path / "b.csv").write_text("step,loss,eval_loss,eval_teff_robust_scatter\n50,0.8,0.7,60\n")
    curves = script.read_curves([tmp_path / "a.csv", tmp_path / "b.csv"])
    np.testing.assert_array_equal(curves["loss"], [[50, 100, 150], [1.5, 1.0, 0.8]])
    np.testing.assert_array_equal(curves["eval_teff_robust_scatter"], [[100, 150], [80, 60]])
    output = tmp_path / "curves.png"
    assert script.main([str(output), str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 0
    assert image.imread(output).std() > 0.05
    assert script.main([str(output), str(tmp_path / "missing.csv")]) == 2
    assert "plot_curves.py: " in capsys.readouterr().err
