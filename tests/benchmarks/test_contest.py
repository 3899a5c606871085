"""What is compared is held against FP64 as a whole before it is timed."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from workloads import proteins

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

MODEL, WORKLOAD, TOTAL_TOKENS = "demo", "short50", 1500
SEQUENCES = proteins(WORKLOAD, TOTAL_TOKENS)
LENGTHS = [len(sequence) for sequence in SEQUENCES]
ENDS = {
    "first": 0,
    "last": len(SEQUENCES) - 1,
    "shortest": int(np.argmin(LENGTHS)),
    "longest": int(np.argmax(LENGTHS)),
}

contest = importlib.import_module("contenders.contest")


class NeverTimed:
    """Takes the place of pytest-benchmark's fixture."""

    group: str | None = None

    def pedantic(self, *_: Any, **__: Any) -> None:
        pytest.fail("timed before it was checked")


@pytest.fixture
def options() -> Any:
    values = {"--tokens": TOTAL_TOKENS, "--token-budget": 256, "--full": True}
    return SimpleNamespace(getoption=values.get)


def spoil(monkeypatch: pytest.MonkeyPatch, protein: int, factor: float) -> None:
    """Have esm-packed give `factor` times what it should for one protein."""
    embeddings = contest.EsmPacked.embeddings

    def spoiled(provider: Any) -> torch.Tensor:
        rows: torch.Tensor = embeddings(provider)
        rows[protein] *= factor
        return rows

    monkeypatch.setattr(contest.EsmPacked, "embeddings", spoiled)


def as_rival(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have every rival computed by esm-packed, so that it needs no other package; the entries loaded."""
    loaded = []

    def load(self: Any, entry: Any) -> Any:
        loaded.append(entry)
        return contest.EsmPacked(self.model(entry.model, entry.dtype), entry.token_budget)

    monkeypatch.setattr(contest.Contest, "_load", load)
    return loaded


def test_the_ends_are_checked_among_others() -> None:
    """The workload has all ends in different places, so that none is checked for the sake of another."""
    assert len(set(ENDS.values())) == 4
    indices = contest.checked_indices(SEQUENCES)
    assert set(ENDS.values()) < set(indices)
    assert len(set(indices)) == len(indices) < len(SEQUENCES)
    assert contest.checked_indices(["MK"]) == [0]


@pytest.mark.parametrize("end", ENDS)
def test_a_wrong_end_is_not_timed(end: str, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    spoil(monkeypatch, ENDS[end], 1.001)
    with pytest.raises(AssertionError, match=r"relative_error to FP64 is 1\.0e-03"):
        importlib.import_module("bench_model").test_model(
            0, MODEL, WORKLOAD, "fp32", "packed", 256, contest.Contest(), NeverTimed(), options
        )


def test_esm_packed_is_held_to_more_than_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, ENDS["longest"], 1 + 5e-5)
    entry = contest.Entry("esm_packed", MODEL, WORKLOAD, TOTAL_TOKENS, "fp32", "packed", 256)
    with pytest.raises(AssertionError, match=r"relative_error to FP64 is 5\.0e-05, above 1e-05"):
        contest.Contest().ready(entry)
    as_rival(monkeypatch)
    rival = contest.Contest().ready(contest.replace(entry, provider="fair_esm"))
    assert rival.errors["relative_error"] == pytest.approx(5e-5, rel=0.02)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nan_in_any_protein_is_not_timed(
    factor: float, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    unchecked = set(range(len(SEQUENCES))) - set(contest.checked_indices(SEQUENCES))
    for protein in (ENDS["first"], min(unchecked)):
        with monkeypatch.context() as patch:
            spoil(patch, protein, factor)
            with pytest.raises(AssertionError, match=rf"not finite.*\[{protein}\]"):
                importlib.import_module("bench_model").test_model(
                    0, MODEL, WORKLOAD, "fp32", "packed", 256, contest.Contest(), NeverTimed(), options
                )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_rival_with_nan_is_skipped_and_says_why(
    dtype: str, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    loaded = as_rival(monkeypatch)
    unchecked = set(range(len(SEQUENCES))) - set(contest.checked_indices(SEQUENCES))
    spoil(monkeypatch, max(unchecked), float("nan"))
    ring = contest.Contest()
    for block in range(2):
        with pytest.raises(pytest.skip.Exception, match=f"fair_esm in {dtype}: .*not finite"):
            importlib.import_module("bench_peers").test_peer(
                block, MODEL, WORKLOAD, "fair_esm", dtype, ring, NeverTimed(), options
            )
    assert len(loaded) == 1, "a refusal is remembered from block to block"


def test_logits_are_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rival(monkeypatch)
    entry = contest.Entry("esm_cpp", MODEL, WORKLOAD, TOTAL_TOKENS, "fp32", None, 256)
    model = contest.Contest().model(MODEL, "fp32")
    right = []
    for sequence in SEQUENCES:
        batch = contest.pack([contest.encode(sequence)])
        output = model.forward_packed(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen, [], return_logits=True
        )
        right.append(output.logits)
    given = [list(right) for _ in range(3)]
    unchecked = set(range(len(SEQUENCES))) - set(contest.checked_indices(SEQUENCES))
    given[1][-1] = 1.001 * right[-1]
    given[2][min(unchecked)] = float("nan") * right[min(unchecked)]
    for logits, message in zip(given, (None, "relative_error_logits", "logits.*not finite"), strict=True):
        monkeypatch.setattr(contest.EsmPacked, "logits", lambda provider, logits=logits: logits)
        if message is None:
            assert contest.Contest().ready(entry).errors["relative_error_logits"] < 1e-5
        else:
            with pytest.raises(contest.OtherModelError, match=message):
                contest.Contest().ready(entry)


def test_a_row_that_no_batch_computes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One protein twice and another not at all leave the number of rows as it should be."""
    lay_out = importlib.import_module("contenders.packages").lay_out
    unchecked = set(range(len(SEQUENCES))) - set(contest.checked_indices(SEQUENCES))
    lost, again = sorted(unchecked)[:2]

    def twice(*arguments: Any) -> Any:
        return [
            ([again if member == lost else member for member in members], batch)
            for members, batch in lay_out(*arguments)
        ]

    monkeypatch.setattr("contenders.packages.lay_out", twice)
    entry = contest.Entry("esm_packed", MODEL, WORKLOAD, TOTAL_TOKENS, "fp32", "packed", 256)
    with pytest.raises(AssertionError, match=rf"not finite.*\[{lost}\]"):
        contest.Contest().ready(entry)


def test_a_rival_is_timed_with_the_budget_that_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, passes = {128: [3.0], 256: [1.2, 1.0], 512: [1.1, 1.3]}, []  # 256 had a slow moment
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    run = contest.EsmPacked.run
    left = copy.deepcopy(seconds)

    def timed(provider: Any) -> None:
        run(provider)
        passes.append(sum(map(len, provider.members)))
        if provider.token_budget in seconds:
            clock.now += left[provider.token_budget].pop(0)

    monkeypatch.setattr(contest, "time", clock)
    monkeypatch.setattr(contest.EsmPacked, "run", timed)
    loaded = as_rival(monkeypatch)
    entry = contest.Entry("fair_esm", MODEL, WORKLOAD, TOTAL_TOKENS, "fp32", "padded", 1024)
    ring = contest.Contest()
    for _ in range(2):
        ready = ring.ready(entry, tuple(seconds))
    assert passes == [contest.NUM_WARMING, *[len(SEQUENCES)] * 5]
    assert len(loaded) == 1
    assert max(batch.total_tokens for batch in ready.provider.batches) <= 256
    info = ready.record(SimpleNamespace(extra_info={}, stats=None), "peers", 1)
    assert info["token_budget"] == 256
    assert info["seconds_by_token_budget"] == pytest.approx({128: 3.0, 256: 1.0, 512: 1.1})
    alone = contest.Contest().ready(entry, (1024,))
    assert (alone.entry, alone.seconds_by_token_budget) == (entry, None)


@pytest.mark.parametrize(
    ("provider", "asked", "tried"),
    [
        ("openvino", None, contest.RIVALS_TOKEN_BUDGETS),
        ("openvino", 256, ()),
        ("esm_packed_transformers", None, contest.RIVALS_TOKEN_BUDGETS),
        ("esm_packed", None, ()),
        ("floor_attention", None, ()),
    ],
)
def test_rivals_alone_are_tried_with_several_budgets(
    provider: str, asked: int | None, tried: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    given = []

    def ready(self: Any, entry: Any, token_budgets: tuple[int, ...]) -> Any:
        given.append(token_budgets)
        raise ImportError("it is not there")

    monkeypatch.setattr(contest.Contest, "ready", ready)
    monkeypatch.setitem(options.getoption.__self__, "--token-budget", asked)
    with pytest.raises(pytest.skip.Exception, match=f"{provider} in fp32: it is not there"):
        importlib.import_module("bench_peers").test_peer(
            0, MODEL, WORKLOAD, provider, "fp32", contest.Contest(), NeverTimed(), options
        )
    assert given == [tried]


def test_what_takes_minutes_is_asked_for_by_name() -> None:
    bench = importlib.import_module("bench_peers")

    def slow(contender: str, precision: str, **chosen: Any) -> bool:
        config = SimpleNamespace(getoption=lambda name: chosen.get(name.removeprefix("--")))
        return bool(bench.takes_minutes(contender, precision, config))

    assert slow("openvino", "bf16")
    assert not slow("openvino", "bf16", dtype=["bf16"])
    assert not slow("openvino", "bf16", full=True)
    assert slow("transformers_compiled", "fp32", dtype=["fp32"])
    assert not slow("transformers_compiled", "fp32", provider=["transformers_compiled"])
    assert slow("transformers_compiled", "fp16", provider=["transformers_compiled"])
    assert not slow("onnxruntime", "fp32")


def test_contenders_are_chosen_by_name() -> None:
    bench = importlib.import_module("bench_peers")

    def chosen(provider: list[str] | None, dtype: list[str] | None) -> list[tuple[str, str]]:
        options = {"--provider": provider, "--dtype": dtype, "--model": ["demo"]}
        return list(bench.parameters(SimpleNamespace(getoption=options.get))["provider, dtype"])

    assert chosen(["openvino", "esm_packed"], ["bf16"]) == [("esm_packed", "bf16"), ("openvino", "bf16")]
    assert len(chosen(None, None)) > len(chosen(None, ["fp32"])) > 10
    with pytest.raises(pytest.UsageError, match="--provider: 'opnvino' is not one of esm_packed, fair_esm"):
        chosen(["opnvino"], None)


def test_relative_errors_are_relative_to_the_truth() -> None:
    e = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert contest.worst_relative_error([2 * e], [e]) == 1.0
    assert contest.worst_relative_error([e, 2 * e, e], [e, e, e]) == 1.0


def test_fp16_may_not_take_more_memory_than_fp32() -> None:
    entry = contest.Entry("esm_packed", MODEL, WORKLOAD, TOTAL_TOKENS, "fp32", "packed", 256)
    ring = contest.Contest()

    def check(dtype: str, peak: int | None) -> None:
        ring.check_memory(SimpleNamespace(entry=contest.replace(entry, dtype=dtype), peak_memory_bytes=peak))

    check("fp32", None)
    check("fp32", 1000)
    check("fp16", 1000)
    with pytest.raises(AssertionError):
        check("fp16", 1001)


@pytest.mark.parametrize(
    ("layout", "backend", "activities", "message"),
    [
        ("packed", "varlen", ["gemm", "flash_fwd_kernel"], None),
        (
            "packed",
            "varlen",
            ["gemm", "packed_attention_kernel"],
            "no kernel of attention backend varlen ran",
        ),
        ("packed", "triton", ["gemm", "flash_fwd_kernel"], "no kernel of attention backend triton ran"),
        ("packed", "triton", [], "no kernel of attention backend triton ran"),
        ("padded", "triton", ["gemm", "fmha_cutlass"], None),
        ("packed", "sdpa", ["gemm"], None),
        ("packed", "varlen", ["flash_fwd_kernel", "Memcpy DtoD (Device -> Device)"], None),
        (
            "packed",
            "varlen",
            ["flash_fwd_kernel", "Memcpy DtoH (Device -> Pageable)"],
            "the timed pass copies",
        ),
        ("padded", "sdpa", ["Memcpy HtoD (Pinned -> Device)"], "the timed pass copies"),
    ],
)
def test_what_the_gpu_did_is_checked(
    layout: str, backend: str, activities: list[str], message: str | None
) -> None:
    provider = SimpleNamespace(layout=layout, model=SimpleNamespace(attention_backend=backend))
    if message is None:
        contest.check_activities(provider, activities)
    else:
        with pytest.raises(AssertionError, match=message):
            contest.check_activities(provider, activities)


def test_unrounded_frequencies_are_held_against_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes other frequencies than the checkpoint's passes, and its distance from these is recorded."""
    as_rival(monkeypatch)
    entry = contest.Entry("esm_cpp", MODEL, WORKLOAD, TOTAL_TOKENS, "fp32", None, 256)
    right = contest.Contest().ready(entry).errors
    assert right["relative_error"] < 1e-6
    assert "relative_error_to_checkpoint" not in right

    model = contest.Contest().model(MODEL, "fp32")
    half = model.config.head_dim // 2
    unrounded = (10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)).float()
    assert not torch.equal(unrounded, model.rotary.inv_freq)
    model.rotary.inv_freq = unrounded
    monkeypatch.setattr(contest.Contest, "model", lambda self, name, dtype: model)
    monkeypatch.setattr(contest.EsmPacked, "rounded_frequencies", False)
    other = contest.Contest().ready(entry).errors
    assert other["relative_error"] < 1e-6 < 1e-5 < other["relative_error_to_checkpoint"]


def test_a_record_counts_what_is_useful() -> None:
    """FLOPs and tokens of all proteins, padding left out, whatever the provider computes."""
    entry = contest.Entry("esm_packed", MODEL, WORKLOAD, TOTAL_TOKENS, "fp32", "padded", 256)
    ready = contest.Contest().ready(entry)
    info = ready.record(SimpleNamespace(extra_info={}, stats=None), "model", 1)
    assert info["sequences"] == len(SEQUENCES)
    assert info["useful_tokens"] == TOTAL_TOKENS == sum(LENGTHS) + 2 * len(LENGTHS)
    assert info["padded_tokens"] > TOTAL_TOKENS
    layers, hidden = ready.config.num_layers, ready.config.hidden_size
    pairs = sum((length + 2) ** 2 for length in LENGTHS)
    assert info["flops"] == layers * (24 * hidden**2 * TOTAL_TOKENS + 4 * hidden * pairs)
    padding = info["padded_tokens"] - TOTAL_TOKENS
    assert info["computed_flops"] > info["flops"] + 24 * layers * hidden**2 * padding
    floor = contest.Contest().ready(contest.replace(entry, provider="floor_attention", layout="packed"))
    of_floor = floor.record(SimpleNamespace(extra_info={}, stats=None), "peers", 1)
    assert of_floor["flops"] is of_floor["relative_error"] is of_floor["floor_seconds"] is None
    assert of_floor["useful_tokens"] == of_floor["padded_tokens"] == TOTAL_TOKENS


def test_the_largest_error_has_either_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = contest.EsmPacked.embeddings
    right = contest.compute_truth(
        contest.load_checkpoint(MODEL),
        [SEQUENCES[index] for index in contest.checked_indices(SEQUENCES)],
        True,
    ).embeddings
    entry = contest.Entry("fair_esm", MODEL, WORKLOAD, TOTAL_TOKENS, "fp16", "padded", 256)
    as_rival(monkeypatch)
    model = contest.ESM2.from_pretrained(MODEL, dtype="fp32", device="cpu")
    monkeypatch.setattr(contest.Contest, "model", lambda self, name, dtype: model)
    monkeypatch.setattr(contest.EsmPacked, "embeddings", lambda provider: embeddings(provider) - 0.01)
    errors = contest.Contest().ready(entry).errors
    assert errors["max_error"] == pytest.approx(0.01, rel=1e-3)
    assert errors["relative_error"] == pytest.approx(
        max(0.01 * row.numel() ** 0.5 / float(row.norm()) for row in right), rel=1e-3
    )


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
def test_a_gpu_before_sm_80_computes_fp32_with_the_attention_that_serves(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []

    def built(checkpoint: Any, device: torch.device, precision: Any, backend: tuple[str, Any]) -> None:
        served.append(backend[0])

    monkeypatch.setattr(contest, "DEVICE", torch.device("cuda", 0))
    monkeypatch.setattr(contest, "ESM2", SimpleNamespace(from_checkpoint=built))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    contest.Contest().model(MODEL, dtype)
    assert served == ["sdpa"]
