"""Windows of long items, kept until all windows of an item are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from esm_packed.runners.state.shard import Array, Items, Rows
from esm_packed.windows import Blend, Windows


class Blends:
    """Windows of the shard being computed.

    Args:
        windows: how items are cut.
        arrays: the arrays kept for an item.
    """

    def __init__(self, windows: Windows, arrays: Sequence[Array]) -> None:
        self._windows = windows
        self._arrays = arrays
        self._blends: dict[int, Blend] = {}
        self._failures: dict[int, str] = {}

    def add(
        self, items: Items, starts: Items, lengths: Items, rows: Mapping[str, Rows], failure: str
    ) -> tuple[list[int], dict[str, Rows], dict[int, str]]:
        """Add a pack of windows.

        Args:
            items: (n,) item of each window.
            starts: (n,) first residue of each window.
            lengths: (n,) residues of each item.
            rows: by name, (n * size, columns), residues of all windows; empty if the pack failed.
            failure: why the pack failed; empty if it did not.

        Returns:
            Items that are now complete; their rows by name, NaN where a window failed; failures by item.
        """
        size, whole = self._windows.size, []
        found: dict[str, list[Rows]] = {array.name: [] for array in self._arrays}
        for place, (item, start, length) in enumerate(
            zip(items.tolist(), starts, lengths.tolist(), strict=True)
        ):
            blend = self._blends.setdefault(item, Blend(self._windows, length))
            if failure:
                self._failures[item] = failure
            here = slice(size * place, size * (place + 1))
            if blend.add(int(start), {name: values[here] for name, values in rows.items()}):
                whole.append(item)
                del self._blends[item]
                outputs = {} if item in self._failures else blend.outputs(found)
                for array in self._arrays:
                    shape = (length if array.is_ragged else 1, array.columns)
                    missing = np.full(shape, np.nan, array.dtype)
                    found[array.name].append(outputs.get(array.name, missing).reshape(shape))
        failures = {item: self._failures.pop(item) for item in whole if item in self._failures}
        with np.errstate(over="ignore"):  # overflow in FP16 gives Inf, which is checked for later
            stored = {
                array.name: np.concatenate(found[array.name]).astype(array.dtype)
                for array in self._arrays
                if whole
            }
        return whole, stored, failures
