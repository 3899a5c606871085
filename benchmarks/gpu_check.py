"""Everything that needs a GPU, within a time limit: `python benchmarks/gpu_check.py --out DIR`.

Correctness first (sections side by side), then speed (one after the other), then tuning. What takes longer is
asked for by name, each in a call of its own: `--phases suites`, `--phases rivals`, `--phases evidence`. Each
section is a process of its own with a time limit; whatever happens to it is recorded in DIR/gpu_check.json,
and the rest goes on. This file needs the standard library alone: the package is installed from the working
tree into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_summary import summary_lines

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = "tests/gpu"
INTERPRETER_TESTS = (
    "tests/kernels/test_triton_kernels.py",
    "tests/kernels/test_operations.py",
    "tests/kernels/test_gelu.py",
)
"""They run in Triton's interpreter on a CPU, and in truth on a GPU."""

CARRIED = ROOT / ".gpu_packages"
"""Packages that the machine lacks, brought along: fair-esm, matplotlib."""

PARTS = 6
"""Processes those tests are divided among: most of their time is Triton's compiler."""

OF_650M = ("--model", "random:esm2_t33_650M_UR50D")
NEARLY_TWO_PACKS = ("--tokens", "64512")
"""Of 32,768 tokens: a little more would make a third pack for next to nothing."""

OTHER_SIZES = ("--model", "random:esm2_t30_150M_UR50D,random:esm2_t36_3B_UR50D")
OTHER_SIZES += ("--dtype", "fp16", "--workload", "uniref", *NEARLY_TWO_PACKS)

SUITES = (
    ("suites", "reproducible_cost", "bench_model.py", ("-k", "test_reproducible", "--blocks", "3"), 60),
    (
        "suites",
        "forward_passes",
        "bench_model.py",
        ("-k", "test_model or test_transfer", "--blocks", "2", *NEARLY_TWO_PACKS),
        300,
    ),
    ("rivals", "peers", "bench_peers.py", ("--blocks", "3", *OF_650M, *NEARLY_TWO_PACKS), 300),
    (
        "rivals",
        "end_to_end",
        "bench_end_to_end.py",
        ("--blocks", "3", *OF_650M, "--tokens", "2000000", "--dtype", "fp16", "--workload", "uniref"),
        100,
    ),
    ("rivals", "attention", "bench_attention.py", ("--blocks", "3", *NEARLY_TWO_PACKS), 60),
    (
        "evidence",
        "model_sizes",
        "bench_model.py",
        ("-k", "test_model", "--blocks", "3", *OTHER_SIZES),
        200,
    ),
)
"""Phase, name, file, options on a GPU and seconds of the suites that take longer than the first call has."""

CLOSING_SECONDS = 8.0
GRACE_SECONDS = 8.0
LOG_CHARACTERS = 300_000
"""Kept of the output of one section."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Args:
        name: its key in the JSON.
        phase: one of `PHASES`, which follow each other.
        run: does it within so many seconds.
        seconds: kept for it by what comes before; correctness takes what the others leave.
        needs_gpu: whether it is left out on a CPU.
    """

    name: str
    phase: str
    run: Callable[[Check, float], Result]
    seconds: float = 0.0
    needs_gpu: bool = True


@dataclass
class Done:
    """How a process ended."""

    code: int
    output: str
    timed_out: bool


@dataclass
class Check:
    """One run: where things are, what time is left, what is known so far."""

    out: Path
    work: Path
    device: str
    deadline: float
    jobs: int
    command: str
    commit: str | None
    report: Result = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    stopping: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.report = {
            "machine": {},
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": self.device,
            "sections": {},
        }
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PYTHONSAFEPATH": "1",  # the working tree's folders must not stand in for the installed package
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }

    @property
    def site(self) -> Path:
        """Where the package is installed."""
        return self.work / "site"

    def left(self) -> float:
        """Seconds until everything must be written."""
        return self.deadline - CLOSING_SECONDS - time.monotonic()

    def save(self) -> None:
        """Write the JSON file, whole or not at all."""
        with self._lock:
            partial_file = self.out / "gpu_check.json.partial"
            partial_file.write_text(json.dumps(self.report, indent=1, default=str) + "\n")
            partial_file.replace(self.out / "gpu_check.json")

    def run(
        self,
        name: str,
        command: Sequence[str | Path],
        seconds: float,
        cwd: Path = ROOT,
        extra_environment: dict[str, str] | None = None,
    ) -> Done:
        """Run a command, its output into the log; past `seconds` it is interrupted, then killed."""
        if self.stopping:
            raise RuntimeError("interrupted before it began")
        log = self.work / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=self.environment | (extra_environment or {}),
                process_group=0,
            )
        with self._lock:
            self._running.add(process)
        timed_out = False
        try:
            process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            self._stop(process)
            with self._lock:
                self._running.discard(process)
        output = log.read_text(errors="replace")
        with self._lock, (self.out / "log.txt").open("a") as file:
            shown = shlex.join(str(part) for part in command)
            file.write(f"\n=== {name}: {shown}\n{output[-LOG_CHARACTERS:]}\n")
        return Done(process.returncode, output, timed_out)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        # Children of the process, too: a compiler or a worker would hold the machine.
        for number, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            if process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop_all(self) -> None:
        """Kill what still runs, and let nothing else begin."""
        self.stopping = True
        with self._lock:
            running = list(self._running)
        for process in running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def python(self, *arguments: str | Path) -> list[str | Path]:
        """A command for this interpreter."""
        return [sys.executable, *arguments]


def verdict(done: Done, passed: bool) -> Result:
    """Status of a section whose process ended like this."""
    if done.timed_out:
        return {"status": "timeout", "code": done.code}
    return {"status": "passed" if passed else "failed", "code": done.code}


def machine(check: Check, seconds: float) -> Result:
    """GPU, driver, clocks and commit, without torch."""
    found = check.report["machine"]
    found["commit"] = check.commit or _output(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    )
    found["python"] = sys.version.split()[0]
    found["cpus"] = _num_cpus()
    if check.device != "cuda":
        return {"status": "passed"}
    names = ["name", "driver_version", "memory.total", "memory.used", "power.limit"]
    names += ["clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu"]
    values = _output(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"])
    found["nvidia_smi"] = values
    parts = [part.strip() for part in (values or "").splitlines()[:1] for part in part.split(",")]
    if len(parts) == len(names):
        reading = dict(zip(names, parts, strict=True))
        found["gpu"], found["driver"] = reading["name"], reading["driver_version"]
        found["clocks"] = {name: value for name, value in reading.items() if name.startswith("clocks")}
        found["power_limit"] = reading["power.limit"]
    return {"status": "passed" if "gpu" in found else "failed"}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip() or None


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def install(check: Check, seconds: float) -> Result:
    """The package from the working tree: with pip, and where that fails by copying its folders."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders: dict[str, str] = settings["package-dir"]
    result: Result = {}
    source = check.work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for folder in folders.values():
        _copy_package(ROOT / folder, source / folder)
    for method in ("pip", "copy"):
        shutil.rmtree(check.site, ignore_errors=True)
        if method == "pip":
            pip = check.python("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
            pip += ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--no-cache-dir"]
            done = check.run("install", [*pip, "--target", check.site, source], min(60, seconds), check.work)
            result["pip_code"] = done.code
        else:
            for package, folder in folders.items():
                _copy_package(source / folder, check.site.joinpath(*package.split(".")))
        paths = [check.site, ROOT / "benchmarks", ROOT / "tests" / "support", CARRIED]
        check.environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        code = "import esm_packed.kernels, esm_packed.model as model; print(model.__file__)"
        done = check.run("install", check.python("-c", code), 60, check.work)
        if done.code == 0 and str(check.site) in done.output:
            return result | {"status": "passed", "method": method}
    return result | {"status": "failed", "output": done.output[-2000:]}


def _copy_package(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def in_process_of_its_own(name: str) -> Callable[[Check, float], Result]:
    """A section of `gpu_sections.py`."""

    def run(check: Check, seconds: float) -> Result:
        file = check.work / f"{name}.json"
        script = ROOT / "benchmarks" / "gpu_sections.py"
        done = check.run(
            name,
            check.python(
                script, name, "--device", check.device, "--out", file, "--seconds", str(0.8 * seconds)
            ),
            seconds,
        )
        found = json.loads(file.read_text()) if file.exists() else {}
        result = verdict(done, done.code == 0) | {"found": found}
        return result if done.code == 0 else result | {"output": done.output[-2000:]}

    return run


def torch_machine(check: Check, seconds: float) -> Result:
    """What torch says of the machine, moved to where the machine is described."""
    result = in_process_of_its_own("machine")(check, seconds)
    found = result.pop("found")
    check.report["machine"] = found | check.report["machine"]
    if check.device == "cuda" and "capability" not in found:
        result["status"] = "failed"
    return result


def tests(
    name: str, *paths: str, select: str = "", marker: str = "gpu", part: str = ""
) -> Callable[[Check, float], Result]:
    """Tests, chosen by folder, by `-k` and by `-m`, or every n-th of them."""

    def run(check: Check, seconds: float) -> Result:
        existing = [path for path in paths if (ROOT / path).exists()]
        if not existing:
            return {"status": "skipped", "reason": f"{', '.join(paths)} is not there"}
        records = check.work / f"{name}.jsonl"
        command = _pytest(check, existing, records, 0.85 * seconds)
        command += ["-m", marker, "-rfE", "--tb=short", "--continue-on-collection-errors"]
        command += ["-k", select] if select else []
        command += ["--part", part] if part else []
        done = check.run(name, command, seconds)
        lines, unfinished = _test_lines(records)
        numbers = {line["test"].split("::")[-1]: line["properties"] for line in lines if line["properties"]}
        return outcome_of(done, lines) | {"unfinished": unfinished, "numbers": numbers}

    return run


def outcome_of(done: Done, lines: Sequence[Result]) -> Result:
    """What a run of pytest came to."""
    outcomes = Counter(line["outcome"] for line in lines)
    skips = Counter(line["message"] for line in lines if line["outcome"] == "skipped")
    result = verdict(done, done.code == 0) | {"counts": dict(outcomes), "skips": dict(skips)}
    result["failures"] = {
        line["test"]: line["message"] for line in lines if line["outcome"] in ("failed", "error")
    }
    if result["status"] == "passed" and any("time limit of this run" in reason for reason in skips):
        result["status"] = "incomplete"
    elif result["status"] == "passed" and not outcomes["passed"]:
        result["status"] = "skipped"
    return result if done.code == 0 else result | {"output": done.output[-2000:]}


def _pytest(check: Check, paths: Sequence[str], records: Path, stop_after: float) -> list[str | Path]:
    options = [
        "-p",
        "gpu_records",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ROOT,
        "-c",
        ROOT / "pyproject.toml",
    ]
    return check.python(
        "-m", "pytest", *paths, *options, "--records", records, "--stop-after", str(stop_after)
    )


def _test_lines(path: Path) -> tuple[list[Result], list[str]]:
    """What `gpu_records` wrote of tests that ended, and the names of those that did not."""
    found: list[Result] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # the last one may be cut off
            found.append(json.loads(line))
    ended = [line for line in found if line["outcome"] != "started"]
    names = {line["test"] for line in ended}
    return ended, [line["test"] for line in found if line["test"] not in names]


def kernel_benchmarks(check: Check, seconds: float) -> Result:
    """`bench_kernels.py`; every record counts, also when the run is cut short."""
    records = check.work / "bench.jsonl"
    command = _pytest(check, ["benchmarks/bench_kernels.py"], records, 0.85 * seconds)
    command += ["--tb=short", "-rfE", "--benchmark-json", check.out / "benchmark.json", "--benchmark-quiet"]
    command += ["--blocks", "1" if check.device == "cpu" else "3"]
    done = check.run("bench_kernels", command, seconds)
    lines, unfinished = _test_lines(records)
    results = [line["properties"] for line in lines if line["outcome"] == "passed"]
    return outcome_of(done, lines) | {"unfinished": unfinished, "results": results}


def suite(name: str, file: str, options: Sequence[str]) -> Callable[[Check, float], Result]:
    """A suite of `pytest benchmarks` into NAME.json, whole also when the time is up."""

    def run(check: Check, seconds: float) -> Result:
        records = check.work / f"{name}.jsonl"
        command = _pytest(check, [f"benchmarks/{file}"], records, 0.8 * seconds)
        command += ["--tb=short", "-rfE", "--benchmark-quiet", "--benchmark-json", check.out / f"{name}.json"]
        if check.device == "cuda":
            command += options
        else:
            command += ["--blocks", "1", "--tokens", "200", "--workload", "short50", "--threads", "1"]
        done = check.run(name, command, seconds)
        lines, unfinished = _test_lines(records)
        return outcome_of(done, lines) | {"unfinished": unfinished}

    return run


def validation(check: Check, seconds: float) -> Result:
    """`esm-packed validate` on stress weights; its page and JSON go into a folder of the output."""
    end = time.monotonic() + seconds
    script = ROOT / "benchmarks" / "gpu_sections.py"
    options = ["--device", check.device, "--out", check.work / "stress_files.json"]
    made = check.run("stress_files", check.python(script, "stress_files", *options), seconds, check.work)
    if made.code != 0:
        return verdict(made, False) | {"output": made.output[-2000:]}
    folder = check.out / "validation"
    command = check.python("-m", "esm_packed", "validate", "esm2_stress.pt", "uniref.fasta", "-o", folder)
    command += ["--device", check.device, "--overwrite"]
    done = check.run("validation", command, end - time.monotonic(), check.work)
    for figure in (*folder.glob("*.png"), *folder.glob("*.svg")):  # the page holds them
        figure.unlink()
    return verdict(done, done.code == 0) | {"output": done.output[-3000:]}


def memory_checker(check: Check, seconds: float) -> Result:
    """compute-sanitizer's memcheck over one launch of every kernel, where it works."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return {"status": "not available", "reason": "compute-sanitizer is not installed"}
    script = ROOT / "benchmarks" / "gpu_sections.py"
    file = check.work / "every_launcher.json"
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86"]
    launchers = check.python(script, "every_launcher", "--device", check.device, "--out", file)
    own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a step beyond a tensor is seen
    command = [sanitizer, *options, *launchers]
    done = check.run("compute-sanitizer", command, seconds, extra_environment=own_allocations)
    launched = json.loads(file.read_text())["launched"] if file.exists() else []
    summary = [
        line for line in done.output.splitlines() if "ERROR SUMMARY" in line or "not supported" in line
    ]
    result: Result = {"launched": launched, "summary": summary[-5:], "code": done.code}
    if done.timed_out:
        return result | {"status": "timeout"}
    if any("ERROR SUMMARY: 0 errors" in line for line in summary) and done.code == 0:
        return result | {"status": "passed"}
    if done.code == 86:
        return result | {"status": "failed", "output": done.output[-4000:]}
    return result | {"status": "not available", "output": done.output[-2000:]}


def tuning(check: Check, seconds: float) -> Result:
    """`esm-packed tune` into the output folder: the default model, then the others while there is time."""
    end = time.monotonic() + seconds
    tune = check.python("-m", "esm_packed", "tune")
    usage = check.run("tune", [*tune, "--help"], 60, check.work)
    if usage.code != 0 or "--time-limit" not in usage.output:
        return {"status": "not available", "output": usage.output[-500:]}
    file = check.out / "tuned.json"
    result: Result = {"status": "no time left", "runs": []}
    for models in (["--model", "esm2_t33_650M_UR50D"], []):
        left = end - time.monotonic()
        if left < LEAST_TUNING_SECONDS:
            break
        limits = ["--time-limit", str(int(0.8 * left)), "-o", file]
        done = check.run("tune", [*tune, *models, *limits], left, check.work)
        one = verdict(done, done.code == 0) | {"models": models, "output": done.output[-2000:]}
        result["runs"].append(one)
        result["status"] = one["status"]
        if one["status"] != "passed":
            break
    if file.exists():
        with suppress(ValueError):
            result["file"] = json.loads(file.read_text())
    return result


def correctness_sections() -> list[Section]:
    """Those that take longest come first."""
    kernels, model = f"{GPU_TESTS}/test_gpu_kernels.py", f"{GPU_TESTS}/test_gpu_model.py"
    selections = {
        "launches": "test_launcher",
        "graphs": "test_graph_replay",
        "compiled": "test_compiled_layer",
        "offsets": "test_offsets",
    }
    return [
        Section("memory_checker", "correctness", memory_checker),
        *(
            Section(
                f"interpreter_tests_{part}",
                "correctness",
                tests(
                    f"interpreter_tests_{part}",
                    *INTERPRETER_TESTS,
                    marker="not slow",
                    part=f"{part}/{PARTS}",
                ),
            )
            for part in range(PARTS)
        ),
        Section("model", "correctness", tests("model", model), needs_gpu=False),
        Section("runner", "correctness", tests("runner", f"{GPU_TESTS}/test_gpu_runner.py")),
        Section(
            "reproducible", "correctness", tests("reproducible", f"{GPU_TESTS}/test_gpu_reproducible.py")
        ),
        *(
            Section(
                f"kernels_{size}",
                "correctness",
                tests(f"kernels_{size}", kernels, select=f"test_fp64_reference_at_real_sizes and {size}"),
            )
            for size in ("650M", "3B", "8M")
        ),
        *(
            Section(name, "correctness", tests(name, kernels, select=select))
            for name, select in selections.items()
        ),
        Section(
            "tf32_and_nan",
            "correctness",
            tests("tf32_and_nan", kernels, select="test_tf32 or test_nan"),
            needs_gpu=False,
        ),
    ]


def all_sections() -> list[Section]:
    """In order."""
    return [
        Section("machine", "setup", machine, 5, needs_gpu=False),
        Section("install", "setup", install, 15, needs_gpu=False),
        Section("torch", "setup", torch_machine, 15, needs_gpu=False),
        *correctness_sections(),
        Section("kernel_benchmarks", "speed", kernel_benchmarks, 130, needs_gpu=False),
        Section("model_speed", "speed", in_process_of_its_own("model_speed"), 60, needs_gpu=False),
        Section("tuning", "tuning", tuning, 75),
        *(
            Section(name, phase, suite(name, file, options=options), seconds, needs_gpu=False)
            for phase, name, file, options, seconds in SUITES
        ),
        Section("memory", "suites", in_process_of_its_own("memory"), 60, needs_gpu=False),
        Section("validation", "evidence", validation, 200, needs_gpu=False),
    ]


PHASES = ("setup", "correctness", "speed", "tuning", "suites", "rivals", "evidence")
DEFAULT_PHASES = ("correctness", "speed", "tuning")
LEAST_SECONDS = 5.0
LEAST_TUNING_SECONDS = 30.0
MOST_RESERVED = 0.7


def run_section(check: Check, section: Section, until: float) -> None:
    """Run one section until `until`, and record how it went."""
    start = time.monotonic()
    try:
        if section.needs_gpu and check.device != "cuda":
            result: Result = {"status": "skipped", "reason": "needs a CUDA device"}
        elif section.phase != "setup" and check.report["sections"]["torch"]["status"] == "failed":
            result = {"status": "skipped", "reason": "torch does not work here, or sees no GPU"}
        elif until - start < LEAST_SECONDS:
            result = {"status": "no time left"}
        else:
            result = section.run(check, until - start)
    except Exception:
        result = {"status": "error", "output": traceback.format_exc()[-3000:]}
    seconds = round(time.monotonic() - start, 1)
    ordered = {"status": result.pop("status"), "seconds": seconds} | result
    check.report["sections"][section.name] = ordered
    check.save()
    counts = " ".join(f"{count} {outcome}" for outcome, count in ordered.get("counts", {}).items())
    print(f"{section.name:20}{ordered['status']:15}{seconds:7.1f} s  {counts}", flush=True)


def run_phase(check: Check, phase: str, sections: Sequence[Section], reserved: float) -> None:
    """Sections of one phase; `reserved` seconds belong to later ones."""
    end = check.deadline - CLOSING_SECONDS
    if phase == "correctness":
        threads = ThreadPoolExecutor(check.jobs)
        try:
            list(threads.map(lambda section: run_section(check, section, end - reserved), sections))
        except BaseException:
            check.stop_all()
            threads.shutdown(cancel_futures=True)
            raise
        threads.shutdown()
        return
    for number, section in enumerate(sections):
        later = sum(other.seconds for other in sections[number + 1 :])
        # Without the setup there is nothing to keep time for.
        run_section(check, section, end if phase == "setup" else end - reserved - later)


def fit_reservations(sections: Sequence[Section], seconds: float) -> list[Section]:
    """The sections, what is kept for them shortened until it is no more than most of `seconds`."""
    kept = sum(section.seconds for section in sections)
    scale = min(1.0, MOST_RESERVED * seconds / kept) if kept else 1.0
    return [replace(section, seconds=section.seconds * scale) for section in sections]


def main() -> int:
    known = all_sections()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds (default: %(default)s)")
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES[1:], default=DEFAULT_PHASES, help="default: %(default)s"
    )
    parser.add_argument("--sections", nargs="+", choices=[s.name for s in known], help="only these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: for trying it out")
    parser.add_argument("--jobs", type=int, help="correctness sections side by side")
    parser.add_argument("--commit", help="what the working tree is, where git cannot say")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = ("gpu_check", "benchmark", "tuned", *(name for _, name, *_ in SUITES))
    for name in ("log.txt", *(f"{name}.json" for name in results)):
        (arguments.out / name).unlink(missing_ok=True)
    jobs = arguments.jobs or (1 if arguments.device == "cpu" else max(1, min(14, _num_cpus() - 2)))

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as work:
        check = Check(
            out=arguments.out.resolve(),
            work=Path(work),
            device=arguments.device,
            deadline=time.monotonic() + arguments.time_limit,
            jobs=jobs,
            command=shlex.join(sys.argv),
            commit=arguments.commit,
        )
        wanted = arguments.sections or [s.name for s in known if s.phase in arguments.phases]
        chosen = [s for s in known if s.name in wanted]
        chosen = [s for s in known if s.phase == "setup" or s in chosen]
        chosen = fit_reservations(chosen, arguments.time_limit - CLOSING_SECONDS)
        try:
            for number, phase in enumerate(PHASES):
                later = PHASES[number + 1 :]
                reserved = sum(s.seconds for s in chosen if s.phase in later)
                run_phase(check, phase, [s for s in chosen if s.phase == phase], reserved)
        except KeyboardInterrupt:
            check.report["interrupted"] = True
        finally:
            check.stop_all()
            lines = list(summary_lines(check.report))
            check.report["summary"] = lines
            check.save()
            print("\n".join(["", *lines]), flush=True)
    statuses = {section["status"] for section in check.report["sections"].values()}
    unfinished = {"failed", "error", "timeout", "incomplete", "no time left"}
    return 1 if statuses & unfinished or "interrupted" in check.report else 0


if __name__ == "__main__":
    sys.exit(main())
