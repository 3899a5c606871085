"""ESM-2's 33 tokens and the translation of residues to them by table look-up.

The table is fair-esm 2.0.0's `Alphabet.from_architecture("ESM-1b")`; it is our own because the package named
`esm` on a user's machine may be another project.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

TOKENS: tuple[str, ...] = (
    "<cls>", "<pad>", "<eos>", "<unk>",
    "L", "A", "G", "V", "S", "E", "R", "T", "I", "D", "P", "K", "Q", "N", "F", "Y", "M", "H", "W", "C",
    "X", "B", "U", "Z", "O", ".", "-", "<null_1>", "<mask>",
)  # fmt: skip
VOCAB_SIZE = len(TOKENS)
AMINO_ACID_IDS = slice(TOKENS.index("L"), TOKENS.index("C") + 1)
AMINO_ACIDS = TOKENS[AMINO_ACID_IDS]
"""The 20 of the genetic code, in the order of their tokens."""

BOS_ID = TOKENS.index("<cls>")
PAD_ID = TOKENS.index("<pad>")
EOS_ID = TOKENS.index("<eos>")
MASK_ID = TOKENS.index("<mask>")

INVALID_ID = 255
"""Value of `RESIDUE_TO_ID` for a byte that is not a residue."""


def _residue_table() -> npt.NDArray[np.uint8]:
    table = np.full(256, INVALID_ID, dtype=np.uint8)
    for token_id, token in enumerate(TOKENS):
        if len(token) == 1:
            table[ord(token.upper())] = table[ord(token.lower())] = token_id
    table.setflags(write=False)
    return table


RESIDUE_TO_ID: npt.NDArray[np.uint8] = _residue_table()
"""(256,) uint8: ASCII byte to token id, upper and lower case alike; `INVALID_ID` for all else."""


_LETTERS = bytes(ord(token) if len(token) == 1 else ord("?") for token in TOKENS).ljust(256, b"?")


def sequence_hashes(token_ids: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.bytes_]:
    """BLAKE2b of each protein's one-letter residues in upper case: 16 bytes as 32 hexadecimal digits.

    The same as `hashlib.blake2b(sequence.encode(), digest_size=16).hexdigest()`; a masked residue is `?`.

    Args:
        token_ids: of each protein (num_residues,) as `encode` gives them.

    Returns:
        (num_sequences,) of dtype S32.
    """
    letters = (ids.tobytes().translate(_LETTERS) for ids in token_ids)
    digests = b"".join(hashlib.blake2b(each, digest_size=16).digest() for each in letters)
    return np.frombuffer(digests.hex().encode(), "S32")


def encode(sequence: str) -> npt.NDArray[np.uint8]:
    """Token ids of one protein, without BOS and EOS.

    Args:
        sequence: one-letter residues in upper or lower case; `<mask>` stands for a masked residue.

    Returns:
        (num_residues,) uint8 token ids.

    Raises:
        ValueError: a character is not in ESM-2's alphabet; the message names it and its position.
    """
    *before_masks, _ = parts = sequence.split("<mask>")
    text = "X".join(parts)
    ids = RESIDUE_TO_ID[np.frombuffer(text.encode("latin-1", errors="replace"), dtype=np.uint8)]
    ids[np.cumsum([len(part) + 1 for part in before_masks], dtype=np.int64) - 1] = MASK_ID
    invalid = np.flatnonzero(ids == INVALID_ID)
    if invalid.size:
        position = int(invalid[0])
        raise ValueError(
            f"{text[position]!r} at position {position + 1} is not in ESM-2's alphabet "
            f"({''.join(token for token in TOKENS if len(token) == 1)} and <mask>)"
        )
    return ids
