"""Mistakes that ports of ESM-2 make, each made on purpose, and the errors they cause.

The table of the documentation is made by

    python tests/support/mistakes.py reports/published/cpu-amd-epyc-2-cores/mistakes.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import model_of

from esm_packed import ESM2, kernels, read_fasta
from esm_packed.alphabet import encode
from esm_packed.checkpoints import Checkpoint
from esm_packed.config import ESM2_MODELS
from esm_packed.layouts import LAYOUTS, Layout
from esm_packed.packing import PackedBatch, pack
from esm_packed.reports.validation.errors import measure
from esm_packed.reports.validation.reference import compute_reference
from esm_packed.reports.validation.verdict import passes_classical_pair
from esm_packed.stress import stress_checkpoint

Mistake = Callable[[Checkpoint, pytest.MonkeyPatch], tuple[ESM2, Layout]]
PACKED = LAYOUTS["packed"]
ROOT = Path(__file__).parents[2]


def with_tensors(checkpoint: Checkpoint, **changed: torch.Tensor) -> Checkpoint:
    return replace(checkpoint, tensors=dict(checkpoint.tensors) | changed)


def boundary_shifted(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[ESM2, Layout]:
    def lay_out(token_ids: Sequence[np.ndarray], token_budget: int) -> PackedBatch:
        batch = pack(token_ids)
        batch.cu_seqlens[1:-1] -= 1
        return replace(batch, max_seqlen=batch.max_seqlen + (len(token_ids) > 1))

    return model_of(checkpoint, "fp32"), replace(PACKED, lay_out=lay_out)


def eos_pooled(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[ESM2, Layout]:
    def segment_mean(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        bounds = pairwise(cu_seqlens.tolist())
        return torch.stack([hidden_states[start + 1 : end].mean(0) for start, end in bounds])

    monkeypatch.setattr("esm_packed.kernels.segment_mean", segment_mean)
    return model_of(checkpoint, "fp32"), PACKED


def recomputed_inv_freq(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[ESM2, Layout]:
    head_dim = checkpoint.config.head_dim
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    names = {name: 1.0 / 10000**exponents for name in checkpoint.tensors if name.endswith("inv_freq")}
    return model_of(with_tensors(checkpoint, **names), "fp32"), PACKED


def no_token_dropout(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[ESM2, Layout]:
    without = replace(checkpoint, config=replace(checkpoint.config, token_dropout=False))
    return model_of(without, "fp32"), PACKED


def tanh_gelu(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[ESM2, Layout]:
    monkeypatch.setattr(
        "esm_packed.kernels.linear_gelu",
        lambda x, w, b: F.gelu(F.linear(x, w.to_dense(), b), approximate="tanh"),
    )
    return model_of(checkpoint, "fp32"), PACKED


def angles_in_fp16(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[ESM2, Layout]:
    model = model_of(checkpoint, "fp32")
    angles = torch.outer(torch.arange(1026).half(), model.rotary.inv_freq.half())
    model.rotary.cos, model.rotary.sin = angles.cos().float(), angles.sin().float()
    return model, PACKED


def tf32(values: torch.Tensor) -> torch.Tensor:
    """Rounded to TF32's 10 bits of mantissa."""
    return ((values.to_dense().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_in_fp32(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[ESM2, Layout]:
    monkeypatch.setattr("esm_packed.kernels.linear", lambda x, w, b: F.linear(tf32(x), tf32(w), b))
    monkeypatch.setattr(
        "esm_packed.kernels.linear_gelu", lambda x, w, b: F.gelu(F.linear(tf32(x), tf32(w), b))
    )
    linear_rotary = kernels.linear_rotary
    monkeypatch.setattr(
        "esm_packed.kernels.linear_rotary", lambda x, w, *others: linear_rotary(tf32(x), tf32(w), *others)
    )
    return model_of(checkpoint, "fp32"), PACKED


MISTAKES: list[Mistake] = [
    boundary_shifted,
    eos_pooled,
    recomputed_inv_freq,
    no_token_dropout,
    tanh_gelu,
    angles_in_fp16,
    tf32_in_fp32,
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the errors of deliberate mistakes.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="esm2_t6_8M_UR50D")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    checkpoint = stress_checkpoint(ESM2_MODELS[options.model])
    proteins = [encode(sequence[:1022]) for _, sequence in read_fasta(ROOT / "examples/proteins.fasta")]
    reference, _ = compute_reference("esm-packed", checkpoint, torch.device("cpu"), proteins)

    def errors(model: ESM2, layout: Layout) -> dict[str, object]:
        means = measure(model, layout, proteins, reference, token_budget=1024).means
        return {
            "worst_relative_l2": float(means.relative_l2.max()),
            "median_relative_l2": float(means.relative_l2.median()),
            "least_relative_l2": float(means.relative_l2.min()),
            "least_cosine": float(means.cosine.min()),
            "passes_classical_pair": passes_classical_pair(means.cosine),
        }

    correct = {mode: errors(model_of(checkpoint, mode), PACKED) for mode in ("fp32", "fp16", "bf16")}
    wrong = {}
    for mistake in MISTAKES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            wrong[mistake.__name__] = errors(*mistake(checkpoint, monkeypatch))
    content = {
        "model": f"stress weights in the shape of {options.model}",
        "proteins": f"examples/proteins.fasta, {len(proteins)} proteins, cut to 1,022 residues",
        "torch": torch.__version__,
        "reference": "FP64",
        "correct_model": correct,
        "mistakes_in_fp32": wrong,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
