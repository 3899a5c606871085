"""Exports, each read by the program it is made for.

Those of the programs that are not installed are skipped: `pip install '.[export,read]' protspace` adds them.
"""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import output_files
import pytest
import torch
from output_files import Output, write_output

from esm_packed.runners.cli import main as cli

COMPUTED = [0, 1, 4, 5, 6]
"""Rows of `IDS` that have values."""
LABELS = ["computed", "recomputed", "failed", "not computed", "computed", "computed", "computed"]
FORMATS = ["uniprot", "pt", "npz", "parquet", "h5ad"]


def export(output: Output, to: str, *options: str) -> Path:
    path = output.path.with_name(f"out.{to}")
    assert cli.main(["export", str(output.path), "--to", to, "-o", str(path), *options]) == 0
    return path


def renamed(path: Path, *ids: str, **layout: Any) -> Output:
    """An output whose first sequences have other IDs."""

    def rename(file: h5py.File) -> None:
        for row, sequence_id in enumerate(ids):
            file["sequence_ids"][row] = sequence_id

    return write_output(path, change=rename, **layout)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return write_output(tmp_path / "out.h5")


def test_uniprot_by_accession_with_h5py(tmp_path: Path) -> None:
    ids = ["sp|P12345|X_HUMAN", "tr|A0A024R1R8-2|Y", "failed", "absent", "a/b|c", "."]
    output = renamed(tmp_path / "in.h5", *ids)
    with h5py.File(export(output, "uniprot")) as file:
        assert file.attrs["model_name"] == "m" and file.attrs["kind"] == "mean" and file.attrs["layer"] == 6
        names = {"P12345": 0, "A0A024R1R8-2": 1, "a%2Fb|c": 4, "%2E": 5, "last": 6}
        assert set(file) == set(names)
        for name, row in names.items():
            np.testing.assert_array_equal(file[name][:], output.value("embeddings", row))
            original = (*ids, "last")[row]
            assert file[name].attrs.get("original_id", name) == original


@pytest.mark.parametrize("num_parts", [0, 3], ids=["whole", "in parts"])
def test_uniprot_per_residue_with_h5py(tmp_path: Path, num_parts: int) -> None:
    output = write_output(tmp_path / "in.h5", num_parts=num_parts)
    with h5py.File(export(output, "uniprot", "--kind", "per_residue", "--layer", "1")) as file:
        assert set(file) == {output.ids[row] for row in COMPUTED}
        for row in COMPUTED:
            np.testing.assert_array_equal(file[output.ids[row]][:], output.value("per_residue/1", row))


def test_uniprot_with_protspace(output: Output) -> None:
    load_h5 = pytest.importorskip("protspace.data.loaders.h5").load_h5
    loaded = load_h5([export(output, "uniprot")])
    assert loaded.name == "m"
    rows = [output.ids.index(header) for header in loaded.headers]
    assert sorted(rows) == COMPUTED
    np.testing.assert_array_equal(loaded.data, output.values["embeddings"][rows])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("sp|P12345|X", "tr|P12345|Y"), "sp|P12345|X and tr|P12345|Y would both be named P12345"),
        (("a/b", "a%2Fb"), "a/b and a%2Fb would both be named a%2Fb"),
    ],
)
def test_ids_of_one_accession_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: tuple[str, str], message: str
) -> None:
    output = renamed(tmp_path / "in.h5", *ids)
    path = tmp_path / "x.h5"
    assert cli.main(["export", str(output.path), "--to", "uniprot", "-o", str(path)]) == 2
    assert message in capsys.readouterr().err.replace("'", "")
    assert sorted(tmp_path.iterdir()) == [output.path]


@pytest.mark.parametrize(
    ("kind", "dataset"),
    [
        ("mean", "embeddings"),
        ("per_residue", "per_residue/6"),
        ("logits", "logits"),
        ("contacts", "contacts"),
    ],
)
def test_pt_with_torch(output: Output, kind: str, dataset: str) -> None:
    loaded = torch.load(export(output, "pt", "--kind", kind), weights_only=True)
    assert list(loaded) == [output.ids[row] for row in COMPUTED]
    for row in COMPUTED:
        np.testing.assert_array_equal(loaded[output.ids[row]].numpy(), output.value(dataset, row))


def test_npz_with_numpy(output: Output) -> None:
    with np.load(export(output, "npz", "--kind", "bos", "--layer", "1")) as loaded:
        assert loaded["ids"].tolist() == [output.ids[row] for row in COMPUTED]
        np.testing.assert_array_equal(loaded["embeddings"], output.values["bos/1"][COMPUTED])


def test_parquet_with_pyarrow_and_pandas(output: Output) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = export(output, "parquet")
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    assert table.schema.field("embedding").type == arrow.list_(arrow.float32(), 8)
    assert b'"model_name": "m"' in table.schema.metadata[b"esm-packed"]
    frame = pytest.importorskip("pandas").read_parquet(path).set_index("sequence_id")
    assert frame.index.tolist() == [output.ids[row] for row in COMPUTED]
    np.testing.assert_array_equal(np.stack(frame["embedding"]), output.values["embeddings"][COMPUTED])
    assert frame.loc["long", ["lengths", "embedded_lengths", "truncated", "status"]].tolist() == [
        11,
        9,
        True,
        "computed",
    ]
    assert frame["status"].tolist() == [LABELS[row] for row in COMPUTED]
    np.testing.assert_array_equal(frame["unmasked_nll"], output.values["unmasked_nll"][COMPUTED])


@pytest.mark.parametrize("backed", [False, True], ids=["in memory", "backed"])
def test_h5ad_with_anndata(output: Output, backed: bool) -> None:
    anndata = pytest.importorskip("anndata")
    loaded = anndata.read_h5ad(export(output, "h5ad", "--keep-missing"), backed="r" if backed else None)
    np.testing.assert_array_equal(loaded.X[:], output.values["embeddings"])
    assert loaded.obs_names.tolist() == output.ids
    assert loaded.obs["status"].tolist() == LABELS
    assert loaded.obs["lengths"].tolist()[5:] == [11, 1] and loaded.obs["truncated"].tolist()[5:] == [
        True,
        False,
    ]
    assert loaded.shape == (7, 8) and loaded.var_names.tolist() == list("01234567")
    assert loaded.uns["model_name"] == "m" and loaded.uns["layer"] == 6
    assert loaded[["a", "last"]].to_memory().X.shape == (2, 8)


@pytest.mark.parametrize("store_dtype", ["float16", "float32"])
@pytest.mark.parametrize("to", FORMATS)
def test_sequences_without_values_are_kept_as_nan_or_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, store_dtype: str
) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    output = write_output(tmp_path / "in.h5", ["mean"], repeats=250, store_dtype=store_dtype)
    path = export(output, to)
    assert f"{path}: 1,250 sequences, mean of layer 6" in (out := capsys.readouterr().out)
    assert "500 sequences failed or not computed: skipped (--keep-missing writes them as NaN)" in out
    is_there = output.status < 2
    np.testing.assert_array_equal(values_in(path, to, output), output.values["embeddings"][is_there])
    path = export(output, to, "--keep-missing", "--overwrite")
    assert "500 sequences failed or not computed: written as NaN" in capsys.readouterr().out
    np.testing.assert_array_equal(values_in(path, to, output), output.values["embeddings"])


def values_in(path: Path, to: str, output: Output) -> np.ndarray:
    """All values in a file, in the order of the output."""
    if to == "npz":
        return np.load(path)["embeddings"]
    if to == "parquet":
        column = pytest.importorskip("pyarrow.parquet").read_table(path)["embedding"]
        return column.combine_chunks().flatten().to_numpy().reshape(-1, 8)
    if to == "pt":
        return np.stack(list(torch.load(path, weights_only=True).values()))
    with h5py.File(path) as file:
        return (
            file["X"][:] if to == "h5ad" else np.stack([file[each][:] for each in output.ids if each in file])
        )


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_leaves_nothing_behind(output: Output, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    path = export(output, to)
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esm_packed.files.sync", fail)
    arguments = ["export", str(output.path), "--to", to, "-o", str(path), "--overwrite"]
    assert cli.main(arguments) == 5
    assert path.read_text() == "before"
    assert sorted(output.path.parent.iterdir()) == [output.path, path]


@pytest.mark.parametrize("to", ["npz", "h5ad"])
def test_values_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr(output_files, "HIDDEN_SIZE", 1024)
    output = write_output(tmp_path / "in.h5", ["mean"], repeats=1500)
    assert output.values["embeddings"][output.status < 2].nbytes > 30e6
    export(output, to)  # what is imported
    tracemalloc.start()
    try:
        export(output, to, "--overwrite")
        assert tracemalloc.get_traced_memory()[1] < 26e6
    finally:
        tracemalloc.stop()


def test_residues_alone_need_not_be_named(tmp_path: Path) -> None:
    output = write_output(tmp_path / "in.h5", ["per_residue"])
    assert torch.load(export(output, "pt"), weights_only=True)["long"].shape == (9, 8)


def test_partial_outputs_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = write_output(tmp_path / "in.h5", change=lambda file: file.attrs.update(complete=0))
    export(output, "npz")
    assert f"{output.path} is partial; rerun the same embed command to continue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "npz", "-o", "there"], "there: already exists; use --overwrite to replace it"),
        (
            ["--to", "npz", "-o", "in.h5", "--overwrite"],
            "--output in.h5: would overwrite the input in.h5; choose another name",
        ),
        (["--to", "npz", "-o", "no/x.npz"], "no: no such directory"),
        (["--to", "npz", "-o", "x", "--layer", "5"], "in.h5: no layer 5; it has 1, 6"),
        (["--to", "npz", "-o", "x", "--kind", "logits"], "--kind logits: npz stores one vector per sequence"),
        (["--to", "pt", "-o", "x", "--kind", "logits", "--layer", "1"], "logits has no layers"),
        (["--to", "pt", "-o", "x", "--kind", "unmasked_nll"], "--kind unmasked_nll: has a single number"),
        (["--to", "csv", "-o", "x"], "invalid choice: 'csv'"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_output(Path("in.h5"))
    Path("there").touch()
    assert cli.main(["export", "in.h5", *options]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.h5", "there"}


def test_parts_are_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = write_output(tmp_path / "in.h5", num_parts=3)
    part = output.folder / "00001.h5"
    before = part.read_bytes()
    arguments = ["export", str(output.path), "--to", "npz", "-o", str(part), "--overwrite"]
    assert cli.main(arguments) == 2
    assert "would overwrite the input" in capsys.readouterr().err and part.read_bytes() == before


def test_nothing_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(file: h5py.File) -> None:
        file["status"][:] = 2

    output = write_output(tmp_path / "in.h5", ["mean"], change=fail)
    assert cli.main(["export", str(output.path), "--to", "npz", "-o", str(tmp_path / "x")]) == 2
    assert "in.h5: all sequences failed or were not computed" in capsys.readouterr().err


def test_pyarrow_is_named_where_it_is_missing(
    output: Output, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = output.path.with_name("x")
    assert cli.main(["export", str(output.path), "--to", "parquet", "-o", str(path)]) == 2
    assert "pyarrow is not installed; install it with: pip install pyarrow" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["export", "--to", "npz"], ["map"]])
def test_an_output_that_is_not_there_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert cli.main([command[0], str(tmp_path / "no.h5"), *command[1:], "-o", str(tmp_path / "x.png")]) == 2
    assert "no.h5: no such file" in capsys.readouterr().err
