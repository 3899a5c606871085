"""ESM-2 without padding: packed protein sequences in, embeddings out.

from esm_packed import ESM2
model = ESM2.from_pretrained("esm2_t33_650M_UR50D")
embeddings = model.embed(["MKTAYIAKQR", "GSHMSLFD"])

`esm_packed.embed_file("proteins.fasta", "embeddings.h5")` does what `esm-packed embed` does, and what that
wrote is read with `esm_packed.open("embeddings.h5")`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esm_packed.version import __version__

if TYPE_CHECKING:
    from esm_packed.model import ESM2
    from esm_packed.runners.embed_file import embed_file
    from esm_packed.runners.input.records import read_fasta
    from esm_packed.runners.output.dataset import EmbeddingDataset
    from esm_packed.runners.output.embedding_file import EmbeddingFile
    from esm_packed.runners.output.embedding_file import EmbeddingFile as open

__all__ = ["ESM2", "EmbeddingDataset", "EmbeddingFile", "__version__", "embed_file", "open", "read_fasta"]

# Imported when first used: some import torch, which `esm-packed --help` must not wait for.
_PLACES = {
    "ESM2": ("esm_packed.model", "ESM2"),
    "EmbeddingDataset": ("esm_packed.runners.output.dataset", "EmbeddingDataset"),
    "EmbeddingFile": ("esm_packed.runners.output.embedding_file", "EmbeddingFile"),
    "embed_file": ("esm_packed.runners.embed_file", "embed_file"),
    "open": ("esm_packed.runners.output.embedding_file", "EmbeddingFile"),
    "read_fasta": ("esm_packed.runners.input.records", "read_fasta"),
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, attribute = _PLACES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
