"""Kernels that form addresses in 32 and in 64 bits: prints what `ttir.int32_products` counts in each."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
from stub_driver import StubDriver
from triton.runtime.driver import driver


@triton.jit
def in_int64(x_ptr, ids_ptr, stride):
    row = tl.program_id(0).to(tl.int64) * stride
    tl.store(x_ptr + row + tl.arange(0, 16), 0.0)


@triton.jit
def in_int32(x_ptr, ids_ptr, stride):
    row = tl.program_id(0) * stride
    tl.store(x_ptr + row + tl.arange(0, 16), 0.0)


@triton.jit
def extended_too_late(x_ptr, ids_ptr, stride):
    row = (tl.program_id(0) * stride).to(tl.int64)
    tl.store(x_ptr + row + tl.arange(0, 16), 0.0)


@triton.jit
def of_loaded_ids(x_ptr, ids_ptr, stride):
    ids = tl.load(ids_ptr + tl.arange(0, 16))
    tl.store(x_ptr + ids * stride, 0.0, mask=ids * 3 < stride)


@triton.jit
def in_a_loop(x_ptr, ids_ptr, stride):
    offset = tl.program_id(0)
    for step in range(0, stride):
        tl.store(x_ptr + offset + step * stride, 0.0)
        offset += tl.load(ids_ptr) * stride


@triton.jit
def in_a_branch(x_ptr, ids_ptr, stride):
    first = tl.program_id(0)
    if first < 3:  # noqa: SIM108
        offset = stride
    else:
        offset = first * stride
    tl.store(x_ptr + offset, 0.0)


driver.set_active(StubDriver(80))
x, ids = torch.zeros(16), torch.zeros(16, dtype=torch.int32)
for kernel in (in_int64, in_int32, extended_too_late, of_loaded_ids, in_a_loop, in_a_branch):
    kernel[(1,)](x, ids, 7)
print(json.dumps({found["kernel"]: found["int32_products"] for found in driver.active.compiled}))
