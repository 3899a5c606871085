"""What benchmarks time is computation alone: tokenizer, packer and files raise while the clock runs."""

from __future__ import annotations

import builtins
import importlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from esm_packed import alphabet, packing, padding
from esm_packed.kernels.reference import packed_attention

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

MODEL = "random:esm2_t6_8M_UR50D"
PACKERS = (packing.pack, packing.fill, packing.plan_packs, padding.pad, padding.plan_padded)
TOKENISERS = (alphabet.encode,)


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("the timed code prepares data")


class StrictBenchmark:
    """Takes the place of pytest-benchmark's fixture; what is timed runs once, and may prepare nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forbidden: tuple[Callable[..., Any], ...]) -> None:
        self._monkeypatch = monkeypatch
        self._forbidden = forbidden
        self.extra_info: dict[str, Any] = {}
        self.stats = None
        self.group: str | None = None
        self.calls = 0

    def pedantic(
        self, target: Callable[..., Any], args: Any = (), setup: Callable[[], Any] | None = None, **_: Any
    ) -> Any:
        if setup is not None:
            setup()
        self.calls += 1
        with self._monkeypatch.context() as patch:
            for function in self._forbidden:
                # The code, not the name: modules hold the functions under names of their own.
                assert isinstance(function, FunctionType)
                patch.setattr(function, "__code__", refuse.__code__)
                patch.setattr(function, "__defaults__", None)
                patch.setattr(function, "__kwdefaults__", None)
            patch.setattr(builtins, "open", refuse)
            patch.setattr(io, "open", refuse)
            patch.setattr(os, "open", refuse)
            return target(*args)


@pytest.fixture
def options() -> Any:
    values = {"--tokens": 400, "--token-budget": None, "--full": False}
    return SimpleNamespace(getoption=values.get)


def new_contest() -> Any:
    return importlib.import_module("contenders.contest").Contest()


@pytest.fixture(scope="module")
def contest() -> Any:
    """Its models are loaded, and its truths computed, once for all tests that leave them as they are."""
    return new_contest()


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> StrictBenchmark:
    return StrictBenchmark(monkeypatch, TOKENISERS + PACKERS)


@pytest.mark.parametrize("layout", ["packed", "padded", "padded_unsorted"])
def test_a_forward_pass_prepares_nothing(
    layout: str, contest: Any, options: Any, strict: StrictBenchmark
) -> None:
    bench = importlib.import_module("bench_model")
    bench.test_model(0, MODEL, "uniref", "fp32", layout, 1024, contest, strict, options)
    assert strict.calls == 1
    assert strict.extra_info["useful_tokens"] == 400
    assert strict.extra_info["relative_error"] < 1e-5


@pytest.mark.parametrize("layout", ["packed", "fixed"])
def test_packs_of_one_size_are_made_before(
    layout: str, contest: Any, options: Any, strict: StrictBenchmark
) -> None:
    bench = importlib.import_module("bench_model")
    bench.test_reproducible(0, MODEL, "esm_packed", layout, contest, strict, options)
    assert strict.calls == 1
    assert (strict.extra_info["padded_tokens"] % 1024 == 0) == (layout == "fixed")


@pytest.mark.parametrize(
    "provider",
    ["esm_packed", "transformers", "transformers_unsorted", "fair_esm", "floor_matmul_mm", "floor_attention"],
)
def test_rivals_are_timed_without_preparation(
    provider: str, contest: Any, options: Any, strict: StrictBenchmark
) -> None:
    bench = importlib.import_module("bench_peers")
    try:
        bench.test_peer(0, MODEL, "short50", provider, "fp32", contest, strict, options)
    except pytest.skip.Exception as reason:  # a package may be missing, but none computes another model
        if "FP64" in str(reason) or "not finite" in str(reason):
            pytest.fail(str(reason))
        raise
    assert strict.calls == 1
    assert strict.extra_info["provider"] == provider


@pytest.mark.parametrize("layout", ["padded", "padded_unsorted"])
def test_the_model_behind_transformers_interface_is_timed_with_its_packing(
    layout: str, contest: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, benchmark = importlib.import_module("bench_peers"), StrictBenchmark(monkeypatch, TOKENISERS)
    provider = "esm_packed_transformers" + layout.removeprefix("padded")
    bench.test_peer(0, MODEL, "short50", provider, "fp32", contest, benchmark, options)
    assert benchmark.calls == 1
    record = benchmark.extra_info
    assert (record["layout"], record["backend"]) == (layout, "sdpa")
    assert record["padded_tokens"] == record["useful_tokens"] == 400
    assert record["relative_error"] < 1e-5


@pytest.fixture(scope="module")
def marginals() -> Any:
    return importlib.import_module("contenders.marginals").MarginalsContest(new_contest())


@pytest.mark.parametrize(
    ("provider", "copies"),
    [("esm_packed", 0), ("esm_packed_every_row", 0), ("fair_esm", 1), ("transformers", 3)],
)
def test_masked_marginals_are_timed_without_preparation(
    provider: str, copies: int, marginals: Any, strict: StrictBenchmark
) -> None:
    bench = importlib.import_module("bench_scoring")
    options = SimpleNamespace(getoption={"--tokens": 9, "--token-budget": 30}.get)
    bench.test_masked_marginals(0, "demo", "fp32", provider, copies, marginals, strict, options)
    assert strict.calls == 1
    record = strict.extra_info
    assert record["max_error"] < 5e-5
    assert (record["sequences"], record["useful_tokens"]) == (7, 7 * 9)
    assert record["token_budget"] == (copies or 3) * 9


def test_masked_marginals_of_another_residue_are_not_timed(
    marginals: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, contest = (importlib.import_module(f"contenders.{name}") for name in ("marginals", "contest"))
    prepare = module.MarginalsInBatches.prepare

    def shifted(self: Any, sequence: str) -> None:
        prepare(self, sequence)
        self.places = [(copies, sites - 1) for copies, sites in self.places]

    monkeypatch.setattr(module.MarginalsInBatches, "prepare", shifted)
    with pytest.raises(contest.OtherModelError, match="log-probabilities to FP64 are off by"):
        marginals.ready(module.Marginals("fair_esm", "demo", "fp32", 7, 2))


@pytest.mark.parametrize("provider", ["esm_packed", "fair_esm"])
def test_contacts_are_timed_without_preparation(provider: str, strict: StrictBenchmark) -> None:
    contest = importlib.import_module("contenders.contacts").ContactsContest(new_contest())
    bench = importlib.import_module("bench_contacts")
    bench.test_contacts(0, 30, "demo", "fp32", provider, contest, strict)
    assert strict.calls == 1
    assert strict.extra_info["max_error"] < 1e-5


def test_contacts_of_another_protein_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, errors = (importlib.import_module(f"contenders.{name}") for name in ("contacts", "contest"))
    prepare = module.FairEsmContacts.prepare
    monkeypatch.setattr(
        module.FairEsmContacts, "prepare", lambda self, sequence: prepare(self, sequence[::-1])
    )
    contest = module.ContactsContest(new_contest())
    with pytest.raises(errors.OtherModelError, match="contacts to FP64 are off by"):
        contest.ready(module.Variant("fair_esm", "demo", "fp32", 30))


def test_attention_is_timed_without_preparation(options: Any, strict: StrictBenchmark) -> None:
    contests = importlib.import_module("kernel_contests")
    importlib.import_module("bench_attention").test_attention(
        0, "uniref", "fp32", "sdpa", contests.Bench(), strict, options
    )
    assert strict.calls == 1
    assert strict.extra_info["backend"] == "sdpa"


def test_kernels_are_timed_without_preparation(strict: StrictBenchmark) -> None:
    contests = importlib.import_module("kernel_contests")
    bench = importlib.import_module("bench_kernels")
    properties: dict[str, Any] = {}
    arguments = ("layer_norm", "torch", "8M", "float16", "uniref")
    bench.test_kernel(0, *arguments, contests.Bench(), strict, properties.__setitem__)
    assert strict.calls == 1
    assert properties["operation"] == "layer_norm"


def test_the_packer_is_timed_without_tokeniser_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = StrictBenchmark(monkeypatch, TOKENISERS)
    importlib.import_module("bench_packing").test_packing(0, "uniref", 1024, 200, "padded_sorted", strict)
    assert strict.calls == 1
    assert strict.extra_info["padding_share"] > 0


@pytest.mark.parametrize(
    "prepares",
    [
        lambda: alphabet.encode("MK"),
        lambda: packing.pack([np.array([5], dtype=np.uint8)]),
        lambda: packing.plan_packs([3], 10),
        lambda: padding.pad([np.array([5], dtype=np.uint8)]),
        lambda: padding.plan_padded([3], 10),
        lambda: Path(__file__).read_text(),
        lambda: np.load(__file__),
    ],
)
def test_preparation_would_be_noticed(prepares: Callable[[], Any], strict: StrictBenchmark) -> None:
    with pytest.raises(RuntimeError, match="prepares data"):
        strict.pedantic(prepares)
    assert packing.plan_packs([3], 10)[0].tolist() == [0]


def test_another_attention_backend_is_noticed() -> None:
    """A pass that goes around the backend that it names fails before it is timed."""
    module = importlib.import_module("contenders.contest")
    entry = module.Entry("esm_packed", MODEL, "uniref", 400, "fp32", "packed", 1024)
    provider = new_contest().ready(entry).provider
    another = provider.model.with_attention(("reference", packed_attention))
    provider.computing.embed_packed = another.embed_packed
    with (
        pytest.raises(AssertionError, match="attention sdpa was called 0 times, not 6"),
        module.expect_backend(provider),
    ):
        provider.run()


def test_wrong_numbers_are_not_timed(options: Any, strict: StrictBenchmark) -> None:
    bench, contest = importlib.import_module("bench_model"), new_contest()
    model = contest.model(MODEL, "fp32")
    model.embedding.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="relative_error to FP64 is"):
        bench.test_model(0, MODEL, "uniref", "fp32", "packed", 1024, contest, strict, options)
    assert strict.calls == 0
