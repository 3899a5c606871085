"""The GELU kernel's own error function, on every FP16 number there is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esm_packed import kernels


@pytest.mark.parametrize("ulps", [0, -1, 1])
def test_gelu_of_every_fp16_number(
    ulps: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ulps:
        # `rcp.approx.ftz` errs by 1 ulp at most (PTX ISA); the interpreter divides.
        if triton_device.type == "cuda":
            pytest.skip("the GPU has a reciprocal of its own")
        monkeypatch.setattr(
            "esm_packed.kernels.gelu.reciprocal", lambda x: (1.0 / x) * (1.0 + ulps * 2.0**-23)
        )
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=triton_device)
    numbers = bits.to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    truth = numbers.double() / 2 * torch.special.erfc(-numbers.double() / 2**0.5)

    # A block as wide as the numbers are many would be slow to interpret; 256 columns are one block.
    single = torch.zeros(-(-len(numbers) // 256) * 256, device=triton_device)
    single[: len(numbers)] = numbers.float()
    half = single.half()
    for states in (single, half):
        kernels.bias_gelu_(states.view(-1, 256), states.new_zeros(256))
    single, half = single[: len(numbers)], half[: len(numbers)]

    # Relative to the result wherever that is at least 1e-5, which PyTorch's own 1 + erf misses by far.
    relative = (single.double() - truth).abs() / truth.abs().clamp(min=1e-5)
    assert float(relative.max()) <= 2e-6
    pytorch = (F.gelu(numbers.float()).double() - truth).abs().max()
    assert (single.double() - truth).abs().max() <= pytorch

    # Correctly rounded but for a few ties; PyTorch on the same numbers errs in hundreds.
    assert int((half != truth.half()).sum()) <= 64


def test_infinite_values_stay_visible(triton_device: torch.device) -> None:
    states = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]], device=triton_device)
    kernels.bias_gelu_(states, states.new_zeros(4))
    assert not states[0, :3].isfinite().any()
    assert states[0, 3].isfinite()
