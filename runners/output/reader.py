"""Reading and validation of outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.errors import UserError
from esm_packed.outputs import Per, is_ragged, per_of
from esm_packed.rows import row_counts, symmetric_matrix
from esm_packed.runners.input.fasta import Modified
from esm_packed.runners.output.checked import CheckedFile
from esm_packed.runners.output.layout import (
    COLUMN_KINDS,
    COMPARISON,
    FORMAT,
    FORMAT_VERSION,
    HASH,
    PROBLEM,
    StoredComparison,
    StoredProblem,
)
from esm_packed.runners.output.names import (
    KINDS,
    PARTS,
    PER_LAYER,
    POOLED,
    STARTS,
    TOKENS_OF,
    dataset_of,
    datasets_of,
    row_shape,
)
from esm_packed.runners.output.parts import PART, DataSetType, Part, Parts
from esm_packed.runners.state.plan import plan_hash
from esm_packed.runners.state.shard import (
    STATUS_COMPUTED,
    STATUS_FAILED,
    STATUS_NOT_COMPUTED,
    STATUS_RECOMPUTED,
    Comparison,
    StoreError,
)

STATUS_LABELS = {
    STATUS_COMPUTED: "computed",
    STATUS_RECOMPUTED: "recomputed",
    STATUS_FAILED: "failed",
    STATUS_NOT_COMPUTED: "not computed",
}
MISSING = (STATUS_FAILED, STATUS_NOT_COMPUTED)
"""Statuses of sequences that have only NaN, or no rows."""
_ROWS_AT_ONCE = 1 << 20


class NotInFileError(UserError, KeyError):
    """An output has no such ID, kind or layer, or no rows for a sequence."""

    def __str__(self) -> str:  # KeyError would put it in quotes
        return self.message


class StoredDataSet(NamedTuple):
    """A dataset of an output, and its size on disk, compressed or not."""

    kind: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bytes: int


class EmbeddingReader:
    """Reads an output file.

    All content is checked first, including every part of an output in parts: whatever is read later has the
    expected type and shape, and no more rows than the size of the file allows.

    Args:
        path: the file.

    Raises:
        StoreError: the file is not a complete esm-packed output; methods also raise it if it is damaged.
        OSError: the file is missing or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._parts: dict[Per, Parts] = {}
        self._num_rows: dict[Per, int] = {}
        self._places: dict[Per, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        self._file = CheckedFile(path, "esm-packed output")
        try:
            with self._file.reading():
                self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        """Check that everything an output must have exists, with consistent types and shapes."""
        self._check_attributes()
        self._num_sequences = self._file.dataset("lengths").shape[0]
        for name, kind in COLUMN_KINDS.items():
            self._file.expect(name, kind, (self._num_sequences,))
        self._file.expect("sequence_ids", "text", (self._num_sequences,))
        if "sequence_hash" in self._file:
            self._file.expect("sequence_hash", "text", (self._num_sequences,))
            if self._file.dataset("sequence_hash").dtype != HASH:
                raise ValueError("sequence_hash has no hashes")
        for name, record in (("problems", PROBLEM), ("fp32_compare", COMPARISON)):
            if name in self._file or record is PROBLEM:
                self._file.expect_records(name, record)
        self._file.expect("plan", "text", ())
        self._plan = self._read_plan()
        self._is_in_parts = "parts" in self._attributes
        datasets = list(datasets_of(self.kinds, self.layers))
        self._hidden_size: int | None = None
        for kind, layer, name in datasets:
            if layer is not None:
                found = self._file.dataset(name, is_virtual=self._is_in_parts and is_ragged(kind))
                self._hidden_size = int(found.shape[1])
                break
        for kind, _, name in datasets:
            if kind in POOLED:
                self._file.expect(name, "f2 f4", (self._num_sequences, self._columns(kind)))
        if "unmasked_nll" in self.kinds:
            self._file.expect("unmasked_nll", "f4", (self._num_sequences,))
        for per in STARTS:
            names = {name: kind for kind, _, name in datasets if per_of(kind) == per}
            if names:
                self._check_ragged(per, names)
        self._check_sequences()

    def _check_attributes(self) -> None:
        self._attributes = self._file.attributes()
        if self._attributes.get("format") != FORMAT or "plan_hash" not in self._attributes:
            raise StoreError(f"{self._path}: HDF5, but not written by esm-packed")
        version = self._attributes.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise StoreError(f"{self._path}: written by a newer esm-packed (format_version {version})")
        if not isinstance(version, int):
            raise ValueError(f"format_version {version!r}")
        layers = self._attributes.get("layers")
        if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
            raise ValueError(f"layers {layers!r}")
        kinds = self._attributes.setdefault("kinds", ["mean"])  # earlier versions had only this kind
        if not isinstance(kinds, list) or not kinds or not all(kind in KINDS for kind in kinds):
            raise ValueError(f"kinds {kinds!r}")

    def _columns(self, kind: str) -> int:
        """Return the number of values in a row for a residue or a sequence."""
        return len(TOKENS_OF[kind]) if kind in TOKENS_OF else self._hidden_size or 0

    def _check_ragged(self, per: Per, kinds: dict[str, str]) -> None:
        """Check the rows for `per`; `kinds` maps the datasets that hold them to their kinds."""
        types, is_virtual = {}, self._is_in_parts
        num_rows = self._file.dataset(next(iter(kinds)), is_virtual=is_virtual).shape[0]
        self._num_rows[per] = num_rows
        for name, kind in kinds.items():
            shape = row_shape(kind, self._columns(kind))
            dtype = self._file.expect(name, "f2 f4", (num_rows, *shape), is_virtual=is_virtual)
            types[name] = DataSetType(dtype, shape)
            tokens = self._file.attributes(name).get("tokens", ())
            if kind in TOKENS_OF and list(tokens) != list(TOKENS_OF[kind]):
                raise ValueError(f"{name} has the columns {tokens!r}")
        if is_virtual:
            self._file.expect_records(PARTS[per], PART)
            records = self._file.dataset(PARTS[per])[:].tolist()
            parts = [Part(file.decode(), *numbers) for file, *numbers in records]
            directory, run = str(self._attributes["parts"]), str(self._attributes["plan_hash"])
            self._parts[per] = found = Parts(Path(self._path), directory, parts, run, types)
            if found.num_rows != num_rows:
                raise ValueError(f"{found.num_rows} rows in parts, not {num_rows}")

    def _check_sequences(self) -> None:
        """Check that each sequence has a known status, and that its rows exist."""
        for per in self._num_rows:
            self._file.expect(STARTS[per], "i8", (self._num_sequences,))
        for start in range(0, self._num_sequences, _ROWS_AT_ONCE):
            stop = start + _ROWS_AT_ONCE
            status = self.column("status", start, stop)
            if status.max() > max(STATUS_LABELS):
                raise ValueError(f"a status of {status.max()}")
            lengths = self.column("embedded_lengths", start, stop)
            counts = row_counts(lengths)
            for per, num_rows in self._num_rows.items():
                starts = self.column(STARTS[per], start, stop)
                is_within = (starts >= 0) & (lengths >= 0) & (starts <= num_rows - counts[per])
                if not np.where(status == STATUS_NOT_COMPUTED, starts == -1, is_within).all():
                    raise ValueError(f"{STARTS[per]} refers to rows that do not exist")

    def _read_plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(self._file.dataset("plan").asstr()[()])
        if (
            plan_hash(plan["identity"]) != self._attributes["plan_hash"]
            or not isinstance(plan["identity"], dict)
            or not isinstance(plan["input_names"], list)
            or not all(isinstance(name, str) for name in plan["input_names"])
        ):
            raise ValueError("the plan is not that of plan_hash")
        return plan

    @property
    def attributes(self) -> dict[str, Any]:
        """Root attributes, as Python values."""
        return dict(self._attributes)

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return int(self._num_sequences)

    @property
    def kinds(self) -> list[str]:
        """The kinds in the file: some of `names.KINDS`."""
        return list(self._attributes["kinds"])

    @property
    def layers(self) -> list[int]:
        """Layers kept; the mean of the last one is the dataset `embeddings`."""
        return list(self._attributes["layers"])

    @property
    def parts(self) -> list[Part]:
        """Part files that hold the ragged kinds, with rows of one of them; empty if the file holds them."""
        return next((each.parts for each in self._parts.values()), [])

    def datasets(self) -> list[StoredDataSet]:
        """Return the datasets of all kinds."""
        found = []
        for kind, layer, name in datasets_of(self.kinds, self.layers):
            parts = self._parts.get(per_of(kind))
            dataset = self._file.dataset(name, is_virtual=parts is not None)
            num_bytes = dataset.id.get_storage_size() if parts is None else parts.stored_bytes[name]
            found.append(StoredDataSet(kind, layer, name, dataset.shape, dataset.dtype, num_bytes))
        return found

    def sequence_ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the IDs of the rows [start, stop)."""
        with self._file.reading():
            names: list[str] = self._file.dataset("sequence_ids").asstr()[start:stop].tolist()
        return names

    def column(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Return a column, such as `lengths`, `status` or `sequence_hash`, for the rows [start, stop)."""
        with self._file.reading():
            values: npt.NDArray[Any] = self._file.dataset(name)[start:stop]
        return values

    def has_column(self, name: str) -> bool:
        """Whether the file has a column; earlier versions wrote no `sequence_hash`."""
        return name in self._file

    def columns(self, start: int = 0, stop: int | None = None) -> dict[str, npt.NDArray[Any]]:
        """Return the (n,) columns that describe the sequences [start, stop), by name.

        These are `lengths` and `embedded_lengths` in residues, `truncated`, `status` (a key of
        `STATUS_LABELS`), and `unmasked_nll` if the file has it.
        """
        names = ["lengths", "embedded_lengths", "truncated", "status"]
        names += ["unmasked_nll"] * ("unmasked_nll" in self.kinds)
        return {name: self.column(name, start, stop) for name in names}

    def starts(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Return the first residue row of the sequences [start, stop); -1 if a sequence was not computed."""
        return self.column("starts", start, stop)

    def changed(self, start: int = 0, stop: int | None = None) -> dict[str, npt.NDArray[np.int64]]:
        """Return how embedded sequences differ from the input: each change, in words, and the rows affected.

        Returns:
            Maps `truncated` and the label of each `Modified` flag to (n,) int64 row numbers in [start, stop).
        """
        modified = self.column("modified", start, stop)
        found = {"truncated": self.column("truncated", start, stop)}
        found |= {flag.label: (modified & flag.value) != 0 for flag in Modified}
        return {change: start + np.flatnonzero(is_changed) for change, is_changed in found.items()}

    def values(
        self, kind: str, layer: int | None = None, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.floating[Any]]:
        """Return rows [start, stop) of a kind, each for one sequence, residue or pair of residues.

        Args:
            kind: one of `kinds`.
            layer: one of `layers`; None selects the last one. Must be None for kinds without layers.
            start, stop: as in a slice.

        Returns:
            (n, hidden_size), (n, tokens) for logits, or (n,) for `unmasked_nll` and `contacts`.

        Raises:
            NotInFileError: the file has no such kind or layer.
        """
        if kind not in self.kinds:
            raise NotInFileError(f"{self._path}: no kind {kind!r}; it has {', '.join(self.kinds)}")
        if layer is not None and kind not in PER_LAYER:
            raise NotInFileError(f"{self._path}: {kind} has no layers; omit layer")
        if layer is not None and layer not in self.layers:
            listed = ", ".join(map(str, self.layers))
            raise NotInFileError(f"{self._path}: no layer {layer}; it has {listed}")
        name = dataset_of(kind, layer, self.layers)
        with self._file.reading():
            if parts := self._parts.get(per_of(kind)):
                start, stop, _ = slice(start, stop).indices(parts.num_rows)
                return parts.rows(name, start, stop)
            rows: npt.NDArray[np.floating[Any]] = self._file.dataset(name)[start:stop]
        return rows

    def value(self, sequence: int, kind: str, layer: int | None = None) -> npt.NDArray[np.floating[Any]]:
        """Return the values of one sequence.

        The first access to a ragged kind reads the row positions of all sequences, 16 bytes each.

        Args:
            sequence: 0 <= sequence < num_sequences.
            kind, layer: as in `values`.

        Returns:
            (hidden_size,), a scalar for `unmasked_nll`, (embedded_length, columns) for a kind with a row per
            residue, or a symmetric (embedded_length, embedded_length) for `contacts`; NaN if the sequence
            failed or was not computed.

        Raises:
            NotInFileError: the file has no such kind or layer.
        """
        rows = self.rows(sequence, kind, layer)
        if per_of(kind) == "pair":
            return symmetric_matrix(rows)
        if is_ragged(kind):
            return rows
        row: npt.NDArray[np.floating[Any]] = rows[0]
        return row

    def rows(self, sequence: int, kind: str, layer: int | None = None) -> npt.NDArray[np.floating[Any]]:
        """Return the rows of one sequence, as in `values`; arguments and errors as in `value`."""
        if not is_ragged(kind):
            return self.values(kind, layer, sequence, sequence + 1)
        start, number = (int(each[sequence]) for each in self._rows_of_sequences(per_of(kind)))
        if start < 0:
            empty = self.values(kind, layer, 0, 0)
            return np.full((number, *empty.shape[1:]), np.nan, empty.dtype)
        return self.values(kind, layer, start, start + number)

    def has_rows(self, sequence: int, kind: str) -> bool:
        """Whether a sequence has rows in the datasets of a ragged kind."""
        return bool(self._rows_of_sequences(per_of(kind))[0][sequence] >= 0)

    def _rows_of_sequences(self, per: Per) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the first row (-1 if there are none) and the number of rows of every sequence."""
        if per not in self._places:
            counts = row_counts(self.column("embedded_lengths"))[per]
            self._places[per] = self.column(STARTS[per]), counts
        return self._places[per]

    def missing(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Return the row numbers of the sequences in [start, stop) that failed or were not computed."""
        found: npt.NDArray[np.int64] = np.flatnonzero(np.isin(self.column("status", start, stop), MISSING))
        return start + found

    def embeddings(
        self, layer: int | None = None, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.floating[Any]]:
        """Return (stop - start, hidden_size) mean embeddings of a layer (by default, the last one kept)."""
        return self.values("mean", layer, start, stop)

    @property
    def hidden_size(self) -> int | None:
        """Number of columns of the embeddings; None if there are no embeddings."""
        return self._hidden_size

    @property
    def plan(self) -> dict[str, Any]:
        """What defines the run (`identity`) and the names of its input files (`input_names`)."""
        return self._plan

    @property
    def num_problems(self) -> int:
        """Number of records left out and rows that failed."""
        return len(self._file.dataset("problems"))

    def problems(self, start: int = 0, stop: int | None = None) -> list[StoredProblem]:
        """Return records left out and rows that failed, with reasons; all, or those in [start, stop)."""
        with self._file.reading():
            return [
                StoredProblem(sequence_id.decode(), file.decode(), int(line), reason.decode())
                for sequence_id, file, line, reason in self._file.dataset("problems")[start:stop].tolist()
            ]

    def comparisons(self) -> list[StoredComparison]:
        """Return the sampled sequences and how they compare with FP32."""
        if "fp32_compare" not in self._file:
            return []
        with self._file.reading():
            return [
                StoredComparison(sequence_id.decode(), Comparison(*values))
                for sequence_id, *values in self._file.dataset("fp32_compare")[:].tolist()
            ]

    def close(self) -> None:
        """Close the file and its parts."""
        for parts in self._parts.values():
            parts.close()
        self._file.close()

    def __enter__(self) -> EmbeddingReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
