import errno
import gzip
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from nursery import names_in, wait_until

from esm_packed import config
from esm_packed.attention import BACKENDS
from esm_packed.config import ESM2_MODELS
from esm_packed.errors import UsageError
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS
from esm_packed.runners import session
from esm_packed.runners.cli import main as cli
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.cut import FLOPS_PER_SHARD
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.run import Run
from esm_packed.runners.system import terminal
from esm_packed.runners.watch.console import Console
from esm_packed.version import __version__

MODEL = "random:esm2_t6_8M_UR50D"
FASTA = ">a first\nMKTLLAGVSE\n>b second\nMKVLA\n>c\nMMMRPQ\n"


def embed_arguments(fasta: Path | str, folder: Path, *options: str) -> list[str]:
    return [
        "embed",
        str(fasta),
        "-o",
        str(folder / "out.h5"),
        "--model",
        MODEL,
        "--device",
        "cpu",
        "--threads",
        "1",
        *options,
    ]


def assert_one_line_error(stderr: str, *parts: str) -> None:
    """The last line is the error, and no traceback stands above it."""
    *before, line = stderr.strip().splitlines()
    assert line.startswith("esm-packed: error: ")
    for part in parts:
        assert part in line
    assert not any(earlier.startswith(("Traceback", "esm-packed: error")) for earlier in before)


def test_choices_are_those_of_the_modules_that_need_torch():
    assert tuple(PRECISIONS) == config.DTYPES
    assert ("auto", *BACKENDS) == config.ATTENTIONS


def test_python_m_runs_the_same_command(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "esm_packed", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (run.returncode, run.stdout) == (0, f"esm-packed {__version__}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "mps"], "mps is not supported"),
        (["--device", "tpu"], "'tpu' is not one of auto, cpu, cuda"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--layers", "1,,2"], "not a list of layers"),
        (["--max-length", "-1"], "not an integer from 0"),
        (["--token-budget", "0"], "not an integer from 1"),
        (["--token-budget", "4e3"], "not an integer from 1"),
        (["--threads", "0"], "not an integer from 1"),
        (["--invalid", "drop"], "invalid choice: 'drop'"),
        (["--wat"], "unrecognized arguments: --wat"),
        (["--dev", "cpu"], "unrecognized arguments: --dev"),
        (["--layers", "7"], "layer 7 does not exist"),
        (["--layers", "-1,-9"], "layer -9 does not exist"),
        (["--model", "esm3_t9"], "esm3_t9"),
        (["--dtype", "tf32"], "needs a CUDA device"),
        (["--attention", "varlen"], "runs on CUDA devices"),
        (["--device", "cuda:99"], "cuda:99"),
        # digits of another script are no numbers, though int() takes them
        (["--threads", "\u0661"], "not an integer from 1"),
        (["--layers", "\u0666"], "not a list of layers"),
        (["--layers", "-\u0661"], "--layers"),
        (["--device", "cuda:\u0660"], "is not one of auto, cpu, cuda"),
        (["--devices", "\u0660,1"], "neither all nor a list of GPU numbers"),
        (["--slice", "\u0660/2"], "neither auto nor INDEX/COUNT"),
        (["--shard", "0/2"], "unrecognized arguments: --shard"),
        (["--log-json", ""], "is empty"),
    ],
)
def test_wrong_options(fasta, capsys, options, message):
    assert cli.main(embed_arguments(fasta, fasta.parent, *options)) == 2
    assert_one_line_error(capsys.readouterr().err, message)
    assert names_in(fasta.parent) == ["in.fasta"]


def test_missing_output_option(fasta, capsys):
    assert cli.main(["embed", str(fasta)]) == 2
    assert_one_line_error(capsys.readouterr().err, "-o/--output")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["empty"]),
        (b"MKTLL\n", ["not FASTA"]),
        (b">a\nMKT\n>b\nMK1\n", ["line 4", "'b'", "'1' is not in", "--invalid"]),
        (b">a\nMKT\n>a\nMKL\n", ["line 3", "'a'", "--duplicates"]),
        (">a\nMKT\n>b\nM\u4e2dK\n".encode(), ["line 4", "'b'", "U+4E2D", "--invalid"]),
        (b">a\nM-KT\n", ["line 2", "alignment", "--gaps"]),
        (b">a\nM*KT\n", ["line 2", "stop"]),
        (b">a\n>b\nMKT\n", ["line 1", "no residues"]),
        (b">\nMKT\n", ["line 1", "no ID"]),
        (b">a\nMK\0T\n", ["NUL"]),
        (b">a\xff\nMKT\n", ["UTF-8"]),
        (b">a\nACGTACGTACGTACGTACGTACGTACGT\n", ["DNA", "--force"]),
        (gzip.compress(FASTA.encode() * 100, mtime=0)[:-9], ["gzip", "truncated"]),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), ["not valid UTF-8"]),
    ],
)
def test_wrong_input(tmp_path, capsys, content, parts):
    path = tmp_path / "in.fasta"
    path.write_bytes(content)
    assert cli.main(embed_arguments(path, tmp_path)) == 2
    assert_one_line_error(capsys.readouterr().err, str(path), *parts)
    assert names_in(tmp_path) == ["in.fasta"]


def test_missing_input(tmp_path, capsys):
    assert cli.main(embed_arguments(tmp_path / "no.fasta", tmp_path)) == 2
    assert_one_line_error(capsys.readouterr().err, "no.fasta")
    assert cli.main(embed_arguments(tmp_path, tmp_path)) == 2
    assert_one_line_error(capsys.readouterr().err, "directory")
    assert names_in(tmp_path) == []


def test_output_folder_is_missing_or_no_folder(fasta, capsys):
    for folder in (fasta.parent / "nowhere", fasta):
        assert cli.main(embed_arguments(fasta, folder)) == 2
        assert_one_line_error(capsys.readouterr().err, str(folder), "no such directory")


def test_output_name_is_too_long(fasta, capsys):
    for length in (250, 300):
        assert cli.main(["embed", str(fasta), "-o", str(fasta.parent / ("x" * length))]) == 2
        assert_one_line_error(capsys.readouterr().err, "too long")


def test_output_is_a_directory(fasta, tmp_path, capsys):
    (tmp_path / "out.h5").mkdir()
    assert cli.main(embed_arguments(fasta, tmp_path, "--overwrite")) == 2
    assert_one_line_error(capsys.readouterr().err, "is a directory")


@pytest.mark.parametrize("output", ["nowhere/", "folder", "folder/"])
def test_a_folder_is_no_output_file(fasta, capsys, monkeypatch, output):
    monkeypatch.chdir(fasta.parent)
    Path("folder").mkdir()
    for command in (["embed", "in.fasta"], ["checkpoint", "demo"], ["tune"]):
        assert cli.main([*command, "-o", output]) == 2
        assert_one_line_error(capsys.readouterr().err, f"{output}: is a directory; name a file")
    assert names_in(fasta.parent) == ["folder", "in.fasta"]
    for command in (["validate", "demo", "in.fasta"], ["report", "speedup", "in.fasta"]):
        assert cli.main([*command, "-o", "in.fasta"]) == 2
        assert_one_line_error(capsys.readouterr().err, "in.fasta: not a directory; name a directory")
    assert cli.main(["merge", "folder/"]) == 2
    assert_one_line_error(capsys.readouterr().err, "folder: is a directory; name a file")


def test_output_folder_is_not_writable(fasta, capsys):
    """/proc takes no files, not even from root."""
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc")
    assert cli.main(embed_arguments(fasta, Path("/proc"))) == 2
    assert_one_line_error(capsys.readouterr().err, "/proc", "cannot be written to")


@pytest.mark.parametrize("content", [b"", b"notes of mine", b"\x89HDF\r\n\x1a\n cut short"])
def test_an_existing_file_is_kept(fasta, tmp_path, capsys, content, without_computing):
    (tmp_path / "out.h5").write_bytes(content)
    assert cli.main(embed_arguments(fasta, tmp_path)) == 2
    assert_one_line_error(capsys.readouterr().err, "already exists", "--overwrite")
    assert (tmp_path / "out.h5").read_bytes() == content
    assert cli.main(embed_arguments(fasta, tmp_path, "--overwrite")) == 0
    assert EmbeddingReader(tmp_path / "out.h5").num_sequences == 3


def test_an_input_is_never_the_output(fasta, capsys):
    assert cli.main(["embed", str(fasta), "-o", str(fasta), "--overwrite"]) == 2
    assert_one_line_error(capsys.readouterr().err, "would overwrite the input")
    assert fasta.read_text() == FASTA


def test_the_whole_command_from_standard_input(tmp_path):
    """Through the installed module, as a pipe feeds it."""
    run = subprocess.run(
        [sys.executable, "-m", "esm_packed", *embed_arguments("-", tmp_path)],
        input=gzip.compress(FASTA.encode()),
        capture_output=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    summary = dict(line.split("  ", 1) for line in run.stdout.decode().splitlines())
    assert summary["sequences"].strip() == "3 (21 residues)"
    assert summary["model"].strip() == f"{MODEL} in fp32 on cpu (1 thread)"
    assert b"embedding 3 sequences, 21 residues" in run.stderr
    assert b" free in" in run.stderr
    with EmbeddingReader(tmp_path / "out.h5") as reader:
        assert reader.sequence_ids() == ["a", "b", "c"]
    assert names_in(tmp_path) == ["out.h5"]


def test_options_reach_the_run(fasta, capsys, without_computing):
    fasta.write_text(">a first\nMKTLL-AGVSE\n>a second\nMKV1LA\n>a first\nMKT\n")
    options = ["--layers", "-1,-2", "--max-length", "4", "--token-budget", "64", "--store-dtype", "fp16"]
    rules = ["--invalid", "x", "--duplicates", "rename", "--gaps", "drop", "--full-header", "--force"]
    assert cli.main(embed_arguments(fasta, fasta.parent, *options, *rules)) == 0
    with EmbeddingReader(fasta.parent / "out.h5") as reader:
        assert reader.layers == [6, 5]
        assert reader.sequence_ids() == ["a first", "a second", "a first__2"]
        assert reader.column("embedded_lengths").tolist() == [4, 4, 3]
        assert reader.embeddings().dtype == "float16"
        identity = reader.plan["identity"]
    assert identity["token_budget"] == 64
    assert identity["gaps"] == "drop"


def test_the_same_command_again_is_already_complete(fasta, capsys, without_computing):
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 0
    capsys.readouterr()
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 0
    assert "already complete" in capsys.readouterr().out
    assert cli.main(embed_arguments(fasta, fasta.parent, "--layers", "3")) == 2
    assert_one_line_error(capsys.readouterr().err, "--overwrite")


def test_failed_rows_exit_with_3(fasta, capsys, monkeypatch):
    def not_finite(self, batch, names, *rest):
        return {name: torch.full((batch.num_sequences, self.config.hidden_size), torch.inf) for name in names}

    monkeypatch.setattr(ESM2, "embed_packed", not_finite)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 3
    captured = capsys.readouterr()
    assert "failed              3 sequences" in captured.out
    assert_one_line_error(captured.err, "3 of 3 embeddings are not finite")
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 3


def test_internal_errors_hide_the_traceback_unless_asked(fasta, capsys, monkeypatch):
    def fail(self, batch, names, *rest):
        raise ValueError("some\nbug")

    monkeypatch.setattr(ESM2, "embed_packed", fail)
    monkeypatch.delenv("ESM_PACKED_DEBUG", raising=False)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 1
    assert_one_line_error(capsys.readouterr().err, "internal error", "bug", "ESM_PACKED_DEBUG=1")
    monkeypatch.setenv("ESM_PACKED_DEBUG", "1")
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 1
    assert "Traceback" in capsys.readouterr().err
    assert names_in(fasta.parent) == ["in.fasta", "out.h5.run"]


def test_too_little_space_is_found_before_computing(fasta, capsys, monkeypatch):
    monkeypatch.setattr(ESM2, "embed_packed", lambda *call: pytest.fail("computed"))
    usage = shutil.disk_usage(fasta.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 5
    assert_one_line_error(capsys.readouterr().err, "out of disk space", "1.0 kB free")
    assert names_in(fasta.parent) == ["in.fasta", "out.h5.run"]


def test_space_that_runs_out_while_writing(fasta, tmp_path, capsys, monkeypatch, without_computing):
    def full(descriptor, data, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert cli.main(embed_arguments(fasta, tmp_path)) == 5
    assert_one_line_error(capsys.readouterr().err, "out of disk space", "rerun the same command to continue")
    assert names_in(tmp_path) == ["in.fasta", "out.h5.run"]
    assert cli.main(embed_arguments(fasta, tmp_path)) == 0
    assert names_in(tmp_path) == ["in.fasta", "out.h5"]


def test_full_file_system(fasta, tmp_path, capsys, monkeypatch, without_computing):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        fasta.write_text("".join(f">{number}\nMKTLL\n" for number in range(500)))
        assert cli.main(embed_arguments(fasta, disk)) == 5
        assert " free in" in capsys.readouterr().err
        monkeypatch.setattr(session, "check_space", lambda *call: None)
        assert cli.main(embed_arguments(fasta, disk)) == 5
        assert_one_line_error(capsys.readouterr().err, "out of disk space")
        assert names_in(disk) == ["out.h5.run"]
        shutil.rmtree(disk / "out.h5.run")
        # and the index's own copy of a compressed input
        (tmp_path / "in.gz").write_bytes(gzip.compress(b">a\n" + b"MKTLL" * 100_000))
        assert cli.main(embed_arguments(tmp_path / "in.gz", disk)) == 5
        assert names_in(disk) == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


NEVER_READY = """
def never_ready(self, batch, names, *rest):
    print("computing", file=sys.stderr, flush=True)
    while True:  # in short sleeps: a signal that comes just before one is seen behind it
        time.sleep(0.1)
ESM2.embed_packed = never_ready
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_cleanly(fasta, tmp_path_factory, nursery, number):
    output = tmp_path_factory.mktemp("output") / "out.h5"
    child = nursery.start(fasta, output, patch=NEVER_READY, flops_per_shard=1e30)
    wait_until(lambda: "computing" in child.output())
    assert names_in(output.parent) == ["out.h5.run"]
    os.kill(child.pid, number)
    os.kill(child.pid, number)
    assert child.wait() == 4, child.output()
    saved, interrupted = child.output().partition("computing\n")[2].splitlines()
    assert "0 of 1 shards are saved" in saved
    assert (
        interrupted == f"esm-packed: error: interrupted ({number.name}); rerun the same command to continue"
    )
    assert names_in(output.parent) == ["out.h5.run"]


def test_a_signal_that_ends_as_another_error_interrupts(fasta, tmp_path, nursery):
    """Python turns what `__set_name__` raises into a RuntimeError, as while a module is imported."""
    patch = """
class Interrupting:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), 2)
        time.sleep(9)
def embed_packed(*call):
    type("Owner", (), {"field": Interrupting()})
ESM2.embed_packed = embed_packed
"""
    child = nursery.start(fasta, tmp_path / "out.h5", patch=patch, flops_per_shard=1e30)
    assert child.wait() == 4, child.output()
    said = child.output().splitlines()[-1]
    assert said == "esm-packed: error: interrupted (SIGINT); rerun the same command to continue"


def test_a_log_gets_timed_lines(fasta, capsys, monkeypatch, without_computing):
    monkeypatch.setattr("esm_packed.runners.watch.console.LOG_INTERVAL_SECONDS", 0.0)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if " embedding: " in line)
    time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")
    assert "21 residues" in line
    assert "100.0%" in line


def test_a_terminal_gets_a_bar(fasta, capsys, monkeypatch, without_computing):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == 0
    stderr = capsys.readouterr().err
    assert "\rembedding:   0%|" in stderr
    assert "residues/s]" in stderr


def test_steps_told_in_totals_become_one_display_each(capsys, monkeypatch):
    monkeypatch.setattr("esm_packed.runners.watch.console.LOG_INTERVAL_SECONDS", 0.0)
    with Console().byte_steps() as report:
        report("downloading a", 10, 40)
        report("downloading a", 40, 40)
        report("checking a", 5, None)
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert [line.split(",")[0] for line in lines] == [
        "downloading a: 10 B",
        "downloading a: 40 B",
        "checking a: 5 B",
    ]
    assert "25.0%" in lines[0]
    assert "%" not in lines[2]


def test_info_on_an_output(fasta, capsys, without_computing):
    cli.main(embed_arguments(fasta, fasta.parent, "--max-length", "7"))
    capsys.readouterr()
    assert cli.main(["info", str(fasta.parent / "out.h5")]) == 0
    text = capsys.readouterr().out
    for part in ("esm2_t6_8M_UR50D", "sequences", "3 x 320", "1 truncated"):
        assert part in text


def test_info_on_fasta(fasta, capsys):
    fasta.write_text(FASTA + ">d\nMK-T\n>a again\n" + "M\n>e\n" + "M" * 1500 + "\n")
    assert cli.main(["info", str(fasta)]) == 0
    text = capsys.readouterr().out
    values = dict(line.split("  ", 1) for line in text.splitlines() if not line.startswith(" "))
    assert {name: value.strip() for name, value in values.items() if name not in ("file", "sha256")} == {
        "records": "6",
        "faulty": "2",
        "residues": "1,521",
        "lengths": "min 5, 5% 5, 25% 6, median 8, 75% 382, 95% 1,276, max 1,500",
        "mean length": "380.2",
        "longer than 1022": "1",
    }
    assert "line 8, record 'd': gap '-'" in text
    assert "line 9, record 'a': the same ID" in text
    assert names_in(fasta.parent) == ["in.fasta"]


def test_info_on_a_file_that_is_not_there(capsys):
    for subject in ("nothere.fa", "folder/nothere.fasta.gz", "nothere.h5"):
        assert cli.main(["info", subject]) == 2
        assert_one_line_error(capsys.readouterr().err, f"'{subject}': no such file")


@pytest.mark.parametrize("subject", ["nothing.h5", "esm2_t9", "in.h5"])
def test_info_on_nothing(tmp_path, capsys, subject, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.h5").write_bytes(b"\x89HDF\r\n\x1a\n cut short")
    assert cli.main(["info", subject]) == 2
    assert_one_line_error(capsys.readouterr().err, subject)


def test_info_on_a_model(capsys):
    assert cli.main(["info", MODEL]) == 0
    text = capsys.readouterr().out
    config = ESM2_MODELS["esm2_t6_8M_UR50D"]
    for part in ("sha256", "parameters", str(config.hidden_size), "random"):
        assert part in text


def test_checkpoint(tmp_path, capsys):
    path = tmp_path / "esm2_copy.pt"
    assert cli.main(["checkpoint", MODEL, "-o", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert names_in(tmp_path) == ["esm2_copy-contact-regression.pt", "esm2_copy.pt"]
    assert cli.main(["checkpoint", MODEL, "-o", str(path)]) == 2
    assert_one_line_error(capsys.readouterr().err, "already exists", "--overwrite")
    assert cli.main(["checkpoint", MODEL, "-o", str(tmp_path / "no" / "esm2.pt")]) == 2
    assert cli.main(["info", str(path)]) == 0


def test_checkpoint_refuses_a_name_fair_esm_cannot_load_before_it_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "esm_packed.checkpoints.load_checkpoint", lambda *a, **k: pytest.fail("loaded the model")
    )
    for output, named in [("x.pt", "named esm2*.pt"), ("missing/esm2_x.pt", "no such directory")]:
        assert cli.main(["checkpoint", "demo", "-o", str(tmp_path / output)]) == terminal.EXIT_USAGE
        assert named in capsys.readouterr().err


def test_an_output_made_meanwhile_by_another_run_is_kept(fasta, capsys, monkeypatch):
    output = fasta.parent / "out.h5"

    def ones_while_another_run_ends(self, batch, names, *rest):
        output.write_text("another run's result")
        return {name: torch.ones(batch.num_sequences, self.config.hidden_size) for name in names}

    monkeypatch.setattr(ESM2, "embed_packed", ones_while_another_run_ends)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == terminal.EXIT_USAGE
    assert "another run has made this file meanwhile" in capsys.readouterr().err
    assert output.read_text() == "another run's result"
    assert names_in(fasta.parent) == ["in.fasta", "out.h5", "out.h5.run"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_log_does_not_end_the_run(fasta):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "esm_packed", *embed_arguments(fasta, fasta.parent)]
        done = subprocess.run(command, cwd="/", stdout=full, stderr=full)
    assert done.returncode == 0
    with EmbeddingReader(fasta.parent / "out.h5") as reader:
        assert reader.num_sequences == 3


def test_status(fasta, capsys, monkeypatch):
    output = fasta.parent / "out.h5"
    assert cli.main(["status", str(output)]) == terminal.EXIT_USAGE
    assert "no such output file or run" in capsys.readouterr().err

    def fail(self, batch, names, *rest):
        raise ValueError("some bug")

    with monkeypatch.context() as broken:
        broken.setattr(ESM2, "embed_packed", fail)
        assert cli.main(embed_arguments(fasta, fasta.parent)) == 1
    capsys.readouterr()
    for name in (output, f"{output}.run"):
        assert cli.main(["status", str(name)]) == 0
        shown = capsys.readouterr().out
        assert "0 of 1 shards finished" in shown
        assert "not running" in shown

    assert cli.main(embed_arguments(fasta, fasta.parent)) == 0
    capsys.readouterr()
    assert cli.main(["status", str(output)]) == 0
    assert "complete" in capsys.readouterr().out


def test_status_counts_the_records_of_finished_shards(fasta, capsys, monkeypatch, without_computing):
    lengths = np.random.default_rng(0).integers(5, 60, size=40).tolist()
    # no sequence is another's copy, which would have no row in its shard
    fasta.write_text("".join(f">{n}\nM{'K' * n}{'L' * length}\n" for n, length in enumerate(lengths)))
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 3e9)
    output = fasta.parent / "out.h5"
    assert cli.main(embed_arguments(fasta, fasta.parent, "--keep-run")) == 0
    output.unlink()
    shards = sorted((fasta.parent / "out.h5.run" / "shards").iterdir())
    run = Run.open(RunDirectory(output))
    records = [len(run.computed(shard)) for shard in range(run.plan.num_shards)]
    run.index.close()
    assert sum(records) == 40
    assert len(set(records)) > 1, "or a number of shards passes for one of records"
    for gone in (len(shards) - 1, 0, 1):
        shards[gone].unlink()
        records[gone] = 0
        finished = sum(map(bool, records))
        capsys.readouterr()
        assert cli.main(["status", str(output)]) == 0
        assert (
            f"{finished} of {len(shards)} shards finished, {sum(records)} of 40 records "
            f"({sum(records) / 40:.0%})" in capsys.readouterr().out
        )


@pytest.mark.parametrize("inputs", [["-"], ["in.fasta", "-"]])
def test_standard_input_is_closed(fasta, capsys, monkeypatch, inputs):
    monkeypatch.chdir(fasta.parent)
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    commands = [["embed", *inputs, "-o", "out.h5", "--model", MODEL]]
    if len(inputs) == 1:
        commands += [["info", "-"], ["validate", "demo", "-", "-o", "report"]]
    for command in commands:
        assert cli.main(command) == 2
        assert_one_line_error(capsys.readouterr().err, "standard input", "closed")
    assert names_in(fasta.parent) == ["in.fasta"]


def test_standard_input_is_named_twice(fasta, capsys):
    assert cli.main(["embed", "-", str(fasta), "-", "-o", str(fasta.parent / "out.h5")]) == 2
    assert_one_line_error(capsys.readouterr().err, "standard input", "twice")


ODD_PATHS = [
    "/",
    "",
    ".",
    "loop",
    "loop/x",
    "pipe",
    "folder",
    "/dev/null",
    "/dev/zero",
    "x" * 250,
    "y" * 5000,
]


@pytest.mark.parametrize("path", ODD_PATHS, ids=[path[:8] or "empty" for path in ODD_PATHS])
@pytest.mark.parametrize("command", ["status", "info", "merge", "embed"])
@pytest.mark.timeout(60)
def test_paths_that_are_no_outputs(fasta, capsys, monkeypatch, command, path):
    monkeypatch.chdir(fasta.parent)
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    Path("folder").mkdir()
    before = names_in(fasta.parent)
    arguments = [command, path] if command != "embed" else [*embed_arguments(fasta, fasta.parent), "-o", path]
    assert cli.main(arguments) == 2
    assert_one_line_error(capsys.readouterr().err)
    assert names_in(fasta.parent) == before


@pytest.mark.parametrize(
    "path", ["/", "", "loop", "folder", "y" * 5000], ids=lambda path: path[:8] or "empty"
)
def test_paths_that_are_no_inputs(tmp_path, capsys, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("folder").mkdir()
    for command in (embed_arguments(path, tmp_path), ["validate", "demo", path, "-o", "report"]):
        assert cli.main(command) == 2
        assert_one_line_error(capsys.readouterr().err)
    assert names_in(tmp_path) == ["folder", "loop"]


def test_nothing_in_a_file_reaches_the_terminal_as_a_command(fasta, tmp_path, capsys, without_computing):
    evil = "\x1b]0;title\x07\x9b31m\u202e\r"
    path = tmp_path / f"in{evil}.fasta"
    path.write_text(f">a{evil}\nMKV\n>b{evil}\nMK1\n>c\nMKV\n", newline="")
    output = tmp_path / f"out{evil}.h5"
    command = ["embed", str(path), "-o", str(output), "--model", MODEL, "--device", "cpu", "--full-header"]
    commands = [command, [*command, "--invalid", "skip"], ["info", str(output)], ["status", str(output)]]
    commands += [
        ["info", str(path)],
        ["info", f"{evil}"],
        ["embed", evil, "-o", evil],
        [evil],
        ["merge", evil],
    ]
    for number, arguments in enumerate(commands):
        cli.main([*arguments, "--quiet"] if arguments[0] == "embed" else arguments)
        if number == 1:
            with h5py.File(output, "r+") as file:
                file.attrs[f"name{evil}"] = f"value{evil}"
        captured = capsys.readouterr()
        text = captured.out + captured.err
        assert "\\x1b" in text or number in (1,), arguments
        assert [character for character in text if not character.isprintable() and character != "\n"] == []


def test_answers_in_a_terminal_without_unicode(tmp_path, monkeypatch):
    path = tmp_path / "in.fasta"
    path.write_text(">\u00e9\nM1K\n>b\nMKV\n", encoding="utf-8")
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii", write_through=True))
    assert cli.main(["info", str(path)]) == 0
    assert b"line 2, record '\\xe9': '1' is not in" in terminal.getvalue()


@pytest.mark.parametrize("limit", [50, 1000, 10_000])
def test_a_limit_on_the_size_of_files_is_out_of_space(fasta, capsys, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = cli.main(embed_arguments(fasta, fasta.parent))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 5
    assert_one_line_error(capsys.readouterr().err, "out of disk space", "File too large")


@pytest.mark.parametrize(
    "module, number",
    [
        ("argparse", signal.SIGTERM),
        ("argparse", signal.SIGINT),
        ("esm_packed.runners.cli.options", signal.SIGINT),
        ("torch", signal.SIGTERM),
        ("torch", signal.SIGINT),
        ("h5py", signal.SIGTERM),
        pytest.param("h5py", signal.SIGINT, marks=pytest.mark.slow),  # imports torch first: 3 s
        pytest.param("numpy", signal.SIGINT, marks=pytest.mark.slow),
        ("esm_packed.runners.session", signal.SIGINT),
    ],
)
def test_a_signal_at_the_start_ends_the_program_with_one_line(fasta, module, number):
    """As if it came while `module` is imported; the first is what the entry point may not import itself."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Interrupting())
from esm_packed.runners.cli.main import main
sys.exit(main())
"""
    run = subprocess.run(
        [sys.executable, "-c", script, *embed_arguments(fasta, fasta.parent)], capture_output=True, text=True
    )
    assert run.returncode == 4, run.stderr
    assert (
        run.stderr == f"esm-packed: error: interrupted ({number.name}); rerun the same command to continue\n"
    )
    assert names_in(fasta.parent) == ["in.fasta"]


def wrapped(error):
    outer = RuntimeError("a worker failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        wrapped(MemoryError()),
    ],
    ids=repr,
)
def test_too_little_memory_is_said_in_a_line(fasta, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("esm_packed.runners.session.embed_files", fail)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == terminal.EXIT_FAILED
    assert_one_line_error(
        capsys.readouterr().err, "error: out of memory", "rerun the same command to continue"
    )


def test_a_mistake_that_mentions_memory_stays_one(fasta, capsys, monkeypatch):
    def fail(*_, **__):
        raise UsageError("the model does not fit: out of memory")

    monkeypatch.setattr("esm_packed.runners.session.embed_files", fail)
    assert cli.main(embed_arguments(fasta, fasta.parent)) == terminal.EXIT_USAGE
    assert_one_line_error(capsys.readouterr().err, "the model does not fit")
