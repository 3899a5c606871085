"""esm-packed on a CPU beside fair-esm, transformers and esm-cpp, and beside its own floor, in FP32.

Every round first embeds a few proteins, which are held against our FP64 path, and then is timed: README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from cpu_peers_summary import RECORDS, Record
from esm.data import FastaBatchedDataset
from esm_cpp_client import EsmCpp
from floors import AttentionFloor, MatmulFloor
from peers import EsmPacked, FairEsm, Provider, Transformers

from esm_packed.alphabet import encode
from esm_packed.config import DEFAULT_TOKEN_BUDGETS
from esm_packed.model import ESM2
from esm_packed.packing import SPECIAL_TOKENS, pack

MAX_RESIDUES = 1022
MAX_RELATIVE_ERROR = 1e-4
NUM_CHECKED = 5
MODELS = {"random:esm2_t6_8M_UR50D": 476, "random:esm2_t30_150M_UR50D": 100}
"""Model to the number of proteins it embeds."""

PARAMETERS = {
    "model": list(MODELS),
    "provider": [
        "esm_packed",
        "transformers",
        "fair_esm",
        "esm_cpp",
        "floor_matmul_mm",
        "floor_matmul_best",
        "floor_attention",
    ],
}


@dataclass(frozen=True)
class Truth:
    """What our FP64 path computes for the proteins that are checked."""

    embeddings: torch.Tensor
    logits: list[torch.Tensor]


class Contest:
    """Proteins, and the models that stay loaded from block to block."""

    def __init__(self, options: Callable[[str], Any], sequences: Sequence[str], cleanup: ExitStack) -> None:
        self.threads: int = options("--threads")
        self._sequences = sequences
        self._proteins: int | None = options("--proteins")
        self._token_budget: int = options("--token-budget") or DEFAULT_TOKEN_BUDGETS["cpu"]
        self._esm_cpp_python: str | None = options("--esm-cpp-python")
        self._cleanup = cleanup
        self._model = cache(lambda name: ESM2.from_pretrained(name, dtype="fp32"))
        self.provider = cache(self._load)
        self.truth = cache(self._compute_truth)

    def proteins(self, model: str) -> Sequence[str]:
        """The proteins that a model embeds."""
        return self._sequences[: MODELS[model]][: self._proteins]

    def checked(self, model: str) -> Sequence[str]:
        """A few of them, from the shortest to the longest."""
        by_length = sorted(self.proteins(model), key=len)
        step = max(1, (len(by_length) - 1) // (NUM_CHECKED - 1))
        return [*by_length[:-1:step][: NUM_CHECKED - 1], by_length[-1]]

    def _load(self, name: str, model: str) -> Any:
        if name == "esm_packed":
            return EsmPacked(self._model(model), self._token_budget)
        if name == "transformers":
            return Transformers(model)
        if name == "fair_esm":
            return FairEsm(model)
        if name == "floor_attention":
            return AttentionFloor(self._model(model), self._token_budget)
        if name.startswith("floor_matmul"):
            return MatmulFloor(self._model(model), self._token_budget, best=name == "floor_matmul_best")
        if self._esm_cpp_python is None:
            pytest.skip("esm-cpp needs an environment of its own: --esm-cpp-python PATH")
        esm_cpp = EsmCpp(model, self._esm_cpp_python, self.threads)
        return self._cleanup.enter_context(closing(esm_cpp))

    def _compute_truth(self, name: str, rounded_frequencies: bool) -> Truth:
        model = ESM2.from_pretrained(name, dtype="fp64")
        if not rounded_frequencies:
            exponents = torch.arange(0, model.config.head_dim, 2, dtype=torch.float64) / model.config.head_dim
            model.inv_freq = 10000.0**-exponents
        last = model.config.num_layers
        embeddings, logits = [], []
        for sequence in self.checked(name):
            batch = pack([encode(sequence)])
            output = model.forward_packed(
                batch.input_ids, batch.cu_seqlens, batch.max_seqlen, [last], return_logits=True
            )
            assert output.logits is not None
            embeddings.append(output.representations[last][1:-1].mean(0))
            logits.append(output.logits)
        return Truth(torch.stack(embeddings), logits)


@pytest.fixture(scope="session")
def contest(pytestconfig: pytest.Config) -> Iterator[Contest]:
    fasta = pytestconfig.getoption("--fasta")
    if not fasta.exists():
        pytest.skip(f"{fasta} is not there; name another with --fasta")
    sequences = [sequence[:MAX_RESIDUES] for sequence in FastaBatchedDataset.from_file(fasta).sequence_strs]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(pytestconfig.getoption("--threads"))
    with ExitStack() as cleanup:
        yield Contest(pytestconfig.getoption, sequences, cleanup)
    torch.set_num_threads(num_threads)


def check(provider: Provider, contest: Contest, model: str) -> dict[str, float]:
    """Worst relative L2 error of a mean embedding, and of the logits where the timed call returns them.

    A provider that takes other rotary frequencies than the checkpoint's is held against FP64 with those; how
    far it thereby is from the checkpoint's own embeddings is recorded beside.

    Raises:
        AssertionError: an error is above `MAX_RELATIVE_ERROR`.
    """
    truth = contest.truth(model, provider.rounded_frequencies)
    embeddings = provider.embeddings()
    errors = {"max_relative_error": _worst(embeddings, truth.embeddings)}
    if (logits := provider.logits()) is not None:
        errors["max_relative_error_logits"] = _worst(logits, truth.logits)
    for name, error in errors.items():
        assert error <= MAX_RELATIVE_ERROR, f"{name} is {error:.1e}, allowed are {MAX_RELATIVE_ERROR}"
    if not provider.rounded_frequencies:
        errors["relative_error_to_checkpoint"] = _worst(embeddings, contest.truth(model, True).embeddings)
    return errors


def _worst(computed: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    errors = [(c.double() - t).norm() / t.norm() for c, t in zip(computed, truth, strict=True)]
    return float(torch.stack(errors).max())


def test_cpu_peers(
    block: int, model: str, provider: str, contest: Contest, benchmark: Any, pytestconfig: pytest.Config
) -> None:
    contender = contest.provider(provider, model)
    contender.prepare(contest.checked(model))
    contender.run()
    is_floor = provider.startswith("floor")
    errors = {} if is_floor else check(contender, contest, model)

    sequences = contest.proteins(model)
    contender.prepare(sequences)
    benchmark.pedantic(contender.run, rounds=1, iterations=1)

    residues = sum(map(len, sequences))
    benchmark.extra_info.update(
        block=block,
        provider=provider,
        model=model,
        proteins=len(sequences),
        residues=residues,
        tokens=residues + SPECIAL_TOKENS * len(sequences),
        padded_tokens=contender.padded_tokens,
        threads=contest.threads,
        backend=contender.backend,
        torch=torch.__version__,
        **errors,
    )
    if isinstance(contender, EsmCpp):
        benchmark.extra_info["seconds_inside"] = contender.seconds_inside
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["residues_per_second"] = residues / seconds
        records = pytestconfig.stash.setdefault(RECORDS, [])
        records.append(Record(block, model, provider, residues, seconds))
