"""Make Triton's interpreter strict about memory, as no GPU is.

Every address that a kernel loads from or stores to must be an element of the tensor whose pointer it was
formed from. What a masked load without `other` leaves undefined is NaN, or nonsense where it is an integer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

# The upper bits of a pointer, which no address of a process needs, say which argument it belongs to: they
# survive whatever a kernel does with pointers.
_TAG_SHIFT = np.uint64(48)
_ADDRESS = np.uint64((1 << 48) - 1)

_arguments: list[torch.Tensor] = []
"""The tensors of the launch that is running; the first has tag 1."""


def _are_elements(offsets: Any, tensor: torch.Tensor) -> Any:
    """Which of `offsets`, in elements from the first, are elements of `tensor`."""
    if tensor.is_contiguous():
        return (offsets >= 0) & (offsets < tensor.numel())
    rest = offsets
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if stride:
            rest = rest - np.clip(rest // stride, 0, size - 1) * stride
    return (rest == 0) & (tensor.numel() > 0)


def _within_one_argument(used: Any, itemsize: int) -> bool:
    """Whether `used` are elements of one contiguous argument; False where that takes a closer look."""
    lowest, highest = int(used.min()), int(used.max())
    tag = lowest >> int(_TAG_SHIFT)
    if tag != highest >> int(_TAG_SHIFT) or not 1 <= tag <= len(_arguments):
        return False
    tensor = _arguments[tag - 1]
    first = tensor.data_ptr() + (tag << int(_TAG_SHIFT))
    bits = int(np.bitwise_or.reduce(used, axis=None)) | first
    return (
        tensor.is_contiguous()
        and first <= lowest
        and highest <= first + (tensor.numel() - 1) * itemsize
        and bits % itemsize == 0
    )


def _checked(pointers: Any, mask: Any, verb: str) -> Any:
    """The plain addresses of `pointers`.

    Raises:
        IndexError: one that `mask` lets through is no element of its argument.
    """
    used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    plain = _Handle(pointers.data & _ADDRESS, pointers.dtype)
    if not used.size or _within_one_argument(used, itemsize):  # what is allowed is seen at once
        return plain
    for tag in np.unique(used >> _TAG_SHIFT):
        if not 1 <= tag <= len(_arguments):
            raise IndexError(f"the kernel {verb} an address that is in none of its arguments")
        tensor = _arguments[int(tag) - 1]
        addresses = (used[used >> _TAG_SHIFT == tag] & _ADDRESS).astype(np.int64)
        offsets, remainders = np.divmod(addresses - tensor.data_ptr(), itemsize)
        outside = (remainders != 0) | ~_are_elements(offsets, tensor)
        if outside.any():
            raise IndexError(
                f"the kernel {verb} element {offsets[outside][0]} of an argument that has no such element: "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    return plain


def _undefined(shape: tuple[int, ...], dtype: Any) -> Any:
    """NaN; as integers, numbers that are small, negative and large."""
    np_dtype = interpreter._get_np_dtype(dtype)
    if dtype.is_floating():
        nan = np.full(np_dtype.itemsize, 0xFF, np.uint8).view(np_dtype)  # in BF16, held as uint16, too
        return _Handle(np.full(shape, nan, np_dtype), dtype)
    if np_dtype == np.bool_:
        return _Handle(np.ones(shape, np_dtype), dtype)
    limits = np.iinfo(np_dtype)
    return _Handle(np.resize(np.array([1, limits.min, limits.max // 2], np_dtype), shape), dtype)


def _refuse(name: str) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}: {__name__} does not check the addresses of atomic operations")

    setattr(_Builder, name, refuse)


def install() -> None:
    """Patch the interpreter of this process."""
    load, store = _Builder.create_masked_load, _Builder.create_masked_store
    convert, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        addresses = _checked(ptrs, mask, "reads")
        if other is None:
            other = _undefined(ptrs.data.shape, ptrs.get_element_ty())
        return load(self, addresses, mask, other, *rest, **named)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return store(self, _checked(ptrs, mask, "writes"), value, mask, *rest, **named)

    def tagged(argument: Any) -> Any:
        converted = convert(argument)
        if isinstance(argument, torch.Tensor):
            _arguments.append(argument)
            handle = converted.handle
            handle.data = handle.data + (np.uint64(len(_arguments)) << _TAG_SHIFT)
        return converted

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        _arguments.clear()
        return launch(self, *args, **kwargs)

    _Builder.create_masked_load = masked_load
    _Builder.create_masked_store = masked_store
    interpreter._implicit_cvt = tagged
    interpreter.GridExecutor.__call__ = launched
    for name in ("create_atomic_cas", "create_atomic_poll", "create_atomic_rmw"):
        _refuse(name)
