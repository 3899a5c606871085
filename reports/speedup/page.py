"""The speedup report: a self-contained HTML page, Markdown, CSV, figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from esm_packed.reports.page import (
    Drawing,
    Folded,
    Notice,
    ReportError,
    Section,
    Table,
    check_matplotlib,
    figure_files,
    write_page,
)
from esm_packed.reports.speedup import figures
from esm_packed.reports.speedup.answer import answer
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
MIN_PROTEINS = 30
"""Fewer beside other packages are called a small trial."""

MOST_ROWS = 20
"""Of a table below a figure; longer ones are folded."""

SUITES_SHOWN = (
    "model",
    "reproducible",
    "peers",
    "kernels",
    "attention",
    "packing",
    "end_to_end",
)


def report_files(directory: Path) -> list[Path]:
    """Files that `write_report` may replace in `directory`."""
    pages = [directory / name for name in ("speedup.html", "speedup.md", "measurements.csv")]
    return [*pages, *figure_files(directory)]


def write_report(path: Path, older: Sequence[Path], directory: Path) -> list[str]:
    """Write `speedup.html`, `speedup.md`, `measurements.csv` and the figures into `directory`.

    Args:
        path: result file of `pytest benchmarks --benchmark-json`.
        older: result files to compare it with.
        directory: made if missing; files of these names in it are replaced.

    Returns:
        Lines for the terminal.

    Raises:
        ReportError: a file is not a result file, the directory cannot be written, or matplotlib is missing.
    """
    check_matplotlib()
    results = read_results(path)
    before = [read_results(other) for other in older]
    try:
        sections = list(_sections(results, before))
        directory.mkdir(parents=True, exist_ok=True)
        page = write_page(TITLE, sections, directory, "speedup")
        (directory / "measurements.csv").write_text(measurements_table(results).csv(), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{error.filename or directory}: {error.strerror}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ReportError(
            f"{path}: a record lacks what the report needs ({type(error).__name__}: {error}); rerun the "
            "benchmarks with this version"
        ) from error
    return [*_headlines(results), f"report written to {page}"]


def _headlines(results: Results) -> Iterator[str]:
    """Totals over all lengths, and a warning if they are doubtful."""
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
        "competed for them. Times are too long and ratios are uncertain; measure again on an idle machine."
    )


def _shares_text(shares: Iterable[float | None]) -> str:
    """An explanation where a share is above 100%."""
    if all(share is None or share <= 1 for share in shares):
        return ""
    return (
        " A share above 100% means that the reference rate was measured while the machine was busier, or "
        "that the data fit into a cache and the copy that gives the reference rate does not."
    )


def _folded_if_long(table: Table) -> Table | Folded:
    return table if len(table.rows) <= MOST_ROWS else Folded(f"All {len(table.rows)} rows", [table])


def _share_of_ceiling(kernel: Measurement) -> float:
    return achieved(kernel) / float(kernel.info["ceiling_per_second"])


def _comparisons(results: Results) -> list[Speedup]:
    return [*precision_comparisons(results), *layout_comparisons(results), *combined_comparisons(results)]


def _sections(results: Results, older: Sequence[Results]) -> Iterator[Section]:
    """What was measured: the answer first, the conditions last."""
    yield Section(
        "",
        [
            Notice(_load_text(results)) if results.is_overloaded else "",
            answer(results),
            Drawing("rivals", "Tokens per second of each contender", lambda: figures.rivals(results))
            if results.suite("peers")
            else "",
        ],
    )
    yield from _rivals_section(results)
    yield from _precision_section(results)
    yield from _forward_sections(results)
    yield from _kernel_sections(results)
    yield from _run_sections(results)
    every = results.measurements.values()
    if others := [m for m in every if m.suite not in SUITES_SHOWN and m.info.get("workers") is None]:
        yield Section("Other benchmarks", ["Benchmarks without a section of their own.", other_table(others)])
    for number, other in enumerate(older, 1):
        yield _change_section(results, other, f"change-{number}")
    if results.not_run:
        yield Section("Not run", ["Benchmarks that could not run, with the reason.", not_run_table(results)])
    yield Section(
        "Conditions",
        [
            f"{machine_name(results)}. Times are medians over all rounds of all blocks, with the 20th and "
            f"80th percentile if there are at least {MIN_BLOCKS} blocks. Variants took turns, block by "
            "block; a ratio is formed within a block, and its median and range over the blocks are given. "
            "Tokens are useful tokens: BOS, residues and EOS, never padding.",
            conditions_table(results),
        ],
    )


def _rivals_section(results: Results) -> Iterator[Section]:
    if peers := results.suite("peers"):
        few = min(m.info["sequences"] for m in peers)
        small = (
            f" This is a small trial of {few} proteins: sorted batches of so few hold more padding than "
            "those of a real file, which favors packing."
        )
        yield Section(
            "Compared with other packages",
            [
                "All contenders use the same weights and proteins, and each was compared with FP64 before it "
                "was timed. In the figure colors are precisions, and bars of other packages are hatched. "
                "Floors are the parts of the work that no implementation avoids."
                + (small if few < MIN_PROTEINS else ""),
                rivals_table(results),
            ],
        )


def _precision_section(results: Results) -> Iterator[Section]:
    on_gpu = results.on_gpu
    if comparisons := _comparisons(results):
        kinds = {
            figures.OVER_FP32: [*precision_comparisons(results), *combined_comparisons(results)],
            figures.PACKED_OVER_PADDED: layout_comparisons(results),
        }
        yield Section(
            "Precision and packing",
            [
                "Times of whole forward passes over the same proteins. The last row of a group is the total "
                "over all length classes, each scaled to the same number of tokens. Padded batches are "
                "sorted by length, as in fair-esm's esm-extract, unless they are in input order. Fewer "
                "operations: floating-point operations of the first variant, including padding and "
                "attention, divided by those of the second.",
                Drawing(
                    "speedups",
                    "Speedup of other precisions over FP32, and of packed over padded batches",
                    lambda: figures.speedups(kinds, expected=on_gpu),
                ),
                _folded_if_long(comparison_table(comparisons, expected=on_gpu)),
            ],
        )


def _forward_sections(results: Results) -> Iterator[Section]:
    if forward := results.suite("model"):
        shares = [m.share(name) for m in forward for name in ("mfu_measured", "share_of_floor")]
        yield Section(
            "Every forward pass",
            [
                "MFU is the rate of the model's floating-point operations on useful tokens, as a share of "
                "the matrix-multiplication rate measured in the same run, and of the datasheet rate where it "
                "is known. The floor is the time of these operations and of the bytes that must move, at the "
                "rates measured in the same run. Errors are those of mean embeddings compared with FP64."
                + _shares_text(shares),
                Drawing("forward", "Times of forward passes", lambda: figures.forward_times(results)),
                _folded_if_long(forward_table(results)),
            ],
        )
    if comparisons := reproducible_comparisons(results):
        yield Section(
            "Reproducible mode",
            [
                "Packs are filled up to one size, so that an embedding is bit-identical regardless of batch "
                "contents. The time includes the tokens that fill them.",
                comparison_table(comparisons),
            ],
        )


def _kernel_sections(results: Results) -> Iterator[Section]:
    on_gpu = results.on_gpu
    if kernels := results.suite("kernels"):
        text = (
            "Achieved rates, and their share of the copy or matrix-multiplication rate of the same machine."
        )
        table = kernels_table(kernels)
        yield Section(
            "Kernels",
            [
                text + _shares_text(map(_share_of_ceiling, kernels)),
                *(
                    [
                        Drawing("roofline", "Rooflines of the kernels", lambda: figures.roofline(results)),
                        _folded_if_long(table),
                    ]
                    if on_gpu
                    else [
                        Folded(
                            f"{len(table.rows)} operations on a CPU: small sizes of plain PyTorch, which "
                            "only show that the code runs",
                            [table],
                        )
                    ]
                ),
            ],
        )
    if attention := results.suite("attention"):
        yield Section(
            "Attention",
            [
                "Every attention backend that is available here, over every length distribution. "
                "Floating-point operations are those within sequences."
                + _shares_text(map(_share_of_ceiling, attention)),
                Drawing(
                    "attention",
                    "Rates of the attention backends by lengths",
                    lambda: figures.attention(results),
                ),
                _folded_if_long(kernels_table(in_order(attention))),
            ],
        )


def _run_sections(results: Results) -> Iterator[Section]:
    if results.suite("packing"):
        yield Section(
            "Packing",
            [
                "Padding among the tokens that padded batches compute, and the unused part of the budget of "
                "packs, which costs no computation. A sorted database needs almost no padding; a small file, "
                "or batches in input order, need much.",
                Drawing(
                    "packing", "Padding, and budget left unused by packs", lambda: figures.padding(results)
                ),
                _folded_if_long(packing_table(results)),
            ],
        )
    if end_to_end := results.suite("end_to_end"):
        yield Section(
            "From FASTA to HDF5",
            [
                "Complete runs, with the model read from a file. Stages of the pipeline may overlap; other "
                "is the time outside it: loading the model, indexing, planning, merging the output."
                + _shares_text(m.share("mfu_measured") for m in end_to_end),
                Drawing("stages", "Time from FASTA to HDF5 by stage", lambda: figures.stages(results)),
                end_to_end_table(results),
            ],
        )
    if scaling_series(results):
        yield Section(
            "Workers",
            [
                "Throughput by number of workers. Ray distributes whole shards; a run of a few seconds has "
                "too few of them to measure scaling.",
                Drawing("scaling", "Throughput by number of workers", lambda: figures.scaling(results)),
                scaling_table(results),
            ],
        )


def _change_section(results: Results, older: Results, name: str) -> Section:
    found = changes(results, older)
    common = len(results.measurements.keys() & older.measurements.keys())
    commit = older.machine.get("git_commit") or "unknown commit"
    text = f"{older.path.name}: {older.date or 'unknown date'}, {commit}, {machine_name(older)}. "
    if common > len(found):
        text += f"{common - len(found)} benchmarks in both files did other work (tokens, sequences). "
    if not found:
        text += "None can be compared." if common else "It has none of these benchmarks."
        return Section(f"Changes since {older.path.name}", [text])
    slower = sum(change.mark == "slower" for change in found)
    faster = sum(change.mark == "faster" for change in found)
    text += (
        f"Of {len(found)} benchmarks that did the same work, {slower} became slower and {faster} became "
        "faster: the gap between the ranges of their block medians is wider than either range."
    )
    if machine_name(older) != machine_name(results):
        text += " The machines differ, so this compares the machines as well."
    return Section(
        f"Changes since {older.path.name}",
        [
            text,
            Drawing(name, f"Changes since {older.path.name}", lambda: figures.change(found)),
            _folded_if_long(changes_table(found)),
        ],
    )
