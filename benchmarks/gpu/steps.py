"""Steps that `check.py` runs as separate processes: `python steps.py NAME --device D --out FILE`.

The JSON file is rewritten after every step, so that a step that hangs does not take the others with it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.forward import MODEL_NAMES, Save, budgets, forward, measure, model_speed, tuned_forward
from gpu.launches import counted_launches, matmuls
from kernel_baselines import MODEL_SIZES, kernel_dtypes
from workloads import proteins, write_fasta

from esm_packed import ESM2
from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint, save_fair_esm, tensor_shapes
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.kernels.cases import Workload
from esm_packed.kernels.launch import dtype_name
from esm_packed.numerics import PRECISIONS
from esm_packed.outputs import mean_of
from esm_packed.packing import SPECIAL_TOKENS, pack
from esm_packed.stress import stress_checkpoint

MEMORY_MODELS = {
    "cuda": ("esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D", "esm2_t48_15B_UR50D"),
    "cpu": ("esm2_t6_8M_UR50D",),
}
MEMORY_TOKENS = {"cuda": (8192, 32768), "cpu": (64, 128)}
VALIDATION_TOKENS = {"cuda": 100_000, "cpu": 400}


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


class ConstantTensors(dict[str, torch.Tensor]):
    """Weights of one value that take no memory: enough to see what a model of this shape takes."""

    def __init__(self, config: ESM2Config) -> None:
        shapes = tensor_shapes(config)
        super().__init__({name: torch.full((1,), 0.01).expand(shape) for name, shape in shapes.items()})


def memory(device: torch.device, save: Save, seconds: float) -> None:
    """Memory of packs of two sizes in FP16, without the weights: bytes per token, tokens in 80 GB.

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
            peaks[batch.total_tokens] = measure(run, device)["peak_memory_bytes"]
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
    "forward": forward,
    "matmuls": matmuls,
    "budgets": budgets,
    "counted_launches": counted_launches,
    "model_speed": model_speed,
    "tuned_forward": tuned_forward,
    "memory": memory,
    "stress_files": stress_files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tuned", type=Path, help="of tuned_forward: what `esm-packed tune` wrote")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")

    def save(found: dict[str, Any]) -> None:
        partial_file = arguments.out.with_suffix(".partial")
        partial_file.write_text(json.dumps(found, default=str))
        partial_file.replace(arguments.out)

    step = STEPS[arguments.step]
    if arguments.tuned is not None:
        step = partial(step, tuned=arguments.tuned)
    with torch.no_grad():
        step(device, save, arguments.seconds)


if __name__ == "__main__":
    main()
