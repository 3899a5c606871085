"""Steps of a GPU check: a table of commands with time-outs, and how their results are read."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process import ROOT, Check, Done, Result, num_cpus

CARRIED = ROOT / ".gpu_packages"
"""Packages missing on the machine, such as fair-esm and matplotlib."""


@dataclass(frozen=True)
class Step:
    """A command with a time-out.

    Args:
        name: its key in the JSON.
        phase: one of `PHASES`, which follow each other.
        words: the command. `{root}`, `{out}`, `{work}`, `{device}` and `{name}` are filled in, and
            `{seconds}`, in which the command should end by itself; none where `read` does all.
        read: what the command's end and its files say.
        seconds: kept for it by what comes before; correctness takes what the others leave.
        options: further words; on a CPU, where a step is only tried, `on_cpu` stand in their place.
        on_cpu: None leaves the step out on a CPU.
    """

    name: str
    phase: str
    words: tuple[str, ...]
    read: Callable[[Check, Step, Done], Result]
    seconds: float = 0.0
    options: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] | None = None

    def command(self, check: Check, seconds: float) -> list[str]:
        """The command for this run; `seconds` are left for it."""
        words = self.words + (self.options if check.device == "cuda" else self.on_cpu or ())
        places = {"root": ROOT, "out": check.out, "work": check.work, "device": check.device}
        return [word.format(name=self.name, seconds=int(0.8 * seconds), **places) for word in words]


def verdict(check: Check, step: Step, done: Done) -> Result:
    """Status of a step, and its last words where it did not pass."""
    status = "timeout" if done.timed_out else "failed" if done.code else "passed"
    result = {"status": status, "code": done.code}
    return result if status == "passed" else result | {"output": done.output[-2000:]}


def machine(check: Check, step: Step, done: Done) -> Result:
    """GPU, driver, clocks and commit, without torch."""
    found = check.report["machine"]
    found["commit"] = check.commit or _output(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    )
    found["python"] = sys.version.split()[0]
    found["cpus"] = num_cpus()
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


def install(check: Check, step: Step, done: Done) -> Result:
    """The package from the working tree: with pip, and where that fails by copying its directories."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    directories: dict[str, str] = settings["package-dir"]
    result: Result = {}
    source = check.work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for directory in directories.values():
        _copy_package(ROOT / directory, source / directory)
    for method in ("pip", "copy"):
        shutil.rmtree(check.site, ignore_errors=True)
        if method == "pip":
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            pip += ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--no-cache-dir"]
            done = check.run("install", [*pip, "--target", str(check.site), str(source)], 60)
            result["pip_code"] = done.code
        else:
            for package, directory in directories.items():
                _copy_package(source / directory, check.site.joinpath(*package.split(".")))
        paths = [check.site, ROOT / "benchmarks", ROOT / "tests" / "support", CARRIED]
        check.environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        code = "import esm_packed.kernels, esm_packed.model as model; print(model.__file__)"
        done = check.run("install", [sys.executable, "-c", code], 60)
        if done.code == 0 and str(check.site) in done.output:
            return result | {"status": "passed", "method": method}
    return result | {"status": "failed", "output": done.output[-2000:]}


def _copy_package(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def found(check: Check, step: Step, done: Done) -> Result:
    """Results of a step of `steps.py`, also of an interrupted one."""
    file = check.work / f"{step.name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return verdict(check, step, done) | {"found": found}


def torch_machine(check: Check, step: Step, done: Done) -> Result:
    """Moves torch's description of the machine to the machine's record."""
    result = found(check, step, done)
    seen = result.pop("found")
    check.report["machine"] = seen | check.report["machine"]
    if check.device == "cuda" and "capability" not in seen:
        result["status"] = "failed"
    return result


def outcomes_of_tests(check: Check, step: Step, done: Done) -> Result:
    """Results of a pytest run, also of an interrupted one."""
    lines, unfinished = _test_lines(check.work / f"{step.name}.jsonl")
    outcomes = Counter(line["outcome"] for line in lines)
    skips = Counter(line["message"] for line in lines if line["outcome"] == "skipped")
    result = verdict(check, step, done) | {"counts": dict(outcomes), "skips": dict(skips)}
    result["failures"] = {
        line["test"]: line["message"] for line in lines if line["outcome"] in ("failed", "error")
    }
    if result["status"] == "passed" and any("time limit of this run" in reason for reason in skips):
        result["status"] = "incomplete"
    elif result["status"] == "passed" and not outcomes["passed"]:
        result["status"] = "skipped"
    numbers = {line["test"]: line["properties"] for line in lines if line["properties"]}
    return result | {"unfinished": unfinished, "numbers": numbers}


def benchmark_records(check: Check, step: Step, done: Done) -> Result:
    """As `outcomes_of_tests`, with the record of each benchmark."""
    lines, _ = _test_lines(check.work / f"{step.name}.jsonl")
    result = outcomes_of_tests(check, step, done)
    del result["numbers"]
    return result | {"results": [line["properties"] for line in lines if line["outcome"] == "passed"]}


def _test_lines(path: Path) -> tuple[list[Result], list[str]]:
    """Records of tests that ended, and names of tests that did not."""
    found: list[Result] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # the last one may be cut off
            found.append(json.loads(line))
    ended = [line for line in found if line["outcome"] != "started"]
    names = {line["test"] for line in ended}
    return ended, [line["test"] for line in found if line["test"] not in names]


def memory_errors(check: Check, step: Step, done: Done) -> Result:
    """Results of compute-sanitizer, which does not work on every machine."""
    summary = [
        line for line in done.output.splitlines() if "ERROR SUMMARY" in line or "not supported" in line
    ]
    result = found(check, step, done) | {"summary": summary[-5:]}
    clean = any("ERROR SUMMARY: 0 errors" in line for line in summary)
    if (result["status"] == "failed" and done.code != 86) or (result["status"] == "passed" and not clean):
        result["status"] = "not available"
    return result


def hardware_counters(check: Check, step: Step, done: Done) -> Result:
    """Counters of each kernel from Nsight Compute, which may be missing or lack permission."""
    file = check.work / f"{step.name}.csv"
    read = counters_of(file.read_text(errors="replace") if file.exists() else "")
    result = found(check, step, done) | {"kernels": read}
    if not read and result["status"] in ("passed", "failed"):
        result |= {"status": "not available", "output": done.output[-2000:]}
    return result


def counters_of(text: str) -> list[dict[str, Any]]:
    """Kernels and their metrics from what `ncu --csv --page details` prints, between lines of its own."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name"):
            kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"][:120], "metrics": {}})
            metric = (
                f"{row['Metric Name']} ({row['Metric Unit']})" if row["Metric Unit"] else row["Metric Name"]
            )
            kernel["metrics"][metric] = row["Metric Value"]
    return list(kernels.values())


def validation(check: Check, step: Step, done: Done) -> Result:
    """The page holds the figures."""
    directory = check.out / "validation"
    for figure in (*directory.glob("*.png"), *directory.glob("*.svg")):
        figure.unlink()
    return verdict(check, step, done)


PHASES = ("setup", "smoke", "correctness", "speed", "tuning", "rivals", "evidence")
CALLS = (("smoke", "correctness"), ("speed",), ("tuning",), ("rivals", "evidence"))
"""The phases of each call, those first that are worth most where GPU time is short."""

CALL_SECONDS = 400.0

PYTHON = (sys.executable,)
PYTEST = (
    *(*PYTHON, "-m", "pytest", "-p", "gpu.records", "-p", "no:cacheprovider", "--rootdir", "{root}"),
    *("-c", "{root}/pyproject.toml", "--tb=short", "-rfE", "--continue-on-collection-errors"),
    *("--records", "{work}/{name}.jsonl", "--stop-after", "{seconds}"),
)
BENCHMARK = ("--benchmark-quiet", "--benchmark-json")
IN_PROCESS = (
    *(*PYTHON, "{root}/benchmarks/gpu/steps.py", "--device", "{device}", "--out", "{work}/{name}.json"),
    *("--seconds", "{seconds}"),
)
MEMCHECK = (
    *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),  # so that a step beyond a tensor is seen
    *("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86"),
)
NCU = (
    *("env", "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"),
    *(
        word
        for section in (
            *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats"),
            *("Occupancy", "SchedulerStats", "WarpStateStats"),
        )
        for word in ("--section", section)
    ),
    *("--log-file", "{work}/{name}.csv"),
)
ESM_PACKED = (*PYTHON, "-m", "esm_packed")
TUNE = (*ESM_PACKED, "tune", "--time-limit", "{seconds}", "-o", "{out}/tuned.json")

PARTS = 6
"""Processes the interpreter's tests are divided among: most of their time is Triton's compiler."""

OF_650M = ("--model", "random:esm2_t33_650M_UR50D")
OTHER_SIZES = ("--model", "random:esm2_t30_150M_UR50D,random:esm2_t36_3B_UR50D")
NEARLY_TWO_PACKS = ("--tokens", "66528")
"""Of 33,792 tokens, as 132 multiprocessors have them: a little more would make a third pack."""


def gpu_tests(name: str, file: str, select: str = "", on_cpu: tuple[str, ...] | None = None) -> Step:
    """Tests of `tests/gpu`, chosen by file and by `-k`."""
    chosen = ("-k", select) if select else ()
    words = (*PYTEST, f"tests/gpu/test_gpu_{file}.py", "-m", "gpu", *chosen)
    return Step(name, "correctness", words, outcomes_of_tests, on_cpu=on_cpu)


def suite(phase: str, name: str, file: str, seconds: float, *options: str) -> Step:
    """A suite of `pytest benchmarks` into NAME.json, whole also when the time is up."""
    words = (*PYTEST, f"benchmarks/bench_{file}.py", *BENCHMARK, f"{{out}}/{name}.json")
    small = ("--blocks", "1", "--tokens", "200", "--workload", "short50", "--threads", "1")
    return Step(name, phase, words, outcomes_of_tests, seconds, options, on_cpu=small)


STEPS = (
    Step("machine", "setup", (), machine, 5, on_cpu=()),
    Step("install", "setup", (), install, 15, on_cpu=()),
    Step("torch", "setup", (*IN_PROCESS, "machine"), torch_machine, 15, on_cpu=()),
    Step("forward", "smoke", (*IN_PROCESS, "forward"), found, 40, on_cpu=()),
    # Those that take longest come first.
    Step("memory_checker", "correctness", (*MEMCHECK, *IN_PROCESS, "every_launcher"), memory_errors),
    *(
        # They run in Triton's interpreter on a CPU, and in truth on a GPU.
        Step(
            f"interpreter_tests_{part}",
            "correctness",
            (
                *(*PYTEST, "-m", "not slow", "--part", f"{part}/{PARTS}"),
                *(f"tests/kernels/test_{file}.py" for file in ("triton_kernels", "operations", "gelu")),
            ),
            outcomes_of_tests,
        )
        for part in range(PARTS)
    ),
    gpu_tests("model", "model", on_cpu=()),
    gpu_tests("runner", "runner"),
    gpu_tests("reproducible", "reproducible"),
    *(
        gpu_tests(f"kernels_{size}", "kernels", f"test_fp64_reference_at_real_sizes and {size}")
        for size in ("650M", "3B", "8M")
    ),
    gpu_tests("launches", "kernels", "test_launcher"),
    gpu_tests("graphs", "kernels", "test_graph_replay"),
    gpu_tests("compiled", "kernels", "test_compiled_layer"),
    gpu_tests("offsets", "kernels", "test_offsets"),
    gpu_tests("tf32_and_nan", "kernels", "test_tf32 or test_nan", on_cpu=()),
    Step("matmuls", "speed", (*IN_PROCESS, "matmuls"), found, 20, on_cpu=()),
    Step("budgets", "speed", (*IN_PROCESS, "budgets"), found, 40, on_cpu=()),
    Step(
        "kernel_benchmarks",
        "speed",
        (*PYTEST, "benchmarks/bench_kernels.py", *BENCHMARK, "{out}/benchmark.json"),
        benchmark_records,
        100,
        ("--blocks", "2"),
        on_cpu=("--blocks", "1"),
    ),
    Step("counters", "speed", (*NCU, *IN_PROCESS, "counted_launches"), hardware_counters, 40),
    Step("model_speed", "speed", (*IN_PROCESS, "model_speed"), found, 40, on_cpu=()),
    suite("speed", "reproducible_cost", "model", 30, "-k", "test_reproducible", "--blocks", "2"),
    suite(
        *("speed", "forward_passes", "model", 80, "-k", "test_model or test_transfer", "--blocks", "2"),
        *(*OF_650M, *NEARLY_TWO_PACKS),
    ),
    Step("tuning_650M", "tuning", (*TUNE, "--model", "esm2_t33_650M_UR50D"), verdict, 150),
    Step("tuning_others", "tuning", TUNE, verdict, 150),
    Step(
        "tuned_forward",
        "tuning",
        (*IN_PROCESS, "tuned_forward", "--tuned", "{out}/tuned.json"),
        found,
        40,
    ),
    suite("rivals", "peers", "peers", 100, "--blocks", "2", *OF_650M, *NEARLY_TWO_PACKS),
    suite(
        *("rivals", "end_to_end", "end_to_end", 45, "--blocks", "2", *OF_650M, "--tokens", "1000000"),
        *("--dtype", "fp16", "--workload", "uniref"),
    ),
    suite("rivals", "attention", "attention", 40, "--blocks", "2", *NEARLY_TWO_PACKS),
    suite(
        *("evidence", "model_sizes", "model", 50, "-k", "test_model", "--blocks", "2", *OTHER_SIZES),
        *("--dtype", "fp16", "--workload", "uniref", *NEARLY_TWO_PACKS),
    ),
    Step(
        *("stress_files", "evidence", ("env", "-C", "{work}", *IN_PROCESS, "stress_files"), found, 25),
        on_cpu=(),
    ),
    Step(
        "validation",
        "evidence",
        (
            *(*ESM_PACKED, "validate", "{work}/esm2_stress.pt", "{work}/uniref.fasta", "--overwrite"),
            *("-o", "{out}/validation", "--device", "{device}"),
        ),
        validation,
        60,
        on_cpu=(),
    ),
    Step("memory", "evidence", (*IN_PROCESS, "memory"), found, 30, on_cpu=()),
)
SUITES = [step.name for step in STEPS if step.read is outcomes_of_tests and step.phase in PHASES[3:]]
