"""Compile every launch for GPUs that are not here, and say what each kernel needs of them.

python tests/support/offline_compile.py --full --table tests/kernels/compile_table.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from stub_driver import StubDriver
from triton.runtime.driver import driver

from esm_packed.config import ESM2_MODELS
from esm_packed.kernels import (
    attention,
    embedding,
    gelu,
    gemm,
    launch,
    layernorm,
    numerics_check,
    pooling,
    rotary,
)

CAPABILITIES = (75, 80, 86, 89, 90, 100)
SINCE = {"packed_attention": 80, "gemm_bias_gelu": 80}
"""Kernels that older GPUs do not run: attention is SDPA's there, and fc1 is never fused."""
HALF_TYPES = (torch.float16, torch.bfloat16)
TOTAL_TOKENS = 233
CU_SEQLENS = torch.tensor([0, 100, TOTAL_TOKENS], dtype=torch.int32)

Case = tuple[str, Callable[[], object]]


def cases(hidden_size: int, num_heads: int, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Every launch of a forward pass, in the combinations of dtypes the model may use."""
    head_dim, ffn_size = hidden_size // num_heads, 4 * hidden_size
    token_ids = torch.zeros(TOTAL_TOKENS, dtype=torch.int32)
    cos = torch.zeros(TOTAL_TOKENS, head_dim // 2)
    for dtype in dtypes:
        name = launch.dtype_name(dtype)
        hidden_states = torch.zeros(TOTAL_TOKENS, hidden_size, dtype=dtype)
        weight = torch.zeros(hidden_size, dtype=dtype)
        qkv = torch.zeros(TOTAL_TOKENS, 3, num_heads, head_dim, dtype=dtype)

        def size(kernel: str, width: int, types: str = name) -> str:
            return f"{kernel}/{width}/{types}"

        for residual_dtype in {dtype, torch.float32}:
            residual = hidden_states.to(residual_dtype)
            types = f"{name}+{launch.dtype_name(residual_dtype)}"
            yield (
                size("embed_tokens", hidden_size, types),
                lambda d=residual_dtype, w=hidden_states: embedding.embed_tokens(
                    token_ids, CU_SEQLENS, w, 32, d
                ),
            )
            yield (
                size("layer_norm", hidden_size, types),
                lambda r=residual, w=weight: layernorm.layer_norm(r, w, w, 1e-5),
            )
            yield (
                size("add_layer_norm_", hidden_size, types),
                lambda h=hidden_states, r=residual, w=weight: layernorm.add_layer_norm_(h, r, w, w, 1e-5),
            )
        yield (
            size("rotary_qk_", head_dim),
            lambda q=qkv: rotary.rotary_qk_(q, cos, cos, token_ids),
        )
        yield (
            size("rotary_qk_packed_", head_dim),
            lambda q=qkv: rotary.rotary_qk_packed_(q, cos, cos, CU_SEQLENS),
        )
        for width in (hidden_size, ffn_size):
            yield (
                size("bias_gelu_", width),
                lambda n=width, d=dtype: gelu.bias_gelu_(
                    torch.zeros(TOTAL_TOKENS, n, dtype=d), torch.zeros(n, dtype=d)
                ),
            )
        for precision in ("ieee", "tf32", "tf32x3") if dtype == torch.float32 else ("ieee",):
            yield (
                size("packed_attention", head_dim, name if dtype in HALF_TYPES else precision),
                lambda q=qkv, p=precision: attention.packed_attention(
                    *q.unbind(1), CU_SEQLENS, 133, 0.125, p
                ),
            )
        if dtype in HALF_TYPES:
            yield (
                size("gemm_bias_gelu", hidden_size),
                lambda h=hidden_states, d=dtype: gemm.gemm_bias_gelu(
                    h, torch.zeros(ffn_size, hidden_size, dtype=d), torch.zeros(ffn_size, dtype=d)
                ),
            )
        yield (
            size("segment_mean", hidden_size),
            lambda h=hidden_states: pooling.segment_mean(h, CU_SEQLENS),
        )
        yield (
            size("check_numerics", hidden_size),
            lambda h=hidden_states: numerics_check.check_numerics(h, CU_SEQLENS),
        )


def compile_all(
    capabilities: tuple[int, ...], full: bool, only: tuple[str, ...] = ()
) -> dict[str, dict[str, dict[str, Any]]]:
    """Case to capability to what `stub_driver.resources` found.

    Args:
        capabilities: compute capabilities, 90 for sm_90.
        full: all models and dtypes, else 650M in FP16 and FP32.
        only: kernels to compile, all when empty.
    """
    models = ESM2_MODELS if full else {"": ESM2_MODELS["esm2_t33_650M_UR50D"]}
    dtypes = (torch.float16, torch.bfloat16, torch.float32) if full else (torch.float16, torch.float32)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for capability in capabilities:
        stub = StubDriver(capability)
        driver.set_active(stub)
        launch.capability = lambda device, capability=capability: capability
        launch.num_multiprocessors = lambda device: 132
        for config in models.values():
            for name, run in cases(config.hidden_size, config.num_heads, dtypes):
                kernel = name.split("/")[0]
                if (only and kernel not in only) or capability < SINCE.get(kernel, 0):
                    continue
                entry = found.setdefault(name, {})
                if str(capability) in entry:
                    continue
                before = len(stub.compiled)
                run()
                for needs in stub.compiled[before:]:
                    entry[str(capability)] = needs
        print(f"sm_{capability}: {len(stub.compiled)} kernels", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--full", action="store_true", help="all models and dtypes")
    parser.add_argument("--only", nargs="+", default=(), help="kernels, such as rotary_qk_")
    parser.add_argument("--table", type=Path, help="record the results under this Triton's version")
    options = parser.parse_args()
    found = compile_all(tuple(options.capabilities), options.full, tuple(options.only))
    if options.table is None:
        json.dump({"triton": triton.__version__, "kernels": found}, sys.stdout)
        return
    table = json.loads(options.table.read_text()) if options.table.exists() else {}
    recorded = table.setdefault(triton.__version__, {})
    for name, entry in found.items():
        recorded[name] = {
            quantity: {capability: needs[quantity] for capability, needs in entry.items()}
            for quantity in ("registers", "int32_products")
        }
    lines = (
        f'"{version}": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
        + "\n}"
        for version, entries in sorted(table.items())
    )
    options.table.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
