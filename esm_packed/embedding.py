"""`ESM2.embed`, `contacts` and `attention_maps`: from protein sequences to arrays."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.alphabet import encode
from esm_packed.contacts import MOST_PAIRS, AttentionMaps, attend_of, check_contact_head
from esm_packed.contacts import forward as forward_with_contacts
from esm_packed.outputs import is_ragged, output_names, per_of
from esm_packed.packing import SPECIAL_TOKENS, default_token_budget, limit_pairs, pack, plan_packs
from esm_packed.rescue import is_finite, named
from esm_packed.rows import row_counts
from esm_packed.windows import Blend, Rows, Windows, names_in_windows

if TYPE_CHECKING:
    from esm_packed.model import ESM2

Embeddings = npt.NDArray[np.float32]


@overload
def embed(
    model: ESM2,
    sequences: Sequence[str],
    *,
    layer: int = -1,
    per_residue: bool = False,
    token_budget: int | None = None,
) -> list[Embeddings]: ...


@overload
def embed(
    model: ESM2,
    sequences: Sequence[str],
    *,
    layer: Sequence[int],
    per_residue: bool = False,
    token_budget: int | None = None,
) -> dict[int, list[Embeddings]]: ...


def embed(
    model: ESM2,
    sequences: Sequence[str],
    *,
    layer: int | Sequence[int] = -1,
    per_residue: bool = False,
    token_budget: int | None = None,
) -> list[Embeddings] | dict[int, list[Embeddings]]:
    """Embed proteins.

    Embeddings that are not finite are recomputed in FP32, and set to NaN if FP32 fails too.

    Args:
        sequences: one-letter residues; `<mask>` stands for a masked one. Nothing is truncated, and `-`
            and `.` are the gap tokens of ESM-2's alphabet.
        layer: 0 to num_layers; negative numbers count from the end. A list returns several layers from
            one pass.
        per_residue: return one row per residue instead of their mean.
        token_budget: tokens computed together; None for the default of the device.

    Returns:
        In the order of `sequences`, (hidden_size,) or (num_residues, hidden_size) FP32 arrays (FP64 in
        the FP64 mode). For a list of layers, a dict from each number in `layer` to such a list.

    Raises:
        ValueError: a sequence is empty or has a character outside the alphabet (the message names it), or
            there is no such layer.
        TypeError: a sequence is not a string, `sequences` is a string or a mapping, or `layer` is not a
            number or a list of numbers.

    Warns:
        UserWarning: embeddings were not finite; the message names the sequences and the outcome.
    """
    numbers, is_list = _layer_numbers(layer)
    asked = {number: model.config.resolve_layer(number) for number in numbers}
    layers = list(dict.fromkeys(asked.values()))
    token_ids = encode_proteins(sequences)
    if token_budget is None:
        token_budget = default_token_budget(model.device)
    kind = "per_residue" if per_residue else "mean"
    names = output_names([kind], layers)
    arrays: dict[int, dict[str, Embeddings]] = {}
    for members in plan_packs([len(ids) + SPECIAL_TOKENS for ids in token_ids], token_budget):
        rows = embed_together(model, [token_ids[index] for index in members], names)
        arrays.update(zip(members.tolist(), rows, strict=True))

    changed: dict[str, list[int]] = {}
    for index, ids in enumerate(token_ids):
        if not is_finite(arrays[index]):
            changed.setdefault(_recompute(model, ids, arrays[index]), []).append(index)
    for reason, indices in changed.items():
        warnings.warn(
            f"{len(indices)} of {len(token_ids)} sequences: the embedding is {reason}: {named(indices)}",
            stacklevel=2,
        )
    several = {
        number: [arrays[index][f"{kind}/{resolved}"] for index in range(len(token_ids))]
        for number, resolved in asked.items()
    }
    return several if is_list else several[numbers[0]]


def contacts(model: ESM2, sequences: Sequence[str], *, token_budget: int | None = None) -> list[Embeddings]:
    """Probability that two residues are in contact, from the attention maps of all layers (Rao et al. 2021).

    No attention map is stored. Contacts that are not finite are recomputed in FP32, and set to NaN if FP32
    fails too.

    Args:
        sequences: as for `embed`.
        token_budget: tokens computed together, each with as many numbers as the longest protein among them
            has residues, 2^24 in all if there are several; None for the default of the device.

    Returns:
        In the order of `sequences`, (num_residues, num_residues) FP32 arrays (FP64 in the FP64 mode),
        symmetric.

    Raises:
        CheckpointError: the checkpoint has no contact-regression weights.
        ValueError, TypeError: as for `embed`.

    Warns:
        UserWarning: contacts were not finite; the message names the sequences and the outcome.
    """
    check_contact_head(model)
    token_ids = encode_proteins(sequences)
    if token_budget is None:
        token_budget = default_token_budget(model.device)
    arrays, changed = _contacts_of_all(model, token_ids, token_budget)
    for reason, indices in changed.items():
        warnings.warn(
            f"{len(indices)} of {len(token_ids)} sequences: the contacts are {reason}: {named(indices)}",
            stacklevel=2,
        )
    return arrays


def predict_contacts(model: ESM2, sequence: str) -> Embeddings:
    """As `contacts`, for one protein.

    Args:
        sequence: one-letter residues of one protein.

    Returns:
        (num_residues, num_residues) FP32 (FP64 in the FP64 mode), symmetric.

    Raises:
        CheckpointError: the checkpoint has no contact-regression weights.
        ValueError: the sequence is empty or has a character outside the alphabet.

    Warns:
        UserWarning: the result was not finite.
    """
    check_contact_head(model)
    ids = encode_protein("sequence", sequence)
    (array,), changed = _contacts_of_all(model, [ids], token_budget=1)
    for reason in changed:
        warnings.warn(f"the contacts are {reason}", stacklevel=2)
    return array


def attention_maps(
    model: ESM2, sequence: str, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> Embeddings:
    """Attention maps of one protein. Contacts do not need them.

    Args:
        sequence: one-letter residues of one protein.
        layers: 1 to num_layers; negative numbers count from the end. None for all.
        heads: 0 to num_heads - 1; negative numbers count from the end. None for all.

    Returns:
        (layers, heads, num_residues + 2, num_residues + 2) FP32 (FP64 in the FP64 mode), in the requested
        order. BOS and EOS are the first and the last row and column, and rows sum to one.

    Raises:
        ValueError: there is no such layer or head, the sequence is empty, or it has a character outside the
            alphabet.
    """
    config = model.config
    ids = encode_protein("sequence", sequence)
    wanted_layers = [
        config.resolve_layer(layer)
        for layer in (range(1, config.num_layers + 1) if layers is None else layers)
    ]
    if 0 in wanted_layers:
        raise ValueError(f"layers: 0 is the embedding, which has no attention; pass 1 to {config.num_layers}")
    wanted_heads = list(range(config.num_heads) if heads is None else heads)
    for head in wanted_heads:
        if not -config.num_heads <= head < config.num_heads:
            raise ValueError(f"head {head} does not exist: the model has heads 0 to {config.num_heads - 1}")
    batch = pack([ids]).to(model.device)
    collect = AttentionMaps(attend_of(model), wanted_layers, wanted_heads)
    model.with_attention(("attention maps", collect))(batch)
    return torch.stack([collect.maps[layer] for layer in wanted_layers]).cpu().numpy()


def embed_together(
    model: ESM2,
    token_ids: Sequence[npt.NDArray[np.uint8]],
    names: Sequence[str],
    sites: Sequence[npt.NDArray[np.int64]] | None = None,
) -> list[dict[str, Embeddings]]:
    """Outputs of sequences that make one pack.

    Args:
        model: computes.
        token_ids: residues of each sequence.
        names: of the outputs.
        sites: of each sequence the residues whose log-probabilities are read, counted from 0.

    Returns:
        Of each sequence by name: (columns,), (num_residues, columns), (num_pairs, 1) or (num_sites, columns),
        FP32 (FP64 in the FP64 mode).
    """
    batch = pack(token_ids)
    if sites is not None:
        batch = batch.read_at(sites)
    outputs = model.embed_packed(batch.to(model.device), names, model.precision_mode.table_dtype)
    arrays = {name: outputs[name].cpu().numpy() for name in names}
    counts = row_counts([len(ids) for ids in token_ids], sites)
    firsts = {per: np.cumsum(each) - each for per, each in counts.items()}
    firsts["residue"] = batch.residue_bounds[:, 0].astype(np.int64)

    def rows_of(name: str, index: int) -> Embeddings:
        per = per_of(name)
        first = int(firsts[per][index])
        rows = arrays[name][first : first + int(counts[per][index])]
        return rows.copy() if is_ragged(name) else rows[0]

    return [{name: rows_of(name, index) for name in names} for index in range(len(token_ids))]


def embed_in_windows(
    model: ESM2,
    token_ids: npt.NDArray[np.uint8],
    names: Sequence[str],
    windows: Windows | None,
    sites: npt.NDArray[np.int64] | None = None,
) -> dict[str, Rows]:
    """Outputs of one protein, in windows if it is longer than one.

    Args:
        model: computes each window on its own.
        token_ids: residues of the protein.
        names: of the outputs, of `KINDS_IN_WINDOWS` alone if there are windows.
        windows: how it is cut; None for not at all.
        sites: as for `embed_together`; without windows.

    Returns:
        By name: (columns,) or (rows, columns), as `embed_together` gives them.
    """
    if windows is None or len(token_ids) <= windows.size:
        return dict(embed_together(model, [token_ids], names, None if sites is None else [sites])[0])
    blend = Blend(windows, len(token_ids))
    for start in windows.starts(len(token_ids)):
        window = token_ids[start : start + windows.size]
        blend.add(start, embed_together(model, [window], names_in_windows(names))[0])
    return blend.outputs(names)


def _recompute(model: ESM2, token_ids: npt.NDArray[np.uint8], rows: Mapping[str, Embeddings]) -> str:
    """Replace the rows of a sequence, which are not finite; what became of them."""
    _, reason = model.rescue.replace(
        rows, lambda fp32: embed_together(fp32, [token_ids], list(rows))[0], f"dtype {model.precision}"
    )
    return reason


def _contacts_of_all(
    model: ESM2, token_ids: Sequence[npt.NDArray[np.uint8]], token_budget: int
) -> tuple[list[Embeddings], dict[str, list[int]]]:
    """Contacts of each protein, and of those that were not finite, by what became of them, the indices."""
    arrays: dict[int, Embeddings] = {}
    lengths = [len(ids) + SPECIAL_TOKENS for ids in token_ids]
    for members in limit_pairs(plan_packs(lengths, token_budget), lengths, MOST_PAIRS):
        together = _contacts_together(model, [token_ids[index] for index in members])
        arrays.update(zip(members.tolist(), together, strict=True))
    changed: dict[str, list[int]] = {}
    for index, ids in enumerate(token_ids):
        rows = {"contacts": arrays[index]}
        if not is_finite(rows):

            def compute(fp32: ESM2, ids: npt.NDArray[np.uint8] = ids) -> dict[str, Embeddings]:
                return {"contacts": _contacts_together(fp32, [ids])[0]}

            _, reason = model.rescue.replace(rows, compute, f"dtype {model.precision}")
            changed.setdefault(reason, []).append(index)
    return [arrays[index] for index in range(len(token_ids))], changed


def _contacts_together(model: ESM2, token_ids: Sequence[npt.NDArray[np.uint8]]) -> list[Embeddings]:
    """Contacts of proteins that make one pack."""
    _, matrices = forward_with_contacts(model, pack(token_ids).to(model.device))
    return [
        (matrix if len(matrices) == 1 else matrix.clone()).contiguous().cpu().numpy() for matrix in matrices
    ]


def _layer_numbers(layer: int | Sequence[int]) -> tuple[list[int], bool]:
    """The numbers in `layer`, and whether it is a list of them."""
    error = TypeError(
        f"layer {layer!r} is not a number or a list of numbers; pass an int such as -1, or a list of them"
    )
    if isinstance(layer, (str, bytes, Mapping)):
        raise error
    is_list = isinstance(layer, Iterable) and getattr(layer, "ndim", 1) > 0  # arrays may hold one number
    numbers: list[Any] = list(layer) if is_list else [layer]  # type: ignore[arg-type]
    if not numbers:
        raise ValueError("layer is empty; pass a number or a list of numbers")
    if any(isinstance(number, bool) or "bool" in str(getattr(number, "dtype", "")) for number in numbers):
        raise error
    try:
        return [operator.index(number) for number in numbers], is_list
    except TypeError:
        raise error from None


def encode_proteins(sequences: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    """Token ids of the argument `sequences` of a method.

    Raises:
        TypeError: it is not a list of strings.
        ValueError: one is empty, or has a character outside the alphabet.
    """
    if isinstance(sequences, (str, bytes)):
        raise TypeError("sequences is one string; pass a list of them")
    if isinstance(sequences, Mapping):
        raise TypeError(
            f"sequences is a {type(sequences).__name__}; pass list(sequences.values()), whose order the "
            "results keep"
        )
    if not isinstance(sequences, Iterable):
        raise TypeError(f"sequences is {sequences!r}; pass a list of strings of one-letter residues")
    return [encode_protein(f"sequences[{index}]", sequence) for index, sequence in enumerate(sequences)]


def encode_protein(name: str, sequence: str) -> npt.NDArray[np.uint8]:
    """Token ids of one protein, which messages call `name`; errors as for `encode_proteins`."""
    if not isinstance(sequence, str):
        raise TypeError(f"{name} is a {type(sequence).__name__}; pass a string of one-letter residues")
    try:
        ids = encode(sequence)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not ids.size:
        raise ValueError(f"{name} is empty")
    return ids
