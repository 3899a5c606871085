"""Forward passes: the default model and its profile, precisions, backends, token budgets, tuned settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu.launches import by_position, gpu_kernels
from rates import matmul_rate
from workloads import token_lengths

from esm_packed import ESM2
from esm_packed.attention import BackendError, select_backend
from esm_packed.config import ESM2Config
from esm_packed.graphs import GraphedESM2
from esm_packed.kernels import launch
from esm_packed.kernels.cases import Workload
from esm_packed.kernels.timing import time_call, timed
from esm_packed.numerics import PRECISIONS, Precision
from esm_packed.outputs import mean_of
from esm_packed.packing import SPECIAL_TOKENS, WAVE_ROWS, PackedBatch
from esm_packed.runners.state.cut import sequence_flops

Save = Callable[[dict[str, Any]], None]

MODEL_TOKENS = {"cuda": 32_768, "cpu": 300}
MODEL_NAMES = {"cuda": "esm2_t33_650M_UR50D", "cpu": "esm2_t6_8M_UR50D"}
FORWARD_ROUNDS = {"cuda": 21, "cpu": 2}
BUDGET_MODELS = {
    "cuda": ("esm2_t33_650M_UR50D", "esm2_t30_150M_UR50D", "esm2_t6_8M_UR50D"),
    "cpu": ("esm2_t6_8M_UR50D",),
}
BUDGET_ROUNDS = {"cuda": 7, "cpu": 1}
MODES = PRECISIONS | {
    "fp16_residual_fp16": Precision("fp16_residual_fp16", torch.float16, torch.float16),
}
"""The last one keeps the residual stream in FP16, to measure its gain; tests measure its error."""


def forward_flops(config: ESM2Config, lengths: list[int]) -> int:
    """Operations of the layers on useful tokens; the language-model head is not run."""
    return int(sequence_flops(np.array(lengths) - SPECIAL_TOKENS, config).sum())


def batch_of(workload: Workload) -> PackedBatch:
    """The workload as the model takes it."""
    return PackedBatch(workload.input_ids, workload.cu_seqlens, workload.max_seqlen)


def means(model: ESM2, batch: PackedBatch) -> torch.Tensor:
    """Means of the last layer."""
    name = mean_of(model.config.num_layers)
    return model.embed_packed(batch, [name])[name]


def forward(device: torch.device, save: Save, seconds: float) -> None:
    """The default model in the device's default precision: tokens per second, then a profile of launches."""
    end = time.monotonic() + seconds
    name, lengths = MODEL_NAMES[device.type], token_lengths("uniref", MODEL_TOKENS[device.type])
    model = ESM2.from_pretrained(f"random:{name}", device=device)
    workload = Workload(model.config, lengths, device)
    run = partial(means, model, batch_of(workload))
    found: dict[str, Any] = {"model": name, "dtype": model.precision, "total_tokens": sum(lengths)}
    found |= {"num_sequences": len(lengths), "attention_backend": model.attention_backend}
    found["finite"] = bool(run().isfinite().all())
    save(found)
    rate = found["matmul_flops_per_second"] = matmul_rate(device, model.precision)
    flops = found["flops"] = forward_flops(model.config, lengths)
    times: list[float] = []
    for _ in range(FORWARD_ROUNDS[device.type]):
        times.append(timed(run, device))
        typical = median(times)
        found |= {"seconds": typical, "all_seconds": times, "tokens_per_second": sum(lengths) / typical}
        found["share_of_matmul_rate"] = flops / typical / rate
        save(found)
        if time.monotonic() > end:
            break
    if device.type == "cuda":
        found["profile"] = by_position(gpu_kernels(run), workload, model.config, model.dtype)
        save(found)


def model_speed(device: torch.device, save: Save, seconds: float) -> None:
    """Forward passes with means of the 650M shape: precision modes and attention backends take turns."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"variants": {}}
    name = MODEL_NAMES[device.type]
    lengths = token_lengths("uniref", MODEL_TOKENS[device.type])
    found |= {"model": name, "total_tokens": sum(lengths), "num_sequences": len(lengths)}
    rates = {mode: matmul_rate(device, mode) for mode in ("fp16", "tf32", "fp32")}
    found["matmul_flops_per_second"] = rates
    save(found)

    for dtype, modes in (("fp16", ["fp16", "fp16_residual_fp16"]), ("fp32", ["tf32", "fp32"])):
        if dtype == "fp16" and device.type == "cpu":
            continue
        model = ESM2.from_pretrained(f"random:{name}", device=device, dtype=dtype)
        batch = batch_of(Workload(model.config, lengths, device))
        flops = forward_flops(model.config, lengths)
        variants = _variants(model, modes, batch, found)
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for round_number in range(5):
            for variant, run in variants.items():
                if time.monotonic() > end:
                    found["stopped_early"] = True
                    break
                try:
                    measured = measure(run, device)
                except Exception as error:
                    found["variants"][variant] = {"error": f"{type(error).__name__}: {error}"}
                    continue
                times[variant].append(measured["seconds"])
                mode = variant.split()[0]
                typical = median(times[variant])
                found["variants"][variant] = {
                    "rounds": round_number + 1,
                    "seconds": typical,
                    "all_seconds": times[variant],
                    "tokens_per_second": sum(lengths) / typical,
                    "flops": flops,
                    "share_of_matmul_rate": flops / typical / rates[mode.partition("_")[0]],
                    "peak_memory_bytes": measured["peak_memory_bytes"],
                    "resident_memory_bytes": measured["resident_memory_bytes"],
                }
                save(found)
        del model, variants
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _small_model(device, found, save)


def _variants(
    model: ESM2, modes: Sequence[str], batch: PackedBatch, found: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    """A forward pass for each mode and attention backend that serves it; the others go to `found`."""
    variants: dict[str, Callable[[], object]] = {}
    for mode in modes:
        for attention in ("auto", "varlen", "triton", "sdpa"):
            try:
                backend = select_backend(attention, model.device, MODES[mode], model.config.head_dim)
            except BackendError as error:
                found["variants"][f"{mode} {attention}"] = {"error": str(error)}
                continue
            if attention == "auto":
                found.setdefault("auto_backends", {})[mode] = backend[0]
            computing = model.with_attention(backend, MODES[mode])
            variants.setdefault(f"{mode} {backend[0]}", partial(means, computing, batch))
    return variants


def measure(function: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Seconds of one call, and memory in addition to that allocated before."""
    if device.type != "cuda":
        return {
            "seconds": time_call(function, device, 1)[0],
            "peak_memory_bytes": None,
            "resident_memory_bytes": None,
        }
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = time_call(function, device, 1)[0]
    return {
        "seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "resident_memory_bytes": resident,
    }


def _small_model(device: torch.device, found: dict[str, Any], save: Save) -> None:
    """The 8M model launched from Python, and replayed as a CUDA graph: what launching costs."""
    if device.type != "cuda":
        return
    model = ESM2.from_pretrained("random:esm2_t6_8M_UR50D", device=device, dtype="fp16")
    workload = Workload(model.config, token_lengths("uniref", 4096), device)
    batch = batch_of(workload)
    graphed = partial(GraphedESM2(model).embed_packed, batch, [mean_of(model.config.num_layers)])
    result: dict[str, Any] = {"total_tokens": workload.total_tokens}
    found["8M"] = result
    try:
        result["eager_seconds"] = median(time_call(partial(means, model, batch), device, 20))
        result["graph_seconds"] = median(time_call(graphed, device, 20))
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    save(found)


def swept_budgets(device: torch.device) -> list[int]:
    """Powers of two, and one, two and four waves of this GPU's multiprocessors."""
    if device.type != "cuda":
        return [64, 96]
    wave = WAVE_ROWS * launch.num_multiprocessors(device)
    return sorted({16_384, 32_768, 65_536, wave, 2 * wave, 4 * wave})


def budgets(device: torch.device, save: Save, seconds: float) -> None:
    """Forward passes of full packs of several sizes, which take turns: tokens per second by token budget."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {}
    for name in BUDGET_MODELS[device.type]:
        if time.monotonic() > end:
            found["stopped_early"] = True
            break
        model = ESM2.from_pretrained(f"random:{name}", device=device)
        runs = {}
        for budget in swept_budgets(device):
            workload = Workload(model.config, token_lengths("uniref", budget), device)
            runs[budget] = partial(means, model, batch_of(workload))
            runs[budget]()
        times: dict[int, list[float]] = {budget: [] for budget in runs}
        for _ in range(BUDGET_ROUNDS[device.type]):
            for budget, run in runs.items():
                times[budget].append(timed(run, device))
            found[name] = {
                budget: {
                    "seconds": median(taken),
                    "all_seconds": taken,
                    "tokens_per_second": budget / median(taken),
                }
                for budget, taken in times.items()
            }
            save(found)
            if time.monotonic() > end:
                break
        del model, runs


def tuned_forward(device: torch.device, save: Save, seconds: float, tuned: Path | None = None) -> None:
    """Forward passes without and with the settings that tuning has just found, in turns.

    Args:
        device: where.
        save: keeps what is found.
        seconds: to end in.
        tuned: the file that `esm-packed tune` wrote.
    """
    end = time.monotonic() + seconds
    if tuned is None or not tuned.exists():
        raise SystemExit("no tuned settings to compare")
    settings = json.loads(tuned.read_text())["settings"]
    name, lengths = MODEL_NAMES[device.type], token_lengths("uniref", MODEL_TOKENS[device.type])
    model = ESM2.from_pretrained(f"random:{name}", device=device)
    run = partial(means, model, batch_of(Workload(model.config, lengths, device)))
    live = launch.tuned_settings(device)
    times: dict[str, list[float]] = {"heuristic": [], "tuned": []}
    found: dict[str, Any] = {"model": name, "total_tokens": sum(lengths), "settings": len(settings)}
    for _ in range(FORWARD_ROUNDS[device.type]):
        for variant, taken in times.items():
            live.clear()
            if variant == "tuned":
                live.update(settings)
            taken.append(time_call(run, device, 1)[0])
        found["seconds"] = {variant: median(taken) for variant, taken in times.items()}
        found["all_seconds"] = times
        save(found)
        if time.monotonic() > end:
            break
