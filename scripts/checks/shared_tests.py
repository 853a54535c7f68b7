#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Run the common model tests of transformers on ours, and list which pass, fail or do not apply.

    python scripts/checks/shared_tests.py                     # some minutes
    python scripts/checks/shared_tests.py -k test_save_load   # some of them

They are in the source distribution of the installed transformers, which is downloaded with `parameterized` into a
temporary folder. Tests that are missing there (generation and exporters) are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import transformers


#: Replacements for modules that the tests import, but which the distribution lacks.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
TESTS = '''
import copy
import unittest

import numpy as np
import torch

from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMModel

from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

MODEL_MAPPING_NAMES["spectrafm"] = "SpectraFMModel"  # one without a loss


class Published:
    """The published architecture, small."""

    batch_size, seq_length, n_requests = 5, 7, 3
    is_training, hidden_size, num_hidden_layers, num_attention_heads = True, 16, 2, 2
    encoder_seq_length, decoder_seq_length, key_length, encoder_key_length = 7, 3, 8, 8

    def get_config(self):
        return SpectraFMConfig(
            hidden_size=16, encoder_attention_heads=[2, 2], encoder_ffn_dim=[32, 32], decoder_attention_heads=[2, 2],
            decoder_ffn_dim=[32, 32], readout_dims=[16],
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        wavelength = torch.linspace(15100.0, 15900.0, self.seq_length).expand(self.batch_size, -1).clone()
        inputs = {
            "flux": torch.randn(self.batch_size, self.seq_length, generator=generator),
            "wavelength": wavelength,
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.bool),
            "request_ids": torch.arange(2, 2 + self.n_requests).expand(self.batch_size, -1).clone(),
        }
        return self.get_config(), inputs


class Evidence(Published):
    """A model on evidence, small."""

    def get_config(self):
        return SpectraFMConfig(
            token_embedding="basis", num_intervals=4, num_coefficients=5, rung_intervals=[[0, 4]], rung_components=[6],
            num_members=3, hidden_size=16, encoder_ffn_dim=[16, 16],
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 4, 5)
        inputs = {
            "coefficients": torch.randn(shape, generator=generator),
            "reliability": torch.rand(shape, generator=generator),
            "interval_ids": torch.arange(4).expand(self.batch_size, -1).clone(),
            "attention_mask": torch.ones(shape[:2], dtype=torch.bool),
            "request_ids": torch.arange(2, 2 + self.n_requests).expand(self.batch_size, -1).clone(),
        }
        return self.get_config(), inputs


class Settings(ConfigTester):
    def create_and_test_config_with_num_labels(self):
        """There are as many as label_names."""


class Shared(ModelTesterMixin):
    all_model_classes = (SpectraFMModel, SpectraFMForPrediction)
    test_resize_embeddings = False  # the vocabulary is of labels: add_label

    def setUp(self):
        self.model_tester = self.tester()
        about = {"has_text_modality": False, "common_properties": ["hidden_size"], "hidden_size": 32}
        self.config_tester = Settings(self, config_class=SpectraFMConfig, **about)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is SpectraFMForPrediction:
            inputs["labels"] = torch.full(inputs["request_ids"].shape, 2.0)
        return inputs


class PublishedTest(Shared, unittest.TestCase):
    tester, is_encoder_decoder = Published, True

    def test_retain_grad_hidden_states_attentions(self):
        self.skipTest("requests do not attend to each other: there are no decoder_attentions")

    test_attention_outputs = test_retain_grad_hidden_states_attentions

    def without_wavelengths(self):
        self.skipTest("it gives the main input alone, without wavelengths; tests/models compares eager and sdpa")


for name in dir(Shared):
    if "eager_matches_sdpa_inference_" in name:
        setattr(PublishedTest, name, PublishedTest.without_wavelengths)


class EvidenceTest(Shared, unittest.TestCase):
    tester, has_attentions, test_all_params_have_gradient = Evidence, False, False

    def test_model_get_set_embeddings(self):
        self.skipTest("evidence is no vocabulary")

    def test_model_outputs_equivalence(self):
        self.skipTest("it subtracts outputs, one of which, rung_seen, is of bool")

    def test_hidden_states_output(self):
        self.skipTest("the small networks have no hidden states to give")

    test_retain_grad_hidden_states_attentions = test_hidden_states_output
'''


def main() -> int:
    parser = argparse.ArgumentParser(prog="shared_tests.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests whose names match")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spectrafm-") as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        source = f"transformers=={transformers.__version__}"
        subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", name, source], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", "parameterized"], check=True)
        (archive,) = folder.glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        tests = folder / archive.name.removesuffix(".tar.gz") / "tests"
        for path, text in STUBS.items():
            (tests / path).parent.mkdir(parents=True, exist_ok=True)
            (tests / path).write_text(text)
            (tests / path).with_name("__init__.py").touch()
        (tests / "__init__.py").touch()
        (tests / "test_spectrafm.py").write_text(TESTS)
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/test_spectrafm.py", "-q", "-p", "no:cacheprovider", "--tb=no"]
        command += ["-c", "/dev/null", "--rootdir", ".", f"--junitxml={report}", "-o", "junit_family=xunit2"]
        command += ["-k", arguments.k] if arguments.k else []
        places = [str(folder / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, cwd=tests.parent, env=environment,
                             capture_output=True, text=True)  # fmt: skip
        if not report.is_file():
            print(run.stdout[-2000:], run.stderr[-2000:], file=sys.stderr)
            return 2
        return tell(ElementTree.parse(report))


def tell(report: Any) -> int:
    """Print the table; 1 if anything failed."""
    kinds: Counter[tuple[str, str]] = Counter()
    failed: list[str] = []
    skipped: Counter[str] = Counter()
    for case in report.iter("testcase"):
        where = case.get("classname", "").rpartition(".")[2]
        kind = next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        kinds[where, kind] += 1
        outcome = case.find(kind)
        text = " ".join((outcome.get("message") or "").split()) if outcome is not None else ""
        if kind == "skipped":
            skipped[re.sub(r"\d+", "N", text)[:150]] += 1
        elif kind != "passed":
            failed.append(f"{where}.{case.get('name')}: {text[:200]}")
    for (where, kind), number in sorted(kinds.items()):
        print(f"{where:15} {kind:8} {number}")
    print(textwrap.indent("\n".join(f"{number:4} {text}" for text, number in skipped.most_common()), "  skipped: "))
    print("\n".join(f"FAILED {line}" for line in failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
