"""The precision validation of a model on given proteins: every mode and path against FP64, and verdicts."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.attention import BACKENDS, select_backend
from esm_packed.checkpoints import Checkpoint, RandomTensors, load_checkpoint
from esm_packed.config import ESM2Config
from esm_packed.kernels import dispatch
from esm_packed.layouts import LAYOUTS
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS, Precision, resolve_precision
from esm_packed.packing import SPECIAL_TOKENS
from esm_packed.reports.page import ReportError
from esm_packed.reports.validation.activations import Activations
from esm_packed.reports.validation.errors import PathResult, measure
from esm_packed.reports.validation.reference import Reference, compute_reference
from esm_packed.reports.validation.thresholds import THRESHOLDS, Threshold
from esm_packed.reports.validation.verdict import Verdict, judge
from esm_packed.stress import seeded_kind
from esm_packed.version import __version__

TokenIds = npt.NDArray[np.uint8]

MODES = ("fp32", "tf32", "fp16", "bf16")

LENGTH_CLASSES = ((1, 100), (101, 250), (251, 500), (501, 1022), (1023, None))
"""Residues, both ends included."""


@dataclass(frozen=True)
class ValidationSettings:
    """Settings of a validation.

    Args:
        device: to compute on.
        modes: precision modes to compute.
        thresholds: mode to threshold, replacing `THRESHOLDS`.
        reference: one of `config.REFERENCES`.
        token_budget: tokens in a pack.
    """

    device: torch.device
    token_budget: int
    modes: tuple[str, ...] = MODES
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    reference: str = "esm-packed"

    def threshold(self, mode: str) -> Threshold:
        """Threshold of `mode`."""
        return self.thresholds.get(mode, THRESHOLDS[mode])


@dataclass(frozen=True)
class Validation:
    """Results of a validation.

    Args:
        checkpoint: of the model.
        weights_note: a warning about the weights, or None.
        settings: requested settings.
        sequence_ids, lengths: of the proteins, in their order; residues computed.
        reference: embeddings in FP64.
        activations: of our FP64 path.
        paths: every mode on every path that could run.
        not_run: mode or path, and why it did not run.
        verdicts: one for each mode that ran.
        environment: versions and device.
    """

    checkpoint: Checkpoint
    weights_note: str | None
    settings: ValidationSettings
    sequence_ids: Sequence[str]
    lengths: Sequence[int]
    reference: Reference
    activations: Activations
    paths: list[PathResult]
    not_run: list[tuple[str, str]]
    verdicts: list[Verdict]
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every mode that ran passes."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def verdict(self) -> str:
        """The verdict with the device and the attention backends it holds for."""
        return verdict_line(self.verdicts, self.paths, self.settings.device)

    @property
    def first_paths(self) -> list[PathResult]:
        """The first path of each mode, for figures that show one."""
        first: dict[str, PathResult] = {}
        for path in self.paths:
            first.setdefault(path.mode, path)
        return list(first.values())


def validate(
    load: Callable[[], Checkpoint],
    sequence_ids: Sequence[str],
    token_ids: Sequence[TokenIds],
    settings: ValidationSettings,
    advance: Callable[[int], None] = lambda residues: None,
) -> Validation:
    """Compute `token_ids` in every mode and on every path, and compare with the reference.

    Args:
        load: opens the checkpoint; called again for the reference and for each mode.
        sequence_ids, token_ids: name and residues of each protein, at least one.
        settings: what to validate.
        advance: called with the number of residues completed; `num_passes` times all of them in total.

    Raises:
        ReportError: no mode can run on the device, or fair-esm is asked for and not installed.
    """
    checkpoint = load()
    runs, not_run = plan_runs(checkpoint.config, settings)
    reference, activations = compute_reference(
        settings.reference, checkpoint, settings.device, token_ids, advance
    )
    paths = []
    for precision, of_mode in runs:
        model = None
        for layout, backend in of_mode:
            attention = select_backend(backend, settings.device, precision, checkpoint.config.head_dim)
            if model is None:
                model = ESM2.from_checkpoint(load(), settings.device, precision, attention)
            path = model.with_attention(attention), LAYOUTS[layout]
            paths.append(measure(*path, token_ids, reference, settings.token_budget, advance))
    verdicts = [
        judge(
            precision.name,
            [path for path in paths if path.mode == precision.name],
            settings.threshold(precision.name),
        )
        for precision, _ in runs
    ]
    return Validation(
        checkpoint=checkpoint,
        weights_note=weights_note(checkpoint),
        settings=settings,
        sequence_ids=sequence_ids,
        lengths=[len(ids) for ids in token_ids],
        reference=reference,
        activations=activations,
        paths=paths,
        not_run=not_run,
        verdicts=verdicts,
        environment=environment(settings.device),
    )


def verdict_line(verdicts: Sequence[Verdict], paths: Sequence[PathResult], device: torch.device) -> str:
    """The verdict with device and backends, such as `passed on CPU, SDPA; GPU kernels not validated`.

    Backends are those of packed runs. `reference` is one only where nothing else ran.
    """
    failed = [verdict.mode for verdict in verdicts if not verdict.passed]
    packed = dict.fromkeys(path.backend for path in paths if path.layout == "packed")
    backends = [name for name in packed if name != "reference"] or list(packed)
    names = [name.upper() if name == "sdpa" else name for name in backends]
    on_gpu = device.type == "cuda"
    where = ", ".join([torch.cuda.get_device_name(device) if on_gpu else "CPU", *names])
    kernels_ran = (
        on_gpu and device.type in dispatch.TRITON_DEVICES and any(path.mode != "fp64" for path in paths)
    )
    return (
        (f"FAILED ({', '.join(failed)})" if failed else "passed")
        + f" on {where}"
        + ("" if kernels_ran else "; GPU kernels not validated")
    )


Runs = list[tuple[Precision, list[tuple[str, str]]]]


def plan_runs(config: ESM2Config, settings: ValidationSettings) -> tuple[Runs, list[tuple[str, str]]]:
    """The (layout, attention backend) pairs of each mode, and what cannot run with the reason.

    Raises:
        ReportError: no mode can run.
    """
    runs: Runs = []
    not_run = []
    for mode in settings.modes:
        try:
            precision = resolve_precision(mode, settings.device)
        except ValueError as error:
            not_run.append((mode, str(error)))
            continue
        pairs = []
        for name, backend in BACKENDS.items():
            obstacle = backend.obstacle(settings.device, precision.dtype, config.head_dim)
            if obstacle is None:
                pairs.append(("packed", name))
            else:
                not_run.append((f"{mode}, packed, {name}", obstacle))
        # the padded layout has its own attention, regardless of the model's
        runs.append((precision, [*pairs, ("padded", "sdpa")]))
    if not runs:
        raise ReportError("no mode can run: " + "; ".join(f"{what}: {why}" for what, why in not_run))
    return runs, not_run


def num_passes(config: ESM2Config, settings: ValidationSettings) -> int:
    """How many times `validate` computes every protein."""
    runs, _ = plan_runs(config, settings)
    references = 2 if settings.reference == "fair-esm" else 1
    return references + sum(len(pairs) for _, pairs in runs)


def estimate_seconds(
    config: ESM2Config, token_ids: Sequence[TokenIds], settings: ValidationSettings
) -> float:
    """About how long `validate` computes, from one layer of random weights timed on a few of the proteins."""
    one_layer = ESM2Config(1, config.hidden_size, config.num_heads, config.token_dropout)
    checkpoint = Checkpoint("", one_layer, RandomTensors(one_layer), "", "")
    runs, _ = plan_runs(config, settings)
    total = sum(len(ids) + SPECIAL_TOKENS for ids in token_ids)

    middle = sorted(token_ids, key=len)[len(token_ids) // 2]
    some: list[TokenIds] = []
    for ids in token_ids[:: max(1, len(token_ids) // 50)]:
        if some and sum(map(len, some)) + len(ids) > min(settings.token_budget, 4096):
            break
        some.append(ids)

    def seconds(model: ESM2, layout: str, sample: Sequence[TokenIds]) -> float:
        batch = LAYOUTS[layout].lay_out(sample, settings.token_budget).to(model.device)
        model = LAYOUTS[layout].prepare(model)
        timed = []
        for _ in range(2):  # the first is a warm-up
            begin = time.perf_counter()
            model.embed_packed(batch, ["mean/0", "mean/1"])["mean/1"].cpu()
            timed.append(time.perf_counter() - begin)
        tokens = sum(len(ids) + SPECIAL_TOKENS for ids in sample)
        return timed[-1] * config.num_layers * total / tokens

    def model_for(precision: Precision, backend: str) -> ESM2:
        attention = select_backend(backend, settings.device, precision, config.head_dim)
        return ESM2.from_checkpoint(checkpoint, settings.device, precision, attention)

    references = 2 if settings.reference == "fair-esm" else 1
    estimate = references * seconds(model_for(PRECISIONS["fp64"], "auto"), "packed", [middle])
    for precision, pairs in runs:
        for layout, backend in pairs:
            estimate += seconds(model_for(precision, backend), layout, some)
    return estimate


def weights_note(checkpoint: Checkpoint) -> str | None:
    """A warning about demo, random or stress weights, also when they come from a file; None for others."""
    demo = load_checkpoint("demo")
    if checkpoint.config == demo.config and all(
        torch.equal(checkpoint.tensors[name].float(), demo.tensors[name].float())
        for name in demo.tensors
        if name.startswith(("layers.", "emb_layer_norm_after."))
    ):
        return (
            "These are the weights of the demo, a tiny model for trying out this program: the verdict says "
            "nothing about another model."
        )
    kind = seeded_kind(checkpoint)
    if kind == "random":
        return "These weights are random, not trained: trained weights may have larger errors."
    if kind == "stress":
        return (
            "These are stress weights: random, not trained, made to imitate the outliers of a trained model. "
            "Validate the model you use."
        )
    return None


def environment(device: torch.device) -> dict[str, str]:
    """Versions and device, for the page."""
    if device.type == "cuda":
        where = f"{device} ({torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda})"
    else:
        threads = torch.get_num_threads()
        where = f"{device} ({cpu_name()}, {threads} thread{'s' if threads > 1 else ''})"
    return {
        "device": where,
        "esm-packed": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def cpu_name() -> str:
    """Model of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def by_length_class(lengths: Sequence[int]) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Name and protein numbers of each class of `LENGTH_CLASSES` that has proteins."""
    array = np.asarray(lengths)
    classes = []
    for low, high in LENGTH_CLASSES:
        members = np.flatnonzero((array >= low) & (array <= (high or array.max())))
        if len(members):
            classes.append((f"{low}–{high}" if high else f"over {low - 1}", members))
    return classes
