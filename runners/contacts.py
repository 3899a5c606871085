"""The command `contacts`: contact probabilities of one protein, as an image or as numbers."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from esm_packed.attention import select_backend
from esm_packed.checkpoints import load_checkpoint
from esm_packed.config import DEFAULT_MODEL
from esm_packed.contacts import check_contact_head
from esm_packed.errors import UsageError, UserError
from esm_packed.files import whole_or_nothing
from esm_packed.model import ESM2
from esm_packed.numerics import is_out_of_memory, resolve_device, resolve_precision
from esm_packed.reports.contact_map import SEPARATION, ContactMap, write_contact_map
from esm_packed.reports.page import PICTURES, check_matplotlib
from esm_packed.runners.compute.worker import device_name, set_threads
from esm_packed.runners.input.fasta import ReadOptions, accession_of, shorten
from esm_packed.runners.input.index import STDIN
from esm_packed.runners.input.records import read_fasta
from esm_packed.runners.system.paths import check_apart, check_free
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console

SUFFIXES = (*PICTURES, ".csv", ".npy")
_RECORDS_NAMED = 3


@dataclass(frozen=True)
class ContactsRequest:
    """Arguments of `esm-packed contacts`.

    Args:
        fasta: FASTA file, `-` for standard input.
        output: the file to create, with one of the `SUFFIXES`.
        model: a model, as for `ESM2.from_pretrained`.
        record: ID, or accession, of the protein; None if there is only one.
        device: auto, cpu, cuda or cuda:INDEX.
        dtype: precision mode; None for the device's default.
        threads: CPU threads; None for torch's default.
        read: rules for reading the input.
        overwrite: replace `output` if it exists.
    """

    fasta: str
    output: Path
    model: str = DEFAULT_MODEL
    record: str | None = None
    device: str = "auto"
    dtype: str | None = None
    threads: int | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    overwrite: bool = False


def contacts_file(request: ContactsRequest, console: Console) -> list[str]:
    """Predict the contacts of one protein, and plot or write them.

    Returns:
        Lines for the terminal.

    Raises:
        UsageError: an option is invalid, there are several proteins, or the protein does not fit into memory.
        InputError: the FASTA file has an error.
        CheckpointError: the model is missing or damaged, or has no contact head.
        ReportError: matplotlib is not installed.
        UserError: the contacts are not finite.
        OSError: the file cannot be written.
    """
    suffix = _checked_suffix(request)
    sequence_id, sequence = _record(request)
    try:
        model = _load(request, console)
        probabilities = model.predict_contacts(sequence)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"{shorten(sequence_id)}: {request.model} and {len(sequence):,} residues do not fit into the "
            f"memory of --device {request.device}"
        ) from error
    if np.isnan(probabilities).any():
        raise UserError(f"{shorten(sequence_id)}: its contacts are not finite in fp32; check the model")
    drawn = ContactMap(probabilities, f"{shorten(sequence_id)[1:-1]}, {counted(len(sequence), 'residue')}")
    with whole_or_nothing(request.output, overwrite=request.overwrite) as unfinished:
        if suffix in PICTURES:
            write_contact_map(drawn, unfinished, suffix)
        elif suffix == ".npy":
            with unfinished.open("wb") as file:
                np.save(file, probabilities)
        else:
            _write_csv(drawn, sequence, unfinished)
    return _lines(request, model, drawn)


def _checked_suffix(request: ContactsRequest) -> str:
    """The suffix of the output, checked to be one that can be written."""
    output, suffix = request.output, request.output.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{output}: unknown file type; use {', '.join(f'OUT{each}' for each in SUFFIXES)}")
    if suffix in PICTURES:
        check_matplotlib()
    check_free(output, overwrite=request.overwrite)
    check_apart({"--output": output}, [request.fasta] if request.fasta != STDIN else [])
    return suffix


def _record(request: ContactsRequest) -> tuple[str, str]:
    """ID and residues of the protein.

    Raises:
        UsageError: it is not found, or there are several.
    """
    first: list[tuple[str, str]] = []
    by_accession: list[tuple[str, str]] = []
    for sequence_id, sequence in read_fasta(request.fasta, **asdict(request.read)):
        if sequence_id == request.record:
            return sequence_id, sequence
        if request.record is not None and accession_of(sequence_id) == request.record:
            by_accession.append((sequence_id, sequence))
        if len(first) <= _RECORDS_NAMED:
            first.append((sequence_id, sequence))
        elif request.record is None:
            break
    if len(by_accession) > 1:
        whole = ", ".join(shorten(sequence_id) for sequence_id, _ in by_accession)
        raise UsageError(
            f"--record {request.record}: the accession of several proteins; choose one of {whole}"
        )
    if by_accession:
        return by_accession[0]
    if request.record is None and len(first) == 1:
        return first[0]
    listed = ", ".join(shorten(sequence_id) for sequence_id, _ in first[:_RECORDS_NAMED])
    listed += ", ..." * (len(first) > _RECORDS_NAMED)
    if request.record is None:
        raise UsageError(f"{request.fasta}: several proteins ({listed}); choose one with --record ID")
    raise UsageError(f"--record {request.record}: {request.fasta} has no such protein; it has {listed}")


def _load(request: ContactsRequest, console: Console) -> ESM2:
    set_threads(request.threads)
    try:
        device = resolve_device(request.device)
        precision = resolve_precision(request.dtype, device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with console.byte_steps() as report:
        checkpoint = load_checkpoint(request.model, progress=report)
    check_apart({"--output": request.output}, checkpoint.files())
    backend = select_backend("auto", device, precision, checkpoint.config.head_dim)
    model = ESM2.from_checkpoint(checkpoint, device, precision, backend)
    check_contact_head(model)
    return model


def _write_csv(drawn: ContactMap, sequence: str, path: Path) -> None:
    """Write a line for each pair of residues i < j, numbered from 1."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("i", "j", "residue_i", "residue_j", "probability"))
        for i, row in enumerate(drawn.probabilities):
            for j in range(i + 1, len(sequence)):
                table.writerow((i + 1, j + 1, sequence[i], sequence[j], f"{row[j]:.6g}"))


def _lines(request: ContactsRequest, model: ESM2, drawn: ContactMap) -> list[str]:
    where = f"{model.model_name} in {model.precision} on {device_name(model.device)}"
    lines = [f"{request.output}: contacts of {drawn.title}, by {where}"]
    i, j = drawn.most_probable().T
    if len(i):
        best = drawn.probabilities[i, j]
        lines.append(
            f"the {len(i):,} most probable with |i - j| >= {SEPARATION}: {best[0]:.3f} to {best[-1]:.3f}"
        )
    return lines
