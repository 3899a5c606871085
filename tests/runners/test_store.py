import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from kept_shards import mean_arrays

from esm_packed.runners.output.layout import StoredProblem
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.output.writer import EmbeddingWriter
from esm_packed.runners.state.plan import plan_hash
from esm_packed.runners.state.request import COMPRESSIONS
from esm_packed.runners.state.shard import Array, StoreError
from esm_packed.runners.system.signals import signals_deferred

IDENTITY = {"inputs": [{"size": 3, "sha256": "ab"}], "dtype": "fp32"}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def columns_of(
    lengths: np.ndarray, embedded_lengths: np.ndarray, modified: np.ndarray
) -> dict[str, np.ndarray]:
    return {
        "lengths": lengths,
        "embedded_lengths": embedded_lengths,
        "truncated": embedded_lengths < lengths,
        "status": np.zeros(len(lengths), np.uint8),
        "modified": modified,
        "sequence_hash": np.full(len(lengths), b"0" * 32),
    }


def write_output(
    path: Path, num_sequences: int = 5, batch: int = 2, hidden_size: int = 8, store_dtype: str = "float32"
) -> dict[int, np.ndarray]:
    """An output with layers 1 and 6, written in batches."""
    datasets = {1: "mean/1", 6: "embeddings"}
    rng = np.random.default_rng(0)
    rows = {
        layer: rng.standard_normal((num_sequences, hidden_size)).astype(store_dtype) for layer in datasets
    }
    lengths = np.arange(10, 10 + num_sequences, dtype=np.int32)
    modified = np.arange(num_sequences, dtype=np.uint8)
    with EmbeddingWriter(path, num_sequences=num_sequences) as writer:
        arrays = mean_arrays(list(datasets), hidden_size, store_dtype)
        for array, name in zip(arrays, datasets.values(), strict=True):
            writer.create(array, name, num_sequences)
        for start in range(0, num_sequences, batch):
            part = slice(start, min(start + batch, num_sequences))
            names = [f"päf{row}" for row in range(part.start, part.stop)]
            columns = columns_of(lengths[part], np.minimum(lengths[part], 12), modified[part])
            writer.write_rows(start, names, columns)
            for layer, values in rows.items():
                writer.write(f"mean/{layer}", start, values[part])
        writer.write_problems([StoredProblem("a", "in.fasta", 7, "gap")])
        writer.write_problems([StoredProblem("b", "\udcff.fasta", 2**40, "why not")])
        writer.write_plan(IDENTITY, ["in.fasta"])
        writer.write_attributes({"model_name": "m", "kinds": ["mean"], "layers": [1, 6]})
    return rows


@pytest.mark.parametrize("store_dtype", ["float32", "float16"])
def test_what_is_written_is_read_back(tmp_path, store_dtype):
    rows = write_output(tmp_path / "out.h5", store_dtype=store_dtype)
    with EmbeddingReader(tmp_path / "out.h5") as reader:
        assert reader.num_sequences == 5
        assert reader.layers == [1, 6]
        assert reader.hidden_size == 8
        assert reader.sequence_ids() == [f"päf{row}" for row in range(5)]
        assert reader.sequence_ids(1, 3) == ["päf1", "päf2"]
        assert reader.column("embedded_lengths").tolist() == [10, 11, 12, 12, 12]
        assert reader.column("truncated").tolist() == [False, False, False, True, True]
        assert reader.column("modified").tolist() == [0, 1, 2, 3, 4]
        assert {change: found.tolist() for change, found in reader.changed(1, 5).items()} == {
            "truncated": [3, 4],
            "residues replaced": [1, 3],
            "gaps dropped": [2, 3],
            "trailing stop dropped": [4],
            "renamed": [],
        }
        np.testing.assert_array_equal(reader.embeddings(), rows[6])
        np.testing.assert_array_equal(reader.embeddings(1, 2, 4), rows[1][2:4])
        assert reader.embeddings().dtype == store_dtype
        assert reader.problems() == [
            StoredProblem("a", "in.fasta", 7, "gap"),
            StoredProblem("b", "?.fasta", 2**40, "why not"),
        ]
        assert reader.plan == {"identity": IDENTITY, "input_names": ["in.fasta"]}
        assert reader.attributes["plan_hash"] == plan_hash(IDENTITY)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("batch", [1, 7, 64, 65, 200, 1000])
def test_rows_are_written_in_any_batches_and_read_back_meanwhile(
    tmp_path: Path, batch: int, compression: str
) -> None:
    """A compressed chunk holds 64 rows of 1,024 columns."""
    values = np.random.default_rng(1).standard_normal((500, 1024)).astype(np.float32)
    path = tmp_path / "out.h5"
    with EmbeddingWriter(path, num_sequences=500, compression=compression) as writer:
        writer.create(Array("mean/3", "float32", 1024), "embeddings", 500)
        for start in range(0, 500, batch):
            writer.write("mean/3", start, values[start : start + batch])
            written = min(start + batch, 500)
            rows = np.unique(np.array([0, written // 2, written - 1]))
            np.testing.assert_array_equal(writer.read("mean/3", rows), values[rows])
    with h5py.File(path) as file:
        assert file["embeddings"].chunks == (None if compression == "none" else (64, 1024))
        np.testing.assert_array_equal(file["embeddings"][:], values)


def test_layout_is_the_documented_one(tmp_path):
    write_output(tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert {name: (file[name].shape, file[name].dtype.kind) for name in file if name != "mean"} == {
            "sequence_ids": ((5,), "O"),
            "sequence_hash": ((5,), "S"),
            "lengths": ((5,), "i"),
            "embedded_lengths": ((5,), "i"),
            "truncated": ((5,), "b"),
            "status": ((5,), "u"),
            "modified": ((5,), "u"),
            "embeddings": ((5, 8), "f"),
            "problems": ((2,), "V"),
            "plan": ((), "O"),
        }
        assert list(file["mean"]) == ["1"]
        assert file.attrs["format"] == "esm-packed"
        assert file.attrs["format_version"] == 1
        assert file.attrs["kinds"].tolist() == ["mean"]
        assert file.attrs["layers"].tolist() == [1, 6]
        assert file["modified"].attrs["flags"] == (
            "1 residues replaced, 2 gaps dropped, 4 trailing stop dropped, 8 renamed"
        )


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a.h5", "b.h5"):
        write_output(tmp_path / name)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_plan_hash_ignores_the_order_of_keys_and_nothing_else():
    assert plan_hash({"a": 1, "b": [1, 2]}) == plan_hash({"b": [1, 2], "a": 1})
    assert plan_hash({"a": 1, "b": [1, 2]}) != plan_hash({"a": 1, "b": [2, 1]})


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "out.h5"
    path.write_text(">a\nMKT\n")
    with pytest.raises(StoreError, match="not an HDF5 file"):
        EmbeddingReader(path)
    with h5py.File(path, "w") as file:
        file["embeddings"] = np.zeros(3)
    with pytest.raises(StoreError, match="not written by esm-packed"):
        EmbeddingReader(path)
    path.unlink()
    write_output(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(StoreError, match="newer"):
        EmbeddingReader(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(StoreError, match="truncated"):
        EmbeddingReader(path)
    with pytest.raises(FileNotFoundError):
        EmbeddingReader(tmp_path / "nothing.h5")


def test_output_obeys_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_output(tmp_path / "out.h5")
    finally:
        os.umask(previous)
    assert (tmp_path / "out.h5").stat().st_mode & 0o777 == 0o640


FILL_THE_DISK = """
import errno, os, sys
from pathlib import Path
import numpy as np
from esm_packed.runners.output.writer import EmbeddingWriter
from esm_packed.runners.state.shard import Array

write = os.pwrite
for limit in map(int, sys.argv[2:]):
    if os.fork() == 0:
        break
    print(limit, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit(0)

def limited(descriptor, data, position):
    if position + len(data) > limit:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(descriptor, data, position)
os.pwrite = limited
rows = np.ones((500, 64), np.float32)
names = "lengths embedded_lengths truncated status modified".split()
columns = {name: np.ones(500, np.uint8) for name in names}
columns["sequence_hash"] = np.full(500, b"0" * 32)
try:
    with EmbeddingWriter(Path(sys.argv[1]) / f"{limit}.h5", num_sequences=2000) as writer:
        writer.create(Array("mean/6", "float32", 64), "embeddings", 2000)
        for start in range(0, 2000, 500):
            writer.write_rows(start, ["name"] * 500, columns)
            writer.write("mean/6", start, rows)
        writer.write_plan({}, [])
except OSError as error:
    sys.exit(50 if error.errno == errno.ENOSPC else 51)
"""


def test_full_disk_is_an_error_and_no_crash(tmp_path):
    """In a process for each limit: HDF5's crash comes as late as the interpreter's exit."""
    limits = ["0", "5000", "200000", "300000", "500000", "560000"]
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), *limits]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.splitlines() == [f"{limit} 50" for limit in limits], run.stderr


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: write(file, data[:1000], position))
    rows = write_output(tmp_path / "out.h5", num_sequences=300, batch=300)
    with EmbeddingReader(tmp_path / "out.h5") as reader:
        np.testing.assert_array_equal(reader.embeddings(), rows[6])


def test_signals_wait_until_the_block_ends():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with signals_deferred():
            signal.raise_signal(signal.SIGINT)
            steps.append("in the block")
        steps.append("behind it")
    assert steps == ["in the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
