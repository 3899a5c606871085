"""Real processes that are killed, interrupted, starved of space and set against each other."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nursery import DIE_AT_STEP, SLOW, Nursery, Result, Work, names_in, shards_of, wait_until

from esm_packed.runners.cli import main as cli
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_NOT_COMPUTED


def continue_to_the_end(nursery: Nursery, work: Work, output: Path) -> None:
    """Repeat the command; it ends well, with the file of the undisturbed run and nothing beside it."""
    child = nursery.start(work.fasta, output, flops_per_shard=work.flops_per_shard)
    assert child.wait() == 0, child.output()
    assert Result.of(output) == work.expected
    assert names_in(output.parent) == [output.name]


def kill_at_random(nursery: Nursery, work: Work, folder: Path, kills: int, seed: int) -> None:
    """Kill a run and its continuations at random moments; behind one that ends comes another."""
    rng = random.Random(seed)
    folder.mkdir()
    output = folder / "out.h5"
    before: dict[str, tuple[int, int]] = {}
    litter: list[str] = []
    killed = 0
    while killed < kills or not output.exists():
        child = nursery.start(work.fasta, output, flops_per_shard=work.flops_per_shard, keep_run=True)
        if killed < kills:
            time.sleep(rng.uniform(0.0, work.seconds))
            code = child.kill()
        else:
            code = child.wait()
        now = shards_of(output)
        assert before.items() <= now.items(), "a finished shard was computed again"
        if code == -signal.SIGKILL:
            killed += 1
            before = now
            continue
        assert code == 0, child.output()
        assert Result.of(output) == work.expected
        assert len(now) == work.num_shards
        litter += litter_in(folder)
        if killed < kills:
            shutil.rmtree(folder)
            folder.mkdir()
            before = {}
    assert litter == []


def litter_in(folder: Path) -> list[str]:
    """Temporary files, and a claim that nobody holds, of a folder with a finished run."""
    litter = [*folder.rglob(".*"), *folder.rglob("tmp/*"), *folder.rglob("claim"), *folder.rglob("*.claim")]
    return sorted(str(path.relative_to(folder)) for path in litter)


def test_killed_at_random_moments(nursery: Nursery, many_shards: Work, tmp_path: Path) -> None:
    kill_at_random(nursery, many_shards, tmp_path / "run", 3, seed=1)


@pytest.mark.slow
def test_killed_at_25_random_moments(nursery: Nursery, many_shards: Work, tmp_path: Path) -> None:
    kill_at_random(nursery, many_shards, tmp_path / "run", 25, seed=2)


def count_steps(nursery: Nursery, work: Work, folder: Path, only: str) -> int:
    patch = DIE_AT_STEP.format(step=0, only=only)
    folder.mkdir()
    child = nursery.start(work.fasta, folder / "out.h5", flops_per_shard=work.flops_per_shard, patch=patch)
    assert child.wait() == 0, child.output()
    return int(child.output().rpartition("steps ")[2])


def kill_at_steps(nursery: Nursery, work: Work, folder: Path, only: str, steps: int | None) -> None:
    total = count_steps(nursery, work, folder / "counted", only)
    assert total >= 3
    chosen = range(1, total + 1)
    if steps is not None and steps < total:
        chosen = sorted(random.Random(only).sample(chosen, steps))  # type: ignore[assignment]
    faults = []
    for step in chosen:
        patch = DIE_AT_STEP.format(step=step, only=only)
        place = folder / f"step{step}"
        place.mkdir()
        output = place / "out.h5"
        child = nursery.start(work.fasta, output, flops_per_shard=work.flops_per_shard, patch=patch)
        code = child.wait()
        if code != -signal.SIGKILL:  # threads do not take the same number of steps each time
            assert code == 0, child.output()
            continue
        before = shards_of(output)
        if output.exists():
            assert Result.of(output) == work.expected
        again = nursery.start(work.fasta, output, flops_per_shard=work.flops_per_shard, keep_run=True)
        where = f"step {step} ({child.output().strip().splitlines()[-1]})"
        if again.wait() != 0:
            faults.append(f"{where}: {again.output()}")
            continue
        now = shards_of(output)
        if now and not before.items() <= now.items():
            faults.append(f"{where}: finished shards were computed again")
        if Result.of(output) != work.expected:
            faults.append(f"{where}: another result")
        if litter := litter_in(place):
            faults.append(f"{where}: left {litter}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("only", ["claim", "plan.json", "shards/", "/index", "/tmp/", ".out.h5.run"])
def test_killed_at_a_step_on_disk(nursery: Nursery, few_shards: Work, tmp_path: Path, only: str) -> None:
    kill_at_steps(nursery, few_shards, tmp_path, only, 2)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["claim", "plan.json", "shards/", "/index", "/tmp/", ".out.h5.run"])
def test_killed_at_every_step_on_disk(nursery: Nursery, few_shards: Work, tmp_path: Path, only: str) -> None:
    kill_at_steps(nursery, few_shards, tmp_path, only, 40)


KILLED_AFTER_MERGE = """
def killed(self):
    os.kill(os.getpid(), 9)
rundir.RunDirectory.remove = killed
"""


def test_killed_between_merging_and_cleaning_up(nursery: Nursery, few_shards: Work, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    child = nursery.start(
        few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard, patch=KILLED_AFTER_MERGE
    )
    assert child.wait() == -signal.SIGKILL
    assert Result.of(output) == few_shards.expected
    again = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
    assert again.wait() == 0
    assert "already complete" in again.output()
    assert names_in(tmp_path) == ["out.h5"], "the run directory of a finished run is left for ever"


def stopped_in_the_middle(nursery: Nursery, work: Work, output: Path, shards: int = 4) -> None:
    """Leave a run directory with at least so many finished shards, and no output."""
    patch = SLOW.format(seconds=0.05)
    child = nursery.start(work.fasta, output, flops_per_shard=work.flops_per_shard, patch=patch)
    wait_until(lambda: len(shards_of(output)) >= shards)
    assert child.kill() == -signal.SIGKILL
    assert not output.exists()


def test_damage_to_a_killed_run_is_found(nursery: Nursery, many_shards: Work, tmp_path: Path) -> None:
    """A truncated shard, a missing rename, altered bytes and an empty file, all at once."""
    output = tmp_path / "out.h5"
    stopped_in_the_middle(nursery, many_shards, output, 7)
    folder = tmp_path / "out.h5.run" / "shards"
    cut, altered, unnamed, empty, *whole = sorted(folder.glob("[0-9]*.shard"))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    content = bytearray(altered.read_bytes())
    content[0] ^= 1  # of the first embedding
    altered.write_bytes(content)
    unnamed.rename(folder.parent / "tmp" / f"{unnamed.name}.0123abcd")
    empty.write_bytes(b"")
    before = shards_of(output)
    child = nursery.start(
        many_shards.fasta, output, flops_per_shard=many_shards.flops_per_shard, keep_run=True
    )
    assert child.wait() == 0, child.output()
    assert Result.of(output) == many_shards.expected
    now = shards_of(output)
    assert {name for name in before if before[name] != now[name]} == {cut.name, altered.name, empty.name}
    assert all(now[path.name] == before[path.name] for path in whole)
    assert litter_in(tmp_path) == [], "temporary files of killed processes are left"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"format": 99}'])
def test_a_damaged_plan_is_refused_and_can_be_overwritten(
    nursery: Nursery, few_shards: Work, tmp_path: Path, content: bytes
) -> None:
    output = tmp_path / "out.h5"
    stopped_in_the_middle(nursery, few_shards, output, 1)
    (tmp_path / "out.h5.run" / "plan.json").write_bytes(content)
    child = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
    assert child.wait() == 2, child.output()
    assert "plan.json" in child.output()
    assert "--overwrite" in child.output()
    assert shards_of(output), "what was finished is kept until the user says otherwise"
    child = nursery.start(few_shards.fasta, output, "--overwrite", flops_per_shard=few_shards.flops_per_shard)
    assert child.wait() == 0, child.output()
    assert Result.of(output) == few_shards.expected


def test_an_altered_cut_never_gives_a_wrong_file(nursery: Nursery, few_shards: Work, tmp_path: Path) -> None:
    """A plan whose shards no longer cover the input must not become an output with empty rows."""
    output = tmp_path / "out.h5"
    stopped_in_the_middle(nursery, few_shards, output, 1)
    path = tmp_path / "out.h5.run" / "plan.json"
    plan = json.loads(path.read_text())
    plan["starts"] = plan["starts"][:-1]
    path.write_text(json.dumps(plan))
    child = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
    code = child.wait()
    if output.exists():
        assert Result.of(output) == few_shards.expected
    assert code == 2, child.output()


def test_what_a_killed_command_for_another_input_left_is_never_used(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    """By mistake another input goes to the output of a stopped run, and is killed at any moment."""
    output = tmp_path / "stopped" / "out.h5"
    output.parent.mkdir()
    stopped_in_the_middle(nursery, few_shards, output, 1)
    other = tmp_path / "other.fasta"
    proteins = few_shards.fasta.read_text().replace(">protein", ">other").splitlines()
    proteins[1::2] = [sequence[::-1] for sequence in proteins[1::2]]
    other.write_text("\n".join(proteins) + "\n")
    step = 0
    while step < 60:  # more than there are
        step += 9
        place = tmp_path / str(step) / "out.h5"
        shutil.copytree(output.parent, place.parent)
        patch = DIE_AT_STEP.format(step=step, only="out.h5.run")
        child = nursery.start(other, place, flops_per_shard=few_shards.flops_per_shard, patch=patch)
        code = child.wait()
        assert code in (-signal.SIGKILL, 2), child.output()
        child = nursery.start(few_shards.fasta, place, flops_per_shard=few_shards.flops_per_shard)
        assert child.wait() == 0, f"step {step}: {child.output()}"
        assert Result.of(place) == few_shards.expected, f"step {step}"
        assert names_in(place.parent) == ["out.h5"]
        if code == 2:
            break
    assert step >= 12, "nothing was interrupted"


def test_an_input_replaced_by_one_of_the_same_size_and_time_is_another(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    fasta = tmp_path / "folder" / "in.fasta"
    fasta.parent.mkdir()
    shutil.copy(few_shards.fasta, fasta)
    work = replace(few_shards, fasta=fasta)
    output = tmp_path / "out.h5"
    stopped_in_the_middle(nursery, work, output, 1)
    status = fasta.stat()
    other = "\n".join(
        line if line.startswith(">") else line[::-1] for line in few_shards.fasta.read_text().splitlines()
    )
    fasta.write_text(other + "\n")
    os.utime(fasta, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fasta.stat().st_size == status.st_size
    child = nursery.start(fasta, output, flops_per_shard=work.flops_per_shard)
    assert child.wait() == 2, child.output()
    assert "sha256" in child.output()
    shutil.copy(few_shards.fasta, fasta)
    os.utime(fasta, ns=(status.st_atime_ns, status.st_mtime_ns))
    fasta.chmod(0o600)
    child = nursery.start(fasta, output, flops_per_shard=work.flops_per_shard)
    assert child.wait() == 0, child.output()
    assert Result.of(output) == work.expected


def test_a_partial_output_is_continued_and_replaced(
    nursery: Nursery, few_shards: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.h5"
    stopped_in_the_middle(nursery, few_shards, output, 2)
    saved = shards_of(output)
    assert cli.main(["merge", str(output), "--partial"]) == 4
    assert "proteins are not computed" in capsys.readouterr().out
    assert shards_of(output) == saved, "the run directory is kept"
    with EmbeddingReader(output) as reader:
        assert reader.attributes["complete"] == 0
        missing = reader.column("status") == STATUS_NOT_COMPUTED
        assert 0 < missing.sum() < len(missing)
        assert set(reader.column("status").tolist()) == {STATUS_COMPUTED, STATUS_NOT_COMPUTED}
        assert np.isnan(reader.embeddings()[missing]).all()
        assert np.isfinite(reader.embeddings()[~missing]).all()
        ids = np.array(reader.sequence_ids())
        assert ids.tolist() == few_shards.expected.ids
        assert [problem.sequence_id for problem in reader.problems()] == ids[missing].tolist()
        assert {problem.reason for problem in reader.problems()} == {"not computed yet"}
        found = reader.embeddings()
    assert cli.main(["info", str(output)]) == 0
    assert f"{missing.sum()} not computed" in capsys.readouterr().out
    assert cli.main(["merge", str(output)]) == 4, "there are shards missing still"
    assert cli.main(["merge", str(output), "--partial"]) == 4, "a partial output may be made again"
    capsys.readouterr()
    child = nursery.start(
        few_shards.fasta, output, "--layers", "1", flops_per_shard=few_shards.flops_per_shard
    )
    assert child.wait() == 2, "other options do not replace it"
    child = nursery.start(few_shards.fasta, output, "--keep-run", flops_per_shard=few_shards.flops_per_shard)
    assert child.wait() == 0, child.output()
    assert Result.of(output) == few_shards.expected
    assert saved.items() <= shards_of(output).items()
    with EmbeddingReader(output) as reader:
        assert reader.attributes["complete"] == 1
        assert reader.embeddings()[~missing].tobytes() == found[~missing].tobytes()
    for command in ("merge", "status"):
        assert cli.main([command, str(output)]) == 0
        assert "complete" in capsys.readouterr().out
    assert cli.main(["merge", str(output), "--partial"]) == 0
    assert Result.of(output) == few_shards.expected


def test_an_unfinished_run_of_other_input_is_kept_when_an_older_command_is_repeated(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    output = tmp_path / "out.h5"
    flops = few_shards.flops_per_shard
    assert nursery.start(few_shards.fasta, output, flops_per_shard=flops).wait() == 0
    other = tmp_path / "other.fasta"
    other.write_text(few_shards.fasta.read_text().replace(">protein", ">other"))
    newer = nursery.start(
        other, output, "--overwrite", flops_per_shard=flops, patch=SLOW.format(seconds=0.05)
    )
    wait_until(lambda: len(shards_of(output)) >= 2)
    newer.kill()
    saved = shards_of(output)
    older = nursery.start(few_shards.fasta, output, flops_per_shard=flops)
    assert older.wait() == 0
    assert "already complete" in older.output()
    assert "contains another, unfinished run" in older.output()
    assert shards_of(output) == saved
    newer = nursery.start(other, output, "--overwrite", flops_per_shard=flops, keep_run=True)
    assert newer.wait() == 0, newer.output()
    assert saved.items() <= shards_of(output).items()
    assert Result.of(output).ids == [name.replace("protein", "other") for name in few_shards.expected.ids]


FOREIGN = {"host": "elsewhere.example", "pid": 1, "process_started": "1", "since": "then", "token": "0"}


@pytest.mark.parametrize("content", [json.dumps(FOREIGN), "", '{"host": null}'])
def test_a_fresh_claim_of_somebody_else_is_respected_and_an_old_one_taken_over(
    nursery: Nursery, few_shards: Work, tmp_path: Path, content: str
) -> None:
    output = tmp_path / "out.h5"
    stopped_in_the_middle(nursery, few_shards, output, 1)
    claim = tmp_path / "out.h5.run" / "claim"
    claim.write_text(content)
    os.utime(claim)
    child = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
    assert child.wait() == 2, child.output()
    assert str(claim) in child.output()
    if content == json.dumps(FOREIGN):
        assert "process 1 on elsewhere.example" in child.output()
    old = time.time() - 601
    os.utime(claim, (old, old))
    continue_to_the_end(nursery, few_shards, output)


def test_a_claim_of_this_host_without_a_process_is_taken_over_at_once(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    output = tmp_path / "out.h5"
    stopped_in_the_middle(nursery, few_shards, output, 1)
    mine = FOREIGN | {"host": socket.gethostname(), "process_started": "no such time"}
    for content in (mine, {"host": socket.gethostname()}, mine | {"pid": "?"}):
        (tmp_path / "out.h5.run" / "claim").write_text(json.dumps(content))
        child = nursery.start(
            few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard, keep_run=True
        )
        assert child.wait() in (0, 2), child.output()
        assert "internal error" not in child.output()


@pytest.mark.parametrize("number, seconds", [(signal.SIGTERM, 0.0), (signal.SIGINT, 0.35)])
def test_interrupted(
    nursery: Nursery, many_shards: Work, tmp_path: Path, number: signal.Signals, seconds: float
) -> None:
    output = tmp_path / "out.h5"
    child = nursery.start(
        many_shards.fasta,
        output,
        flops_per_shard=many_shards.flops_per_shard,
        patch=SLOW.format(seconds=0.05),
    )
    wait_until(lambda: len(shards_of(output)) >= 3)
    time.sleep(seconds)
    begin = time.monotonic()
    os.kill(child.pid, number)
    os.kill(child.pid, number)
    assert child.wait() == 4, child.output()
    assert time.monotonic() - begin < 10
    last = child.output().strip().splitlines()[-1]
    assert number.name in last
    assert "rerun the same command to continue" in last
    assert "Traceback" not in child.output()
    saved = f"{len(shards_of(output))} of {many_shards.num_shards} shards are saved"
    assert saved in child.output()
    assert "will be recomputed" in child.output()
    assert not (tmp_path / "out.h5.run" / "claim").exists()
    assert list((tmp_path / "out.h5.run" / "shards").glob(".*")) == []
    before = shards_of(output)
    assert len(before) >= 3
    again = nursery.start(
        many_shards.fasta, output, flops_per_shard=many_shards.flops_per_shard, keep_run=True
    )
    assert again.wait() == 0, again.output()
    assert before.items() <= shards_of(output).items()
    assert Result.of(output) == many_shards.expected


SLOW_MERGE = """
write_rows = writer.EmbeddingWriter.write_rows
def slow_write_rows(self, *rows):
    os.write(2, b"row by row\\n")
    time.sleep(0.2)
    write_rows(self, *rows)
writer.EmbeddingWriter.write_rows = slow_write_rows
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_while_merging(
    nursery: Nursery, few_shards: Work, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out.h5"
    child = nursery.start(
        few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard, patch=SLOW_MERGE
    )
    wait_until(lambda: "row by row" in child.output())
    os.kill(child.pid, number)
    assert child.wait() == 4, child.output()
    assert "rerun the same command to continue" in child.output().splitlines()[-1]
    assert names_in(tmp_path) == ["out.h5.run"]
    assert not (tmp_path / "out.h5.run" / "claim").exists()
    assert len(shards_of(output)) == few_shards.num_shards
    continue_to_the_end(nursery, few_shards, output)


SLOW_DISK = """
original_complete = shard.ShardWriter.complete
def slow_complete(writer, *shard):
    os.write(2, b"writing\\n")
    time.sleep(2.5)
    original_complete(writer, *shard)
shard.ShardWriter.complete = slow_complete
"""


def test_interrupted_again_while_the_last_shard_is_written(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    """Whoever has no patience gets the same exit code, and nothing is harmed."""
    output = tmp_path / "out.h5"
    child = nursery.start(
        few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard, patch=SLOW_DISK
    )
    wait_until(lambda: "writing" in child.output())
    for _ in range(3):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(1.2)
        if not Path(f"/proc/{child.pid}").exists():
            break
    assert child.wait() == 4, child.output()
    assert "Traceback" not in child.output()
    continue_to_the_end(nursery, few_shards, output)


FULL_AFTER = """
import errno
original_pwrite, room = os.pwrite, [{size}]
def pwrite(descriptor, data, position):
    room[0] -= len(data)
    if room[0] < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    return original_pwrite(descriptor, data, position)
os.pwrite = pwrite
"""


@pytest.mark.parametrize("size", [0, 30_000])
def test_space_that_runs_out_and_comes_back(
    nursery: Nursery, many_shards: Work, tmp_path: Path, size: int
) -> None:
    output = tmp_path / "out.h5"
    child = nursery.start(
        many_shards.fasta,
        output,
        flops_per_shard=many_shards.flops_per_shard,
        patch=FULL_AFTER.format(size=size),
    )
    assert child.wait() == 5, child.output()
    assert "out of disk space" in child.output().splitlines()[-1]
    assert not output.exists()
    assert names_in(tmp_path) == ["out.h5.run"]
    assert not (tmp_path / "out.h5.run" / "claim").exists()
    before = shards_of(output)
    assert (len(before) > 0) == (size > 0)
    continue_to_the_end(nursery, many_shards, output)


def test_full_file_system_is_continued_when_there_is_space(
    nursery: Nursery, many_shards: Work, tmp_path: Path
) -> None:
    """Whatever it is that finds the disk full: a claim, the plan, a shard or the merged file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        ballast = disk / "ballast"
        output = disk / "out.h5"
        (disk / "logs").symlink_to(tmp_path)  # so that nothing but the run takes space
        most_finished = 0
        for room in (0, 24, 64, 120, 200, 400, 2000):
            free = shutil.disk_usage(disk).free + (ballast.stat().st_size if ballast.exists() else 0)
            ballast.unlink(missing_ok=True)
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - room * 1024))
            before = shards_of(output)
            child = nursery.start(
                many_shards.fasta,
                output,
                flops_per_shard=many_shards.flops_per_shard,
                patch="session.check_space = lambda *call: None",
            )
            code = child.wait()
            if code == 0:
                break
            assert code == 5, f"{room} KiB: {child.output()}"
            assert "out of disk space" in child.output().splitlines()[-1]
            assert not output.exists()
            assert before.items() <= shards_of(output).items()
            most_finished = max(most_finished, len(shards_of(output)))
        assert most_finished, "nothing was finished before the disk was full"
        assert Result.of(output) == many_shards.expected
        assert names_in(disk) == ["ballast", "out.h5"]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_the_second_of_two_processes_is_refused(nursery: Nursery, many_shards: Work, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    patch = SLOW.format(seconds=0.05)
    first = nursery.start(many_shards.fasta, output, flops_per_shard=many_shards.flops_per_shard, patch=patch)
    wait_until(lambda: shards_of(output))
    second = nursery.start(many_shards.fasta, output, flops_per_shard=many_shards.flops_per_shard)
    assert second.wait() == 2, second.output()
    assert f"process {first.pid} on {socket.gethostname()}" in second.output().splitlines()[-1]
    assert first.wait() == 0, first.output()
    assert Result.of(output) == many_shards.expected
    assert names_in(tmp_path) == ["out.h5"]


def test_of_two_processes_started_together_one_computes(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        output = folder / "out.h5"
        both = [
            nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
            for _ in range(2)
        ]
        codes = sorted(child.wait() for child in both)
        # the later one is refused, or finds the work done
        assert codes in ([0, 0], [0, 2]), "\n".join(child.output() for child in both)
        assert Result.of(output) == few_shards.expected
        assert names_in(folder) == ["out.h5"]


def test_a_process_that_comes_while_another_ends_is_told_so(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    """The run directory may go at any moment; that is never an internal error."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        output = folder / "out.h5"
        first = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
        time.sleep(few_shards.seconds * (0.4 + 0.2 * attempt))
        second = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
        codes = [first.wait(), second.wait()]
        assert codes[0] == 0, first.output()
        assert codes[1] in (0, 2), second.output()
        assert Result.of(output) == few_shards.expected
        assert names_in(folder) == ["out.h5"]


@pytest.mark.parametrize(
    "how",
    [
        "other input",
        pytest.param("other options", marks=pytest.mark.slow),  # 2 s
        "other options, overwriting",
    ],
)
def test_a_second_process_that_differs_does_no_harm(
    nursery: Nursery, many_shards: Work, few_shards: Work, tmp_path: Path, how: str
) -> None:
    output = tmp_path / "out.h5"
    zipped = tmp_path / "in.fasta.gz"  # read from a copy in the run directory
    subprocess.run(["gzip", "-c", many_shards.fasta], stdout=zipped.open("wb"), check=True)
    other = tmp_path / "other.fasta.gz"
    subprocess.run(["gzip", "-c", few_shards.fasta], stdout=other.open("wb"), check=True)
    patch = SLOW.format(seconds=0.05)
    first = nursery.start(zipped, output, flops_per_shard=many_shards.flops_per_shard, patch=patch)
    wait_until(lambda: len(shards_of(output)) >= 3)
    before = shards_of(output)
    options = ["--max-length", "20"] if "options" in how else []
    if "overwriting" in how:
        options.append("--overwrite")
    second = nursery.start(other if how == "other input" else zipped, output, *options, flops_per_shard=1.6e8)
    assert second.wait() == 2, second.output()
    assert before.items() <= shards_of(output).items(), "the first process's work was deleted"
    assert first.wait() == 0, first.output()
    assert Result.of(output) == many_shards.expected


def test_a_mistake_of_a_second_process_does_not_remove_what_the_first_works_in(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    """While the first loads its model there is an index and no plan yet."""
    output = tmp_path / "out.h5"
    patch = """
load = session.load_checkpoint
def slow_load(*call, **options):
    os.write(2, b"loading\\n")
    time.sleep(1.5)
    return load(*call, **options)
session.load_checkpoint = slow_load
"""
    first = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard, patch=patch)
    wait_until(lambda: "loading" in first.output())
    second = nursery.start(few_shards.fasta, output, "--layers", "99")
    assert second.wait() == 2, second.output()
    assert first.wait() == 0, first.output()
    assert Result.of(output) == few_shards.expected


def test_a_shard_of_copies_only_is_finished(nursery: Nursery, tmp_path: Path) -> None:
    """As when two releases of a database are given: the second half is nothing but copies."""
    fasta = tmp_path / "in.fasta"
    sequences = ["MKTLLAGVSE", "MKVLAWW", "MMMRPQ"]
    fasta.write_text("".join(f">{n}\n{sequences[n % 3]}\n" for n in range(9)))
    output = tmp_path / "out.h5"
    child = nursery.start(fasta, output, flops_per_shard=1.0)
    assert child.wait() == 0, child.output()
    with EmbeddingReader(output) as reader:
        rows = reader.embeddings()
    assert rows[:3].tobytes() == rows[3:6].tobytes() == rows[6:].tobytes()
