"""The whole model with every operation as a Triton kernel, attention among them, equals fair-esm 2.0.0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fair_esm_reference
import numpy as np
import pytest
import torch
from tolerances import relative_error

from esm_packed import ESM2, kernels
from esm_packed.alphabet import encode
from esm_packed.kernels import launch
from esm_packed.packing import pack

NUM_LAYERS = 2
LAYERS = range(NUM_LAYERS + 1)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def proteins() -> list[str]:
    """One masked in part, one across a block of attention, and short ones."""
    plain = fair_esm_reference.random_sequences([70, 30, 1, 17], seed=1)
    return [plain[0], plain[1][:10] + "<mask>" * 8 + plain[1][10:], *plain[2:]]


@dataclass(frozen=True)
class Case:
    checkpoint: Path
    sequences: list[str]
    truth: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("checkpoint") / f"esm2_head_dim{request.param}.pt"
    fair_esm_reference.write_checkpoint(
        path, num_layers=NUM_LAYERS, num_heads=3, head_dim=request.param, seed=request.param
    )
    return Case(path, proteins(), by_fair_esm(path, "fp64", proteins()))


def by_fair_esm(checkpoint: Path, dtype: str, sequences: list[str]) -> dict[str, torch.Tensor]:
    """fair-esm's results of single sequences, laid end to end as ours are."""
    model = fair_esm_reference.load(checkpoint, DTYPES[dtype])
    return fair_esm_reference.end_to_end(fair_esm_reference.run(model, sequences))


def by_triton(case: Case, dtype: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The same of all sequences in one pack."""
    model = ESM2.from_pretrained(case.checkpoint, device=device, dtype=dtype)
    model = model.with_attention(("triton", kernels.packed_attention))
    batch = pack([encode(sequence) for sequence in case.sequences]).to(device)
    output = model.forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen, LAYERS, return_logits=True
    )
    assert output.logits is not None
    means = {
        f"mean {layer}": kernels.segment_mean(output.representations[layer], batch.cu_seqlens)
        for layer in LAYERS
    }
    layers = {f"layer {layer}": output.representations[layer] for layer in LAYERS}
    return {name: tensor.cpu() for name, tensor in (layers | means | {"logits": output.logits}).items()}


QUICK = [(16, "fp16"), (24, "fp32"), (32, "bf16")]
"""Each head_dim and each dtype once; each of the others takes 3 s in the interpreter."""


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(head_dim, dtype, marks=() if (head_dim, dtype) in QUICK else pytest.mark.slow)
        for head_dim in (16, 24, 32)
        for dtype in ("fp32", "fp16", "bf16")
    ],
    indirect=["case"],
)
def test_the_model_is_within_twice_the_error_of_fair_esm(
    case: Case, dtype: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, in FP32 too: four sequences have few means, whose errors scatter. In BF16 products are fused."""
    if dtype == "bf16":
        hidden_size = case.truth["layer 0"].shape[1]
        for operation in ("linear_gelu", "linear_rotary"):
            key = launch.settings_key(operation, hidden_size, torch.bfloat16)
            monkeypatch.setitem(launch.tuned_settings(triton_device), key, {"FUSED": 1})
    fair = by_fair_esm(case.checkpoint, dtype, case.sequences)
    for name, actual in by_triton(case, dtype, triton_device).items():
        truth = case.truth[name]
        assert actual.shape == truth.shape
        assert relative_error(actual, truth) <= 2 * relative_error(fair[name], truth), name


@pytest.mark.parametrize("case", [24], indirect=True)
@pytest.mark.parametrize(
    "dtype, bound",
    [pytest.param("fp32", 1e-4, marks=pytest.mark.slow), ("fp16", 1e-2)],  # 3 s each
)
def test_contacts_are_those_of_double_precision(
    case: Case, dtype: str, bound: float, triton_device: torch.device
) -> None:
    sequences = case.sequences[1:]
    exact = ESM2.from_pretrained(case.checkpoint, device="cpu", dtype="fp64").contacts(sequences)
    model = ESM2.from_pretrained(case.checkpoint, device=triton_device, dtype=dtype)
    together = model.with_attention(("triton", kernels.packed_attention)).contacts(sequences)
    for actual, expected in zip(together, exact, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
