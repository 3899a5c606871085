from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_close_as_pytorch

from esm_packed import kernels
from esm_packed.kernels import matmul

SIZES = [(320, 1280), (1280, 320), (2560, 640), (640, 64), (641, 64)]


@pytest.mark.parametrize("in_features, out_features", SIZES)
@pytest.mark.parametrize(
    "dtype, processor",
    [
        *((torch.float32, processor) for processor in ("unpacked", "Intel", "AMD")),
        *((torch.float16, processor) for processor in ("unpacked", "Intel")),  # on which only FP32 depends
        *((torch.bfloat16, processor) for processor in ("unpacked", "Intel")),
        *((torch.float64, processor) for processor in ("unpacked", "Intel")),
    ],
    ids=str,
)
@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("num_rows", [3, 67])
def test_matmul_is_as_close_to_fp64_as_pytorch(
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    gelu: bool,
    num_rows: int,
    processor: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    states = torch.randn(67, in_features).to(dtype)
    weight = torch.randn(out_features, in_features).div(in_features**0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype)

    def in_pytorch(dtype: torch.dtype) -> torch.Tensor:
        result = F.linear(states.to(dtype), weight.to(dtype), bias.to(dtype))
        return F.gelu(result) if gelu else result

    stored = weight
    if processor != "unpacked":
        monkeypatch.setattr(matmul, "_mkl_is_fast", lambda: processor == "Intel")
        stored = matmul.pack_weight(weight)
        by_onednn = dtype != torch.float64 and (dtype.itemsize < 4 or in_features <= 640)
        assert stored.is_mkldnn == (by_onednn and torch.backends.mkldnn.is_available())
        assert torch.equal(stored.to_dense(), weight)
        if stored.is_mkldnn:
            assert matmul.describe(weight.device, dtype).startswith("oneDNN")
        elif dtype == torch.float32 and torch.backends.mkldnn.is_available():
            longer = "MKL" if processor == "Intel" else "in parts of 384"
            assert matmul.describe(weight.device, dtype) == f"oneDNN, {longer} for K > 640"
    multiply = kernels.linear_gelu if gelu else kernels.linear
    # MKL multiplies a few rows in another way, nearer to FP64; the yardstick is its error for many
    rows_at_once = len(states) if dtype == torch.float64 else num_rows
    actual = torch.cat([multiply(rows, stored, bias) for rows in states.split(rows_at_once)])
    assert actual.dtype == dtype
    assert_as_close_as_pytorch(actual, in_pytorch(dtype), in_pytorch(torch.float64))


def test_gelu_is_the_erf_form() -> None:
    """The tanh form differs by up to 4.7e-4."""
    x = torch.linspace(-8, 8, 4001)[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    exact = x.double() / 2 * (1 + torch.erf(x.double() / 2**0.5))
    assert float((kernels.linear_gelu(x, one, zero) - exact).abs().max()) < 1e-6
    assert float((F.gelu(x, approximate="tanh") - exact).abs().max()) > 1e-4


@pytest.mark.parametrize("packed, interleaved", [(False, False), (True, False), (False, True), (True, True)])
def test_linear_rotary_is_the_product_and_then_the_rotation(packed: bool, interleaved: bool) -> None:
    torch.manual_seed(0)
    weight, bias, angles = torch.randn(3 * 4 * 24, 96) / 10, torch.randn(3 * 4 * 24), torch.rand(9, 12)
    states, position_ids = torch.randn(11, 96), torch.tensor([*range(2), *range(9)], dtype=torch.int32)
    expected = F.linear(states, weight, bias).view(11, 3, 4, 24)
    kernels.rotary_qk_(expected, angles.cos(), angles.sin(), position_ids)
    if interleaved:
        matmul.interleave_heads_(weight, 24)
        matmul.interleave_heads_(bias, 24)
    stored = matmul.pack_weight(weight) if packed else weight
    tables = angles.cos(), angles.sin()
    actual = kernels.linear_rotary(states, stored, bias, *tables, position_ids, interleaved)
    if interleaved:
        matmul.separate_heads_(actual.T, 24)
    torch.testing.assert_close(actual, expected.view(11, -1), rtol=1e-5, atol=1e-5)


def test_strided_operands_are_served() -> None:
    torch.manual_seed(0)
    states, weight, bias = torch.randn(65, 640)[:, ::2], torch.randn(48, 640)[:, ::2], torch.randn(48)
    actual, expected = kernels.linear(states, weight, bias), F.linear(states, weight, bias)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
