"""One name for each operation: Triton on a GPU, plain PyTorch elsewhere, opaque to `torch.compile`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

TRITON_DEVICES = {"cuda"} if importlib.util.find_spec("triton") else set()
"""Types of device whose tensors Triton kernels compute (ROCm calls itself cuda, too)."""


_operations: dict[str, Any] = {}


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` run as Triton kernels; FP64, the reference mode, never does."""
    return tensor.device.type in TRITON_DEVICES and tensor.dtype != torch.float64


def operation(
    eager: Callable[P, R],
    module: str,
    like: Callable[[Any], R] | None = None,
    *,
    mutates: Iterable[str] = (),
    decides: str | None = None,
) -> Callable[P, R]:
    """Join the implementations of one operation, and register it as `torch.ops.esm_packed.NAME`.

    Called in eager mode the implementation runs directly: going through torch's dispatcher costs more time
    than some of these kernels take.

    Args:
        eager: plain PyTorch; its name, signature and docstring are the operation's.
        module: submodule of `esm_packed.kernels` whose function of the same name launches Triton kernels.
        like: of a namespace of the arguments makes empty results of the right shape, for tracing; None where
            nothing is returned.
        mutates: arguments modified in place.
        decides: the argument whose device and dtype choose the implementation; the first by default.
    """
    name = eager.__name__
    if name in _operations:
        # transformers imports this directory again, as `kernels`, if the repository is on sys.path.
        # Registering an operation again would remove the one in use.
        existing: Callable[P, R] = _operations[name]
        return existing
    arguments = list(eager.__annotations__)
    decides = decides or arguments[0]
    position = arguments.index(decides)

    @cache
    def launcher() -> Callable[P, R]:
        function: Callable[P, R] = getattr(importlib.import_module(f"esm_packed.kernels.{module}"), name)
        return function

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor: Any = args[position] if len(args) > position else kwargs[decides]
        if not uses_triton(tensor):
            return eager(*args, **kwargs)
        if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
            return launcher()(*args, **kwargs)
        with torch.cuda.device(tensor.device):  # Triton launches on the current device
            return launcher()(*args, **kwargs)

    registered = _registered(eager, run, like, tuple(mutates))

    @wraps(eager)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            traced: R = registered(*args, **kwargs)
            return traced
        return run(*args, **kwargs)

    _operations[name] = call
    return call


def _registered(
    eager: Callable[P, R], run: Callable[P, R], like: Callable[[Any], R] | None, mutates: tuple[str, ...]
) -> Any:
    """`run` as an operation of torch with the signature of `eager`."""
    schema = torch.library.infer_schema(eager, mutates_args=mutates)
    registered: Any = torch.library.custom_op(
        f"esm_packed::{eager.__name__}", run, mutates_args=mutates, schema=schema
    )
    signature = inspect.signature(eager)

    def fake(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return like(SimpleNamespace(**signature.bind(*args, **kwargs).arguments)) if like else None

    registered.register_fake(fake)
    return registered
