"""Run directories that were damaged, tampered with or made by somebody else, met by the command line.

Nothing here knows what a run directory holds: whatever is found there is damaged in turn.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from nursery import SLOW, Child, Nursery, Result, Work, names_in, wait_until

from esm_packed.runners.cli import main as cli

# Stops itself, as a debugger or a suspended laptop would stop it, before a pack is computed.
STOP_ITSELF = """
original_embed, calls = ESM2.embed_packed, []
def stopping_embed(self, batch, names, *rest):
    calls.append(batch)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGSTOP)
    return original_embed(self, batch, names, *rest)
ESM2.embed_packed = stopping_embed
"""

SECRET = "a file of the user's\n"


@pytest.fixture(scope="module")
def stopped(nursery: Nursery, few_shards: Work, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was killed when some of it was done."""
    folder = tmp_path_factory.mktemp("stopped")
    output = folder / "out.h5"
    child = nursery.start(
        few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard, patch=SLOW.format(seconds=0.2)
    )
    wait_until(lambda: len(files_in(folder / "out.h5.run", "shard")) >= 2)
    assert child.kill() == -signal.SIGKILL
    assert not output.exists()
    return folder


def start_and_stop(nursery: Nursery, few_shards: Work, output: Path, call: int) -> Child:
    """A process that has stopped itself before the pack of this number, counted from 1."""
    child = nursery.start(
        few_shards.fasta,
        output,
        flops_per_shard=few_shards.flops_per_shard,
        patch=STOP_ITSELF.format(call=call),
    )
    state = Path(f"/proc/{child.pid}/stat")
    wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    return child


def files_in(folder: Path, kind: str = "") -> list[Path]:
    """Files below `folder` whose path contains `kind`, relative to it."""
    if not folder.exists():
        return []
    return sorted(
        path.relative_to(folder) for path in folder.rglob("*") if kind in str(path) and path.is_file()
    )


def copy_of(stopped: Path, folder: Path) -> Path:
    """The stopped run in a folder of its own, with a file of the user's; the run directory."""
    shutil.copytree(stopped / "out.h5.run", folder / "out.h5.run")
    (folder / "docs").mkdir()
    (folder / "docs" / "thesis.txt").write_text(SECRET)
    return folder / "out.h5.run"


def start_again(
    nursery: Nursery, few_shards: Work, folder: Path, *options: str, patch: str = ""
) -> tuple[int, str]:
    """Exit code and output of the command that began the run."""
    child = nursery.start(
        few_shards.fasta, folder / "out.h5", *options, flops_per_shard=few_shards.flops_per_shard, patch=patch
    )
    return child.wait(60), child.output()


def check_kept(folder: Path) -> None:
    assert (folder / "docs" / "thesis.txt").read_text() == SECRET
    assert [path.name for path in (folder / "docs").iterdir()] == ["thesis.txt"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in random.Random(path.name).sample(range(len(content)), min(len(content), 3)):
        content[place] ^= 1 << place % 8
    path.write_bytes(content)


def swap(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])


def nest(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[len(path.parts) - path.parts.index("out.h5.run") - 1] / "docs/thesis.txt")


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nonexistent/z")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def delete(path: Path) -> None:
    path.unlink()


DAMAGES = [truncate, empty, zero, flip, swap, nest, link, dangle, pipe, folder, delete]


def hurt(
    nursery: Nursery, few_shards: Work, stopped: Path, place: Path, name: Path, damage: Callable[[Path], None]
) -> None:
    """Damage one file of a stopped run: the command completes it, or refuses and loses nothing."""
    place.mkdir()
    directory = copy_of(stopped, place)
    damage(directory / name)
    for command in (["status", str(place / "out.h5")], ["merge", str(place / "out.h5")]):
        assert cli.main(command) in (0, 2, 4), f"{damage.__name__} {name}: {command}"
    code, said = start_again(nursery, few_shards, place)
    where = f"{damage.__name__} {name}: exit {code}: {said}"
    assert code in (0, 2), where
    assert "internal error" not in said, where
    assert "Traceback" not in said, where
    check_kept(place)
    if code == 2:
        assert not (place / "out.h5").exists(), where
        assert "out.h5.run" in said, where
        assert len(files_in(directory)) >= len(files_in(stopped / "out.h5.run")) - 2, where
    else:
        assert Result.of(place / "out.h5") == few_shards.expected, where
        assert names_in(place) == ["docs", "out.h5"], where


def test_each_file_of_a_run_damaged_in_some_way(
    nursery: Nursery, few_shards: Work, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = files_in(stopped / "out.h5.run")
    assert len(names) >= 6
    damages = random.Random(1).sample(DAMAGES, len(DAMAGES))
    for number in range(max(len(names), len(DAMAGES))):
        name, damage = names[number % len(names)], damages[number % len(DAMAGES)]
        hurt(nursery, few_shards, stopped, tmp_path / f"{number}-{damage.__name__}", name, damage)
    assert "internal error" not in capsys.readouterr().err


@pytest.mark.slow  # 60 s
def test_each_file_of_a_run_damaged_in_every_way(
    nursery: Nursery, few_shards: Work, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(files_in(stopped / "out.h5.run")):
        for damage in DAMAGES:
            hurt(nursery, few_shards, stopped, tmp_path / f"{number}-{damage.__name__}", name, damage)
    assert "internal error" not in capsys.readouterr().err


def test_folders_of_a_run_that_lead_elsewhere_are_refused(
    nursery: Nursery, few_shards: Work, stopped: Path, tmp_path: Path
) -> None:
    inner = [path for path in (stopped / "out.h5.run").rglob("*") if path.is_dir()]
    for number, path in enumerate([stopped / "out.h5.run", *inner]):
        place = tmp_path / str(number)
        place.mkdir()
        replaced = copy_of(stopped, place) / path.relative_to(stopped / "out.h5.run")
        shutil.rmtree(replaced)
        replaced.symlink_to(place / "docs")
        for options in ([], ["--overwrite"]):
            code, said = start_again(nursery, few_shards, place, *options)
            assert code == 2, said
            assert str(replaced) in said
            check_kept(place)


def test_folders_of_a_run_that_are_missing_or_files(
    nursery: Nursery, few_shards: Work, stopped: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(path for path in (stopped / "out.h5.run").rglob("*") if path.is_dir()):
        for is_file in (False, True):
            place = tmp_path / f"{number}-{is_file}"
            place.mkdir()
            replaced = copy_of(stopped, place) / path.relative_to(stopped / "out.h5.run")
            shutil.rmtree(replaced)
            if is_file:
                replaced.write_text("x")
            code, said = start_again(nursery, few_shards, place)
            if is_file:
                assert code == 2, said
                assert str(replaced) in said
            else:
                assert code == 0, said
                assert Result.of(place / "out.h5") == few_shards.expected


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "fifo", "link", "dangling", "socket"])
def test_what_has_the_name_of_a_run_directory_and_is_none_is_left_alone(
    nursery: Nursery, few_shards: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "out.h5.run"
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "thesis.txt").write_text(SECRET)
    if kind == "folder":
        docs.rename(path)
        (path / "shards").mkdir()
        (path / "shards" / "00000.shard").write_text(SECRET)
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text(SECRET)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to(docs if kind == "link" else "/nonexistent/z")
    before = sorted((str(found), found.lstat().st_ino) for found in tmp_path.rglob("*"))
    for fasta, options in ((few_shards.fasta, ["--overwrite"]), (tmp_path / "typo.fa", [])):
        child = nursery.start(fasta, tmp_path / "out.h5", *options)
        assert child.wait() == 2, child.output()
        assert str(path) in child.output()
    shutil.rmtree(tmp_path / "logs")
    for command in ("status", "merge"):
        assert cli.main([command, str(tmp_path / "out.h5")]) == 2
        assert str(path) in capsys.readouterr().err
    assert sorted((str(found), found.lstat().st_ino) for found in tmp_path.rglob("*")) == before


def test_the_output_may_lie_behind_links(nursery: Nursery, few_shards: Work, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    child = nursery.start(
        few_shards.fasta, tmp_path / "link" / "out.h5", flops_per_shard=few_shards.flops_per_shard
    )
    assert child.wait() == 0, child.output()
    assert Result.of(tmp_path / "real" / "out.h5") == few_shards.expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
@pytest.mark.parametrize("mode, code", [(0o755, 0), (0o775, 2), (0o1777, 2)])
def test_a_run_of_another_user_is_continued_only_where_nobody_else_may_write(
    nursery: Nursery, few_shards: Work, stopped: Path, tmp_path: Path, mode: int, code: int
) -> None:
    directory = copy_of(stopped, tmp_path)
    os.chown(directory, 12345, 12345)
    tmp_path.chmod(mode)
    ended, said = start_again(nursery, few_shards, tmp_path)
    assert ended == code, said
    if code:
        assert "belongs to another user" in said
    else:
        assert Result.of(tmp_path / "out.h5") == few_shards.expected


def test_files_of_the_user_and_of_other_runs_beside_the_output_stay(
    nursery: Nursery, few_shards: Work, stopped: Path, tmp_path: Path
) -> None:
    """Also those that look like somebody's temporary files."""
    (tmp_path / "logs").mkdir()  # the nursery's
    kept = {}
    for name in (
        ".out.h5.notes.tmp",
        "..out.h5.claim.x.tmp",
        ".out.h5.run.notes",
        ".out.h5.h5.0a1b.tmp",
        "x.tmp",
    ):
        (tmp_path / name).write_text(SECRET)
        kept[name] = (tmp_path / name).stat().st_ino
    shutil.copytree(stopped / "out.h5.run", tmp_path / "out.h5.h5.run")
    (tmp_path / ".out.h5.run.old").mkdir()
    (tmp_path / ".out.h5.run.old" / "thesis.txt").write_text(SECRET)
    before = files_in(tmp_path / "out.h5.h5.run")
    code, said = start_again(nursery, few_shards, tmp_path)
    # the folder is in the way of removing the run directory, and is the user's
    assert code == 2, said
    assert str(tmp_path / ".out.h5.run.old") in said
    assert (tmp_path / ".out.h5.run.old" / "thesis.txt").read_text() == SECRET
    shutil.rmtree(tmp_path / ".out.h5.run.old")
    code, said = start_again(nursery, few_shards, tmp_path)
    assert code == 0, said
    assert {name: (tmp_path / name).stat().st_ino for name in kept} == kept
    assert all((tmp_path / name).read_text() == SECRET for name in kept)
    assert files_in(tmp_path / "out.h5.h5.run") == before


def test_a_run_under_a_name_that_another_name_begins_with(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    """Neither disturbs the other."""
    slow = nursery.start(
        few_shards.fasta,
        tmp_path / "emb.h5",
        flops_per_shard=few_shards.flops_per_shard,
        patch=SLOW.format(seconds=0.1),
    )
    while not (tmp_path / "emb.h5").exists():
        child = nursery.start(few_shards.fasta, tmp_path / "emb", flops_per_shard=few_shards.flops_per_shard)
        assert child.wait() == 0, child.output()
        (tmp_path / "emb").unlink()
        if not Path(f"/proc/{slow.pid}").exists():
            break
    assert slow.wait() == 0, slow.output()
    assert Result.of(tmp_path / "emb.h5") == few_shards.expected


@pytest.mark.parametrize("length", [246, 247, 256])
def test_long_names_of_the_output(nursery: Nursery, few_shards: Work, tmp_path: Path, length: int) -> None:
    output = tmp_path / ("é" * 50 + "x" * (length - 103) + ".h5")
    child = nursery.start(few_shards.fasta, output, flops_per_shard=few_shards.flops_per_shard)
    code = child.wait()
    if length <= 246:
        assert code == 0, child.output()
        assert Result.of(output) == few_shards.expected
    else:
        assert code == 2, child.output()
        assert "too long" in child.output()
    assert [name for name in names_in(tmp_path) if name != output.name] == []


HARMS = [delete, empty, truncate]


def harm_each_path(
    nursery: Nursery, work: Work, folder: Path, harms: Sequence[Callable[[Path], None]]
) -> None:
    """Each folder and each file of a run at work in turn; then the same command puts all right."""
    faults = []
    count = 0
    number = 0
    while number <= count:
        place = folder / str(number)
        place.mkdir()
        child = start_and_stop(nursery, work, place / "out.h5", call=3)
        directory = place / "out.h5.run"
        paths = sorted(directory.rglob("*"))
        count = len(paths) - 1
        path = paths[min(number, count)]
        if path.is_dir():
            shutil.rmtree(path)
        else:
            harms[number % len(harms)](path)
        os.kill(child.pid, signal.SIGCONT)
        code = child.wait()
        where = f"{path.relative_to(directory)}: exit {code}: {child.output()}"
        number += 1
        if code not in (0, 2) or "internal error" in child.output():
            faults.append(where)
        elif code == 0:
            if Result.of(place / "out.h5") != work.expected:
                faults.append(f"another result: {where}")
        else:
            code, said = start_again(nursery, work, place)
            if code == 2 and "not created by esm-packed" in said:
                continue  # without its marker it is nobody's
            if code == 2 and "by process ? on ?" in said:
                (directory / said.partition(f"delete {directory}/")[2].split()[0]).unlink()
                code, said = start_again(nursery, work, place)
            if code == 2 and "--overwrite" in said:
                code, said = start_again(nursery, work, place, "--overwrite")
            if code or Result.of(place / "out.h5") != work.expected:
                faults.append(f"{where}; then {code}: {said}")
    assert not faults, "\n".join(faults)


def test_harm_to_a_run_while_it_is_worked_in(nursery: Nursery, few_shards: Work, tmp_path: Path) -> None:
    harm_each_path(nursery, few_shards, tmp_path, HARMS)


@pytest.mark.slow  # 10 s each
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_each_harm_to_a_run_while_it_is_worked_in(
    nursery: Nursery, few_shards: Work, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    harm_each_path(nursery, few_shards, tmp_path, [harm])


def test_a_process_that_stood_still_while_another_took_over(
    nursery: Nursery, few_shards: Work, tmp_path: Path
) -> None:
    """Its claim is old by then; it ends with a message and harms nothing."""
    output = tmp_path / "out.h5"
    for call in (1, 3):
        child = start_and_stop(nursery, few_shards, output, call)
        old = time.time() - 601
        for path in (tmp_path / "out.h5.run").rglob("*"):
            if path.is_file():
                os.utime(path, (old, old))
        # a stopped process of this host is seen to live, and only its silence speaks against it
        code, said = start_again(nursery, few_shards, tmp_path)
        assert code == 0, said
        os.kill(child.pid, signal.SIGCONT)
        assert child.wait() == 2, child.output()
        assert "internal error" not in child.output()
        assert Result.of(output) == few_shards.expected
        assert names_in(tmp_path) == ["out.h5"]
        output.unlink()
