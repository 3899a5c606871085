from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from esm_packed.kernels import intrinsics


@pytest.mark.parametrize(
    "target, interpreted, expected",
    [
        (GPUTarget("cuda", 90, 32), False, True),
        (GPUTarget("cuda", 90, 32), True, False),
        (GPUTarget("hip", "gfx942", 64), False, False),
        (None, False, False),
    ],
)
def test_ptx_is_for_compiled_kernels_on_nvidia_gpus(
    target: GPUTarget | None, interpreted: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.language.target_info.current_target", lambda: target)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    assert intrinsics.has_ptx() is expected
