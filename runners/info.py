"""What `esm-packed info` says about an output, a FASTA file or a model."""

from __future__ import annotations

import math
import stat
import tempfile
from pathlib import Path

import h5py
import numpy as np

from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.download import OFFICIAL_FILES, checkpoint_directory, hugging_face_snapshot
from esm_packed.runners.fasta import InputError, ReadOptions, shorten
from esm_packed.runners.index import MOST_LISTED, STDIN, build_index
from esm_packed.runners.progress import Console, byte_size
from esm_packed.runners.store import STATUS_FAILED, STATUS_RECOMPUTED, EmbeddingReader
from esm_packed.weights import load_checkpoint, tensor_shapes

_MODEL_SUFFIXES = (".pt", ".bin", ".safetensors", ".index.json")
_LENGTH_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_TRUNCATION = 1022
_PROBLEMS_SHOWN = 5
_MOST_SHOWN = 1000
"""Characters of a value: in a file of unknown origin it may be of any length."""
_ROWS_AT_ONCE = 1 << 20


def describe(subject: str, *, list_all: bool = False) -> list[str]:
    """Lines about `subject`: an HDF5 output, a FASTA file (`-`: standard input), or a model's name or file.

    Args:
        subject: what to describe.
        list_all: list all faults of a FASTA file, not only the first ten.

    Raises:
        CheckpointError, InputError, StoreError: it is nothing of the kind, or damaged.
    """
    path = Path(subject)
    if subject != STDIN:
        _check_kind(path)
    official = subject.removeprefix("facebook/")
    if official in ESM2_MODELS or subject == "demo" or subject.startswith("random:"):
        return _describe_model(subject)
    if subject != STDIN and (not path.is_file() or subject.endswith(_MODEL_SUFFIXES)):
        return _describe_model(subject)
    if subject != STDIN and h5py.is_hdf5(path):
        return _describe_output(path)
    return _describe_fasta(subject, None if list_all else MOST_LISTED)


def _check_kind(path: Path) -> None:
    """See that `path`, if it is there, is a file or folder: a pipe or a device may never end.

    Raises:
        InputError: it is something else, or cannot be looked up.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return  # the name of a model, perhaps
    except (OSError, ValueError) as error:
        raise InputError(f"{shorten(str(path))}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: neither a file nor a folder; esm-packed info - reads FASTA from a pipe")


def _table(values: dict[str, str]) -> list[str]:
    return [f"{name:<20}{_cut(value)}" for name, value in values.items()]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _describe_output(path: Path) -> list[str]:
    with EmbeddingReader(path) as reader:
        residues = truncated = 0
        status_counts = np.zeros(256, np.int64)
        for start in range(0, reader.num_sequences, _ROWS_AT_ONCE):
            rows = (start, start + _ROWS_AT_ONCE)
            residues += int(reader.column("lengths", *rows).sum(dtype=np.int64))
            truncated += int(np.count_nonzero(reader.column("truncated", *rows)))
            status_counts += np.bincount(reader.column("status", *rows), minlength=256)
        problems = reader.problems(0, _PROBLEMS_SHOWN)
        values = {
            "file": f"{path} ({byte_size(path.stat().st_size)})",
            "sequences": f"{reader.num_sequences:,}",
            "residues": f"{residues:,}",
            "truncated": f"{truncated:,}",
            "recomputed": f"{status_counts[STATUS_RECOMPUTED]:,}",
            "failed": f"{status_counts[STATUS_FAILED]:,}",
            "embeddings": f"{reader.num_sequences} x {reader.hidden_size}, layer {reader.layers[-1]}",
            "inputs": ", ".join(reader.plan["input_names"]),
        }
        values |= {name: str(value) for name, value in reader.attributes.items()}
        values["problems"] = f"{reader.num_problems:,}"
    lines = _table(values)
    for problem in problems:
        place = f" ({problem.file}, line {problem.line})" if problem.file else ""
        lines.append(_cut(f"  {problem.sequence_id}{place}: {problem.reason}"))
    return lines


def _describe_fasta(path: str, most_listed: int | None) -> list[str]:
    # rules under which nothing stops the pass that can be counted instead
    options = ReadOptions(invalid="skip", duplicates="first", force=True)
    size = Path(path).stat().st_size if path != STDIN else None
    with tempfile.TemporaryDirectory(prefix="esm-packed-") as work_dir:
        with Console().progress("reading", "B", size) as advance:
            index = build_index(
                [path],
                Path(work_dir),
                options,
                progress=advance,
                most_listed=most_listed,
                list_left_out=True,
            )
        quantiles = np.quantile(index.lengths[:], _LENGTH_QUANTILES).round().astype(int).tolist()
        values = {
            "file": f"{path} ({byte_size(index.inputs[0].size)})",
            "sha256": index.inputs[0].sha256,
            "records": f"{index.num_records + len(index.problems):,}",
            "faulty": f"{len(index.problems):,}",
            "residues": f"{index.total_residues:,}",
            "lengths": "min {:,}, 5% {:,}, 25% {:,}, median {:,}, 75% {:,}, 95% {:,}, max {:,}".format(
                *quantiles
            ),
            "mean length": f"{index.total_residues / index.num_records:,.1f}",
            f"longer than {_TRUNCATION}": f"{int(np.count_nonzero(index.lengths[:] > _TRUNCATION)):,}",
        }
        problems = index.problems
        if (dna := index.dna_problem()) is not None:
            problems = sorted([*problems, dna], key=lambda problem: problem.line)
    lines = _table(values)
    for problem in problems[:most_listed]:
        lines.append(_cut(f"  line {problem.line}, {problem.sequence_id}: {problem.reason}"))
    if most_listed is not None and len(problems) > most_listed:
        lines.append(f"  and {len(problems) - most_listed:,} more; --all lists them")
    return lines


def _describe_model(name: str) -> list[str]:
    official = name.removeprefix("facebook/")
    if official in ESM2_MODELS:
        file = checkpoint_directory() / f"{official}.pt"
        if not file.is_file() and hugging_face_snapshot(official) is None:
            sha256, size = OFFICIAL_FILES.get(official, ("unknown", 0))
            shown = byte_size(size) if size else "unknown size"
            config = ESM2_MODELS[official]
            return _table(
                {"model": official}
                | _config_values(config, set(tensor_shapes(config)))
                | {"sha256": sha256, "source": f"not on this machine; first use downloads {shown} to {file}"}
            )
    with Console().byte_steps() as report:
        checkpoint = load_checkpoint(name, progress=report)
    dtype = str(checkpoint.tensors["embed_tokens.weight"].dtype).removeprefix("torch.")
    return _table(
        {"model": checkpoint.model_name}
        | _config_values(checkpoint.config, set(checkpoint.tensors))
        | {"dtype": dtype, "sha256": checkpoint.sha256, "source": checkpoint.source}
    )


def _config_values(config: ESM2Config, tensor_names: set[str]) -> dict[str, str]:
    parameters = sum(
        math.prod(shape)
        for name, shape in tensor_shapes(config).items()
        if name in tensor_names and not name.endswith("inv_freq")
    )
    heads = {
        "language-model head": "lm_head.bias" in tensor_names,
        "contact head": "contact_head.regression.weight" in tensor_names,
    }
    return {
        "layers": f"{config.num_layers}",
        "hidden size": f"{config.hidden_size:,}",
        "attention heads": f"{config.num_heads} of {config.head_dim}",
        "parameters": f"{parameters:,}",
    } | {head: "yes" if there else "no" for head, there in heads.items()}
