"""Outputs of every kind read back, whole and in parts; those that are damaged are refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import output_files
import pytest
from output_files import ABSENT_REASON, FAILED_REASON, HIDDEN_SIZE, LAYERS, Output, write_output

import esm_packed
from esm_packed.alphabet import TOKENS
from esm_packed.errors import UserError
from esm_packed.runners.cli import main as cli
from esm_packed.runners.output.names import KINDS, RAGGED, dataset_of, datasets_of
from esm_packed.runners.output.parts import PART
from esm_packed.runners.output.reader import EmbeddingReader, NotInFileError
from esm_packed.runners.state.shard import StoreError

LAYOUTS = {
    "contiguous": {},
    "float16": {"store_dtype": "float16"},
    "compressed": {"options": {"chunks": True, "compression": "gzip", "shuffle": True}},
    "in parts": {"num_parts": 3},
    "in compressed parts": {"num_parts": 5, "options": {"chunks": True, "compression": "gzip"}},
}
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
whole_and_in_parts = pytest.mark.parametrize("num_parts", [0, 3], ids=["whole", "in parts"])


@in_every_layout
def test_every_kind_is_read_back(tmp_path: Path, layout) -> None:
    output = write_output(tmp_path / "out.h5", **layout)
    with EmbeddingReader(output.path) as reader:
        assert reader.kinds == list(KINDS) and reader.layers == list(LAYERS)
        assert reader.hidden_size == HIDDEN_SIZE
        for kind, layer, name in datasets_of(KINDS, LAYERS):
            expected = output.values[name]
            np.testing.assert_array_equal(reader.values(kind, layer), expected)
            assert reader.values(kind, layer).dtype == expected.dtype
            for start, stop in [(0, 0), (2, 5), (3, 22), (0, 100), (-2, None), (5, 2)]:
                np.testing.assert_array_equal(reader.values(kind, layer, start, stop), expected[start:stop])
            for sequence in range(reader.num_sequences):
                value = reader.value(sequence, kind, layer)
                np.testing.assert_array_equal(value, output.value(name, sequence))
        sizes = {dataset.name: dataset.bytes for dataset in reader.datasets()}
        assert sizes.keys() == output.values.keys()
        if "options" not in layout:
            assert sizes == {name: rows.nbytes for name, rows in output.values.items()}


@whole_and_in_parts
def test_any_range_of_residues_is_read(tmp_path: Path, num_parts: int) -> None:
    output = write_output(tmp_path / "out.h5", ["per_residue"], num_parts=num_parts)
    expected = output.values["per_residue/6"]
    with EmbeddingReader(output.path) as reader:
        for start in range(len(expected) + 1):
            for stop in range(start, len(expected) + 1):
                values = reader.values("per_residue", None, start, stop)
                np.testing.assert_array_equal(values, expected[start:stop])


def test_more_residues_than_an_int32_counts(tmp_path: Path) -> None:
    """In a file with a hole, which takes no space."""

    def enlarge(file: h5py.File) -> None:
        for layer in LAYERS:
            del file[f"per_residue/{layer}"]
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((2**32, 1))
            h5py.h5d.create(file["per_residue"].id, b"%d" % layer, h5py.h5t.IEEE_F16LE, space, plist)
        file["starts"][-1] = 2**32 - 1

    output = write_output(tmp_path / "out.h5", ["per_residue"], change=enlarge)
    with EmbeddingReader(output.path) as reader:
        np.testing.assert_array_equal(reader.value(6, "per_residue"), [[0]])


@pytest.mark.parametrize(
    "kinds", [["mean"], ["logits"], ["bos", "per_residue"], ["unmasked_nll"], ["contacts"]], ids=str
)
def test_only_what_was_asked_for_is_there(tmp_path: Path, kinds: list[str]) -> None:
    output = write_output(tmp_path / "out.h5", kinds)
    with esm_packed.open(output.path) as embeddings:
        assert embeddings.kinds == kinds
        first = dataset_of(kinds[0], None, LAYERS)
        np.testing.assert_array_equal(embeddings["päf"], output.value(first, 1))
        for kind in set(KINDS) - set(kinds) - {"logits_all"}:
            with pytest.raises(NotInFileError, match=f"no kind '{kind}'; it has {', '.join(kinds)}"):
                values = getattr(embeddings, kind)
                values("a") if kind in RAGGED else values()


@whole_and_in_parts
def test_an_output_is_a_sequence_and_a_mapping(tmp_path: Path, num_parts: int) -> None:
    output = write_output(tmp_path / "out.h5", num_parts=num_parts, repeats=3)
    means = output.values["embeddings"]
    with esm_packed.open(output.path) as embeddings:
        assert len(embeddings) == len(embeddings.ids) == len(output.ids)
        assert list(embeddings.ids) == output.ids
        assert embeddings.ids[-1] == output.ids[-1] and embeddings.ids[8:2:-3] == output.ids[8:2:-3]
        assert "päf.2" in embeddings and "päf.3" not in embeddings and 3 not in embeddings
        for row, sequence_id in enumerate(output.ids):
            np.testing.assert_array_equal(embeddings[sequence_id], means[row])
            np.testing.assert_array_equal(embeddings[row - len(output.ids)], means[row])
        for rows in (slice(2, 7), slice(None), slice(9, 1, -3), slice(-2, None), slice(5, 5)):
            np.testing.assert_array_equal(embeddings[rows], means[rows])
        ids, values = zip(*embeddings, strict=True)
        assert list(ids) == output.ids
        np.testing.assert_array_equal(values, means)
        np.testing.assert_array_equal(embeddings.mean(1), output.values["mean/1"])
        np.testing.assert_array_equal(embeddings.max(6, 2, 4), output.values["max/6"][2:4])
        np.testing.assert_array_equal(embeddings.bos(), output.values["bos/6"])
        np.testing.assert_array_equal(embeddings.unmasked_nll, output.values["unmasked_nll"])
        assert embeddings.attributes["model_name"] == "m"


def test_iteration_holds_a_part_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_files, "HIDDEN_SIZE", 256)
    output = write_output(tmp_path / "out.h5", ["mean"], repeats=2000)
    size = output.values["embeddings"].nbytes
    with esm_packed.open(output.path) as embeddings:
        tracemalloc.start()
        try:
            assert sum(1 for _ in embeddings) == 14_000
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < size / 3


@whole_and_in_parts
def test_residues_by_id(tmp_path: Path, num_parts: int) -> None:
    output = write_output(tmp_path / "out.h5", num_parts=num_parts)
    with esm_packed.open(output.path) as embeddings:
        for row in (0, 1, 2, 4, 5, 6):
            residues = embeddings.per_residue(output.ids[row])
            np.testing.assert_array_equal(residues, output.value("per_residue/6", row))
            assert np.isnan(residues).all() == (output.ids[row] == "failed")
        np.testing.assert_array_equal(embeddings.per_residue("long", 1), output.value("per_residue/1", 5))
        np.testing.assert_array_equal(embeddings.logits("long"), output.value("logits_all", 5))
        assert embeddings.tokens == list(TOKENS)
        np.testing.assert_array_equal(embeddings.per_residue("same as a"), embeddings.per_residue("a"))
        np.testing.assert_array_equal(embeddings.contacts("long"), output.value("contacts", 5))
        with pytest.raises(KeyError, match="'absent' was not computed"):
            embeddings.contacts("absent")
    output = write_output(tmp_path / "amino_acids.h5", ["logits"])
    with esm_packed.open(output.path) as embeddings:
        np.testing.assert_array_equal(embeddings.logits("long"), output.value("logits", 5))
        assert "".join(embeddings.tokens) == "LAGVSERTIDPKQNFYMHWC"
        # the only kind is ragged
        assert [row.shape for row in embeddings[2:5]] == [(4, 20), (6, 20), (3, 20)]
        assert [np.isnan(row).all() for _, row in embeddings] == [row in (2, 3) for row in range(7)]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with esm_packed.open(write_output(tmp_path / "out.h5").path) as embeddings:
        assert embeddings.missing == {
            "failed": f"failed: {FAILED_REASON}",
            "absent": f"not computed: {ABSENT_REASON}",
        }
        statuses = [embeddings.status(name) for name in ("a", "päf", "failed", "absent")]
        assert statuses == ["computed", "recomputed", "failed", "not computed"]
        assert np.isnan(embeddings["failed"]).all() and np.isnan(embeddings["absent"]).all()
        with pytest.raises(KeyError, match="'absent' was not computed; rerun the command that began"):
            embeddings.per_residue("absent")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda file: file["Päf"], "no sequence 'Päf'; it has 7, such as 'a', 'päf', 'failed'"),
        (lambda file: file.per_residue("x"), "no sequence 'x'"),
        (lambda file: file.status("x"), "no sequence 'x'"),
        (lambda file: file.mean(33), "no layer 33; it has 1, 6"),
        (lambda file: file.per_residue("a", -1), "no layer -1; it has 1, 6"),
        (lambda file: file.to_pandas("logits"), "a table needs one of mean, max, bos, not logits"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_is(tmp_path: Path, ask, message: str) -> None:
    path = write_output(tmp_path / "out.h5").path
    with esm_packed.open(path) as embeddings, pytest.raises(KeyError, match=re.escape(message)) as raised:
        ask(embeddings)
    assert str(raised.value).startswith(f"{path}: ")


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    with esm_packed.open(write_output(tmp_path / "out.h5").path) as embeddings:
        for row in (7, -8):
            with pytest.raises(IndexError, match=f"row {row} is out of range for 7 rows"):
                embeddings[row]
        with pytest.raises(TypeError):
            embeddings[1.0]  # type: ignore[call-overload]


@whole_and_in_parts
def test_a_file_that_was_closed_says_so(tmp_path: Path, num_parts: int) -> None:
    with esm_packed.open(write_output(tmp_path / "out.h5", num_parts=num_parts).path) as embeddings:
        embeddings.per_residue("a")
    embeddings.close()
    for ask in (
        lambda: embeddings["a"],
        lambda: embeddings.mean(),
        lambda: embeddings.per_residue("a"),
        lambda: list(embeddings),
        lambda: embeddings.missing,
    ):
        with pytest.raises(ValueError, match=r"out\.h5: closed; open it again") as raised:
            ask()
        assert not isinstance(raised.value, StoreError)


def test_an_id_that_is_there_twice_is_damage(tmp_path: Path) -> None:
    def repeat(file: h5py.File) -> None:
        file["sequence_ids"][5] = "päf"

    with (
        esm_packed.open(write_output(tmp_path / "out.h5", change=repeat).path) as embeddings,
        pytest.raises(StoreError, match="ID 'päf' appears twice"),
    ):
        embeddings["a"]


def test_ids_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm_packed.runners.output.ids.hash", lambda sequence_id: 7, raising=False)
    output = write_output(tmp_path / "out.h5")
    with esm_packed.open(output.path) as embeddings:
        assert [embeddings.ids.row(sequence_id) for sequence_id in output.ids] == list(range(7))
        assert "x" not in embeddings


def test_tables(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    output = write_output(tmp_path / "out.h5")
    with esm_packed.open(output.path) as embeddings:
        table = embeddings.to_pandas()
        assert table.index.tolist() == output.ids and table.index.name == "sequence_id"
        np.testing.assert_array_equal(table.to_numpy(), output.values["embeddings"])
        np.testing.assert_array_equal(embeddings.to_pandas("max", 1), output.values["max/1"])
        obs = embeddings.obs()
        assert obs.loc["long"].to_dict() | {"unmasked_nll": 0} == {
            "lengths": 11,
            "embedded_lengths": 9,
            "truncated": True,
            "status": "computed",
            "unmasked_nll": 0,
        }
        assert isinstance(obs["status"].dtype, pandas.CategoricalDtype)


def test_anndata(tmp_path: Path) -> None:
    pytest.importorskip("anndata")
    output = write_output(tmp_path / "out.h5")
    with esm_packed.open(output.path) as embeddings:
        table = embeddings.to_anndata()
    np.testing.assert_array_equal(table.X, output.values["embeddings"])
    assert table.obs_names.tolist() == output.ids
    assert table.obs["status"].tolist()[1:4] == ["recomputed", "failed", "not computed"]
    assert set(table.obsm) == {"mean_1", "max_1", "max_6", "bos_1", "bos_6"}
    np.testing.assert_array_equal(table.obsm["max_1"], output.values["max/1"])
    assert table.uns["model_name"] == "m"


@pytest.mark.parametrize("method", ["obs", "to_pandas", "to_anndata"])
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    for name in ("pandas", "anndata"):
        monkeypatch.setitem(sys.modules, name, None)
    with (
        esm_packed.open(write_output(tmp_path / "out.h5").path) as embeddings,
        pytest.raises(UserError, match="is not installed; install it with: pip install pandas anndata"),
    ):
        getattr(embeddings, method)()


@whole_and_in_parts
def test_info_shows_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], num_parts: int) -> None:
    output = write_output(tmp_path / "out.h5", num_parts=num_parts, store_dtype="float16")
    assert cli.main(["info", str(output.path)]) == 0
    shown = {line[:20].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}
    assert shown["kinds"] == ", ".join(KINDS)
    assert shown["embeddings"] == "mean of layer 6: 7 x 8, fp16"
    assert shown["max/1"] == "max of layer 1: 7 x 8, fp16"
    assert shown["per_residue/6"] == "per residue of layer 6: 22 x 8, fp16 (352 B)"
    assert shown["logits"].endswith(": 22 x 20, fp16 (880 B)")
    assert shown["unmasked_nll"].endswith(": 7, fp32")
    sizes = [path.stat().st_size for path in sorted(output.folder.glob("*"))]
    assert ("parts" in shown) == (num_parts > 0)
    if num_parts:
        assert re.fullmatch(r"3 files in out\.h5\.parts/1a2b3c4d \([\d.]+ kB\)", shown["parts"])
    assert cli.main(["info", str(output.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kinds"] == list(KINDS)
    assert [part["bytes"] for part in told["parts"]] == sizes
    assert {
        "kind": "logits",
        "layer": None,
        "name": "logits",
        "shape": [22, 20],
        "dtype": "float16",
        "bytes": 880,
    } in told["datasets"]


def instead(name: str, **dataset) -> Callable[[h5py.File], None]:
    """Replace a data set and keep its attributes."""

    def replace(file: h5py.File) -> None:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, **dataset).attrs.update(attributes)

    return replace


def without(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


def put(name: str, row: int, value: int) -> Callable[[h5py.File], None]:
    return lambda file: file[name].__setitem__(row, value)


def attribute(name: str, value: object, dataset: str = "/") -> Callable[[h5py.File], None]:
    return lambda file: file[dataset].attrs.__setitem__(name, value)


def unwritten(*names: str, num_rows: int) -> Callable[[h5py.File], None]:
    def replace(file: h5py.File) -> None:
        for name in names:
            columns = file[name].shape[1]
            instead(name, shape=(num_rows, columns), dtype="f4", chunks=(7, columns))(file)

    return replace


DAMAGES = {
    "a kind of the future": attribute("kinds", ["mean", "structures"]),
    "kinds is text": attribute("kinds", "mean"),
    "no kinds": attribute("kinds", np.zeros(0, h5py.string_dtype())),
    **{
        f"no {name}": without(name)
        for name in ("starts", "max/1", "per_residue/6", "logits", "unmasked_nll", "pair_starts", "contacts")
    },
    "contacts are matrices": instead("contacts", data=np.zeros((77, 1), np.float32)),
    "contacts are short": instead("contacts", data=np.zeros(76, np.float32)),
    "a pair behind the last": put("pair_starts", 1, 63),
    "max is wide": instead("max/1", data=np.zeros((7, HIDDEN_SIZE + 1), np.float32)),
    "bos is short": instead("bos/1", data=np.zeros((6, HIDDEN_SIZE), np.float32)),
    "per_residue is short": instead("per_residue/6", data=np.zeros((21, HIDDEN_SIZE), np.float32)),
    "per_residue are numbers": instead("per_residue/6", data=np.zeros((22, HIDDEN_SIZE), np.int32)),
    "logits of two": instead("logits", data=np.zeros((22, 2), np.float32)),
    "unmasked_nll is float64": instead("unmasked_nll", data=np.zeros(7)),
    "2^34 residues": unwritten("per_residue/1", "per_residue/6", "logits", "logits_all", num_rows=2**34),
    "means never written": unwritten("embeddings", num_rows=7),
    "other tokens": attribute("tokens", list("LAGVSERTDIPKQNFYMHWC"), "logits"),
    "no tokens": lambda file: file["logits_all"].attrs.__delitem__("tokens"),
    "starts are floats": instead("starts", data=np.zeros(7)),
    "a start before the first": put("starts", 1, -2),
    "a start behind the last": put("starts", 1, 18),
    "a start far behind": put("starts", 1, 2**63 - 1),
    "no start of what was computed": put("starts", 1, -1),
    "a start of what was not computed": put("starts", 3, 0),
    "a negative length": put("embedded_lengths", 1, -1),
    "an unknown status": put("status", 1, 4),
    "parts of a single file": attribute("parts", "out.h5.parts/1a2b3c4d"),
}
DAMAGES_IN_PARTS = {
    "no parts": without("parts"),
    "no parts of pairs": without("pair_parts"),
    "a gap between pairs": instead(
        "pair_parts", data=np.array([("00000.h5", 9_999, 0, 3), ("00001.h5", 9_999, 4, 73)], PART)
    ),
    "virtual without parts": lambda file: file.attrs.__delitem__("parts"),
    "parts above": attribute("parts", "../out.h5.parts/1a2b3c4d"),
    "parts elsewhere": attribute("parts", "/tmp"),
    "parts nowhere": attribute("parts", ""),
    "parts are numbers": instead("parts", data=np.zeros(3)),
    "parts of no number": instead("parts", data=np.zeros(0, PART)),
    "a real data set": instead("per_residue/1", data=np.zeros((22, HIDDEN_SIZE), np.float32)),
    **{
        name: instead("parts", data=np.array([first, (last, 9_999, begin, count)], PART))
        for name, first, last, begin, count in [
            ("a gap between parts", ("00000.h5", 9_999, 0, 3), "00001.h5", 4, 18),
            ("no first part", ("00000.h5", 9_999, 1, 3), "00001.h5", 4, 18),
            ("a negative part", ("00000.h5", 9_999, 0, 23), "00001.h5", 23, -1),
            ("a part in another folder", ("00000.h5", 9_999, 0, 3), "../00001.h5", 3, 19),
        ]
    },
}


@pytest.mark.parametrize(
    ("damage", "num_parts"),
    [*((each, 0) for each in DAMAGES.values()), *((each, 3) for each in DAMAGES_IN_PARTS.values())],
    ids=[*DAMAGES, *DAMAGES_IN_PARTS],
)
@pytest.mark.timeout(60)
def test_a_damaged_output_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[h5py.File], None], num_parts: int
) -> None:
    path = write_output(tmp_path / "out.h5", num_parts=num_parts, change=damage).path
    with pytest.raises(StoreError, match="damaged, or not a complete esm-packed output") as raised:
        esm_packed.open(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    assert cli.main(["info", str(path)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"esm-packed: error: {raised.value}"


def in_part(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    """Change a part, and what the output says of its size."""

    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)
        with h5py.File(path.parents[2] / "out.h5", "r+") as file:
            for name in ("parts", "pair_parts"):
                parts = file[name][:]
                parts["bytes"][int(path.stem)] = path.stat().st_size
                file[name][:] = parts

    return damage


def replace_by_text(path: Path) -> None:
    path.write_text("x" * path.stat().st_size)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "missing"),
        (remove_folder, "missing"),
        (replace_by_folder, "not a regular file"),
        (replace_by_text, "not an HDF5 file, or truncated"),
        (lambda path: os.truncate(path, 3000), "not an HDF5 file, or truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"[\d,]+ bytes, not [\d,]+"),
        (in_part(attribute("plan_hash", "0" * 64)), "of another run"),
        (in_part(attribute("format", "esm-packed")), "of another run"),
        (in_part(without("logits")), "damaged, or not a complete part of .*no dataset logits"),
        (in_part(without("contacts")), "damaged, or not a complete part of .*no dataset contacts"),
    ],
)
@pytest.mark.parametrize("number", [0, 4])
def test_a_part_that_is_not_as_it_was_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    output = write_output(tmp_path / "out.h5", num_parts=5)
    part = output.folder / f"{number:05d}.h5"
    damage(part)
    named = part if damage is not remove_folder else output.folder / "00000.h5"
    with pytest.raises(StoreError, match=f"^{re.escape(str(named))}: .*{message}") as raised:
        esm_packed.open(output.path)
    assert f"restore this part of {output.path}, or embed again with --overwrite" in str(raised.value)
    for command in ("info", "merge"):
        assert cli.main([command, str(output.path)]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"esm-packed: error: {raised.value}"


def test_a_part_that_goes_away_meanwhile_is_an_error(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out.h5", num_parts=20, repeats=4)
    with esm_packed.open(output.path) as embeddings:
        (output.folder / "00000.h5").unlink()
        with pytest.raises(StoreError, match=r"00000\.h5: missing"):
            embeddings.per_residue("a")


def test_parts_move_with_their_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_output(tmp_path / "out.h5", num_parts=3)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    output.path.rename(moved / "renamed.h5")
    output.folder.parent.rename(moved / output.folder.parent.name)
    link = tmp_path / "link.h5"
    link.symlink_to(moved / "renamed.h5")
    monkeypatch.chdir(moved)
    for path in (link, moved / "renamed.h5", Path("renamed.h5")):
        with esm_packed.open(path) as embeddings:
            np.testing.assert_array_equal(embeddings.per_residue("long"), output.value("per_residue/6", 5))


def read_all(output: Output, max_files: int) -> subprocess.CompletedProcess[str]:
    """Read the residues of all sequences in a process that may open few files."""
    code = (
        "import resource, sys, numpy as np, esm_packed\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({max_files}, {max_files}))\n"
        f"with esm_packed.open({str(output.path)!r}) as embeddings:\n"
        "    names = [name for name in embeddings.ids if name not in embeddings.missing]\n"
        "    print(sum(int(np.isnan(embeddings.per_residue(name)).any()) for name in names), len(names))\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out.h5", ["per_residue"], num_parts=100, repeats=20)
    assert read_all(output, 64).stdout.split() == ["0", "100"]
    limited = read_all(output, 5)
    assert limited.returncode == 1 and not limited.stdout
    *_, line = limited.stderr.splitlines()
    assert re.fullmatch(
        r".*UserError: \S+/out\.h5\S*: too many open files; raise the limit: `ulimit -n`", line
    )
