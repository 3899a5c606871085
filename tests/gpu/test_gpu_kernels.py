"""What only a GPU can show of the kernels: numbers at the models' sizes, launches, graphs, TF32, offsets.

Shapes around block boundaries are in `tests/kernels`, which run on a GPU too where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_baselines import KERNELS, MODEL_SIZES, baseline, kernel_dtypes
from tolerances import assert_as_close_as_pytorch, relative_error
from workloads import token_lengths

from esm_packed import kernels
from esm_packed.alphabet import MASK_ID, VOCAB_SIZE
from esm_packed.kernels import reference
from esm_packed.kernels.cases import EPS, Case, Workload, relative_errors
from esm_packed.kernels.launch import dtype_name

pytestmark = pytest.mark.gpu

Record = Callable[[str, Any], None]

SIZES = ["8M", "650M", "3B"]
INT32_ELEMENTS = 2**31

OVERHEAD_EVENTS = ("Activity Buffer Request", "Context Sync", "Stream Sync", "Event Sync")
"""What the profiler may file under the device though nothing was launched."""

every_kernel = pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case}-{dtype_name(dtype)}") for case, dtype in kernel_dtypes()],
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def matmul_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch may multiply FP32 matrices in: `ieee` or `tf32`."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", mode)


@every_kernel
@pytest.mark.parametrize("size", SIZES)
def test_fp64_reference_at_real_sizes(
    size: str, case: Case, dtype: torch.dtype, cuda_device: torch.device, record_property: Record
) -> None:
    check_against_fp64(case, dtype, size, 6000, cuda_device, record_property)


def check_against_fp64(
    case: Case,
    dtype: torch.dtype,
    size: str,
    total_tokens: int,
    device: torch.device,
    record_property: Record,
) -> None:
    """Ours is about as close to FP64 as plain PyTorch in the same dtype, everywhere."""
    workload = Workload(MODEL_SIZES[size], token_lengths("uniref", total_tokens), device)
    arguments = case.arguments(workload, dtype)
    truth = case.truth(arguments)
    same_dtype = case.results(baseline(case, workload), case.copied(arguments))
    spared = arguments["qkv"][:, 2].clone() if "qkv" in arguments else None
    with poisoned_memory():
        actual = case.results(case.function, arguments)

    errors = relative_errors(actual, truth)
    for name, error in errors.items():
        record_property(f"relative_error_{name}", error)
        record_property(f"relative_error_{name}_of_pytorch", relative_error(same_dtype[name], truth[name]))
    if spared is not None:
        assert torch.equal(arguments["qkv"][:, 2], spared)
    if case.max_error:
        assert max(errors.values()) <= case.max_error
        return
    for name, expected in truth.items():
        if expected.is_floating_point():
            assert_as_close_as_pytorch(actual[name], same_dtype[name], expected, factor=4.0)


def gpu_events(function: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills a call runs on the device, once it is warm."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type.name == "CUDA"
        and not event.is_user_annotation
        and event.name not in OVERHEAD_EVENTS
    ]


@pytest.fixture(scope="module")
def profiler_works() -> None:
    """The profiler sees what it is known to run; else its silence about ours would prove nothing."""
    if not torch.cuda.is_available():
        return
    number = torch.ones(1024, device="cuda")
    if len(gpu_events(lambda: number + 1)) != 1:
        pytest.skip(
            f"the profiler does not work here: it saw {gpu_events(lambda: number + 1)} of one addition"
        )


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_kernel
def test_launcher_is_kernels_alone(
    case: Case,
    dtype: torch.dtype,
    cuda_device: torch.device,
    profiler_works: None,
    record_property: Record,
) -> None:
    arguments = case.arguments(
        Workload(MODEL_SIZES["650M"], token_lengths("uniref", 3000), cuda_device), dtype
    )
    events = gpu_events(lambda: case.function(**arguments))
    record_property("gpu_events", events)
    assert len(events) == case.launches, events
    assert not any(event.startswith(("Memcpy", "Memset")) for event in events)


@every_kernel
def test_launcher_never_waits_for_the_device(
    case: Case, dtype: torch.dtype, cuda_device: torch.device
) -> None:
    arguments = case.arguments(
        Workload(MODEL_SIZES["650M"], token_lengths("uniref", 3000), cuda_device), dtype
    )
    function = case.function
    function(**arguments)
    with no_synchronization():
        function(**arguments)
        with pytest.raises(RuntimeError):
            torch.ones(1, device=cuda_device).item()


@every_kernel
def test_graph_replay_with_other_lengths(case: Case, dtype: torch.dtype, cuda_device: torch.device) -> None:
    config, capacity = MODEL_SIZES["8M"], 64
    packs = [token_lengths("uniref", 3000), [1024, 3, 900, 3, 1000, 70], [50] * 60, [3, 3, 2994 - 1000, 1000]]
    packs = [[*lengths, *[0] * (capacity - len(lengths))] for lengths in packs]
    captured = Workload(config, packs[0], cuda_device, max_seqlen=2048)
    static = case.arguments(captured, dtype)
    function = case.function
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(2):
            case.results(function, static)
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = case.results(function, static)

    for seed, lengths in enumerate(packs):
        other = case.arguments(replace(captured, lengths=lengths, seed=seed), dtype)
        for name, value in other.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
        graph.replay()
        eager = case.results(function, other)
        for name, expected in eager.items():
            torch.testing.assert_close(replayed[name], expected, rtol=0, atol=0, equal_nan=True)


def attention_errors(device: torch.device) -> dict[str, float]:
    """Relative error of FP32 attention in each input precision, on the same data."""
    workload = Workload(MODEL_SIZES["650M"], token_lengths("uniref", 6000), device)
    case = KERNELS["packed_attention"]
    arguments = case.arguments(workload, torch.float32)
    truth = case.truth(arguments)
    return {
        precision: relative_error(
            kernels.packed_attention(**arguments | {"input_precision": precision}), truth["out0"]
        )
        for precision in ("ieee", "tf32", "tf32x3")
    }


@pytest.mark.parametrize("global_switch", ["ieee", "tf32"])
def test_tf32_attention_only_where_asked_for(
    global_switch: str, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    matmul_mode(global_switch, monkeypatch)
    errors = attention_errors(cuda_device)
    record_property("relative_errors", errors)
    assert errors["ieee"] < 1e-5
    assert errors["tf32x3"] < 1e-5
    assert errors["tf32"] > 1e-5
    assert errors["tf32"] > 10 * errors["tf32x3"]


def need_memory(gigabytes: float) -> None:
    """Skip the test where the GPU has less memory left."""
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, there are {free:.1f}")


def long_workload(tokens_wanted: int, device: torch.device) -> Workload:
    """Sequences of 1,000 tokens; the 650M shape."""
    lengths = [1000] * -(-tokens_wanted // 1000) + [7, 300]
    return Workload(MODEL_SIZES["650M"], lengths, device)


def normal(*shape: int, device: torch.device) -> torch.Tensor:
    """FP16 random values without an FP32 copy of them."""
    return torch.empty(*shape, dtype=torch.float16, device=device).normal_()


ENDS = [slice(0, 1500), slice(-1307, None)]
"""First and last rows; the last are the two last sequences of `long_workload` and one of 1,000."""


def assert_small_error(actual: torch.Tensor, truth: torch.Tensor, allowed: float = 2e-3) -> None:
    """FP16 results are within rounding of the truth."""
    assert actual.isfinite().all()
    assert relative_error(actual, truth) <= allowed


@pytest.mark.parametrize("packed", [False, True], ids=["position_ids", "cu_seqlens"])
def test_offsets_of_rotary_beyond_int32(packed: bool, cuda_device: torch.device) -> None:
    need_memory(10)
    w = long_workload(INT32_ELEMENTS // (3 * 1280) + 2000, cuda_device)
    cos, sin = w.rotary_tables
    qkv = normal(w.total_tokens, 3, 20, 64, device=cuda_device)
    assert qkv.numel() > INT32_ELEMENTS
    before = [qkv[rows].double() for rows in ENDS]
    if packed:
        kernels.rotary_qk_packed_(qkv, cos, sin, w.cu_seqlens)
    else:
        kernels.rotary_qk_(qkv, cos, sin, w.position_ids)
    for rows, expected in zip(ENDS, before, strict=True):
        reference.rotary_qk_(expected, cos.double(), sin.double(), w.position_ids[rows])
        assert_small_error(qkv[rows], expected)


def test_offsets_of_layer_norm_beyond_int32(cuda_device: torch.device) -> None:
    need_memory(20)
    total_tokens = INT32_ELEMENTS // 1280 + 2000
    delta = normal(total_tokens, 1280, device=cuda_device)
    residual = normal(total_tokens, 1280, device=cuda_device)
    weight, bias = normal(1280, device=cuda_device), normal(1280, device=cuda_device)
    totals = [residual[rows].double() + delta[rows].double() for rows in ENDS]
    out = kernels.add_layer_norm_(delta, residual, weight, bias, EPS)
    assert out.numel() > INT32_ELEMENTS
    for rows, total in zip(ENDS, totals, strict=True):
        assert_small_error(residual[rows], total)
        expected = F.layer_norm(total, (1280,), weight.double(), bias.double(), EPS)
        assert_small_error(out[rows], expected)


def test_offsets_of_gelu_beyond_int32(cuda_device: torch.device) -> None:
    need_memory(8)
    states = normal(INT32_ELEMENTS // 5120 + 2000, 5120, device=cuda_device)
    bias = normal(5120, device=cuda_device)
    sums = [states[rows].double() + bias.double() for rows in ENDS]
    kernels.bias_gelu_(states, bias)
    assert states.numel() > INT32_ELEMENTS
    for rows, total in zip(ENDS, sums, strict=True):
        assert_small_error(states[rows], F.gelu(total))


def test_offsets_of_fc1_beyond_int32(cuda_device: torch.device) -> None:
    need_memory(10)
    states = normal(INT32_ELEMENTS // 5120 + 2000, 1280, device=cuda_device)
    weight, bias = normal(5120, 1280, device=cuda_device) / 36, normal(5120, device=cuda_device)
    out = KERNELS["gemm_bias_gelu"].function(states, weight, bias)
    assert out.numel() > INT32_ELEMENTS
    for rows in ENDS:
        expected = F.gelu(F.linear(states[rows].double(), weight.double(), bias.double()))
        assert_small_error(out[rows], expected)


def test_offsets_of_the_qkv_projection_beyond_int32(cuda_device: torch.device) -> None:
    need_memory(12)
    w = long_workload(INT32_ELEMENTS // (3 * 1280) + 2000, cuda_device)
    cos, sin = w.rotary_tables
    states = normal(w.total_tokens, 1280, device=cuda_device)
    weight, bias = normal(3 * 1280, 1280, device=cuda_device) / 36, normal(3 * 1280, device=cuda_device)
    out = KERNELS["gemm_bias_rotary"].function(states, weight, bias, cos, sin, w.position_ids)
    assert out.numel() > INT32_ELEMENTS
    for rows in ENDS:
        expected = F.linear(states[rows].double(), weight.double(), bias.double()).view(-1, 3, 20, 64)
        reference.rotary_qk_(expected, cos.double(), sin.double(), w.position_ids[rows])
        assert_small_error(out[rows], expected.flatten(1))


def test_offsets_of_attention_beyond_int32(cuda_device: torch.device) -> None:
    need_memory(25)
    w = long_workload(INT32_ELEMENTS // 1280 + 2000, cuda_device)
    query, key, value = normal(w.total_tokens, 3, 20, 64, device=cuda_device).unbind(1)
    out = kernels.packed_attention(query, key, value, w.cu_seqlens, w.max_seqlen, 0.125)
    assert out.numel() > INT32_ELEMENTS
    for rows, lengths in ((slice(0, 1000), [1000]), (slice(-1307, None), [1000, 7, 300])):
        part = Workload(w.shape, lengths, cuda_device)
        q, k, v = (tensor[rows].double() for tensor in (query, key, value))
        expected = reference.packed_attention(q, k, v, part.cu_seqlens, 1000, 0.125)
        assert_small_error(out[rows], expected)


def test_offsets_of_embedding_and_pooling_beyond_int32(cuda_device: torch.device) -> None:
    need_memory(12)
    w = long_workload(INT32_ELEMENTS // 1280 + 2000, cuda_device)
    weight = normal(VOCAB_SIZE, 1280, device=cuda_device)
    states, position_ids = kernels.embed_tokens(w.input_ids, w.cu_seqlens, weight, MASK_ID, torch.float16)
    assert states.numel() > INT32_ELEMENTS
    assert torch.equal(position_ids, w.position_ids)
    last = Workload(w.shape, [1000, 7, 300], cuda_device)
    expected, _ = reference.embed_tokens(
        w.input_ids[-1307:], last.cu_seqlens, weight.double(), MASK_ID, torch.float64
    )
    assert_small_error(states[-1307:], expected)

    states[-5, 3] = float("inf")
    means = kernels.segment_mean(states, w.cu_seqlens)
    assert_small_error(means[-2], states[-307:-300][1:-1].double().mean(0))


def layer_operations(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: dict[str, torch.Tensor],
    max_seqlen: int,
    num_heads: int,
) -> tuple[torch.Tensor, ...]:
    """Embedding, one layer, pooling and the check: every operation once."""
    residual, position_ids = kernels.embed_tokens(
        input_ids, cu_seqlens, weights["embedding"], MASK_ID, torch.float32
    )
    states = kernels.layer_norm(residual, weights["norm"], weights["norm_bias"], EPS)
    qkv = kernels.linear_rotary(states, weights["qkv"], weights["qkv_bias"], cos, sin, position_ids)
    query, key, value = qkv.view(len(input_ids), 3, num_heads, -1).unbind(1)
    attended = kernels.packed_attention(query, key, value, cu_seqlens, max_seqlen, query.shape[-1] ** -0.5)
    delta = kernels.linear(attended.view(len(input_ids), -1), weights["out"], weights["norm_bias"])
    states = kernels.add_layer_norm_(delta, residual, weights["norm"], weights["norm_bias"], EPS)
    states = kernels.linear_gelu(states, weights["fc1"], weights["fc1_bias"])
    delta = kernels.linear(states, weights["fc2"], weights["norm_bias"])
    states = kernels.add_layer_norm_(delta, residual, weights["norm"], weights["norm_bias"], EPS)
    return states, residual, kernels.segment_mean(states, cu_seqlens)


@pytest.mark.parametrize(
    ("dtype", "mode", "allowed"),
    [(torch.float16, "ieee", 2e-3), (torch.float32, "ieee", 1e-5), (torch.float32, "tf32", 5e-3)],
    ids=["fp16", "fp32", "tf32"],
)
def test_compiled_layer_equals_eager(
    dtype: torch.dtype,
    mode: str,
    allowed: float,
    cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    """With TF32 set, too: what reads torch's older switch for it then raises."""
    matmul_mode(mode, monkeypatch)
    torch.compiler.reset()
    config = MODEL_SIZES["8M"]
    hidden, ffn = config.hidden_size, config.ffn_size
    compiled: Any = torch.compile(layer_operations, fullgraph=True)
    worst = 0.0
    for seed, total_tokens in enumerate((2000, 2500, 1777)):
        w = Workload(config, token_lengths("uniref", total_tokens, seed), cuda_device, max_seqlen=1024)
        weights = {
            "embedding": w.randn(VOCAB_SIZE, hidden, dtype=dtype),
            "norm": w.randn(hidden, dtype=dtype, scale=0.1) + 1,
            "norm_bias": w.randn(hidden, dtype=dtype, scale=0.1),
            "qkv": w.randn(3 * hidden, hidden, dtype=dtype, scale=hidden**-0.5),
            "qkv_bias": w.randn(3 * hidden, dtype=dtype, scale=0.1),
            "out": w.randn(hidden, hidden, dtype=dtype, scale=hidden**-0.5),
            "fc1": w.randn(ffn, hidden, dtype=dtype, scale=hidden**-0.5),
            "fc1_bias": w.randn(ffn, dtype=dtype, scale=0.1),
            "fc2": w.randn(hidden, ffn, dtype=dtype, scale=ffn**-0.5),
        }
        arguments = (w.input_ids, w.cu_seqlens, *w.rotary_tables, weights, w.max_seqlen, config.num_heads)
        with torch.no_grad():
            eager, traced = layer_operations(*arguments), compiled(*arguments)
        for expected, actual in zip(eager, traced, strict=True):
            assert actual.dtype == expected.dtype
            if expected.dtype == torch.bool:
                assert torch.equal(actual, expected)
            else:
                worst = max(worst, relative_error(actual, expected))
    record_property("max_relative_difference", worst)
    assert worst <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nan_stays_in_its_sequence(dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Rows of the other sequences keep their very bits in attention and pooling."""
    w = Workload(MODEL_SIZES["650M"], [3, 64, 65, 200, 3, 1000, 17], cuda_device)
    qkv = w.randn(w.total_tokens, 3, 20, 64, dtype=dtype)
    query, key, value = qkv.unbind(1)
    clean = kernels.packed_attention(query, key, value, w.cu_seqlens, w.max_seqlen, 0.125)
    bounds = w.cu_seqlens.tolist()
    for poisoned in (0, 2, 5, 6):
        rows = slice(bounds[poisoned], bounds[poisoned + 1])
        bad = qkv.clone()
        bad[rows] = float("nan")
        bad[rows.start, 2] = float("inf")
        query, key, value = bad.unbind(1)
        out = kernels.packed_attention(query, key, value, w.cu_seqlens, w.max_seqlen, 0.125)
        others = torch.ones(w.total_tokens, dtype=torch.bool, device=cuda_device)
        others[rows] = False
        assert torch.equal(out[others], clean[others])
        assert out[rows].isnan().all()
        states = out.view(w.total_tokens, -1)
        means = kernels.segment_mean(states, w.cu_seqlens)
        assert means.isnan().any(1).tolist() == [index == poisoned for index in range(w.num_sequences)]
