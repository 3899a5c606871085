"""The command `extract`: files like those of esm-extract, created from the output of a run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm_packed.checkpoints import Checkpoint
from esm_packed.errors import UsageError
from esm_packed.files import sync
from esm_packed.outputs import KINDS, Per
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.input.index import STDIN, FastaIndex
from esm_packed.runners.output import pt_files
from esm_packed.runners.output.pt_index import INDEX_NAME, listed_identity, num_failed, write_index
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.session import embed_files
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import differences, plan_hash
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.summary import Summary
from esm_packed.runners.system.paths import check_apart, resolved
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console, byte_size, duration

_OUTPUT_NAME = ".esm-packed.h5"
"""Name of the hidden output, in the directory of the files created from it."""
_RECORDS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class ExtractRequest:
    """Arguments of `esm-packed extract`; esm-extract's options keep their names.

    Args:
        model: a model, as for `ESM2.from_pretrained`.
        fasta: FASTA file, `-` for standard input.
        output_dir: directory for the files, created if needed.
        include: kinds of output, from `pt_files.KINDS`.
        repr_layers: layers; negative ones count from the last.
        toks_per_batch: tokens computed together, BOS and EOS included.
        truncation_seq_length: residues kept of each sequence; 0 keeps all.
        device: auto, cpu, cuda or cuda:INDEX.
        dtype: precision mode.
        threads: CPU threads; None for torch's default.
        read: rules for reading the input; labels are whole header lines.
        overwrite: replace existing files in the directory, or an unfinished run with other options.
        command: the command line; empty for none.
    """

    model: str
    fasta: str
    output_dir: Path
    include: tuple[str, ...]
    repr_layers: tuple[int, ...]
    toks_per_batch: int
    truncation_seq_length: int
    device: str
    dtype: str
    threads: int | None
    read: ReadOptions
    overwrite: bool = False
    command: str = ""

    def run(self, output: Path) -> EmbedRequest:
        """The run whose output the files are created from."""
        return EmbedRequest(
            inputs=(self.fasta,),
            output=output,
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            kinds=tuple(pt_files.KINDS[name] for name in self.include),
            layers=self.repr_layers,
            max_length=self.truncation_seq_length,
            token_budget=self.toks_per_batch,
            read=self.read,
            threads=self.threads,
            parts=True if any(KINDS[pt_files.KINDS[name]].is_ragged for name in self.include) else None,
            overwrite=self.overwrite,
            command=self.command,
        )


@dataclass(frozen=True)
class Extracted:
    """The result of extracting.

    Args:
        directory: where the files are.
        summary: summary of the run.
        already_complete: all files already existed.
        num_failed: sequences whose values are NaN.
    """

    directory: Path
    summary: Summary
    already_complete: bool
    num_failed: int

    @property
    def index_path(self) -> Path:
        """The list of the files."""
        return self.directory / INDEX_NAME

    def lines(self) -> list[str]:
        """Lines to print at the end."""
        summary = self.summary
        files = f"{self.directory} ({counted(summary.num_sequences, '.pt file')}, listed in {INDEX_NAME})"
        if self.already_complete:
            return [f"already complete: {files}"]
        counts = {
            "left out": summary.num_left_out,
            "truncated": summary.num_truncated,
            "recomputed in fp32": summary.num_recomputed,
            "failed": self.num_failed,
        }
        exceptions = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        return [
            f"output     {files}",
            f"sequences  {summary.num_sequences:,} ({counted(summary.num_residues, 'residue')}){exceptions}",
            f"model      {summary.model_name} in {summary.dtype}"
            + f" on {summary.device}" * bool(summary.device),
            f"time       {duration(summary.seconds)}",
        ]


def extract_file(request: ExtractRequest, console: Console) -> Extracted:
    """Write a `.pt` file for each sequence of `request.fasta`, and `index.tsv`, which lists them.

    A run embeds them into a hidden output in the directory; the files are created from it, and it is removed.
    Repeating a request continues it if it was interrupted.

    Raises:
        UsageError: as for `embed_files`; or the directory holds files that do not belong to this request.
        InputError, CheckpointError, OSError: as for `embed_files`.
    """
    directory = resolved(request.output_dir)
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    files = _Files(request, directory, console)
    try:
        summary = embed_files(request.run(files.output), console, files)
    except BaseException as error:
        if is_new:
            with suppress(OSError):  # it holds a run that can be continued
                directory.rmdir()
        if isinstance(error, UsageError) and error.message.startswith("--layers"):
            raise UsageError(error.message.replace("--layers", "--repr_layers", 1)) from error
        raise
    return Extracted(request.output_dir, summary, files.were_complete, num_failed(directory))


class _Files:
    """The files of one request, created from a hidden output while its run is held.

    Files listed in `index.tsv` are ours if it belongs to this run; any other file with such a name is the
    user's.

    Args:
        request: the request.
        directory: where the files go.
        console: shows the progress.

    Attributes:
        output: the hidden output.
        were_complete: all files already existed.
    """

    def __init__(self, request: ExtractRequest, directory: Path, console: Console) -> None:
        self.output = directory / _OUTPUT_NAME
        self.were_complete = False
        self._request = request
        self._directory = directory
        self._console = console
        self._scratch = RunDirectory(self.output).scratch_path
        self._identity: Mapping[str, Any] = {}

    def is_complete(self, index: FastaIndex, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> bool:
        """Whether all files exist; if not, check that they can be created.

        Raises:
            UsageError: there are other files in their place, which may not be replaced.
            OSError: ENOSPC, if they would not fit.
        """
        self._identity = identity
        self._read = [name for name in (self._request.fasta,) if name != STDIN] + checkpoint.files()
        self._names = pt_files.FileNames(
            _batches(index.sequence_ids, index.num_records), folds_case=pt_files.folds_case(self._scratch)
        )
        if self._is_listed():
            paths = self._paths(index.sequence_ids, index.num_records)
            self.were_complete = not self.output.exists() and all(map(pt_files.is_whole, paths))
            return self.were_complete
        listed = listed_identity(self._directory)
        if listed is not None and not self._request.overwrite:
            raise UsageError(
                f"{self._directory}: contains files made from other input or options "
                f"({differences(listed, identity)}); use --overwrite to replace {INDEX_NAME} and files of "
                "the same names"
            )
        for _ in self._others(index.sequence_ids, index.num_records):
            pass
        self._check_space(index, checkpoint)
        return False

    def _is_listed(self) -> bool:
        listed = listed_identity(self._directory)
        return listed is not None and plan_hash(listed) == plan_hash(self._identity)

    def _paths(self, labels: Callable[[int, int], list[str]], number: int) -> Iterator[Path]:
        for batch in _batches(labels, number):
            yield from (self._directory / self._names.of(label) for label in batch)

    def _others(self, labels: Callable[[int, int], list[str]], number: int) -> Iterator[Path]:
        """Existing files in the place of ours that may be replaced.

        Raises:
            UsageError: one of them may not be replaced.
        """
        for path in (self._directory / INDEX_NAME, *self._paths(labels, number)):
            if os.path.lexists(path):
                check_apart({"the file": path}, self._read)
                if not self._request.overwrite:
                    raise UsageError(
                        f"{path}: already exists, not made from this input with these options; move it, or "
                        "use --overwrite to replace it"
                    )
                yield path

    def _check_space(self, index: FastaIndex, checkpoint: Checkpoint) -> None:
        request = self._request
        most = request.truncation_seq_length or np.iinfo(np.int32).max
        rows: dict[Per, int] = {"sequence": index.num_records, "residue": 0, "pair": 0}
        for start in range(0, index.num_records, _RECORDS_AT_ONCE):
            lengths = np.minimum(index.lengths[start : start + _RECORDS_AT_ONCE], most).astype(np.int64)
            rows["residue"] += int(lengths.sum())
            rows["pair"] += int((lengths**2).sum())  # of whole matrices
        run = request.run(self.output)
        width = len(run.resolved_layers(checkpoint.config)) * checkpoint.config.hidden_size
        needed = pt_files.FILE_OVERHEAD_BYTES * index.num_records
        for kind in map(KINDS.__getitem__, set(run.kinds)):
            needed += 4 * rows[kind.per] * (width if kind.has_layers else kind.columns)
        free = shutil.disk_usage(self._directory).free
        sizes = f"the .pt files take about {byte_size(needed)}, in addition to the output they are made from"
        if needed > free:
            raise OSError(errno.ENOSPC, f"{sizes}; {byte_size(free)} free in {self._directory}")
        self._console.note(sizes)

    def make(self) -> None:
        """Write the files that do not exist, and remove the output that they are created from.

        Raises:
            UsageError: another file has appeared in the place of one of them.
            OSError: the disk is full or fails.
        """
        with EmbeddingReader(self.output) as reader:
            number = reader.num_sequences
            if not self._is_listed():
                for path in self._others(reader.sequence_ids, number):
                    path.unlink()
                write_index(self._directory, self._scratch, self._identity, reader, self._names)
            with self._console.progress("writing", "file", number) as advance:
                labels = (label for batch in _batches(reader.sequence_ids, number) for label in batch)
                for row, label in enumerate(labels):
                    path = self._directory / self._names.of(label)
                    if not pt_files.is_whole(path):
                        content = pt_files.content_of(reader, row, label, self._request.include)
                        pt_files.write_pt(path, content, self._scratch)
                    advance(1)
            for path in self._paths(reader.sequence_ids, number):
                sync(path)
        with suppress(OSError):  # not every file system can flush a directory
            sync(self._directory)
        self.output.unlink()


def _batches(labels: Callable[[int, int], list[str]], number: int) -> Iterator[list[str]]:
    """Labels of all records, in batches."""
    for start in range(0, number, _RECORDS_AT_ONCE):
        yield labels(start, min(start + _RECORDS_AT_ONCE, number))
