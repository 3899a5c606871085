"""Machine-readable numbers of a validation: JSON, and CSV with a line per protein."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from esm_packed.reports.page import Table
from esm_packed.reports.validation.activations import OPERATIONS, RESIDUAL
from esm_packed.reports.validation.errors import PathResult
from esm_packed.reports.validation.run import Validation

FORMAT_VERSION = 1


def as_json(validation: Validation, conditions: Mapping[str, str]) -> dict[str, Any]:
    """All numbers, NaN and infinity as None; proteins are in one order everywhere."""
    checkpoint, settings = validation.checkpoint, validation.settings
    activations = validation.activations
    last, layers = validation.reference.num_residues
    return {
        "verdict": validation.verdict,
        "format": "esm-packed validation",
        "format_version": FORMAT_VERSION,
        "passed": validation.passed,
        "model": {
            "name": checkpoint.model_name,
            "sha256": checkpoint.sha256,
            "source": checkpoint.source,
            "note": validation.weights_note,
            **asdict(checkpoint.config),
        },
        "conditions": dict(conditions),
        "environment": validation.environment,
        "token_budget": settings.token_budget,
        "reference": {
            "name": validation.reference.name,
            "residues_compared": last,
            "residues_compared_in_each_layer": layers,
        },
        "verdicts": [
            asdict(verdict) | {"worst_protein": validation.sequence_ids[verdict.worst_protein]}
            for verdict in validation.verdicts
        ],
        "not_run": [{"what": what, "reason": reason} for what, reason in validation.not_run],
        "proteins": {"sequence_ids": list(validation.sequence_ids), "lengths": list(validation.lengths)},
        "activations": {
            operation: [
                {
                    "layer": layer,
                    "max_abs": activations.max_abs(operation, layer),
                    "subnormal_share": activations.subnormal_share(operation, layer),
                }
                for layer in activations.layers_of(operation)
            ]
            for operation in (RESIDUAL, *OPERATIONS)
        },
        "paths": [_path_as_json(path) for path in validation.paths],
    }


def _path_as_json(path: PathResult) -> dict[str, Any]:
    return {
        "mode": path.mode,
        "layout": path.layout,
        "backend": path.backend,
        "means": {name: _numbers(values) for name, values in vars(path.means).items()},
        "residues": {name: _numbers(values) for name, values in vars(path.residues).items()},
        "mean_relative_l2_by_layer": [_numbers(row) for row in path.mean_by_layer],
        "residues_relative_l2_by_layer": [_numbers(row) for row in path.residues_by_layer],
        "first_nonfinite_layer": [
            int(column.int().argmax()) if column.any() else None for column in path.nonfinite.T
        ],
        "top1": path.top1,
        "top10": path.top10,
        "neighbors": path.neighbors,
    }


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [float(f"{value:.12g}") if math.isfinite(value) else None for value in values.tolist()]


def proteins_table(validation: Validation) -> Table:
    """A line for each protein and path: the errors of its mean embedding and of its residues."""
    measures = ("relative_l2", "cosine", "max_error")
    rows = [
        [
            sequence_id,
            str(length),
            path.mode,
            path.path,
            *(
                "" if number is None else repr(number)
                for errors in (path.means, path.residues)
                for number in (_numbers(getattr(errors, name)[protein : protein + 1])[0] for name in measures)
            ),
        ]
        for protein, (sequence_id, length) in enumerate(
            zip(validation.sequence_ids, validation.lengths, strict=True)
        )
        for path in validation.paths
    ]
    headers = [f"{of}_{name}" for of in ("mean", "residues") for name in measures]
    return Table(["sequence_id", "residues", "mode", "path", *headers], rows)
