from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nursery import Nursery, Work, undisturbed
from proteins import FEW_SHARDS, MANY_SHARDS

from esm_packed.model import ESM2
from esm_packed.packing import PackedBatch

FASTA = ">a first\nMKTLLAGVSE\n>b second\nMKVLA\n>c\nMMMRPQ\n"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """Three proteins, of which only two have a description."""
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    return path


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every embedding is ones; for tests that are not about numbers."""

    def ones(self: ESM2, batch: PackedBatch, names: list[str], *rest: object) -> dict[str, torch.Tensor]:
        return {name: torch.ones(batch.num_sequences, self.config.hidden_size) for name in names}

    monkeypatch.setattr(ESM2, "embed_packed", ones)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def many_shards(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Work:
    # not so small that a shard holds copies only
    work = undisturbed(nursery, tmp_path_factory.mktemp("many"), *MANY_SHARDS)
    assert 20 <= work.num_shards <= 40
    return work


@pytest.fixture(scope="session")
def few_shards(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Work:
    work = undisturbed(nursery, tmp_path_factory.mktemp("few"), *FEW_SHARDS)
    assert 3 <= work.num_shards <= 10
    return work
