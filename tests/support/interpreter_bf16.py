"""Make Triton's interpreter right for BF16: FP32 arithmetic, stores rounded to nearest even.

It holds BF16 as uint16: arithmetic on it is garbage, and FP32 values stored as BF16 are cut off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _widen(handle: Any) -> Any:
    if isinstance(handle, _Handle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return handle


def _round(values: Any) -> Any:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(argument: Any) -> bool:
    return (
        isinstance(argument, _Handle) and not argument.dtype.is_ptr() and argument.dtype.scalar == tl.bfloat16
    )


def _wrap(name: str) -> None:
    original = getattr(_Builder, name)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(_is_bf16(argument) for argument in args):
            return original(self, *args, **kwargs)
        result = original(self, *[_widen(argument) for argument in args], **kwargs)
        if result.dtype.scalar == tl.float32:
            result = _Handle(_round(result.data), tl.bfloat16)
        return result

    setattr(_Builder, name, wrapped)


def install() -> None:
    """Patch the interpreter of this process."""
    for name in ("binary_op", "unary_op", "ternary_op"):
        _wrap(name)

    dot, cast_impl, fp_to_fp = _Builder.create_dot, _Builder.cast_impl, _Builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), accumulator, *rest)

    def cast(self: Any, source: Any, target: Any) -> Any:
        source_is_bf16, target_is_bf16 = (dtype.scalar == tl.bfloat16 for dtype in (source.dtype, target))
        if source_is_bf16 and not target_is_bf16:
            widened = _widen(source)
            return widened if target.scalar == tl.float32 else cast_impl(self, widened, target)
        if target_is_bf16 and not source_is_bf16:
            return _Handle(_round(source.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    _Builder.create_dot = create_dot
    _Builder.cast_impl = cast
    _Builder.create_fp_to_fp = create_fp_to_fp
