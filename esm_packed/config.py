"""Names, defaults and shapes that need no torch: of the six ESM-2 models, precisions and backends."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MODEL = "esm2_t33_650M_UR50D"

DEFAULT_TOKEN_BUDGETS = {"cpu": 1024, "cuda": 32768}
"""Tokens in a pack by type of device; see `packing.default_token_budget` for GPUs. A CPU is fastest when the
activations of a pack stay in its cache."""


DEFAULT_MAX_LENGTH = 1022
"""Residues kept of a protein: what ESM-2 was trained with, as in esm-extract."""

DEFAULT_OVERLAP = 256
"""Residues that neighboring windows of a long protein share."""

SCORING_METHODS = ("masked", "wild-type")
"""How mutants are scored: each site masked in a copy of its own, or all read from one of the wild type."""

DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16")
"""Precision modes, as in `numerics.PRECISIONS`."""

ATTENTIONS = ("auto", "flash3", "fa3_fwd", "flash4", "varlen", "flash2", "triton", "sdpa", "reference")
"""`auto` and the attention backends, as in `attention.BACKENDS`."""

REFERENCES = ("esm-packed", "fair-esm")
"""References that a precision may be compared with."""

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class ESM2Config:
    """Shape of an ESM-2 model.

    Args:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_heads: attention heads; `hidden_size / num_heads` is even (rotary embedding rotates pairs).
        token_dropout: scale the embeddings as in training with masked tokens (true for every ESM-2).

    Raises:
        ValueError: the three sizes do not fit together.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    token_dropout: bool = True

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.hidden_size < 1 or self.num_heads < 1:
            raise ValueError(f"sizes must be positive, got {self}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads = {2 * self.num_heads}"
            )

    def resolve_layer(self, layer: int) -> int:
        """`layer` counted from 0; negative ones count back from the last, which is -1.

        Raises:
            ValueError: there is no such layer.
        """
        resolved = layer + self.num_layers + 1 if layer < 0 else layer
        if not 0 <= resolved <= self.num_layers:
            raise ValueError(f"layer {layer} does not exist: the model has layers 0 to {self.num_layers}")
        return resolved

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer."""
        return 4 * self.hidden_size


ESM2_MODELS: dict[str, ESM2Config] = {
    "esm2_t6_8M_UR50D": ESM2Config(6, 320, 20),
    "esm2_t12_35M_UR50D": ESM2Config(12, 480, 20),
    "esm2_t30_150M_UR50D": ESM2Config(30, 640, 20),
    "esm2_t33_650M_UR50D": ESM2Config(33, 1280, 20),
    "esm2_t36_3B_UR50D": ESM2Config(36, 2560, 40),
    "esm2_t48_15B_UR50D": ESM2Config(48, 5120, 40),
}
