"""Everything that needs a GPU, in four calls with a time limit: `python benchmarks/gpu/check.py --out DIR`.

The first call runs the default model and its profile, then tests of correctness side by side. The others are
asked for by name, and run one command after the other: `--phases speed`, `--phases tuning`, and
`--phases rivals evidence`. Whatever happens to a command of `commands.STEPS` is recorded in
DIR/gpu_check.json, and the rest goes on.
These files need the standard library alone: the package is installed from the working tree into a temporary
directory.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType

from commands import CALL_SECONDS, CALLS, PHASES, STEPS, SUITES, Step
from process import CLOSING_SECONDS, Check, Done, Result, num_cpus
from summary import summary_lines

LEAST_SECONDS = 5.0
MOST_RESERVED = 0.7


def run_step(check: Check, step: Step, until: float) -> None:
    """Run one step until `until`, and record how it went."""
    start = time.monotonic()
    try:
        if step.on_cpu is None and check.device != "cuda":
            result: Result = {"status": "skipped", "reason": "needs a CUDA device"}
        elif step.phase != "setup" and check.report["steps"]["torch"]["status"] == "failed":
            result = {"status": "skipped", "reason": "torch does not work here, or sees no GPU"}
        elif until - start < LEAST_SECONDS:
            result = {"status": "no time left"}
        else:
            command = step.command(check, until - start)
            done = check.run(step.name, command, until - start) if command else Done(0, "", False)
            result = step.read(check, step, done)
    except Exception:
        result = {"status": "error", "output": traceback.format_exc()[-3000:]}
    seconds = round(time.monotonic() - start, 1)
    ordered = {"status": result.pop("status"), "seconds": seconds} | result
    check.report["steps"][step.name] = ordered
    check.save()
    counts = " ".join(f"{count} {outcome}" for outcome, count in ordered.get("counts", {}).items())
    print(f"{step.name:20}{ordered['status']:15}{seconds:7.1f} s  {counts}", flush=True)


def run_phase(check: Check, phase: str, steps: Sequence[Step], reserved: float) -> None:
    """Steps of one phase; `reserved` seconds belong to later ones."""
    end = check.deadline - CLOSING_SECONDS
    if phase == "correctness":
        threads = ThreadPoolExecutor(check.jobs)
        try:
            list(threads.map(lambda step: run_step(check, step, end - reserved), steps))
        except BaseException:
            check.stop_all()
            threads.shutdown(cancel_futures=True)
            raise
        threads.shutdown()
        return
    for number, step in enumerate(steps):
        later = sum(other.seconds for other in steps[number + 1 :])
        # Without the setup there is nothing to keep time for.
        run_step(check, step, end if phase == "setup" else end - reserved - later)


def fit_reservations(steps: Sequence[Step], seconds: float) -> list[Step]:
    """The steps, with time-outs shortened so that together they fit into most of `seconds`."""
    kept = sum(step.seconds for step in steps)
    scale = min(1.0, MOST_RESERVED * seconds / kept) if kept else 1.0
    return [replace(step, seconds=step.seconds * scale) for step in steps]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument(
        "--time-limit", type=float, default=CALL_SECONDS, help="seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES[1:], default=CALLS[0], help="default: %(default)s"
    )
    parser.add_argument("--steps", nargs="+", choices=[s.name for s in STEPS], help="only these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: for trying it out")
    parser.add_argument("--jobs", type=int, help="correctness steps side by side")
    parser.add_argument("--commit", help="what the working tree is, where git cannot say")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", *(f"{name}.json" for name in ("gpu_check", "benchmark", "tuned", *SUITES))):
        (arguments.out / name).unlink(missing_ok=True)
    jobs = arguments.jobs or (1 if arguments.device == "cpu" else max(1, min(14, num_cpus() - 2)))

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
        wanted = arguments.steps or [s.name for s in STEPS if s.phase in arguments.phases]
        chosen = [s for s in STEPS if s.name in wanted]
        chosen = [s for s in STEPS if s.phase == "setup" or s in chosen]
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
    statuses = {step["status"] for step in check.report["steps"].values()}
    unfinished = {"failed", "error", "timeout", "incomplete", "no time left"}
    return 1 if statuses & unfinished or "interrupted" in check.report else 0


if __name__ == "__main__":
    sys.exit(main())
