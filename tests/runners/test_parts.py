"""Rows of residues in one file and in parts: the same values, whenever a process is killed."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import h5py
import numpy as np
import pytest
from nursery import DIE_AT_STEP, Child, Nursery, names_in, shards_of
from proteins import SHARDS_OF_RESIDUES, proteins_with_copies, random_proteins, write_fasta

import esm_packed
from esm_packed.runners.cli import main as cli
from esm_packed.runners.output import joining
from esm_packed.runners.output.parts import _MOST_OPEN
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state import cut
from esm_packed.runners.state.parts import MARKER, PartsDirectory
from esm_packed.runners.state.run import Run

KINDS = ("--include", "mean,per_residue,logits,contacts", "--layers", "2,5")
*SIZE, FLOPS_PER_SHARD = SHARDS_OF_RESIDUES
PART_BYTES = 60_000
SMALL_PARTS = f"""
from esm_packed.runners.output import joining
joining.PART_BYTES = {PART_BYTES}
def die(*call, **options):
    os.kill(os.getpid(), 9)
"""
DIE = {
    "between a part and the shards it is made of": "joining._leave_in_part = die",
    "between shards that leave their rows": """
leave, left = joining._leave_in_part, []
def leave_some(*call):
    left.append(leave(*call))
    if len(left) == 4:
        die()
joining._leave_in_part = leave_some
""",
    "between the last part and the output": "merging._merge = die",
    "between the output and what it replaces": "merging.remove_unused_parts = die",
    "between the output and the run": "rundir.RunDirectory.remove = die",
}
in_one_file_and_in_parts = pytest.mark.parametrize("place", ["--merge", "--parts"])


def contents(path: Path) -> dict[str, Any]:
    """What plain h5py finds in all data sets; the lists of parts are left out."""
    found: dict[str, Any] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name not in ("parts", "pair_parts"):
            values = item[()]
            found[name] = values if isinstance(values, bytes) else (item.shape, values.tolist())
            if item.dtype.kind == "f":
                found[name] = item.shape, values.tobytes()
                assert np.isfinite(values).all()

    with h5py.File(path) as file:
        file.visititems(add)
    return found


@dataclass(frozen=True)
class Work:
    """An input, what an undisturbed run makes of it, and how long that takes."""

    fasta: Path
    expected: dict[str, Any]
    num_shards: int
    seconds: float


@pytest.fixture(scope="module")
def work(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("residues")
    fasta = write_fasta(folder / "in.fasta", proteins_with_copies(*SIZE))
    begin = time.monotonic()
    log = run_to_the_end(nursery, fasta, folder / "out.h5", "--merge", "--keep-run")
    assert "embedding 24 sequences" in log
    seconds = time.monotonic() - begin
    num_shards = len(shards_of(folder / "out.h5"))
    assert 8 <= num_shards <= 20
    return Work(fasta, contents(folder / "out.h5"), num_shards, seconds)


def start(nursery: Nursery, fasta: Path, output: Path, *options: str, patch: str = "") -> Child:
    patch = SMALL_PARTS + patch
    return nursery.start(fasta, output, *KINDS, *options, flops_per_shard=FLOPS_PER_SHARD, patch=patch)


def run_to_the_end(nursery: Nursery, fasta: Path, output: Path, *options: str) -> str:
    child = start(nursery, fasta, output, *options)
    assert child.wait() == 0, child.output()
    return child.output()


def killed(nursery: Nursery, work: Work, output: Path, when: str, *options: str) -> None:
    child = start(nursery, work.fasta, output, *options, patch=DIE[when])
    assert child.wait() == -signal.SIGKILL, child.output()


def parts_of(output: Path) -> list[Path]:
    """Files in the folders of parts but for the marker."""
    return sorted(path for path in output.with_name(f"{output.name}.parts").glob("*/*"))


def assert_is_whole(output: Path, work: Work, place: str) -> None:
    """The output is that of an undisturbed run, and nothing else is left."""
    assert contents(output) == work.expected
    in_parts = place == "--parts"
    assert names_in(output.parent) == [output.name] + [f"{output.name}.parts"] * in_parts
    with EmbeddingReader(output) as reader:
        assert (len(reader.parts) > 3) == in_parts
        files = [Path(part.file).name for part in reader.parts]
        folder = output.parent / str(reader.attributes.get("parts"))
    assert [path.name for path in parts_of(output)] == files
    if in_parts:
        assert names_in(folder.parent) == sorted([MARKER, folder.name])


def test_parts_hold_what_one_file_holds(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    run_to_the_end(nursery, work.fasta, tmp_path / "one.h5", "--merge", "--compression", "gzip")
    for folder, options in (("plain", ()), ("gzip", ("--compression", "gzip"))):
        output = tmp_path / folder / "out.h5"
        output.parent.mkdir()
        run_to_the_end(nursery, work.fasta, output, "--parts", *options)
        assert_is_whole(output, work, "--parts")
        with esm_packed.open(output) as parts, esm_packed.open(tmp_path / "one.h5") as one:
            for name in one.ids:
                for layer in (2, 5):
                    np.testing.assert_array_equal(
                        parts.per_residue(name, layer), one.per_residue(name, layer)
                    )
                np.testing.assert_array_equal(parts.logits(name), one.logits(name))
                np.testing.assert_array_equal(parts.contacts(name), one.contacts(name))
                np.testing.assert_array_equal(parts[name], one[name])


@pytest.mark.parametrize("num_shards", [1, 127, 128, 129, 20_000])
def test_there_are_at_most_128_parts(num_shards: int) -> None:
    run = cast(Run, SimpleNamespace(plan=SimpleNamespace(num_shards=num_shards)))
    for bytes_of_each, number in ((1, 1), (joining.PART_BYTES, min(num_shards, 128))):
        run.ragged_bytes = bytes_of_each * num_shards  # type: ignore[misc]
        groups = list(joining._groups(run))
        assert len(groups) == number
        assert [shard for group in groups for shard in group] == list(range(num_shards))


def test_more_parts_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain h5py, which reads the truth here, keeps all open, and fills in for those it cannot open."""
    monkeypatch.setitem(cut.FLOPS_PER_SHARD, "cpu", 1.0)
    monkeypatch.setattr(joining, "PART_BYTES", 1)
    num_parts = 40
    proteins = random_proteins(range(1, num_parts + 1))
    fasta, output = write_fasta(tmp_path / "in.fasta", proteins), tmp_path / "out.h5"
    arguments = ["embed", str(fasta), "-o", str(output), "--model", "demo", "--device", "cpu", "--parts"]
    assert cli.main([*arguments, "--include", "per_residue", "--threads", "1", "--quiet"]) == 0
    assert len(parts_of(output)) == num_parts
    with h5py.File(output) as file:
        rows, starts, lengths = (file[name][:] for name in ("per_residue/5", "starts", "embedded_lengths"))
    assert np.isfinite(rows).all() and rows.any(axis=1).all()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = {int(path.name) for path in Path("/dev/fd").iterdir()}
    limit = [number for number in range(4096) if number not in open_files][_MOST_OPEN + 8]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        with h5py.File(output) as file:
            assert not np.array_equal(file["per_residue/5"][:], rows)
        with esm_packed.open(output) as embeddings:
            for (_, values), start, length in zip(embeddings, starts, lengths, strict=True):
                np.testing.assert_array_equal(values, rows[start : start + length])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def kill_at_random(nursery: Nursery, work: Work, folder: Path, place: str, kills: int) -> None:
    rng, output = random.Random(place), folder / "out.h5"
    while kills:
        child = start(nursery, work.fasta, output, place)
        time.sleep(rng.uniform(0.0, work.seconds))
        if child.kill() == -signal.SIGKILL:
            kills -= 1
        elif kills:
            assert_is_whole(output, work, place)
            output.unlink()
            shutil.rmtree(folder / "out.h5.parts", ignore_errors=True)
    run_to_the_end(nursery, work.fasta, output, place)
    assert_is_whole(output, work, place)


@in_one_file_and_in_parts
def test_killed_at_random_moments(nursery: Nursery, work: Work, tmp_path: Path, place: str) -> None:
    kill_at_random(nursery, work, tmp_path, place, 2)


@pytest.mark.slow
@in_one_file_and_in_parts
def test_killed_at_25_random_moments(nursery: Nursery, work: Work, tmp_path: Path, place: str) -> None:
    """A minute each."""
    kill_at_random(nursery, work, tmp_path, place, 25)


def kill_at_steps(nursery: Nursery, work: Work, folder: Path, only: str, most: int) -> None:
    """Kill runs at some of their operations, `most` at most, on files whose names have `only` in them."""
    (folder / "counted").mkdir()
    patch = DIE_AT_STEP.format(step=0, only=only)
    child = start(nursery, work.fasta, folder / "counted" / "out.h5", "--parts", patch=patch)
    assert child.wait() == 0, child.output()
    total = int(child.output().rpartition("steps ")[2])
    assert total >= 3
    for step in sorted(random.Random(only).sample(range(1, total + 1), min(most, total))):
        output = folder / f"step{step}" / "out.h5"
        output.parent.mkdir()
        patch = DIE_AT_STEP.format(step=step, only=only)
        child = start(nursery, work.fasta, output, "--parts", patch=patch)
        if child.wait() == -signal.SIGKILL and output.exists():
            assert contents(output) == work.expected, f"step {step}"
        run_to_the_end(nursery, work.fasta, output, "--parts")
        assert_is_whole(output, work, "--parts")


@pytest.mark.parametrize("only", [".parts", "/00001.h5"])
def test_killed_at_a_step_on_disk(nursery: Nursery, work: Work, tmp_path: Path, only: str) -> None:
    kill_at_steps(nursery, work, tmp_path, only, 1)


@pytest.mark.slow
@pytest.mark.parametrize("only", [".parts", "/00001.h5", "out.h5."])
def test_killed_at_every_step_on_disk(nursery: Nursery, work: Work, tmp_path: Path, only: str) -> None:
    """A minute each."""
    kill_at_steps(nursery, work, tmp_path, only, 60)


@pytest.mark.parametrize("when", DIE)
def test_killed_while_parts_are_made(nursery: Nursery, work: Work, tmp_path: Path, when: str) -> None:
    output = tmp_path / "out.h5"
    killed(nursery, work, output, when, "--parts")
    assert output.exists() == (when.startswith("between the output"))
    log = run_to_the_end(nursery, work.fasta, output, "--parts")
    assert "embedding 24 sequences" not in log, "shards were computed again"
    assert_is_whole(output, work, "--parts")


@pytest.mark.parametrize(
    "before, place, when",
    [
        *(
            pytest.param("--parts", "--parts", when, marks=pytest.mark.slow)  # 2 s each
            for when in ("between shards that leave their rows", "between the last part and the output")
        ),
        ("--parts", "--parts", "between the output and what it replaces"),
        ("--parts", "--merge", "between the output and what it replaces"),
        ("--merge", "--parts", "between the last part and the output"),
    ],
)
def test_an_output_is_there_until_its_successor_is(
    nursery: Nursery, work: Work, tmp_path: Path, before: str, place: str, when: str
) -> None:
    output = tmp_path / "out.h5"
    run_to_the_end(nursery, work.fasta, output, before, "--max-length", "9")
    old = contents(output)
    assert old != work.expected
    killed(nursery, work, output, when, place, "--overwrite")
    is_new = when == "between the output and what it replaces"
    assert contents(output) == (work.expected if is_new else old)
    with esm_packed.open(output) as embeddings:
        assert np.isfinite(embeddings.per_residue("protein23")).all()
    run_to_the_end(nursery, work.fasta, output, place, *[] if is_new else ["--overwrite"])
    assert_is_whole(output, work, place)


@pytest.mark.parametrize("what", ["folder", "link", "file", "link to a folder of ours"])
def test_what_is_in_the_way_of_parts_is_left_alone(
    nursery: Nursery, work: Work, tmp_path: Path, what: str
) -> None:
    output, theirs, way = tmp_path / "out.h5", tmp_path / "theirs", tmp_path / "out.h5.parts"
    part = (way if what == "folder" else theirs) / "1a2b3c4d" / "00000.h5"
    part.parent.mkdir(parents=True)
    part.write_text("precious")
    if what == "file":
        way.write_text("precious")
    elif "link" in what:
        way.symlink_to(theirs)
    if "ours" in what:
        (tmp_path / "ours").mkdir()
        PartsDirectory(tmp_path / "ours.h5", "1a2b3c4d").make(tmp_path / "ours")
        shutil.copy(tmp_path / "ours.h5.parts" / MARKER, theirs)
    child = start(nursery, work.fasta, output, "--parts")
    assert child.wait() == 2, child.output()
    assert f"{way}: not created by esm-packed" in child.output().splitlines()[-1]
    assert not shards_of(output), "what was computed in vain"
    if what == "folder":
        run_to_the_end(nursery, work.fasta, output, "--merge")
        assert contents(output) == work.expected
    assert part.read_text() == "precious"
    assert way.is_symlink() == ("link" in what)


def damage(parts: list[Path]) -> None:
    """Alter a part, cut one and remove one."""
    altered, cut_short, removed, *_ = parts
    content = bytearray(altered.read_bytes())
    content[-100] ^= 1
    altered.write_bytes(content)
    os.truncate(cut_short, cut_short.stat().st_size // 2)
    removed.unlink()


@pytest.mark.parametrize("how", [(), ("--slice", "0/1")], ids=["run", "slice"])
def test_shards_of_damaged_parts_are_computed_again(
    nursery: Nursery, work: Work, tmp_path: Path, how: tuple[str, ...]
) -> None:
    output = tmp_path / "out.h5"
    killed(nursery, work, output, "between the last part and the output", "--parts")
    whole = parts_of(output)[3:]
    before = {path: path.stat().st_mtime_ns for path in whole}
    damage(parts_of(output))
    log = run_to_the_end(nursery, work.fasta, output, "--parts", *how)
    assert "continuing" in log or "recomputing it" in log
    assert_is_whole(output, work, "--parts")
    assert {path: path.stat().st_mtime_ns for path in whole} == before, "parts were made again in vain"


def test_parts_are_moved_with_their_output(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out.h5", tmp_path / "elsewhere"
    run_to_the_end(nursery, work.fasta, output, "--parts")
    elsewhere.mkdir()
    for name in ("out.h5", "out.h5.parts"):
        shutil.move(tmp_path / name, elsewhere / name)
    assert_is_whole(elsewhere / "out.h5", work, "--parts")


@pytest.mark.parametrize("name", ["50%b.h5", "100%% päf.h5"])
def test_an_output_in_parts_may_have_any_name(
    nursery: Nursery, work: Work, tmp_path: Path, name: str
) -> None:
    """HDF5 reads % in the name of a source as the beginning of a format."""
    run_to_the_end(nursery, work.fasta, tmp_path / name, "--parts")
    assert_is_whole(tmp_path / name, work, "--parts")


def test_a_name_that_hdf5_cannot_keep_is_refused_at_once(
    nursery: Nursery, work: Work, tmp_path: Path
) -> None:
    output = tmp_path / os.fsdecode(b"\xff.h5")
    child = start(nursery, work.fasta, output, "--parts")
    assert child.wait() == 2, child.output()
    assert "needs a UTF-8 name" in child.output()
    assert not shards_of(output)
    run_to_the_end(nursery, work.fasta, output, "--merge")
    assert contents(output) == work.expected


def test_space_that_runs_out_while_parts_are_made(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    patch = """
pwrite = os.pwrite
def full(descriptor, *call):
    if "/00001.h5." in os.readlink(f"/proc/self/fd/{descriptor}"):
        raise OSError(28, "No space left on device")
    return pwrite(descriptor, *call)
os.pwrite = full
"""
    child = start(nursery, work.fasta, output, "--parts", patch=patch)
    assert child.wait() == 5, child.output()
    assert "out of disk space" in child.output().splitlines()[-1]
    assert [path.name for path in parts_of(output)] == ["00000.h5"]
    log = run_to_the_end(nursery, work.fasta, output, "--parts")
    assert "embedding 24 sequences" not in log, "shards were computed again"
    assert_is_whole(output, work, "--parts")


@pytest.mark.parametrize("when", [*DIE][1:3])
def test_parts_become_one_file_half_way(nursery: Nursery, work: Work, tmp_path: Path, when: str) -> None:
    output = tmp_path / "out.h5"
    killed(nursery, work, output, when, "--parts")
    run_to_the_end(nursery, work.fasta, output, "--merge")
    assert_is_whole(output, work, "--merge")


def test_a_partial_output_leaves_the_parts_of_its_run(
    nursery: Nursery, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.h5"
    killed(nursery, work, output, "between shards that leave their rows", "--parts")
    last = sorted((tmp_path / "out.h5.run" / "shards").iterdir())[-1]
    last.unlink()
    parts = parts_of(output)
    assert cli.main(["merge", str(output), "--partial"]) == 4
    assert parts_of(output) == parts
    with EmbeddingReader(output) as reader:
        starts = reader.starts()
        assert starts[0] == 0 and starts[-1] == -1
    log = run_to_the_end(nursery, work.fasta, output, "--parts")
    assert f"continuing: {work.num_shards - 1} of {work.num_shards}" in log
    assert_is_whole(output, work, "--parts")


def test_a_partial_output_has_the_rows_of_the_shards_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cut.FLOPS_PER_SHARD, "cpu", FLOPS_PER_SHARD)
    fasta = write_fasta(tmp_path / "in.fasta", proteins_with_copies(30, 40))
    output = tmp_path / "out.h5"
    options: dict[str, Any] = {"model": "demo", "device": "cpu", "progress": False}
    options["include"] = ["mean", "per_residue", "logits"]
    esm_packed.embed_file(fasta, tmp_path / "whole.h5", **options).close()
    esm_packed.embed_file(fasta, output, keep_run=True, **options).close()
    output.unlink()
    shards = shards_of(output)
    for number in (1, len(shards) - 1):
        (tmp_path / "out.h5.run" / "shards" / f"{number:05}.shard").unlink()
    assert cli.main(["merge", str(output), "--partial"]) == 4
    with esm_packed.open(output) as found, esm_packed.open(tmp_path / "whole.h5") as whole:
        assert 0 < len(found.missing) < len(whole)
        for sequence_id in whole.ids:
            if sequence_id in found.missing:
                with pytest.raises(KeyError, match="not computed"):
                    found.per_residue(sequence_id)
                continue
            np.testing.assert_array_equal(found.per_residue(sequence_id), whole.per_residue(sequence_id))
            np.testing.assert_array_equal(found.logits(sequence_id), whole.logits(sequence_id))
    with esm_packed.embed_file(fasta, output, **options) as found:
        assert not found.missing


def test_a_run_that_is_kept_keeps_its_parts(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    """They are all that its shards have of rows of residues."""
    output = tmp_path / "out.h5"
    run_to_the_end(nursery, work.fasta, output, "--parts", "--keep-run")
    merge = ["merge", str(output), "--overwrite"]
    assert cli.main([*merge, "--merge", "--keep-run"]) == 0
    assert contents(output) == work.expected
    run_to_the_end(nursery, work.fasta, output, "--keep-run")
    assert cli.main([*merge, "--parts", "--keep-run"]) == 0
    assert contents(output) == work.expected
    assert cli.main([*merge, "--merge"]) == 0
    assert_is_whole(output, work, "--merge")
