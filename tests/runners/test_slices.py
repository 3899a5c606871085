"""Slices of a run: who computes what, and several real processes on one run directory."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from nursery import (
    Child,
    Nursery,
    Result,
    Work,
    names_in,
    shards_of,
    wait_until,
)

from esm_packed.runners.cli import main as cli
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.slices import Slice, SliceError, local_device_number, parse_slice

ARRAY = {f"SLURM_ARRAY_TASK_{name}": value for name, value in zip(
    ("ID", "MIN", "MAX", "STEP", "COUNT"), ("3", "0", "7", "1", "8"), strict=True
)}  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("num_shards", [1, 7, 30])
def test_slices_share_all_shards(count: int, num_shards: int) -> None:
    parts = [list(Slice(index, count).shards(num_shards)) for index in range(count)]
    assert sorted(shard for part in parts for shard in part) == list(range(num_shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "text, environment, expected",
    [
        ("0/1", {}, Slice(0, 1)),
        ("7/8", {"RANK": "1", "WORLD_SIZE": "2"}, Slice(7, 8)),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, Slice(1, 2)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"}, Slice(0, 1)),
        ("auto", {"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, Slice(5, 6)),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, Slice(1, 2)),
        ("auto", ARRAY, Slice(3, 8)),
        ("auto", ARRAY | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Slice(3, 8)),
    ],
)
def test_what_auto_takes(text: str, environment: dict[str, str], expected: Slice) -> None:
    assert parse_slice(text, environment) == expected


@pytest.mark.parametrize(
    "text, environment, named",
    [
        ("8/8", {}, "INDEX from 0 to COUNT - 1"),
        ("-1/8", {}, "'-1/8'"),
        ("1", {}, "neither auto nor INDEX/COUNT"),
        ("1/0", {}, "'1/0'"),
        ("", {}, "neither auto nor INDEX/COUNT"),
        ("auto", {}, "--slice 0/8"),
        ("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "--slice 0/8"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8"}, "from 1 to 8 by 1"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_STEP": "2"}, "by 2"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, "in 3 tasks"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is ''"),
        ("auto", {"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ("auto", {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ("auto", {"RANK": "", "WORLD_SIZE": "2"}, "RANK is ''"),
        ("auto", {"SLURM_PROCID": "5", "SLURM_NTASKS": "3"}, "SLURM_PROCID is 5 and SLURM_NTASKS is 3"),
        ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "1"}, "SLURM_PROCID is 1 and SLURM_NTASKS is 1"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "8"}, "SLURM_ARRAY_TASK_ID is 8"),
        # digits of another script, which int() takes
        ("\u0660/2", {}, "neither auto nor INDEX/COUNT"),
        ("auto", {"RANK": "\u0661", "WORLD_SIZE": "2"}, "RANK is"),
    ],
)
def test_what_is_no_slice(text: str, environment: dict[str, str], named: str) -> None:
    with pytest.raises(SliceError, match=named):
        parse_slice(text, environment)


def test_a_process_takes_the_device_of_its_number_on_the_node() -> None:
    assert local_device_number({"LOCAL_RANK": "3", "SLURM_LOCALID": "1"}, 4) == 3
    assert local_device_number({"SLURM_LOCALID": "1"}, 4) == 1
    assert local_device_number({"SLURM_LOCALID": "1"}, 1) == 0  # Slurm has given each task one GPU
    assert local_device_number({}, 4) == 0


def test_what_a_live_slice_writes_is_not_swept_away(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "out.h5")
    directory.make()
    half_written = directory.scratch_path / "00003.h5.abcd"
    half_written.touch()
    with directory.slice_claim(Slice(1, 3)):
        directory.sweep()
        assert half_written.exists()
        assert list(directory.live_slices()) == [Slice(1, 3)]
    directory.sweep()
    assert not half_written.exists()
    assert not directory.live_slices()


@pytest.fixture
def work(many_shards: Work) -> Work:
    return many_shards


# Computes some packs, and the others only when the test says so, however slow or fast the machine is.
HELD = """
original_embed = ESM2.embed_packed
packs = 0
def held_embed(self, batch, names, *rest):
    global packs
    packs += 1
    deadline = time.monotonic() + 300
    while packs > {packs} and not os.path.exists({go!r}) and time.monotonic() < deadline:
        time.sleep(0.01)
    return original_embed(self, batch, names, *rest)
ESM2.embed_packed = held_embed
"""


def start(nursery: Nursery, work: Work, output: Path, *options: str, held: bool = False) -> Child:
    """A process that works on `work`; if `held`, it stops half-way until `release`."""
    patch = HELD.format(packs=5, go=str(go_of(output))) if held else ""
    return nursery.start(work.fasta, output, *options, flops_per_shard=work.flops_per_shard, patch=patch)


def go_of(output: Path) -> Path:
    return output.parent / "logs" / "go"


def release(output: Path) -> None:
    go_of(output).touch()


def check_end(work: Work, output: Path) -> None:
    assert Result.of(output) == work.expected
    assert names_in(output.parent) == [output.name]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_in_any_order_one_after_another(
    nursery: Nursery, work: Work, tmp_path: Path, order: list[int]
) -> None:
    output = tmp_path / "out.h5"
    for number, index in enumerate(order):
        child = start(nursery, work, output, "--slice", f"{index}/3")
        assert child.wait() == 0, child.output()
        assert output.exists() == (number == 2)
        if number < 2:
            shards = sum(len(Slice(each, 3).shards(work.num_shards)) for each in order[: number + 1])
            assert len(shards_of(output)) == shards
            assert f"{work.num_shards - shards} shards of other slices unfinished" in child.output()
            assert " residues) in the whole input\n" in child.output()
    check_end(work, output)
    again = start(nursery, work, output, "--slice", "1/3")
    assert again.wait() == 0, again.output()
    assert "already complete" in again.output()
    check_end(work, output)


@pytest.mark.parametrize("count", [2, 8, pytest.param(12, marks=pytest.mark.slow)])  # 3 s
def test_all_at_once(nursery: Nursery, few_shards: Work, tmp_path: Path, count: int) -> None:
    """Also where some slices have nothing to do."""
    work = few_shards
    assert 2 < work.num_shards < 8
    output = tmp_path / "out.h5"
    indices = list(range(count))
    random.Random(count).shuffle(indices)
    children = []
    for index in indices:
        children.append(start(nursery, work, output, "--slice", f"{index}/{count}"))
        if len(children) >= 5:
            assert children.pop(0).wait() == 0
    for child in children:
        assert child.wait() == 0, child.output()
    check_end(work, output)


def test_a_slice_in_work_is_refused_and_others_are_not(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    first = start(nursery, work, output, "--slice", "1/3", held=True)
    wait_until(lambda: shards_of(output))
    for options in (["--slice", "1/3"], ["--slice", "0/2"], [], ["--overwrite"]):
        second = start(nursery, work, output, *options)
        assert second.wait() == 2, second.output()
        last = second.output().splitlines()[-1]
        assert f"process {first.pid} on {socket.gethostname()}" in last
        assert "1/3" in last
    for index in (0, 2):
        child = start(nursery, work, output, "--slice", f"{index}/3")
        assert child.wait() == 0, child.output()
    release(output)
    assert first.wait() == 0, first.output()
    check_end(work, output)


def test_no_slice_joins_a_whole_run(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    first = start(nursery, work, output, held=True)
    wait_until(lambda: shards_of(output))
    second = start(nursery, work, output, "--slice", "1/3")
    assert second.wait() == 2, second.output()
    assert f"process {first.pid}" in second.output().splitlines()[-1]
    release(output)
    assert first.wait() == 0, first.output()
    check_end(work, output)


@pytest.mark.parametrize("how", ["other options", "other input", "other rules"])
def test_a_mistake_does_not_disturb_live_slices(
    nursery: Nursery, work: Work, tmp_path: Path, how: str
) -> None:
    output = tmp_path / "out.h5"
    first = start(nursery, work, output, "--slice", "0/2", held=True)
    wait_until(lambda: len(shards_of(output)) > 2)
    before = shards_of(output)
    fasta = work.fasta
    if how == "other input":
        fasta = tmp_path / "other.fasta"
        fasta.write_text(">a\nMK\n")
    options = {"other options": ["--max-length", "20"], "other rules": ["--invalid", "x"]}.get(how, [])
    second = nursery.start(fasta, output, "--slice", "1/2", *options)
    assert second.wait() == 2, second.output()
    assert "in use by other processes" in second.output() or "unfinished run" in second.output()
    assert before.items() <= shards_of(output).items()
    release(output)
    assert first.wait() == 0, first.output()
    child = start(nursery, work, output, "--slice", "1/2")
    assert child.wait() == 0, child.output()
    assert Result.of(output) == work.expected


def kill_slices(nursery: Nursery, work: Work, folder: Path, kills: int, seed: int) -> None:
    """Three slices run side by side; one after another is killed at a random moment and started again."""
    rng = random.Random(seed)
    folder.mkdir()
    output = folder / "out.h5"
    killed = 0
    while killed < kills:
        running = {index: start(nursery, work, output, "--slice", f"{index}/3") for index in range(3)}
        while running:
            time.sleep(rng.uniform(0.0, 0.4))
            index = rng.choice(list(running))
            child = running.pop(index)
            if killed < kills:
                code = child.kill()
                if code == -signal.SIGKILL:
                    killed += 1
                    running[index] = start(nursery, work, output, "--slice", f"{index}/3")
                    continue
            else:
                code = child.wait()
            assert code == 0, child.output()
        # who was to merge may have been killed
        last = start(nursery, work, output, "--slice", "0/3")
        assert last.wait() == 0, last.output()
        check_end(work, output)
        shutil.rmtree(folder)
        folder.mkdir()


def test_slices_killed_at_random_moments(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    kill_slices(nursery, work, tmp_path / "run", 4, seed=1)


@pytest.mark.slow
def test_slices_killed_at_25_random_moments(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    kill_slices(nursery, work, tmp_path / "run", 25, seed=2)


def test_what_slices_left_is_finished_without_them(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    child = start(nursery, work, output, "--slice", "1/4")
    assert child.wait() == 0, child.output()
    before = shards_of(output)
    rest = start(nursery, work, output, "--keep-run")
    assert rest.wait() == 0, rest.output()
    assert before.items() <= shards_of(output).items()
    assert Result.of(output) == work.expected


def test_a_damaged_shard_of_another_slice_is_computed_by_who_merges(
    nursery: Nursery, work: Work, tmp_path: Path
) -> None:
    output = tmp_path / "out.h5"
    assert start(nursery, work, output, "--slice", "1/2").wait() == 0
    shard = tmp_path / "out.h5.run" / "shards" / "00005.shard"
    os.truncate(shard, shard.stat().st_size - 5)
    child = start(nursery, work, output, "--slice", "0/2")
    assert child.wait() == 0, child.output()
    assert "shard 5 is missing or damaged; recomputing it" in child.output()
    check_end(work, output)


@pytest.mark.parametrize("options, named", [(["--overwrite"], "--overwrite"), (["-"], "standard input")])
def test_options_that_do_not_go_with_slices(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    arguments = ["embed", *options, str(work.fasta), "-o", str(tmp_path / "out.h5"), "--slice", "0/2"]
    assert cli.main(arguments) == 2
    assert named in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_a_refused_command_does_not_touch_the_index_that_merging_needs(
    nursery: Nursery, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.h5"
    assert start(nursery, work, output, "--keep-run").wait() == 0
    output.unlink()
    renamed = tmp_path / "renamed.fasta"
    renamed.write_text(work.fasta.read_text().replace(">protein", ">other"))
    index = tmp_path / "out.h5.run" / "index"
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    assert start(nursery, replace(work, fasta=renamed), output).wait() == 2
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before
    assert names_in(tmp_path / "out.h5.run") == [
        "ESM-PACKED-RUN",
        "index",
        "plan.json",
        "shards",
        "slices",
        "tmp",
    ]
    renamed.unlink()
    assert cli.main(["merge", str(output)]) == 0
    check_end(work, output)


def test_an_index_of_another_input_is_never_merged(
    nursery: Nursery, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a process was killed between the two."""
    output, other = tmp_path / "out.h5", tmp_path / "other.h5"
    renamed = tmp_path / "renamed.fasta"
    renamed.write_text(work.fasta.read_text().replace(">protein", ">other"))
    assert start(nursery, work, output, "--keep-run").wait() == 0
    assert start(nursery, replace(work, fasta=renamed), other, "--keep-run").wait() == 0
    output.unlink()
    shutil.rmtree(tmp_path / "out.h5.run" / "index")
    shutil.copytree(tmp_path / "other.h5.run" / "index", tmp_path / "out.h5.run" / "index")
    assert cli.main(["merge", str(output)]) == 2
    assert "not the index of this plan" in capsys.readouterr().err
    assert not output.exists()
    again = start(nursery, work, output)
    assert again.wait() == 0, again.output()
    assert Result.of(output) == work.expected


def test_a_run_directory_that_is_removed_meanwhile(nursery: Nursery, work: Work, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    child = start(nursery, work, output, held=True)
    wait_until(lambda: len(shards_of(output)) > 3)
    (tmp_path / "out.h5.run").rename(tmp_path / "away")  # at once, so that nothing is written meanwhile
    shutil.rmtree(tmp_path / "away")
    release(output)
    assert child.wait() == 2, child.output()
    assert "was removed during the run" in child.output().splitlines()[-1]
    assert start(nursery, work, output).wait() == 0
    assert Result.of(output) == work.expected


def test_status_says_who_is_at_work(
    nursery: Nursery, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.h5"
    child = start(nursery, work, output, "--slice", "1/2", held=True)
    wait_until(lambda: len(shards_of(output)) > 1)
    assert cli.main(["status", str(output)]) == 0
    assert f"slice 1/2: process {child.pid} on" in capsys.readouterr().out
    child.kill()
    whole = start(nursery, work, output, held=True)
    wait_until((tmp_path / "out.h5.run" / "claim").exists)
    whole.kill()
    assert cli.main(["status", str(output)]) == 0
    assert "not running" in capsys.readouterr().out


def test_merge_needs_all_shards_and_nothing_else(
    nursery: Nursery, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.h5"
    assert cli.main(["merge", str(output)]) == 2
    assert "no run to merge" in capsys.readouterr().err
    assert start(nursery, work, output, "--keep-run").wait() == 0
    output.unlink()
    shard = tmp_path / "out.h5.run" / "shards" / "00002.shard"
    content = shard.read_bytes()
    shard.unlink()
    assert cli.main(["merge", str(output)]) == 4
    assert "1 shard missing" in capsys.readouterr().err
    shard.write_bytes(content[:-1])
    assert cli.main(["merge", str(output)]) == 4, "a damaged shard is no shard"
    assert not shard.exists()
    shard.write_bytes(content)
    assert cli.main(["merge", f"{output}.run"]) == 0
    check_end(work, output)
