"""Packs of one size on a GPU: the same bits in any company, launched one by one or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kept_shards import Shard, mean_arrays, run_pipeline
from packings import random_packing
from workloads import token_lengths

from esm_packed import ESM2
from esm_packed.alphabet import encode
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.graphs import GraphedESM2
from esm_packed.layouts import LAYOUTS
from esm_packed.outputs import mean_of
from esm_packed.runners.compute.pipeline import Pipeline
from esm_packed.runners.state.shard import ShardInput

pytestmark = pytest.mark.gpu

Record = Callable[[str, Any], None]

BUDGET = 8192
NUM_ORDERS = {"fp16": 100, "bf16": 30, "fp32": 30}
SHAPES = {"8M": ESM2_MODELS["esm2_t6_8M_UR50D"], "650M_3_layers": ESM2Config(3, 1280, 20)}

every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(scope="module")
def token_ids() -> list[np.ndarray]:
    """Random proteins of UniRef's lengths, about three packs of them."""
    rng = np.random.default_rng(3)
    letters = encode("LAGVSERTIDPKQNFYMHWC")
    return [letters[rng.integers(0, 20, max(1, tokens - 2))] for tokens in token_lengths("uniref", 22_000)]


def load(shape: str, dtype: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ESM2:
    monkeypatch.setitem(ESM2_MODELS, f"test_{shape}", SHAPES[shape])
    return ESM2.from_pretrained(f"random:test_{shape}", device=device, dtype=dtype)


def embed(
    model: ESM2 | GraphedESM2,
    config: ESM2Config,
    device: torch.device,
    token_ids: list[np.ndarray],
    packs: list[list[int]],
    layout: str = "fixed",
) -> torch.Tensor:
    """Means of the last layer, on the device."""
    rows = torch.full((len(token_ids), config.hidden_size), torch.nan, device=device)
    for members in packs:
        batch = LAYOUTS[layout].lay_out([token_ids[member] for member in members], BUDGET).to(device)
        rows[members] = model.embed_packed(batch, [mean_of(config.num_layers)])[mean_of(config.num_layers)]
    return rows


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@every_shape
def test_same_bits_in_any_company(
    shape: str,
    dtype: str,
    token_ids: list[np.ndarray],
    cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    model = load(shape, dtype, cuda_device, monkeypatch)
    lengths = [len(ids) + 2 for ids in token_ids]
    rng = np.random.default_rng(0)
    packings = [random_packing(lengths, BUDGET, rng, early=0.02) for _ in range(NUM_ORDERS[dtype])]
    differing = {}
    for layout in ("packed", "fixed"):
        first, *others = (
            embed(model, model.config, cuda_device, token_ids, packs, layout) for packs in packings
        )
        differing[layout] = sum(int((other != first).any(1).sum()) for other in others)
    record_property("rows_that_differ", differing)
    record_property("attention_backend", model.attention_backend)
    assert differing["fixed"] == 0


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@every_shape
def test_graphs_keep_the_bits(
    shape: str,
    dtype: str,
    token_ids: list[np.ndarray],
    cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    model = load(shape, dtype, cuda_device, monkeypatch)
    graphed = GraphedESM2(model)
    lengths = [len(ids) + 2 for ids in token_ids]
    rng = np.random.default_rng(1)
    for _ in range(10):
        packs = random_packing(lengths, BUDGET, rng, early=0.02)
        launched = embed(model, model.config, cuda_device, token_ids, packs)
        replayed = embed(graphed, model.config, cuda_device, token_ids, packs)
        assert torch.equal(replayed, launched)
    record_property("graphs", graphed.num_graphs)
    assert graphed.num_graphs < 40


def test_pipeline_with_graphs(token_ids: list[np.ndarray], cuda_device: torch.device) -> None:
    """Reader and writer threads, streams and recorded graphs together."""
    model = ESM2.from_pretrained("random:esm2_t6_8M_UR50D", device=cuda_device, dtype="fp16")
    arrays = mean_arrays([3, 6], model.config.hidden_size)
    rows = {}
    for cuda_graphs in (False, True):
        shards: dict[int, Shard] = {}
        pipeline = Pipeline(
            model,
            arrays=arrays,
            token_budget=BUDGET,
            layout=LAYOUTS["fixed"],
            cuda_graphs=cuda_graphs,
        )
        inputs = [ShardInput(number, token_ids[number::4]) for number in range(4)]
        run_pipeline(pipeline, inputs, shards.__setitem__, arrays)
        rows[cuda_graphs] = shards
    for number in range(4):
        for layer in (3, 6):
            one, other = (rows[each][number].embeddings[layer] for each in (False, True))
            np.testing.assert_array_equal(one, other)
