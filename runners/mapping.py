"""The command `map`: a plot of the embeddings of an output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.errors import UsageError
from esm_packed.files import whole_or_nothing
from esm_packed.reports.map.coloring import Categories, Numbers, coloring
from esm_packed.reports.map.figure import Map
from esm_packed.reports.map.page import SUFFIXES, write_map
from esm_packed.reports.map.pca import MOST_FITTED, Components, fit
from esm_packed.reports.page import check_matplotlib
from esm_packed.runners.exporting import check_new
from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.input.fasta import accession_of, shorten
from esm_packed.runners.input.table import read_column
from esm_packed.runners.output.names import POOLED
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.system.paths import check_apart
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Advance, Console

_IDS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class MapRequest:
    """Arguments of `esm-packed map`.

    Args:
        source: the output with the embeddings.
        output: the file to create, with one of the `SUFFIXES`.
        kind, layer: as for `Selection`.
        color: a table and its column, as for `read_column`; None for a single color.
        overwrite: replace `output` if it exists.
    """

    source: Path
    output: Path
    kind: str | None = None
    layer: int | None = None
    color: tuple[Path, str] | None = None
    overwrite: bool = False


def map_file(request: MapRequest, console: Console) -> list[str]:
    """Plot the first two principal components of the embeddings of an output.

    Returns:
        Lines for the terminal.

    Raises:
        UsageError: an option is invalid, or there are too few embeddings to map.
        NotInFileError: there is no such kind or layer.
        StoreError: the source is damaged, or not an output.
        ReportError: matplotlib is not installed.
        OSError: a file cannot be read or written.
    """
    suffix = request.output.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{request.output}: unknown file type; use {', '.join(f'OUT{each}' for each in SUFFIXES)}"
        )
    check_matplotlib()
    with EmbeddingReader(request.source) as reader:
        check_new(request.output, request.source, reader, overwrite=request.overwrite)
        selection = Selection(reader, request.kind, request.layer, keep_missing=False)
        if selection.is_ragged:
            raise UsageError(
                f"--kind {selection.kind}: has no vector per sequence; choose from {', '.join(POOLED)}"
            )
        ids = list(selection.ids())
        colors: Categories | Numbers | None = None
        notes, told = [""] * len(ids), list[str]()
        if request.color is not None:
            check_apart({"--output": request.output}, [request.color[0]])
            colors, notes, told = _colors(*request.color, ids, reader, request.source)
        with console.progress("mapping", "sequence", 2 * len(ids)) as advance:
            components = fit(_sample(selection, advance))
            blocks = []
            for block in selection.blocks():
                blocks.append(components.project(block.values))
                advance(len(block.ids))
    title = _title(selection, components)
    drawn = Map(np.concatenate(blocks), components.explained, title, ids, colors)
    with whole_or_nothing(request.output, overwrite=request.overwrite) as unfinished:
        write_map(drawn, unfinished, suffix, notes)
    told.insert(0, f"{request.output}: {drawn.title}")
    if selection.num_missing:
        told.append(f"{counted(selection.num_missing, 'sequence')} failed or not computed: skipped")
    return told


def _sample(selection: Selection, advance: Advance) -> npt.NDArray[np.floating[Any]]:
    """(n, D) rows to fit components to: all, or a deterministic sample of `MOST_FITTED`."""
    number = len(selection)
    chosen = np.arange(number)
    if number > MOST_FITTED:
        chosen = np.sort(np.random.default_rng(0).choice(number, MOST_FITTED, replace=False))
    rows, start = [np.empty((0, selection.width), selection.dtype)], 0
    for block in selection.blocks():
        first, last = np.searchsorted(chosen, (start, start := start + len(block.ids)))
        rows.append(block.values[chosen[first:last] - start + len(block.ids)])
        advance(len(block.ids))
    return np.concatenate(rows)


def _title(selection: Selection, components: Components) -> str:
    model = selection.reader.attributes["model_name"]
    title = f"{model}, {selection.kind} of layer {selection.layer}, {counted(len(selection), 'protein')}"
    if components.num_fitted < len(selection):
        title += f" (components fitted to {components.num_fitted:,})"
    return title


def _colors(
    table: Path, column: str, ids: list[str], reader: EmbeddingReader, source: Path
) -> tuple[Categories | Numbers, list[str], list[str]]:
    """Colors of the sequences `ids`, their labels on a page, and notes about the table.

    Raises:
        UsageError: none of its IDs is in the file.
    """
    texts = read_column(table, column)
    unknown = dict.fromkeys(texts)
    for start in range(0, reader.num_sequences, _IDS_AT_ONCE):
        for sequence_id in reader.sequence_ids(start, start + _IDS_AT_ONCE):
            unknown.pop(sequence_id, None)
            unknown.pop(accession_of(sequence_id), None)
    told = []
    if unknown:
        told.append(
            f"{len(unknown):,} of {len(texts):,} IDs in {table} are not in {source}, such as "
            f"{shorten(next(iter(unknown)))}"
        )
    if len(unknown) == len(texts):
        raise UsageError(told[0] if told else f"{table}: no rows below the header")
    found = [texts.get(each, texts.get(accession_of(each), "")) for each in ids]
    notes = [f"{column}: {text}" if text else "" for text in found]
    return coloring(column, found), notes, told
