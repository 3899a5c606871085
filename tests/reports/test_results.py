"""Medians, ratios and totals of result files, worked by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from esm_packed.reports import page
from esm_packed.reports.speedup import results
from esm_packed.reports.speedup import tables as speedup
from esm_packed.reports.speedup.results import Measurement, Results, Spread


def measurement(blocks: Mapping[int, Sequence[float]], name: str = "test_x", **info: Any) -> Measurement:
    return Measurement((name,), {"suite": "model"} | info, blocks)


def spread(middle: Any, low: Any, high: Any, blocks: int) -> Spread:
    """Of numbers, or of what equals those nearby."""
    return Spread(middle, low, high, blocks)


def file_of(*measurements: Measurement) -> Results:
    return Results(Path("x.json"), "", {}, {m.key: m for m in measurements}, [])


def test_times_are_the_median_of_all_rounds() -> None:
    """Rounds of all blocks are 1, 2, 3, 4, 30: their median is not that of the blocks' medians."""
    one = measurement(
        {0: [30.0, 1.0], 1: [2.0], 2: [4.0, 3.0]}, useful_tokens=12, bytes=None, seconds=2.0, mfu=0.3
    )
    assert one.seconds == spread(3.0, pytest.approx(1.8), pytest.approx(9.2), blocks=3)
    assert one.block_medians == {0: 15.5, 1: 2.0, 2: 3.5}
    assert one.tokens_per_second == one.rate("useful_tokens") == 4.0
    assert one.rate("bytes") is None
    # 30% in the 2 s of the record are 20% in 3 s
    assert one.share("mfu") == pytest.approx(0.2)
    assert one.share("other") is None


def test_a_ratio_is_the_median_of_those_of_the_blocks() -> None:
    slow = measurement({0: [10.0], 1: [3.0, 9.0, 5.0], 2: [12.0], 4: [7.0]})
    fast = measurement({0: [5.0], 1: [1.0], 2: [4.0], 3: [1.0]})
    # 2, 5 and 3 in the blocks of both
    assert results.ratio(slow, fast) == Spread(3.0, 2.0, 5.0, blocks=3)
    assert results.ratio(fast, slow) == spread(
        pytest.approx(1 / 3), pytest.approx(1 / 5), pytest.approx(1 / 2), blocks=3
    )
    assert results.ratio(measurement({7: [1.0]}), fast) is None


def total_ratio(pairs: Sequence[tuple[Measurement, Measurement]]) -> Spread | None:
    total = results.total(pairs)
    return None if total is None else results.ratio(*total)


def test_a_total_is_of_times_and_not_of_ratios() -> None:
    """Slow 8 s and 1 s, fast 2 s and 1 s: 9 s over 3 s. The ratios 4 and 1 have the mean 2.5; rates
    (1/8 + 1) and (1/2 + 1) would give 1.33."""
    pairs = [
        (measurement({0: [8.0]}, useful_tokens=100), measurement({0: [2.0]}, useful_tokens=100)),
        (measurement({0: [1.0]}, useful_tokens=100), measurement({0: [1.0]}, useful_tokens=100)),
    ]
    assert total_ratio(pairs) == Spread(3.0, 3.0, 3.0, blocks=1)


def test_a_class_weighs_the_same_whatever_was_measured_of_it() -> None:
    """As above with ten times the proteins, and the time, of the first class, and of both."""
    pairs = [
        (measurement({0: [80.0]}, useful_tokens=1000), measurement({0: [20.0]}, useful_tokens=1000)),
        (measurement({0: [1.0]}, useful_tokens=100), measurement({0: [1.0]}, useful_tokens=100)),
    ]
    assert total_ratio(pairs) == spread(pytest.approx(3.0), pytest.approx(3.0), pytest.approx(3.0), blocks=1)


def test_a_total_is_the_median_of_the_blocks_that_all_have() -> None:
    pairs = [
        (
            measurement({0: [8.0], 1: [2.0], 2: [4.0], 3: [50.0]}, useful_tokens=1),
            measurement({0: [1.0, 3.0, 2.0], 1: [2.0], 2: [1.0], 3: [1.0]}, useful_tokens=1),
        ),
        (
            measurement({0: [1.0], 1: [2.0], 2: [4.0], 4: [50.0]}, useful_tokens=1),
            measurement({0: [1.0], 1: [2.0], 2: [1.0], 4: [1.0]}, useful_tokens=1),
        ),
    ]
    # 9 over 3, 4 over 4, 8 over 2
    assert total_ratio(pairs) == Spread(3.0, 1.0, 4.0, blocks=3)
    assert total_ratio(pairs[:1]) == Spread(4.0, 1.0, 50.0, blocks=4)
    assert total_ratio([pairs[0], (measurement({9: [1.0]}), measurement({9: [1.0]}))]) is None
    assert total_ratio([]) is None


def test_a_total_has_time_rates_and_memory_of_all_classes() -> None:
    """100 tokens in 8 s and 300 in 3 s are 200 and 200 in 16 and 2 s; the larger memory is needed."""
    first: dict[str, Any] = {
        "useful_tokens": 100,
        "sequences": 10,
        "computed_flops": 5.0,
        "peak_memory_bytes": 7,
    }
    second: dict[str, Any] = {
        "useful_tokens": 300,
        "sequences": 3,
        "computed_flops": 9.0,
        "peak_memory_bytes": 6,
    }
    one, other = measurement({0: [8.0]}, **first), measurement({0: [3.0]}, **second)
    total = results.total(
        [(one, measurement({0: [4.0]}, **first)), (other, measurement({0: [1.5]}, **second))]
    )
    assert total is not None
    slow, fast = total
    assert dict(slow.blocks) == {0: pytest.approx([18.0])} and dict(fast.blocks) == {0: pytest.approx([9.0])}
    assert slow.tokens_per_second == pytest.approx(400 / 18)
    assert slow.rate("sequences") == pytest.approx(22 / 18)  # 20 of the first class and 2 of the second
    assert slow.info["computed_flops"] == pytest.approx(16.0)
    assert slow.info["peak_memory_bytes"] == 7
    unknown = measurement({0: [1.0]}, **first | {"peak_memory_bytes": None})
    total = results.total([(unknown, unknown), (other, other)])
    assert total is not None and total[0].info["peak_memory_bytes"] is None


def test_a_change_is_how_many_times_as_long_it_takes_now() -> None:
    now = measurement({0: [10.0], 1: [12.0], 2: [14.0]})
    before = measurement({0: [4.0], 1: [3.0], 2: [5.0]})
    (slower,) = results.changes(file_of(now), file_of(before))
    assert slower.times == spread(3.0, 2.0, pytest.approx(14 / 3), blocks=3)
    assert slower.mark == "slower"
    (faster,) = results.changes(file_of(before), file_of(now))
    assert faster.times.middle == pytest.approx(1 / 3)
    assert faster.mark == "faster"


@pytest.mark.parametrize(("second", "mark"), [(9.0, "slower"), (7.9, "")])
def test_a_mark_needs_a_gap_wider_than_both_ranges(second: float, mark: str) -> None:
    """3 to 5 before; a gap of 3 s, or of 1.9 s, to 8 or 6.9 s and more."""
    now, before = measurement({0: [second], 1: [second - 1.0]}), measurement({0: [3.0], 1: [5.0]})
    (change,) = results.changes(file_of(now), file_of(before))
    assert change.mark == mark


def test_changes_begin_with_what_became_slowest() -> None:
    before = file_of(*(measurement({0: [1.0]}, name) for name in ("a", "b", "c")))
    now = file_of(*(measurement({0: [s]}, name) for name, s in (("a", 2.0), ("b", 0.5), ("c", 3.0))))
    assert [change.measurement.key for change in results.changes(now, before)] == [("c",), ("a",), ("b",)]


@pytest.mark.parametrize("amount", ["sequences", "useful_tokens", "flops", "bytes"])
def test_other_work_is_not_compared(amount: str) -> None:
    now, before = (measurement({0: [1.0]}, "test_x", **{amount: work}) for work in (5, 6))
    assert results.changes(file_of(now), file_of(before)) == []
    assert len(results.changes(file_of(now), file_of(now))) == 1


def test_stages_leave_the_rest_of_the_run() -> None:
    stages = {"reading": 1.0, "copying": 2.0, "computing": 3.0, "writing": 4.0, "wall": 6.0}
    one = measurement({0: [9.0]}, seconds=9.0, stages=stages)
    assert results.stage_seconds(one) == {
        "reading": 1.0,
        "copying": 2.0,
        "computing": 3.0,
        "writing": 4.0,
        "other": 3.0,
    }
    assert results.stage_seconds(measurement({0: [5.0]}, seconds=5.0, stages=stages))["other"] == 0.0


def test_a_kernel_achieves_what_bounds_it() -> None:
    blocks = {0: [1.0, 2.0, 9.0]}
    assert results.achieved(measurement(blocks, ceiling_name="copy", bytes=6, flops=100)) == 3.0
    assert results.achieved(measurement(blocks, ceiling_name="fp16", bytes=6, flops=100)) == 50.0


def test_rivals_begin_with_the_fastest() -> None:
    group = [
        measurement({0: [seconds, 9.0, 9.0]}, name, suite="peers", model="8M", workload="uniref")
        for name, seconds in (("a", 1.0), ("b", 9.5), ("c", 9.0))
    ]
    group.append(measurement({0: [2.0]}, "d", suite="peers", model="8M", workload="uniref"))
    (found,) = results.rival_groups(file_of(*group)).values()
    assert [m.key[0] for m in found] == ["d", "a", "b", "c"]


def test_models_are_in_order_of_size() -> None:
    names = ["demo", "esm2_t6_8M_UR50D", "random:esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D", "650M"]
    assert [results.model_size(name) for name in names] == [0.0, 8.0, 650.0, 3000.0, 650.0]


def test_scaling_counts_tokens_and_workers() -> None:
    """Twice the workers do three times the tokens in twice the time: 1.5 times as fast, 75% efficient."""
    one, two = (
        measurement(
            {0: [seconds]},
            f"{workers}",
            suite="runner",
            provider="ray",
            model="8M",
            workload="uniref",
            workers=workers,
            useful_tokens=tokens,
        )
        for workers, seconds, tokens in ((2, 1.0, 100), (4, 2.0, 300))
    )
    table = speedup.scaling_table(file_of(two, one))
    assert [row[1:] for row in table.rows] == [
        ["2", "1 s", "100", "1.00x", "100.0%"],
        ["4", "2 s", "150", "1.50x", "75.0%"],
    ]


def forward(name: str, seconds: float, **info: Any) -> Measurement:
    unknown = dict.fromkeys(("launches", "relative_error", "backend", "peak_memory_bytes"))
    common = {
        "model": "8M",
        "workload": "uniref",
        "token_budget": 1024,
        "useful_tokens": 100,
        "sequences": 10,
    }
    return measurement({0: [seconds]}, name, **(unknown | common | {"seconds": seconds} | info))


def test_what_a_comparison_shows() -> None:
    """2 s and 1.5 times the operations before, 0.5 s after: a quarter of the time, three quarters saved."""
    slow = forward("a", 2.0, dtype="fp32", layout="padded", computed_flops=3e9, peak_memory_bytes=2**31)
    fast = forward("b", 0.5, dtype="fp32", layout="packed", computed_flops=2e9, peak_memory_bytes=2**30)
    found = results.layout_comparisons(file_of(slow, fast))
    table = speedup.comparison_table(found)
    assert dict(zip(table.headers, table.rows[0], strict=True)) == {
        "comparison": "packed over padded, FP32",
        "model": "8M",
        "lengths": "uniref",
        "time before": "2 s",
        "time after": "500 ms",
        "times as fast (range of blocks)": "4.00x (n = 1, no range)",
        "fewer operations": "1.50x",
        "time saved": "75.0%",
        "tokens/s after": "200",
        "sequences/s after": "20",
        "peak memory before": "2.00 GiB",
        "peak memory after": "1.00 GiB",
    }


@pytest.mark.parametrize(("blocks", "is_shown"), [(1, False), (2, False), (3, True)])
def test_a_range_needs_three_blocks(blocks: int, is_shown: bool) -> None:
    times = Spread(2.0, 1.0, 3.0, blocks)
    assert speedup.times_text(times) == f"2.00x ({'1.00 to 3.00' if is_shown else f'n = {blocks}, no range'})"
    assert speedup.spread_text(times) == ("2 s (1 s to 3 s)" if is_shown else "2 s")
    assert times.ends == ((1.0, 3.0) if is_shown else (2.0, 2.0))


def test_totals_are_in_the_table() -> None:
    """Two classes of 100 tokens: 2 and 4 s in FP32, 1 and 3 s in FP16."""
    seconds = {
        ("fp32", "uniref"): 2.0,
        ("fp32", "viral"): 4.0,
        ("fp16", "uniref"): 1.0,
        ("fp16", "viral"): 3.0,
    }
    measurements = [
        forward(
            f"{dtype} {workload}",
            time,
            dtype=dtype,
            workload=workload,
            layout="packed",
            peak_memory_bytes=(2**31 if dtype == "fp32" else 2**30) + (workload == "viral") * 2**30,
            computed_flops=1e9,
        )
        for (dtype, workload), time in seconds.items()
    ]
    found = results.precision_comparisons(file_of(*measurements))
    table = speedup.comparison_table(found, expected=True)
    assert [row[2] for row in table.rows] == ["uniref", "viral", "all"]
    total = shown(table, 2)
    assert total == {
        "comparison": "FP16 over FP32, packed",
        "model": "8M",
        "lengths": "all",
        "time before": "6 s",
        "time after": "4 s",
        "times as fast (range of blocks)": "1.50x (n = 1, no range)",
        "expected 1.5x to 1.8x": "within",
        "fewer operations": "1.00x",
        "time saved": "33.3%",
        "tokens/s after": "50",
        "sequences/s after": "5",
        "peak memory before": "3.00 GiB",
        "peak memory after": "2.00 GiB",
    }
    assert shown(table, 0)["expected 1.5x to 1.8x"] == "above"  # 2 times
    assert shown(table, 1)["expected 1.5x to 1.8x"] == "below"  # 4/3 times
    assert "expected 1.5x to 1.8x" not in speedup.comparison_table(found).headers


def test_only_fp16_over_fp32_in_the_same_layout_is_expected_to_gain() -> None:
    others = [
        forward("a", 1.6, dtype="fp32", layout="packed"),
        forward("b", 1.6, dtype="fp32", layout="padded"),
        forward("c", 1.0, dtype="bf16", layout="packed"),
        forward("d", 1.0, dtype="fp16", layout="packed"),
    ]
    every = results.precision_comparisons(file_of(*others)) + results.combined_comparisons(file_of(*others))
    table = speedup.comparison_table(every, expected=True)
    marks = {row[0]: shown(table, index)["expected 1.5x to 1.8x"] for index, row in enumerate(table.rows)}
    assert marks == {
        "FP16 over FP32, packed": "within",
        "BF16 over FP32, packed": "",
        "FP16 packed over FP32 padded": "",
    }


@pytest.mark.parametrize(("load", "is_overloaded"), [(2.04, False), (2.06, True), (None, False)])
def test_a_machine_is_overloaded_when_its_load_exceeds_its_cores(
    load: float | None, is_overloaded: bool
) -> None:
    found = Results(Path("x.json"), "", {"cpu_cores": 2}, {}, [], load)
    assert found.is_overloaded == is_overloaded


def test_the_load_is_the_highest_of_all_blocks_and_of_the_end(tmp_path: Path) -> None:
    def load(of_blocks: Sequence[float | None], at_the_end: float | None) -> float | None:
        records = [
            {
                "name": f"test_x[{block}]",
                "params": {"block": block},
                "extra_info": {"suite": "model", "block": block, "load_average": value},
                "stats": {"data": [1.0]},
            }
            for block, value in enumerate(of_blocks)
        ]
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"machine_info": {"load_average": at_the_end}, "benchmarks": records}))
        return results.read_results(path).load

    assert load([1.0, 5.0, 2.0], 3.0) == 5.0
    assert load([1.0], 3.0) == 3.0
    assert load([None], None) is None


def test_what_a_forward_pass_shows() -> None:
    one = forward(
        "a",
        0.5,
        dtype="fp16",
        layout="padded",
        padded_tokens=125,
        mfu_measured=0.5,
        mfu_datasheet=0.25,
        share_of_floor=0.75,
        relative_error=2e-4,
        backend="varlen",
    )
    table = speedup.forward_table(file_of(one))
    assert dict(zip(table.headers, table.rows[0], strict=True)) == {
        "model": "8M",
        "lengths": "uniref",
        "precision": "fp16",
        "layout": "padded",
        "budget": "1,024",
        "time (p20 to p80)": "500 ms",
        "tokens/s": "200",
        "sequences/s": "20",
        "padding": "20.0%",
        "MFU, measured rate": "50.0%",
        "MFU, datasheet": "25.0%",
        "share of the floor": "75.0%",
        "relative error": "2.0e-04",
        "attention": "varlen",
    }


def shown(table: page.Table, row: int = 0) -> dict[str, str]:
    return dict(zip(table.headers, table.rows[row], strict=True))


@pytest.mark.parametrize(
    ("ceiling", "achieved", "roof"),
    [("copy", "300 GB/s", "400 GB/s"), ("fp16", "3 TFLOP/s", "4 TFLOP/s")],
)
def test_what_a_kernel_shows(ceiling: str, achieved: str, roof: str) -> None:
    rate = 4e11 if ceiling == "copy" else 4e12
    names: dict[str, Any] = {
        "operation": "layer_norm",
        "model": "8M",
        "workload": "uniref",
        "dtype": "fp16",
        "provider": "ours",
    }
    amounts: dict[str, Any] = {
        "bytes": 6e11,
        "flops": 6e12,
        "ceiling_name": ceiling,
        "ceiling_per_second": rate,
    }
    one = measurement({0: [2.0]}, **names, **amounts, relative_error=2e-4)
    assert shown(speedup.kernels_table([one])) == {
        "operation": "layer_norm",
        "model": "8M",
        "lengths": "uniref",
        "precision": "fp16",
        "provider": "ours",
        "time of one launch (p20 to p80)": "2 s",
        "achieved": achieved,
        "ceiling": roof,
        "share of the ceiling": "75.0%",
        "relative error": "2.0e-04",
    }


def test_what_a_rival_shows() -> None:
    """3 s beside 2 s, with a fifth of the computed tokens padding."""
    rival = {"suite": "peers", "dtype": "fp32", "padded_tokens": 125}
    group = [
        forward("a", 3.0, **rival, provider="fair_esm"),
        forward("b", 2.0, **(rival | {"padded_tokens": 100}), provider="esm_packed"),
        forward("c", 1.0, **rival, provider="floor_matmul_mm"),
    ]
    table = speedup.rivals_table(file_of(*group))
    assert [row[2] for row in table.rows] == [
        "floor: matmuls by torch.mm",
        "esm-packed, FP32",
        "fair-esm, FP32",
    ]
    assert shown(table, 2) == {
        "model": "8M",
        "lengths": "uniref",
        "contender": "fair-esm, FP32",
        "tokens a batch": "1,024",
        "time (p20 to p80)": "3 s",
        "tokens/s": "33",
        "sequences/s": "3",
        "padding": "20.0%",
        "esm-packed is": "1.50x (n = 1, no range) as fast",
    }
    floor = shown(table, 0)
    assert (floor["tokens/s"], floor["sequences/s"], floor["esm-packed is"]) == ("", "", "")


def test_what_a_run_from_fasta_shows() -> None:
    stages = {"reading": 0.1, "copying": 0.2, "computing": 0.3, "writing": 0.4, "wall": 1.5}
    one = forward("a", 2.0, suite="end_to_end", dtype="fp32", stages=stages, mfu_measured=0.5)
    assert shown(speedup.end_to_end_table(file_of(one))) == {
        "model": "8M",
        "lengths": "uniref",
        "precision": "fp32",
        "wall time (p20 to p80)": "2 s",
        "tokens/s": "50",
        "sequences/s": "5",
        "reading": "100 ms",
        "copying": "200 ms",
        "computing": "300 ms",
        "writing": "400 ms",
        "pipeline": "1.5 s",
        "other": "500 ms",
        "MFU, measured rate": "50.0%",
    }


def test_rounds_of_a_block_are_joined(tmp_path: Path) -> None:
    """As in a file of two runs of the same benchmark."""
    records = [
        {
            "name": f"test_x[{block}]",
            "params": {"block": block},
            "extra_info": {"suite": "model", "block": block},
            "stats": {"data": times},
        }
        for block, times in ((0, [1.0, 9.0]), (1, [4.0]), (0, [2.0]))
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"benchmarks": records}))
    (one,) = results.read_results(path).measurements.values()
    assert one.blocks == {0: [1.0, 9.0, 2.0], 1: [4.0]}
    assert one.seconds.middle == 3.0


def test_comparisons_are_of_the_same_model_lengths_and_budget() -> None:
    base = {"dtype": "fp32", "layout": "packed"}
    others = [
        forward("half", 1.0, dtype="fp16", layout="packed"),
        forward("right", 2.0, **base),
        forward("model", 3.0, **base, model="650M"),
        forward("lengths", 4.0, **base, workload="viral"),
        forward("budget", 5.0, **base, token_budget=2048),
        forward("layout", 6.0, dtype="fp32", layout="padded"),
    ]
    (comparison,) = results.precision_comparisons(file_of(*others))
    assert comparison.slow is not None and comparison.slow.key == ("right",)
    assert comparison.times.middle == 2.0
    (combined,) = results.combined_comparisons(file_of(*others))
    assert combined.slow is not None and combined.slow.key == ("layout",)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (2.5, "2.5 s"),
        (1234.5, "1,234 s"),
        (0.0123, "12.3 ms"),
        (4.56e-5, "45.6 µs"),
        (1e-8, "0.01 µs"),
    ],
)
def test_seconds_have_three_digits_and_a_unit(seconds: float | None, text: str) -> None:
    assert speedup.time_text(seconds) == text


def test_rates_have_a_prefix() -> None:
    values = [2.5e12, 3e9, 4.56e6, 7.0e3, 12.0]
    texts = ["2.5 TB/s", "3 GB/s", "4.56 MB/s", "7 kB/s", "12 B/s"]
    assert [speedup._rate(value, "B/s") for value in values] == texts
    assert speedup._rate(None, "B/s") == ""
