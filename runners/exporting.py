"""The command `export`: writes an output in a format that other programs read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from esm_packed.errors import UsageError
from esm_packed.files import whole_or_nothing
from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.output.names import POOLED
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.system.paths import check_apart, check_free
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console, byte_size

TABLES = ("npz", "parquet", "h5ad")
"""Formats with one row for each sequence."""


@dataclass(frozen=True)
class ExportRequest:
    """Arguments of `esm-packed export`.

    Args:
        source: the output to export.
        format: uniprot, pt, npz, parquet or h5ad.
        output: the file to create.
        kind, layer, keep_missing: as for `Selection`.
        overwrite: replace `output` if it exists.
    """

    source: Path
    format: str
    output: Path
    kind: str | None = None
    layer: int | None = None
    keep_missing: bool = False
    overwrite: bool = False


def export_file(request: ExportRequest, console: Console) -> list[str]:
    """Write an output in another format.

    Returns:
        Lines for the terminal.

    Raises:
        UsageError: the file already exists, or the format cannot hold the requested kind.
        NotInFileError: there is no such kind or layer.
        StoreError: the source is damaged, or not an output.
        UserError: a package that the format needs is not installed.
        OSError: a file cannot be read or written.
    """
    writer = import_module(f"esm_packed.runners.exports.{request.format}")
    with EmbeddingReader(request.source) as reader:
        check_new(request.output, request.source, reader, overwrite=request.overwrite)
        selection = Selection(reader, request.kind, request.layer, keep_missing=request.keep_missing)
        if selection.is_ragged and request.format in TABLES:
            raise UsageError(
                f"--kind {selection.kind}: {request.format} stores one vector per sequence; choose from "
                f"{', '.join(POOLED)}, or use --to uniprot or --to pt"
            )
        if not len(selection):
            raise UsageError(
                f"{request.source}: all sequences failed or were not computed; --keep-missing writes them "
                "as NaN"
            )
        with (
            console.progress("exporting", "sequence", len(selection)) as advance,
            whole_or_nothing(request.output, overwrite=request.overwrite) as unfinished,
        ):
            writer.write(selection, unfinished, advance)
        size = byte_size(request.output.stat().st_size)
        layer = "" if selection.layer is None else f" of layer {selection.layer}"
        lines = [
            f"{request.output}: {counted(len(selection), 'sequence')}, {selection.kind}{layer}, {size}",
        ]
        if selection.num_missing:
            missing = f"{counted(selection.num_missing, 'sequence')} failed or not computed"
            verb = "written as NaN" if request.keep_missing else "skipped (--keep-missing writes them as NaN)"
            lines.append(f"{missing}: {verb}")
        if not reader.attributes.get("complete", True):
            lines.append(f"{request.source} is partial; rerun the same embed command to continue")
        return lines


def check_new(output: Path, source: Path, reader: EmbeddingReader, *, overwrite: bool) -> None:
    """Check that a file `output` can be created from the output `source`, which `reader` reads.

    Raises:
        UsageError: it exists and may not be replaced, its directory is missing, or it is part of `source`.
    """
    parts = [source.parent / reader.attributes["parts"] / part.file for part in reader.parts]
    check_apart({"--output": output}, [source, *parts])
    check_free(output, overwrite=overwrite)
