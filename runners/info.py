"""What `esm-packed info` says about an output, a FASTA file or a model."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import h5py
import numpy as np

from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.download import OFFICIAL_FILES, checkpoint_directory, hugging_face_snapshot
from esm_packed.runners.fasta import ReadOptions
from esm_packed.runners.index import STDIN, build_index
from esm_packed.runners.progress import Console, byte_size
from esm_packed.runners.store import STATUS_FAILED, STATUS_RECOMPUTED, EmbeddingReader, StoreError
from esm_packed.weights import load_checkpoint, tensor_shapes

_MODEL_SUFFIXES = (".pt", ".bin", ".safetensors", ".index.json")
_LENGTH_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_TRUNCATION = 1022
_PROBLEMS_SHOWN = 5


def describe(subject: str) -> list[str]:
    """Lines about `subject`: an HDF5 output, a FASTA file (`-`: standard input), or a model's name or file.

    Raises:
        CheckpointError, InputError, StoreError: it is nothing of the kind, or damaged.
    """
    path = Path(subject)
    official = subject.removeprefix("facebook/")
    if official in ESM2_MODELS or subject == "demo" or subject.startswith("random:"):
        return _describe_model(subject)
    if subject != STDIN and (not path.is_file() or subject.endswith(_MODEL_SUFFIXES)):
        return _describe_model(subject)
    if subject != STDIN and h5py.is_hdf5(path):
        try:
            return _describe_output(path)
        except (KeyError, RuntimeError) as error:  # what h5py raises on damaged metadata
            raise StoreError(f"{subject}: damaged, or not a whole esm-packed output ({error})") from error
    return _describe_fasta(subject)


def _table(values: dict[str, str]) -> list[str]:
    return [f"{name:<20}{value}" for name, value in values.items()]


def _describe_output(path: Path) -> list[str]:
    with EmbeddingReader(path) as reader:
        lengths = reader.column("lengths")
        status = reader.column("status")
        problems = reader.problems()
        values = {
            "file": f"{path} ({byte_size(path.stat().st_size)})",
            "sequences": f"{reader.num_sequences:,}",
            "residues": f"{int(lengths.sum(dtype=np.int64)):,}",
            "truncated": f"{int(reader.column('truncated').sum()):,}",
            "recomputed": f"{int(np.count_nonzero(status == STATUS_RECOMPUTED)):,}",
            "failed": f"{int(np.count_nonzero(status == STATUS_FAILED)):,}",
            "embeddings": f"{reader.num_sequences} x {reader.hidden_size}, layer {reader.layers[-1]}",
            "inputs": ", ".join(reader.plan["input_names"]),
        }
        values |= {name: str(value) for name, value in reader.attributes.items()}
    lines = [*_table(values), f"problems            {len(problems):,}"]
    for problem in problems[:_PROBLEMS_SHOWN]:
        place = f" ({problem.file}, line {problem.line})" if problem.file else ""
        lines.append(f"  {problem.sequence_id}{place}: {problem.reason}")
    return lines


def _describe_fasta(path: str) -> list[str]:
    # rules under which nothing stops the pass that can be counted instead
    options = ReadOptions(invalid="skip", duplicates="first", force=True)
    size = Path(path).stat().st_size if path != STDIN else None
    with tempfile.TemporaryDirectory(prefix="esm-packed-") as work_dir:
        with Console().progress("reading", "B", size) as advance:
            index = build_index([path], Path(work_dir), options, progress=advance)
        quantiles = np.quantile(index.lengths, _LENGTH_QUANTILES).round().astype(int).tolist()
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
            f"longer than {_TRUNCATION}": f"{int(np.count_nonzero(index.lengths > _TRUNCATION)):,}",
        }
        problems = index.problems
    lines = _table(values)
    for problem in problems[:_PROBLEMS_SHOWN]:
        lines.append(f"  line {problem.line}, {problem.sequence_id}: {problem.reason}")
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f"  and {len(problems) - _PROBLEMS_SHOWN:,} more")
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
