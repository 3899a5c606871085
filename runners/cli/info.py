"""The command `info`: a description of an output file, a run, a FASTA file or a model."""

from __future__ import annotations

import json
import math
import stat
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esm_packed.config import DEFAULT_MAX_LENGTH, ESM2_MODELS, ESM2Config
from esm_packed.errors import UsageError
from esm_packed.outputs import KINDS
from esm_packed.runners.input.build import survey
from esm_packed.runners.input.fasta import InputError, shorten
from esm_packed.runners.input.index import STDIN
from esm_packed.runners.input.scan import MOST_LISTED, input_name
from esm_packed.runners.output.names import RAGGED
from esm_packed.runners.output.reader import EmbeddingReader, StoredDataSet
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.shard import STATUS_FAILED, STATUS_NOT_COMPUTED, STATUS_RECOMPUTED
from esm_packed.runners.status import run_state
from esm_packed.runners.summary import parts_line
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console, byte_size

_MODEL_SUFFIXES = (".pt", ".bin", ".safetensors", ".index.json")
_LENGTH_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_PROBLEMS_SHOWN = 5
_MOST_SHOWN = 1000
"""Characters shown of a value: in a file of unknown origin it may have any length."""
_ROWS_AT_ONCE = 1 << 20


def describe(subject: str, *, list_all: bool = False, as_json: bool = False) -> list[str]:
    """Describe an HDF5 output file, a run, a FASTA file (`-`: standard input), or a model.

    Args:
        subject: a file or directory, or the name of a model.
        list_all: list all problems of a FASTA file, not only the first ten.
        as_json: return the lines of a JSON object; for an output file or a run.

    Returns:
        Lines for the terminal.

    Raises:
        CheckpointError, InputError, PlanError, StoreError: it is damaged, or none of these.
        UsageError: an option does not apply to it, it does not exist, or it is a run directory that
            esm-packed did not create.
    """
    path = Path(subject)
    if subject != STDIN:
        _check_kind(path)
        if path.is_file() and h5py.is_hdf5(path):
            _refuse(list_all, "--all", subject, "an output file", "is for FASTA files")
            return _describe_output(path, as_json)
        if (directory := _run_directory(path)) is not None:
            _refuse(list_all, "--all", subject, "a run", "is for FASTA files")
            state = run_state(directory)
            return _json({"kind": "run", **asdict(state)}) if as_json else state.lines()
    if subject == STDIN or (path.is_file() and not _is_model(subject)):
        _refuse(as_json, "--json", subject, "a FASTA file", "is for output files and runs")
        return _describe_fasta(subject, None if list_all else MOST_LISTED)
    if not _is_model(subject) and path.suffix and not path.exists():
        raise UsageError(f"{shorten(subject)}: no such file")
    _refuse(as_json, "--json", subject, "a model", "is for output files and runs")
    _refuse(list_all, "--all", subject, "a model", "is for FASTA files")
    return _describe_model(subject)


def _is_model(subject: str) -> bool:
    """Whether `subject` names a model or the file of a model."""
    official = subject.removeprefix("facebook/")
    return (
        official in ESM2_MODELS or subject == "demo" or subject.startswith("random:")
    ) or subject.endswith(_MODEL_SUFFIXES)


def _refuse(is_set: bool, option: str, subject: str, kind: str, purpose: str) -> None:
    """Check that an option that does not apply to this kind of subject is not set."""
    if is_set:
        raise UsageError(
            f"info {option}: {shorten(subject)} is {kind}, but {option} {purpose}; remove {option}"
        )


def _check_kind(path: Path) -> None:
    """Check that `path`, if it exists, is a file or directory: a pipe or a device may never end.

    Raises:
        InputError: it is something else, or cannot be accessed.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return  # possibly the name of a model
    except (OSError, ValueError) as error:
        raise InputError(f"{shorten(str(path))}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(
            f"{path}: neither a file nor a directory; to read FASTA from a pipe, use esm-packed info -"
        )


def _run_directory(path: Path) -> RunDirectory | None:
    """The run directory at `path`, or that of an output file that does not exist yet; None without one."""
    output = path.with_suffix("") if path.suffix == ".run" else path
    if path.is_file() or not output.name:
        return None
    directory = RunDirectory(output)
    return directory if directory.path.is_dir() else None


def _json(content: dict[str, Any]) -> list[str]:
    return json.dumps(content, indent=1, default=str).splitlines()


def _table(values: dict[str, str]) -> list[str]:
    return [f"{name:<20}{_cut(value)}" for name, value in values.items()]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _describe_output(path: Path, as_json: bool) -> list[str]:
    with EmbeddingReader(path) as reader:
        residues, counts = _count(reader)
        num_problems = reader.num_problems
        problems = reader.problems(0, _PROBLEMS_SHOWN)
        attributes = reader.attributes
        is_complete = bool(attributes.get("complete", True))
        size = path.stat().st_size
        if as_json:
            return _json(
                {
                    "kind": "output",
                    "file": str(path),
                    "bytes": size,
                    "sequences": reader.num_sequences,
                    "residues": residues,
                    "hidden_size": reader.hidden_size,
                    "kinds": reader.kinds,
                    "datasets": [each._asdict() | {"dtype": str(each.dtype)} for each in reader.datasets()],
                    "parts": [part._asdict() for part in reader.parts],
                    "complete": is_complete,
                    **counts,
                    "problems": num_problems,
                    "first_problems": [problem._asdict() for problem in problems],
                    "inputs": reader.plan["input_names"],
                    "identity": reader.plan["identity"],
                    "attributes": attributes,
                }
            )
        shown = defaultdict(str, {name: str(value) for name, value in attributes.items()})
        missing = f"{counts['not computed']:,} of {reader.num_sequences:,} proteins are not computed"
        values = {
            "output": f"{path} ({byte_size(size)})",
            "complete": "yes" if is_complete else f"no; {missing}, rerun the same embed command to continue",
            "date": _date(shown["date"]),
            "command": shown["command"],
            "inputs": ", ".join(reader.plan["input_names"]),
            "model": f"{shown['model_name']} in {shown['dtype']} (sha256 {shown['model_sha256'][:16]})",
            "device": f"{shown['device']}, attention {shown['attention_backend']}, "
            f"matmul {shown['matmul'] or 'unknown'}",
            "disabled": shown["disabled"],
            "sequences": f"{reader.num_sequences:,} ({counted(residues, 'residue')})",
            "kinds": ", ".join(reader.kinds),
            **{dataset.name: _dataset_line(dataset) for dataset in reader.datasets()},
            "parts": parts_line(reader),
            "exceptions": ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none",
        }
    lines = _table({name: value for name, value in values.items() if value})
    for problem in problems:
        place = f" ({problem.file}, line {problem.line})" if problem.file else ""
        lines.append(_cut(f"  {problem.sequence_id}{place}: {problem.reason}"))
    if num_problems > len(problems):
        lines.append(f"  and {num_problems - len(problems):,} more in `problems`")
    return lines


def _dataset_line(dataset: StoredDataSet) -> str:
    kind, layer, _, shape, dtype, num_bytes = dataset
    what = KINDS[kind].text if layer is None else f"{kind.replace('_', ' ')} of layer {layer}"
    size = f" ({byte_size(num_bytes)})" if kind in RAGGED else ""
    return f"{what}: {' x '.join(f'{length:,}' for length in shape)}, fp{8 * dtype.itemsize}{size}"


def _count(reader: EmbeddingReader) -> tuple[int, Counter[str]]:
    """Number of residues of an output file, and numbers of exceptional sequences by kind of exception."""
    residues = 0
    counts: Counter[str] = Counter()
    statuses = {"recomputed": STATUS_RECOMPUTED, "failed": STATUS_FAILED, "not computed": STATUS_NOT_COMPUTED}
    for start in range(0, reader.num_sequences, _ROWS_AT_ONCE):
        rows = (start, start + _ROWS_AT_ONCE)
        residues += int(reader.column("lengths", *rows).sum(dtype=np.int64))
        counts.update({change: len(changed) for change, changed in reader.changed(*rows).items()})
        status = reader.column("status", *rows)
        counts.update({name: int(np.count_nonzero(status == value)) for name, value in statuses.items()})
    # `problems` lists these rows as well
    counts["left out"] = max(0, reader.num_problems - sum(counts[name] for name in statuses))
    return residues, counts


def _date(text: str) -> str:
    """An ISO 8601 date in readable form; any other text unchanged."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S %Z}"
    except ValueError:
        return text


def _describe_fasta(path: str, most_listed: int | None) -> list[str]:
    size = Path(path).stat().st_size if path != STDIN else None
    with (
        tempfile.TemporaryDirectory(prefix="esm-packed-") as work_dir,
        Console().progress("reading", "B", size) as advance,
    ):
        found = survey(path, Path(work_dir), most_listed, advance)
    lengths, faults = found.lengths, found.faults
    values = {
        "file": f"{path} ({byte_size(found.size)})",
        "sha256": found.sha256,
        "records": f"{found.num_records:,}",
        "faulty": "all: DNA or RNA" if found.is_dna else f"{found.num_records - len(lengths):,}",
        "residues": f"{lengths.sum(dtype=np.int64):,}",
    }
    if len(lengths):
        quantiles = np.quantile(lengths, _LENGTH_QUANTILES).round().astype(int).tolist()
        values |= {
            "lengths": "min {:,}, 5% {:,}, 25% {:,}, median {:,}, 75% {:,}, 95% {:,}, max {:,}".format(
                *quantiles
            ),
            "mean length": f"{lengths.mean():,.1f}",
            f"longer than {DEFAULT_MAX_LENGTH}": f"{int(np.count_nonzero(lengths > DEFAULT_MAX_LENGTH)):,}",
        }
    lines = _table(values)
    listed = faults.listed()
    lines += [_cut(f"  {fault.text.removeprefix(f'{input_name(path)}, ')}") for fault in listed]
    if faults.count > len(listed):
        lines.append(f"  and {faults.count - len(listed):,} more; --all lists them")
    return lines


def _describe_model(name: str) -> list[str]:
    # only models need torch
    from esm_packed.checkpoints import load_checkpoint, tensor_shapes
    from esm_packed.checkpoints.download import OFFICIAL_FILES, checkpoint_directory, hugging_face_snapshot

    official = name.removeprefix("facebook/")
    if official in ESM2_MODELS:
        file = checkpoint_directory() / f"{official}.pt"
        if not file.is_file() and hugging_face_snapshot(official) is None:
            sha256, size = OFFICIAL_FILES.get(official, ("unknown", 0))
            shown = byte_size(size) if size else "unknown size"
            config = ESM2_MODELS[official]
            return _table(
                {"model": official}
                | _config_values(config, tensor_shapes(config))
                | {"sha256": sha256, "source": f"not on this machine; first use downloads {shown} to {file}"}
            )
    with Console().byte_steps() as report:
        checkpoint = load_checkpoint(name, progress=report)
    dtype = str(checkpoint.tensors["embed_tokens.weight"].dtype).removeprefix("torch.")
    return _table(
        {"model": checkpoint.model_name}
        | _config_values(
            checkpoint.config,
            {
                name: shape
                for name, shape in tensor_shapes(checkpoint.config).items()
                if name in checkpoint.tensors
            },
        )
        | {"dtype": dtype, "sha256": checkpoint.sha256, "source": checkpoint.source}
    )


def _config_values(config: ESM2Config, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("inv_freq"))
    heads = {
        "language-model head": "lm_head.bias" in shapes,
        "contact head": "contact_head.regression.weight" in shapes,
    }
    return {
        "layers": f"{config.num_layers}",
        "hidden size": f"{config.hidden_size:,}",
        "attention heads": f"{config.num_heads} of {config.head_dim}",
        "parameters": f"{parameters:,}",
    } | {head: "yes" if there else "no" for head, there in heads.items()}
