"""`esm_packed.embed_file`: the command `embed` from Python."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from esm_packed.config import DEFAULT_MODEL
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.output.embedding_file import EmbeddingFile
from esm_packed.runners.session import embed_files
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.watch.console import Console
from esm_packed.windows import Windows

_READ_OPTIONS = {field.name for field in fields(ReadOptions)}
_OPTIONS = {field.name for field in fields(EmbedRequest)} - {"inputs", "output", "part", "read", "command"}


def embed_file(
    fasta: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: str = DEFAULT_MODEL,
    include: str | Iterable[str] = ("mean",),
    layers: int | Iterable[int] = (-1,),
    windows: tuple[int, int] | None = None,
    progress: bool = True,
    **options: Any,
) -> EmbeddingFile:
    """Embed the proteins of FASTA files as `esm-packed embed` does, and open the output.

    The work is done in `OUTPUT.run`. If it was interrupted, the same call continues it; an existing output
    of the same run is opened.

    Args:
        fasta: a FASTA file, plain or gzip, or several.
        output: the HDF5 file to create.
        model: a name, a checkpoint file or a directory.
        include: kinds of output: mean, max, bos, per_residue, logits, logits_all, unmasked_nll and contacts.
        layers: layers to keep; negative ones count from the last.
        windows: size and overlap, in residues, of the windows in which longer proteins are computed.
        progress: show progress, on the terminal or in the notebook.
        options: other options of the command by name, such as `device="cuda:1"`, `dtype="fp16"`,
            `max_length=0`, `store_dtype="fp16"`, `overwrite=True` or `invalid="skip"`.

    Returns:
        The opened output; close it, or use it in a `with` block. Proteins that failed have rows of NaN, and
        are listed in its `missing`.

    Raises:
        TypeError: there is no such option, or a layer or `windows` has the wrong type.
        ValueError: an option has an invalid value.
        esm_packed.errors.UserError: options are incompatible, the FASTA file has an error, or the output
            cannot be created; the message says what to do.
        OSError: with `errno.ENOSPC` if the disk is, or will be, full.
    """
    if unknown := options.keys() - _OPTIONS - _READ_OPTIONS:
        possible = ", ".join(sorted(_OPTIONS | _READ_OPTIONS))
        raise TypeError(f"embed_file has no option {min(unknown)!r}; choose from {possible}")
    files = [fasta] if isinstance(fasta, (str, os.PathLike)) else list(fasta)
    for name in ("log_json", "reuse"):
        if options.get(name) is not None:
            options[name] = Path(options[name])
    read = ReadOptions(**{name: options.pop(name) for name in _READ_OPTIONS & options.keys()})
    request = EmbedRequest(
        tuple(os.fspath(file) for file in files),
        Path(output),
        model=model,
        kinds=(include,) if isinstance(include, str) else tuple(include),
        layers=tuple(map(operator.index, (layers,) if isinstance(layers, int) else layers)),
        windows=None if windows is None else _windows(windows),
        read=read,
        **options,
    )
    embed_files(request, Console(quiet=not progress))
    return EmbeddingFile(request.output)


def _windows(pair: tuple[int, int]) -> Windows:
    try:
        return Windows(*map(operator.index, pair))
    except TypeError:
        raise TypeError(f"windows must be a pair, size and overlap, not {pair!r}") from None
