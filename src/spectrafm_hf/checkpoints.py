# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: those that come with the package, and how to save and load one as a whole."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from . import auto  # noqa: F401  # whoever loads a checkpoint may use the Auto classes, too
from .files import RESOURCES, ask_twice, one_line, replace_folder, restore_folder, temporary_name
from .models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer


_BUNDLED = RESOURCES / "checkpoints"
#: What labels are asked of where no other is named.
BASE_CHECKPOINT = "spectrafm-base"
#: Earlier names of checkpoints, and the checkpoints to use instead.
REPLACED = {
    **dict.fromkeys(
        ("spectrafm-apogee", "spectrafm-base-synthetic", "spectrafm-gaia-xp", "spectrafm-gaia-xp-small"),
        BASE_CHECKPOINT,
    ),
    "emulator-survey": "emulator-optical",
}


def bundled_names(model_type: str | None = None) -> list[str]:
    """Names of the checkpoints that come with the package: all, or those whose config has this `model_type`."""
    types = {path.parent.name: json.loads(path.read_bytes())["model_type"] for path in _BUNDLED.glob("*/config.json")}
    return sorted(name for name, found in types.items() if model_type in (None, found))


def bundled(name: str) -> str:
    """
    Folder of a checkpoint that comes with the package, for any `from_pretrained` and for `pipeline`.

    Parameters
    ----------
    name : str
        One of [`bundled_names`], or an earlier name of one (`REPLACED`), with a warning.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name in REPLACED:
        warnings.warn(f"{name} was replaced by {REPLACED[name]}, which is loaded instead", FutureWarning, stacklevel=2)
        name = REPLACED[name]
    if name not in bundled_names():
        raise ValueError(f"name: expected one of the bundled checkpoints {bundled_names()}, got {name!r}")
    return str(_BUNDLED / name)


def demand_evidence(tokenizer: SpectraFMTokenizer, purpose: str) -> None:
    """`ValueError` for a checkpoint whose tokens are fluxes, where evidence is needed."""
    if tokenizer.basis is None:
        raise ValueError(
            f"model: expected a checkpoint on evidence to {purpose}, such as {BASE_CHECKPOINT}, got one whose tokens "
            "are fluxes"
        )


def save_checkpoint(model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, folder: str | os.PathLike) -> None:
    """
    Write a model, its tokenizer and the code of both (for `trust_remote_code=True`) into one folder.

    The folder appears as a whole or not at all. Saving the same again gives the same bytes. Where `folder` holds a
    checkpoint already, that one is replaced; what else lies there, such as its card, stays. A run that is killed in
    between leaves the old one under the hidden name `.NAME.old` beside it, from where the next one takes it back.

    Parameters
    ----------
    model, tokenizer
        Both of one vocabulary.
    folder : path
        New, empty, or a checkpoint of SpectraFM.

    Raises
    ------
    ValueError
        If the tokenizer does not fit the model, or `folder` is a file or holds something else.
    """
    _check_fit(model.config, tokenizer)
    # The Trainer sets it on every config; this model has no cache, and loading a config drops it.
    model.config.__dict__.pop("use_cache", None)
    folder = Path(folder).resolve()  # what a link leads to, not the link, is replaced
    restore_folder(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ValueError(f"folder: expected a new or empty folder, or a checkpoint to replace, got {str(folder)!r}")
    new = temporary_name(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        if folder.is_dir():
            shutil.copytree(folder, new, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
        with _quiet():
            model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        replace_folder(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_checkpoint(
    name_or_path: str | os.PathLike, revision: str = "main"
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer]:
    """
    Load a model and its tokenizer, and make sure that both are whole and fit each other.

    `from_pretrained` fills weights that a file lacks with random numbers, and warns; here that is an error. No code
    of the checkpoint is run.

    Parameters
    ----------
    name_or_path : str or path
        A bundled checkpoint, a folder, or a repository of the hub (`owner/name`), looked for in this order.
    revision : str
        Branch, tag or commit, for a repository of the hub.

    Returns
    -------
    model : SpectraFMForPrediction
        In eval mode, on the CPU.
    tokenizer : SpectraFMTokenizer

    Raises
    ------
    ValueError
        If there is no such checkpoint, it is not one of SpectraFM, its weights are truncated, missing, superfluous,
        not finite or of the wrong shape, or the tokenizer does not fit the model.
    OSError
        If a file is missing, cannot be read or cannot be had from the hub.
    """
    name = os.fspath(name_or_path)
    names = bundled_names("spectrafm")
    if name in names or REPLACED.get(name) in names:
        where = bundled(name)
    elif os.path.isdir(name) or (isinstance(name_or_path, str) and name.count("/") == 1 and not name.startswith(".")):
        where = name
    else:
        raise ValueError(
            f"checkpoint: expected one of the bundled {names}, a folder, or a hub repository owner/name, got {name!r}"
        )
    if not os.path.isdir(where):
        _drop_damaged(where)
    try:
        with _quiet():
            model, report, tokenizer = ask_twice(lambda: _load_parts(where, revision))
        _check_weights(report)
        if broken := [key for key, value in model.state_dict().items() if not value.isfinite().all()]:
            raise ValueError(f"expected finite weights, got others in {broken[0]}")
        _check_fit(model.config, tokenizer)
    except SafetensorError as error:
        cause = " ".join(str(error).split())[:200]  # it may hold names of the file, of any length
        raise ValueError(f"checkpoint {name!r}: the weight file is truncated or damaged ({cause})") from error
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"checkpoint {name!r}: {one_line(error)}") from error
    except OSError as error:
        # The first line says what is wrong; transformers adds paragraphs of advice.
        raise OSError(f"checkpoint {name!r}: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # what transformers or torch stumble over in files that hold anything
        cause = " ".join(str(error).split())
        raise ValueError(
            f"checkpoint {name!r}: expected the files of a checkpoint, got {type(error).__name__}: {cause[:500]}"
        ) from error
    return model, tokenizer


def _load_parts(where: str | os.PathLike, revision: str) -> tuple[SpectraFMForPrediction, dict, SpectraFMTokenizer]:
    """Model, what was noticed when it was loaded, and tokenizer."""
    settings, _ = SpectraFMConfig.get_config_dict(where, revision=revision)
    if (model_type := settings.get("model_type")) != SpectraFMConfig.model_type:
        raise ValueError(f"expected a config.json of model_type 'spectrafm', got {model_type!r}")
    loaded: Any = SpectraFMForPrediction.from_pretrained(
        where, revision=revision, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    return *loaded, SpectraFMTokenizer.from_pretrained(where, revision=revision)


def _drop_damaged(repository: str) -> None:
    """
    Delete what is damaged in the cache of the hub, so that it is fetched again: `huggingface_hub` looks at names alone.

    A file there is called by its SHA-256, a small one by that SHA-1 by which git knows it.
    """
    for path in Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "blobs").glob("*"):
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", path.name):
            content = path.read_bytes()
            header = b"" if len(path.name) == 64 else f"blob {len(content)}\0".encode()
            digest = hashlib.new("sha256" if not header else "sha1", header + content, usedforsecurity=False)
            if digest.hexdigest() != path.name:
                path.unlink()


def _check_weights(report: dict) -> None:
    """The weights that were read are those of the model, all of them and no others."""
    wrong_shapes = [
        f"{key} {tuple(read)} instead of {tuple(expected)}" for key, read, expected in report["mismatched_keys"]
    ]
    for what, keys in (
        ("missing", report["missing_keys"]),
        ("unexpected", report["unexpected_keys"]),
        ("of the wrong shape", wrong_shapes),
    ):
        if keys:
            first, *others = sorted(keys)
            more = f" and {len(others)} more" if others else ""
            raise ValueError(f"expected the weights that config.json describes, some are {what}: {first}{more}")


def _check_fit(config: SpectraFMConfig, tokenizer: SpectraFMTokenizer) -> None:
    """Model and tokenizer number the labels alike, and have the same kind of tokens."""
    if (got := list(tokenizer.label_names)) != (expected := list(config.label_names)):
        raise ValueError(f"tokenizer: expected label_names={expected!r} as in the model, got {got!r}")
    if (tokenizer.basis is not None) != (wanted := config.token_embedding == "basis"):
        kinds = ("one with a basis", "one without")
        expected_kind, got_kind = kinds if wanted else kinds[::-1]
        raise ValueError(f"tokenizer: expected {expected_kind}, as the model has it, got {got_kind}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables and progress bars of transformers: what is wrong with a checkpoint is raised here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
