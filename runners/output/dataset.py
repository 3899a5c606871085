"""Outputs as PyTorch datasets."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from esm_packed.runners.output.ids import checked_index
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.shard import StoreError


class EmbeddingDataset(Dataset[tuple[str, torch.Tensor]]):
    """Dataset of the sequences of an output: each item is an ID and a CPU tensor of the stored dtype.

    The dataset can be pickled. Each process opens the file on first use, so DataLoader workers share nothing,
    whether forked or spawned.

    Args:
        path: an output of `esm-packed embed`.
        kind: one of the kinds of the file. Tensors are (D,) for `mean`, `max` and `bos`, scalars for
            `unmasked_nll`, and (L, D), (L, 20), (L, 33) or (L, L) for `per_residue`, `logits`, `logits_all`
            and `contacts`, which need a `collate_fn` that pads them or a batch size of None.
        layer: one of the layers of the file; None selects the last one.
        skip_missing: leave out sequences that failed or were not computed; otherwise their tensors are NaN.

    Raises:
        NotInFileError: the file has no such kind or layer.
        StoreError: the file is not a complete esm-packed output, or one of its parts is missing or is not the
            expected one. Indexing raises it if the file has since been replaced or damaged.
        OSError: the file is missing or cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: str = "mean",
        layer: int | None = None,
        *,
        skip_missing: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.kind = kind
        self.layer = layer
        self._reader: EmbeddingReader | None = None
        self._process = 0
        with EmbeddingReader(path) as reader:
            reader.values(kind, layer, 0, 0)  # checks that the kind and layer exist
            self._num_sequences = reader.num_sequences
            self._plan_hash = reader.attributes["plan_hash"]
            self._rows: npt.NDArray[np.int64] | None = None
            if skip_missing:
                self._rows = np.delete(np.arange(reader.num_sequences), reader.missing())

    def __len__(self) -> int:
        return self._num_sequences if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        """Return the ID and values of a sequence.

        Raises:
            IndexError: the index is out of range.
        """
        item = checked_index(index, len(self))
        row = item if self._rows is None else int(self._rows[item])
        reader = self._opened()
        value = np.asarray(reader.value(row, self.kind, self.layer))
        return reader.sequence_ids(row, row + 1)[0], torch.from_numpy(value)

    def _opened(self) -> EmbeddingReader:
        """Return the file, opened by this process: open HDF5 files must not be used across a fork."""
        if self._reader is None or self._process != os.getpid():
            reader = EmbeddingReader(self.path)
            if (reader.attributes["plan_hash"], reader.num_sequences) != (
                self._plan_hash,
                self._num_sequences,
            ):
                reader.close()
                raise StoreError(f"{self.path}: replaced by another output; create the dataset again")
            self._reader, self._process = reader, os.getpid()
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}
