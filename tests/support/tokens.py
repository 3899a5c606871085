"""Token ids as text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esm_packed.alphabet import TOKENS


def decode(token_ids: npt.ArrayLike) -> str:
    """The residues and special tokens of `token_ids`, as one string."""
    return "".join(TOKENS[token_id] for token_id in np.asarray(token_ids).tolist())
