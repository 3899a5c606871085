"""ESM-2 on packed sequences, top to bottom.

The model is that of Lin et al. 2023 ("Evolutionary-scale prediction of atomic-level protein structure with a
language model", Science 379) as fair-esm 2.0.0 computes it. Sequences lie end to end in one tensor of
`total_tokens` rows; no row is padding.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from esm_packed import kernels
from esm_packed.alphabet import MASK_ID, VOCAB_SIZE, encode
from esm_packed.attention import BackendError, PackedAttention, select_backend
from esm_packed.config import DEFAULT_MODEL, DEFAULT_TOKEN_BUDGETS, ESM2Config
from esm_packed.contacts import AttentionMaps, contact_probabilities
from esm_packed.numerics import (
    PRECISIONS,
    Precision,
    is_out_of_memory,
    matmul_precision,
    resolve_device,
    resolve_precision,
)
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch, check_packed, pack, plan_packs
from esm_packed.parameters import fill_parameter
from esm_packed.rescue import Rescue, is_finite, named
from esm_packed.weights import Checkpoint, CheckpointError, load_checkpoint

LAYER_NORM_EPS = 1e-5

MIN_ROTARY_POSITIONS = 1026
"""Tables begin with room for what ESM-2 was trained on, so that they seldom grow."""


@dataclass(frozen=True)
class PackedOutput:
    """What `ESM2.forward_packed` returns.

    Args:
        representations: layer to (total_tokens, hidden_size); 0 is the embedding, the last is normalised.
        logits: (total_tokens, vocab_size), or None when not asked for.
    """

    representations: dict[int, torch.Tensor]
    logits: torch.Tensor | None


class Layer(nn.Module):
    """One transformer layer's weights; queries, keys and values share one projection."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, hidden_size)


class LMHead(nn.Module):
    """Predicts each token; the output projection is the embedding table."""

    def __init__(self, config: ESM2Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.bias = nn.Parameter(torch.empty(VOCAB_SIZE))

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        hidden_states = kernels.linear_gelu(hidden_states, self.dense.weight, self.dense.bias)
        hidden_states = _norm(self.norm, hidden_states)
        return kernels.linear(hidden_states, embedding, self.bias)


class ESM2(nn.Module):
    """ESM-2, computing in one precision on one device. Made by `ESM2.from_pretrained`."""

    cos: torch.Tensor
    sin: torch.Tensor
    inv_freq: torch.Tensor

    def __init__(self, config: ESM2Config, *, lm_head: bool = True, contact_head: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model_name = ""
        self.model_sha256 = ""
        self.embedding = nn.Embedding(VOCAB_SIZE, config.hidden_size)
        self.layers: Iterable[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config) for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = LMHead(config) if lm_head else None
        self.contact_head = nn.Linear(config.num_layers * config.num_heads, 1) if contact_head else None
        self._rescue = Rescue(None)
        self._outgrown_tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name in ("inv_freq", "cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        attention: str = "auto",
    ) -> ESM2:
        """Load a model.

        Args:
            name_or_path: an ESM-2 name, a checkpoint file or directory, `demo`, or `random:NAME`
                (see `weights.load_checkpoint`).
            device: `cpu`, `cuda`, `cuda:INDEX`, or `auto` for the first GPU, else the CPU.
            dtype: precision mode, one of `numerics.PRECISIONS`, or a dtype such as `torch.float16`; None
                takes the device's default, `fp16` on CUDA and `fp32` on a CPU.
            attention: attention backend, one of `attention.BACKENDS`, or `auto`.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or no ESM-2.
            BackendError: the attention backend cannot serve this device, dtype and head_dim.
            ValueError: the device or the precision mode is unknown or not to be had here.
        """
        device = resolve_device(device)
        precision = resolve_precision(dtype, device)
        checkpoint = load_checkpoint(name_or_path)
        backend = select_backend(attention, device, precision, checkpoint.config.head_dim)
        return cls.from_checkpoint(checkpoint, device, precision, backend)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: Precision,
        backend: tuple[str, PackedAttention],
    ) -> ESM2:
        """Fill a model from checkpoint tensors, one at a time, so that no second copy of it is held."""
        tensors = checkpoint.tensors
        with torch.device("meta"):
            model = cls(
                checkpoint.config,
                lm_head="lm_head.bias" in tensors,
                contact_head="contact_head.regression.weight" in tensors,
            )
        nn.Module._apply(model, lambda tensor: tensor.to(precision.dtype))  # type: ignore[no-untyped-call]
        model = model.to_empty(device=device).requires_grad_(False).eval()
        for name, parameter in model.named_parameters():
            fill_parameter(parameter, name, tensors)
        model.inv_freq = tensors["layers.0.self_attn.rot_emb.inv_freq"].to(device, precision.table_dtype)
        model.model_name, model.model_sha256 = checkpoint.model_name, checkpoint.sha256
        model.precision_mode = precision
        model.attention_backend, model.attend = backend
        if precision.is_below_fp32:
            model._rescue = Rescue(partial(load_in_fp32, checkpoint, device))
        return model

    precision_mode: Precision
    attend: PackedAttention
    attention_backend: str

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ESM2:
        # `.half()` would round inv_freq and leave `precision` untrue.
        if fn(torch.empty(0, dtype=self.dtype)).dtype != self.dtype:
            raise ValueError("the precision is chosen when loading: ESM2.from_pretrained(..., dtype='fp16')")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def train(self, mode: bool = True) -> ESM2:
        """Refused: the kernels record no gradients."""
        if mode:
            _refuse_training()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> ESM2:
        """Refused: the kernels record no gradients."""
        if requires_grad:
            _refuse_training()
        return super().requires_grad_(requires_grad)

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        """Not defined: `embed` takes proteins, `forward_packed` packed tensors."""
        raise TypeError(
            "ESM2 is not called itself: call model.embed(sequences) with a list of proteins, or "
            "model.forward_packed(input_ids, cu_seqlens, max_seqlen) with the tensors that "
            "esm_packed.packing.pack makes"
        )

    @property
    def precision(self) -> str:
        """Name of the precision mode."""
        return self.precision_mode.name

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward_packed(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        repr_layers: Sequence[int] = (),
        return_logits: bool = False,
        *,
        attend: PackedAttention | None = None,
    ) -> PackedOutput:
        """Run the model over packed sequences (`packing.pack` makes them).

        Args:
            input_ids: (total_tokens,) int32 or int64; every sequence is BOS, residues, EOS.
            cu_seqlens: (num_sequences + 1,) int32, starting at 0, ending at total_tokens.
            max_seqlen: tokens of the longest sequence.
            repr_layers: layers to return, 0 (embedding) to num_layers (after the final LayerNorm).
            return_logits: whether to run the language-model head.
            attend: used in place of the model's attention backend.

        Raises:
            ValueError: a tensor has the wrong shape, dtype or device, a layer does not exist, or logits are
                asked of a checkpoint without a language-model head.
        """
        self._check_arguments(input_ids, cu_seqlens, max_seqlen, repr_layers, return_logits)
        with torch.no_grad(), matmul_precision(self.precision_mode):
            return self._forward(
                input_ids, cu_seqlens, max_seqlen, set(repr_layers), return_logits, attend or self.attend
            )

    def _forward(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        repr_layers: set[int],
        return_logits: bool,
        attend: PackedAttention,
    ) -> PackedOutput:
        rotary_tables = self._rotary_tables(max_seqlen)
        mask_id = MASK_ID if self.config.token_dropout else None
        representations = {}

        # Each addition to the residual stream is fused with the LayerNorm that follows it. One name for all
        # activations beside it: what is not needed any more is freed before the next is computed.
        layers = list(self.layers)
        next_norms = [layer.attention_norm for layer in layers[1:]] + [self.final_norm]
        residual, position_ids = kernels.embed_tokens(
            input_ids, cu_seqlens, self.embedding.weight, mask_id, self.precision_mode.residual_dtype
        )
        hidden_states = _norm(layers[0].attention_norm, residual)
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            if index in repr_layers:
                representations[index] = residual.clone()

            hidden_states = self._attention(
                layer, hidden_states, rotary_tables, position_ids, cu_seqlens, max_seqlen, attend
            )
            hidden_states = kernels.linear(
                hidden_states, layer.attention_out.weight, layer.attention_out.bias
            )
            hidden_states = _add_norm(layer.ffn_norm, hidden_states, residual)

            hidden_states = kernels.linear_gelu(hidden_states, layer.fc1.weight, layer.fc1.bias)
            hidden_states = kernels.linear(hidden_states, layer.fc2.weight, layer.fc2.bias)
            hidden_states = _add_norm(next_norm, hidden_states, residual)

        if len(layers) in repr_layers:
            representations[len(layers)] = hidden_states
        logits = None
        if return_logits and self.lm_head is not None:
            logits = self.lm_head(hidden_states, self.embedding.weight)
        return PackedOutput(representations, logits)

    def _attention(
        self,
        layer: Layer,
        hidden_states: torch.Tensor,
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        attend: PackedAttention,
    ) -> torch.Tensor:
        num_heads, head_dim = self.config.num_heads, self.config.head_dim
        qkv = kernels.linear(hidden_states, layer.qkv.weight, layer.qkv.bias)
        qkv = qkv.view(-1, 3, num_heads, head_dim)
        kernels.rotary_qk_(qkv, *rotary_tables, position_ids)
        query, key, value = qkv.unbind(1)
        attended = attend(query, key, value, cu_seqlens, max_seqlen, head_dim**-0.5)
        return attended.view(-1, self.config.hidden_size)

    def embed_packed(
        self, batch: PackedBatch, layers: Sequence[int], *, attend: PackedAttention | None = None
    ) -> dict[int, torch.Tensor]:
        """Mean embedding of each sequence over its residues, BOS and EOS left out.

        What overflows is returned as it is: looking for it would wait for the device, and `embed` does that.

        Args:
            batch: the sequences, on the model's device.
            layers: 0 to num_layers.
            attend: used in place of the model's attention backend.

        Returns:
            Layer to (num_sequences, hidden_size) FP32 (FP64 in the FP64 mode), on the model's device.
        """
        output = self.forward_packed(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers, attend=attend
        )
        return {
            layer: kernels.segment_mean(hidden_states, batch.cu_seqlens)[batch.segments]
            for layer, hidden_states in output.representations.items()
        }

    @overload
    def embed(
        self,
        sequences: Sequence[str],
        *,
        layer: int = -1,
        per_residue: bool = False,
        token_budget: int | None = None,
    ) -> list[npt.NDArray[np.float32]]: ...

    @overload
    def embed(
        self,
        sequences: Sequence[str],
        *,
        layer: Sequence[int],
        per_residue: bool = False,
        token_budget: int | None = None,
    ) -> dict[int, list[npt.NDArray[np.float32]]]: ...

    def embed(
        self,
        sequences: Sequence[str],
        *,
        layer: int | Sequence[int] = -1,
        per_residue: bool = False,
        token_budget: int | None = None,
    ) -> list[npt.NDArray[np.float32]] | dict[int, list[npt.NDArray[np.float32]]]:
        """Embed proteins.

        What is not finite is computed again in FP32, and is NaN if it is not finite there either.

        Args:
            sequences: one-letter residues; `<mask>` stands for a masked one. Nothing is truncated, and `-`
                and `.` are computed as the gap tokens they are in ESM-2's alphabet.
            layer: 0 to num_layers; negative counts from the last, which is -1. Of a list of layers each is
                returned, from one pass.
            per_residue: one row for each residue in place of their mean.
            token_budget: tokens computed together; None for the default of the device.

        Returns:
            In the order of `sequences`, (hidden_size,) or (num_residues, hidden_size) FP32 arrays (FP64 in
            the FP64 mode). Of a list of layers a dict of these, with the numbers in `layer` as its keys.

        Raises:
            ValueError: a sequence is empty or has a character outside the alphabet (the message names it), or
                there is no such layer.
            TypeError: a sequence is not a string, `sequences` is a string or a mapping, or `layer` is not a
                number or a list of numbers.

        Warns:
            UserWarning: embeddings were not finite; says how many, whose, and what became of them.
        """
        if isinstance(sequences, str):
            raise TypeError("sequences is one string; pass a list of them")
        if isinstance(sequences, Mapping):
            raise TypeError(
                f"sequences is a {type(sequences).__name__}; pass list(sequences.values()), whose order "
                "the embeddings keep"
            )
        asked = {number: self.config.resolve_layer(number) for number in _layer_numbers(layer)}
        layers = list(dict.fromkeys(asked.values()))
        token_ids = [
            _encode_named(f"sequences[{index}]", sequence) for index, sequence in enumerate(sequences)
        ]
        if token_budget is None:
            token_budget = DEFAULT_TOKEN_BUDGETS[self.device.type]
        arrays: dict[int, dict[int, npt.NDArray[np.float32]]] = {}
        for members in plan_packs([len(ids) + SPECIAL_TOKENS for ids in token_ids], token_budget):
            rows = self._embed_pack([token_ids[index] for index in members], layers, per_residue)
            arrays.update(zip(members.tolist(), rows, strict=True))

        changed: dict[str, list[int]] = {}
        for index, ids in enumerate(token_ids):
            if not is_finite(arrays[index]):
                reason = self._recompute(ids, arrays[index], per_residue)
                changed.setdefault(reason, []).append(index)
        for reason, indices in changed.items():
            warnings.warn(
                f"{len(indices)} of {len(token_ids)} sequences: the embedding is {reason}: {named(indices)}",
                stacklevel=2,
            )
        several = {
            number: [arrays[index][resolved] for index in range(len(token_ids))]
            for number, resolved in asked.items()
        }
        return several if isinstance(layer, Iterable) else several[layer]

    def _embed_pack(
        self, token_ids: Sequence[npt.NDArray[np.uint8]], layers: Sequence[int], per_residue: bool
    ) -> list[dict[int, npt.NDArray[np.float32]]]:
        """Of each sequence: layer to its mean, or to a row for each residue."""
        batch = pack(token_ids).to(self.device)
        if not per_residue:
            means = {layer: rows.cpu().numpy() for layer, rows in self.embed_packed(batch, layers).items()}
            return [{layer: means[layer][index] for layer in layers} for index in range(len(token_ids))]
        output = self.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers)
        table_dtype = self.precision_mode.table_dtype
        hidden_states = {layer: rows.to(table_dtype) for layer, rows in output.representations.items()}
        return [
            {layer: hidden_states[layer][start + 1 : end - 1].cpu().numpy().copy() for layer in layers}
            for start, end in pairwise(batch.cu_seqlens.tolist())
        ]

    def _recompute(
        self,
        token_ids: npt.NDArray[np.uint8],
        rows: Mapping[int, npt.NDArray[np.float32]],
        per_residue: bool,
    ) -> str:
        _, reason = self._rescue.replace(
            rows,
            lambda model: model._embed_pack([token_ids], list(rows), per_residue)[0],
            f"dtype {self.precision}",
        )
        return reason

    def predict_contacts(self, sequence: str) -> npt.NDArray[np.float32]:
        """Probability that two residues touch, from the attention maps of all layers (Rao et al. 2021).

        Computed again in FP32 if it is not finite, and NaN if it is not finite there either.

        Args:
            sequence: one-letter residues of one protein.

        Returns:
            (num_residues, num_residues) FP32 (FP64 in the FP64 mode), symmetric.

        Raises:
            CheckpointError: the checkpoint came without its contact-regression file.
            ValueError: the sequence is empty or has a character outside the alphabet.

        Warns:
            UserWarning: the result was not finite.
        """
        if self.contact_head is None:
            raise CheckpointError(
                f"{self.model_name} was loaded without contact-regression weights: put the file "
                "NAME-contact-regression.pt beside NAME.pt"
            )
        ids = _encode_named("sequence", sequence)
        contacts = self._contacts(ids)
        if not is_finite({0: contacts}):
            _, reason = self._rescue.replace(
                {0: contacts}, lambda model: {0: model._contacts(ids)}, f"dtype {self.precision}"
            )
            warnings.warn(f"the contacts are {reason}", stacklevel=2)
        return contacts

    def _contacts(self, token_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        assert self.contact_head is not None
        collect = AttentionMaps()
        batch = pack([token_ids]).to(self.device)
        self.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, attend=collect)
        with torch.no_grad():
            head = self.contact_head
            return contact_probabilities(collect.maps, head.weight, head.bias).cpu().numpy()

    def _rotary_tables(self, max_seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cos.shape[0] < max_seqlen:
            # A captured CUDA graph may still read the tables it was captured with.
            self._outgrown_tables.append((self.cos, self.sin))
            size = max(max_seqlen, 2 * self.cos.shape[0], MIN_ROTARY_POSITIONS)
            positions = torch.arange(size, dtype=self.inv_freq.dtype, device=self.device)
            angles = torch.outer(positions, self.inv_freq)
            self.cos, self.sin = angles.cos(), angles.sin()
        return self.cos, self.sin

    def _check_arguments(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        repr_layers: Sequence[int],
        return_logits: bool,
    ) -> None:
        check_packed(input_ids, cu_seqlens, max_seqlen, self.device)
        for layer in repr_layers:
            if not 0 <= layer <= self.config.num_layers:
                raise ValueError(f"repr_layers: {layer} is not within 0 to {self.config.num_layers}")
        if return_logits and self.lm_head is None:
            raise ValueError(f"{self.model_name} has no language-model head, so it gives no logits")


def load_in_fp32(checkpoint: Checkpoint, device: torch.device) -> ESM2:
    """The model in FP32 on `device`, or on the CPU where there is no room for it.

    Raises:
        RuntimeError: there is no room on the CPU either.
    """
    fp32 = PRECISIONS["fp32"]

    def load(device: torch.device) -> ESM2:
        backend = select_backend("auto", device, fp32, checkpoint.config.head_dim)
        return ESM2.from_checkpoint(checkpoint, device, fp32, backend)

    try:
        return load(device)
    except (BackendError, RuntimeError, MemoryError) as error:
        if not isinstance(error, BackendError) and not is_out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return load(torch.device("cpu"))


def _refuse_training() -> NoReturn:
    raise NotImplementedError(
        "ESM2 is for inference only: its kernels record no gradients; train with fair-esm or transformers, "
        "whose checkpoints ESM2.from_pretrained reads"
    )


def _layer_numbers(layer: int | Sequence[int]) -> list[int]:
    numbers = list(layer) if isinstance(layer, Iterable) else [layer]
    if not numbers:
        raise ValueError("layer is empty; pass a number or a list of numbers")
    try:
        return [operator.index(number) for number in numbers]
    except TypeError:
        raise TypeError(f"layer {layer!r} is not a number or a list of numbers") from None


def _norm(norm: nn.LayerNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    return kernels.layer_norm(hidden_states, norm.weight, norm.bias, LAYER_NORM_EPS)


def _add_norm(norm: nn.LayerNorm, delta: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return kernels.add_layer_norm_(delta, residual, norm.weight, norm.bias, LAYER_NORM_EPS)


def _encode_named(name: str, sequence: str) -> npt.NDArray[np.uint8]:
    if not isinstance(sequence, str):
        raise TypeError(f"{name} is a {type(sequence).__name__}; pass a string of one-letter residues")
    try:
        ids = encode(sequence)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not ids.size:
        raise ValueError(f"{name} is empty")
    return ids
