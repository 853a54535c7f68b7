"""From a checkpoint of the original SpectraFM (Koblischke & Bovy 2024, arXiv 2411.04750) to one of this project."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import ArrayLike, NDArray

from spectrafm_hf.data.schema import LABEL_UNITS
from spectrafm_hf.files import temporary_name
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.models.configuration_spectrafm import PADDING_ID


#: First and last grid index, both included, of the apStar pixels that the published model knows.
PUBLISHED_PIXELS = ((246, 3273), (3585, 6079), (6344, 8334))
#: Fluxes outside became NaN when the published model was trained.
PUBLISHED_VALID_FLUX = (0.05, 1.2)
#: Standardised fluxes beyond are not read.
CLIP = 10.0

_NORM = ("_input_mean", "_input_std", "_input_standardized")
# Original parameter names -> ours, applied in this order. `in_proj_` and the embedding tables need more than a name.
_RENAMES = (
    (r"^module\.", ""),  # saved under multi-GPU training
    (r"^embedding_layer\.embeddings$", "model.embeddings.value_embedding.weight.weight"),
    (r"^embedding_layer\.bias$", "model.embeddings.value_embedding.bias.weight"),
    (r"^torch_(encoder|decoder)\.\1_transformer_block_(\d+)\.", lambda m: f"model.{m[1]}.layers.{int(m[2]) - 1}."),
    (r"^torch_decoder\.decoder_dense_(\d+)\.", lambda m: f"readout.layers.{int(m[1]) - 3}."),
    (r"^torch_decoder\.decoder_out\.", "readout.mean."),
    (r"^torch_decoder\.decoder_logvar_out\.", "readout.log_variance."),
    (r"\.bias_k$", ".extra_key"),
    (r"\.bias_v$", ".extra_value"),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.dense_([12])\.", r".mlp.fc\1."),
    (r"\.layernorm_1\.", ".attention_layer_norm."),
    (r"\.layernorm_2\.", ".mlp_layer_norm."),
)


def published_wavelengths() -> NDArray[np.float64]:
    """Wavelengths of the 7,514 pixels of the published model: Angstrom, vacuum, on the apStar grid of APOGEE."""
    index = np.concatenate([np.arange(first, last + 1) for first, last in PUBLISHED_PIXELS])
    return 10.0 ** (4.179 + 6e-6 * index)


def read_wavelengths(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """Wavelengths from a `.npy` file, the array `wavelength` of a `.npz` file, or a text file with one a line.

    Raises
    ------
    ValueError
        If the file cannot be read so.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file) as arrays:
                return np.asarray(arrays["wavelength"], dtype=np.float64)
        values = np.load(path) if path.suffix == ".npy" else np.loadtxt(path)
        return np.asarray(values, dtype=np.float64)
    except FileNotFoundError:
        raise ValueError(f"wavelengths: expected a file, found no {path}") from None
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"wavelengths: expected .npy, .npz with `wavelength`, or text, got {path}: {error}") from error


def convert_original_checkpoint(
    input_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str], wavelengths: ArrayLike | None = None
) -> None:
    """Write the checkpoint and tokenizer that answer as the original checkpoint in `input_dir` does.

    Parameters
    ----------
    input_dir : path
        Folder with `config.json`, `weights.pt` and `embed_map.npz`.
    output_dir : path
        New or empty folder; appears when all of it is written.
    wavelengths : array of shape (pixels,), optional
        Angstrom, vacuum, in the order of the checkpoint's pixels, which does not hold them. By default those of the
        published model, which has 7,514.

    Raises
    ------
    ValueError
        If the checkpoint is not of the original's form, `wavelengths` do not fit it, or `output_dir` is not empty.

    Notes
    -----
    A checkpoint with the 7,514 published pixels also gets the limits on flux (0.05 to 1.2) under which it was trained:
    they were part of its data, not of its code. Where the original attends to invalid pixels, this model masks them.
    """
    source, target = Path(input_dir), Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir: expected a new or empty folder, got {target}")
    model, tokenizer = read_original_checkpoint(source, wavelengths)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(target)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_original_checkpoint(
    input_dir: str | os.PathLike[str], wavelengths: ArrayLike | None = None
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer]:
    """Model (in eval mode) and tokenizer; parameters and errors as in `convert_original_checkpoint`."""
    source = Path(input_dir)
    settings = _read_settings(source)
    network, norm = settings["nn_config"], settings["norm_config"]
    pixels, labels, rows = _read_vocabulary(source, settings)
    ids = [*pixels, *labels]
    for field, values in norm.items():
        if field in _NORM and len(values) <= max(ids):
            raise ValueError(f"norm_config: expected {max(ids) + 1} numbers in {field}, got {len(values)}")
    center, scale, standardised = (np.asarray(norm[field], dtype=float) for field in _NORM)
    if not np.all(np.isfinite(center[ids]) & np.isfinite(scale[ids]) & (scale[ids] > 0) & (standardised[ids] == 1)):
        raise ValueError("norm_config: expected a finite mean and a positive std for all pixels and labels, got others")
    vocabulary = settings["tokenizer_config"]
    name_of = dict(zip(vocabulary["vocab_tokens"], vocabulary["vocabs"], strict=True))
    names = [name_of[i].lower() for i in labels]

    heads, ffn = network["encoder_head_num"], network["encoder_dense_num"]
    decoder_heads, decoder_ffn = network["decoder_head_num"], network["decoder_dense_num"]
    dropout = _same(network, "encoder_dropout_rate", "decoder_dropout_rate")
    fields = dict(
        hidden_size=network["embedding_dim"],
        hidden_act=_same(network, "encoder_activation", "decoder_activation", "embedding_activation"),
        encoder_attention_heads=[heads, heads // 2],
        encoder_ffn_dim=[ffn, ffn // 2],
        decoder_attention_heads=[decoder_heads, decoder_heads // 2, decoder_heads // 4],
        decoder_ffn_dim=[decoder_ffn, decoder_ffn // 2, decoder_ffn // 4],
        readout_dims=[decoder_ffn, decoder_ffn // 2, decoder_ffn // 4, decoder_ffn // 8],
        dropout=dropout,
        attention_dropout=dropout,
        label_names=names,
        label_units=[LABEL_UNITS.get(name, "") for name in names],
        label_centers=center[labels].tolist(),
        label_scales=scale[labels].tolist(),
    )
    try:
        config = SpectraFMConfig.original(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"{source}/config.json: {str(error).splitlines()[-1].strip()}") from error
    tokenizer = SpectraFMTokenizer(
        label_names=names,
        valid_flux=PUBLISHED_VALID_FLUX if len(pixels) == len(published_wavelengths()) else None,
        standardize_wavelength=_check_wavelengths(wavelengths, len(pixels)).tolist(),
        standardize_center=center[pixels].tolist(),
        standardize_scale=scale[pixels].tolist(),
        clip=CLIP,
        max_length=network["context_length"],
        sampling="random",
    )
    model = SpectraFMForPrediction(config).eval()
    _load_weights(model, _read_weights(source / "weights.pt"), rows)
    return model, tokenizer


def _missing(path: Path) -> ValueError:
    return ValueError(f"input_dir: expected config.json, weights.pt and embed_map.npz, found no {path}")


def _read_settings(source: Path) -> dict[str, Any]:
    """`config.json`, with everything that is read from it present."""
    try:
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(source / "config.json") from None
    except ValueError as error:
        raise ValueError(f"{source}/config.json: expected JSON, got {error}") from error
    layer = ("head_num", "dense_num", "dropout_rate", "activation")
    stacks = [f"{stack}_{key}" for stack in ("encoder", "decoder") for key in layer]
    expected = {
        "nn_config": ["context_length", "embedding_dim", "embedding_activation", *stacks],
        "tokenizer_config": ["vocabs", "vocab_tokens"],
        "norm_config": _NORM,
    }
    for section, keys in expected.items():
        found = settings.get(section) if isinstance(settings, dict) else None
        missing = [key for key in keys if not isinstance(found, dict) or key not in found]
        if missing:
            raise ValueError(f"{source}/config.json: expected {', '.join(missing)} in {section}, found none")
    network, vocabulary = settings["nn_config"], settings["tokenizer_config"]
    for key in (name for name in expected["nn_config"] if name.endswith(("_length", "_dim", "_num"))):
        if not (isinstance(network[key], int) and network[key] >= 1):
            raise ValueError(f"{source}/config.json: expected a whole number in nn_config.{key}, got {network[key]!r}")
    if len(vocabulary["vocabs"]) != len(vocabulary["vocab_tokens"]):
        got = f"{len(vocabulary['vocabs'])} and {len(vocabulary['vocab_tokens'])}"
        raise ValueError(f"{source}/config.json: expected as many vocabs as vocab_tokens, got {got}")
    return settings


def _same(network: dict[str, Any], *fields: str) -> Any:
    """The one value of several settings that are one setting here."""
    values = [network[field] for field in fields]
    if any(value != values[0] for value in values):
        raise ValueError(f"nn_config: expected equal {', '.join(fields)}, got {values}")
    return values[0]


def _read_vocabulary(source: Path, settings: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Ids of the pixels and of the labels, and the rows of the embedding tables that padding, flux and labels use."""
    path = source / "embed_map.npz"
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            row_of = dict(zip(arrays["keys"].tolist(), arrays["values"].tolist(), strict=True))
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz file with `keys` and `values`, got {error}") from error
    ids = settings["tokenizer_config"]["vocab_tokens"]
    if unknown := [i for i in [PADDING_ID, *ids] if i not in row_of]:
        raise ValueError(f"{path}: expected a row for every id, found none for {unknown[:5]}")
    # All pixels share one row; a label has its own.
    flux_row, _ = Counter(row_of[i] for i in ids).most_common(1)[0]
    pixels = [i for i in ids if row_of[i] == flux_row]
    labels = [i for i in ids if row_of[i] != flux_row]
    if not labels:
        raise ValueError(f"{path}: expected labels with the pixels, found none")
    return pixels, labels, [row_of[PADDING_ID], flux_row, *(row_of[i] for i in labels)]


def _check_wavelengths(wavelengths: ArrayLike | None, n_pixels: int) -> NDArray[np.float64]:
    values = published_wavelengths() if wavelengths is None else np.asarray(wavelengths, dtype=np.float64)
    if wavelengths is None and n_pixels != values.size:
        raise ValueError(
            f"wavelengths: expected those of the {n_pixels} pixels of this checkpoint, got none "
            f"(they are known only for the published model of {values.size} pixels)"
        )
    if values.shape != (n_pixels,):
        raise ValueError(f"wavelengths: expected {n_pixels}, one for each pixel, got shape {values.shape}")
    if not (np.all(np.diff(values) > 0) and values[0] >= 1_000 and values[-1] <= 300_000):
        raise ValueError(
            "wavelengths: expected increasing numbers between 1000 and 300000 Angstrom, "
            f"got {values[0]:g} first, {values[-1]:g} last, least step {np.min(np.diff(values), initial=np.inf):g}"
        )
    return values


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The parameters in `weights.pt`, which holds the state of the optimizer as well. No code in the file is run."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    except FileNotFoundError:
        raise _missing(path) from None
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: expected a whole file of weights with `model_state_dict`, got {reason}") from error
    return weights


def _load_weights(model: SpectraFMForPrediction, weights: dict[str, torch.Tensor], rows: list[int]) -> None:
    """Fill the model; every parameter has to come from the file, and everything in the file has to be used."""
    state: dict[str, torch.Tensor] = {}
    for original_name, tensor in weights.items():
        name = original_name
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{part}_proj.")] = piece
        elif "value_embedding" in name:
            if max(rows) >= len(tensor):
                raise ValueError(
                    f"weights.pt: expected {max(rows) + 1} or more rows in {original_name}, got {len(tensor)}"
                )
            state[name] = tensor[rows]
        else:
            state[name] = tensor
    expected = model.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"weights.pt: expected a parameter for {missing[0]}, found none ({len(missing)} are missing)")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"weights.pt: expected no parameter but SpectraFM's, got {unknown[0]} ({len(unknown)} such)")
    for name, parameter in expected.items():
        if state[name].shape != parameter.shape:
            got, wanted = tuple(state[name].shape), tuple(parameter.shape)
            raise ValueError(f"weights.pt: expected shape {wanted} for {name} by config.json, got {got}")
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"weights.pt: expected finite numbers in {name}, got others")
    model.load_state_dict(state)
