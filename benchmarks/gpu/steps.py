"""What `check.py` runs in processes of its own: `python steps.py NAME --device D --out FILE`.

The JSON file is written anew after every step, so that a step that hangs does not take the others with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from kernel_baselines import MODEL_SIZES, kernel_dtypes
from rates import matmul_rate
from workloads import proteins, token_lengths, write_fasta

from esm_packed import ESM2
from esm_packed.attention import BackendError, select_backend
from esm_packed.checkpoints import Checkpoint, save_fair_esm, tensor_shapes
from esm_packed.config import DEFAULT_TOKEN_BUDGETS, ESM2_MODELS, ESM2Config
from esm_packed.graphs import GraphedESM2
from esm_packed.kernels.cases import Workload
from esm_packed.kernels.launch import dtype_name
from esm_packed.kernels.timing import time_call
from esm_packed.numerics import PRECISIONS, Precision
from esm_packed.outputs import mean_of
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch, pack
from esm_packed.runners.state.cut import sequence_flops
from esm_packed.stress import stress_checkpoint

Save = Callable[[dict[str, Any]], None]

MODEL_TOKENS = {"cuda": 32768, "cpu": 300}
MODEL_NAMES = {"cuda": "esm2_t33_650M_UR50D", "cpu": "esm2_t6_8M_UR50D"}
MEMORY_MODELS = {
    "cuda": ("esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D", "esm2_t48_15B_UR50D"),
    "cpu": ("esm2_t6_8M_UR50D",),
}
MEMORY_TOKENS = {"cuda": (8192, 32768), "cpu": (64, 128)}
VALIDATION_TOKENS = {"cuda": 100_000, "cpu": 400}
PROFILED_KERNELS = 25
MODES = PRECISIONS | {
    "fp16_residual_fp16": Precision("fp16_residual_fp16", torch.float16, torch.float16),
}
"""The last keeps the residual stream in FP16: what it would gain beside what the tests say it costs."""


def machine(device: torch.device, save: Save, seconds: float) -> None:
    """Versions and the GPU, as torch sees them."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cpu_threads": torch.get_num_threads(),
        "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
    }
    save(found)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
        save(found)


def _version(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def every_launcher(device: torch.device, save: Save, seconds: float) -> None:
    """Each launcher once on a small pack, for a memory checker to watch."""
    launched = []
    workload = Workload(MODEL_SIZES["8M"], [65, 3, 130, 17, 64, 1], device)
    for case, dtype in kernel_dtypes():
        if dtype == torch.bfloat16 or (device.type == "cpu" and case.direct):
            continue
        case.function(**case.arguments(workload, dtype))
        if device.type == "cuda":
            torch.cuda.synchronize()
        launched.append(f"{case} {dtype_name(dtype)}")
        save({"launched": launched})
    print(f"launched {len(launched)} kernels", flush=True)


def forward_flops(config: ESM2Config, lengths: list[int]) -> int:
    """Operations of the layers on useful tokens; the language-model head is not run."""
    return int(sequence_flops(np.array(lengths) - SPECIAL_TOKENS, config).sum())


def model_speed(device: torch.device, save: Save, seconds: float) -> None:
    """Forward passes with means of the 650M shape: precision modes and attention backends take turns."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"variants": {}}
    name = MODEL_NAMES[device.type]
    lengths = token_lengths("uniref", MODEL_TOKENS[device.type])
    found |= {"model": name, "total_tokens": sum(lengths), "num_sequences": len(lengths)}
    found["default_token_budget"] = DEFAULT_TOKEN_BUDGETS[device.type]
    rates = {mode: matmul_rate(device, mode) for mode in ("fp16", "tf32", "fp32")}
    found["matmul_flops_per_second"] = rates
    save(found)

    for dtype, modes in (("fp16", ["fp16", "fp16_residual_fp16"]), ("fp32", ["tf32", "fp32"])):
        if dtype == "fp16" and device.type == "cpu":
            continue
        model = ESM2.from_pretrained(f"random:{name}", device=device, dtype=dtype)
        workload = Workload(model.config, lengths, device)
        batch = PackedBatch(workload.input_ids, workload.cu_seqlens, workload.max_seqlen)
        flops = forward_flops(model.config, lengths)
        variants = _variants(model, modes, batch, found)
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for round_number in range(5):
            for variant, forward in variants.items():
                if time.monotonic() > end:
                    found["stopped_early"] = True
                    break
                try:
                    measured = _measure(forward, device)
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
        if dtype == "fp16":
            found["kernels_of_one_forward"] = _profile(partial(_forward, model, batch))
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
        for attention in ("auto", "triton", "sdpa"):
            try:
                backend = select_backend(attention, model.device, MODES[mode], model.config.head_dim)
            except BackendError as error:
                found["variants"][f"{mode} {attention}"] = {"error": str(error)}
                continue
            if attention == "auto":
                found.setdefault("auto_backends", {})[mode] = backend[0]
            computing = model.with_attention(backend, MODES[mode])
            variants.setdefault(f"{mode} {backend[0]}", partial(_forward, computing, batch))
    return variants


def _forward(model: ESM2, batch: PackedBatch) -> object:
    """Means of the last layer."""
    return model.embed_packed(batch, [mean_of(model.config.num_layers)])


def _measure(function: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Seconds of one call, and memory beside what was there before it."""
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


def _profile(function: Callable[[], object]) -> Any:
    """Microseconds and launches of each GPU kernel in one call, the longest first."""
    try:
        function()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            function()
            torch.cuda.synchronize()
        totals: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type.name == "CUDA" and not event.is_user_annotation:
                entry = totals.setdefault(event.name[:120], [0.0, 0])
                entry[0] += event.time_range.elapsed_us()
                entry[1] += 1
        longest = sorted(totals.items(), key=lambda item: -item[1][0])[:PROFILED_KERNELS]
        return [
            {"kernel": name, "microseconds": round(time_us, 1), "launches": int(count)}
            for name, (time_us, count) in longest
        ]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _small_model(device: torch.device, found: dict[str, Any], save: Save) -> None:
    """The 8M model launched from Python, and replayed as a CUDA graph: what launching costs."""
    if device.type != "cuda":
        return
    model = ESM2.from_pretrained("random:esm2_t6_8M_UR50D", device=device, dtype="fp16")
    workload = Workload(model.config, token_lengths("uniref", 4096), device)
    batch = PackedBatch(workload.input_ids, workload.cu_seqlens, workload.max_seqlen)
    forward = partial(_forward, model, batch)
    graphed = partial(GraphedESM2(model).embed_packed, batch, [mean_of(model.config.num_layers)])
    result: dict[str, Any] = {"total_tokens": workload.total_tokens}
    found["8M"] = result
    try:
        result["eager_seconds"] = median(time_call(forward, device, 20))
        result["graph_seconds"] = median(time_call(graphed, device, 20))
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    save(found)


class ConstantTensors(dict[str, torch.Tensor]):
    """Weights of one value that take no memory: enough to see what a model of this shape takes."""

    def __init__(self, config: ESM2Config) -> None:
        shapes = tensor_shapes(config)
        super().__init__({name: torch.full((1,), 0.01).expand(shape) for name, shape in shapes.items()})


def memory(device: torch.device, save: Save, seconds: float) -> None:
    """What packs of two sizes take beside the weights, in FP16: bytes per token, and what fits into 80 GB.

    The least that must be alive at once is the residual stream (FP32), the operand and the result of fc1.
    """
    found: dict[str, Any] = {}
    for name in MEMORY_MODELS[device.type]:
        config = ESM2_MODELS[name]
        checkpoint = Checkpoint(name, config, ConstantTensors(config), "", "")
        precision = PRECISIONS["fp16"]
        model = ESM2.from_checkpoint(
            checkpoint, device, precision, select_backend("auto", device, precision, config.head_dim)
        )
        weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
        result: dict[str, Any] = {"weight_bytes": weights, "attention_backend": model.attention_backend}
        result["least_bytes_per_token"] = config.hidden_size * (4 + 2 + 8)
        found[name] = result
        peaks = {}
        for total_tokens in MEMORY_TOKENS[device.type]:
            batch = pack([np.full(total_tokens // 4 - SPECIAL_TOKENS, 5, dtype=np.uint8)] * 4).to(device)
            run = partial(model.embed_packed, batch, [mean_of(config.num_layers)])
            run()
            peaks[batch.total_tokens] = _measure(run, device)["peak_memory_bytes"]
            result["peak_memory_bytes"] = peaks
            save(found)
        (few, low), (many, high) = peaks.items()
        if low is not None:
            per_token = (high - low) / (many - few)
            result["bytes_per_token"] = per_token
            result["over_least"] = high / (weights + many * result["least_bytes_per_token"])
            result["tokens_that_fit_into_80_GB"] = int((80e9 - weights) / per_token)
        save(found)
        del model, run
        if device.type == "cuda":
            torch.cuda.empty_cache()


def stress_files(device: torch.device, save: Save, seconds: float) -> None:
    """Stress weights of the 650M shape, and proteins of UniRef's lengths to validate them on."""
    weights, fasta = Path("esm2_stress.pt"), Path("uniref.fasta")
    save_fair_esm(stress_checkpoint(ESM2_MODELS[MODEL_NAMES[device.type]]), weights)
    write_fasta(fasta, proteins("uniref", VALIDATION_TOKENS[device.type]))
    save({"weights": str(weights), "fasta": str(fasta)})


STEPS: dict[str, Callable[[torch.device, Save, float], None]] = {
    "machine": machine,
    "every_launcher": every_launcher,
    "model_speed": model_speed,
    "memory": memory,
    "stress_files": stress_files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")

    def save(found: dict[str, Any]) -> None:
        partial_file = arguments.out.with_suffix(".partial")
        partial_file.write_text(json.dumps(found, default=str))
        partial_file.replace(arguments.out)

    with torch.no_grad():
        STEPS[arguments.step](device, save, arguments.seconds)


if __name__ == "__main__":
    main()
