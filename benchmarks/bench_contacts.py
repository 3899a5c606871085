"""Contacts of one protein, by this package and by fair-esm, each checked against FP64 before it is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from contenders.checked import Variant
from contenders.contacts import ContactsContest
from contenders.contest import Contest, OtherModelError
from measuring import ON_GPU, flops_of, record, synchronize

from esm_packed.packing import SPECIAL_TOKENS

RESIDUES = (100, 500, 1000)
ROUNDS = 3


@pytest.fixture(scope="module")
def contacts(contest: Contest) -> Iterator[ContactsContest]:
    yield ContactsContest(contest)


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    tokens = config.getoption("--tokens")
    return {
        "residues": [tokens - SPECIAL_TOKENS] if tokens else list(RESIDUES),
        "model": config.getoption("--model")[: None if ON_GPU else 1],
        "dtype": config.getoption("--dtype") or (["fp32", "fp16"] if ON_GPU else ["fp32"]),
        "provider": ["esm_packed", "fair_esm"],
    }


def test_contacts(
    block: int,
    residues: int,
    model: str,
    dtype: str,
    provider: str,
    contacts: ContactsContest,
    benchmark: Any,
) -> None:
    benchmark.group = f"contacts of {residues} residues"
    variant = Variant(provider, model, dtype, residues)
    try:
        ready = contacts.ready(variant)
    except (ImportError, OtherModelError) as error:
        pytest.skip(f"{provider} in {dtype}: {error}")

    def run() -> None:
        ready.run()
        synchronize()

    benchmark.pedantic(run, rounds=ROUNDS)
    record(
        benchmark,
        suite="contacts",
        block=block,
        provider=provider,
        model=model,
        workload=f"contacts{residues}",
        dtype=dtype,
        backend=ready.backend,
        sequences=1,
        useful_tokens=residues + SPECIAL_TOKENS,
        padded_tokens=residues + SPECIAL_TOKENS,
        flops=flops_of(contacts.config(model), [residues]),
        max_error=contacts.max_errors[variant],
    )
