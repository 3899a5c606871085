"""Parse FASTA text: what is accepted, what is rejected and why, and the residues of many records at once.

Works on blocks of whole records as bytes, vectorized with NumPy; files are handled by `index`. The rules:

- A line ends with LF, CRLF or CR. A record starts at a line whose first character is `>`; only a UTF-8 byte
  order mark, blank lines and `;` comment lines may precede the first record.
- The ID is the first word of the header (words are separated by ASCII whitespace) or, optionally, the whole
  header.
- ASCII whitespace, `;` comment lines, one `*` at the very end and, optionally, the gaps `-` and `.` are not
  part of a sequence. Case is ignored.
- Everything else is a `Fault`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import numpy.typing as npt

from esm_packed.alphabet import INVALID_ID, RESIDUE_TO_ID, TOKENS
from esm_packed.errors import UserError
from esm_packed.runners.input.rules import CHOICES

_UNIPROT = re.compile(r"(?:sp|tr)\|([A-Z0-9]{6,10}(?:-[0-9]+)?)\|")

NOTHING = 0
"""The code of a byte that is not part of a sequence (the id of `<cls>`, which is not a residue either)."""
NEVER_REPLACED = 253
"""The code of a gap or `>` in place of a residue: a defect of the file that replacing it by X would hide."""
STOP = 254
"""The code of `*`."""
INVALID = INVALID_ID
"""The code of any other character that is not in ESM-2's alphabet."""

_HINT_INVALID = "--invalid x replaces such characters by X, --invalid skip leaves such records out"
_HINT_EMPTY = "--invalid skip leaves out records without residues"
_COMMENT_LINE = re.compile(rb"[\r\n];[^\r\n]*")
_IS_SPACE = np.zeros(ord(" ") + 1, dtype=np.bool_)
_IS_SPACE[list(b" \t\n\r\v\f")] = True
_NUCLEOTIDE_IDS = np.unique(RESIDUE_TO_ID[np.frombuffer(b"ACGTUN", dtype=np.uint8)])

Codes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]


class Modified(IntFlag):
    """How a record differs from what its file holds; several flags may be set."""

    RESIDUES_REPLACED = 1
    GAPS_DROPPED = 2
    TRAILING_STOP_DROPPED = 4
    RENAMED = 8

    @property
    def label(self) -> str:
        """The name of a single flag in words, such as `gaps dropped`."""
        return str(self.name).lower().replace("_", " ")


class InputError(UserError, ValueError):
    """A fault in a FASTA file."""


class DamagedIndexError(InputError):
    """The index of the inputs is damaged; the inputs can be read again.

    Args:
        what: the file or directory, and what is wrong with it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what}; rerun the command that began the run, which reads the inputs again"


@dataclass(frozen=True)
class ReadOptions:
    """How to continue where the default is to stop with an error.

    Args:
        invalid: a character outside the alphabet is an `error`, is replaced by X (`x`), or its record is left
            out (`skip`, which also leaves out records with a gap, without residues or without an ID).
        duplicates: a second record with the same ID is an `error`, is left out (`first`), or is renamed
            `ID__2`, `ID__3` ... (`rename`).
        gaps: `-` and `.` are an `error` or are removed (`drop`).
        full_header: use the whole header as the ID instead of its first word.
        force: continue even if the sequences look like DNA.

    Raises:
        ValueError: an argument is not one of these values.
    """

    invalid: str = "error"
    duplicates: str = "error"
    gaps: str = "error"
    full_header: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Fault:
    """Why a record cannot be used: `line` is 0-based within the block, `reason` is for the user."""

    record: int
    line: int
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class ParsedBlock:
    """The n records of one block of text.

    `name_begins` and `name_ends` (of the ID, bytes from the start of the block), `lengths` (residues) and
    `lines` (of the headers, 0-based within the block) are (n,) int64. `modified` is (n,) uint8 `Modified`
    flags. `token_ids` is (sum of lengths,) uint8, with X for anything that is not a residue. `num_lines` is
    the number of lines that end in the block. `faults` are ordered by record and position, with at most one
    of each kind per record.
    """

    block: bytes
    name_begins: Positions
    name_ends: Positions
    lengths: Positions
    lines: Positions
    num_lines: int
    modified: npt.NDArray[np.uint8]
    token_ids: npt.NDArray[np.uint8]
    faults: list[Fault]
    num_replaced: int

    def name(self, record: int) -> str:
        """Return the ID of `record`; empty if it has none."""
        return self.block[self.name_begins[record] : self.name_ends[record]].decode("utf-8")


def _code_table(gaps: str) -> bytes:
    table = RESIDUE_TO_ID.copy()
    table[list(b" \t\n\r\v\f")] = NOTHING
    table[0x80:0xC0] = NOTHING  # UTF-8 continuation bytes: a character counts once, by its first byte
    table[list(b"-.")] = NOTHING if gaps == "drop" else NEVER_REPLACED
    table[ord(">")] = NEVER_REPLACED
    table[ord("*")] = STOP
    return table.tobytes()


_CODE_TABLES = {gaps: _code_table(gaps) for gaps in ("error", "drop")}
_X_CODE = TOKENS.index("X")


def residue_codes(text: bytes, begins: Positions, ends: Positions, gaps: str) -> Codes:
    """Map each byte of `text` inside the sequences [begins, ends) to a token id or one of the codes above.

    Args:
        text: bytes that hold whole sequences; every range starts at the end of a header line.
        begins, ends: (n,) int64, ascending and disjoint.
        gaps: as in `ReadOptions`.

    Returns:
        (len(text),) uint8; `NOTHING` outside the ranges, in comment lines and for whitespace.
    """
    edges = np.zeros(2 * len(begins) + 2, dtype=np.int64)
    edges[1:-1:2] = begins
    edges[2:-1:2] = ends
    edges[-1] = len(text)
    inside = np.zeros(len(edges) - 1, dtype=np.uint8)
    inside[1::2] = 0xFF
    codes: Codes = np.frombuffer(text.translate(_CODE_TABLES[gaps]), dtype=np.uint8) & np.repeat(
        inside, np.diff(edges)
    )
    if b";" in text and _has_comment_line(text):
        for comment in _COMMENT_LINE.finditer(text):
            codes[comment.start() : comment.end()] = NOTHING
    return codes


def _has_comment_line(text: bytes) -> bool:
    """Whether there are comment lines; avoids a search that is slow when headers contain many `;`."""
    characters = np.frombuffer(text, dtype=np.uint8)
    before = characters[np.flatnonzero(characters[1:] == ord(";"))]
    return bool(((before == ord("\n")) | (before == ord("\r"))).any())


def token_ids_of(codes: Codes) -> npt.NDArray[np.uint8]:
    """Return the concatenated token ids in `codes`; invalid characters become X (for `invalid='x'`)."""
    token_ids: Codes = codes[codes != NOTHING]
    token_ids[token_ids >= NEVER_REPLACED] = _X_CODE
    return token_ids


def count_nucleotides(token_ids: npt.NDArray[np.uint8]) -> int:
    """Return how many residues are A, C, G, T, U or N."""
    return int(np.isin(token_ids, _NUCLEOTIDE_IDS).sum())


def text_fault(block: bytes) -> tuple[int, str] | None:
    """Return the position and reason of the first byte that is not valid text; None if there is none."""
    nul = block.find(b"\0")
    text = block if nul < 0 else block[:nul]
    if not text.isascii():
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            return error.start, f"byte 0x{text[error.start]:02x} is not valid UTF-8 (UTF-16 or binary?)"
    return None if nul < 0 else (nul, "NUL byte: this is not a text file")


def preamble_fault(preamble: bytes) -> tuple[int, str] | None:
    """Return the position and reason of invalid text before the first record; None if there is none."""
    for line in re.finditer(rb"[^\r\n]+", preamble):
        if line.group().strip() and not line.group().startswith(b";"):
            shown = line.group().decode("utf-8", "replace").strip()
            return line.start(), f"not FASTA: text before the first '>': {shorten(shown)}"
    return None


def first_record(block: bytes) -> int:
    """Return the position of the first `>` at the start of a line; len(block) if there is none."""
    found = re.search(rb"(?:\A|[\r\n])>", block)
    return found.end() - 1 if found else len(block)


def count_lines(text: bytes) -> int:
    """Return the number of line ends in `text`; CR LF counts as one."""
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def record_begin(block: bytes, position: int) -> int:
    """Return the start of the record that contains `position`; 0 if no later line starts one."""
    return max(block.rfind(b"\n>", 0, position + 1), block.rfind(b"\r>", 0, position + 1)) + 1


def record_at(block: bytes, position: int, full_header: bool) -> str | None:
    """Return the ID of the record that contains `position`; None before the first record."""
    start = record_begin(block, position)
    if not block.startswith(b">", start):
        return None
    header = re.split(rb"[\r\n]", block[start + 1 :], maxsplit=1)[0]
    return record_name(header, full_header).decode("utf-8", "replace")


def record_name(header: bytes, full_header: bool) -> bytes:
    """Return the ID in a header line without its `>`; empty if there is none."""
    if full_header:
        return header.strip()
    words = header.split(None, 1)
    return words[0] if words else b""


def parse_block(block: bytes, options: ReadOptions) -> ParsedBlock:
    """Find and check the records of `block`, which is valid UTF-8 and consists of whole records.

    With `invalid='x'`, replaced characters are counted and are not faults.
    """
    text = np.frombuffer(block, dtype=np.uint8)
    starts, header_ends, lines, spaces, line_ends = _find_records(block, text)
    ends = np.append(starts[1:], len(block))
    name_begins, name_ends = _find_names(block, starts + 1, header_ends, spaces, options.full_header)

    codes = residue_codes(block, header_ends, ends, options.gaps)
    absent = np.flatnonzero(codes == NOTHING)
    lengths = _count_present(absent, header_ends, ends)
    modified = np.zeros(len(starts), dtype=np.uint8)

    def owners(positions: Positions) -> Positions:
        return np.searchsorted(header_ends, positions) - 1

    if options.gaps == "drop":
        undropped = residue_codes(block, header_ends, ends, "error")
        gaps = np.flatnonzero((undropped == NEVER_REPLACED) & (codes == NOTHING))
        modified[owners(gaps)] |= Modified.GAPS_DROPPED.value
    suspects = np.flatnonzero(codes >= NEVER_REPLACED)
    if suspects.size:
        stops = _trailing_stops(suspects[codes[suspects] == STOP], owners, absent, ends)
        lengths[owners(stops)] -= 1
        codes[stops] = NOTHING
        modified[owners(stops)] |= Modified.TRAILING_STOP_DROPPED.value
        suspects = suspects[codes[suspects] != NOTHING]
    num_replaced = 0
    if options.invalid == "x":
        is_replaced = codes[suspects] != NEVER_REPLACED
        replaced, suspects = suspects[is_replaced], suspects[~is_replaced]
        num_replaced = len(replaced)
        modified[owners(replaced)] |= Modified.RESIDUES_REPLACED.value

    # one of each kind per record; '>' and gaps share a code
    kinds = np.where(text[suspects] == ord(">"), NOTHING, codes[suspects])
    _, firsts = np.unique(owners(suspects) * 256 + kinds, return_index=True)
    suspects = suspects[firsts]
    nameless, empty = np.flatnonzero(name_ends == name_begins), np.flatnonzero(lengths == 0)
    return ParsedBlock(
        block=block,
        name_begins=name_begins,
        name_ends=name_ends,
        lengths=lengths,
        lines=lines,
        num_lines=len(line_ends),
        modified=modified,
        token_ids=token_ids_of(codes),
        faults=_faults(
            block,
            line_ends,
            np.concatenate([nameless, empty, owners(suspects)]),
            np.concatenate([starts[nameless], starts[empty], suspects]),
            [("no ID after '>'", "")] * len(nameless)
            + [("the record has no residues", _HINT_EMPTY)] * len(empty),
        ),
        num_replaced=num_replaced,
    )


def _find_records(block: bytes, text: Codes) -> tuple[Positions, Positions, Positions, Positions, Positions]:
    """Return record starts, header ends, record lines, whitespace (and, last, len(block)), and line ends."""
    spaces = np.flatnonzero(text <= ord(" "))  # all whitespace and control characters, in one pass
    characters = text[spaces]
    line_ends = spaces[(characters == ord("\n")) | (characters == ord("\r"))]
    spaces = np.append(spaces[_IS_SPACE[characters]], len(block))
    following = line_ends[:-1] if line_ends.size and line_ends[-1] == len(block) - 1 else line_ends
    starts = np.append(0, following[text[following + 1] == ord(">")] + 1)
    lines = np.searchsorted(line_ends, starts)
    header_ends = np.append(line_ends, len(block))[lines]
    if b"\r" in block:  # of CR LF, only the LF counts
        next_character = text[np.minimum(line_ends + 1, len(block) - 1)]
        line_ends = line_ends[(text[line_ends] == ord("\n")) | (next_character != ord("\n"))]
        lines = np.searchsorted(line_ends, starts)
    return starts, header_ends, lines, spaces, line_ends


def _faults(
    block: bytes,
    line_ends: Positions,
    records: Positions,
    positions: Positions,
    reasons: list[tuple[str, str]],
) -> list[Fault]:
    """Return faults at `positions` in `records`; those without `reasons` are due to the characters there."""
    lines = np.searchsorted(line_ends, positions)
    reasons += [_character_fault(block, position) for position in positions[len(reasons) :].tolist()]
    return [
        Fault(int(records[fault]), int(lines[fault]), *reasons[fault])
        for fault in np.lexsort((positions, records)).tolist()
    ]


def _count_present(absent: Positions, begins: Positions, ends: Positions) -> Positions:
    """Return the number of residues in each range; `absent` are the positions of non-residues."""
    num_absent: Positions = np.searchsorted(absent, ends) - np.searchsorted(absent, begins)
    return ends - begins - num_absent


def _trailing_stops(
    stops: Positions, owners: Callable[[Positions], Positions], absent: Positions, ends: Positions
) -> Positions:
    """Return the positions of `*` at the end of their record."""
    owner = owners(stops)
    is_last = np.append(owner[1:] != owner[:-1], True)[: len(stops)]
    stops, owner = stops[is_last], owner[is_last]
    trailing: Positions = stops[_count_present(absent, stops + 1, ends[owner]) == 0]
    return trailing


def _find_names(
    block: bytes, header_begins: Positions, header_ends: Positions, spaces: Positions, full_header: bool
) -> tuple[Positions, Positions]:
    """Return where the IDs begin and end; `spaces` are the positions of whitespace and, last, len(block)."""
    begins = header_begins.copy()
    ends = spaces[np.searchsorted(spaces, begins)]
    one_by_one = range(len(begins)) if full_header else np.flatnonzero(ends == begins).tolist()
    for record in one_by_one:
        header = block[header_begins[record] : header_ends[record]]
        begins[record] = header_ends[record] - len(header.lstrip())
        ends[record] = begins[record] + len(record_name(header, full_header))
    return begins, ends


def _character_fault(block: bytes, position: int) -> tuple[str, str]:
    """Return the reason and hint for the character at `position`, which is not allowed in a sequence."""
    character = block[position : position + 4].decode("utf-8", "ignore")[0]
    if character in "-.":
        reason = f"gap {character!r} in the sequence: this looks like an alignment"
        return reason, "--gaps drop removes gaps"
    if character == ">":
        return "'>' inside a sequence line: is a line end missing before it?", ""
    if character == "*":
        return "'*' (stop) inside the sequence, not at its end", _HINT_INVALID
    shown = repr(character)
    if not character.isascii():
        shown = f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()
    return f"{shown} is not in ESM-2's alphabet", _HINT_INVALID


def accession_of(sequence_id: str) -> str:
    """Return the accession `P12345` of a UniProt ID such as `sp|P12345|X_HUMAN`; any other ID unchanged."""
    found = _UNIPROT.match(sequence_id)
    return found[1] if found else sequence_id


def shorten(text: str, width: int = 60) -> str:
    """Return `text` quoted, with control characters escaped, truncated to about `width` characters."""
    return repr(text if len(text) <= width else text[: width - 3] + "...")
