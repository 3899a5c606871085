"""Forward passes to compare: loaded, checked against FP64, verified, and only then timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from contenders.packages import (
    EsmEfficient,
    EsmPacked,
    Faesm,
    FairEsm,
    PackedTransformers,
    Provider,
    Transformers,
)
from contenders.runtimes import OnnxRuntime, OpenVino
from floors import AttentionFloor, MatmulFloor
from measuring import (
    DEVICE,
    ON_GPU,
    flops_of,
    forward_floor,
    gpu_activities,
    peak_memory,
    record,
    synchronize,
)
from workloads import proteins

from esm_packed.alphabet import encode
from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint, load_checkpoint, tensor_shapes
from esm_packed.config import ESM2Config
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS
from esm_packed.packing import SPECIAL_TOKENS, default_token_budget, pack

RIVALS_TOKEN_BUDGETS = (1024, 4096, 16_384) if not ON_GPU else (default_token_budget(DEVICE),)
"""Padded tokens per batch that a rival is tried with, so that it is timed at its best."""

CLOSE = 1.25
"""Token budgets whose pass took at most this many times as long as the fastest are tried twice."""

NUM_WARMING = 8
"""Number of the shortest proteins that a provider computes before its token budgets are compared."""

NUM_CHECKED = 5
"""Proteins from shortest to longest that are checked against FP64, besides the first and the last."""

MAX_RELATIVE_ERRORS = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}
"""For this package's mean embeddings."""

RIVALS_MAX_RELATIVE_ERRORS = {"fp32": 1e-4, "fp16": 0.2, "bf16": 0.2}
"""Rivals have their own errors in half precision, which are recorded; larger ones mean another model."""

MIN_FREE_MEMORY = 0.35
"""Share of the GPU's memory that must be free; otherwise earlier variants are released."""

_ATTENTION_KERNELS = {
    "triton": "packed_attention",
    "varlen": "flash",
    "flash2": "flash",
    "flash3": "flash",
    "flash4": "flash",
}
"""Part of the names of a backend's GPU kernels."""


class OtherModelError(Exception):
    """A rival computes a different model from the checkpoint's."""


@dataclass(frozen=True)
class Entry:
    """One variant.

    Args:
        provider: `esm_packed`, a rival, or a floor.
        model: a model, as for `ESM2.from_pretrained`.
        workload: one of `WORKLOADS`.
        total_tokens: tokens of all proteins, BOS and EOS included.
        dtype: precision mode.
        layout: one of `batching.LAYOUTS`; None if unknown.
        token_budget: tokens computed together, padding included; None if the provider chooses.
    """

    provider: str
    model: str
    workload: str
    total_tokens: int
    dtype: str
    layout: str | None
    token_budget: int | None


@dataclass
class Ready:
    """A checked variant and its measurements.

    `errors` are the worst relative L2 and maximum absolute errors of mean embeddings, and others;
    `seconds_by_token_budget` the seconds of the fastest pass with each token budget that was tried.
    """

    entry: Entry
    provider: Provider
    config: ESM2Config
    sequences: Sequence[str]
    errors: dict[str, float | None]
    peak_memory_bytes: int | None
    launches: int | None
    seconds_by_token_budget: dict[int | None, float] | None = None

    def run(self) -> None:
        """Run one pass over all proteins; return when the device is done."""
        self.provider.run()
        synchronize()

    def record(self, benchmark: Any, suite: str, block: int, **values: Any) -> dict[str, Any]:
        """Fill the benchmark's record."""
        entry = self.entry
        is_floor = entry.provider.startswith("floor")
        residues = [len(sequence) for sequence in self.sequences]
        budget = entry.token_budget or default_token_budget(DEVICE)
        return record(
            benchmark,
            suite=suite,
            block=block,
            provider=entry.provider,
            model=entry.model,
            workload=entry.workload,
            dtype=entry.dtype,
            layout=entry.layout,
            token_budget=entry.token_budget,
            backend=self.provider.backend,
            sequences=len(self.sequences),
            useful_tokens=sum(residues) + SPECIAL_TOKENS * len(residues),
            padded_tokens=self.provider.padded_tokens,
            flops=None if is_floor else flops_of(self.config, residues),
            computed_flops=getattr(self.provider, "computed_flops", None),
            floor_seconds=None if is_floor else forward_floor(self.config, residues, entry.dtype, budget)[1],
            peak_memory_bytes=self.peak_memory_bytes,
            launches=self.launches,
            seconds_by_token_budget=self.seconds_by_token_budget,
            **self.errors,
            **values,
        )


@dataclass(frozen=True)
class Truth:
    """Results of our FP64 path for the checked proteins."""

    embeddings: torch.Tensor
    logits: list[torch.Tensor]


def checked_indices(sequences: Sequence[str]) -> list[int]:
    """Indices of the first and the last protein, and of a few from the shortest to the longest."""
    by_length = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    picked = np.linspace(0, len(sequences) - 1, min(NUM_CHECKED, len(sequences))).astype(int)
    return list(dict.fromkeys([0, len(sequences) - 1, *by_length[picked].tolist()]))


def nonfinite_indices(computed: Sequence[torch.Tensor] | torch.Tensor) -> list[int]:
    """Indices of proteins with NaN or Inf in their results."""
    return [index for index, values in enumerate(computed) if not values.isfinite().all()]


def weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of the weights in a precision mode."""
    numbers = sum(math.prod(shape) for shape in tensor_shapes(checkpoint.config).values())
    return PRECISIONS[dtype].dtype.itemsize * numbers


def free_gpu_memory() -> float:
    """Bytes that can still be allocated; infinite without a GPU."""
    if not ON_GPU:
        return float("inf")
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def compute_truth(checkpoint: Checkpoint, sequences: Sequence[str], rounded_frequencies: bool) -> Truth:
    """Means and logits in FP64, one protein at a time; on the CPU if the model does not fit on the GPU."""
    precision = PRECISIONS["fp64"]
    device = torch.device("cpu") if weight_bytes(checkpoint, "fp64") > free_gpu_memory() else DEVICE
    backend = select_backend("auto", device, precision, checkpoint.config.head_dim)
    model = ESM2.from_checkpoint(checkpoint, device, precision, backend)
    if not rounded_frequencies:
        head_dim = model.config.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
        model.rotary.inv_freq = 10000.0**-exponents
    last = model.config.num_layers
    embeddings, logits = [], []
    for sequence in sequences:
        batch = pack([encode(sequence)]).to(device)
        output = model.forward_packed(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen, [last], return_logits=True
        )
        assert output.logits is not None
        embeddings.append(output.representations[last][1:-1].mean(0).cpu())
        logits.append(output.logits.cpu())
    return Truth(torch.stack(embeddings), logits)


def _in_memory(name: str) -> Checkpoint:
    """A checkpoint whose tensors are created once, as those of a large random model take long."""
    checkpoint = load_checkpoint(name)
    return replace(checkpoint, tensors=dict(checkpoint.tensors))


class Contest:
    """Variants that stay loaded from block to block.

    Args:
        esm_cpp_python: interpreter of an environment with esm-cpp, or None.
    """

    def __init__(self, esm_cpp_python: str | None = None) -> None:
        self.cleanup = ExitStack()
        self._esm_cpp_python = esm_cpp_python
        self._ready: dict[Entry, Ready] = {}
        self._refused: dict[Entry, Exception] = {}
        self._models: dict[tuple[str, str], ESM2] = {}
        self._truths: dict[tuple[str, str, int, bool], Truth] = {}
        self._peaks: dict[Entry, int] = {}
        self._checkpoint = lru_cache(maxsize=1)(_in_memory)

    def ready(self, entry: Entry, token_budgets: Sequence[int] = ()) -> Ready:
        """Load, run once, check against FP64 and verify, once for all blocks.

        Args:
            entry: the variant.
            token_budgets: if there are several, the variant takes the one with the fastest pass here and
                records it in its entry; otherwise it keeps the entry's.

        Raises:
            ImportError: the provider's package is missing or incompatible with the others.
            OtherModelError: a rival computes a different model.
            AssertionError: this package is wrong, or another attention backend ran than the named one.
        """
        if entry in self._refused:
            raise self._refused[entry]
        if entry not in self._ready:
            self._give_up_memory(entry)
            try:
                self._ready[entry] = self._prepare(entry, token_budgets)
            except (ImportError, OtherModelError) as error:
                self._refused[entry] = error
                raise
        return self._ready[entry]

    def model(self, name: str, dtype: str) -> ESM2:
        """This package's model with the attention backend chosen here for its precision."""
        if (name, dtype) not in self._models:
            checkpoint = self._checkpoint(name)
            backend = select_backend("auto", DEVICE, PRECISIONS[dtype], checkpoint.config.head_dim)
            self._models[name, dtype] = ESM2.from_checkpoint(checkpoint, DEVICE, PRECISIONS[dtype], backend)
        return self._models[name, dtype]

    def check_memory(self, ready: Ready) -> None:
        """Check that FP16 uses no more memory than FP32 did for the same batches.

        Raises:
            AssertionError: it uses more.
        """
        if ready.peak_memory_bytes is None:
            return
        self._peaks[ready.entry] = ready.peak_memory_bytes
        in_fp32 = self._peaks.get(replace(ready.entry, dtype="fp32"))
        if ready.entry.dtype == "fp16" and in_fp32 is not None:
            assert ready.peak_memory_bytes <= in_fp32

    def _prepare(self, entry: Entry, token_budgets: Sequence[int]) -> Ready:
        sequences = proteins(entry.workload, entry.total_tokens)
        provider: Provider = self._load(entry)
        is_floor = entry.provider.startswith("floor")
        is_replayed = entry.provider == "esm_packed_graphs"
        seconds: dict[int | None, float] = {}
        errors: dict[int | None, dict[str, float | None]] = {}
        if len(token_budgets) > 1:
            warm_up(provider, sequences)
        for budget in token_budgets or (entry.token_budget,):
            provider.token_budget = budget or 0
            seconds[budget] = run_verified(provider, sequences)
            errors[budget] = {} if is_floor else self._errors(entry, provider, sequences)
        limit = CLOSE * min(seconds.values())
        close = [budget for budget, duration in seconds.items() if duration <= limit]
        if len(close) > 1:  # the machine may have changed its speed between them
            for budget in close:
                provider.token_budget = budget or 0
                seconds[budget] = min(seconds[budget], run_verified(provider, sequences))
        fastest = min(seconds, key=lambda budget: seconds[budget])
        if len(seconds) > 1:
            provider.token_budget = fastest or 0
            provider.prepare(sequences)
        activities = gpu_activities(provider.run)
        if activities is not None and isinstance(provider, EsmPacked):
            check_activities(provider, activities)
        return Ready(
            replace(entry, token_budget=fastest),
            provider,
            self._checkpoint(entry.model).config,
            sequences,
            errors[fastest],
            # a replay uses memory that was allocated during capture
            None if is_floor or is_replayed else peak_memory(provider.run, provider.weight_bytes),
            None if activities is None else sum(not name.startswith("Mem") for name in activities),
            seconds if len(seconds) > 1 else None,
        )

    def _load(self, entry: Entry) -> Any:
        """A `Provider`; for a floor only its `prepare` and `run`."""
        name, dtype = entry.provider, entry.dtype
        budget = entry.token_budget or 0
        if name.startswith("esm_packed_transformers"):
            return PackedTransformers(entry.model, dtype, budget, entry.layout or "padded")
        if name.startswith("esm_packed"):
            return EsmPacked(
                self.model(entry.model, dtype),
                budget,
                entry.layout or "packed",
                graphs=name == "esm_packed_graphs",
            )
        if name == "floor_attention":
            return AttentionFloor(self.model(entry.model, dtype), budget)
        if name.startswith("floor_matmul"):
            return MatmulFloor(self.model(entry.model, dtype), budget, best=name == "floor_matmul_best")
        if name == "esm_cpp":
            from contenders.esm_cpp_client import EsmCpp

            if self._esm_cpp_python is None:
                raise ImportError("esm-cpp needs an environment of its own: --esm-cpp-python PATH")
            esm_cpp = EsmCpp(entry.model, self._esm_cpp_python, torch.get_num_threads())
            return self.cleanup.enter_context(closing(esm_cpp))
        rivals: dict[str, Callable[[], Provider]] = {
            "fair_esm": lambda: FairEsm(entry.model, dtype, budget),
            "transformers": lambda: Transformers(entry.model, dtype, budget),
            "transformers_unsorted": lambda: Transformers(entry.model, dtype, budget, "padded_unsorted"),
            "transformers_compiled": lambda: Transformers(entry.model, dtype, budget, compiled=True),
            "faesm": lambda: Faesm(entry.model, dtype, budget),
            "esm_efficient": lambda: EsmEfficient(entry.model, dtype, budget),
            "openvino": lambda: OpenVino(entry.model, dtype, budget),
            "onnxruntime": lambda: OnnxRuntime(entry.model, budget),
        }
        return rivals[name]()

    def _errors(self, entry: Entry, provider: Provider, sequences: Sequence[str]) -> dict[str, float | None]:
        """Errors of what `run` just computed relative to FP64, for a few proteins; all must be finite.

        A provider whose rotary frequencies differ from the checkpoint's is compared with FP64 using its own;
        its resulting distance from the checkpoint's embeddings is recorded as well.
        """
        is_own = entry.provider.startswith("esm_packed")
        refusal = AssertionError if is_own else OtherModelError
        rows, all_logits = provider.embeddings(), provider.logits()
        for name, computed in (("embeddings", rows), ("logits", all_logits)):
            if computed is not None and (bad := nonfinite_indices(computed)):
                raise refusal(f"{name} of {len(bad)} proteins are not finite, such as {bad[:3]}")
        indices = checked_indices(sequences)
        truth = self._truth(entry, sequences, provider.rounded_frequencies)
        embeddings = rows[indices].double()
        errors: dict[str, float | None] = {
            "relative_error": worst_relative_error(embeddings, truth.embeddings),
            "max_error": float((embeddings - truth.embeddings).abs().max()),
        }
        allowed = (MAX_RELATIVE_ERRORS if is_own else RIVALS_MAX_RELATIVE_ERRORS)[entry.dtype]
        compared = {"relative_error": errors["relative_error"]}
        if all_logits is not None:
            errors["relative_error_logits"] = worst_relative_error(
                [all_logits[index] for index in indices], truth.logits
            )
            compared["relative_error_logits"] = errors["relative_error_logits"]
        for name, error in compared.items():
            if not error <= allowed:  # type: ignore[operator]
                raise refusal(f"{name} to FP64 is {error:.1e}, above {allowed}")
        if not provider.rounded_frequencies:
            checkpoints_own = self._truth(entry, sequences, rounded_frequencies=True)
            errors["relative_error_to_checkpoint"] = worst_relative_error(
                embeddings, checkpoints_own.embeddings
            )
        return errors

    def _truth(self, entry: Entry, sequences: Sequence[str], rounded_frequencies: bool) -> Truth:
        key = (entry.model, entry.workload, entry.total_tokens, rounded_frequencies)
        if key not in self._truths:
            checked = [sequences[index] for index in checked_indices(sequences)]
            self._truths[key] = compute_truth(self._checkpoint(entry.model), checked, rounded_frequencies)
        return self._truths[key]

    def _give_up_memory(self, entry: Entry) -> None:
        if not ON_GPU:
            return
        total = torch.cuda.mem_get_info()[1]
        needed = 2 * weight_bytes(self._checkpoint(entry.model), entry.dtype)
        if free_gpu_memory() < max(needed, MIN_FREE_MEMORY * total):
            self._ready.clear()
            self._models.clear()
            torch.cuda.empty_cache()


def warm_up(provider: Provider, sequences: Sequence[str]) -> None:
    """Run the shortest proteins, so that no token budget is charged for first-call costs."""
    provider.prepare(sorted(sequences, key=len)[:NUM_WARMING])
    provider.run()


def run_verified(provider: Provider, sequences: Sequence[str]) -> float:
    """Seconds of one pass over all proteins, which must use the named attention backend."""
    provider.prepare(sequences)
    synchronize()
    start = time.perf_counter()
    with expect_backend(provider):
        provider.run()
    synchronize()
    return time.perf_counter() - start


@contextmanager
def expect_backend(provider: Provider) -> Iterator[None]:
    """Check that the model's attention backend is called in every layer of every batch within the block.

    A CUDA graph calls nothing when it is replayed; `check_activities` checks what it computes.

    Raises:
        AssertionError: at the end, if something else computed attention.
    """
    if not isinstance(provider, EsmPacked) or not isinstance(model := provider.computing, ESM2):
        yield
        return
    calls: list[object] = []
    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.enter_context(layer.attention.register_forward_hook(lambda *call: calls.append(call[0])))
        yield
    wanted = len(provider.batches) * model.config.num_layers
    assert len(calls) == wanted, (
        f"attention {model.attention_backend} was called {len(calls)} times, not {wanted}"
    )


def check_activities(provider: EsmPacked, activities: Sequence[str]) -> None:
    """Check in the GPU's activities that the backend's kernels ran, and no copies from or to the host.

    Raises:
        AssertionError: the check failed.
    """
    copies = [name for name in activities if "Memcpy HtoD" in name or "Memcpy DtoH" in name]
    assert not copies, f"the timed pass copies: {copies[:3]}"
    part = _ATTENTION_KERNELS.get(provider.model.attention_backend)
    if not provider.layout.startswith("padded") and part is not None:
        assert any(part in name for name in activities), (
            f"no kernel of attention backend {provider.model.attention_backend} ran"
        )


def worst_relative_error(
    computed: Sequence[torch.Tensor] | torch.Tensor, truth: Sequence[torch.Tensor] | torch.Tensor
) -> float:
    """Largest relative L2 error of a protein, computed in FP64; NaN if one is NaN."""
    errors = [
        (c.double() - t.double()).norm() / t.double().norm() for c, t in zip(computed, truth, strict=True)
    ]
    return float(torch.stack(errors).max())
