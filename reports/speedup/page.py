"""The speedup report: one HTML page that needs no other file, Markdown, CSV, figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from esm_packed.reports.page import (
    Drawing,
    Notice,
    ReportError,
    Section,
    check_matplotlib,
    figure_files,
    write_page,
)
from esm_packed.reports.speedup import figures
from esm_packed.reports.speedup.results import (
    MIN_BLOCKS,
    Measurement,
    Results,
    Speedup,
    achieved,
    changes,
    combined_comparisons,
    in_order,
    layout_comparisons,
    precision_comparisons,
    read_results,
    reproducible_comparisons,
    scaling_series,
)
from esm_packed.reports.speedup.tables import (
    EXPECTED,
    changes_table,
    comparison_table,
    conditions_table,
    end_to_end_table,
    forward_table,
    kernels_table,
    machine_name,
    measurements_table,
    not_run_table,
    other_table,
    packing_table,
    rivals_table,
    scaling_table,
    times_text,
)

TITLE = "esm-packed: speed"
SUITES_SHOWN = (
    "model",
    "reproducible",
    "peers",
    "kernels",
    "attention",
    "packing",
    "end_to_end",
)


def report_files(folder: Path) -> list[Path]:
    """What `write_report` may write to `folder`."""
    pages = [folder / name for name in ("speedup.html", "speedup.md", "measurements.csv")]
    return [*pages, *figure_files(folder)]


def write_report(path: Path, older: Sequence[Path], folder: Path) -> list[str]:
    """Write `speedup.html`, `speedup.md`, `measurements.csv` and the figures into `folder`, made if need be.

    Args:
        path: result file of `pytest benchmarks --benchmark-json`.
        older: result files that it is compared with.
        folder: where files of these names are replaced.

    Returns:
        Lines for the terminal.

    Raises:
        ReportError: a file is no result file, the folder cannot be written, or matplotlib is missing.
    """
    check_matplotlib()
    results = read_results(path)
    before = [read_results(other) for other in older]
    try:
        sections = list(_sections(results, before))
        folder.mkdir(parents=True, exist_ok=True)
        page = write_page(TITLE, sections, folder, "speedup")
        (folder / "measurements.csv").write_text(measurements_table(results).csv(), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{error.filename or folder}: {error.strerror}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ReportError(
            f"{path}: a record lacks what the report needs ({type(error).__name__}: {error}); write the file "
            "anew with this version's benchmarks"
        ) from error
    return [*_headlines(results), f"report written to {page}"]


def _headlines(results: Results) -> Iterator[str]:
    """The totals over all lengths, and what makes them doubtful."""
    for comparison in _comparisons(results):
        if comparison.workload == "all":
            times = times_text(comparison.times)
            mark = comparison.against_expectation if results.on_gpu else ""
            expected = f" ({EXPECTED}: {mark})" if mark else ""
            yield f"{comparison.model}: {comparison.what}: {times} as fast, all lengths{expected}"
    if results.is_overloaded:
        yield f"warning: {_load_text(results)}"


def _load_text(results: Results) -> str:
    return (
        f"The load of the machine reached {results.load:.1f} on {results.cores} cores: other processes "
        "competed for them. Times are too long and ratios uncertain; measure again on an idle machine."
    )


def _shares_text(shares: Iterable[float | None]) -> str:
    """An explanation where a share is above 100%."""
    if all(share is None or share <= 1 for share in shares):
        return ""
    return (
        " A share above 100%: the rate it refers to was measured while the machine was busier, or the data "
        "stay in a cache, for which the copy that gives the rate is too large."
    )


def _share_of_ceiling(kernel: Measurement) -> float:
    return achieved(kernel) / float(kernel.info["ceiling_per_second"])


def _comparisons(results: Results) -> list[Speedup]:
    return [*precision_comparisons(results), *layout_comparisons(results), *combined_comparisons(results)]


def _sections(results: Results, older: Sequence[Results]) -> Iterator[Section]:
    """The parts for which there are measurements."""
    if results.is_overloaded:
        yield Section("", [Notice(_load_text(results))])
    yield Section(
        "Conditions",
        [
            f"{machine_name(results)}. Times are medians over all rounds of all blocks, with the 20th "
            f"and 80th percentile if there are {MIN_BLOCKS} blocks; variants took turns, block by block, and "
            "ratios are formed within a block. Tokens are useful ones: BOS, residues, EOS, never padding.",
            conditions_table(results),
        ],
    )
    yield from _precision_section(results)
    yield from _forward_sections(results)
    yield from _kernel_sections(results)
    yield from _run_sections(results)
    every = results.measurements.values()
    if others := [m for m in every if m.suite not in SUITES_SHOWN and m.info.get("workers") is None]:
        yield Section("Other benchmarks", ["Times of what has no section of its own.", other_table(others)])
    for number, other in enumerate(older, 1):
        yield _change_section(results, other, f"change-{number}")
    if results.not_run:
        yield Section("Not run", ["What could not run, with the reason.", not_run_table(results)])


def _precision_section(results: Results) -> Iterator[Section]:
    on_gpu = results.on_gpu
    if comparisons := _comparisons(results):
        kinds = {
            "other precisions over FP32": [*precision_comparisons(results), *combined_comparisons(results)],
            "packed over padded": layout_comparisons(results),
        }
        yield Section(
            "Precision, and packed against padded",
            [
                "Times of whole forward passes over the same proteins. The last line of a group is the total "
                "over all length classes, each scaled to the same number of tokens. Padded batches are "
                "sorted by length, as fair-esm's esm-extract makes them, unless it says in input order. "
                "Fewer operations: how many times as many floating-point operations, padding and attention "
                "included, the slower side computes.",
                Drawing(
                    "speedups",
                    "Precision, and packed against padded",
                    lambda: figures.speedups(kinds, expected=on_gpu),
                ),
                comparison_table(comparisons, expected=on_gpu),
            ],
        )


def _forward_sections(results: Results) -> Iterator[Section]:
    if forward := results.suite("model"):
        shares = [m.share(name) for m in forward for name in ("mfu_measured", "share_of_floor")]
        yield Section(
            "Every forward pass",
            [
                "MFU is the model's floating-point operations on useful tokens over time, as a share of the "
                "matrix-multiplication rate measured in the same run, and of the datasheet's where that is "
                "known. The floor is the time of these operations and of the bytes that must move, at the "
                "rates measured in the same run. Errors are of mean embeddings, to FP64."
                + _shares_text(shares),
                Drawing("forward", "Every forward pass", lambda: figures.forward_times(results)),
                forward_table(results),
            ],
        )
    if comparisons := reproducible_comparisons(results):
        yield Section(
            "Reproducible mode",
            [
                "Packs filled up to one size, so that an embedding has the same bits in any company. The "
                "time includes the padding that fills them.",
                comparison_table(comparisons),
            ],
        )
    if results.suite("peers"):
        yield Section(
            "Beside other packages",
            [
                "Same weights, same proteins, each held against FP64 before it was timed. Colours are "
                "precisions, others than esm-packed are hatched. Floors are what no arrangement of the model "
                "does without.",
                Drawing("rivals", "Beside other packages", lambda: figures.rivals(results)),
                rivals_table(results),
            ],
        )


def _kernel_sections(results: Results) -> Iterator[Section]:
    on_gpu = results.on_gpu
    if kernels := results.suite("kernels"):
        trial = (
            "" if on_gpu else " This is a CPU: tiny sizes of plain PyTorch, which show that the code runs."
        )
        yield Section(
            "Kernels",
            [
                "Achieved rates over what the same machine reached in a copy or a matrix multiplication."
                + trial
                + _shares_text(map(_share_of_ceiling, kernels)),
                Drawing("roofline", "Kernels", lambda: figures.roofline(results)) if on_gpu else "",
                kernels_table(kernels),
            ],
        )
    if attention := results.suite("attention"):
        yield Section(
            "Attention",
            [
                "Every backend that serves here, over every distribution of lengths; floating-point "
                "operations are those within sequences." + _shares_text(map(_share_of_ceiling, attention)),
                Drawing("attention", "Attention", lambda: figures.attention(results)),
                kernels_table(in_order(attention)),
            ],
        )


def _run_sections(results: Results) -> Iterator[Section]:
    if results.suite("packing"):
        yield Section(
            "Packing",
            [
                "What padded batches compute in vain, and what packs leave of their budget, which costs "
                "nothing but another pack. Sorting a whole database leaves hardly anything to pad; a small "
                "file, or batches in the order of the input, leave much.",
                Drawing("packing", "Packing", lambda: figures.padding(results)),
                packing_table(results),
            ],
        )
    if end_to_end := results.suite("end_to_end"):
        yield Section(
            "From FASTA to HDF5",
            [
                "The whole run with the model read from a file. Stages of the pipeline may overlap; other is "
                "the time outside it: loading the model, indexing, planning, putting the output together."
                + _shares_text(m.share("mfu_measured") for m in end_to_end),
                Drawing("stages", "From FASTA to HDF5", lambda: figures.stages(results)),
                end_to_end_table(results),
            ],
        )
    if scaling_series(results):
        yield Section(
            "Workers",
            [
                "Throughput by number of workers. Ray hands out whole shards: a run of seconds has too few "
                "of them to show more than that it works.",
                Drawing("scaling", "Workers", lambda: figures.scaling(results)),
                scaling_table(results),
            ],
        )


def _change_section(results: Results, older: Results, name: str) -> Section:
    found = changes(results, older)
    common = len(results.measurements.keys() & older.measurements.keys())
    commit = older.machine.get("git_commit") or "unknown commit"
    text = f"{older.path.name}: {older.date or 'unknown date'}, {commit}, {machine_name(older)}. "
    if common > len(found):
        text += f"{common - len(found)} benchmarks in both files did other work (tokens, sequences) there. "
    if not found:
        text += "None can be compared." if common else "It holds none of these benchmarks."
        return Section(f"Change against {older.path.name}", [text])
    slower = sum(change.mark == "slower" for change in found)
    faster = sum(change.mark == "faster" for change in found)
    text += (
        f"Of {len(found)} benchmarks that did the same work {slower} became slower and {faster} faster "
        "beyond the spread: the gap between the ranges of their blocks' medians is wider than these ranges."
    )
    if machine_name(older) != machine_name(results):
        text += " The machines differ: this compares them, too."
    return Section(
        f"Change against {older.path.name}",
        [
            text,
            Drawing(name, f"Change against {older.path.name}", lambda: figures.change(found)),
            changes_table(found),
        ],
    )
