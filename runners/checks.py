"""Checks before any work: incompatible options, outputs that cannot be created, disks that are too small."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from esm_packed.attention import WAITING_BACKENDS, select_backend
from esm_packed.checkpoints import Checkpoint
from esm_packed.config import DEFAULT_MAX_LENGTH
from esm_packed.contacts import no_contact_head
from esm_packed.errors import CheckpointError, UsageError
from esm_packed.numerics import resolve_device
from esm_packed.outputs import KINDS, KINDS_IN_WINDOWS, needs_contacts, needs_logits
from esm_packed.runners.compute.worker import check_threads
from esm_packed.runners.input.index import STDIN
from esm_packed.runners.output.layout import output_bytes
from esm_packed.runners.output.parts import PartError
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.output.score_description import described_at
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import differences, plan_hash
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import StoreError, shards_bytes
from esm_packed.runners.system.paths import check_apart, resolved
from esm_packed.runners.watch.console import Console, byte_size

OTHER_SUFFIXES = """
    .csv .tsv .tab .txt .json .jsonl .ndjson .yaml .yml .xml .html .md .xls .xlsx
    .npy .npz .mat .pkl .pickle .joblib .pt .pth .ckpt .bin .safetensors .onnx
    .parquet .feather .arrow .avro .orc .zarr .nc .db .sqlite .rds .rdata .h5ad .loom
    .fasta .fa .faa .fas .fna .ffn .mpfa .fastq .fq .aln .a2m .a3m .sto .pdb .cif .gff .gb .gbk
    .gz .bgz .bz2 .xz .zst .zip .tar .tgz
"""
"""Suffixes of other formats, which an output must not have, as it is HDF5."""


@dataclass(frozen=True)
class ExistingOutput:
    """An esm-packed output.

    Args:
        path: the file.
        plan_hash: plan hash of its run.
        identity: identity of its run.
        is_complete: False if `merge --partial` left rows out.
        parts: where its parts are; None if it has none.
    """

    path: Path
    plan_hash: str
    identity: Mapping[str, Any]
    is_complete: bool
    parts: str | None = None

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Check that a run of `identity` produces this output.

        Raises:
            UsageError: it does not; the message names the differences.
        """
        if self.plan_hash != plan_hash(identity):
            differing = differences(self.identity, identity)
            raise UsageError(
                f"{self.path}: already exists, made from other input or options ({differing}); "
                "use --overwrite to replace it"
            )


def check_output(output: Path, overwrite: bool) -> ExistingOutput | None:
    """Check that `output` can be created.

    Returns:
        The existing esm-packed output, if it may not simply be replaced, else None.

    Raises:
        UsageError: it cannot be created, or the existing file is something else.
        PartError: a part of the existing output is missing or belongs to another output.
    """
    try:
        return _check_output(output, overwrite)
    except OSError as error:  # no permission, or a name that is too long
        raise UsageError(f"{output}: {error.strerror}") from error


def _check_output(output: Path, overwrite: bool) -> ExistingOutput | None:
    if output.is_dir():
        raise UsageError(f"{output}: is a directory; name a file, such as embeddings.h5")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such directory to write {output.name} to")
    RunDirectory(output).check_name()
    if RunDirectory.holds(output):
        raise UsageError(f"{output.parent}: is a run directory, which the run removes; choose another")
    if not output.exists():
        return None
    if not output.is_file():
        raise UsageError(f"{output}: exists and is not a regular file")
    if overwrite:
        return None
    try:
        with EmbeddingReader(output) as reader:
            attributes = reader.attributes
            return ExistingOutput(
                output,
                str(attributes["plan_hash"]),
                reader.plan["identity"],
                attributes.get("complete") == 1,
                attributes.get("parts"),
            )
    except PartError:  # names it, and says that it can be restored
        raise
    except (StoreError, OSError):
        raise UsageError(
            f"{output}: already exists and is not a complete esm-packed output; use --overwrite to replace it"
        ) from None


def check_paths(request: EmbedRequest, read: Iterable[str | Path]) -> None:
    """Check that no written file is among the files `read`."""
    output, scoring = resolved(request.output), request.scoring
    written = {"the run directory": RunDirectory(output).path, "--output": output}
    if scoring is not None:
        written["the description of --output"] = described_at(output)
        if scoring.heat_map is not None:
            written["--heat-map"] = scoring.heat_map
    if request.log_json is not None:
        written["--log-json"] = request.log_json
    tables = [] if scoring is None or scoring.mutations is None else [scoring.mutations]
    check_apart(written, [*tables, *read])


def check_suffix(output: Path) -> None:
    """Check that an HDF5 output does not have the suffix of another format."""
    name = output
    while name.suffix.lower() in OTHER_SUFFIXES.split():
        name = name.with_suffix("")
    if name != output:
        raise UsageError(
            f"{output}: the output is HDF5, but its name is that of a {output.suffix} file; use "
            f"-o {name.with_suffix('.h5')}"
        )


def _check_outputs(request: EmbedRequest) -> None:
    """Check that the kinds of output can be combined."""
    if request.windows is not None and request.max_length != DEFAULT_MAX_LENGTH:
        raise UsageError("--windows and --max-length cannot be combined: windows keep all residues")
    ragged = [kind for kind in request.kinds if KINDS[kind].is_ragged]
    refused = [kind for kind in request.kinds if kind not in KINDS_IN_WINDOWS]
    if request.windows is not None and refused:
        possible = " and ".join(KINDS_IN_WINDOWS)
        raise UsageError(f"--windows with --include {refused[0]}: windows support only {possible}")
    if request.parts and not ragged:
        raise UsageError(
            "--parts: needs a kind with rows per residue or pair, such as --include per_residue or contacts"
        )


def check_request(request: EmbedRequest) -> None:
    """Check that the options are compatible."""
    _check_outputs(request)
    if request.part is not None and STDIN in request.inputs:
        raise UsageError("--slice: not every process can read standard input; give file names")
    if request.part is not None and request.overwrite:
        raise UsageError(
            "--slice with --overwrite: the processes would replace each other's work; delete "
            f"{request.output} and {request.output}.run first"
        )
    if request.devices is not None and not request.device.startswith(("auto", "cuda")):
        raise UsageError(f"--devices names GPUs and --device is {request.device}; use only one of them")
    if request.ray_address is not None and request.engine == "in-process":
        raise UsageError("--ray-address needs --engine ray")
    if request.ray_address is not None and request.device == "auto":
        raise UsageError(
            "--ray-address needs --device cuda or --device cpu, as this machine may differ from the others"
        )
    if request.ray_address is None:
        check_threads(request.threads)
    reused = [] if request.reuse is None else [request.reuse]
    check_paths(request, [*reused, *(path for path in request.inputs if path != STDIN)])
    if request.log_json is not None:
        if request.log_json.is_fifo():  # opening one blocks until it has a reader
            raise UsageError(f"--log-json {request.log_json}: is a pipe; name a file")
        try:
            request.log_json.open("a").close()
        except OSError as error:
            raise UsageError(f"--log-json {request.log_json}: {error.strerror}") from error


def check_device(request: EmbedRequest, device: torch.device) -> None:
    """Check that the attention backend and CUDA graphs are available on `device`.

    Raises:
        UsageError: CUDA graphs are not available.
        BackendError: the attention backend is not available.
    """
    if request.cuda_graphs and (request.layout != "fixed" or device.type != "cuda"):
        missing = "a GPU" if request.layout == "fixed" else "--reproducible, which makes packs of one size"
        raise UsageError(f"--cuda-graphs needs {missing}")
    if request.cuda_graphs and needs_contacts(request.kinds):
        raise UsageError("--cuda-graphs cannot be combined with --include contacts; remove one of them")
    if request.ray_address is None:
        backend, _ = select_backend(request.attention, device, request.precision(device), head_dim=64)
        if request.cuda_graphs and backend in WAITING_BACKENDS:
            raise UsageError(
                f"--cuda-graphs: attention {backend!r} synchronizes with the device; choose another one"
            )


def check_heads(request: EmbedRequest, checkpoint: Checkpoint) -> None:
    """Check that a model has the heads that the kinds of output need.

    Raises:
        CheckpointError: a head is missing.
    """
    needing = [kind for kind in request.kinds if needs_logits([kind])]
    if (needing or request.scoring is not None) and "lm_head.bias" not in checkpoint.tensors:
        what = f"--include {needing[0]}" if needing else "score"
        raise CheckpointError(f"{what}: {checkpoint.model_name} has no language-model head")
    if needs_contacts(request.kinds) and "contact_head.regression.weight" not in checkpoint.tensors:
        raise CheckpointError(f"--include contacts: {no_contact_head(checkpoint.model_name)}")


def first_device(request: EmbedRequest) -> torch.device:
    """The device of this process's first or only worker."""
    if request.ray_address is not None:
        return torch.device(request.device.partition(":")[0])
    numbers = gpu_numbers(request)
    try:
        return resolve_device(f"cuda:{numbers[0]}" if numbers else request.device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def gpu_numbers(request: EmbedRequest) -> tuple[int, ...]:
    """The GPUs given by `--devices`; empty without it."""
    if request.devices is None or request.ray_address is not None:
        return ()
    count = torch.cuda.device_count()
    if not count:
        raise UsageError(
            "--devices: torch finds no CUDA device here; use --device cpu --workers N for CPU cores"
        )
    if missing := [number for number in request.devices if number >= count]:
        raise UsageError(f"--devices: there is no GPU {missing[0]}, only 0 to {count - 1}")
    return request.devices or tuple(range(count))


def check_space(run: Run, needs: tuple[int, int], console: Console) -> None:
    """Report the output size, the space the run still needs (temporary shards included), and the free space.

    Args:
        run: the run; its finished shards already exist.
        needs: bytes of the output, and bytes that the run still needs until it is created.
        console: gets the report.

    Raises:
        OSError: ENOSPC, if there is not enough free space.
    """
    output, needed = needs
    directory = run.directory.output.parent
    free = shutil.disk_usage(directory).free
    sizes = (
        f"the output takes about {byte_size(output)}, the run up to {byte_size(needed)} until it is merged "
        f"(in addition to its index, {byte_size(run.index.num_bytes)}); {byte_size(free)} free in {directory}"
    )
    if needed > free:
        raise OSError(errno.ENOSPC, sizes)
    console.note(sizes)


def space_of(run: Run, num_compared: int, in_parts: bool) -> tuple[int, int]:
    """Bytes of the output, parts included, and bytes that the run still needs until it is merged.

    Args:
        run: the run; its finished shards already exist.
        num_compared: sequences that are compared with FP32.
        in_parts: whether rows of residues stay in files next to the output, which avoids copying them.
    """
    index = run.index
    num_computed = index.num_records - index.num_identical
    output = output_bytes(
        index.num_records,
        index.mean_id_bytes,
        run.arrays,
        run.total_rows,
        problems=[astuple(problem) for problem in index.problems],
        num_compared=min(num_compared, num_computed),
    )
    return output, left_bytes(run) + output - (run.ragged_bytes if in_parts else 0)


def left_bytes(run: Run) -> int:
    """Bytes that the unfinished shards of a run will take."""
    num_shards = run.plan.num_shards
    num_left = num_shards - len(run.finished(range(num_shards)))
    share = num_left / num_shards
    return shards_bytes(num_left, run.arrays, {per: int(n * share) for per, n in run.total_rows.items()})
