"""FASTA files to one HDF5 file of embeddings, on one device."""

from __future__ import annotations

import errno
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from esm_packed.attention import select_backend
from esm_packed.config import DEFAULT_MODEL, DEFAULT_TOKEN_BUDGETS
from esm_packed.model import ESM2
from esm_packed.numerics import Precision, resolve_device, resolve_precision
from esm_packed.packing import SPECIAL_TOKENS, pack, packing_efficiency, plan_packs
from esm_packed.runners.fasta import ReadOptions
from esm_packed.runners.index import STDIN, FastaIndex, build_index
from esm_packed.runners.progress import Advance, Console, byte_size, duration
from esm_packed.runners.store import (
    FORMAT_VERSION,
    STATUS_COMPUTED,
    STATUS_FAILED,
    EmbeddingReader,
    EmbeddingWriter,
    StoredProblem,
    StoreError,
    bytes_needed,
    plan_hash,
    whole_or_nothing,
)
from esm_packed.version import __version__
from esm_packed.weights import load_checkpoint

STORE_DTYPES = {"fp32": "float32", "fp16": "float16"}

MAX_BUFFER_RECORDS = 65_536
MAX_BUFFER_RESIDUES = 8_000_000
MAX_BUFFER_BYTES = 1 << 27


class UsageError(ValueError):
    """The user's mistake; `str(error)` is the full message for the terminal."""


@dataclass(frozen=True)
class EmbedRequest:
    """What `esm-packed embed` is asked to do.

    Args:
        inputs: FASTA files, `-` for standard input.
        output: the HDF5 file to make.
        model: as `ESM2.from_pretrained` takes it.
        device: auto, cpu, cuda or cuda:INDEX.
        dtype: precision mode, or None for the device's default.
        attention: attention backend, or auto.
        layers: layers to keep, negative ones counted from the last; the last one listed is `embeddings`.
        max_length: residues kept of each sequence; 0 keeps all.
        token_budget: tokens in a pack, BOS and EOS included; None for the device's default.
        read: the rules for the input.
        threads: CPU threads, or None for torch's choice.
        store_dtype: fp32 or fp16, of the stored embeddings.
        overwrite: replace an output that is already there.
    """

    inputs: tuple[str, ...]
    output: Path
    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str | None = None
    attention: str = "auto"
    layers: tuple[int, ...] = (-1,)
    max_length: int = 1022
    token_budget: int | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    threads: int | None = None
    store_dtype: str = "fp32"
    overwrite: bool = False


@dataclass
class Summary:
    """What a run did; `already_complete` when the output was there and nothing had to be done."""

    output: Path
    model: ESM2
    device: str
    token_budget: int
    num_sequences: int
    num_residues: int
    num_replaced: int
    num_duplicates: int
    num_left_out: int
    num_truncated: int = 0
    num_failed: int = 0
    embedded_residues: int = 0
    pack_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    embedding_seconds: float = 0.0
    already_complete: bool = False

    @property
    def packing_efficiency(self) -> float:
        """Tokens over (packs x budget), without the packs of one sequence longer than the budget."""
        return packing_efficiency(self.pack_tokens, self.token_budget)

    def lines(self) -> list[str]:
        """The summary for the terminal."""
        overlong = sum(tokens > self.token_budget for tokens in self.pack_tokens)
        packs = f"{len(self.pack_tokens):,} of up to {self.token_budget:,} tokens"
        if overlong:
            packs += f", {overlong:,} of them one longer sequence"
        values = {
            "sequences": f"{self.num_sequences:,}",
            "residues": f"{self.num_residues:,}",
            "truncated": f"{self.num_truncated:,}",
            "replaced": f"{self.num_replaced:,}",
            "duplicates": f"{self.num_duplicates:,}",
            "left out": f"{self.num_left_out:,}",
            "failed": f"{self.num_failed:,}",
            "packs": packs,
            "packing efficiency": f"{self.packing_efficiency:.1%}",
            "wall time": f"{duration(self.seconds)}, embedding {duration(self.embedding_seconds)}",
            "residues/s": f"{self.embedded_residues / self.embedding_seconds:,.0f}",
            "model": f"{self.model.model_name} (sha256 {self.model.model_sha256[:16]})",
            "dtype": self.model.precision,
            "device": self.device,
            "attention": self.model.attention_backend,
            "output": f"{self.output} ({byte_size(self.output.stat().st_size)})",
        }
        return [f"{name:<20}{value}" for name, value in values.items()]


def embed_files(request: EmbedRequest, console: Console) -> Summary:
    """Embed every record of `request.inputs` into `request.output`, which appears only when it is whole.

    Raises:
        UsageError: an option does not fit the model or the device, or the output cannot be where it should.
        InputError: a fault in a FASTA file.
        CheckpointError: the model is missing or damaged.
        BackendError: the attention backend cannot be used.
        OSError: with `errno.ENOSPC` when the disk is, or will be, full.
    """
    begin = time.monotonic()
    output = request.output.resolve()
    try:
        existing_plan = check_output(output, request.inputs, request.overwrite)
    except OSError as error:  # no right to look there, a name too long
        raise UsageError(f"{output}: {error.strerror}") from error
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    try:
        device = resolve_device(request.device)
        precision = resolve_precision(request.dtype, device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    select_backend(request.attention, device, precision, head_dim=64)  # fails before the input is read

    with _work_folder(output) as work_dir:
        with console.progress("reading", "B", _input_bytes(request.inputs)) as advance:
            index = build_index(request.inputs, work_dir, request.read, progress=advance)
        model, layers = _load_model(request, device, precision, console)
        token_budget = request.token_budget or DEFAULT_TOKEN_BUDGETS[device.type]
        identity = run_identity(request, index, model, layers, token_budget)
        summary = Summary(
            output=request.output,
            model=model,
            device=_device_name(device),
            token_budget=token_budget,
            num_sequences=index.num_records,
            num_residues=index.total_residues,
            num_replaced=index.num_replaced,
            num_duplicates=index.num_duplicates,
            num_left_out=len(index.problems),
        )
        if existing_plan is not None:
            if existing_plan != plan_hash(identity):
                raise UsageError(
                    f"{request.output}: exists already, made from other input or options; "
                    "--overwrite replaces it"
                )
            with EmbeddingReader(output) as reader:
                summary.num_failed = int(np.count_nonzero(reader.column("status") == STATUS_FAILED))
            summary.already_complete = True
            return summary

        needed = bytes_needed(
            index.num_records, model.config.hidden_size, len(layers), STORE_DTYPES[request.store_dtype]
        )
        check_space(output.parent, needed, console)
        console.note(
            f"embedding {index.num_records:,} sequences, {index.total_residues:,} residues, with "
            f"{model.model_name} ({model.precision}, attention {model.attention_backend}) on {summary.device}"
        )
        with whole_or_nothing(output, overwrite=request.overwrite) as temporary:
            _write_output(temporary, request, index, model, layers, identity, summary, console)
    summary.seconds = time.monotonic() - begin
    return summary


def _write_output(
    path: Path,
    request: EmbedRequest,
    index: FastaIndex,
    model: ESM2,
    layers: Sequence[int],
    identity: Mapping[str, Any],
    summary: Summary,
    console: Console,
) -> None:
    """Compute the embeddings and write the whole file; what happened is noted in `summary`."""
    left_out = [StoredProblem(left.sequence_id, left.file, left.line, left.reason) for left in index.problems]
    with EmbeddingWriter(
        path,
        num_sequences=index.num_records,
        hidden_size=model.config.hidden_size,
        layers=layers,
        store_dtype=STORE_DTYPES[request.store_dtype],
    ) as writer:
        writer.write_problems(left_out)
        begin = time.monotonic()
        total = int(_embedded_lengths(index.lengths, request.max_length).sum(dtype=np.int64))
        with console.progress("embedding", "residues", total) as advance:
            _embed_all(request, index, model, layers, writer, summary, advance)
        summary.embedding_seconds = time.monotonic() - begin
        writer.write_plan(identity, request.inputs)
        writer.write_attributes(_attributes(request, model, summary))


def check_output(output: Path, inputs: Sequence[str], overwrite: bool) -> str | None:
    """See that `output` can be made.

    Returns:
        The plan hash of the esm-packed output that is already there and may not be replaced, else None.

    Raises:
        UsageError: it cannot be made, or what is there is something else.
    """
    if output.is_dir():
        raise UsageError(f"{output}: this is a directory; name the file to make, such as embeddings.h5")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: there is no such folder to write {output.name} to")
    if not output.exists():
        return None
    if not output.is_file():
        raise UsageError(f"{output}: exists and is no regular file")
    if any(path != STDIN and Path(path).exists() and output.samefile(path) for path in inputs):
        raise UsageError(f"{output}: the output would replace an input")
    if overwrite:
        return None
    try:
        with EmbeddingReader(output) as reader:
            return str(reader.attributes["plan_hash"])
    except (StoreError, OSError):
        raise UsageError(
            f"{output}: exists already and is not a whole esm-packed output; --overwrite replaces it"
        ) from None


def _load_model(
    request: EmbedRequest, device: torch.device, precision: Precision, console: Console
) -> tuple[ESM2, list[int]]:
    with console.byte_steps() as report:
        checkpoint = load_checkpoint(request.model, progress=report)
    backend = select_backend(request.attention, device, precision, checkpoint.config.head_dim)
    try:
        model = ESM2.from_checkpoint(checkpoint, device, precision, backend)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{request.model} in {precision.name} does not fit into the memory of {device}"
        ) from error
    try:
        layers = [model.resolve_layer(layer) for layer in request.layers]
    except ValueError as error:
        raise UsageError(f"--layers: {error}") from error
    # of a layer listed twice the last mention counts: it says which one `embeddings` is
    return model, list(dict.fromkeys(reversed(layers)))[::-1]


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    try:
        folder = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".index", dir=output.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"{output.parent}: cannot be written to: {error.strerror}") from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _input_bytes(inputs: Sequence[str]) -> int | None:
    paths = [Path(path) for path in inputs]
    return sum(path.stat().st_size for path in paths) if all(path.is_file() for path in paths) else None


def run_identity(
    request: EmbedRequest, index: FastaIndex, model: ESM2, layers: Sequence[int], token_budget: int
) -> dict[str, Any]:
    """What makes two runs the same one; device, attention backend and versions may differ."""
    return {
        "format_version": FORMAT_VERSION,
        "inputs": [{"size": file.size, "sha256": file.sha256} for file in index.inputs],
        "model_sha256": model.model_sha256,
        "dtype": model.precision,
        "layers": list(layers),
        "kinds": ["mean"],
        "max_length": request.max_length,
        "token_budget": token_budget,
        "invalid": request.read.invalid,
        "duplicates": request.read.duplicates,
        "gaps": request.read.gaps,
        "full_header": request.read.full_header,
        "store_dtype": request.store_dtype,
        "reproducible": False,
    }


def check_space(folder: Path, needed: int, console: Console) -> None:
    """Say what the output takes and what is free.

    Raises:
        OSError: ENOSPC, when that is too little.
    """
    free = shutil.disk_usage(folder).free
    sizes = f"the output takes about {byte_size(needed)}; {byte_size(free)} are free in {folder}"
    if needed > free:
        raise OSError(errno.ENOSPC, sizes)
    console.note(sizes)


def cut_buffers(
    lengths: npt.NDArray[np.int32], max_records: int, max_residues: int
) -> Iterator[tuple[int, int]]:
    """Cut records into consecutive ranges [start, stop) within both limits; a longer record is alone.

    Args:
        lengths: (num_records,) residues; only one range of it is read at a time.
        max_records: most records in a range.
        max_residues: most residues in a range.
    """
    start = 0
    while start < len(lengths):
        filled = np.cumsum(lengths[start : start + max_records], dtype=np.int64)
        count = max(1, int(np.searchsorted(filled, max_residues, side="right")))
        yield start, start + count
        start += count


def _embedded_lengths(lengths: npt.NDArray[np.int32], max_length: int) -> npt.NDArray[np.int32]:
    return np.minimum(lengths, max_length) if max_length else np.asarray(lengths)


def _embed_all(
    request: EmbedRequest,
    index: FastaIndex,
    model: ESM2,
    layers: Sequence[int],
    writer: EmbeddingWriter,
    summary: Summary,
    advance: Advance,
) -> None:
    row_bytes = 4 * model.config.hidden_size * len(layers)
    max_records = max(1, min(MAX_BUFFER_RECORDS, MAX_BUFFER_BYTES // row_bytes))
    for start, stop in cut_buffers(index.lengths, max_records, MAX_BUFFER_RESIDUES):
        token_ids = index.token_ids(start, stop, request.max_length)
        sequence_ids = index.sequence_ids(start, stop)
        lengths = np.array(index.lengths[start:stop])
        embedded_lengths = _embedded_lengths(lengths, request.max_length)
        rows = {
            layer: np.empty((stop - start, model.config.hidden_size), STORE_DTYPES[request.store_dtype])
            for layer in layers
        }
        for members in plan_packs(embedded_lengths + SPECIAL_TOKENS, summary.token_budget):
            embeddings = _embed_pack(model, [token_ids[member] for member in members], layers)
            for layer in layers:
                with np.errstate(over="ignore"):  # too large for FP16 becomes Inf, which is looked for below
                    rows[layer][members] = embeddings[layer]
            residues = int(embedded_lengths[members].sum())
            summary.embedded_residues += residues
            summary.pack_tokens.append(residues + SPECIAL_TOKENS * len(members))
            advance(residues)

        status = mark_failures(rows)
        failed = np.flatnonzero(status == STATUS_FAILED)
        summary.num_failed += len(failed)
        summary.num_truncated += int(np.count_nonzero(embedded_lengths < lengths))
        writer.write_rows(
            start,
            sequence_ids=sequence_ids,
            lengths=lengths,
            embedded_lengths=embedded_lengths,
            status=status,
            embeddings=rows,
        )
        reason = f"the embedding is not finite (dtype {model.precision}, stored as {request.store_dtype})"
        writer.write_problems([StoredProblem(sequence_ids[row], "", 0, reason) for row in failed])


def _embed_pack(
    model: ESM2, token_ids: Sequence[npt.NDArray[np.uint8]], layers: Sequence[int]
) -> dict[int, npt.NDArray[np.floating[Any]]]:
    """For each layer (len(token_ids), hidden_size) mean embeddings."""
    batch = pack(token_ids).to(model.device)
    try:
        return {layer: rows.cpu().numpy() for layer, rows in model.embed_packed(batch, layers).items()}
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UsageError(
            f"out of memory on {model.device} with {batch.total_tokens:,} tokens in a pack, the longest "
            f"sequence {batch.max_seqlen - SPECIAL_TOKENS:,} residues; lower --token-budget or --max-length"
        ) from error


def mark_failures(rows: Mapping[int, npt.NDArray[np.floating[Any]]]) -> npt.NDArray[np.uint8]:
    """The status (n,) of rows the model gave; one that is not finite in some layer becomes NaN in all."""
    finite = np.logical_and.reduce([np.isfinite(layer_rows).all(axis=1) for layer_rows in rows.values()])
    for layer_rows in rows.values():
        layer_rows[~finite] = math.nan
    return np.where(finite, STATUS_COMPUTED, STATUS_FAILED).astype(np.uint8)


def _attributes(request: EmbedRequest, model: ESM2, summary: Summary) -> dict[str, str | int]:
    packing = {
        "algorithm": "first-fit decreasing",
        "token_budget": summary.token_budget,
        "packs": len(summary.pack_tokens),
        "efficiency": round(summary.packing_efficiency, 4),
    }
    versions = {
        "esm-packed": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "python": platform.python_version(),
    }
    return {
        "model_name": model.model_name,
        "model_sha256": model.model_sha256,
        "dtype": model.precision,
        "store_dtype": request.store_dtype,
        "max_length": request.max_length,
        "attention_backend": model.attention_backend,
        "device": summary.device,
        "packing": json.dumps(packing),
        "versions": json.dumps(versions),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' if threads > 1 else ''})"
