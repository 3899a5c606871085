"""ESM-2 without padding: packed protein sequences in, embeddings out.

from esm_packed import ESM2
model = ESM2.from_pretrained("esm2_t33_650M_UR50D")
embeddings = model.embed(["MKTAYIAKQR", "GSHMSLFD"])
"""

from typing import TYPE_CHECKING, Any

from esm_packed.version import __version__

if TYPE_CHECKING:
    from esm_packed.model import ESM2

__all__ = ["ESM2", "__version__"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which `esm-packed --help` must not wait for.
    if name == "ESM2":
        from esm_packed.model import ESM2

        return ESM2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
