from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_close_as_pytorch, relative_error

from esm_packed import attention
from esm_packed.kernels import dispatch
from esm_packed.kernels.reference import packed_attention
from esm_packed.numerics import PRECISIONS

CPU = torch.device("cpu")


def packed_qkv(
    lengths: list[int], head_dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 4, head_dim).to(dtype)
    return list(qkv.unbind(1)), F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[7], [3] * 50, [129, 64, 64, 64, 17, 3, 17], [300, 5, 5, 4], [5, 0, 0, 6]],
    ids=["one", "short", "runs", "long", "empty"],
)
def test_sdpa_equals_the_reference(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    (query, key, value), cu_seqlens = packed_qkv(lengths, head_dim, dtype)
    scale = head_dim**-0.5
    arguments = (cu_seqlens, max(lengths), scale)
    truth = packed_attention(query.double(), key.double(), value.double(), *arguments)
    actual = attention.sdpa_attention(query, key, value, *arguments)
    assert actual.is_contiguous()
    if dtype == torch.float64:
        assert relative_error(actual, truth) <= 1e-14
    else:
        assert_as_close_as_pytorch(actual, packed_attention(query, key, value, *arguments), truth)


@pytest.mark.parametrize(
    "dtype, length, extended",
    [
        (torch.bfloat16, 23, 32),
        (torch.bfloat16, 20, 20),
        (torch.bfloat16, 975, 975),
        (torch.float32, 23, 23),
    ],
    ids=str,
)
def test_keys_are_extended_where_that_is_faster(
    dtype: torch.dtype, length: int, extended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    (query, key, value), cu_seqlens = packed_qkv([length, length, 3], 16, dtype)
    assert attention.extend_keys(key[None, :length], value[None, :length])[0].shape[1] == extended
    arguments = (cu_seqlens, length, 0.25)
    truth = packed_attention(query.double(), key.double(), value.double(), *arguments)
    actual = attention.sdpa_attention(query, key, value, *arguments)
    assert_as_close_as_pytorch(actual, packed_attention(query, key, value, *arguments), truth)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert attention.extend_keys(key[None, :length], value[None, :length])[0].shape[1] == length


def test_auto_takes_sdpa_on_a_cpu_and_the_reference_for_fp64() -> None:
    assert attention.select_backend("auto", CPU, PRECISIONS["fp32"], 64)[0] == "sdpa"
    assert attention.select_backend("auto", CPU, PRECISIONS["fp64"], 64)[0] == "reference"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("varlen", "it runs on CUDA devices, not on cpu"),
        ("triton", "it runs on CUDA devices, not on cpu"),
        ("flash3", "it runs on CUDA devices, not on cpu"),
        ("warp", "'warp' is not known; choose from auto"),
    ],
)
def test_a_backend_that_cannot_serve_says_why_and_what_would(name: str, reason: str) -> None:
    with pytest.raises(attention.BackendError, match=reason) as error:
        attention.select_backend(name, CPU, PRECISIONS["fp32"], 64)
    assert "sdpa" in str(error.value)


@pytest.mark.parametrize(
    "name, how",
    [
        ("flash2", "pip install --no-build-isolation flash-attn"),
        ("flash3", "hopper"),
        ("fa3_fwd", "pip install fa3-fwd"),
        ("flash4", "pip install flash-attn-4"),
    ],
)
def test_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(attention.BackendError, match=f"is not installed: .*{re.escape(how)}"):
        attention.select_backend(name, torch.device("cuda"), PRECISIONS["bf16"], 64)
    with pytest.raises(attention.BackendError) as error:
        attention.select_backend(name, CPU, PRECISIONS["bf16"], 64)
    assert "install" not in str(error.value), "it would not serve there either"


def test_the_package_promises_no_extra_that_pip_cannot_build() -> None:
    """flash-attn's build imports torch, which pip's isolated builds do not have."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert "flash" not in project["optional-dependencies"]
    assert not any("flash" in line for lines in project["optional-dependencies"].values() for line in lines)


@pytest.mark.parametrize(
    "dtype, head_dim, major, reason",
    [
        (torch.float32, 64, 9, "it computes in float16 and bfloat16, not in float32"),
        (torch.float16, 20, 9, "head_dim 20 is not a multiple of 8"),
        (torch.float16, 64, 7, "sm_7x"),
        (torch.float16, 24, 8, None),
    ],
)
def test_obstacles_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, major: int, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    obstacle = attention.BACKENDS["varlen"].obstacle(torch.device("cuda"), dtype, head_dim)
    assert obstacle is None if reason is None else obstacle is not None and reason in obstacle


@pytest.mark.parametrize(
    "mode, expected",
    [("fp16", "varlen"), ("bf16", "varlen"), ("fp32", "triton"), ("tf32", "triton"), ("fp64", "reference")],
)
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, mode: str, expected: str) -> None:
    """FP32 and TF32, which no FlashAttention computes, are packed all the same."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU that was never tuned")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cuda"})
    name, attend = attention.select_backend("auto", torch.device("cuda"), PRECISIONS[mode], 64)
    assert name == expected
    if name == "triton":
        assert attend.keywords == {"input_precision": "tf32" if mode == "tf32" else "ieee"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["fp16", "bf16", "fp32", "tf32"])
def test_a_gpu_older_than_sm_80_takes_sdpa(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """There our Triton attention spills hundreds of registers, and no FlashAttention runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cuda"})
    device = torch.device("cuda")
    name, attend = attention.select_backend("auto", device, PRECISIONS[mode], 64)
    assert (name, attend) == ("sdpa", attention.sdpa_attention)
    with pytest.raises(attention.BackendError) as error:
        attention.select_backend("triton", device, PRECISIONS[mode], 64)
    assert str(error.value) == (
        "attention 'triton' is unavailable: on Tesla T4 (sm_75) it runs out of registers and would be slow, "
        "it needs sm_80 or newer; choose from sdpa, reference"
    )


def test_without_triton_fp32_on_a_gpu_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU that was never tuned")
    device = torch.device("cuda")
    assert attention.select_backend("auto", device, PRECISIONS["fp32"], 64)[0] == "sdpa"
    with pytest.raises(attention.BackendError, match="Triton is not installed: pip install triton"):
        attention.select_backend("triton", device, PRECISIONS["fp32"], 64)


def stand_in(calls: list[dict[str, Any]], returns_tuple: bool) -> ModuleType:
    """A module with FlashAttention's function over the reference."""
    module = ModuleType("flash_attn")

    def flash_attn_varlen_func(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any
    ) -> Any:
        calls.append(named)
        out = packed_attention(
            query, key, value, named["cu_seqlens_q"], named["max_seqlen_q"], named["softmax_scale"]
        )
        return (out, None) if returns_tuple else out

    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("returns_tuple", [False, True])
@pytest.mark.parametrize("version, warns", [("2.5.9", True), ("2.8.3.post2", False)])
def test_flash_attn_is_called_with_its_own_spelling(
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    returns_tuple: bool,
    version: str,
    warns: bool,
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in(calls, returns_tuple))
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    attend = attention.BACKENDS["flash2"].load(PRECISIONS["fp16"])
    (query, key, value), cu_seqlens = packed_qkv([5, 9], 16, torch.float32)
    actual = attend(query, key, value, cu_seqlens, 9, 0.25)
    assert torch.equal(actual, packed_attention(query, key, value, cu_seqlens, 9, 0.25))
    assert calls[0]["max_seqlen_k"] == 9
    assert calls[0]["cu_seqlens_k"] is cu_seqlens
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == warns
    for message in messages:
        for said in ("flash-attn 2.5.9", "torch 2.3", "'varlen'", "pip install"):
            assert said in message
