"""Shapes of CUDA graphs and the batches they are loaded with; recording needs a GPU, see tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esm_packed import ESM2
from esm_packed.alphabet import encode
from esm_packed.graphs import GraphedESM2, Shape, empty_batch, load
from esm_packed.layouts import LAYOUTS
from esm_packed.outputs import output_names
from esm_packed.packing import PackedBatch, check_packed

BUDGET = 256


def random_batch(num_residues: list[int], budget: int = BUDGET) -> PackedBatch:
    letters = encode("ACDEFGHIKLMNPQRSTVWY")
    rng = np.random.default_rng(num_residues)
    return LAYOUTS["fixed"].lay_out([letters[rng.integers(0, 20, count)] for count in num_residues], budget)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 300))
def test_a_shape_holds_its_batch(num_residues: list[int], budget: int) -> None:
    batch = random_batch(num_residues, budget)
    shape = Shape.of(batch, ["mean/1"])
    static = empty_batch(shape, batch)
    load(static, batch)
    check_packed(static, torch.device("cpu"))
    assert torch.equal(static.input_ids, batch.input_ids)
    bounds = batch.cu_seqlens.numel()
    assert torch.equal(static.cu_seqlens[:bounds], batch.cu_seqlens)
    assert bounds - 1 <= shape.num_segments < 2 * bounds
    assert batch.max_seqlen <= shape.max_seqlen <= max(64, 2 * batch.max_seqlen)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_loaded_batches_have_the_same_embeddings(attention: str) -> None:
    """One static batch, loaded with one pack after the other, as for replays: nothing stays of the last."""
    model = ESM2.from_pretrained("demo", dtype="fp64", attention=attention, device="cpu")
    batches = [random_batch(lengths) for lengths in ([60, 3, 1], [30, 30, 61, 12], [64], [7] * 25)]
    widest = max((Shape.of(batch, ["mean/5"]) for batch in batches), key=lambda shape: shape.num_segments)
    static = empty_batch(Shape(BUDGET, widest.num_segments, 128, ("mean/5",)), batches[0])
    for batch in batches:
        load(static, batch)
        rows = model.embed_packed(static, ["mean/5"])["mean/5"][batch.segments]
        torch.testing.assert_close(
            rows, model.embed_packed(batch, ["mean/5"])["mean/5"], rtol=1e-12, atol=1e-13
        )


OUTPUTS = output_names(["mean", "max", "bos", "per_residue", "logits"], [3, 5])


class RecordingModel:
    """A model whose calls a stand-in for CUDA's graphs notes while it records."""

    device = torch.device("cpu")

    def __init__(self, model: ESM2) -> None:
        self.model = model
        self.recording: StandInGraph | None = None
        self.calls = 0

    def embed_packed(
        self, batch: PackedBatch, names: Sequence[str], residue_dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        self.calls += 1
        rows = self.model.embed_packed(batch, names, residue_dtype)
        if self.recording is not None:
            self.recording.recorded.append((batch, names, rows))
        return rows


class StandInGraph:
    def __init__(self, model: RecordingModel) -> None:
        self.model = model
        self.recorded: list[tuple[PackedBatch, Sequence[str], dict[str, torch.Tensor]]] = []

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        for batch, names, rows in self.recorded:
            for name, values in self.model.model.embed_packed(batch, names).items():
                rows[name].copy_(values)


def test_replays_give_each_batch_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static tensors, shapes and copies, with graphs that repeat calls as CUDA's repeat launches."""
    model = RecordingModel(ESM2.from_pretrained("demo", dtype="fp32", device="cpu"))

    @contextmanager
    def record(graph: StandInGraph, **options: object) -> Iterator[None]:
        model.recording = graph
        yield
        model.recording = None

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: StandInGraph(model))
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    graphed = GraphedESM2(model)  # type: ignore[arg-type]
    lengths = [[60, 3, 1], [30, 30, 61, 12], [55, 9, 2], [7] * 25, [60, 3, 1], [300]]
    batches = [random_batch(each) for each in lengths]
    rows = [graphed.embed_packed(batch, OUTPUTS) for batch in batches]
    assert graphed.num_graphs == 3  # the fourth and the last have shapes of their own
    assert model.calls == 3 * graphed.num_graphs  # twice to warm up, once to record
    for batch, found in zip(batches, rows, strict=True):
        expected = model.model.embed_packed(batch, OUTPUTS)
        assert list(found) == [*OUTPUTS, "finite"]
        for name, values in found.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)
