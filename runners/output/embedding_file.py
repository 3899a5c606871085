"""Outputs for use from Python: lookup by ID, slicing, iteration, and conversion to tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.fasta import shorten
from esm_packed.runners.output.ids import SequenceIds, checked_index
from esm_packed.runners.output.names import POOLED, RAGGED, TOKENS_OF, datasets_of
from esm_packed.runners.output.reader import STATUS_LABELS, EmbeddingReader, NotInFileError
from esm_packed.runners.system.packages import optional_package

Values = npt.NDArray[np.floating[Any]]

_RECORDS_AT_ONCE = 1 << 14
_ROWS_AT_ONCE = 1 << 10
_INSTALL = "pip install pandas anndata"


class EmbeddingFile:
    """An output of `esm-packed embed`, open for reading; returned by `esm_packed.open`.

        with esm_packed.open("embeddings.h5") as embeddings:
            embeddings["P69905"]                # (D,) mean of the last layer
            embeddings[:100]                    # (100, D)
            embeddings.per_residue("P69905")    # (L, D)
            embeddings.contacts("P69905")       # (L, L), if the file has contacts
            for sequence_id, embedding in embeddings: ...

    Indexing and iteration yield the means of the last layer, or the first of `kinds` if there are no means.
    Values are NaN for sequences that failed or were not computed, which `missing` lists.

    Args:
        path: the file.

    Attributes:
        path: the file.
        ids: the sequence IDs in input order, read on demand.

    Raises:
        StoreError: the file is not a complete esm-packed output, or one of its parts is missing or is not the
            expected one; methods also raise it if the file is damaged.
        OSError: the file is missing or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._reader = EmbeddingReader(path)
        self.ids = SequenceIds(self._reader, self.path)
        self._kind = "mean" if "mean" in self.kinds else self.kinds[0]

    @property
    def kinds(self) -> list[str]:
        """The kinds in the file, such as `mean` and `per_residue`."""
        return self._reader.kinds

    @property
    def layers(self) -> list[int]:
        """The layers kept, as accepted by `layer` arguments, whose default, None, selects the last one."""
        return self._reader.layers

    @property
    def attributes(self) -> dict[str, Any]:
        """Root attributes, such as the model and the precision."""
        return self._reader.attributes

    def __len__(self) -> int:
        return self._reader.num_sequences

    def __contains__(self, sequence_id: object) -> bool:
        return sequence_id in self.ids

    def __iter__(self) -> Iterator[tuple[str, Values]]:
        """Yield each ID with its values, in input order, using bounded memory."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, len(self))
            rows: Iterator[Values]
            if self._kind in RAGGED:
                rows = (self._reader.value(row, self._kind) for row in range(start, stop))
            else:
                rows = iter(self._reader.values(self._kind, None, start, stop))
            yield from zip(self._reader.sequence_ids(start, stop), rows, strict=True)

    @overload
    def __getitem__(self, key: str | int | np.integer[Any]) -> Values: ...
    @overload
    def __getitem__(self, key: slice) -> Values | list[Values]: ...
    def __getitem__(self, key: str | int | np.integer[Any] | slice) -> Values | list[Values]:
        """Return the values of a sequence, given its ID or number, or of a slice of sequences.

        Returns:
            (D,), or (n, D) for a slice; for ragged kinds (L, columns), (L, L) for contacts, or lists of them.

        Raises:
            NotInFileError: there is no such ID.
            IndexError: there is no such number.
        """
        if isinstance(key, str):
            return self._reader.value(self.ids.row(key), self._kind)
        if not isinstance(key, slice):
            return self._reader.value(checked_index(key, len(self)), self._kind)
        rows = range(len(self))[key]
        if self._kind in RAGGED:
            return [self._reader.value(row, self._kind) for row in rows]
        first = min(rows, default=0)
        block = self._reader.values(self._kind, None, first, max(rows, default=-1) + 1)
        return block if rows.step == 1 else block[np.asarray(rows, np.intp) - first]

    def mean(self, layer: int | None = None, start: int = 0, stop: int | None = None) -> Values:
        """Return (n, D) means over the residues of the sequences [start, stop), by default all of them.

        Raises:
            NotInFileError: the file has no means of this layer. The other kinds behave likewise.
        """
        return self._reader.values("mean", layer, start, stop)

    def max(self, layer: int | None = None, start: int = 0, stop: int | None = None) -> Values:
        """Return (n, D) maxima over the residues of the sequences [start, stop)."""
        return self._reader.values("max", layer, start, stop)

    def bos(self, layer: int | None = None, start: int = 0, stop: int | None = None) -> Values:
        """Return (n, D) representations of the BOS token of the sequences [start, stop)."""
        return self._reader.values("bos", layer, start, stop)

    @property
    def unmasked_nll(self) -> Values:
        """(N,) float32, mean negative log-likelihood of the residues in one unmasked pass, in nats."""
        return self._reader.values("unmasked_nll")

    def per_residue(self, sequence_id: str, layer: int | None = None) -> Values:
        """Return (L, D) representations of the residues of a sequence, in one read; NaN if it failed.

        Raises:
            NotInFileError: there is no such ID or layer, or the sequence was not computed.
        """
        return self._of_residues(sequence_id, "per_residue", layer)

    def logits(self, sequence_id: str) -> Values:
        """Return (L, 20) logits of the amino acids, or (L, 33) of all tokens if stored; see `tokens`.

        Raises:
            NotInFileError: there is no such ID, there are no logits, or the sequence was not computed.
        """
        return self._of_residues(sequence_id, self._logits_kind, None)

    @property
    def tokens(self) -> list[str]:
        """The tokens of the columns of `logits`."""
        return list(TOKENS_OF[self._logits_kind])

    @property
    def _logits_kind(self) -> str:
        return "logits_all" if "logits_all" in self.kinds else "logits"

    def contacts(self, sequence_id: str) -> Values:
        """Return symmetric (L, L) contact probabilities of the residues of a sequence; NaN if it failed.

        The diagonal is that of fair-esm's regression and has no meaning.

        Raises:
            NotInFileError: there is no such ID, there are no contacts, or the sequence was not computed.
        """
        return self._of_residues(sequence_id, "contacts", None)

    def _of_residues(self, sequence_id: str, kind: str, layer: int | None) -> Values:
        self._reader.values(kind, layer, 0, 0)  # checks that the kind and layer exist
        row = self.ids.row(sequence_id)
        if not self._reader.has_rows(row, kind):
            raise NotInFileError(
                f"{self.path}: {shorten(sequence_id)} was not computed; rerun the command that began the run"
            )
        return self._reader.value(row, kind, layer)

    def status(self, sequence_id: str) -> str:
        """Return `computed`, `recomputed` (in FP32), `failed` or `not computed`.

        Raises:
            NotInFileError: there is no such ID.
        """
        row = self.ids.row(sequence_id)
        return STATUS_LABELS[int(self._reader.column("status", row, row + 1)[0])]

    @property
    def missing(self) -> dict[str, str]:
        """The sequences whose values are NaN: maps each ID to the reason."""
        found: dict[str, str] = {}
        for start in range(0, len(self), _RECORDS_AT_ONCE):
            rows = self._reader.missing(start, start + _RECORDS_AT_ONCE)
            if len(rows):
                ids = self._reader.sequence_ids(start, start + _RECORDS_AT_ONCE)
                status = self._reader.column("status", start, start + _RECORDS_AT_ONCE)
                found |= {ids[row]: STATUS_LABELS[status[row]] for row in (rows - start).tolist()}
        for start in range(0, self._reader.num_problems if found else 0, _RECORDS_AT_ONCE):
            for problem in self._reader.problems(start, start + _RECORDS_AT_ONCE):
                if problem.sequence_id in found and not problem.file:  # others are records left out
                    label = found[problem.sequence_id]
                    is_said = problem.reason.startswith(label)
                    found[problem.sequence_id] = problem.reason if is_said else f"{label}: {problem.reason}"
        return found

    def obs(self) -> Any:
        """Return a DataFrame of all sequences, indexed by ID: lengths in residues, status, and truncation.

        `unmasked_nll` is a column if the file has it.

        Raises:
            UserError: pandas is not installed.
        """
        pandas = optional_package("pandas", _INSTALL)
        columns: dict[str, Any] = self._reader.columns()
        columns["status"] = pandas.Categorical.from_codes(columns["status"], list(STATUS_LABELS.values()))
        return pandas.DataFrame(columns, index=self._pandas_index())

    def to_pandas(self, kind: str | None = None, layer: int | None = None) -> Any:
        """Return a DataFrame of (N, D) values, indexed by ID; `obs` describes the sequences.

        Args:
            kind: `mean`, `max` or `bos`; None selects the first of these in the file.
            layer: one of `layers`.

        Raises:
            NotInFileError: the file has no such kind or layer, or the kind is ragged.
            UserError: pandas is not installed.
        """
        values = self._reader.values(self._table_kind(kind), layer)
        return optional_package("pandas", _INSTALL).DataFrame(values, index=self._pandas_index())

    def _table_kind(self, kind: str | None) -> str:
        """Return the kind to convert to a table."""
        tabular = [each for each in POOLED if each in self.kinds]
        if kind is None and tabular:
            return tabular[0]
        if kind is None or kind in RAGGED:
            raise NotInFileError(
                f"{self.path}: a table needs one of {', '.join(POOLED)}, not {kind or ', '.join(self.kinds)}"
            )
        return kind

    def _pandas_index(self) -> Any:
        return optional_package("pandas", _INSTALL).Index(self._reader.sequence_ids(), name="sequence_id")

    def to_anndata(self) -> Any:
        """Return an AnnData with the means of the last layer as X, or maxima or BOS tokens if there are none.

        `obs` is as returned by `obs()`; other layers and kinds are in `obsm`, under names such as `mean_30`;
        attributes are in `uns`.

        Raises:
            NotInFileError: all kinds are ragged.
            UserError: anndata is not installed.
        """
        anndata = optional_package("anndata", _INSTALL)
        main = self._table_kind(None)
        others = {
            f"{kind}_{layer}": self._reader.values(kind, layer)
            for kind, layer, _ in datasets_of(self.kinds, self.layers)
            if kind in POOLED and (kind, layer) != (main, self.layers[-1])
        }
        return anndata.AnnData(X=self._reader.values(main), obs=self.obs(), obsm=others, uns=self.attributes)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
