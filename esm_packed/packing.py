"""Sequences laid end to end: how they are distributed over packs, and the packed batch a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.alphabet import BOS_ID, EOS_ID, PAD_ID
from esm_packed.config import DEFAULT_TOKEN_BUDGETS
from esm_packed.kernels.launch import num_multiprocessors

WAVE_ROWS = 128
"""Rows of a tile that one multiprocessor computes of a matrix multiplication."""

SPECIAL_TOKENS = 2
"""BOS and EOS of every sequence."""


@dataclass(frozen=True)
class PackedBatch:
    """Sequences end to end; each is BOS, residues, EOS.

    Args:
        input_ids: (total_tokens,) int32 token ids.
        cu_seqlens: (num_sequences + 1,) int32, where each sequence begins; starts at 0, ends at total_tokens.
        max_seqlen: tokens of the longest sequence, a Python int.
        sequence_ids: names of the sequences, kept on the host.
        segments: which of the pieces that `cu_seqlens` bounds are sequences; the others are padding.
        host_cu_seqlens: `cu_seqlens` on the CPU, for a batch that was moved from there.
        rows: (num_rows,) int64 tokens whose last layer and logits are wanted: nothing else is computed behind
            the last attention. None for all tokens.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    sequence_ids: tuple[str, ...] | None = None
    segments: slice = field(default_factory=lambda: slice(None))
    host_cu_seqlens: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch, without padding."""
        return len(range(self.cu_seqlens.numel() - 1)[self.segments])

    @property
    def total_tokens(self) -> int:
        """Tokens in the batch, including BOS, EOS and padding."""
        return self.input_ids.numel()

    @property
    def residue_bounds(self) -> npt.NDArray[np.int32]:
        """(num_sequences, 2) first row of each sequence's residues, and the row behind the last one.

        For a batch that is on the CPU or comes from there: another would wait for its device.
        """
        bounds = (self.cu_seqlens if self.host_cu_seqlens is None else self.host_cu_seqlens).numpy()
        return np.stack([bounds[:-1] + 1, bounds[1:] - 1], axis=1)[self.segments]

    @property
    def position_ids(self) -> torch.Tensor:
        """(total_tokens,) int32 position of each token in its own sequence, 0 at BOS."""
        starts, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        tokens = torch.arange(self.total_tokens, dtype=torch.int32, device=self.input_ids.device)
        return tokens - starts.repeat_interleave(ends - starts, output_size=self.total_tokens)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        is_on_host = self.cu_seqlens.device.type == "cpu"
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            host_cu_seqlens=self.cu_seqlens if is_on_host else self.host_cu_seqlens,
            rows=None if self.rows is None else self.rows.to(device, non_blocking=non_blocking),
        )

    def pinned(self) -> PackedBatch:
        """The same batch in page-locked memory of the CPU."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
            rows=None if self.rows is None else self.rows.pin_memory(),
        )

    def read_at(self, sites: Sequence[npt.NDArray[np.int64]]) -> PackedBatch:
        """The same batch, on the CPU, of which only some residues are read.

        Args:
            sites: for each sequence the residues, counted from 0.
        """
        firsts = self.residue_bounds[:, 0].tolist()
        rows = np.concatenate([first + places for first, places in zip(firsts, sites, strict=True)])
        return replace(self, rows=torch.from_numpy(rows))


def pack(
    token_ids: Sequence[npt.NDArray[np.uint8]], sequence_ids: Sequence[str] | None = None
) -> PackedBatch:
    """Lay sequences end to end in the order given, on the CPU.

    Args:
        token_ids: for each sequence a (num_residues,) uint8 array as `alphabet.encode` gives it.
        sequence_ids: a name for each sequence.

    Raises:
        ValueError: no sequence, one without residues, or another number of names than of sequences.
    """
    if not token_ids:
        raise ValueError("token_ids is empty: a pack holds at least one sequence")
    num_residues = np.fromiter((len(ids) for ids in token_ids), dtype=np.int64, count=len(token_ids))
    if not num_residues.all():
        raise ValueError(f"token_ids[{int(np.argmin(num_residues))}] has no residues")
    if sequence_ids is not None and len(sequence_ids) != len(token_ids):
        raise ValueError(f"{len(sequence_ids)} sequence_ids for {len(token_ids)} sequences")

    cu_seqlens = np.zeros(len(token_ids) + 1, dtype=np.int64)
    np.cumsum(num_residues + SPECIAL_TOKENS, out=cu_seqlens[1:])
    if cu_seqlens[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{cu_seqlens[-1]} tokens in one pack: cu_seqlens is int32, at most 2**31 - 1 fit")
    bos, eos = np.array([BOS_ID], dtype=np.uint8), np.array([EOS_ID], dtype=np.uint8)
    input_ids = np.concatenate([part for ids in token_ids for part in (bos, ids, eos)])
    return PackedBatch(
        torch.from_numpy(input_ids.astype(np.int32)),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        int(num_residues.max()) + SPECIAL_TOKENS,
        None if sequence_ids is None else tuple(sequence_ids),
    )


def fill(batch: PackedBatch, total_tokens: int) -> PackedBatch:
    """The batch with padding behind its sequences, in pieces no longer than the longest of them.

    Args:
        batch: on the CPU.
        total_tokens: of the result.

    Raises:
        ValueError: the batch has more tokens than that.
    """
    missing = total_tokens - batch.total_tokens
    if missing < 0:
        raise ValueError(f"total_tokens = {total_tokens}, but the batch has {batch.total_tokens}")
    ends = range(batch.total_tokens + batch.max_seqlen, total_tokens + batch.max_seqlen, batch.max_seqlen)
    ends_of_padding = torch.tensor(ends, dtype=torch.int32).clamp(max=total_tokens)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, batch.input_ids.new_full((missing,), PAD_ID)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, ends_of_padding]),
        segments=slice(batch.cu_seqlens.numel() - 1),
        host_cu_seqlens=None,
    )


def check_packed(batch: PackedBatch, device: torch.device) -> None:
    """Check that a batch can be computed on `device`, without reading anything back from a GPU.

    Raises:
        ValueError: names the argument that does not fit and shows its value.
    """
    input_ids, cu_seqlens, max_seqlen = batch.input_ids, batch.cu_seqlens, batch.max_seqlen
    for name, tensor, dtypes in (
        ("input_ids", input_ids, (torch.int32, torch.int64)),
        ("cu_seqlens", cu_seqlens, (torch.int32,)),
    ):
        if tensor.ndim != 1 or tensor.dtype not in dtypes or tensor.device != device:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name} must be a 1-D {allowed} tensor on {device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must hold at least 2 values, got {cu_seqlens.numel()}")
    if not 0 < max_seqlen <= input_ids.numel():
        raise ValueError(f"max_seqlen = {max_seqlen} is not within 1 to {input_ids.numel()} tokens")
    if cu_seqlens.device.type == "cpu":  # elsewhere reading it would wait for the device
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != input_ids.numel() or lengths.min() < 0:
            raise ValueError(
                f"cu_seqlens must increase from 0 to {input_ids.numel()} tokens, got {cu_seqlens.tolist()}"
            )
        if lengths.max() > max_seqlen:
            raise ValueError(f"max_seqlen = {max_seqlen}, but a sequence has {int(lengths.max())} tokens")
    if batch.rows is not None:
        _check_rows(batch.rows, batch)


def _check_rows(rows: torch.Tensor, batch: PackedBatch) -> None:
    device = batch.input_ids.device
    if rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != device or not rows.numel():
        raise ValueError(
            f"rows must be a 1-D int64 tensor on {device} that is not empty, "
            f"got {tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )
    # elsewhere reading it would wait for the device
    if rows.device.type == "cpu" and not 0 <= int(rows.min()) <= int(rows.max()) < batch.total_tokens:
        raise ValueError(
            f"rows must be within 0 to {batch.total_tokens - 1}, got {int(rows.min())} to {int(rows.max())}"
        )


def default_token_budget(device: torch.device) -> int:
    """Tokens in a pack unless another number is asked for.

    On a GPU that is the whole number of waves closest to `DEFAULT_TOKEN_BUDGETS`: in one wave each
    multiprocessor computes one tile of `WAVE_ROWS` rows of a matrix multiplication, and in a wave that is not
    full some of them wait. 132 multiprocessors give 33,792 tokens.

    Raises:
        RuntimeError, AssertionError: torch finds no such GPU.
    """
    tokens = DEFAULT_TOKEN_BUDGETS[device.type]
    if device.type != "cuda":
        return tokens
    wave = WAVE_ROWS * num_multiprocessors(device)
    return max(1, round(tokens / wave)) * wave


def plan_packs(lengths: npt.ArrayLike, token_budget: int) -> list[npt.NDArray[np.int64]]:
    """Distribute sequences over packs by first-fit decreasing.

    Sequences are taken longest first (ties in input order); each goes into the first pack it fits into.
    Equal lengths are placed together: one vectorized pass over the open packs for each distinct length gives
    exactly what placing them one by one would (Johnson 1973, "Near-optimal bin packing algorithms").

    Args:
        lengths: (num_sequences,) tokens of each sequence, BOS and EOS included.
        token_budget: most tokens a pack may hold.

    Returns:
        For each pack the indices of its sequences, longest first. One over the budget is a pack of its own.

    Raises:
        ValueError: the budget or a length is not positive.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if token_budget < 1:
        raise ValueError(f"token_budget must be positive, got {token_budget}")
    if lengths.size == 0:
        return []
    if lengths.min() < 1:
        raise ValueError(f"lengths[{int(lengths.argmin())}] = {lengths.min()} is not positive")

    longest_first = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(-lengths, return_counts=True)
    pack_of_sequence, num_packs = _first_fit((-distinct).tolist(), counts.tolist(), token_budget)
    by_pack = np.argsort(pack_of_sequence, kind="stable")
    ends = np.cumsum(np.bincount(pack_of_sequence, minlength=num_packs))[:-1]
    return np.split(longest_first[by_pack], ends)


def limit_pairs(
    packs: Iterable[npt.NDArray[np.int64]], lengths: npt.ArrayLike, most_pairs: int
) -> list[npt.NDArray[np.int64]]:
    """Cut packs whose tokens, times the tokens of the longest sequence, are more than `most_pairs`.

    Args:
        packs: indices of sequences, longest first.
        lengths: (num_sequences,) tokens of each sequence.
        most_pairs: of a pack with more than one sequence.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    found = []
    for members in packs:
        left = members
        while len(left):
            tokens = np.cumsum(lengths[left])
            count = max(1, int(np.searchsorted(tokens, most_pairs // tokens[0], side="right")))
            found.append(left[:count])
            left = left[count:]
    return found


def _first_fit(
    lengths: Sequence[int], counts: Sequence[int], token_budget: int
) -> tuple[npt.NDArray[np.int64], int]:
    """The pack of each of `counts[i]` sequences of `lengths[i]` tokens, longest first; number of packs."""
    pack_of_sequence = np.empty(sum(counts), dtype=np.int64)
    num_packs = 0
    placed = 0
    open_packs = np.empty(0, dtype=np.int64)
    tokens_left = np.empty(0, dtype=np.int64)
    for length, count in zip(lengths, counts, strict=True):
        fits_empty = token_budget // length
        if fits_empty == 0:
            pack_of_sequence[placed : placed + count] = np.arange(num_packs, num_packs + count)
            num_packs += count
            placed += count
            continue

        fits = tokens_left // length
        filled = np.cumsum(fits)
        taken = np.minimum(filled, count) - np.minimum(filled - fits, count)
        placed_in_open = int(taken.sum())
        num_new = -(-(count - placed_in_open) // fits_empty)
        taken_new = np.full(num_new, fits_empty, dtype=np.int64)
        if num_new:
            taken_new[-1] = count - placed_in_open - fits_empty * (num_new - 1)

        open_packs = np.concatenate([open_packs, np.arange(num_packs, num_packs + num_new)])
        taken = np.concatenate([taken, taken_new])
        tokens_left = np.concatenate([tokens_left, np.full(num_new, token_budget)]) - taken * length
        num_packs += num_new
        pack_of_sequence[placed : placed + count] = np.repeat(open_packs, taken)
        placed += count

        still_open = tokens_left >= lengths[-1]
        if not still_open.all():
            open_packs, tokens_left = open_packs[still_open], tokens_left[still_open]
    return pack_of_sequence, num_packs
