"""How records are cut into shards, and the file that fixes it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint, RandomTensors
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS
from esm_packed.outputs import mean_of
from esm_packed.packing import SPECIAL_TOKENS, pack, plan_packs
from esm_packed.reports.speedup import results
from esm_packed.runners import planning
from esm_packed.runners.state import cut
from esm_packed.runners.state.cut import (
    MAX_SHARD_RECORDS,
    ShardSize,
    cut_shards,
    sequence_flops,
)
from esm_packed.runners.state.plan import Plan, PlanError, plan_hash

CONFIG = ESM2_MODELS["esm2_t6_8M_UR50D"]
IDENTITY = {"inputs": [{"size": 3, "sha256": "ab"}], "layers": [6], "token_budget": 128, "dtype": "fp32"}


def costs(lengths: npt.NDArray[np.int32], is_computed: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    return np.where(is_computed, sequence_flops(lengths.astype(np.int64), CONFIG), 0.0)


records = st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=200)


@given(records, st.floats(1.0, 1e13))
def test_shards_cover_the_input_and_cost_alike(
    records: list[tuple[int, bool]], flops_per_shard: float
) -> None:
    lengths = np.array([length for length, _ in records], np.int32)
    is_computed = np.array([computed for _, computed in records])
    starts = cut_shards(lengths, is_computed, CONFIG, ShardSize(flops_per_shard))
    assert starts[0] == 0
    assert starts[-1] == len(records)
    assert all(start < stop for start, stop in pairwise(starts))
    assert all(type(start) is int for start in starts), "JSON knows no numpy"
    flops = costs(lengths, is_computed)
    for start, stop in pairwise(starts):
        cost = flops[start:stop].sum()
        # not more than asked for, but for a single record; and no room left for the next one
        assert cost <= flops_per_shard * (1 + 1e-9) or stop - start == 1
        if stop < len(records):
            assert cost + flops[stop] > flops_per_shard * (1 - 1e-9)


def test_equal_records_are_cut_evenly() -> None:
    lengths = np.full(1000, 300, np.int32)
    flops = costs(lengths, np.ones(1000, np.bool_))
    starts = cut_shards(lengths, np.ones(1000, np.bool_), CONFIG, ShardSize(flops[0] * 10.5))
    assert set(np.diff(starts)) == {10}


def test_a_shard_has_a_bounded_number_of_records() -> None:
    number = 2 * MAX_SHARD_RECORDS + 5
    lengths = np.ones(number, np.int32)
    starts = cut_shards(lengths, np.ones(number, np.bool_), CONFIG, ShardSize(1e30))
    assert starts == (0, MAX_SHARD_RECORDS, 2 * MAX_SHARD_RECORDS, number)


def test_copies_cost_nothing_but_count_as_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "MAX_SHARD_RECORDS", 10)
    is_computed = np.zeros(25, np.bool_)
    is_computed[0] = True
    lengths = np.full(25, 50, np.int32)
    assert cut_shards(lengths, is_computed, CONFIG, ShardSize(1e30)) == (0, 10, 20, 25)


def uniref_like(number: int) -> npt.NDArray[np.int32]:
    """Lengths with the quartiles of UniRef50 (log-normal), cut at 1,022."""
    drawn = np.random.default_rng(number).lognormal(5.5, 0.75, number)
    return np.clip(drawn, 20, 1022).astype(np.int32)


def cut_for(
    number: int, device_type: str, token_budget: int, model: str = "esm2_t33_650M_UR50D"
) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
    """(num_records,) tokens of proteins, and how they are cut into shards."""
    lengths, is_computed, config = uniref_like(number), np.ones(number, np.bool_), ESM2_MODELS[model]
    size = ShardSize.of_run(lengths, is_computed, config, device_type, token_budget)
    starts = cut_shards(lengths, is_computed, config, size)
    assert starts[0] == 0
    assert starts[-1] == number
    assert all(start < stop for start, stop in pairwise(starts))
    return lengths + np.int64(SPECIAL_TOKENS), starts


def packs_of(
    tokens: npt.NDArray[np.int64], starts: tuple[int, ...], token_budget: int
) -> tuple[list[int], float]:
    """Packs of each shard, and the packing efficiency of all together."""
    packs = [len(plan_packs(tokens[start:stop], token_budget)) for start, stop in pairwise(starts)]
    return packs, float(tokens.sum()) / (sum(packs) * token_budget)


@pytest.mark.parametrize(
    "token_budget, model",
    [(8192, "esm2_t6_8M_UR50D"), (32768, "esm2_t33_650M_UR50D"), (131_072, "esm2_t48_15B_UR50D")],
)
def test_a_proteome_is_shared_by_many_gpus(token_budget: int, model: str) -> None:
    """As large as the human one: 64 shards where each holds 3 full packs, and packs as full as before."""
    tokens, starts = cut_for(20_600, "cuda", token_budget, model)
    packs, efficiency = packs_of(tokens, starts, token_budget)
    whole, unsharded = packs_of(tokens, (0, 20_600), token_budget)
    if whole[0] >= 64 * 3 + 1:
        assert len(packs) >= 64
    assert len(packs) >= min(64, whole[0] // 3) * 0.95
    assert efficiency >= unsharded - 0.01
    assert min(tokens[start:stop].sum() for start, stop in pairwise(starts)) >= 0.95 * token_budget


def test_a_few_proteins_are_one_shard_on_a_gpu_and_few_on_a_cpu() -> None:
    tokens, starts = cut_for(100, "cuda", 32768)
    assert starts == (0, 100)
    tokens, starts = cut_for(100, "cpu", 1024, "esm2_t6_8M_UR50D")
    assert len(starts) - 1 <= 2, "about a second for each million operations"
    for model in ("esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"):
        tokens, starts = cut_for(100, "cpu", 1024, model)
        assert min(tokens[start:stop].sum() for start, stop in pairwise(starts)) >= 1024, "never below a pack"


def test_shards_on_a_cpu_take_about_ten_seconds() -> None:
    number = 10_000
    tokens, starts = cut_for(number, "cpu", 1024, "esm2_t6_8M_UR50D")
    flops = sequence_flops(uniref_like(number).astype(np.int64), ESM2_MODELS["esm2_t6_8M_UR50D"])
    seconds = [flops[start:stop].sum() / 5e10 for start, stop in pairwise(starts)]
    assert max(seconds) <= 10.001
    assert np.median(seconds) > 9
    packs, _ = packs_of(tokens, starts, 1024)
    whole, _ = packs_of(tokens, (0, number), 1024)
    assert sum(packs) <= whole[0] + len(packs), "at most one more pack, partly filled, for each shard"


@pytest.mark.parametrize(
    "number, model",
    [
        (40_000, "esm2_t48_15B_UR50D"),
        pytest.param(150_000, "esm2_t36_3B_UR50D", marks=pytest.mark.slow),  # 4 s
        pytest.param(1_000_000, "esm2_t33_650M_UR50D", marks=pytest.mark.slow),  # 10 s
    ],
)
def test_many_proteins(number: int, model: str) -> None:
    tokens, starts = cut_for(number, "cuda", 65_536, model)
    packs, efficiency = packs_of(tokens, starts, 65_536)
    assert 64 <= len(packs) <= 1000
    flops = sequence_flops(uniref_like(number).astype(np.int64), ESM2_MODELS[model])
    seconds = [flops[start:stop].sum() / 2.5e14 for start, stop in pairwise(starts)]
    assert 7 < np.median(seconds) <= 10.001
    assert efficiency >= packs_of(tokens, (0, number), 65_536)[1] - 0.01


@pytest.mark.slow  # 4 minutes
@pytest.mark.parametrize("model", ["esm2_t6_8M_UR50D", "esm2_t48_15B_UR50D"])
def test_fifty_million_proteins_are_at_most_20_000_shards(model: str) -> None:
    _, starts = cut_for(50_000_000, "cuda", 131_072, model)
    assert 64 <= len(starts) - 1 <= 20_000


def test_copies_and_giants_among_whole_packs() -> None:
    """Copies cost no tokens; a protein longer than a pack is one of its own."""
    lengths = uniref_like(30_000)
    lengths[::10_000] = 40_000
    is_computed = np.arange(30_000) % 3 > 0
    is_computed[::10_000] = True
    size = ShardSize.of_run(lengths, is_computed, CONFIG, "cuda", 16_384)
    starts = cut_shards(lengths, is_computed, CONFIG, size)
    assert (starts[0], starts[-1]) == (0, 30_000)
    assert all(start < stop for start, stop in pairwise(starts))
    assert len(starts) - 1 >= 64
    packs = 0
    for start, stop in pairwise(starts):
        computed = lengths[start:stop][is_computed[start:stop]]
        packs += len(plan_packs(computed + np.int64(SPECIAL_TOKENS), 16_384))
    unsharded = len(plan_packs(lengths[is_computed] + np.int64(SPECIAL_TOKENS), 16_384))
    assert packs <= unsharded * 1.015


def test_a_cost_that_a_test_asks_for_overrides_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cut.FLOPS_PER_SHARD, "cuda", 1.0)
    _, starts = cut_for(50, "cuda", 32768)
    assert starts == tuple(range(51))


def test_sums_stay_exact_enough_for_hundreds_of_millions_of_records() -> None:
    """Cumulative costs of a large input are near 1e20, where doubles are 16,384 apart."""
    flops = costs(np.array([300], np.int32), np.array([True]))[0]
    assert np.spacing(flops * 5e8) < flops / 1e4


def test_flops_by_hand() -> None:
    """3 layers, hidden size 8; 4 and 10 residues are 6 and 12 tokens with BOS and EOS."""
    flops = sequence_flops(np.array([4, 10]), ESM2Config(3, 8, 2))
    # 24 * 8^2 = 1536 for a token, 4 * 8 = 32 for a pair of tokens
    assert flops.tolist() == [3 * (1536 * 6 + 32 * 36), 3 * (1536 * 12 + 32 * 144)]


def test_flops_are_those_that_torch_counts() -> None:
    """In FP64 with the reference backend, where nothing goes around the operations that torch counts."""
    config, precision, cpu = ESM2Config(3, 64, 4), PRECISIONS["fp64"], torch.device("cpu")
    backend = select_backend("reference", cpu, precision, config.head_dim)
    checkpoint = Checkpoint("", config, RandomTensors(config), "", "")
    model = ESM2.from_checkpoint(checkpoint, cpu, precision, backend)
    residues = [5, 31, 90]
    batch = pack([np.full(length, 5, np.uint8) for length in residues])
    assert batch.total_tokens == sum(residues) + SPECIAL_TOKENS * len(residues)
    with FlopCounterMode(display=False) as counter:
        model.embed_packed(batch, [mean_of(config.num_layers)])
    assert counter.get_total_flops() == sequence_flops(np.array(residues), config).sum()


words = st.text(st.characters(codec="utf-8"), max_size=20)
values = words | st.integers() | st.booleans() | st.lists(st.integers())
identities = st.dictionaries(words, values, max_size=6)


@given(
    identities,
    st.lists(words, max_size=4),
    st.lists(st.integers(1, 2**40), min_size=1, max_size=50, unique=True),
)
def test_a_plan_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    identity: dict[str, object],
    names: list[str],
    cuts: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    written = Plan(identity, tuple(names), (0, *sorted(cuts)))
    written.write(folder / "plan.json", folder)
    read = Plan.read(folder / "plan.json")
    assert read == written
    assert read.hash == written.hash
    assert read.num_shards == len(cuts)
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    read.check_same(identity, folder)


def a_plan(path: Path) -> Plan:
    plan = Plan(IDENTITY, ("in.fasta",), (0, 10, 20, 25))
    plan.write(path, path.parent)
    return plan


def test_the_hash_is_that_of_the_identity_alone(tmp_path: Path) -> None:
    one = Plan(IDENTITY, ("a",), (0, 1))
    assert one.hash == Plan(dict(reversed(IDENTITY.items())), ("b",), (0, 1, 2)).hash
    assert one.hash != Plan(IDENTITY | {"dtype": "fp64"}, ("a",), (0, 1)).hash


def test_no_plan_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"3",
        b'{"format": 1}',
        b'{"format": 2, "identity": {}, "input_names": [], "starts": [0, 1]}',
        b'{"format": 1, "identity": [], "input_names": [], "starts": [0, 1]}',
        b'{"format": 1, "identity": {}, "input_names": [], "starts": []}',
        b'{"format": 1, "identity": {}, "input_names": [], "starts": [0, "a"]}',
        b'{"format": 1, "identity": {}, "input_names": [], "starts": [0, 5, 3]}',
        b'{"format": 1, "identity": {}, "input_names": [], "starts": [2, 5]}',
        b'{"format": 1, "identity": {}, "input_names": [], "starts": [0, 5, 5]}',
        b'{"format": 1, "identity": {}, "input_names": 7, "starts": [0, 5]}',
    ],
)
def test_a_damaged_plan_is_an_error_that_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="--overwrite") as error:
        Plan.read(path)
    assert str(path) in str(error.value)


@given(st.data())
def test_a_plan_cut_short_or_altered_is_never_another_plan(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A changed digit in the cut, the inputs or the budget would give a wrong file without a word."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    written = a_plan(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut short"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from(b"0123456789 a,\x00\xff"))
    path.write_bytes(content)
    try:
        read = Plan.read(path)
    except PlanError:
        return
    assert read == written


def test_what_differs_is_named_with_both_values(tmp_path: Path) -> None:
    plan = a_plan(tmp_path / "plan.json")
    plan.check_same(dict(IDENTITY), tmp_path)
    with pytest.raises(PlanError) as error:
        plan.check_same(IDENTITY | {"dtype": "fp64", "layers": [3]}, tmp_path)
    for part in ("dtype was 'fp32', now 'fp64'", "layers was [6], now [3]", str(tmp_path), "--overwrite"):
        assert part in str(error.value)
    assert "token_budget" not in str(error.value)
    with pytest.raises(PlanError, match="reproducible was None, now True"):
        plan.check_same(IDENTITY | {"reproducible": True}, tmp_path)


@pytest.mark.parametrize(
    "missing", ["format", "identity", "input_names", "starts", "model_name", "hidden_size"]
)
def test_a_whole_plan_of_another_shape_is_another_versions(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "plan.json"
    a_plan(path)
    content = json.loads(path.read_text())
    del content["sha256"], content[missing]
    path.write_text(json.dumps({**content, "sha256": plan_hash(content)}))
    with pytest.raises(PlanError, match="another version"):
        Plan.read(path)


def test_a_failed_write_keeps_the_plan_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    written = a_plan(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Plan(IDENTITY, (), (0, 1)).write(path, path.parent)
    assert Plan.read(path) == written
    assert json.loads(path.read_text())["starts"] == [0, 10, 20, 25]


def test_hint_of_bf16_quotes_the_published_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "bf16_instructions", lambda: "amx_bf16")
    hint = planning.bf16_hint("fp32", torch.device("cpu"), ESM2_MODELS["esm2_t30_150M_UR50D"])
    assert hint is not None and "amx_bf16" in hint
    path = Path(__file__).parents[2] / "reports" / "published" / "cpu-intel-xeon-2-cores" / "peers-150M.json"
    measured = {
        each.info["dtype"]: each
        for each in results.read_results(path).suite("peers")
        if each.info["provider"] == "esm_packed"
    }
    speedup = results.ratio(measured["fp32"], measured["bf16"])
    assert speedup is not None
    assert f"({speedup.middle:.1f} times with" in hint
    assert f"errors of about {measured['bf16'].info['relative_error']:.0e}".replace("e-0", "e-") in hint


@pytest.mark.parametrize(
    "dtype, device, model, instructions",
    [
        ("bf16", "cpu", "esm2_t30_150M_UR50D", "amx_bf16"),
        ("fp32", "cuda", "esm2_t30_150M_UR50D", "amx_bf16"),
        ("fp32", "cpu", "esm2_t12_35M_UR50D", "amx_bf16"),
        ("fp32", "cpu", "esm2_t30_150M_UR50D", None),
    ],
)
def test_other_runs_get_no_hint_of_bf16(
    dtype: str, device: str, model: str, instructions: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "bf16_instructions", lambda: instructions)
    assert planning.bf16_hint(dtype, torch.device(device), ESM2_MODELS[model]) is None
