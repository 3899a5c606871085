"""Files made whole or not at all, in an order that survives a loss of power; and only regular ones read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esm_packed.files import is_out_of_space, open_regular, read_regular, whole_or_nothing
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.state.plan import Plan

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_a_file_is_made_whole_or_not_at_all(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "out.h5"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_or_nothing(path, scratch) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with whole_or_nothing(path, scratch) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == scratch
    assert path.read_text() == "new"
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_came_to_exist_is_kept(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "out.h5"
    with whole_or_nothing(path, scratch, overwrite=False) as temporary:
        temporary.write_text("mine")
    assert path.read_text() == "mine"
    with (
        pytest.raises(FileExistsError, match="another run has made this file meanwhile"),
        whole_or_nothing(path, scratch, overwrite=False) as temporary,
    ):
        temporary.write_text("later")
    assert path.read_text() == "mine"
    assert list(scratch.iterdir()) == []


def test_a_failure_while_flushing_leaves_nothing(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match="quota"),
        whole_or_nothing(tmp_path / "out.h5", scratch) as temporary,
    ):
        temporary.write_text("all")
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


def steps_on_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(operation, name) of what is flushed, and of what gets its name, as it happens."""
    steps: list[tuple[str, str]] = []

    def noting(operation: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def note(first: Any, *others: Any, **options: Any) -> Any:
            path = Path(f"/proc/self/fd/{first}").readlink() if operation == "fsync" else Path(others[0])
            steps.append(("flush" if operation == "fsync" else "name", path.name))
            return original(first, *others, **options)

        return note

    for operation in ("fsync", "replace", "rename", "link"):
        monkeypatch.setattr(os, operation, noting(operation, getattr(os, operation)))
    return steps


@needs_proc
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_flushed_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """After a loss of power a name without its content would pass for a finished file."""
    steps = steps_on_disk(monkeypatch)
    with whole_or_nothing(tmp_path / "out.h5", scratch, overwrite=overwrite) as temporary:
        temporary.write_text("all")
    assert steps == [("flush", temporary.name), ("name", "out.h5"), ("flush", tmp_path.name)]


@needs_proc
def test_what_vouches_for_an_index_gets_its_name_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = tmp_path / "in.fa"
    fasta.write_text(">a\nMKV\n>b\nMKV\n")
    steps = steps_on_disk(monkeypatch)
    build_index([str(fasta)], tmp_path / "index", ReadOptions())
    *data, metadata, name, folder = steps
    names = ("first_same.bin", "names.bin", "records.bin", "tokens.bin")
    assert sorted(data) == [("flush", name) for name in names]
    assert (metadata[0], metadata[1].startswith("index.json.")) == ("flush", True)
    assert (name, folder) == (("name", "index.json"), ("flush", "index"))


@needs_proc
def test_a_plan_is_flushed_before_it_gets_its_name(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_on_disk(monkeypatch)
    Plan({}, (), (0, 1)).write(tmp_path / "plan.json", scratch)
    assert [operation for operation, _ in steps] == ["flush", "name", "flush"]
    assert steps[1] == ("name", "plan.json")


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "device"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "path"
    target = tmp_path / "target"
    target.write_text("secret")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": target, "dangling": tmp_path / "nothing", "device": Path("/dev/zero")}[kind])
    for read in (open_regular, read_regular):
        with pytest.raises(OSError):
            read(path)
    assert read_regular(target) == b"secret"


@pytest.mark.parametrize(
    "number, expected",
    [
        (errno.ENOSPC, True),
        (errno.EDQUOT, True),
        (errno.EFBIG, True),
        (errno.EIO, False),
        (errno.EACCES, False),
    ],
)
def test_what_means_out_of_space(number: int, expected: bool) -> None:
    error = OSError(number, os.strerror(number))
    wrapped = RuntimeError("a worker failed")
    wrapped.__cause__ = error
    assert is_out_of_space(error) == is_out_of_space(wrapped) == expected
    assert not is_out_of_space(None)
