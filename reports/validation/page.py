"""The precision-validation report: page, tables and terminal summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from esm_packed.reports.page import Badge, Drawing, Notice, Section, Table, figure_files, write_page
from esm_packed.reports.validation.activations import FP16_MAX, OPERATIONS
from esm_packed.reports.validation.errors import PathResult, finite_max, finite_median, finite_min
from esm_packed.reports.validation.figures import FIGURES
from esm_packed.reports.validation.numbers import as_json, proteins_table
from esm_packed.reports.validation.run import Validation, by_length_class
from esm_packed.reports.validation.thresholds import (
    DERIVED_FROM,
    ERRORS_OF_MISTAKES,
    ERRORS_OF_THE_CORRECT_MODEL,
    THRESHOLDS,
)
from esm_packed.reports.validation.verdict import CLASSICAL_NOTE, Verdict

WORST_SHOWN = 10

_NONFINITE_NOTE = (
    "Embeddings with NaN or Inf fail here. `esm-packed embed` detects them, recomputes them in FP32 "
    "and marks them in the row's `status`."
)


def write_report(validation: Validation, conditions: Mapping[str, str], directory: Path) -> list[Path]:
    """Write the page as HTML and Markdown, the numbers as JSON and CSV, the figures as PNG and SVG.

    Args:
        validation: results.
        conditions: input and command, name to value.
        directory: an existing directory; the files of `report_files` in it are replaced.

    Returns:
        Paths of the HTML, Markdown, JSON and CSV files.

    Raises:
        ImportError: matplotlib is not installed (`page.check_matplotlib` gives a clear message).
    """
    numbers = directory / "validation.json"
    numbers.write_text(json.dumps(as_json(validation, conditions), allow_nan=False), encoding="ascii")
    (directory / "validation.csv").write_text(proteins_table(validation).csv(), encoding="utf-8")
    title = f"Precision validation of {validation.checkpoint.model_name}"
    write_page(title, sections(validation, conditions), directory, "validation")
    return _pages(directory)


def report_files(directory: Path) -> list[Path]:
    """Files that `write_report` may replace in `directory`, the page first."""
    return [*_pages(directory), *figure_files(directory)]


def _pages(directory: Path) -> list[Path]:
    return [directory / f"validation.{suffix}" for suffix in ("html", "md", "json", "csv")]


def summary_lines(validation: Validation) -> list[str]:
    """Verdict on each mode, for a terminal."""
    lines = [
        f"{'mode':<6}{'verdict':<9}{'worst rel L2':>13}{'at most':>10}{'worst cosine':>14}"
        f"{'at least':>12}  where"
    ]
    for verdict in validation.verdicts:
        where = f"{validation.sequence_ids[verdict.worst_protein]} ({verdict.worst_path})"
        if verdict.num_nonfinite:
            where = f"NaN or Inf in {verdict.num_nonfinite:,} proteins, such as {where}"
        lines.append(
            f"{verdict.mode:<6}{'passed' if verdict.passed else 'FAILED':<9}"
            f"{_error(verdict.worst_relative_l2):>13}{verdict.threshold.relative_l2:>10g}"
            f"{_cosine(verdict.worst_cosine):>14}{_asked(verdict.threshold.cosine):>12}  {where}"
        )
    lines += [f"{mode:<6}{'not run':<9}{reason}" for mode, reason in validation.not_run if "," not in mode]
    if validation.weights_note:
        lines.append(f"note: {validation.weights_note}")
    return lines


def _error(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.2e}"


def _cosine(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{math.floor(value * 1e8) / 1e8:.8f}"


def _asked(cosine: float | None) -> str:
    return "" if cosine is None else repr(cosine)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def sections(validation: Validation, conditions: Mapping[str, str]) -> Iterator[Section]:
    """Contents of the page: the verdict first, the conditions last."""
    yield Section(
        "",
        [
            Notice(validation.verdict, _passed(validation.passed)),
            f"{len(validation.lengths):,} proteins, {sum(validation.lengths):,} residues, compared with "
            f"{_reference_text(validation)}.",
            Notice(validation.weights_note) if validation.weights_note else "",
        ],
    )
    yield Section(
        "Verdict",
        [
            _verdict_table(validation),
            "A mode passes when the mean embedding of every protein is within the thresholds on every path. "
            + CLASSICAL_NOTE,
            _NONFINITE_NOTE if any(verdict.num_nonfinite for verdict in validation.verdicts) else "",
            _drawing("errors", validation),
        ],
    )
    yield _thresholds_section()
    yield from _error_sections(validation)
    yield Section(
        "Range of activations",
        [
            _drawing("activations", validation),
            _activations_table(validation),
            "Activations of the FP64 path, over all tokens. Headroom is the FP16 maximum, 65,504, divided by "
            "the largest magnitude; below 1, FP16 overflows. The residual stream is never FP16; the mode "
            "fp16 stores everything else in FP16. Below 6.1e-05 FP16 is subnormal and loses bits; below "
            "3e-08 it is 0.",
        ],
    )
    yield Section("Largest errors", [_worst_table(validation)])
    yield Section("Conditions", [_conditions_table(validation, conditions)])


def _thresholds_section() -> Section:
    fp32 = THRESHOLDS["fp32"].relative_l2
    smallest = min(ERRORS_OF_MISTAKES.values())
    correct = ERRORS_OF_THE_CORRECT_MODEL["fp32"]
    return Section(
        "How the default thresholds were derived",
        [
            "A threshold lies above the error of a correct model and below the error of a wrong one. The "
            f"table shows the worst relative L2 error of a mean embedding ({DERIVED_FROM}). The FP32 "
            f"threshold, {fp32:g}, is {fp32 / correct:.0f} times the error of the correct model, and the "
            f"smallest mistake is {smallest / fp32:.0f} times the threshold.",
            Table(
                ("model", "precision", "worst rel. L2", "threshold", "verdict"),
                [
                    *(
                        _derived_row("correct", mode, error)
                        for mode, error in ERRORS_OF_THE_CORRECT_MODEL.items()
                    ),
                    *(_derived_row(mistake, "fp32", error) for mistake, error in ERRORS_OF_MISTAKES.items()),
                ],
            ),
            "The FP16 and BF16 thresholds bound rounding; they are too wide to catch most mistakes by "
            "themselves. Mistakes are caught in FP32, which runs the same code. TF32 has the thresholds of "
            "FP16, whose mantissa is as long.",
        ],
    )


def _derived_row(model: str, mode: str, error: float) -> list[str]:
    threshold = THRESHOLDS[mode].relative_l2
    return [model, mode, f"{error:.1e}", f"{threshold:g}", Badge(_passed(error <= threshold))]


def _error_sections(validation: Validation) -> Iterator[Section]:
    last, in_each_layer = validation.reference.num_residues
    total = sum(validation.lengths)
    compared = "all" if last == total else f"{last:,} of {total:,}"
    paths_not_run = [(what, reason) for what, reason in validation.not_run if "," in what]
    yield Section(
        "Errors by path",
        [
            _paths_table(validation),
            "Relative L2 error and cosine of a protein's mean embedding, largest absolute error of a "
            f"component, and the same over its residues ({compared} residues compared); proteins with NaN or "
            "Inf in any layer; share of proteins whose nearest neighbor by cosine among these proteins is "
            f"that of the reference, and share of the {validation.paths[0].neighbors} nearest in common.",
            Table(("path", "", "reason"), _grouped(paths_not_run)) if paths_not_run else "",
        ],
    )
    yield Section(
        "Errors by layer",
        [
            _drawing("layers", validation),
            "Median (line) and maximum (upper edge) over the proteins. Layer 0 is the embedding, the last "
            f"layer is after the final LayerNorm. Residues: {in_each_layer:,} in each layer, evenly spaced "
            "in their proteins. NaN and Inf are left out.",
        ],
    )
    yield Section("Errors by length", [_drawing("lengths", validation), _length_table(validation)])


def _drawing(name: str, validation: Validation) -> Drawing:
    draw, caption = FIGURES[name]
    return Drawing(name, caption, partial(draw, validation))


def _conditions_table(validation: Validation, conditions: Mapping[str, str]) -> Table:
    checkpoint = validation.checkpoint
    return Table(
        ("", ""),
        [
            ("model", checkpoint.model_name),
            ("sha256", checkpoint.sha256),
            ("weights from", checkpoint.source),
            *conditions.items(),
            *validation.environment.items(),
            ("tokens in a pack", f"{validation.settings.token_budget:,}"),
        ],
    )


def _reference_text(validation: Validation) -> str:
    if validation.reference.name == "fair-esm":
        return "fair-esm 2.0.0 in FP64 (its softmax, too), each protein alone"
    return "our own path in FP64, using freshly loaded weights, one protein at a time"


def _passed(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _verdict_table(validation: Validation) -> Table:
    def row(verdict: Verdict) -> list[str]:
        return [
            verdict.mode,
            Badge(_passed(verdict.passed)),
            _error(verdict.worst_relative_l2),
            f"{verdict.threshold.relative_l2:g}",
            _cosine(verdict.worst_cosine),
            _asked(verdict.threshold.cosine),
            f"{verdict.num_failed:,}",
            f"{verdict.num_nonfinite:,}",
            "passes" if verdict.classical else "fails",
            f"{validation.sequence_ids[verdict.worst_protein][:40]} ({verdict.worst_path})",
        ]

    header = ["mode", "verdict", "worst rel. L2", "at most", "worst cosine", "at least", "proteins failed"]
    header += ["NaN or Inf", "classical test", "worst protein, or why not run"]
    not_run = [
        [mode, Badge("not run"), *[""] * (len(header) - 3), reason]
        for mode, reason in validation.not_run
        if "," not in mode
    ]
    return Table(header, [*map(row, validation.verdicts), *not_run])


def _paths_table(validation: Validation) -> Table:
    def row(path: PathResult) -> list[str]:
        return [
            path.mode,
            path.path,
            _error(finite_median(path.means.relative_l2)),
            _error(finite_max(path.means.relative_l2)),
            _cosine(finite_min(path.means.cosine)),
            _error(finite_max(path.means.max_error)),
            _error(finite_max(path.residues.relative_l2)),
            _cosine(finite_min(path.residues.cosine)),
            _error(finite_max(path.residues.max_error)),
            f"{int(path.nonfinite.any(0).sum()):,}",
            _share(path.top1),
            _share(path.top10),
        ]

    header = ["mode", "path", "median rel. L2", "max", "min cosine", "max error", "residues: max rel. L2"]
    header += [
        "min cosine",
        "max error",
        "NaN or Inf",
        "nearest",
        f"{validation.paths[0].neighbors} nearest",
    ]
    return Table(header, [*map(row, validation.paths)])


def _length_table(validation: Validation) -> Table:
    first = validation.first_paths
    rows = []
    for name, members in by_length_class(validation.lengths):
        row = [name, f"{len(members):,}"]
        for path in first:
            errors = path.means.relative_l2[members]
            row += [
                _error(finite_median(errors)),
                _error(finite_max(errors)),
                _error(finite_max(path.residues.relative_l2[members])),
            ]
        rows.append(row)
    header = ["residues", "proteins"]
    for path in first:
        header += [f"{path.mode} median", "max", "residues max"]
    return Table(header, rows)


def _activations_table(validation: Validation) -> Table:
    activations = validation.activations
    rows = []
    for operation in OPERATIONS:
        layers = list(activations.layers_of(operation))
        largest = {layer: activations.max_abs(operation, layer) or 0.0 for layer in layers}
        shares = {layer: activations.subnormal_share(operation, layer) or 0.0 for layer in layers}
        high = max(layers, key=lambda layer: largest[layer])
        low = max(layers, key=lambda layer: shares[layer])
        headroom = FP16_MAX / largest[high] if largest[high] else math.inf
        rows.append(
            [
                operation,
                f"{largest[high]:,.4g}",
                f"{high}",
                f"{headroom:,.3g}" + (" (overflows)" if headroom < 1 else ""),
                f"{100 * shares[low]:.2g}%",
                f"{low}",
            ]
        )
    header = ["operation", "largest magnitude", "in layer", "headroom", "largest subnormal share", "in layer"]
    return Table(header, rows)


def _worst_table(validation: Validation) -> Table:
    rows = []
    for path in validation.first_paths:
        errors = path.means.relative_l2
        order = torch.where(errors.isfinite(), errors, math.inf).argsort(descending=True, stable=True)
        for rank, protein in enumerate(order[:WORST_SHOWN].tolist()):
            rows.append(
                [
                    f"{path.mode}, {path.path}" if rank == 0 else "",
                    validation.sequence_ids[protein][:60],
                    f"{validation.lengths[protein]:,}",
                    _error(float(errors[protein])) if errors[protein].isfinite() else "NaN or Inf",
                    _cosine(float(path.means.cosine[protein])),
                ]
            )
    return Table(["mode and path", "protein", "residues", "rel. L2", "cosine"], rows)


def _grouped(not_run: Sequence[tuple[str, str]]) -> list[list[str]]:
    """One row for a path that several modes lack for the same reason."""
    modes: dict[tuple[str, str], list[str]] = {}
    for what, reason in not_run:
        mode, _, path = what.partition(", ")
        modes.setdefault((path, reason), []).append(mode)
    return [
        [f"{path} ({', '.join(names)})", Badge("not run"), reason] for (path, reason), names in modes.items()
    ]
