"""Find equal items among millions: sort 128-bit hashes on disk, then compare the items of each match.

Memory is bounded by `ROWS_IN_MEMORY`, regardless of the number of items or duplicates. The files are
memory-mapped, so their resident pages belong to the operating system's cache.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("record", "<i8")])
"""The two halves of a hash and the number of the record it belongs to."""
ROWS_IN_MEMORY = 1 << 17

_HASH_BYTES = 16
_WORD_BYTES = 8
_WORD_MASKS = np.array([(1 << 8 * num_bytes) - 1 for num_bytes in range(_WORD_BYTES + 1)], dtype=np.uint64)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(32)
_RECORDS_AT_ONCE = 1 << 14

HashRows = npt.NDArray[Any]
Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


def hashes_of(text: bytes, begins: Positions, ends: Positions) -> Hashes:
    """Return the (n, 2) halves of the hashes of the n pieces [begins, ends) of `text`, n > 0.

    Each 8-byte word, plus its position in the piece and, for the last word, the length, goes through
    MurmurHash3's finalizer. One half is the sum of the results, the other the sum of a function of them.
    This is not a cryptographic hash, but it is several times faster than one call per piece. Every match is
    confirmed, so deliberate collisions only cost time.
    """
    lengths = ends - begins
    num_words = np.maximum(-(-lengths // _WORD_BYTES), 1)
    stops = np.cumsum(num_words)
    firsts = stops - num_words
    in_piece = np.arange(stops[-1]) - np.repeat(firsts, num_words)
    # one word starting at each byte; the last ones extend past the text
    overlapping = np.ndarray(len(text) + 1, np.dtype("<u8"), text + bytes(_WORD_BYTES), strides=(1,))
    words = overlapping[np.repeat(begins, num_words) + _WORD_BYTES * in_piece]
    words[stops - 1] &= _WORD_MASKS[lengths - _WORD_BYTES * (num_words - 1)]
    words += in_piece.astype(np.uint64) * _GOLDEN
    words[stops - 1] += lengths.astype(np.uint64) * _MIX_2
    for factor in (_MIX_1, _MIX_2):
        words ^= words >> np.uint64(33)
        words *= factor
    words ^= words >> np.uint64(33)
    hashes = np.empty((len(begins), 2), dtype=np.uint64)
    hashes[:, 0] = np.add.reduceat(words, firsts)
    words *= _GOLDEN
    words ^= words >> _HALF
    words *= _MIX_1
    hashes[:, 1] = np.add.reduceat(words, firsts)
    return hashes


def hash_rows(hashes: Hashes, first_record: int) -> HashRows:
    """Return `ROW`s for (n, 2) hashes of consecutive records."""
    rows = np.empty(len(hashes), dtype=ROW)
    rows["high"] = hashes[:, 0]
    rows["low"] = hashes[:, 1]
    rows["record"] = np.arange(first_record, first_record + len(hashes))
    return rows


def sort_rows(path: Path) -> None:
    """Sort a file of `ROW`s, given in record order, by hash and then by record.

    A range too large for memory is distributed by one byte of the hash, then each part by the next byte.
    Each step is stable, so millions of rows with the same hash need no final sort.
    """
    rows = np.asarray(np.memmap(path, dtype=ROW, mode="r+"))
    if len(rows) <= ROWS_IN_MEMORY:
        rows[:] = rows[_order(rows)]
        return
    spare_path = path.with_name(path.name + ".spare")
    spare = np.asarray(np.memmap(spare_path, dtype=ROW, mode="w+", shape=rows.shape))
    parts = [(0, len(rows), 0)]
    while parts:
        begin, end, digit = parts.pop()
        if end - begin <= ROWS_IN_MEMORY:
            part = rows[begin:end]
            part[:] = part[_order(part)]
        elif digit < _HASH_BYTES:
            bounds = _distribute(rows, spare, begin, end, digit)
            parts += [(first, last, digit + 1) for first, last in pairwise(bounds) if last - first > 1]
    del spare
    spare_path.unlink()


def _order(rows: HashRows) -> npt.NDArray[np.intp]:
    """Return the indices that sort `rows` by hash; equal hashes keep their order."""
    high = np.ascontiguousarray(rows["high"])
    order = np.argsort(high)  # several times faster than a stable sort, and almost all values differ
    same = high[order[1:]] == high[order[:-1]]
    if same.any():
        tied = np.append(same, False) | np.append(False, same)
        among = order[tied]
        order[tied] = among[np.lexsort((among, rows["low"][among], high[among]))]
    return order


def _chunks(begin: int, end: int) -> Iterator[slice]:
    for start in range(begin, end, ROWS_IN_MEMORY):
        yield slice(start, min(start + ROWS_IN_MEMORY, end))


def _distribute(rows: HashRows, spare: HashRows, begin: int, end: int, digit: int) -> list[int]:
    """Sort rows [begin, end) by one byte of their hash; return the start of each part, and `end`."""
    column = digit ^ 7  # little-endian halves: the highest byte is the last

    def digits_of(part: slice) -> npt.NDArray[np.uint8]:
        return rows[part].view(np.uint8).reshape(-1, ROW.itemsize)[:, column]

    counts = np.zeros(256, dtype=np.int64)
    for part in _chunks(begin, end):
        counts += np.bincount(digits_of(part), minlength=256)
    bounds = [begin + int(bound) for bound in np.append(0, np.cumsum(counts))]
    if counts.max() < end - begin:
        vacant = bounds[:-1]
        for part in _chunks(begin, end):
            digits = digits_of(part)
            in_order = rows[part][np.argsort(digits, kind="stable")]
            done = 0
            for value, count in enumerate(np.bincount(digits, minlength=256).tolist()):
                spare[vacant[value] : vacant[value] + count] = in_order[done : done + count]
                vacant[value] += count
                done += count
        for part in _chunks(begin, end):
            rows[part] = spare[part]
    return bounds


def records_with(rows: HashRows, high: int, low: int) -> Positions:
    """Return the records with this hash in sorted `rows`, ascending."""
    begin = bisect_left(rows["high"], high)
    same_high = rows[begin : bisect_right(rows["high"], high, begin)]
    found: Positions = same_high["record"][same_high["low"] == low]
    return found


def write_firsts(rows: HashRows, path: Path) -> npt.NDArray[np.int64]:
    """Map each record in sorted `rows` to the first with the same hash, in a mapped file made at `path`."""
    firsts = np.asarray(np.memmap(path, dtype=np.int64, mode="w+", shape=rows.shape))
    for part in _chunks(0, len(rows)):
        firsts[part] = np.arange(part.start, part.stop)
    previous = np.zeros(1, dtype=ROW)
    group = -1  # first record with the hash that ended the previous chunk
    for part in _chunks(0, len(rows)):
        chunk = np.concatenate([previous, rows[part]])
        is_copy = (chunk["high"][1:] == chunk["high"][:-1]) & (chunk["low"][1:] == chunk["low"][:-1])
        if part.start == 0:
            is_copy[0] = False
        records = chunk["record"][1:]
        previous = chunk[-1:].copy()
        begin_records = np.append(group, records[~is_copy])
        if is_copy.any():
            owners = np.cumsum(~is_copy)[is_copy]
            firsts[records[is_copy]] = begin_records[owners]
        group = int(begin_records[-1])
    return firsts


def copies(firsts: Positions) -> Iterator[tuple[Positions, Positions]]:
    """Yield (records, their firsts) for records with an earlier copy, in order, some thousands at a time."""
    for start in range(0, len(firsts), _RECORDS_AT_ONCE):
        part = np.array(firsts[start : start + _RECORDS_AT_ONCE])
        found = np.flatnonzero(part != np.arange(start, start + len(part)))
        if found.size:
            yield start + found, part[found]


def confirm_firsts(firsts: Positions, read: Callable[[Positions], Iterator[bytes]]) -> int:
    """Correct `firsts` where items with the same hash differ; return how many records equal an earlier one.

    Args:
        firsts: (n,) as returned by `write_firsts`.
        read: yields the items with the given record numbers, one at a time.
    """
    num_copies = 0
    others: dict[tuple[int, bytes], int] = {}  # first record of each further item with the same hash
    for records, originals in copies(firsts):
        pairs = zip(records.tolist(), originals.tolist(), read(records), read(originals), strict=True)
        for record, original, item, first_item in pairs:
            if item != first_item:
                original = others.setdefault((original, item), record)
                firsts[record] = original
            num_copies += record != original
    return num_copies
