"""Files in the format of esm-extract: one `.pt` file per sequence, named after its header line."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.runners.output.names import PER_LAYER
from esm_packed.runners.output.reader import EmbeddingReader

MOST_NAME_BYTES = 200
"""Maximum size of a label in a file name: most file systems allow 255 bytes, some fewer."""
FILE_OVERHEAD_BYTES = 2048
"""Approximate size of a file in addition to its values."""

KINDS = {"per_tok": "per_residue", "mean": "mean", "bos": "bos", "contacts": "contacts"}
"""esm-extract's names for kinds of output, in the order of its files, and the names used here."""
_KEYS = {
    "per_tok": "representations",
    "mean": "mean_representations",
    "bos": "bos_representations",
    "contacts": "contacts",
}

_HASH_DIGITS = 16
_HASHED = re.compile(f".*-[0-9a-f]{{{_HASH_DIGITS}}}", re.DOTALL)


class FileNames:
    """Unique file names for labels: `LABEL.pt` where possible.

    `/`, `:`, a leading dot and control characters are percent-encoded. The names of labels over
    `MOST_NAME_BYTES`, and names that would be the same, end in a hash of the label.

    Args:
        labels: all labels, in batches.
        folds_case: whether names that differ only in case are the same.
    """

    def __init__(self, labels: Iterable[Sequence[str]], *, folds_case: bool) -> None:
        self._folds_case = folds_case
        batches = [np.array([self._key(_plain(label)) for label in batch], np.uint64) for batch in labels]
        keys, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *batches]), return_counts=True)
        self._shared: npt.NDArray[np.uint64] = keys[counts > 1]

    def of(self, label: str) -> str:
        """Return the file name for `label`."""
        name = _plain(label)
        if len(self._shared) and self._key(name) in self._shared:
            name = _hashed(label)
        return f"{name}.pt"

    def _key(self, name: str) -> int:
        """Return a number that is equal for names that are the same."""
        if self._folds_case:
            name = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        return int(_hash_of(name), 16)


def folds_case(directory: Path) -> bool:
    """Whether names that differ only in case are the same in `directory`, which must be writable."""
    probe = directory / f"case-{secrets.token_hex(8)}"
    probe.touch()
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        probe.unlink()


def _plain(label: str) -> str:
    """Return the name for a label considered on its own, without `.pt`."""
    name = _encoded(label)
    is_long = len(name.encode()) > MOST_NAME_BYTES
    return _hashed(label) if is_long or _HASHED.fullmatch(name) else name


def _hashed(label: str) -> str:
    """Return a name unique to the label: `_plain` returns no name that ends like this except from here."""
    start = _encoded(label).encode()[: MOST_NAME_BYTES - _HASH_DIGITS - 1].decode(errors="ignore")
    return f"{start}-{_hash_of(label)}"


def _encoded(label: str) -> str:
    return "".join(
        f"%{ord(character):02X}"
        if character in "/:" or unicodedata.category(character) == "Cc" or (character, place) == (".", 0)
        else character
        for place, character in enumerate(label)
    )


def _hash_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_HASH_DIGITS // 2).hexdigest()


def content_of(reader: EmbeddingReader, row: int, label: str, include: Sequence[str]) -> dict[str, Any]:
    """Return the content of the file of one sequence.

    Args:
        reader: reader of an output that has all kinds in `include`.
        row: row of the sequence.
        label: its header line.
        include: some of `KINDS`.

    Returns:
        `label`, and FP32 tensors: by layer, (L, D) in `representations`, and (D,) in `mean_representations`
        and `bos_representations`; (L, L) in `contacts`.
    """

    def tensor(kind: str, layer: int | None = None) -> torch.Tensor:
        return torch.tensor(reader.value(row, kind, layer), dtype=torch.float32)

    content: dict[str, Any] = {"label": label}
    for name, kind in KINDS.items():
        if name in include and kind in PER_LAYER:
            content[_KEYS[name]] = {layer: tensor(kind, layer) for layer in sorted(reader.layers)}
        elif name in include:
            content[_KEYS[name]] = tensor(kind)
    return content


def write_pt(path: Path, content: dict[str, Any], scratch: Path) -> None:
    """Write a file atomically, except if the machine fails, as the file is not synced to disk.

    Args:
        path: the file.
        content: what `torch.load` returns.
        scratch: a directory on the same file system.
    """
    buffer = io.BytesIO()  # torch hides why a file cannot be written
    torch.save(content, buffer)
    temporary = scratch / f"{secrets.token_hex(8)}.pt"
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether there is a complete file: one truncated by a machine failure lacks its end."""
    return os.path.lexists(path) and zipfile.is_zipfile(path)
