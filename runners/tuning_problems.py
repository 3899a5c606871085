"""What `esm-packed tune` measures: each kernel of ESM-2 at each size, with inputs and candidate settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from esm_packed.config import ESM2Config
from esm_packed.kernels import launch
from esm_packed.kernels.cases import CASES, Arguments, Case, Workload
from esm_packed.kernels.launch import Settings
from esm_packed.numerics import Precision

LENGTH_QUANTILES = (
    53, 183, 363, 98, 243, 550, 132, 295, 1009, 165, 79, 326, 201, 115, 409, 221, 683, 148, 468, 267
)  # fmt: skip
"""Lengths in tokens as in UniProt: the 20-quantiles of a log-normal with a mean of 300, well mixed."""

MEAN_LENGTH = 300


@dataclass(frozen=True)
class TuningProblem:
    """One entry of the tuned settings: a kernel at a size, in a dtype.

    Args:
        key: key in the tuned settings.
        case: the kernel.
        precision: the mode it is timed in.
        candidates: settings to try in addition to the heuristic's.
        arguments: creates the arguments of the kernel, with the same values each time.
    """

    key: str
    case: Case
    precision: Precision
    candidates: list[Settings]
    arguments: Callable[[], Arguments]


TUNING_ORDER = (
    *("packed_attention", "packed_attention_tf32", "packed_attention_tf32x3"),
    *("gemm_bias_gelu", "linear_gelu", "add_layer_norm_", "bias_gelu_"),
    *("rotary_qk_", "gemm_bias_rotary", "linear_rotary"),
)
"""The most time-consuming kernels come first, since time may be limited; the others follow. The choices
`linear_gelu` and `linear_rotary` come after the kernels they choose from, which are tuned by then."""


def sample_lengths(tokens: int, mean: int = MEAN_LENGTH) -> list[int]:
    """Lengths of sequences with `tokens` tokens in total, at least 3; longest first, as in packs."""
    lengths: list[int] = []
    left = tokens
    for length in itertools.cycle(LENGTH_QUANTILES):
        if left < 3:  # no room for BOS, a residue and EOS
            break
        lengths.append(min(max(3, length * mean // MEAN_LENGTH), left))
        left -= lengths[-1]
    lengths[-1] += left
    return sorted(lengths, reverse=True)


def problems(
    configs: Sequence[ESM2Config],
    precisions: Sequence[Precision],
    tokens: int,
    device: torch.device,
    *,
    few: bool = False,
) -> list[TuningProblem]:
    """Every kernel at every size and dtype that these models use in these modes on this device, each once.

    Args:
        configs: shapes of the models.
        precisions: precision modes.
        tokens: total_tokens of the inputs.
        device: device of the inputs.
        few: keep only the longest and the shortest sequence, which suffices to compile the kernels.

    Returns:
        The problems in `TUNING_ORDER`.
    """
    found: dict[str, TuningProblem] = {}
    lengths = sample_lengths(tokens)
    if few:
        lengths = [lengths[0], lengths[-1]]
    for config, precision, case in itertools.product(configs, precisions, CASES.values()):
        if case.candidates is None or not _uses(precision, case, launch.capability(device)):
            continue
        dtype, workload = precision.dtype, Workload(config, lengths, device)
        candidates = case.candidates(case.launchers, config, dtype)
        # A norm is the layers' and the LM head's, which has no residual stream.
        residual_dtypes = (precision.residual_dtype, *([dtype] if case.tuned_by_stream else []))
        for residual_dtype in residual_dtypes:
            key = case.settings_key(config, dtype, residual_dtype)
            arguments = partial(case.arguments, workload, dtype, residual_dtype)
            found.setdefault(key, TuningProblem(key, case, precision, candidates, arguments))
    order = [*TUNING_ORDER, *(name for name in CASES if name not in TUNING_ORDER)]
    return sorted(found.values(), key=lambda problem: order.index(problem.case.name))


def _uses(precision: Precision, case: Case, capability: int) -> bool:
    """Whether a model in this mode launches the kernel on GPUs of this compute capability (0: any)."""
    if precision.dtype not in case.dtypes or 0 < capability < case.since:
        return False
    if precision.dtype != torch.float32 or case.input_precision is None:
        return True
    return precision.tf32 == (case.input_precision == "tf32")
