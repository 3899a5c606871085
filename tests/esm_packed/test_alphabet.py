from __future__ import annotations

import numpy as np
import pytest
from fair_esm_reference import ALPHABET
from tokens import decode

from esm_packed import alphabet


def test_tokens_are_those_of_fair_esm() -> None:
    assert tuple(ALPHABET.all_toks) == alphabet.TOKENS
    assert (
        ALPHABET.cls_idx,
        ALPHABET.padding_idx,
        ALPHABET.eos_idx,
        ALPHABET.mask_idx,
    ) == (
        alphabet.BOS_ID,
        alphabet.PAD_ID,
        alphabet.EOS_ID,
        alphabet.MASK_ID,
    )


def test_encode_equals_fair_esm() -> None:
    sequence = "LAGVSERTIDPKQNFYMHWCXBUZO.-<mask>MK<mask><mask>"
    assert alphabet.encode(sequence).tolist() == ALPHABET.encode(sequence)


def test_lower_case_is_upper_cased() -> None:
    assert np.array_equal(alphabet.encode("mkTa"), alphabet.encode("MKTA"))


@pytest.mark.parametrize(
    "sequence, named", [("MKJ", "'J' at position 3"), ("M*", "'*'"), ("M K", "' '"), ("é", "'é'")]
)
def test_characters_outside_the_alphabet_are_named(sequence: str, named: str) -> None:
    with pytest.raises(ValueError, match="not in ESM-2's alphabet") as error:
        alphabet.encode(sequence)
    assert named.replace("*", r"*") in str(error.value)


def test_no_character_stands_for_mask() -> None:
    with pytest.raises(ValueError, match="x01"):
        alphabet.encode("M\x01")
    assert alphabet.MASK_ID not in alphabet.RESIDUE_TO_ID
    with pytest.raises(ValueError, match="'J' at position 4 "):
        alphabet.encode("M<mask><mask>J")


def test_decode_inverts_encode() -> None:
    assert decode(alphabet.encode("MKT<mask>")) == "MKT<mask>"
