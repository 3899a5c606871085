"""Make Triton's interpreter faster.

It patches its language anew in every call of a device function, describes the type of every value anew, and
computes integers again in 64 bits, to see whether they fit, at which it looks in its debug mode only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

TENSOR_INIT, BLOCK_TYPE_INIT = core.tensor.__init__, core.block_type.__init__
"""Triton's own."""


@cache
def _languages(function: Callable[..., Any]) -> frozenset[int]:
    """Which modules the interpreter patches to run `function`."""
    return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)


def _describe_types_once() -> None:
    """Make what follows from a type once: its shape and name, the shapes of its tensors, numpy's dtype."""
    known: dict[Any, dict[str, Any]] = {}

    def init_block_type(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        key = element_ty.name, sizes
        if key not in known:
            BLOCK_TYPE_INIT(self, element_ty, shape)
            shape_of_tensors = core.tuple([core.constexpr(size) for size in self.shape])
            extra = {"shape_of_tensors": shape_of_tensors, "numel_of_tensors": core.constexpr(self.numel)}
            known[key] = self.__dict__ | extra
        self.__dict__ = known[key].copy()

    scalar = {"shape_of_tensors": core.tuple([]), "numel_of_tensors": core.constexpr(1)}

    def init_tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
        about = type.__dict__ if isinstance(type, core.block_type) else scalar
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = about["shape_of_tensors"], about["numel_of_tensors"]

    core.block_type.__init__ = init_block_type
    core.tensor.__init__ = init_tensor

    numpy_dtype = interpreter._get_np_dtype
    numpy_dtypes: dict[str, Any] = {}

    def numpy_dtype_of(dtype: core.dtype) -> Any:
        if dtype.name not in numpy_dtypes:
            numpy_dtypes[dtype.name] = numpy_dtype(dtype)
        return numpy_dtypes[dtype.name]

    interpreter._get_np_dtype = numpy_dtype_of


def install() -> None:
    """Patch the interpreter of this process."""
    _describe_types_once()
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[int]] = set()

    def patch_once(function: Callable[..., Any]) -> Any:
        """All that is patched stays so until the launch is over."""
        languages = _languages(function)
        if languages in patched:
            return None
        patched.add(languages)
        return patch(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launched
