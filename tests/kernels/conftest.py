from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # importing torch takes seconds, also where tests are only handed out
    import torch

    from esm_packed.kernels.cases import Arguments


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds NaN or nonsense, and lies between guards of Inf that must stay as they are."""
    import torch
    from triton_runs import GUARD, is_poison, poison_of

    guards: list[torch.Tensor] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> torch.Tensor:
        shape = torch.Size(size if all(isinstance(extent, int) for extent in size) else size[0])
        dtype = dtype or torch.get_default_dtype()
        buffer = torch.full((shape.numel() + 2 * GUARD,), poison_of(dtype), dtype=dtype, device=device)
        guards.extend((buffer[:GUARD], buffer[GUARD + shape.numel() :]))
        result = buffer[GUARD : GUARD + shape.numel()].view(shape)
        return result.fill_(float("nan")) if dtype.is_floating_point else result

    def empty_like(
        like: torch.Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
    ) -> torch.Tensor:
        return empty(like.shape, dtype=dtype or like.dtype, device=device or like.device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    monkeypatch.undo()
    assert all(is_poison(guard) for guard in guards), "a kernel wrote outside of its arguments and results"


@pytest.fixture
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=["pointers", "tma"])
def gemm_device(
    request: pytest.FixtureRequest, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> torch.device:
    """The device, with fused products moving their tiles by pointers or by TMA descriptors."""
    from esm_packed.kernels import launch

    use_tma = request.param == "tma"
    if use_tma and triton_device.type == "cuda" and launch.capability(triton_device) < 90:
        pytest.skip("this GPU has no TMA")
    monkeypatch.setattr(launch, "capability", lambda device: 90 if use_tma else 0)
    return triton_device


@pytest.fixture
def launches(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Arguments]]:
    """Every Triton kernel launched: its name, and its keyword arguments."""
    from esm_packed.kernels.gelu import _bias_gelu_kernel

    recorded: list[tuple[str, Arguments]] = []
    jit_function: Any = type(_bias_gelu_kernel)
    original = jit_function.__getitem__

    def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
        def launch_recorded(*args: Any, **kwargs: Any) -> Any:
            recorded.append((kernel.fn.__name__, kwargs))
            return original(kernel, grid)(*args, **kwargs)

        return launch_recorded

    monkeypatch.setattr(jit_function, "__getitem__", getitem)
    return recorded
