"""Claims: one holder at a time, taken over from the dead, whatever the file holds."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esm_packed.errors import UsageError
from esm_packed.runners.state import claims
from esm_packed.runners.state.claims import STALE_SECONDS, Claim, ClaimedError
from esm_packed.runners.state.directory import MARKER, RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "out.h5")
    directory.make()
    return directory


EMPTY = [MARKER, "index", "logs", "shards", "slices", "tmp"]
"""What a directory holds in which nothing has been done yet."""


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_claim(path: Path, silent: float = 0.0, **changes: object) -> None:
    """Another process's claim, refreshed `silent` seconds ago; by default of a host that nobody can ask."""
    holder = {"host": "elsewhere", "pid": 1, "process_started": "1", "since": "then", "token": "0"}
    path.write_text(json.dumps(holder | changes))
    os.utime(path, (time.time() - silent,) * 2)


def write_claim_of_this_host(claim: Claim, **changes: object) -> None:
    """A claim as a process of this host writes it, with `changes`."""
    with claim:
        holder = json.loads(claim.path.read_text())
    write_claim(claim.path, **{**holder, "token": "0", **changes})


def pid_of_the_dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_held_until_it_is_released(directory: RunDirectory) -> None:
    first, second = directory.claim(), directory.claim()
    first.acquire()
    with pytest.raises(ClaimedError, match=rf"process {os.getpid()} on {socket.gethostname()}, since 2"):
        second.acquire()
    first.release()
    with second:
        assert names_in(directory.path) == [*EMPTY[:1], "claim", *EMPTY[1:]]
    assert names_in(directory.path) == EMPTY
    assert names_in(directory.scratch_path) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_draft_that_is_swept_away_leaves_no_claim(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Another process cleans up just before this one's draft becomes the claim."""
    link = os.link

    def sweep_and_link(source: Path, target: Path) -> None:
        source.unlink()
        if not has_links:
            raise PermissionError(1, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", sweep_and_link)
    claim = directory.claim()
    with pytest.raises(ClaimedError, match="swept"):
        claim.acquire()
    assert not claim.path.exists()


@pytest.mark.parametrize(
    "holder, environment, is_free",
    [
        ({"job": "17", "restarts": 0}, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, True),
        ({"job": "17", "restarts": 1}, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, False),
        ({"job": "16", "restarts": 0}, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, False),
        ({"job": "17", "restarts": 0}, {}, False),
    ],
)
def test_a_requeued_job_takes_its_own_claim_over(
    directory: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    holder: dict[str, Any],
    environment: dict[str, str],
    is_free: bool,
) -> None:
    """Slurm starts it on another node, which cannot see that the process there is gone."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    claim = directory.claim()
    write_claim(claim.path, **holder)
    if is_free:
        with claim:
            assert json.loads(claim.path.read_text())["restarts"] == 1
    else:
        with pytest.raises(ClaimedError):
            claim.acquire()


def test_a_claim_names_its_holder(directory: RunDirectory) -> None:
    with directory.claim() as claim:
        holder = json.loads(claim.path.read_text())
    assert holder["pid"] == os.getpid()
    assert holder["host"] == socket.gethostname()
    assert {"process_started", "since", "token"} <= holder.keys()


def test_a_released_claim_of_somebody_else_is_left(directory: RunDirectory) -> None:
    """A process that was stopped for long finds its claim taken over, and must not give that one back."""
    claim = directory.claim()
    claim.acquire()
    write_claim(claim.path)
    claim.release()
    assert claim.path.exists()


def test_a_claim_of_a_dead_process_of_this_host_is_taken_over_at_once(directory: RunDirectory) -> None:
    claim = directory.claim()
    write_claim_of_this_host(claim, pid=pid_of_the_dead())
    with claim:
        assert json.loads(claim.path.read_text())["pid"] == os.getpid()


def test_a_number_that_now_is_another_process_does_not_hold(directory: RunDirectory) -> None:
    claim = directory.claim()
    write_claim_of_this_host(claim, process_started="12")
    with claim:
        pass


@pytest.mark.parametrize("name", ["host", "boot", "pid_namespace"])
def test_a_process_that_this_one_cannot_see_is_not_taken_for_dead(directory: RunDirectory, name: str) -> None:
    """Containers may share a host's name, and not its processes."""
    claim = directory.claim()
    write_claim_of_this_host(claim, pid=pid_of_the_dead(), **{name: "another"})
    with pytest.raises(ClaimedError):
        claim.acquire()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"3", b'"text"', b"{}", b'{"host": []}']
)
def test_a_claim_that_says_nothing_holds_until_it_is_old(directory: RunDirectory, content: bytes) -> None:
    claim = directory.claim()
    claim.path.write_bytes(content)
    with pytest.raises(ClaimedError):
        claim.acquire()
    old = time.time() - STALE_SECONDS - 1
    os.utime(claim.path, (old, old))
    with claim:
        pass


@pytest.mark.parametrize(
    "changes", [{"pid": None}, {"pid": "?"}, {"pid": -1}, {"pid": 10**30}, {"process_started": None}]
)
def test_a_claim_of_this_host_with_an_odd_holder_is_never_an_internal_error(
    directory: RunDirectory, changes: dict[str, object]
) -> None:
    claim = directory.claim()
    write_claim_of_this_host(claim, **changes)
    try:
        claim.acquire()
    except ClaimedError:
        return
    claim.release()


def test_a_claim_of_another_host_holds_while_it_is_refreshed(directory: RunDirectory) -> None:
    claim = directory.claim()
    write_claim(claim.path, silent=STALE_SECONDS - 30)
    with pytest.raises(ClaimedError, match="process 1 on elsewhere, since then"):
        claim.acquire()
    write_claim(claim.path, silent=STALE_SECONDS + 1)
    with claim:
        pass
    assert names_in(directory.path) == EMPTY
    assert names_in(directory.scratch_path) == []


def test_a_claim_from_the_future_says_nothing(directory: RunDirectory) -> None:
    claim = directory.claim()
    write_claim(claim.path, silent=-STALE_SECONDS - 1)
    with claim:
        pass


@pytest.mark.parametrize("kind", ["dangling", "fifo", "folder"])
def test_a_claim_that_is_no_file_is_an_error_at_once(directory: RunDirectory, kind: str) -> None:
    claim = directory.claim()
    if kind == "dangling":
        claim.path.symlink_to("/nonexistent/z")
    elif kind == "fifo":
        os.mkfifo(claim.path)
    else:
        claim.path.mkdir()
    with pytest.raises(OSError, match="regular file"):
        claim.acquire()


@pytest.mark.parametrize("error", [KeyboardInterrupt("SIGTERM"), RuntimeError("can't start new thread")])
@pytest.mark.parametrize("has_started", [False, True])
def test_what_stops_the_thread_from_starting_leaves_no_claim(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: BaseException, has_started: bool
) -> None:
    start = threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if has_started:
            start(thread)
        raise error

    claim = directory.claim()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        with pytest.raises(type(error), match=str(error)):
            claim.acquire()
    assert not claim.path.exists()
    assert names_in(directory.scratch_path) == []
    with claim:
        assert claim.is_held()


def test_a_claim_is_refreshed(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    with directory.claim() as claim:
        os.utime(claim.path, (1.0, 1.0))
        deadline = time.monotonic() + 10
        while claim.path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_no_thread_outlives_a_claim(directory: RunDirectory) -> None:
    before = threading.active_count()
    for _ in range(5):
        with directory.claim():
            assert threading.active_count() == before + 1
    assert threading.active_count() == before


def race(count: int, act: Callable[[int], None]) -> None:
    """Let `count` threads act at the same moment; an error in one is raised here."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            act(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
@pytest.mark.parametrize("count", [2, 8])
def test_of_many_that_race_for_a_claim_one_gets_it(directory: RunDirectory, stale: bool, count: int) -> None:
    for attempt in range(40):
        path = directory.path / f"{attempt:05}.claim"
        if stale:
            write_claim(path, silent=STALE_SECONDS + 1)
        claims = [Claim(path) for _ in range(count)]
        got: list[int] = []

        def act(number: int, claims: list[Claim] = claims, got: list[int] = got) -> None:
            try:
                claims[number].acquire()
            except ClaimedError:
                return
            got.append(number)

        race(count, act)
        assert len(got) == 1, f"attempt {attempt}: {len(got)} hold the claim"
        claims[got[0]].release()
    assert names_in(directory.path) == EMPTY


def test_who_dies_while_taking_over_is_taken_over_from(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three in a row die just before they replace the claim; the next one need not wait for ten minutes."""
    claim = directory.claim()
    write_claim(claim.path, silent=STALE_SECONDS + 1)
    replace = Path.replace

    def die(path: Path, target: Path) -> None:
        raise SystemExit

    for number in range(3):
        dead = directory.claim()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", die)
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
            patch.setattr(os, "getpid", pid_of_the_dead)
            patch.setattr(claims, "_process_start", lambda pid, started=str(number): started)
            with pytest.raises(SystemExit):
                dead.acquire()
        assert replace is Path.replace
    assert len([name for name in names_in(directory.scratch_path) if "after" in name]) == 3
    with claim:
        assert [name for name in names_in(directory.scratch_path) if "after" in name] == []


def test_who_saw_a_stale_claim_long_ago_takes_nothing(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sees a stale claim; before A acts B takes it over, and C asks, too."""
    path = directory.claim().path
    write_claim(path, silent=STALE_SECONDS + 1)
    a, b, c = (Claim(path) for _ in range(3))
    link = os.link
    holders: list[str] = []

    def slow_link(source: Path, target: Path) -> None:
        if ".after-" in str(target) and not holders:
            holders.append("b")  # from here on linking is undisturbed
            b.acquire()
            with pytest.raises(ClaimedError):
                c.acquire()
        link(source, target)

    monkeypatch.setattr(os, "link", slow_link)
    try:
        a.acquire()
        holders.append("a")
    except ClaimedError:
        pass
    for claim in (a, b, c):
        claim.release()
    assert holders == ["b"], f"{holders} all hold one claim"


def test_slices_are_numbered_with_ascii_digits(directory: RunDirectory) -> None:
    for name in ("٣-of-٨.claim", "9999999-of-99999999.claim", "-1-of-8.claim", "3-of-.claim"):
        write_claim(directory.path / "slices" / name)
    assert directory.live_slices() == {}
    write_claim(directory.path / "slices" / "3-of-8.claim")
    assert [str(part) for part in directory.live_slices()] == ["3/8"]


def test_finished_shards_are_those_of_the_plan(directory: RunDirectory) -> None:
    for name in ("00000.shard", "00002.shard", "00009.shard", ".00001.shard.abcd.tmp"):
        (directory.path / "shards" / name).touch()
    assert directory.finished(3) == [0, 2]
    directory.forget_shards()
    assert directory.finished(3) == []


def test_more_shards_than_five_digits(directory: RunDirectory) -> None:
    directory.shard_path(123_456).touch()
    assert directory.finished(123_457) == [123_456]


def test_removing_leaves_nothing(directory: RunDirectory) -> None:
    directory.remove()
    directory.remove()
    assert names_in(directory.output.parent) == []


def test_what_cannot_be_deleted_stays_ours_until_it_can(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems, which keep files that a process has open."""
    (directory.logs_path / "worker-0.log").touch()
    rmtree = shutil.rmtree

    def keep_logs(path: Path, **options: object) -> None:
        if Path(path).name != "logs":
            rmtree(path, ignore_errors=True)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", keep_logs)
        directory.remove()
        assert names_in(directory.output.parent) == [".out.h5.run.old"]
        assert names_in(directory.output.parent / ".out.h5.run.old") == [MARKER, "logs"]
        directory.make()
        directory.sweep()
        directory.remove()  # a second one cannot be put there
        assert names_in(directory.output.parent) == [".out.h5.run.old", "out.h5.run"]
    directory.make()
    directory.remove()
    assert names_in(directory.output.parent) == []


def test_a_log_that_has_another_name_elsewhere_is_refused(directory: RunDirectory) -> None:
    mine = directory.output.with_name("thesis.txt")
    mine.write_text("mine")
    (directory.logs_path / "worker-0.log").hardlink_to(mine)
    with pytest.raises(UsageError, match="another hard link"):
        directory.exists()
