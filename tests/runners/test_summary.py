"""What a run says about itself: sizes before it, the bar, the summary, and `info` and `status` later."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import pytest
from nursery import Nursery, wait_until

from esm_packed.model import ESM2
from esm_packed.runners.cli import main as cli
from esm_packed.runners.compute.pipeline import PACKS_AHEAD
from esm_packed.runners.state.cut import FLOPS_PER_SHARD
from esm_packed.runners.watch import watch
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.metrics import RESULTS_AHEAD, Snapshot, StageTimes
from esm_packed.runners.watch.watch import WorkerState

FASTA = ">a first\nMKTLLAGVSE\n>b second\nMKVLA\n>c\nMMMRPQ\n"


pytestmark = pytest.mark.usefixtures("without_computing")


def embed(fasta: Path, *options: str, output: str = "out.h5") -> int:
    arguments = ["embed", str(fasta), "-o", str(fasta.with_name(output)), "--model", "demo"]
    return cli.main([*arguments, "--device", "cpu", "--threads", "1", *options])


@pytest.mark.parametrize(
    ("count", "id_bytes", "description", "options"),
    [
        (3, 1, "", []),
        (3000, 20, "", ["--store-dtype", "fp16"]),
        (3000, 8, " and what it does" * 30, []),
        (3000, 300, "", []),
        (3000, 2400, "", []),
        (3000, 8, " and what it does" * 30, ["--full-header"]),
        (3000, 8, "", ["--layers", "1,2,3"]),
        (3000, 8, "", ["--fp32-compare", "3000"]),
        (3000, 200, "", ["--duplicates", "first"]),
        (40_000, 12, "", ["--store-dtype", "fp16"]),
    ],
)
def test_the_sizes_said_before_a_run_are_those_of_its_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    count: int,
    id_bytes: int,
    description: str,
    options: list[str],
) -> None:
    repeats = 5 if "--duplicates" in options else 1
    residues = "".maketrans("0123456789", "ACDEFGHIKL")
    path = tmp_path / "in.fasta"
    path.write_text(
        "".join(
            f">{str(number // repeats).ljust(id_bytes, 'x')}{description}\n"
            f"M{str(number).translate(residues)}\n"
            for number in range(count)
        )
    )
    assert embed(path, "--keep-run", *options) == 0
    sizes = re.search(r"takes about ([0-9.]+ .B), the run up to ([0-9.]+ .B)", capsys.readouterr().err)
    assert sizes is not None
    said, needed = (float(size[:-3]) * {"kB": 1e3, "MB": 1e6}[size[-2:]] for size in sizes.groups())
    size = (tmp_path / "out.h5").stat().st_size
    assert abs(said - size) <= 0.2 * size + 64_000
    size += sum(shard.stat().st_size for shard in (tmp_path / "out.h5.run" / "shards").iterdir())
    assert abs(needed - size) <= 0.2 * size + 64_000


@pytest.mark.parametrize(
    "suffix",
    [
        *(".csv", ".TSV", ".npy", ".npz", ".pt", ".parquet", ".fasta", ".fa", ".faa.gz", ".json", ".txt"),
        *(".pkl", ".csv.gz", ".h5.gz", ".safetensors", ".bin"),
    ],
)
def test_a_name_that_promises_another_format_is_refused(
    fasta: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    assert embed(fasta, output=f"out{suffix}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"esm-packed: error: {fasta.with_name('out')}{suffix}: ")
    assert error.endswith(f"-o {fasta.with_name('out.h5')}\n")
    assert [path.name for path in fasta.parent.iterdir()] == ["in.fasta"]


@pytest.mark.parametrize("name", ["out.hdf5", "out", "out.v2", "out.csv.h5"])
def test_other_names_are_accepted(fasta: Path, name: str) -> None:
    assert embed(fasta, output=name) == 0
    assert fasta.with_name(name).exists()


@pytest.mark.parametrize(
    ("packs_waiting", "results_waiting", "stage"),
    [
        (0, 0, "reading"),
        (0, RESULTS_AHEAD, "writing"),
        (1, 0, "computing"),
        (PACKS_AHEAD, RESULTS_AHEAD - 1, "computing"),
        (PACKS_AHEAD, RESULTS_AHEAD, "writing"),
    ],
)
def test_a_bar_shows_the_stage_that_the_others_wait_for(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    packs_waiting: int,
    results_waiting: int,
    stage: str,
) -> None:
    monkeypatch.setattr(watch, "DISPLAY_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    snapshot = Snapshot(StageTimes(), 0, packs_waiting, results_waiting, None, None)
    idle = Snapshot(StageTimes(), None, 1, 0, None, None)
    busy = [WorkerState(rank, "cpu", snapshot) for rank in range(2)]
    for states in (busy[:1], [*busy, WorkerState(2, "cpu", idle)]):
        with watch.watching(Console(), len(states), None, 100) as watched:
            watched.update(10, partial(list, states))
        shown = capsys.readouterr().err
        assert re.findall(r"residues/s, (\w+)\]", shown)[-1] == stage
        assert shown.count(f"shard 0, {stage}") == (2 if len(states) > 1 else 0)


def names_of(text: str) -> list[str]:
    return [line[:20].strip() for line in text.splitlines()]


def test_the_summary_is_short_unless_something_was_out_of_the_ordinary(
    fasta: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(fasta) == 0
    assert names_of(capsys.readouterr().out) == ["output", "sequences", "model", "time"]
    fasta.write_text(FASTA + ">c\nMK\n>d\nMK1LLLLL\n>e\nMK-\n>f\nMKV\n>g\nMKV\n")
    assert (
        embed(fasta, "--overwrite", "--invalid", "skip", "--duplicates", "rename", "--max-length", "5") == 0
    )
    text = capsys.readouterr().out
    assert names_of(text)[4:] == ["duplicates", "left out", "identical", "truncated"]
    assert re.findall(r"^(?:duplicates|left out|identical|truncated) +([0-9]+) ", text, re.M) == [
        "1",
        "2",
        "1",
        "2",
    ]


def test_long_ids_stand_in_one_line_of_their_own(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"protein_{number}_{'x' * 80 * (number % 2)}" for number in range(7)]
    fasta.write_text("".join(f">{each}\nMKTLL{'K' * number}\n" for number, each in enumerate(ids)))
    assert embed(fasta, "--max-length", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == f"{'truncated':<20}7 sequences, to the first --max-length residues:"
    assert lines[5:] == [f"{'':<20}'protein_0_', ..."]
    short = "".join(f">{number}\nMKTLL{'K' * number}\n" for number in range(10, 17))
    fasta.write_text(f">{ids[1]}\nMKTLL\n" + short)
    assert embed(fasta, "--max-length", "4", "--overwrite") == 0
    cut = f"protein_1_{'x' * 37}..."
    (line,) = capsys.readouterr().out.splitlines()[5:]
    assert line == f"{'':<20}'{cut}', ..."
    assert len(line) <= 80
    fasta.write_text(short)
    assert embed(fasta, "--max-length", "4", "--overwrite") == 0
    assert capsys.readouterr().out.splitlines()[5:] == [f"{'':<20}'10', '11', '12', '13', '14', ..."]


def test_one_is_no_plural(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta.write_text(">a\nM\n")
    assert embed(fasta) == 0
    said = capsys.readouterr()
    assert "embedding 1 sequence, 1 residue, with demo" in said.err
    assert f"{'sequences':<20}1 (1 residue)" in said.out.splitlines()
    assert embed(fasta) == 0
    assert "out.h5 (1 sequence)" in capsys.readouterr().out
    output = fasta.with_name("out.h5")
    assert cli.main(["info", str(output)]) == 0
    assert f"{'sequences':<20}1 (1 residue)" in capsys.readouterr().out.splitlines()
    assert cli.main(["status", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: complete, 1 sequence\n"


@pytest.mark.parametrize("harm", ["damaged", "cut short", "missing"])
def test_status_says_that_the_index_cannot_be_read(
    fasta: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    output = unfinished(fasta, 3)
    index = fasta.with_name("out.h5.run") / "index"
    capsys.readouterr()
    assert cli.main(["status", str(output)]) == 0
    assert "index" not in capsys.readouterr().out
    if harm == "missing":
        shutil.rmtree(index)
    else:
        file = index / ("index.json" if harm == "damaged" else "tokens.bin")
        content = file.read_bytes()
        file.write_bytes(content[:-1] if harm == "cut short" else content[:20] + b"?" + content[21:])
    for command in ("status", "info"):
        assert cli.main([command, str(output)]) == 0
        assert f"{index}: damaged or missing; rerun the command that began" in capsys.readouterr().out
    assert embed(fasta) == 0


@pytest.mark.parametrize("columns", [40, 80])
def test_the_bar_fits_its_terminal(nursery: Nursery, fasta: Path, columns: int) -> None:
    """On a terminal of its own, of this width."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    patch = f"os.dup2(os.open({os.ttyname(its)!r}, os.O_RDWR | os.O_NOCTTY), 2); print('ready', flush=True)"
    child = nursery.start(fasta, fasta.with_name("out.h5"), patch=patch)
    wait_until(lambda: "ready" in child.output())
    os.close(its)
    shown = b""
    with suppress(OSError):  # how Linux says that the other side is closed
        while more := os.read(ours, 1 << 16):
            shown += more
    os.close(ours)
    assert child.wait() == 0
    bars = [text for text in re.split("[\r\n]+", shown.decode()) if text.startswith("embedding: ")]
    assert bars and all(len(bar) < columns for bar in bars)
    ends = ("left", "reading", "computing") if columns < 60 else ("]",)
    assert all(bar.rstrip().endswith(ends) for bar in bars), bars


def test_verbose_tells_all(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(fasta, "--verbose") == 0
    text = capsys.readouterr().out
    expected = {"packs", "packing efficiency", "stages", "attention", "embedding", "merging"}
    assert expected <= set(names_of(text))
    assert not re.search("^[a-z ]+ 0 ", text, re.M), "what has not happened is not counted"


def test_quiet_says_nothing(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time it is complete already
        assert embed(fasta, "--quiet") == 0
        captured = capsys.readouterr()
        assert captured.out + captured.err == ""
    assert embed(fasta, "--quiet", "--verbose") == 2
    assert "not allowed with argument" in capsys.readouterr().err


def information(capsys: pytest.CaptureFixture[str], path: Path) -> Any:
    assert cli.main(["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_on_an_output_reads_like_a_summary(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    assert embed(fasta, "--layers", "3,5", "--store-dtype", "fp16") == 0
    capsys.readouterr()
    output = fasta.with_name("out.h5")
    assert cli.main(["info", str(output)]) == 0
    shown = {line[:20].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}
    assert shown["command"].startswith(f"esm-packed embed {fasta} -o {output} --model demo")
    assert before <= datetime.strptime(shown["date"], "%Y-%m-%d %H:%M:%S %Z").replace(tzinfo=UTC)
    assert shown["sequences"] == "3 (21 residues)"
    assert shown["embeddings"] == "mean of layer 5: 3 x 96, fp16"
    assert shown["mean/3"] == "mean of layer 3: 3 x 96, fp16"
    assert shown["exceptions"] == "none"
    found = information(capsys, output)
    assert found["attributes"]["command"] == shown["command"]
    assert before <= datetime.fromisoformat(found["attributes"]["date"]) <= datetime.now(UTC)
    assert (found["kind"], found["sequences"], found["residues"]) == ("output", 3, 21)


def test_info_names_what_was_out_of_the_ordinary(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta.write_text(FASTA + "".join(f">x{number}\nMK1\n" for number in range(7)))
    assert embed(fasta, "--invalid", "skip", "--max-length", "5") == 0
    capsys.readouterr()
    assert cli.main(["info", str(fasta.with_name("out.h5"))]) == 0
    text = capsys.readouterr().out
    assert "exceptions          2 truncated, 7 left out\n" in text
    assert f"  x0 ({fasta}, line 8): '1' is not in" in text
    assert "  and 2 more in `problems`" in text
    found = information(capsys, fasta.with_name("out.h5"))
    assert (found["truncated"], found["failed"], found["problems"]) == (2, 0, 7)


def test_a_command_longer_than_an_attribute(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(fasta, "--layers", ",".join(["5"] * 40_000)) == 0
    capsys.readouterr()
    command = information(capsys, fasta.with_name("out.h5"))["attributes"]["command"]
    assert command.startswith("esm-packed embed ")
    assert command.endswith("...")


def test_info_and_status_on_an_unfinished_run(
    fasta: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_):
        raise ValueError("some bug")

    output = fasta.with_name("out.h5")
    run = fasta.with_name("out.h5.run")
    with monkeypatch.context() as broken:
        broken.setattr(ESM2, "embed_packed", fail)
        assert embed(fasta) == 1
    capsys.readouterr()
    for command in ("info", "status"):
        for path in (output, run):
            assert cli.main([command, str(path)]) == 0
            text = capsys.readouterr().out
            assert "0 of 1 shards finished, 0 of 3 records (0%)" in text
            assert "not running; rerun the same command to continue" in text
            assert f"started by: esm-packed embed {fasta}" in text
    found = information(capsys, output)
    assert (found["kind"], found["complete"], found["num_records"]) == ("run", False, 3)
    assert embed(fasta, "--keep-run") == 0
    capsys.readouterr()
    assert cli.main(["status", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: complete, 3 sequences; {run} is kept\n"
    assert information(capsys, run)["complete"]


def test_json_is_for_outputs_and_runs(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for subject in (str(fasta), "demo"):
        assert cli.main(["info", subject, "--json"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("esm-packed: error: info --json: ")
        assert subject[:20] in error
        assert "remove --json" in error


def test_all_is_for_the_faults_of_fasta(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(fasta) == 0
    for subject in ("demo", str(fasta.with_name("out.h5"))):
        capsys.readouterr()
        assert cli.main(["info", subject, "--all"]) == 2
        assert "but --all is for FASTA files; remove --all" in capsys.readouterr().err
    assert cli.main(["info", str(fasta), "--all"]) == 0


def unfinished(fasta: Path, num_left: int) -> Path:
    """A run of ten proteins in as many shards, `num_left` of them gone; its output is not there."""
    fasta.write_text("".join(f">p{number}\n{'MKTLLAGVSE' * 9}{'K' * number}\n" for number in range(10)))
    assert embed(fasta, "--keep-run") == 0
    output = fasta.with_name("out.h5")
    output.unlink()
    shards = sorted((fasta.with_name("out.h5.run") / "shards").iterdir())
    assert len(shards) == 10
    for shard in shards[:num_left]:
        shard.unlink()
    return output


@pytest.mark.parametrize("options", [[], ["--keep-run"]])
def test_a_partial_output_counts_its_proteins(
    fasta: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    output = unfinished(fasta, 3)
    capsys.readouterr()
    assert cli.main(["merge", str(output), "--partial", *options]) == 4
    missing, rerun = "3 of 10 proteins are not computed", "rerun the same embed command to continue"
    assert capsys.readouterr().out == f"partial output written: {output}; {missing}, {rerun}\n"
    assert cli.main(["info", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"complete            no; {missing}, {rerun}"
    assert "exceptions          3 not computed" in lines, "and not a second time as problems"
    found = information(capsys, output)
    assert (found["complete"], found["not computed"], found["left out"]) == (False, 3, 0)
    not_complete = f"{output}: not complete; {missing}, {rerun}"
    assert cli.main(["status", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == not_complete
    shutil.rmtree(fasta.with_name("out.h5.run"))
    assert cli.main(["status", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == [not_complete]


@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_finished_makes_no_partial_output(
    fasta: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    output = unfinished(fasta, 9 if damaged else 10)
    for shard in (fasta.with_name("out.h5.run") / "shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    assert cli.main(["merge", str(output), "--partial"]) == 4
    assert "no shard is finished yet" in capsys.readouterr().out
    assert not output.exists()


def test_status_of_an_output_that_is_not_complete(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = fasta.with_name("out.h5")
    assert embed(fasta, "--keep-run") == 0
    with h5py.File(output, "r+") as file:
        file.attrs["complete"] = 0
    capsys.readouterr()
    assert cli.main(["status", str(output)]) == 0
    assert "1 of 1 shards finished" in capsys.readouterr().out
    shutil.rmtree(fasta.with_name("out.h5.run"))
    assert cli.main(["status", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: not complete; ")
