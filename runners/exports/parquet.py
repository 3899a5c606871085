"""Parquet: a row for each protein, with its values as a fixed-size list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.output.reader import STATUS_LABELS
from esm_packed.runners.system.packages import optional_package
from esm_packed.runners.watch.console import Advance

_INSTALL = "pip install pyarrow"


def write(selection: Selection, path: Path, advance: Advance) -> None:
    """Write `path`: columns `sequence_id`, those of `EmbeddingReader.columns`, and `embedding`.

    Values are float32, as few programs read Parquet's float16. The metadata `esm-packed` of the schema is
    JSON that describes the values.

    Raises:
        UserError: pyarrow is not installed.
        OSError: the disk is full or fails.
    """
    arrow = optional_package("pyarrow", _INSTALL)
    parquet = optional_package("pyarrow.parquet", _INSTALL)
    metadata = {"esm-packed": json.dumps(selection.provenance)}
    writer: Any = None
    try:
        for block in selection.blocks():
            labels = [STATUS_LABELS[code] for code in block.columns["status"].tolist()]
            values = arrow.array(np.asarray(block.values, np.float32).ravel())
            table = arrow.table(
                {
                    "sequence_id": arrow.array(block.ids, arrow.string()),
                    **block.columns,
                    "status": arrow.array(labels, arrow.string()),
                    "embedding": arrow.FixedSizeListArray.from_arrays(values, selection.width),
                },
                metadata=metadata,
            )
            if writer is None:
                writer = parquet.ParquetWriter(str(path), table.schema, use_dictionary=["status"])
            writer.write_table(table)
            advance(len(block.ids))
    finally:
        if writer is not None:
            writer.close()
