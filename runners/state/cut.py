"""Cut records into shards of similar cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esm_packed.config import ESM2Config
from esm_packed.packing import SPECIAL_TOKENS, plan_packs

MAX_SHARD_RECORDS = 65_536
SHARD_SECONDS = 10.0
REFERENCE_FLOPS = {"cpu": 5e10, "cuda": 2.5e14}
"""Assumed operations per second when cutting shards: one CPU thread, and a GPU at half of its FP16 rate."""

MAX_SHARDS = 20_000
LEAST_GPU_SHARDS = 64
"""Minimum number of shards on GPUs, provided that each holds at least `LEAST_GPU_PACKS` full packs."""
LEAST_GPU_PACKS = 3

FLOPS_PER_SHARD: dict[str, float] = {}
"""Shard size by device type, overriding all of the above; for tests with small shards."""

_BLOCK_RECORDS = 1 << 16
_MOST_REPACKINGS = 8


def sequence_flops(lengths: npt.NDArray[np.int64], config: ESM2Config) -> npt.NDArray[np.float64]:
    """Return the floating-point operations to embed sequences of `lengths` residues, including attention."""
    tokens = lengths.astype(np.float64) + SPECIAL_TOKENS
    hidden_size = config.hidden_size
    return config.num_layers * (24.0 * hidden_size**2 * tokens + 4.0 * hidden_size * tokens**2)


@dataclass(frozen=True)
class ShardSize:
    """The size of shards.

    Args:
        flops: maximum cost of a shard that holds more than one record; a shard holds at least one pack.
        token_budget: tokens in a pack, the minimum size of a shard; 0 for any size.
        whole_packs: end each shard after a whole number of full packs, as a partly filled pack costs a GPU as
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
        """Return the size for a run: about ten seconds of work, but enough shards for many GPUs to share.

        Args:
            lengths: (num_records,) residues to embed.
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
        # rounding down to whole packs can double the number of shards
        number = max(1.0, min(number, 0.475 * MAX_SHARDS))
        # a sequence that costs more than a shard is a shard of its own; the others share the rest
        most, _, num_larger = _work(lengths, is_computed, config, flops / number)
        if num_larger:
            flops, number = most, max(1.0, number - num_larger)
        return cls(flops / number, token_budget, device_type == "cuda")


def _work(
    lengths: npt.NDArray[np.int32], is_computed: npt.NDArray[np.bool_], config: ESM2Config, most_flops: float
) -> tuple[float, int, int]:
    """Return operations and tokens of sequences that cost at most `most_flops`, and how many cost more."""
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
    size: ShardSize,
) -> tuple[int, ...]:
    """Cut the records into contiguous shards of similar cost.

    Args:
        lengths: (num_records,) residues to embed.
        is_computed: (num_records,) False for records whose embedding is copied from an earlier one.
        config: shape of the model.
        size: size of the shards. A remainder that does not fill a pack is added to the last shard.

    Returns:
        The first record of each shard, followed by the number of records.
    """
    num_records = len(lengths)
    starts = [0]
    window = 1 << 10
    while True:
        start = starts[-1]
        while True:
            stop = min(start + window, start + MAX_SHARD_RECORDS, num_records)
            computed = is_computed[start:stop]
            tokens = np.where(computed, lengths[start:stop].astype(np.int64) + SPECIAL_TOKENS, 0)
            flops = np.where(computed, sequence_flops(lengths[start:stop].astype(np.int64), config), 0.0)
            is_enough = flops.sum() > size.flops and tokens.sum() > size.token_budget
            if is_enough or stop in (start + MAX_SHARD_RECORDS, num_records):
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
    """Return how many records the longest prefix has that fills as many packs as `count` records, at least 1.

    Args:
        tokens: (n,) tokens of each record, 0 if it is not computed.
        count: number of records, 1 <= count <= n.
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
