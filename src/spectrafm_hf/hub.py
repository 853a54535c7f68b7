# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""To the Hugging Face hub: a checkpoint or a data set with its card, in one commit, once both are found to be true.

What was pushed is pulled by the name of its repository, with `load_checkpoint`, `from_pretrained` or
`datasets.load_dataset`. Where (`HF_ENDPOINT`) and with which token (`HF_TOKEN`, or `hf auth login`) is up to
`huggingface_hub`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi

# Of whichever HTTP library the installed one is built on.
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .cards import eval_results, group_evaluations, read_evaluations, sha256, usage, weights_of_card
from .checkpoints import bundled, bundled_names, load_checkpoint
from .data.building import settings_of, split_sizes


#: Of a checkpoint folder, beside `.eval_results`.
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.py", "*.md", "*.yaml", "*.csv", "*.png", "LICENSE")
#: What an earlier push left and this one does not bring is deleted.
REPLACED = {"model": ".eval_results/*", "dataset": "data/*"}


@dataclass(frozen=True)
class Upload:
    """
    What a push brings to a repository.

    Parameters
    ----------
    repo_id : str
        ``owner/name``.
    repo_type : str
        model or dataset.
    files : mapping of str to path
        By their paths in the repository.
    card : str
        README.md, which loads from the repository where that in the folder loads from there.
    """

    repo_id: str
    repo_type: str
    files: Mapping[str, Path]
    card: str

    def contents(self) -> dict[str, Path | bytes]:
        """What is sent, by path in the repository."""
        return {**self.files, "README.md": self.card.encode()}

    def describe(self) -> str:
        """The files with their sizes in bytes, and the card."""
        sizes = {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in sorted(self.contents().items())
        }
        lines = [
            f"{size:>15,}  {path}" for path, size in {**sizes, f"total for {self.repo_id}": sum(sizes.values())}.items()
        ]
        return "\n".join([*lines, "", self.card])


def checkpoint_upload(name_or_path: str | os.PathLike[str], repo_id: str) -> Upload:
    """
    What `push` takes of a checkpoint: model, tokenizer, their code, card, recipe, evaluation and its results.

    Parameters
    ----------
    name_or_path : str or path
        A bundled checkpoint, or a folder.
    repo_id : str
        ``owner/name`` of the model on the hub.

    Raises
    ------
    ValueError
        If the checkpoint is not whole, or its card or evaluation is missing or belongs to other weights.
    """
    _check_repo(repo_id)
    name = os.fspath(name_or_path)
    folder = Path(bundled(name) if name in bundled_names("spectrafm") else name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"PATH: expected a folder with a checkpoint, or a bundled one, got {name}")
    model, _ = load_checkpoint(folder)
    for reference in json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {}).values():
        module = f"{reference.partition('.')[0]}.py"
        if not (folder / module).is_file():
            raise ValueError(f"code: expected {module} in {folder}, as save_checkpoint writes it, got none")
    checksum = sha256(folder / "model.safetensors")
    if not (folder / "README.md").is_file():
        raise ValueError(f"card: expected README.md in {folder}, as scripts/make_model_card.py writes it, got none")
    card = (folder / "README.md").read_text(encoding="utf-8")
    if (described := weights_of_card(card)) != checksum:
        raise ValueError(
            f"card: expected one of the weights {checksum[:16]}..., got one of {(described or 'none')[:16]}"
        )
    title = folder.resolve().name
    groups = group_evaluations(read_evaluations(folder), checksum, title)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    files = {path.name: path for path in folder.iterdir() if any(fnmatch(path.name, p) for p in CHECKPOINT_FILES)}
    for file, text in eval_results(groups, title, units).items():
        path = folder / ".eval_results" / file
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise ValueError(f"evaluation: expected the figures of evaluation.json in {path}, got none or others")
        files[f".eval_results/{file}"] = path
    return Upload(repo_id, "model", files, card.replace(usage(title), usage(repo_id)))


def dataset_upload(folder: str | os.PathLike[str], repo_id: str) -> Upload:
    """
    What `push` takes of a data set: all files of a folder that `spectrafm data` made.

    Parameters
    ----------
    folder : path
        A complete build.
    repo_id : str
        ``owner/name`` of the data set on the hub.

    Raises
    ------
    ValueError
        If it is no complete build, or its card counts other spectra than the files hold.
    """
    _check_repo(repo_id)
    folder = Path(folder)
    if settings_of(folder) is None or not (folder / "README.md").is_file():
        raise ValueError(f"folder: expected a built data set, got {folder}")
    card = DatasetCard.load(folder / "README.md")
    told = {split["name"]: split["num_examples"] for split in (card.data.get("dataset_info") or {}).get("splits", [])}
    if told != (found := split_sizes(folder)):
        raise ValueError(f"card: expected the spectra of the files, {found}, in {folder / 'README.md'}, got {told}")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths if not path.name.startswith(".")}
    text = (folder / "README.md").read_text(encoding="utf-8")
    return Upload(repo_id, "dataset", files, text.replace('load_dataset("DIR")', f'load_dataset("{repo_id}")'))


def push(upload: Upload, *, private: bool = False, revision: str | None = None, message: str | None = None) -> str:
    """
    Put an upload on the hub in one commit.

    Parameters
    ----------
    upload : Upload
        Of `checkpoint_upload` or `dataset_upload`.
    private : bool
        A new repository is seen by its owner alone; one that is there has to be private already.
    revision : str, optional
        Branch to commit to, made from the main one if there is none of that name. Default: the main one.
    message : str, optional
        Of the commit.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    ValueError
        If `private` is asked of a public repository that is there already.
    OSError
        If the hub cannot be reached, or refuses (`HfHubHTTPError`), as it does without a token.
    """
    hub = HfApi(library_name="spectrafm_hf")
    where: dict[str, Any] = {"repo_id": upload.repo_id, "repo_type": upload.repo_type}
    try:
        hub.create_repo(**where, private=private or None, exist_ok=True)
        if private and not hub.repo_info(**where).private:
            raise ValueError(f"REPO: expected a private repository, got {upload.repo_id}, which is there and public")
        if revision is not None:
            hub.create_branch(**where, branch=revision, exist_ok=True)
        contents = upload.contents()
        there = hub.list_repo_files(**where, revision=revision)
        stale = [path for path in there if fnmatch(path, REPLACED[upload.repo_type]) and path not in contents]
        additions = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
        commit = hub.create_commit(
            **where,
            operations=[*additions, *map(CommitOperationDelete, stale)],
            commit_message=message or f"Upload {upload.repo_type} with spectrafm_hf",
            revision=revision,
        )
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise OSError(
                f"{upload.repo_id}: the hub asks for a token that may write: `hf auth login`, or HF_TOKEN"
            ) from error
        raise
    except HTTPError as error:
        raise OSError(f"{upload.repo_id}: the hub at {hub.endpoint} cannot be reached ({error})") from error
    return str(commit.commit_url)


def push_checkpoint(
    name_or_path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """`push` of `checkpoint_upload`."""
    return push(checkpoint_upload(name_or_path, repo_id), private=private, revision=revision, message=message)


def push_dataset(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """`push` of `dataset_upload`; shards of an earlier push that the folder does not hold are deleted."""
    return push(dataset_upload(folder, repo_id), private=private, revision=revision, message=message)


def _check_repo(repo_id: str) -> None:
    owner, _, name = repo_id.partition("/")
    if not owner or not name or "/" in name:
        raise ValueError(f"REPO: expected OWNER/NAME, got {repo_id!r}")
