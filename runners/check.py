"""Compares results of this installation with outputs of the same model computed by other software."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from esm_packed.alphabet import encode
from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint, load_checkpoint
from esm_packed.checkpoints.download import OFFICIAL_FILES
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.errors import UsageError
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS, Precision, is_out_of_memory, resolve_device, resolve_precision
from esm_packed.outputs import mean_of, output_names
from esm_packed.packing import pack
from esm_packed.reports.validation.thresholds import THRESHOLDS
from esm_packed.runners.compute.worker import set_threads
from esm_packed.runners.watch.console import Console

CASES_FILE = Path(__file__).parent / "golden" / "cases.json"
VALUES_FILE = CASES_FILE.with_name("values.safetensors")


@dataclass(frozen=True)
class Case:
    """A reference output of a model.

    Args:
        sequence: one-letter residues, possibly with `<mask>`.
        output: `mean` (over the residues), `tokens` (hidden states, BOS first) or `logits`.
        layer: 0 to num_layers; the last for logits.
        source: software that computed it, as in golden/README.md.
        tolerance: relative L2 error of the source itself.
        values: FP32; (hidden_size,) for a mean, else the leading rows and columns.
    """

    sequence: str
    output: str
    layer: int
    source: str
    tolerance: float
    values: torch.Tensor

    def __str__(self) -> str:
        what = "logits" if self.output == "logits" else f"{self.output} of layer {self.layer}"
        return f"{what}, {len(encode(self.sequence))} residues ({self.source})"


@dataclass(frozen=True)
class Golden:
    """Golden values of a published model.

    Args:
        name: ESM-2 name, or `demo`.
        sha256: hashes of its files, mapped to their origins.
        cases: its outputs.
    """

    name: str
    sha256: Mapping[str, str]
    cases: Sequence[Case]

    def has_shape_of(self, config: ESM2Config) -> bool:
        """Whether a model of shape `config` can have these outputs."""
        means = [case for case in self.cases if case.output == "mean"]
        return max(case.layer for case in means) == config.num_layers and all(
            case.values.shape == (config.hidden_size,) for case in means
        )


def load_golden() -> dict[str, Golden]:
    """All golden values of this package, by model."""
    values = load_file(VALUES_FILE)
    models = {}
    for name, stored in json.loads(CASES_FILE.read_text()).items():
        cases = [Case(**case | {"values": values[case["values"]]}) for case in stored["cases"]]
        sha256 = dict(stored["sha256"])
        if name in OFFICIAL_FILES:
            sha256[OFFICIAL_FILES[name][0]] = "fair-esm's file"
        models[name] = Golden(name, sha256, cases)
    return models


def check_model(
    model: str, console: Console, *, device: str = "auto", threads: int | None = None
) -> tuple[list[str], bool]:
    """Compare a model's outputs in FP32, and in the device's default precision, with golden values.

    All proteins are computed in one pack.

    Args:
        model: a model, as for `checkpoints.load_checkpoint`.
        console: shows the download.
        device: auto, cpu, cuda or cuda:INDEX.
        threads: CPU threads; None for torch's default.

    Returns:
        Lines for the terminal, the last of which begins with `passed` or `differs`, and whether it passed.

    Raises:
        UsageError: there are no golden values for this model, no such device, or not enough memory.
        CheckpointError: the model is missing or damaged.
    """
    known = load_golden()
    official = model.removeprefix("facebook/")
    if official not in known and official.removeprefix("random:").partition("@")[0] in ESM2_MODELS:
        raise _no_values(model, known)  # before a download
    set_threads(threads)
    try:
        resolved = resolve_device(device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with console.byte_steps() as report:
        checkpoint = load_checkpoint(model, progress=report)
    golden = _find_golden(known, model, checkpoint)
    lines = [
        f"{golden.name}: {checkpoint.source}, sha256 {checkpoint.sha256} "
        f"({golden.sha256.get(checkpoint.sha256, 'not a published file: converted or changed')})"
    ]
    config = checkpoint.config
    if not golden.has_shape_of(config):
        shape = f"{config.num_layers} layers of width {config.hidden_size}"
        return [*lines, f"differs: {golden.name} has another shape than this model's {shape}"], False
    misses: list[str] = []
    passes = []
    for precision in dict.fromkeys((PRECISIONS["fp32"], resolve_precision(None, resolved))):
        with _memory_explained(model, resolved, precision):
            backend, errors = _errors(checkpoint, resolved, precision, golden.cases)
        where = f"{precision.name} on {resolved}, attention {backend}"
        passes.append(where)
        lines.append(where)
        for case, deviation in errors:
            allowed = case.tolerance + THRESHOLDS[precision.name].relative_l2
            line = f"{case}: relative L2 {deviation:.1e}, allowed {allowed:.1e}"
            lines.append(f"  {line}")
            if not deviation <= allowed:  # NaN
                misses.append(f"{where}: {line}")
    if misses:
        more = f" (and {len(misses) - 1} more, above)" if len(misses) > 1 else ""
        return [*lines, f"differs: {misses[0]}{more}"], False
    return [*lines, f"passed: {'; '.join(passes)}"], True


@contextmanager
def _memory_explained(model: str, device: torch.device, precision: Precision) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"{model} does not fit into the memory of {device} in {precision.name}; try --device cpu"
        ) from error


def _find_golden(known: Mapping[str, Golden], model: str, checkpoint: Checkpoint) -> Golden:
    """Golden values of a checkpoint, found by its hash, else by its name.

    Raises:
        UsageError: there are none.
    """
    golden = next((golden for golden in known.values() if checkpoint.sha256 in golden.sha256), None)
    golden = golden or known.get(checkpoint.model_name)
    if golden is None:
        raise _no_values(model, known)
    return golden


def _no_values(model: str, known: Mapping[str, Golden]) -> UsageError:
    return UsageError(f"no golden values for this model: {model}; available for {', '.join(known)}")


def _errors(
    checkpoint: Checkpoint, device: torch.device, precision: Precision, cases: Sequence[Case]
) -> tuple[str, list[tuple[Case, float]]]:
    """The attention backend, and the relative L2 error of each case; logits need a language-model head."""
    backend = select_backend("auto", device, precision, checkpoint.config.head_dim)
    model = ESM2.from_checkpoint(checkpoint, device, precision, backend)
    cases = [case for case in cases if case.output != "logits" or model.lm_head is not None]
    sequences = list(dict.fromkeys(case.sequence for case in cases))
    layers = sorted({case.layer for case in cases})
    batch = pack([encode(sequence) for sequence in sequences]).to(device)
    means = model.embed_packed(batch, output_names(["mean"], layers))
    output = model.forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers, return_logits=model.lm_head is not None
    )
    starts = batch.cu_seqlens.tolist()
    errors = []
    for case in cases:
        index = sequences.index(case.sequence)
        if case.output == "mean":
            actual = means[mean_of(case.layer)][index]
        else:
            rows = output.representations[case.layer] if case.output == "tokens" else output.logits
            assert rows is not None
            num_rows, num_columns = case.values.shape
            actual = rows[starts[index] : starts[index] + num_rows, :num_columns]
        expected = case.values.double()
        errors.append((case, float((actual.cpu().double() - expected).norm() / expected.norm())))
    return backend[0], errors
