"""FASTA files written, indexed and read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokens import decode

from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import InputError, ReadOptions
from esm_packed.runners.input.index import FastaIndex


def read(
    tmp_path: Path, *contents: bytes, chunk_size: int = 1 << 22, **options: Any
) -> tuple[FastaIndex, list[tuple[str, str]]]:
    """Index files with these contents (0.fa, 1.fa ...): the index and all its records as (ID, residues)."""
    paths = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.fa"
        path.write_bytes(content)
        paths.append(str(path))
    made = build_index(paths, tmp_path / "work", ReadOptions(**options), chunk_size=chunk_size)
    return made, records_of(made)


def records_of(made: FastaIndex) -> list[tuple[str, str]]:
    sequences = made.token_ids(0, made.num_records)
    assert [len(sequence) for sequence in sequences] == made.lengths.tolist()
    assert made.total_residues == sum(made.lengths.tolist())
    return list(zip(made.sequence_ids(0, made.num_records), map(decode, sequences), strict=True))


def error_of(tmp_path: Path, *contents: bytes, **options: Any) -> str:
    """The message of the error that reading these contents ends with, the folder left out."""
    with pytest.raises(InputError) as caught:
        read(tmp_path, *contents, **options)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def hashes_by_length(
    text: bytes, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """Hashes that only tell lengths apart, so that most matches are false ones."""
    return np.stack([ends - begins] * 2, axis=1).astype(np.uint64)


def firsts_of(items: Sequence[Any]) -> list[int]:
    firsts: dict[Any, int] = {}
    return [firsts.setdefault(item, number) for number, item in enumerate(items)]


def known_of(made: FastaIndex | None) -> tuple[Any, ...]:
    """All that an index knows."""
    assert made is not None
    return (
        records_of(made),
        made.lengths.tolist(),
        made.first_same.tolist(),
        (made.num_records, made.total_residues, made.num_identical, made.num_replaced, made.num_duplicates),
        made.problems,
        made.inputs,
    )
