"""Matrix multiplications with an epilogue of ours: fc1 with GELU, the QKV projection with the rotation.

See `test_triton_kernels.py`, whose tests of every operation include these.
"""

from __future__ import annotations

import pytest
import torch
from small_cases import Widths, example
from triton_runs import check, run

from esm_packed.kernels import launch
from esm_packed.kernels.cases import ALL_DTYPES, HALF_DTYPES, Arguments

pytestmark = pytest.mark.usefixtures("poisoned_memory", "seeded")

HEAD_DIMS = [16, 24, 32, 64, 128]
all_dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
half_types = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)


@pytest.mark.parametrize("in_features, out_features", [(320, 1280), (480, 1920), (1280, 640)])
@all_dtypes
def test_linear_gelu(
    in_features: int, out_features: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    arguments = example("linear_gelu", [9], dtype, Widths(in_features, ffn_size=out_features))
    check("linear_gelu", arguments, triton_device)


@pytest.mark.parametrize(
    "num_tokens, in_features, out_features",
    [
        (1, 72, 136),
        (17, 64, 128),
        (127, 136, 120),
        (128, 64, 8),
        (129, 72, 264),
        (9, 320, 136),
    ],
)
@half_types
def test_gemm_bias_gelu_around_its_tiles(
    num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype, gemm_device: torch.device
) -> None:
    arguments = example("gemm_bias_gelu", [num_tokens], dtype, Widths(in_features, ffn_size=out_features))
    check("gemm_bias_gelu", arguments, gemm_device)


@pytest.mark.parametrize("num_programs", [1, 3, 100])
def test_gemm_bias_gelu_computes_every_tile(
    num_programs: int, gemm_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine rows of tiles, of which eight form a group, and two columns, shared among the programs."""
    monkeypatch.setattr("esm_packed.kernels.gemm.num_multiprocessors", lambda device: num_programs)
    arguments = example("gemm_bias_gelu", [8 * 128 + 1], torch.float16, Widths(32, ffn_size=136))
    check("gemm_bias_gelu", arguments, gemm_device)


@pytest.mark.parametrize(
    "tuned, constant",
    [({"PROGRAMS": 2}, "NUM_PROGRAMS"), ({"NUM_STORES": 2}, "NUM_STORES"), ({"FLATTEN": 1}, "FLATTEN")],
)
def test_gemm_bias_gelu_with_tuned_settings(
    tuned: dict[str, int],
    constant: str,
    gemm_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, Arguments]],
) -> None:
    monkeypatch.setattr("esm_packed.kernels.gemm.num_multiprocessors", lambda device: 1)
    key = launch.settings_key("gemm_bias_gelu", 72, torch.float16)
    monkeypatch.setitem(launch.tuned_settings(gemm_device), key, tuned)
    arguments = example("gemm_bias_gelu", [129], torch.float16, Widths(72, ffn_size=136))
    check("gemm_bias_gelu", arguments, gemm_device)
    assert {settings[constant] for _, settings in launches} == set(tuned.values())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@all_dtypes
def test_linear_rotary(head_dim: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    """In two steps."""
    arguments = example("linear_rotary", [3, 9, 4], dtype, Widths(72, num_heads=3, head_dim=head_dim))
    check("linear_rotary", arguments, triton_device)


def test_kernels_refuse_interleaved_heads(triton_device: torch.device) -> None:
    arguments = example("linear_rotary", [3, 9], torch.float16) | {"interleaved": True}
    with pytest.raises(ValueError, match="interleaved heads are for a CPU"):
        run("linear_rotary", arguments, triton_device)


@pytest.mark.parametrize(
    "head_dim, num_heads, dtype",
    [
        pytest.param(head_dim, num_heads, dtype, marks=() if dtype == quick else pytest.mark.slow)
        for head_dim, num_heads, quick in [
            (16, 4, torch.float16), (24, 2, torch.float16), (32, 2, torch.bfloat16),
            (64, 1, torch.float16), (128, 1, torch.bfloat16),
        ]
        for dtype in HALF_DTYPES
    ],
)  # fmt: skip
def test_gemm_bias_rotary_of_every_head_dim(
    head_dim: int, num_heads: int, dtype: torch.dtype, gemm_device: torch.device
) -> None:
    """Sequences that begin inside of a tile of 128 tokens, and one that goes on in the next.

    The dtypes left out by default take 3 s.
    """
    arguments = example("gemm_bias_rotary", [5, 0, 70, 64], dtype, Widths(72, num_heads, head_dim))
    check("gemm_bias_rotary", arguments, gemm_device)


@pytest.mark.parametrize("num_tokens, in_features, num_heads", [(1, 64, 1), (128, 136, 3), (17, 8, 5)])
def test_gemm_bias_rotary_around_its_tiles(
    num_tokens: int, in_features: int, num_heads: int, gemm_device: torch.device
) -> None:
    """Keys end inside of a tile."""
    widths = Widths(in_features, num_heads, head_dim=16)
    check("gemm_bias_rotary", example("gemm_bias_rotary", [num_tokens], torch.float16, widths), gemm_device)


@pytest.mark.parametrize("tuned", [{"PROGRAMS": 3}, {"FLATTEN": 1}, {"BLOCK_N": 256}], ids=str)
def test_gemm_bias_rotary_with_tuned_settings(
    tuned: dict[str, int],
    gemm_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, Arguments]],
) -> None:
    key = launch.settings_key("gemm_bias_rotary", 72, torch.float16)
    monkeypatch.setitem(launch.tuned_settings(gemm_device), key, tuned)
    arguments = example("gemm_bias_rotary", [129], torch.float16, Widths(72, 2, 32))
    check("gemm_bias_rotary", arguments, gemm_device)
    ((name, settings),) = launches
    assert name == "_gemm_bias_rotary_kernel"
    assert {"NUM_PROGRAMS": 3, "FLATTEN": 1, "BLOCK_N": 256}.items() & settings.items()


def test_values_of_the_projection_are_not_rotated(gemm_device: torch.device) -> None:
    """Bits as without positions, also where a value is infinite."""
    arguments = example("gemm_bias_rotary", [40, 30], torch.float16, Widths(72, 2, 32))
    arguments["bias"][2 * 64 + 5] = float("inf")
    still = arguments | {"position_ids": torch.zeros_like(arguments["position_ids"])}
    rotated, unrotated = (run("gemm_bias_rotary", each, gemm_device)[0] for each in (arguments, still))
    assert torch.equal(rotated[:, 128:], unrotated[:, 128:])
    assert not torch.equal(rotated[:, :128], unrotated[:, :128])
    assert rotated.isinf().sum() == 70


@pytest.mark.parametrize(
    "argument, message",
    [("position_ids", r"position_ids must be \(3,\), got \(2,\)"), ("cos", "cos must be contiguous float32")],
)
def test_positions_and_tables_that_do_not_fit_are_refused(
    argument: str, message: str, triton_device: torch.device
) -> None:
    arguments = example("gemm_bias_rotary", [3], torch.float16, Widths(72, 1, 32))
    changed = arguments[argument][:-1] if argument == "position_ids" else arguments[argument].half()
    with pytest.raises(ValueError, match=message):
        run("gemm_bias_rotary", arguments | {argument: changed}, triton_device)


def test_a_head_wider_than_a_tile_is_refused(triton_device: torch.device) -> None:
    arguments = example("gemm_bias_rotary", [3], torch.float16, Widths(72, 1, 256))
    with pytest.raises(ValueError, match="heads of 256 are wider than a tile of 128 columns"):
        run("gemm_bias_rotary", arguments, triton_device)


@pytest.mark.parametrize(
    "operation, widths, fused",
    [
        ("gelu", Widths(72, ffn_size=288), True),
        ("gelu", Widths(72, ffn_size=72), False),  # the language-model head
        ("rotary", Widths(72, 3, 24), True),
        ("rotary", Widths(256, 1, 256), False),  # wider than a tile
    ],
)
def test_products_are_fused_where_that_was_found_faster(
    operation: str,
    widths: Widths,
    fused: bool,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, Arguments]],
) -> None:
    separate = {"gelu": "_bias_gelu_kernel", "rotary": "_rotary_qk_kernel"}[operation]
    arguments = example(f"linear_{operation}", [4, 5], torch.float16, widths)
    check(f"linear_{operation}", arguments, triton_device)
    key = launch.settings_key(f"linear_{operation}", widths.hidden_size, torch.float16)
    monkeypatch.setitem(launch.tuned_settings(triton_device), key, {"FUSED": 1})
    check(f"linear_{operation}", arguments, triton_device)
    names = [name for name, _ in launches]
    assert names == [separate, f"_gemm_bias_{operation}_kernel" if fused else separate]
