"""What the operating system says about the processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def _cpu_info() -> str:
    """/proc/cpuinfo; empty on systems without it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def is_intel() -> bool:
    """Whether the processor is Intel's."""
    return "GenuineIntel" in _cpu_info()


def bf16_instructions() -> str | None:
    """The instruction set that multiplies matrices in BF16, as /proc/cpuinfo spells it, or None."""
    words = set(_cpu_info().split())
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in words), None)
