"""That the interpreter the kernels are tested in is strict about memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from esm_packed import kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU, not in the interpreter"
)


@triton.jit
def _copy_kernel(source_ptr, target_ptr, num_read, num_written, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(source_ptr + index, mask=index < num_read)
    tl.store(target_ptr + index, value, mask=index < num_written)


def copy(source: torch.Tensor, target: torch.Tensor, num_read: int, num_written: int) -> None:
    launch: Any = _copy_kernel[(1,)]
    launch(source, target, num_read, num_written, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_masked_lane_without_other_reads_nan(dtype: torch.dtype) -> None:
    source, target = torch.arange(10).to(dtype), torch.zeros(16, dtype=dtype)
    copy(source, target, 10, 16)
    assert torch.equal(target[:10], source)
    assert target[10:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_masked_lane_of_integers_reads_nonsense_of_every_kind(dtype: torch.dtype) -> None:
    target = torch.zeros(16, dtype=dtype)
    copy(torch.arange(10, dtype=dtype), target, 10, 16)
    undefined = target[10:]
    assert (undefined < 0).any()
    assert (undefined == 1).any()
    assert (undefined > 1 << 29).any()


@pytest.mark.parametrize("num_read, num_written, verb", [(11, 10, "reads"), (10, 13, "writes")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
def test_an_element_behind_the_argument_is_refused(
    num_read: int, num_written: int, verb: str, dtype: torch.dtype
) -> None:
    """Though it lies in the same allocation, and though it belongs to another argument."""
    memory = torch.zeros(32, dtype=dtype)
    source, target = memory[:10], memory[10 : 10 + 12]
    with pytest.raises(InterpreterError, match=f"{verb} element 1[02] of an argument"):
        copy(source, target, num_read, num_written)
    copy(source, target, 10, 12)


def test_what_lies_between_the_elements_of_a_view_is_refused() -> None:
    memory = torch.zeros(4, 3, 4)
    target = torch.zeros(16)
    copy(memory[:, 1], target, 4, 4)
    with pytest.raises(InterpreterError, match="reads element 4 of an argument"):
        copy(memory[:, 1], target, 5, 4)


def test_an_empty_argument_has_no_element() -> None:
    with pytest.raises(InterpreterError, match="reads element 0 of an argument"):
        copy(torch.zeros(0), torch.zeros(16), 1, 1)


def test_rotary_is_stopped_at_the_end_of_its_table(triton_device: torch.device) -> None:
    table = torch.ones(5, 8)
    qkv = torch.ones(6, 3, 1, 16)
    with pytest.raises(InterpreterError, match=r"reads element 40 of an argument .* of shape \(5, 8\)"):
        kernels.rotary_qk_(qkv, table, table, torch.arange(6, dtype=torch.int32))
