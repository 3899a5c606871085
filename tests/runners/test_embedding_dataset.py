"""Outputs as PyTorch data sets, in one process and in workers."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from output_files import Output, write_output
from torch.utils.data import DataLoader

from esm_packed import EmbeddingDataset
from esm_packed.runners.output.reader import NotInFileError
from esm_packed.runners.state.shard import StoreError

whole_and_in_parts = pytest.mark.parametrize("num_parts", [0, 3], ids=["whole", "in parts"])


def assert_items(items: list[tuple[str, torch.Tensor]], output: Output, name: str, rows: list[int]) -> None:
    assert [sequence_id for sequence_id, _ in items] == [output.ids[row] for row in rows]
    for (_, tensor), row in zip(items, rows, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), output.value(name, row))


@pytest.mark.parametrize(
    ("kind", "layer", "name"),
    [
        ("mean", None, "embeddings"),
        ("max", 1, "max/1"),
        ("per_residue", 6, "per_residue/6"),
        ("logits", None, "logits"),
        ("unmasked_nll", None, "unmasked_nll"),
        ("contacts", None, "contacts"),
    ],
)
@whole_and_in_parts
def test_items_are_those_of_the_file(
    tmp_path: Path, num_parts: int, kind: str, layer: int | None, name: str
) -> None:
    """What failed or was not computed is NaN, or left out."""
    output = write_output(tmp_path / "out.h5", num_parts=num_parts)
    dataset = EmbeddingDataset(output.path, kind, layer)
    assert len(dataset) == 7
    assert_items([dataset[item] for item in range(7)], output, name, list(range(7)))
    assert_items([dataset[-1]], output, name, [6])
    assert torch.isnan(dataset[2][1]).all() and torch.isnan(dataset[3][1]).all()
    computed = EmbeddingDataset(output.path, kind, layer, skip_missing=True)
    assert len(computed) == 5
    assert_items([computed[item] for item in range(5)], output, name, [0, 1, 4, 5, 6])
    with pytest.raises(IndexError):
        computed[5]


def test_the_type_is_that_stored(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out.h5", store_dtype="float16")
    assert EmbeddingDataset(output.path)[0][1].dtype == torch.float16


@pytest.mark.parametrize(
    ("num_workers", "method", "num_parts"),
    [
        *((workers, "fork", parts) for workers in (1, 2) for parts in (0, 3)),
        *((0, None, parts) for parts in (0, 3)),
        (1, "spawn", 3),
        pytest.param(2, "spawn", 0, marks=pytest.mark.slow),  # 5 s
    ],
)
def test_workers_read_the_same(tmp_path: Path, num_workers: int, method: str | None, num_parts: int) -> None:
    output = write_output(tmp_path / "out.h5", num_parts=num_parts, repeats=3)
    dataset = EmbeddingDataset(output.path, "per_residue", skip_missing=True)
    rows = [row for row in range(21) if row % 7 not in (2, 3)]
    assert_items([dataset[0]], output, "per_residue/6", [0])  # the file is open before the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=method)
    assert_items(list(loader), output, "per_residue/6", rows)
    assert_items([dataset[14]], output, "per_residue/6", [rows[14]])


def test_batches(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out.h5")
    (ids, first), (_, second) = DataLoader(EmbeddingDataset(output.path, "bos"), batch_size=4)
    assert list(ids) == output.ids[:4]
    np.testing.assert_array_equal(torch.cat([first, second]).numpy(), output.values["bos/6"])


def test_every_process_opens_the_file_itself(tmp_path: Path) -> None:
    dataset = EmbeddingDataset(write_output(tmp_path / "out.h5").path)
    here = id(dataset._opened())
    assert id(dataset._opened()) == here
    with multiprocessing.get_context("fork").Pool(1) as pool:
        results = pool.map_async(_reader_of, [dataset])
        assert results.get(60) != [here]
    assert pickle.loads(pickle.dumps(dataset))._reader is None

    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(_reader_of(dataset)))
    child.start()
    child.join(60)
    assert queue.get() != here


def _reader_of(dataset: EmbeddingDataset) -> int:
    return id(dataset._opened())


def test_what_is_not_there_is_known_at_once(tmp_path: Path) -> None:
    path = write_output(tmp_path / "out.h5", ["mean"]).path
    with pytest.raises(NotInFileError, match="no kind 'logits'; it has mean"):
        EmbeddingDataset(path, "logits")
    with pytest.raises(NotInFileError, match="no layer 5; it has 1, 6"):
        EmbeddingDataset(path, layer=5)
    with pytest.raises(FileNotFoundError):
        EmbeddingDataset(tmp_path / "other.h5")


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    path = write_output(tmp_path / "out.h5").path
    dataset = EmbeddingDataset(path)
    write_output(path, repeats=2)
    with pytest.raises(StoreError, match="replaced by another output"):
        dataset[0]
