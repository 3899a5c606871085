"""How a run is cut up: shards of like cost, and which records are computed at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.config import ESM2Config
from esm_packed.packing import SPECIAL_TOKENS, plan_packs
from esm_packed.runners.system.files import read_regular, whole_or_nothing

PLAN_FORMAT = 1
MAX_SHARD_RECORDS = 65_536
MAX_SHARD_BYTES = 1 << 27
"""Most embeddings a shard may hold, as they are kept in memory until it is written."""

SHARD_SECONDS = 10.0
REFERENCE_FLOPS = {"cpu": 5e10, "cuda": 2.5e14}
"""Operations in a second that shards are cut for: of a CPU thread, and of a GPU at half of its FP16 rate."""

MAX_SHARDS = 20_000
LEAST_GPU_SHARDS = 64
"""So many shards there are on GPUs as soon as each holds this number of full packs:"""
LEAST_GPU_PACKS = 3

FLOPS_PER_SHARD: dict[str, float] = {}
"""By device type, in place of all that is said here on the size of shards; for tests with small ones."""

_BLOCK_RECORDS = 1 << 16
_MOST_REPACKINGS = 8


def plan_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what defines a run, independent of the order of keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class PlanError(ValueError):
    """A run directory belongs to another run; the message says what differs."""


@dataclass(frozen=True)
class Plan:
    """A run, fixed before anything is computed and the same for every process that works on it.

    Args:
        identity: what makes two runs the same one.
        input_names: the inputs as the user named them.
        starts: first record of each shard, and the number of records at the end.
        model_name: for people; `model_sha256` in the identity says which model it is.
        hidden_size: columns of the embeddings.
        command: the one that began the run, for people.
    """

    identity: Mapping[str, Any]
    input_names: tuple[str, ...]
    starts: tuple[int, ...]
    model_name: str = ""
    hidden_size: int = 0
    command: str = ""

    @property
    def layers(self) -> list[int]:
        """Layers kept; the last one is `embeddings`."""
        return list(self.identity["layers"])

    @property
    def token_budget(self) -> int:
        """Tokens in a pack."""
        return int(self.identity["token_budget"])

    @property
    def max_length(self) -> int:
        """Residues kept of a sequence; 0 keeps all."""
        return int(self.identity["max_length"])

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the identity."""
        return plan_hash(self.identity)

    @property
    def num_shards(self) -> int:
        """Shards of the run."""
        return len(self.starts) - 1

    def records(self, shard: int) -> tuple[int, int]:
        """Records [start, stop) of a shard."""
        return self.starts[shard], self.starts[shard + 1]

    def write(self, path: Path, scratch: Path) -> None:
        """Write the plan so that it is there whole or not at all; `scratch` holds it meanwhile."""
        content = {
            "format": PLAN_FORMAT,
            "identity": self.identity,
            "input_names": list(self.input_names),
            "starts": list(self.starts),
            "model_name": self.model_name,
            "hidden_size": self.hidden_size,
            "command": self.command,
        }
        content["sha256"] = plan_hash(content)
        with whole_or_nothing(path, scratch) as temporary:
            temporary.write_text(json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the file is no plan, or a newer program's.
            OSError: it is not there or cannot be read.
        """
        try:
            content = json.loads(read_regular(path))
            is_whole = content.pop("sha256") == plan_hash(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise PlanError(f"{path}: damaged; --overwrite starts anew")
        try:
            if content["format"] == PLAN_FORMAT:
                return cls(
                    content["identity"],
                    tuple(content["input_names"]),
                    tuple(content["starts"]),
                    content["model_name"],
                    content["hidden_size"],
                    content["command"],
                )
        except (KeyError, TypeError):
            pass
        raise PlanError(f"{path}: made by another version of esm-packed; --overwrite starts anew")

    def check_same(self, identity: Mapping[str, Any], where: Path) -> None:
        """See that a run of `identity` may continue this one.

        Raises:
            PlanError: names what differs, with both values.
        """
        if differing := differences(self.identity, identity):
            raise PlanError(
                f"{where}: an unfinished run with other input or options ({differing}); "
                "repeat its command to continue it, or --overwrite to start anew"
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the identities of two runs, with both values; empty if nothing does."""
    return "; ".join(
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def sequence_flops(lengths: npt.NDArray[np.int64], config: ESM2Config) -> npt.NDArray[np.float64]:
    """Floating-point operations to embed sequences of `lengths` residues, attention included."""
    tokens = lengths.astype(np.float64) + SPECIAL_TOKENS
    hidden_size = config.hidden_size
    return config.num_layers * (24.0 * hidden_size**2 * tokens + 4.0 * hidden_size * tokens**2)


@dataclass(frozen=True)
class ShardSize:
    """How large shards are.

    Args:
        flops: most that one costs, if it holds more than one record, and no less than a pack.
        token_budget: tokens in a pack, the least that a shard holds; 0 for any size.
        whole_packs: a shard ends where a whole number of packs is full, as a part-filled pack costs a GPU as
            much as a full one.
    """

    flops: float
    token_budget: int = 0
    whole_packs: bool = False

    @classmethod
    def of_run(
        cls,
        lengths: npt.NDArray[np.int32],
        is_computed: npt.NDArray[np.bool_],
        config: ESM2Config,
        device_type: str,
        token_budget: int,
    ) -> ShardSize:
        """The size for a run: about ten seconds of work, but enough shards for many GPUs to share.

        Args:
            lengths: (num_records,) residues that are embedded.
            is_computed: (num_records,) False for records whose embedding is copied from an earlier one.
            config: shape of the model.
            device_type: cpu or cuda.
            token_budget: tokens in a pack.
        """
        if device_type in FLOPS_PER_SHARD:
            return cls(FLOPS_PER_SHARD[device_type])
        flops, tokens, _ = _work(lengths, is_computed, config, math.inf)
        number = flops / (SHARD_SECONDS * REFERENCE_FLOPS[device_type])
        if device_type == "cuda":
            number = max(number, min(LEAST_GPU_SHARDS, tokens // (LEAST_GPU_PACKS * token_budget)))
        # rounding down to whole packs makes up to twice as many
        number = max(1.0, min(number, 0.475 * MAX_SHARDS))
        # what costs more than a shard is one, and the others share the rest
        most, _, num_larger = _work(lengths, is_computed, config, flops / number)
        if num_larger:
            flops, number = most, max(1.0, number - num_larger)
        return cls(flops / number, token_budget, device_type == "cuda")


def _work(
    lengths: npt.NDArray[np.int32], is_computed: npt.NDArray[np.bool_], config: ESM2Config, most_flops: float
) -> tuple[float, int, int]:
    """Operations and tokens of all sequences that cost `most_flops` or less, and how many cost more."""
    flops, tokens, num_larger = 0.0, 0, 0
    for first in range(0, len(lengths), _BLOCK_RECORDS):
        block = slice(first, first + _BLOCK_RECORDS)
        computed = lengths[block][is_computed[block]].astype(np.int64)
        costs = sequence_flops(computed, config)
        within = costs <= most_flops
        flops += float(costs[within].sum())
        tokens += int((computed[within] + SPECIAL_TOKENS).sum())
        num_larger += int(np.count_nonzero(~within))
    return flops, tokens, num_larger


def cut_shards(
    lengths: npt.NDArray[np.int32],
    is_computed: npt.NDArray[np.bool_],
    config: ESM2Config,
    row_bytes: int,
    size: ShardSize,
) -> tuple[int, ...]:
    """Cut the records into contiguous shards that cost alike.

    Args:
        lengths: (num_records,) residues that are embedded.
        is_computed: (num_records,) False for records whose embedding is copied from an earlier one.
        config: shape of the model.
        row_bytes: size of a record's embeddings.
        size: of the shards. What is left at the end and fills no pack goes to the last one.

    Returns:
        First record of each shard, then the number of records.
    """
    num_records = len(lengths)
    max_records = max(1, min(MAX_SHARD_RECORDS, MAX_SHARD_BYTES // row_bytes))
    starts = [0]
    window = 1 << 10
    while True:
        start = starts[-1]
        while True:
            stop = min(start + window, start + max_records, num_records)
            computed = is_computed[start:stop]
            tokens = np.where(computed, lengths[start:stop].astype(np.int64) + SPECIAL_TOKENS, 0)
            flops = np.where(computed, sequence_flops(lengths[start:stop].astype(np.int64), config), 0.0)
            is_enough = flops.sum() > size.flops and tokens.sum() > size.token_budget
            if is_enough or stop in (start + max_records, num_records):
                break
            window *= 2
        count = max(1, int(np.searchsorted(np.cumsum(flops), size.flops, side="right")))
        if size.whole_packs:
            count = _count_in_whole_packs(tokens, count, size.token_budget)
        elif size.token_budget:
            least = int(np.searchsorted(np.cumsum(tokens), size.token_budget)) + 1
            count = min(max(count, least), len(tokens))
        if stop == num_records and tokens[count:].sum() < size.token_budget:
            count = len(tokens)
        if start + count == num_records:
            return (*starts, num_records)
        starts.append(start + count)
        window = 2 * count


def _count_in_whole_packs(tokens: npt.NDArray[np.int64], count: int, token_budget: int) -> int:
    """Records of the longest prefix that fills as many packs as `count` records do, at least one.

    Args:
        tokens: (n,) tokens of each record, 0 for one that is not computed.
        count: of records, 1 <= count <= n.
        token_budget: tokens in a pack.
    """
    tokens = np.minimum(tokens, token_budget)  # a longer sequence is a pack of its own
    cumulative = np.cumsum(tokens)
    num_packs = max(1, int(cumulative[count - 1]) // token_budget)
    most_tokens = num_packs * token_budget
    for _ in range(_MOST_REPACKINGS):
        count = max(1, int(np.searchsorted(cumulative, most_tokens, side="right")))
        packed = tokens[:count]
        packed = packed[packed > 0]
        filled = sorted(int(packed[members].sum()) for members in plan_packs(packed, token_budget))
        if len(filled) <= num_packs or count == 1:
            break
        most_tokens = int(cumulative[count - 1]) - sum(filled[: len(filled) - num_packs])
    return count
