"""Every Triton kernel against the plain-PyTorch reference: on a GPU, else in Triton's interpreter.

The truth is the reference in FP64 on the same inputs; the reference in their own dtype is the yardstick.
All memory the launchers allocate is poisoned (`conftest.poisoned_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_cases import CPU, SMALL, Widths, example
from tolerances import assert_as_close_as_pytorch
from triton_runs import assert_identical, call, check, expect, moved, run

from esm_packed import kernels
from esm_packed.config import ESM2_MODELS
from esm_packed.kernels import launch
from esm_packed.kernels.cases import CASES, HALF_DTYPES, MASK_ID, Arguments, Workload

# Where tests are about infinities, numpy would report each that the interpreter meets.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.usefixtures("poisoned_memory", "seeded"),
]

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, *HALF_DTYPES]
HEAD_DIMS = [16, 24, 32, 64, 128]
MODELS = [
    Widths(config.hidden_size, config.num_heads, config.head_dim, config.ffn_size)
    for config in ESM2_MODELS.values()
]

BOUNDARIES = [3, 15, 16, 17, 32, 33, 63, 64, 65, 129]
"""Lengths around the tiles of attention."""
FEW_TOKENS = [3, 4, 5, 7, 8, 9, 15, 16, 17]
"""Lengths around the blocks of kernels that look at a few tokens at a time."""
ONE = [50]
LONG_AMONG_SHORT = [3, 5, 200, 4, 3]
WITH_EMPTY = [5, 0, 0, 20, 3, 0, 17, 0, 0, 0]
"""Empty sequences inside, and behind the last as a cu_seqlens of fixed size is filled up."""
PACKS = {
    "boundaries": BOUNDARIES,
    "one": ONE,
    "long among short": LONG_AMONG_SHORT,
    "with empty": WITH_EMPTY,
    "empty first": [0, 0, 7, 18],
}
all_packs = pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS.keys())
PACKS_OF_TOKENS = PACKS | {"boundaries": FEW_TOKENS}
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
half_types = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
OPERATIONS = [case.name for case in CASES.values() if torch.float16 in case.dtypes]
all_operations = pytest.mark.parametrize("name", OPERATIONS)
POOLING = ["segment_mean", "segment_max"]
pooling = pytest.mark.parametrize("name", POOLING)


def slow_if(slow: bool) -> Any:
    """Marks of a parameter. Those left out by default take a minute in the interpreter, all together."""
    return pytest.mark.slow if slow else ()


GUARD_ROWS = 136
"""Rows on each side of an argument that are a trap, more than any block reaches beyond it."""


def cu_seqlens_of(lengths: list[int]) -> torch.Tensor:
    return Workload(SMALL, lengths, CPU).cu_seqlens


def sizes() -> Iterator[Any]:
    """Each kernel that memory limits, in each dtype it serves, at the widths of each model.

    By default FP16 in the widths of 8M, 35M and 650M, and all dtypes in that of 35M.
    """
    for case in CASES.values():
        for dtype in case.dtypes if case.num_flops is None else ():
            residual_dtypes = {dtype: "", torch.float32: "+float32"} if case.streams else {dtype: ""}
            for residual_dtype, suffix in residual_dtypes.items():
                for widths in MODELS:
                    name = f"{case}-{launch.dtype_name(dtype)}{suffix}-{widths.hidden_size}"
                    is_default = (dtype, suffix) == (torch.float16, "") and widths in (MODELS[0], MODELS[3])
                    marks = slow_if(widths != MODELS[1] and not is_default)
                    yield pytest.param(case.name, dtype, residual_dtype, widths, id=name, marks=marks)


@pytest.mark.parametrize("name, dtype, residual_dtype, widths", list(sizes()))
def test_every_size(
    name: str,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    widths: Widths,
    triton_device: torch.device,
) -> None:
    arguments = example(name, [3, 6], dtype, widths, residual_dtype)
    actual = check(name, arguments, triton_device)
    if name == "add_layer_norm_":
        assert torch.equal(actual[1], expect(name, arguments)[1])
    if name.startswith("rotary"):
        assert torch.equal(actual[0][:, 2], arguments["qkv"][:, 2])
        assert not torch.equal(actual[0][:, :2], arguments["qkv"][:, :2])


@pytest.mark.parametrize(
    "lengths, mask_id",
    [
        *(pytest.param(lengths, MASK_ID, id=name) for name, lengths in PACKS_OF_TOKENS.items()),
        pytest.param(WITH_EMPTY, None, id="without dropout"),
    ],
)
def test_embed_tokens_in_every_pack(
    lengths: list[int], mask_id: int | None, triton_device: torch.device
) -> None:
    arguments = example("embed_tokens", lengths, torch.float32) | {"mask_id": mask_id}
    if mask_id is None:
        arguments["input_ids"] = arguments["input_ids"].long()
    embeddings, position_ids = check("embed_tokens", arguments, triton_device)
    assert position_ids.dtype == torch.int32
    assert torch.equal(position_ids, Workload(SMALL, lengths, CPU).position_ids)
    if mask_id is None:
        assert torch.equal(embeddings, arguments["weight"][arguments["input_ids"]])


def test_embed_tokens_of_masks_alone(triton_device: torch.device) -> None:
    """With nothing kept the scale is infinite, and the rows are still zero; the neighbors keep theirs."""
    arguments = example("embed_tokens", [5, 4, 6], torch.float32)
    arguments["input_ids"][5:9] = MASK_ID
    embeddings, _ = check("embed_tokens", arguments, triton_device)
    assert not embeddings[5:9].any()
    assert embeddings[arguments["input_ids"] != MASK_ID].all()


def test_tokens_behind_the_last_sequence_disturb_nothing(triton_device: torch.device) -> None:
    """A graph captured with more tokens than are now in use runs over what the buffer held before."""
    lengths = [5, 9, 0, 0]
    arguments = example("embed_tokens", [*lengths, 30], torch.float32)
    arguments["cu_seqlens"] = cu_seqlens_of(lengths)
    expected = expect("embed_tokens", arguments | {"input_ids": arguments["input_ids"][:14]})
    embeddings, position_ids = run("embed_tokens", arguments, triton_device)
    torch.testing.assert_close(embeddings[:14], expected[0])
    assert torch.equal(position_ids[:14], expected[1])
    assert not position_ids[14:].any()


@pytest.mark.parametrize(
    "name, num_sequences",
    [
        *((name, number) for name in ("embed_tokens", "rotary_qk_packed_") for number in (127, 128, 256)),
        *(("packed_attention", number) for number in (255, 256)),
    ],
)
def test_packs_whose_boundaries_just_fill_a_block(
    name: str, num_sequences: int, triton_device: torch.device
) -> None:
    """`cu_seqlens` has one element more than there are sequences, and the last ends the last sequence."""
    lengths = [0] * num_sequences  # a few tokens where blocks of 128 and 256 boundaries meet, and at the end
    for sequence in {0, 126, 127, 128, 254, 255, num_sequences - 2, num_sequences - 1}:
        if sequence < num_sequences:
            lengths[sequence] = 3 + sequence % 3
    if name == "packed_attention":  # one head: every sequence takes a program of each
        arguments = example(name, lengths, torch.float16, Widths(num_heads=1, head_dim=16))
    else:
        arguments = example(name, lengths, torch.float16)
    check(name, arguments, triton_device)


@pytest.mark.parametrize(
    "name, dtype, lengths",
    [
        *(("rotary_qk_packed_", torch.float16, lengths) for lengths in ([5, 9, 0, 0], [64])),
        *(
            ("packed_attention", dtype, lengths)
            for dtype in (torch.float16, torch.float32)
            for lengths in ([5, 9, 0, 0], [70, 3, 0], [64])
        ),
    ],
    ids=str,
)
def test_tokens_behind_the_last_sequence_are_left_alone(
    name: str, dtype: torch.dtype, lengths: list[int], triton_device: torch.device
) -> None:
    in_use = sum(lengths)
    arguments = example(name, [*lengths, 140], dtype) | {"cu_seqlens": cu_seqlens_of(lengths)}
    used = {
        key: value[:in_use] if isinstance(value, torch.Tensor) and len(value) == in_use + 140 else value
        for key, value in arguments.items()
    }
    (actual,) = run(name, arguments, triton_device)
    (expected,) = run(name, used, triton_device)
    assert_identical([actual[:in_use]], [expected])


@pytest.mark.parametrize("lengths", PACKS_OF_TOKENS.values(), ids=PACKS_OF_TOKENS.keys())
def test_rotary_in_every_pack(lengths: list[int], triton_device: torch.device) -> None:
    arguments = example("rotary_qk_packed_", lengths, torch.float16)
    (rotated,) = check("rotary_qk_packed_", arguments, triton_device)
    assert torch.equal(rotated[:, 2], arguments["qkv"][:, 2])
    if lengths == WITH_EMPTY:  # both forms give the same bits
        arguments = example("rotary_qk_", lengths, torch.float16)
        assert torch.equal(check("rotary_qk_", arguments, triton_device)[0], rotated)


@pytest.mark.parametrize("packed", [False, True], ids=["position_ids", "cu_seqlens"])
def test_rotary_of_strided_tokens(packed: bool, triton_device: torch.device) -> None:
    name = "rotary_qk_packed_" if packed else "rotary_qk_"
    arguments = example(name, [3, 15, 6], torch.float16)
    buffer = torch.full((24, 5, 2, 24), NAN, dtype=torch.float16, device=triton_device)
    view = buffer[:, 1:4]
    view.copy_(arguments["qkv"])
    strided = moved(arguments, triton_device) | {"qkv": view}
    assert_identical(call(name, CASES[name].function, strided), run(name, arguments, triton_device))
    assert buffer[:, ::4].isnan().all()


def test_layer_norm_of_a_small_spread_about_a_large_mean(triton_device: torch.device) -> None:
    """A variance taken as the mean of squares less the square of the mean would be lost."""
    arguments = example("layer_norm", [9], torch.float32, Widths(320))
    arguments["hidden_states"] = torch.randn(9, 320) * 0.1 + 1000
    check("layer_norm", arguments, triton_device)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9])
def test_layer_norm_of_every_remainder_of_rows(num_tokens: int, triton_device: torch.device) -> None:
    check("layer_norm", example("layer_norm", [num_tokens], torch.float16, Widths(480)), triton_device)


@half_types
def test_add_layer_norm_normalizes_the_sum_before_it_is_rounded(
    dtype: torch.dtype, triton_device: torch.device
) -> None:
    """Additions too small for the residual stream still reach the norm."""
    arguments = example("add_layer_norm_", [4], dtype, Widths(320), dtype)
    arguments["residual"] = torch.ones(4, 320, dtype=dtype)
    arguments["delta"] = (torch.randn(4, 320) * 1e-4).to(dtype)
    normalized, residual = check("add_layer_norm_", arguments, triton_device)
    rounded = example("layer_norm", [4], dtype, Widths(320)) | {"hidden_states": residual}
    (of_rounded,) = expect("layer_norm", rounded)
    assert not torch.allclose(normalized, of_rounded, rtol=0.1)


def test_gelu_is_the_erf_form(triton_device: torch.device) -> None:
    """The tanh form differs by up to 4.7e-4."""
    x = torch.linspace(-8, 8, 4001)[None]
    (actual,) = run("bias_gelu_", {"hidden_states": x, "bias": torch.zeros(4001)}, triton_device)
    assert float((actual - F.gelu(x.double())).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "head_dim, dtype, input_precision",
    [
        pytest.param(head_dim, dtype, precision, marks=slow_if(head_dim != 24 and dtype != torch.float16))
        for head_dim in HEAD_DIMS
        for dtype, precision in [
            *((dtype, "ieee") for dtype in DTYPES),
            (torch.float32, "tf32"),
            (torch.float32, "tf32x3"),
        ]
    ],
    ids=str,
)
def test_packed_attention_in_every_size(
    head_dim: int, dtype: torch.dtype, input_precision: str, triton_device: torch.device
) -> None:
    lengths = BOUNDARIES if head_dim < 64 else [17, 64, 129]
    arguments = example("packed_attention", lengths, dtype, Widths(num_heads=1, head_dim=head_dim))
    arguments["input_precision"] = input_precision
    (actual,) = run("packed_attention", arguments, triton_device)
    (truth,) = expect("packed_attention", arguments, torch.float64)
    # TF32 has the mantissa of FP16, but tensor cores cut off what does not fit where FP16 is rounded: twice
    # the error. The interpreter multiplies in FP32 whatever it is told.
    in_tf32 = input_precision == "tf32" and triton_device.type == "cuda"
    (yardstick,) = expect("packed_attention", arguments, torch.float16 if in_tf32 else None)
    assert actual.dtype == dtype
    assert_as_close_as_pytorch(actual, yardstick, truth, factor=4 if in_tf32 else 2)


@all_packs
def test_packed_attention_in_every_pack(lengths: list[int], triton_device: torch.device) -> None:
    check("packed_attention", example("packed_attention", lengths, torch.float16), triton_device)


@pytest.mark.parametrize("lengths", [WITH_EMPTY, LONG_AMONG_SHORT], ids=["with empty", "long among short"])
def test_packed_attention_in_fp32_in_every_pack(lengths: list[int], triton_device: torch.device) -> None:
    """Its one loop, in place of one over full blocks and one over the last, is code of its own."""
    check("packed_attention", example("packed_attention", lengths, torch.float32), triton_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_packed_attention_of_each_sequence_is_that_of_the_sequence_alone(
    dtype: torch.dtype, triton_device: torch.device
) -> None:
    lengths = [33, 3, 65, 64, 1]
    arguments = example("packed_attention", lengths, dtype)
    (packed,) = run("packed_attention", arguments, triton_device)
    splits = [arguments[name].split(lengths) for name in ("query", "key", "value")]
    for length, rows, query, key, value in zip(lengths, packed.split(lengths), *splits, strict=True):
        alone = arguments | {"query": query, "key": key, "value": value, "max_seqlen": length}
        alone["cu_seqlens"] = cu_seqlens_of([length])
        assert torch.equal(run("packed_attention", alone, triton_device)[0], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_packed_attention_of_strided_tokens(dtype: torch.dtype, triton_device: torch.device) -> None:
    """Views of the projection, and three tensors whose tokens lie at different distances."""
    arguments = example("packed_attention", [3, 40, 66], dtype)
    expected = run("packed_attention", arguments, triton_device)
    names = ("query", "key", "value")
    qkv = torch.stack([arguments[name] for name in names], 1).to(triton_device)
    views = dict(zip(names, qkv.unbind(1), strict=True))
    apart = {}
    for count, name in enumerate(names, 1):
        buffer = torch.full((109, count, 2, 24), NAN, dtype=dtype, device=triton_device)
        apart[name] = buffer[:, count - 1]
        apart[name].copy_(arguments[name])
    cu_seqlens = arguments["cu_seqlens"].to(triton_device)
    for tensors in (views, apart):
        arguments |= tensors | {"cu_seqlens": cu_seqlens}
        assert_identical(call("packed_attention", kernels.packed_attention, arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_m, block_n", [(16, 64), (128, 16), (32, 32)])
def test_packed_attention_with_tuned_settings(
    dtype: torch.dtype,
    block_m: int,
    block_n: int,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, Arguments]],
) -> None:
    tuned = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
    key = launch.settings_key("packed_attention", 24, dtype)
    monkeypatch.setitem(launch.tuned_settings(triton_device), key, tuned)
    arguments = example("packed_attention", [3, 0, 17, 64, 33, 0], dtype, Widths(num_heads=1))
    check("packed_attention", arguments, triton_device)
    ((_, settings),) = launches
    assert tuned.items() <= settings.items()


@pytest.mark.parametrize("head_dim", [16, 24])
def test_overlapped_attention_gives_the_same_bits(
    head_dim: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of no full block, of one, of two and of more, each with and without a rest."""
    settings = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    tuned = launch.tuned_settings(triton_device)
    lengths = [15, 16, 17, 32, 33, 48, 70, 0, 3]
    arguments = example("packed_attention", lengths, torch.float16, Widths(num_heads=1, head_dim=head_dim))
    results = []
    for overlap in (0, 1):
        key = launch.settings_key("packed_attention", head_dim, torch.float16)
        monkeypatch.setitem(tuned, key, settings | {"OVERLAP": overlap})
        results.append(check("packed_attention", arguments, triton_device))
    assert_identical(*results)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(lengths, id=name, marks=slow_if(lengths == LONG_AMONG_SHORT))
        for name, lengths in PACKS.items()
    ],
)
def test_attention_maps_in_every_pack(lengths: list[int], triton_device: torch.device) -> None:
    widths = Widths(num_heads=1, head_dim=16) if lengths == BOUNDARIES else SMALL
    arguments = example("add_attention_maps_", lengths, torch.float16, widths)
    check("add_attention_maps_", arguments, triton_device)


@pytest.mark.parametrize(
    "head_dim, dtype",
    [
        pytest.param(head_dim, dtype, marks=slow_if(head_dim != 24 and dtype != torch.float16))
        for head_dim in HEAD_DIMS
        for dtype in DTYPES
    ],
    ids=str,
)
def test_attention_maps_of_every_head_dim(
    head_dim: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    arguments = example("add_attention_maps_", [3, 37], dtype, Widths(num_heads=3, head_dim=head_dim))
    check("add_attention_maps_", arguments, triton_device)


def test_attention_maps_of_strided_tokens(triton_device: torch.device) -> None:
    arguments = example("add_attention_maps_", [17, 3, 66], torch.float16)
    expected = run("add_attention_maps_", arguments, triton_device)
    qkv = torch.full((86, 3, 2, 24), NAN, dtype=torch.float16, device=triton_device)
    views = {name: qkv[:, index] for index, name in enumerate(("query", "key"))}
    for name, view in views.items():
        view.copy_(arguments[name])
    strided = moved(arguments, triton_device) | views
    assert_identical(call("add_attention_maps_", kernels.add_attention_maps_, strided), expected)


@pytest.mark.parametrize("lengths", [BOUNDARIES, ONE], ids=len)
@pooling
def test_pooling_leaves_out_bos_and_eos(name: str, lengths: list[int], triton_device: torch.device) -> None:
    arguments = example(name, lengths, torch.float16, Widths(120))
    ends = arguments["cu_seqlens"].long()
    arguments["hidden_states"][ends[:-1]] = NAN
    arguments["hidden_states"][ends[1:] - 1] = INF
    check(name, arguments, triton_device)


@pooling
def test_pooling_without_residues_touches_no_neighbor(name: str, triton_device: torch.device) -> None:
    lengths = [0, 5, 0, 0, 20, 2, 3, 0, 0]
    arguments = example(name, lengths, torch.float32)
    (pooled,) = run(name, arguments, triton_device)
    filled = torch.tensor(lengths) > 2
    assert (pooled[~filled].isneginf() if name == "segment_max" else pooled[~filled].isnan()).all()
    arguments["hidden_states"] = arguments["hidden_states"][[*range(25), *range(27, 30)]]
    arguments["cu_seqlens"] = cu_seqlens_of([5, 20, 3])
    assert torch.equal(run(name, arguments, triton_device)[0], pooled[filled])


@all_dtypes
def test_segment_max_of_values_that_are_not_finite(dtype: torch.dtype, triton_device: torch.device) -> None:
    """A NaN is not passed over wherever among the residues it lies; infinities are values like others."""
    lengths = [150, 3, 70, 66]
    arguments = example("segment_max", lengths, dtype)
    states = arguments["hidden_states"]
    for column, row in enumerate([1, 63, 64, 65, 128, 148]):
        states[row, column] = NAN
        states[row - 1, column] = INF
    states[151] = -INF
    states[160:170, 5] = INF
    (maxima,) = run("segment_max", arguments, triton_device)
    assert_identical([maxima], expect("segment_max", arguments))
    assert maxima[0, :6].isnan().all()
    assert maxima[0, 6:].isfinite().all()
    assert maxima[1].isneginf().all()
    assert maxima[2, 5].isposinf()
    assert maxima[3].isfinite().all()


def test_norms_of_values_near_the_fp16_limit(triton_device: torch.device) -> None:
    """Squares and sums beyond FP16 stay finite, as does the norm of a sum that FP16 cannot hold."""
    arguments = example("layer_norm", [5], torch.float16, Widths(5120))
    states = torch.rand(5, 5120).mul(5504).add(60000).mul(torch.randn(5, 5120).sign()).half()
    states[0] = 65504
    states[1, ::2], states[1, 1::2] = 65504, -65504
    check("layer_norm", arguments | {"hidden_states": states}, triton_device)

    arguments = example("add_layer_norm_", [5], torch.float16, Widths(5120), torch.float16)
    arguments |= {"delta": states, "residual": states.clone()}
    actual = run("add_layer_norm_", arguments, triton_device)
    assert actual[1].isinf().all()
    (truth, _), (same_dtype, residual) = (
        expect("add_layer_norm_", arguments, dtype) for dtype in (torch.float64, None)
    )
    assert torch.equal(actual[1], residual)
    assert_as_close_as_pytorch(actual[0], same_dtype, truth)


def test_gelu_of_values_near_the_fp16_limit(triton_device: torch.device) -> None:
    arguments = example("bias_gelu_", [3], torch.float16, Widths(ffn_size=320))
    states = torch.empty(3, 320).fill_(65504)
    states[:, ::2] = -65504
    arguments = {"hidden_states": states.half(), "bias": torch.zeros(320).half()}
    check("bias_gelu_", arguments, triton_device)
    arguments["bias"][:4] = 100
    (actual,) = run("bias_gelu_", arguments, triton_device)
    assert_identical([actual], expect("bias_gelu_", arguments))
    assert actual[:, 1].isposinf().all()
    assert not actual[:, ::2].any()


def test_attention_of_values_near_the_fp16_limit(triton_device: torch.device) -> None:
    """Scores beyond FP16, weights that underflow, and sums of values beyond FP16."""
    arguments = example("packed_attention", [3, 17, 66], torch.float16, Widths(head_dim=64))
    arguments["query"] *= 100
    arguments["key"] *= 100
    arguments["value"] = torch.rand(86, 2, 64).mul(5000).add(60000).half()
    scores = arguments["query"].double()[0, 0] @ arguments["key"].double()[:, 0].T
    assert scores.abs().max() > 65504
    check("packed_attention", arguments, triton_device)


@pooling
def test_pooling_of_values_near_the_fp16_limit(name: str, triton_device: torch.device) -> None:
    states = torch.empty(129, 320).fill_(-65504).half()
    arguments = {"hidden_states": states, "cu_seqlens": cu_seqlens_of([129])}
    (pooled,) = run(name, arguments, triton_device)
    assert (pooled == -65504).all()


@all_operations
def test_as_many_launches_as_the_case_says(
    name: str, triton_device: torch.device, launches: list[tuple[str, Arguments]]
) -> None:
    run(name, example(name, [3, 5], torch.float16), triton_device)
    assert len(launches) == CASES[name].launches


@pytest.mark.parametrize("name", [name for name in OPERATIONS if not CASES[name].direct])
def test_double_precision_is_never_given_to_triton(
    name: str, triton_device: torch.device, launches: list[tuple[str, Arguments]]
) -> None:
    arguments = example(name, [3, 5], torch.float64)
    arguments |= {key: arguments[key].double() for key in ("cos", "sin", "residual") if key in arguments}
    assert_identical(run(name, arguments, triton_device), expect(name, arguments))
    assert not launches


@all_operations
def test_a_repeated_call_gives_the_same_bits(name: str, triton_device: torch.device) -> None:
    arguments = example(name, [17, 3, 33], torch.float16)
    first = run(name, arguments, triton_device)
    assert_identical(run(name, arguments, triton_device), first)


@all_operations
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=len)
@half_types
def test_an_empty_batch_gives_an_empty_result(
    name: str, lengths: list[int], dtype: torch.dtype, triton_device: torch.device
) -> None:
    arguments = example(name, lengths, dtype)
    actual = run(name, arguments, triton_device)
    if name == "segment_mean":  # the mean of no residues is none
        assert actual[0].shape == (len(lengths), 48)
        assert actual[0].isnan().all()
        return
    assert_identical(actual, expect(name, arguments))


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, torch.float16) for name in OPERATIONS), ("packed_attention", torch.float32)],
    ids=str,
)
def test_what_lies_around_the_arguments_is_neither_read_nor_written(
    name: str, dtype: torch.dtype, triton_device: torch.device
) -> None:
    """Around floats lies NaN, around token ids `<mask>`, around cu_seqlens plausible boundaries."""
    arguments = example(name, [17, 3, 33], dtype)
    buffers = {}
    guarded: Arguments = {}
    for key, value in arguments.items():
        guarded[key] = value
        if isinstance(value, torch.Tensor):
            around = NAN if value.is_floating_point() else MASK_ID
            buffer = value.new_full((len(value) + 2 * GUARD_ROWS, *value.shape[1:]), around)
            buffers[key] = buffer = buffer.to(triton_device)
            guarded[key] = buffer[GUARD_ROWS:-GUARD_ROWS]
            guarded[key].copy_(value)
    assert_identical(call(name, CASES[name].function, guarded), run(name, arguments, triton_device))
    for key, buffer in buffers.items():
        for rows in (buffer[:GUARD_ROWS], buffer[-GUARD_ROWS:]):
            assert (rows.isnan() if rows.is_floating_point() else rows == MASK_ID).all(), key
        if key not in CASES[name].mutates:
            assert torch.equal(guarded[key].cpu(), arguments[key]), key


@pytest.mark.parametrize(
    "bad, name",
    [
        pytest.param(bad, name, marks=slow_if(bad == INF and name != "packed_attention"))
        for bad in (NAN, INF)
        for name in OPERATIONS
        if name != "embed_tokens"
    ],
    ids=str,
)
def test_a_bad_sequence_spoils_no_other(bad: float, name: str, triton_device: torch.device) -> None:
    lengths = [17, 3, 33, 5, 66, 4]
    arguments = example(name, lengths, torch.float16)
    clean = run(name, arguments, triton_device)
    bad_tokens = torch.zeros(sum(lengths), dtype=torch.bool)
    for start, end in ((17, 20), (53, 58)):
        bad_tokens[start:end] = True
    spoiled = moved(arguments, torch.device("cpu"))
    for value in spoiled.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and len(value) == len(bad_tokens):
            value[bad_tokens] = bad
    bad_rows = bad_tokens
    if name in POOLING:
        bad_rows = torch.tensor([False, True, False, True, False, False])
    for ours, expected in zip(run(name, spoiled, triton_device), clean, strict=True):
        assert torch.equal(ours[~bad_rows], expected[~bad_rows])
        assert not torch.equal(ours[bad_rows], expected[bad_rows])


def swapped_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, with heads and head_dim stored the other way round."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other_column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


NEEDS_CONTIGUOUS = {
    "embed_tokens": ["input_ids", "cu_seqlens", "weight"],
    "rotary_qk_": ["position_ids"],
    "rotary_qk_packed_": ["cu_seqlens"],
    "packed_attention": ["cu_seqlens"],
    "add_attention_maps_": ["weight", "scores", "cu_seqlens"],
    "layer_norm": ["hidden_states", "weight", "bias"],
    "add_layer_norm_": ["residual", "weight", "bias"],
    "bias_gelu_": ["hidden_states", "bias"],
    "segment_mean": ["hidden_states", "cu_seqlens"],
    "segment_max": ["hidden_states", "cu_seqlens"],
}


@pytest.mark.parametrize(
    "name, argument, change, message",
    [
        ("packed_attention", "query", swapped_heads, "query must be .* contiguous within a token"),
        ("packed_attention", "key", swapped_heads, "key must be .* contiguous within a token"),
        ("packed_attention", "value", lambda value: value[:, :1], "value must be"),
        ("packed_attention", "key", lambda key: key[:-1], "key must be"),
        ("packed_attention", "softmax_scale", lambda _: -0.125, "softmax_scale must be above 0, got -0.125"),
        (
            "packed_attention",
            "input_precision",
            lambda _: "fp32",
            "'fp32' is not one of 'ieee', 'tf32', 'tf32x3'",
        ),
        ("add_attention_maps_", "query", swapped_heads, "query must be .* contiguous within a token"),
        ("add_attention_maps_", "key", lambda key: key[:-1], "key must be"),
        (
            "add_attention_maps_",
            "scores",
            lambda scores: scores[:-1],
            r"scores must be \(8, 3\), got \(7, 3\)",
        ),
        ("rotary_qk_", "qkv", swapped_heads, "qkv must be contiguous within a token"),
        ("rotary_qk_", "cos", lambda cos: cos.double(), "cos must be contiguous float32"),
        ("rotary_qk_", "sin", lambda sin: sin.half(), "sin must be contiguous float32"),
        ("rotary_qk_", "sin", lambda sin: sin[:, :-1], "sin must be contiguous float32"),
        ("rotary_qk_packed_", "cos", every_other_column, "cos must be contiguous float32"),
        *(
            (name, argument, every_other_column, f"{argument} must be contiguous")
            for name, arguments in NEEDS_CONTIGUOUS.items()
            for argument in arguments
        ),
        ("add_layer_norm_", "delta", every_other_column, "must be contiguous"),
        ("add_layer_norm_", "residual", lambda residual: residual[:-1], "residual is .*, delta"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(
    name: str,
    argument: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    triton_device: torch.device,
) -> None:
    arguments = moved(example(name, [3, 5], torch.float16), triton_device)
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message):
        call(name, CASES[name].function, arguments)
