"""Nothing that a command writes is something that it reads, under whatever name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import esm_packed
from esm_packed.errors import UsageError
from esm_packed.runners.cli import main as cli
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.system.paths import check_apart

PROTEINS = ">a\nMKTAYIAKQR\n>b\nGSHMSLFDFFK\n"
DEMO = Path(esm_packed.__path__[0]) / "demo"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: an input, a model, and other names of both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.fa").write_text(PROTEINS)
    (tmp_path / "hard.fa").hardlink_to("in.fa")
    (tmp_path / "soft.fa").symlink_to("in.fa")
    (tmp_path / "sub").mkdir()
    for path in DEMO.glob("*.pt"):
        shutil.copy(path, tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that ends with exit code 2 and leaves everything as it was."""
    before = contents(folder)
    assert cli.main(arguments) == 2
    assert contents(folder) == before
    said = capsys.readouterr().err.strip()
    assert said.startswith("esm-packed: error: ")
    return said


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--estimate",)], ids=" ".join)
def test_embed_does_not_give_hdf5_the_name_of_another_format(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    (folder / "scores.csv").write_text("mine\n")
    said = refused(folder, capsys, "embed", "in.fa", "-o", "scores.csv", "--model", "demo", *options)
    expected = "scores.csv: the output is HDF5, but its name is that of a .csv file; use -o scores.h5"
    assert said == f"esm-packed: error: {expected}"


@pytest.mark.parametrize("path", ["in.fa", "hard.fa", "soft.fa", "sub/../in.fa", "./in.fa"])
@pytest.mark.parametrize("option", ["-o", "--log-json"])
def test_embed_does_not_write_over_its_input(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, path: str
) -> None:
    output = [] if option == "-o" else ["-o", "x.h5"]
    said = refused(folder, capsys, "embed", "in.fa", *output, option, path, "--model", "demo", "--overwrite")
    assert "would overwrite" in said
    assert "in.fa" in said


@pytest.mark.parametrize("path", ["esm2_demo.pt", "./esm2_demo.pt", "esm2_demo-contact-regression.pt"])
@pytest.mark.parametrize("option", ["-o", "--log-json"])
def test_embed_does_not_write_over_its_model(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, path: str
) -> None:
    output = [] if option == "-o" else ["-o", "x.h5"]
    model = ["--model", "./esm2_demo.pt"]
    if option == "-o":  # under a name that an output may have
        (folder / "out.h5").symlink_to(path)
        path = "out.h5"
    assert "would overwrite" in refused(
        folder, capsys, "embed", "in.fa", *output, option, path, *model, "--overwrite"
    )


def test_embed_does_not_write_over_a_model_that_is_found_by_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in torch.hub's folder; `demo` is found in the package."""
    (folder / "link.json").symlink_to(DEMO / "esm2_demo.pt")
    before = (DEMO / "esm2_demo.pt").read_bytes()
    said = refused(
        folder, capsys, "embed", "in.fa", "-o", "x.h5", "--model", "demo", "--log-json", "link.json"
    )
    assert "would overwrite" in said
    assert (DEMO / "esm2_demo.pt").read_bytes() == before


def test_a_log_is_no_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / "pipe")
    arguments = ["embed", "in.fa", "-o", "x.h5", "--model", "demo", "--log-json", "pipe"]
    assert "is a pipe" in refused(folder, capsys, *arguments)


def test_an_output_in_a_run_directory_would_be_deleted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(folder / "x.h5")
    directory.make()
    said = refused(folder, capsys, "embed", "in.fa", "-o", "x.h5.run/y.h5", "--model", "demo")
    assert "is a run directory" in said


def test_an_output_may_be_named_as_run_directories_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["embed", "in.fa", "-o", "foo.run", "--model", "demo", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert cli.main(["status", "foo.run"]) == 0
    assert "complete" in capsys.readouterr().out


def test_names_that_are_not_utf8(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff\xfe.h5")
    assert cli.main(["embed", "in.fa", "-o", name, "--model", "demo", "--device", "cpu"]) == 0
    assert Path(name).exists()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root and setpriv")
def test_a_folder_that_one_may_not_enter(folder: Path) -> None:
    folder.chmod(0o777)
    (folder / "closed").mkdir(mode=0o700)
    os.chown(folder / "closed", 12345, 12345)
    commands = [
        ["embed", "closed/in.fa", "-o", "x.h5"],
        ["embed", "in.fa", "-o", "x.h5", "--log-json", "closed/l.json"],
        ["checkpoint", "demo", "-o", "closed/esm2_x.pt"],
        ["info", "closed/in.fa"],
    ]
    script = f"from esm_packed.runners.cli.main import main; print([main(each) for each in {commands}])"
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    run = subprocess.run([*drop, sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[-1] == str([2] * len(commands)), run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("esm-packed: error: ")]
    assert len(errors) == len(commands)
    assert all("closed" in error for error in errors)
    assert "internal error" not in run.stderr


def test_a_working_directory_that_is_gone(folder: Path) -> None:
    script = (
        "import os, sys; os.rmdir(os.getcwd()); "
        "from esm_packed.runners.cli.main import main; sys.exit(main())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, "status", "x.h5"],
        cwd=folder / "sub",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert "the working directory no longer exists" in run.stderr


@pytest.mark.parametrize("path", ["x.h5", "x.h5.run/metrics.json"])
def test_two_outputs_are_not_one(folder: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    said = refused(folder, capsys, "embed", "in.fa", "-o", "x.h5", "--model", "demo", "--log-json", path)
    assert "clashes with" in said


def test_an_input_in_the_run_directory_would_be_deleted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "x.h5.run").mkdir()
    (folder / "x.h5.run" / "in.fa").write_text(PROTEINS)
    assert "would overwrite" in refused(
        folder, capsys, "embed", "x.h5.run/in.fa", "-o", "x.h5", "--model", "demo"
    )


@pytest.mark.parametrize("model", ["esm2_demo.pt", "./esm2_demo.pt", "soft.pt"])
def test_checkpoint_does_not_write_over_the_model_it_reads(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    (folder / "soft.pt").symlink_to("esm2_demo.pt")
    said = refused(folder, capsys, "checkpoint", model, "-o", "esm2_demo.pt", "--overwrite")
    assert "would overwrite" in said


def test_validate_does_not_write_over_its_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report").mkdir()
    (folder / "report" / "validation.html").hardlink_to("in.fa")
    said = refused(folder, capsys, "validate", "demo", "in.fa", "-o", "report", "--overwrite")
    assert "would overwrite" in said


def test_a_speedup_report_does_not_write_over_its_results(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Path(__file__).parents[1] / "reports" / "data" / "cpu_results.json"
    shutil.copy(results, folder / "sub" / "speedup.md")
    said = refused(folder, capsys, "report", "speedup", "sub/speedup.md", "-o", "sub")
    assert "would overwrite" in said


@pytest.mark.parametrize("make", [Path.touch, lambda path: None], ids=["there", "not there"])
def test_paths_are_compared_whether_they_exist_or_not(tmp_path: Path, make: Callable[[Path], None]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    make(one)
    check_apart({"-o": one}, [other])
    check_apart({"-o": one, "--log-json": other}, [])
    with pytest.raises(UsageError, match="-o"):
        check_apart({"-o": one}, [tmp_path / "sub" / ".." / "one"])
    with pytest.raises(UsageError, match="--log-json"):
        check_apart({"-o": one, "--log-json": one}, [])


def test_odd_paths_are_nobodys(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    check_apart({"-o": tmp_path / "out.h5"}, [loop, "x" * 5000, os.fsdecode(b"\xff"), ""])
