"""A module named `flash_attn` for packages that import it, if the real one is missing.

It computes with the best attention backend of `esm_packed.attention`: on a GPU PyTorch's `varlen_attn`, which
is also FlashAttention 2.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from esm_packed.attention import select_backend
from esm_packed.numerics import PRECISIONS

_MODES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Like flash-attn's function of this name, for self-attention without dropout or causal mask."""
    assert cu_seqlens_q is cu_seqlens_k
    assert dropout_p == 0.0
    assert not causal
    head_dim = q.shape[-1]
    _, attend = select_backend("auto", q.device, PRECISIONS[_MODES[q.dtype]], head_dim)
    return attend(
        q, k, v, cu_seqlens_q, max_seqlen_q, head_dim**-0.5 if softmax_scale is None else softmax_scale
    )


def _padding_is_not_served(*_: Any) -> None:
    raise NotImplementedError("the stand-in for flash_attn serves packed sequences only")


@contextmanager
def flash_attn_importable() -> Iterator[str]:
    """Let `import flash_attn` succeed within the block.

    Yields:
        What is used: `flash_attn`, or `flash_attn stand-in`.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        yield "flash_attn"
        return
    module, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    module.__spec__ = ModuleSpec("flash_attn", None)  # packages check whether it exists
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    padding.pad_input = padding.unpad_input = _padding_is_not_served  # type: ignore[attr-defined]
    sys.modules |= {"flash_attn": module, "flash_attn.bert_padding": padding}
    try:
        yield "flash_attn stand-in"
    finally:  # other packages also look for flash_attn
        del sys.modules["flash_attn"], sys.modules["flash_attn.bert_padding"]
