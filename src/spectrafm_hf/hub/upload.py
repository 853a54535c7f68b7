# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""To the Hugging Face hub: a checkpoint or a data set with its card, in one commit, once both are found to be true.

What was pushed is pulled by the name of its repository, with `load_checkpoint`, `from_pretrained` or
`datasets.load_dataset`. Where (`HF_ENDPOINT`) and with which token (`HF_TOKEN`, or `hf auth login`) is up to
`huggingface_hub`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi

# Of whichever HTTP library the installed one is built on.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ..checkpoints import bundled, bundled_names, load_checkpoint, save_checkpoint
from ..data.building import settings_of, split_sizes
from ..free_text import free_part, free_texts, keep_free_texts
from .cards import (
    checksums,
    checksums_of_card,
    eval_results,
    group_evaluations,
    name_checksums,
    read_evaluations,
    usage,
    with_owner,
)


logger = logging.getLogger(__name__)

#: Of a checkpoint folder, beside settings, code, `.eval_results` and the pictures of its card: the rest may be private.
CHECKPOINT_FILES = (
    "model.safetensors",
    "basis.safetensors",
    "training_range.json",
    "recipe.yaml",
    "evaluation.json",
    "README.md",
    "LICENSE",
)
#: The same of a data set.
DATASET_FILES = ("data/[!.]*.parquet", "build.json", "instrument.yaml", "README.md", "LICENSE")
#: What an earlier push left and this one does not bring is deleted.
REPLACED = {"model": ".eval_results/*", "dataset": "data/*"}


@dataclass(frozen=True)
class Upload:
    """
    The content of a push.

    Parameters
    ----------
    repo_id : str
        ``owner/name``.
    repo_type : str
        model or dataset.
    files : mapping of str to path or content
        By their paths in the repository.
    card : str
        README.md, which loads from the repository where that in the folder loads from there.
    """

    repo_id: str
    repo_type: str
    files: Mapping[str, Path | bytes]
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
    What `push` takes of a checkpoint: model, tokenizer, their code, card, recipe, evaluation and its results. Base
    model and data sets that the card names without an owner get the owner of the repository.

    Parameters
    ----------
    name_or_path : str or path
        A bundled checkpoint, or a folder.
    repo_id : str
        ``owner/name`` of the model on the hub.

    Raises
    ------
    ValueError
        If the checkpoint is incomplete, or its code or settings differ from those of `save_checkpoint`; if
        its card or evaluation is missing or belongs to other weights or settings (`checksums`).
    """
    _check_repo(repo_id)
    name = os.fspath(name_or_path)
    folder = Path(bundled(name) if name in bundled_names("spectrafm") else name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"PATH: expected a folder with a checkpoint, or a bundled one, got {name}")
    model, tokenizer = load_checkpoint(folder)
    with tempfile.TemporaryDirectory() as again:
        save_checkpoint(model, tokenizer, Path(again, "saved"))
        saved = sorted(Path(again, "saved").iterdir())
        written = {path.name: path.read_bytes() for path in saved if path.suffix != ".safetensors"}
        bundles = name in bundled_names("spectrafm")  # which have no code, nor say where it would be
        for path in (path for path in saved if path.name in written and not bundles):
            there = folder / path.name
            if not there.is_file() or _content(there) != _content(path):
                raise ValueError(
                    f"checkpoint: expected {path.name} in {folder} as save_checkpoint of this version writes it, "
                    f"got {'another' if there.is_file() else 'none'}"
                )
    sums = checksums(model, tokenizer)
    if not (folder / "README.md").is_file():
        raise ValueError(
            f"card: expected README.md in {folder}, as scripts/generate/make_model_card.py writes it, got none"
        )
    card = (folder / "README.md").read_text(encoding="utf-8")
    if (stated := checksums_of_card(card)) != sums:
        raise ValueError(f"card: expected one of {name_checksums(sums)}, got one of {name_checksums(stated)}")
    title = folder.resolve().name
    groups = group_evaluations(read_evaluations(folder), sums, title)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    files: dict[str, Path | bytes] = {**_files(folder, CHECKPOINT_FILES, card), **written}
    for file, text in eval_results(groups, title, units).items():
        path = folder / ".eval_results" / file
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise ValueError(f"evaluation: expected the figures of evaluation.json in {path}, got none or others")
        files[f".eval_results/{file}"] = path
    _warn_of_others(folder, files)
    card = with_owner(card.replace(usage(title), usage(repo_id)), repo_id.partition("/")[0])
    return Upload(repo_id, "model", files, card)


def dataset_upload(folder: str | os.PathLike[str], repo_id: str) -> Upload:
    """
    What `push` takes of a data set: what `spectrafm data` writes into a folder, and the pictures of the card.

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
    stated = {split["name"]: split["num_examples"] for split in (card.data.get("dataset_info") or {}).get("splits", [])}
    if stated != (found := split_sizes(folder)):
        raise ValueError(f"card: expected the spectra of the files, {found}, in {folder / 'README.md'}, got {stated}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = _files(folder, DATASET_FILES, text)
    _warn_of_others(folder, files)
    return Upload(repo_id, "dataset", files, text.replace('load_dataset("DIR")', f'load_dataset("{repo_id}")'))


def preview(upload: Upload, *, revision: str | None = None, free_text: str | None = None) -> Upload:
    """
    What `push` would send: the same with the free texts that the card on the hub has. Nothing is changed there.

    Parameters
    ----------
    upload, revision, free_text
        As of `push`.

    Raises
    ------
    ValueError, OSError
        As `push` does for the card, and if the hub cannot be reached.
    """
    hub = HfApi(library_name="spectrafm_hf")
    with _one_line(hub, upload):
        return _with_free_texts(upload, _found(hub, upload, revision)[2], free_text)


def push(
    upload: Upload,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    free_text: str | None = None,
) -> str:
    """
    Put an upload on the hub in one commit. What a person wrote in the marked parts of the card there stays.

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
    free_text : str, optional
        ``"hub"`` or ``"folder"``: whose counts where both have one, and not the same. Default: that is an error.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    ValueError
        If `private` is set for an existing public repository; if README.md there has no marks for free text, and would
        be lost; if a free text differs and `free_text` does not say what to do.
    OSError
        If the hub cannot be reached, or refuses (`HfHubHTTPError`), as it does without a token; if somebody commits to
        the same branch meanwhile.
    """
    hub = HfApi(library_name="spectrafm_hf")
    where: dict[str, Any] = {"repo_id": upload.repo_id, "repo_type": upload.repo_type}
    with _one_line(hub, upload):
        parent, there, card = _found(hub, upload, revision)
        upload = _with_free_texts(upload, card, free_text)
        hub.create_repo(**where, private=private or None, exist_ok=True)
        if private and not hub.repo_info(**where).private:
            raise ValueError(f"REPO: expected a private repository, got {upload.repo_id}, which is there and public")
        if revision is not None:
            hub.create_branch(**where, branch=revision, exist_ok=True)
        contents = upload.contents()
        stale = [path for path in there if fnmatch(path, REPLACED[upload.repo_type]) and path not in contents]
        additions = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
        commit = hub.create_commit(
            **where,
            operations=[*additions, *map(CommitOperationDelete, stale)],
            commit_message=message or f"Upload {upload.repo_type} with spectrafm_hf",
            revision=revision,
            parent_commit=parent,  # or a text that was written since would be lost
        )
    return str(commit.commit_url)


class PushSettings(TypedDict, total=False):
    """Settings of [`push`]."""

    private: bool
    revision: str | None
    message: str | None
    free_text: str | None


def push_checkpoint(name_or_path: str | os.PathLike[str], repo_id: str, **settings: Unpack[PushSettings]) -> str:
    """`push` of `checkpoint_upload`."""
    return push(checkpoint_upload(name_or_path, repo_id), **settings)


def push_dataset(folder: str | os.PathLike[str], repo_id: str, **settings: Unpack[PushSettings]) -> str:
    """`push` of `dataset_upload`; shards of an earlier push that the folder does not hold are deleted."""
    return push(dataset_upload(folder, repo_id), **settings)


def _check_repo(repo_id: str) -> None:
    owner, _, name = repo_id.partition("/")
    if not owner or not name or "/" in name:
        raise ValueError(f"REPO: expected OWNER/NAME, got {repo_id!r}")


def _content(path: Path) -> Any:
    """Settings without the version of the library that wrote them, or a text."""
    text = path.read_text(encoding="utf-8")
    return {**json.loads(text), "transformers_version": None} if path.suffix == ".json" else text


def _files(folder: Path, patterns: Sequence[str], card: str) -> dict[str, Path]:
    """Matching files of a folder and the pictures of the card, by their paths in the repository."""
    pictures = [name for name in re.findall(r"!\[[^\]]*\]\((\w[\w./-]*)\)", card) if "/." not in name]
    found = [path for pattern in (*patterns, *pictures) for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found}


def _warn_of_others(folder: Path, files: Mapping[str, Any]) -> None:
    """Warn of other files and folders that are not pushed."""
    ours = {parent for file in files for parent in Path(file).parents}
    others = {
        file if path.is_file() else f"{file}/"
        for parent in ours
        for path in (folder / parent).iterdir()
        if (file := path.relative_to(folder).as_posix()) not in files and Path(file) not in ours
    }
    if others:
        logger.warning("%s: left out, as nothing that belongs on the hub: %s", folder, ", ".join(sorted(others)))


@contextlib.contextmanager
def _one_line(hub: HfApi, upload: Upload) -> Iterator[None]:
    """Common errors of the client in one line."""
    try:
        yield
    except HfHubHTTPError as error:
        advice = {
            401: "the hub asks for a token that may write: `hf auth login`, or HF_TOKEN",
            412: "somebody else has committed meanwhile, so nothing was: push again",
        }
        if error.response.status_code in advice:
            raise OSError(f"{upload.repo_id}: {advice[error.response.status_code]}") from error
        raise
    except HTTPError as error:
        raise OSError(f"{upload.repo_id}: the hub at {hub.endpoint} cannot be reached ({error})") from error


def _found(hub: HfApi, upload: Upload, revision: str | None) -> tuple[str | None, list[str], str]:
    """Commit, files and card that a push comes on top of; None, none and empty where there is no repository."""
    where: dict[str, Any] = {"repo_id": upload.repo_id, "repo_type": upload.repo_type}
    try:
        try:
            info: Any = hub.repo_info(**where, revision=revision)
        except RevisionNotFoundError:  # a branch that is made from the main one
            info = hub.repo_info(**where)
    except RepositoryNotFoundError:
        return None, [], ""
    files = [file.rfilename for file in info.siblings or []]
    card = ""
    if "README.md" in files:
        card = Path(hub.hf_hub_download(**where, filename="README.md", revision=info.sha)).read_text(encoding="utf-8")
    return info.sha, files, card


def _with_free_texts(upload: Upload, there: str, free_text: str | None) -> Upload:
    """The upload with the free texts of its card and of the card on the hub."""
    if free_text not in (None, "hub", "folder"):
        raise ValueError(f"free_text: expected hub or folder, got {free_text!r}")
    if not there.strip():
        return upload
    try:
        if not (marked := free_texts(there)):
            raise ValueError("expected a card with marks for free text, got another text; move it away and run again")
    except ValueError as error:
        raise ValueError(f"README.md of {upload.repo_id} on the hub: {error}") from error
    ours, theirs = ({name: text for name, text in texts.items() if text} for texts in (free_texts(upload.card), marked))
    differing = [name for name, text in ours.items() if theirs.get(name, text) != text]
    if differing and free_text is None:
        raise ValueError(
            f"free text: expected {differing[0]!r} in README.md of {upload.repo_id} on the hub as in the folder, got "
            "another text; --free-text hub or --free-text folder says which to keep"
        )
    kept = {**ours, **theirs} if free_text == "hub" else {**theirs, **ours}
    parts = "\n".join(free_part(name, text) for name, text in kept.items())
    return replace(upload, card=keep_free_texts(upload.card, parts))
