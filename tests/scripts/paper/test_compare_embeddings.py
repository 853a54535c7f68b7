"""The comparison of vectors as a command, on the stars of the package."""

import re

from spectrafm_hf.files import DEMO_STARS


def test_vectors_of_the_model_are_nearer_in_labels_than_pixels(run_script):
    arguments = (DEMO_STARS, "--labels", "teff", "logg", "fe_h")
    code, printed, error = run_script("paper/compare_embeddings.py", *arguments)
    assert code == 0, error
    found = {what: float(ratio) for what, ratio in re.findall(r"^(\w+ +\d+ \w+): ([\d.]+),", printed, re.MULTILINE)}
    ratios = {" ".join(what.split()[::2]): ratio for what, ratio in found.items()}
    assert len(ratios) == 8
    assert ratios["states whole"] < ratios["pixels whole"] < 1.1
    assert ratios["states holes"] < 0.8 * ratios["pixels holes"]
