"""Reuse of rows from an earlier output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.alphabet import sequence_hashes
from esm_packed.errors import UsageError
from esm_packed.outputs import kind_of, layer_of
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.plan import differences
from esm_packed.runners.state.shard import STATUS_COMPUTED, Items, Rows, StoreError

_SAME = ("model_sha256", "dtype", "store_dtype", "layout", "windows")
"""Identity entries that must be equal in two runs for the same residues to have the same rows."""


class EarlierOutput:
    """Rows of an output, looked up by sequence. Only rows with the status `computed` are used.

    Args:
        path: the output.
        identity: identity of the run that reuses it.

    Raises:
        UsageError: the file is not an output, or has a different model, precision or options; the message
            says what differs.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            self._reader = EmbeddingReader(path)
            try:
                self._check(path, identity)
                hashes = self._reader.column("sequence_hash")
                status = self._reader.column("status")
            except BaseException:
                self._reader.close()
                raise
        except StoreError as error:
            raise UsageError(f"--reuse: {error}") from error
        except OSError as error:
            raise UsageError(f"--reuse {path}: {error.strerror or error}") from error
        rows = np.flatnonzero(status == STATUS_COMPUTED)
        order = np.argsort(hashes[rows], kind="stable")
        self._rows = rows[order]
        self._hashes = hashes[self._rows]

    def _check(self, path: Path, identity: Mapping[str, Any]) -> None:
        reader, theirs = self._reader, self._reader.plan["identity"]
        if not reader.has_column("sequence_hash"):
            raise UsageError(f"--reuse {path}: made by a version that did not store sequence_hash")
        same = _SAME + ("token_budget",) * (identity["layout"] == "fixed")  # which guarantees identical bits
        differing = differences(*({name: each.get(name) for name in same} for each in (theirs, identity)))
        lacking = [
            f"{name} were {', '.join(map(str, there))}, now {', '.join(map(str, asked))}"
            for name, there, asked in (
                ("kinds", reader.kinds, identity["kinds"]),
                ("layers", reader.layers, identity["layers"]),
            )
            if not set(asked) <= set(there)
        ]
        if differing or lacking:
            reasons = [differing] * bool(differing) + lacking
            raise UsageError(f"--reuse {path}: made with other options ({'; '.join(reasons)})")

    def find(self, token_ids: Sequence[npt.NDArray[np.uint8]]) -> Items:
        """Return the (n,) row of each sequence, -1 if there is none.

        Args:
            token_ids: residues of n sequences.
        """
        if not len(self._rows) or not token_ids:
            return np.full(len(token_ids), -1)
        hashes = sequence_hashes(token_ids)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[places] == hashes, self._rows[places], -1)

    def outputs(self, rows: Items, names: Sequence[str]) -> dict[str, Rows]:
        """Return the (total, columns) rows of the named arrays for the sequences in `rows`, by name."""
        found: dict[str, Rows] = {}
        for name in names:
            kind, layer = kind_of(name), layer_of(name)
            joined = np.concatenate([self._reader.rows(row, kind, layer) for row in rows.tolist()])
            found[name] = joined.reshape(len(joined), -1)
        return found

    def close(self) -> None:
        """Close the output."""
        self._reader.close()
