"""Outputs as PyTorch data sets."""

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
    """The sequences of an output, each as its ID and a tensor on the CPU, in the type stored.

    It can be pickled. Every process opens the file when it first needs it, so that workers of a DataLoader
    share nothing, whether forked or spawned.

    Args:
        path: what `esm-packed embed` wrote.
        kind: one of the kinds of the file. Tensors are (D,) for `mean`, `max` and `bos`, scalars for
            `unmasked_nll`, and (L, D), (L, 20), (L, 33) or (L, L) for `per_residue`, `logits`, `logits_all`
            and `contacts`, which need a `collate_fn` that pads them or a batch size of None.
        layer: one of the layers of the file; None stands for the last one.
        skip_missing: leave out sequences that failed or were not computed. Their tensors are NaN otherwise.

    Raises:
        NotInFileError: the file has no such kind or layer.
        StoreError: it is not a whole esm-packed output, or a part of it is missing or is another. Items raise
            it if the file was replaced or damaged meanwhile.
        OSError: it is not there or cannot be read.
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
            reader.values(kind, layer, 0, 0)  # there is such a kind and layer
            self._num_sequences = reader.num_sequences
            self._plan_hash = reader.attributes["plan_hash"]
            self._rows: npt.NDArray[np.int64] | None = None
            if skip_missing:
                self._rows = np.delete(np.arange(reader.num_sequences), reader.missing())

    def __len__(self) -> int:
        return self._num_sequences if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        """ID and values of a sequence.

        Raises:
            IndexError: there is no such item.
        """
        item = checked_index(index, len(self))
        row = item if self._rows is None else int(self._rows[item])
        reader = self._opened()
        value = np.asarray(reader.value(row, self.kind, self.layer))
        return reader.sequence_ids(row, row + 1)[0], torch.from_numpy(value)

    def _opened(self) -> EmbeddingReader:
        """The file, opened by this very process: HDF5 files that are open must not cross a fork."""
        if self._reader is None or self._process != os.getpid():
            reader = EmbeddingReader(self.path)
            if (reader.attributes["plan_hash"], reader.num_sequences) != (
                self._plan_hash,
                self._num_sequences,
            ):
                reader.close()
                raise StoreError(f"{self.path}: replaced by another output; create the data set again")
            self._reader, self._process = reader, os.getpid()
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}
