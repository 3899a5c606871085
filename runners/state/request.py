"""The request passed to `esm-packed embed`, validated before any work begins."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from esm_packed.config import ATTENTIONS, DEFAULT_MAX_LENGTH, DEFAULT_MODEL, SCORING_METHODS, ESM2Config
from esm_packed.errors import UsageError
from esm_packed.layouts import LAYOUTS
from esm_packed.numerics import PRECISIONS, Precision, resolve_precision
from esm_packed.outputs import KINDS
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.state.slices import Slice
from esm_packed.windows import Windows

STORE_DTYPES = {"fp32": "float32", "fp16": "float16"}
COMPRESSIONS = ("none", "gzip")
SCORE_TABLES = ("scan", "mutants", "proteins")
_CHOICES: dict[str, Collection[str]] = {
    "store_dtype": STORE_DTYPES,
    "compression": COMPRESSIONS,
    "layout": LAYOUTS,
    "attention": ATTENTIONS,
    "engine": ("auto", "in-process", "ray"),
}


@dataclass(frozen=True)
class Scoring:
    """How `esm-packed score` scores variants.

    Args:
        table: what the rows of the output stand for: `scan` for every substitution, `mutants` for the mutants
            in `mutations`, `proteins` for the pseudo-log-likelihood of each protein.
        method: one of `config.SCORING_METHODS`.
        joint: mask all sites of a mutant together.
        window: number of residues in a copy of a longer protein.
        mutations: the table of mutants.
        offset: number of the first residue of each protein.
        skip_bad: leave out mutants that do not match their protein.
        heat_map: path of a heat map of the scan of one protein, drawn from the table; None for none.

    Raises:
        ValueError: an argument is invalid.
    """

    table: str = "scan"
    method: str = "masked"
    joint: bool = False
    window: int = DEFAULT_MAX_LENGTH
    mutations: Path | None = None
    offset: int = 1
    skip_bad: bool = False
    heat_map: Path | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that are part of a run's identity; `mutations` is identified by its content."""
        return {name: value for name, value in asdict(self).items() if name not in ("mutations", "heat_map")}

    def __post_init__(self) -> None:
        if self.table not in SCORE_TABLES:
            raise ValueError(f"table is {self.table!r}; choose from {', '.join(SCORE_TABLES)}")
        if (self.mutations is not None) != (self.table == "mutants"):
            raise ValueError("a table of mutations is for scoring mutants, which need one")
        if self.method not in SCORING_METHODS:
            raise ValueError(f"method is {self.method!r}; choose from {', '.join(SCORING_METHODS)}")
        if self.joint and (self.method != "masked" or self.table != "mutants"):
            raise ValueError("joint masks the sites of a mutant together: only for mutants, method masked")
        if self.table == "proteins" and self.method != "masked":
            raise ValueError("a pseudo-log-likelihood masks each residue in turn: method masked")
        if self.window < 1:
            raise ValueError("window must be at least 1")


@dataclass(frozen=True)
class EmbedRequest:
    """The options of `esm-packed embed`.

    Args:
        inputs: FASTA files, `-` for standard input.
        output: the HDF5 file to create.
        model: as in `ESM2.from_pretrained`.
        device: auto, cpu, cuda or cuda:INDEX.
        devices: indices of the GPUs to use, an empty tuple for all; None to use only `device`.
        engine: auto, in-process or ray.
        ray_address: address of a Ray cluster; None to start one on this machine only.
        workers: number of Ray actors; None for one per GPU, or one on a machine without GPUs.
        part: the slice of the shards to compute; None for all.
        dtype: precision mode, or None for the device's default.
        disable_fp16: compute in FP32 where a half-precision type would be used.
        attention: attention backend, or auto.
        layout: one of `layouts.LAYOUTS`.
        cuda_graphs: replay forward passes as CUDA graphs; for the layout `fixed` on a GPU.
        kinds: kinds of output to keep, from `outputs.KINDS`.
        layers: layers to keep, negative ones counted from the last; the mean of the last one listed is
            `embeddings`.
        max_length: number of residues kept of each sequence; 0 keeps all.
        windows: how to cut longer sequences into windows, instead of `max_length`; None for no windows.
        token_budget: tokens in a pack, including BOS and EOS; None to measure it or use the device's default.
        read: the rules for the input.
        threads: CPU threads of a worker, or None for torch's choice.
        store_dtype: dtype of the stored embeddings, fp32 or fp16.
        fp32_compare: number of sequences to compute in FP32 as well, to report the error of the others.
        log_json: file to which a line of metrics is written every few seconds.
        compression: compression of the output, none or gzip.
        parts: leave rows of residues in separate files next to the output; None to do so for large outputs.
        reuse: an earlier output, from which rows for the same residues are reused; None for none.
        scoring: how to score variants instead of embedding proteins; None to embed.
        overwrite: replace an output, or a run directory, of another run.
        keep_run: keep the run directory after the output has been created.
        command: the command line to store in the output; empty for none.

    Raises:
        ValueError: an argument is invalid.
    """

    inputs: tuple[str, ...]
    output: Path
    model: str = DEFAULT_MODEL
    device: str = "auto"
    devices: tuple[int, ...] | None = None
    engine: str = "auto"
    ray_address: str | None = None
    workers: int | None = None
    part: Slice | None = None
    dtype: str | None = None
    disable_fp16: bool = False
    attention: str = "auto"
    layout: str = "packed"
    cuda_graphs: bool = False
    kinds: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    max_length: int = DEFAULT_MAX_LENGTH
    windows: Windows | None = None
    token_budget: int | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    threads: int | None = None
    store_dtype: str = "fp32"
    fp32_compare: int = 0
    log_json: Path | None = None
    compression: str = "none"
    parts: bool | None = None
    reuse: Path | None = None
    scoring: Scoring | None = None
    overwrite: bool = False
    keep_run: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(values)}")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"{unknown[0]!r} is not a kind of output; choose from {', '.join(KINDS)}")
        if not self.kinds or not self.layers:
            raise ValueError("name at least one kind of output and one layer")
        if self.windows is not None and not 0 <= self.windows.overlap <= self.windows.size // 2:
            raise ValueError(f"windows {tuple(self.windows)}: the overlap is at most half of the size")
        if self.windows is not None and self.windows.size < 2:
            raise ValueError(f"windows {tuple(self.windows)}: a window has at least 2 residues")
        if self.max_length < 0 or self.fp32_compare < 0:
            raise ValueError("max_length and fp32_compare must not be negative")
        counts = (self.token_budget, self.workers, self.threads)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError("token_budget, workers and threads must be at least 1")

    def precision(self, device: torch.device) -> Precision:
        """Return the precision mode on `device`.

        Raises:
            UsageError: the device does not support the mode.
        """
        try:
            precision = resolve_precision(self.dtype, device)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.disable_fp16 and precision.dtype in (torch.float16, torch.bfloat16):
            return PRECISIONS["fp32"]
        return precision

    def resolved_layers(self, config: ESM2Config) -> list[int]:
        """Return the layers as non-negative numbers, without repetitions; the last one is `embeddings`.

        Raises:
            UsageError: the model has no such layer.
        """
        try:
            layers = [config.resolve_layer(layer) for layer in self.layers]
        except ValueError as error:
            raise UsageError(f"--layers: {error}") from error
        # keep the last mention of a repeated layer, as the last layer listed is `embeddings`
        return list(dict.fromkeys(reversed(layers)))[::-1]
