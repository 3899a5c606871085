"""ESM-2 on packed sequences, top to bottom.

The model is that of Lin et al. 2023 ("Evolutionary-scale prediction of atomic-level protein structure with a
language model", Science 379) as fair-esm 2.0.0 computes it. Sequences lie end to end in one tensor of
`total_tokens` rows; no row is padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import nn

from esm_packed import embedding, kernels, scoring
from esm_packed.alphabet import MASK_ID, VOCAB_SIZE
from esm_packed.attention import BackendError, PackedAttention, select_backend
from esm_packed.checkpoints import Checkpoint, load_checkpoint
from esm_packed.checkpoints.names import fill_parameter
from esm_packed.config import DEFAULT_MODEL, ESM2Config
from esm_packed.contacts import forward as forward_with_contacts
from esm_packed.modules import Attention, LayerNorm, Linear, LinearGELU, LMHead, QKVProjection
from esm_packed.numerics import (
    PRECISIONS,
    DType,
    Precision,
    is_out_of_memory,
    matmul_precision,
    resolve_device,
    resolve_precision,
)
from esm_packed.outputs import layer_of, needs_contacts, needs_logits
from esm_packed.packing import PackedBatch, check_packed
from esm_packed.readout import kept_outputs
from esm_packed.rescue import Rescue
from esm_packed.rotary import RotaryTables

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class PackedOutput:
    """Output of `ESM2.forward_packed`.

    Args:
        representations: layer to (total_tokens, hidden_size); 0 is the embedding, the last is normalized.
        logits: (total_tokens, vocab_size), or None when not asked for.

    Of a batch with `rows`, logits and the last layer are of these tokens alone.
    """

    representations: dict[int, torch.Tensor]
    logits: torch.Tensor | None


class Layer(nn.Module):
    """The parts of one transformer layer, in the order in which `ESM2` calls them.

    They are called from there because a `forward` here would keep its argument alive for too long. Queries,
    keys and values share one projection.
    """

    def __init__(self, config: ESM2Config, dtype: torch.dtype, attend: PackedAttention) -> None:
        super().__init__()
        hidden_size, ffn_size = config.hidden_size, config.ffn_size
        self.attention_norm = LayerNorm(hidden_size, dtype)
        self.qkv = QKVProjection(hidden_size, config.head_dim, dtype)
        self.attention = Attention(config, attend)
        self.attention_out = Linear(hidden_size, hidden_size, dtype=dtype)
        self.ffn_norm = LayerNorm(hidden_size, dtype)
        self.fc1 = LinearGELU(hidden_size, ffn_size, dtype=dtype)
        self.fc2 = Linear(ffn_size, hidden_size, dtype=dtype)


class ESM2(nn.Module):
    """ESM-2, computing in one precision on one device. Created by `ESM2.from_pretrained`.

    Args:
        config: shape of the model.
        precision: what it computes in.
        backend: name and function of an attention backend, as `attention.select_backend` gives them.
        lm_head: whether there is a language-model head.
        contact_head: whether there is a contact head.
    """

    def __init__(
        self,
        config: ESM2Config,
        precision: Precision,
        backend: tuple[str, PackedAttention],
        *,
        lm_head: bool = True,
        contact_head: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.precision_mode = precision
        self.attention_backend, attend = backend
        self.model_name = ""
        self.model_sha256 = ""
        self.rescue = Rescue(None)
        dtype, num_maps = precision.dtype, config.num_layers * config.num_heads
        # weights that are not given are drawn, and to draw them on the meta device imports torch's compiler
        weights = torch.empty(VOCAB_SIZE, config.hidden_size, dtype=dtype)
        self.embedding = nn.Embedding(VOCAB_SIZE, config.hidden_size, _weight=weights)
        self.rotary = RotaryTables(config.head_dim, precision.table_dtype)
        self.layers: Iterable[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, dtype, attend) for _ in range(config.num_layers)
        )
        self.final_norm = LayerNorm(config.hidden_size, dtype)
        self.lm_head = LMHead(config, dtype) if lm_head else None
        self.contact_head = nn.Linear(num_maps, 1, dtype=dtype) if contact_head else None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        device: str | torch.device = "auto",
        dtype: DType | None = None,
        attention: str = "auto",
    ) -> ESM2:
        """Load a model.

        Args:
            name_or_path: an ESM-2 name, a checkpoint file or directory, `demo`, or `random:NAME`
                (see `checkpoints.load_checkpoint`).
            device: `cpu`, `cuda`, `cuda:INDEX`, or `auto` for the first GPU, else the CPU.
            dtype: precision mode, one of `numerics.PRECISIONS`, or a dtype such as `torch.float16`; None
                takes the device's default, `fp16` on CUDA and `fp32` on a CPU.
            attention: attention backend, one of `attention.BACKENDS`, or `auto`.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or not an ESM-2.
            BackendError: the attention backend does not support this device, dtype and head_dim.
            TypeError: `device` is neither a name nor a `torch.device`.
            ValueError: the device or the precision mode is unknown or unavailable.
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
                precision,
                backend,
                lm_head="lm_head.bias" in tensors,
                contact_head="contact_head.regression.weight" in tensors,
            )
        # as `to_empty` does, which imports torch's compiler for it, a second or more
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        model.requires_grad_(False).eval()
        for name, parameter in model.named_parameters():
            fill_parameter(parameter, name, tensors)
        for module in model.modules():
            if isinstance(module, Linear):
                module.pack()
        model.rotary.inv_freq.copy_(tensors["layers.0.self_attn.rot_emb.inv_freq"])
        model.model_name, model.model_sha256 = checkpoint.model_name, checkpoint.sha256
        if precision.is_below_fp32:
            model.rescue = Rescue(partial(load_in_fp32, checkpoint, device))
        return model

    def with_attention(
        self, backend: tuple[str, PackedAttention], precision: Precision | None = None
    ) -> ESM2:
        """The same weights, shared and not copied, with another attention backend.

        Args:
            backend: name and function, as `attention.select_backend` gives them.
            precision: what it computes in, for weights of this dtype; None for what this model computes in.

        Raises:
            ValueError: `precision` is for weights of another dtype.
        """
        model = _shallow_copy(self)
        model.precision_mode = precision or self.precision_mode
        if model.precision_mode.dtype != self.dtype:
            raise ValueError(f"precision {model.precision!r}: the weights that are shared are {self.dtype}")
        model.attention_backend, attend = backend
        model.layers = nn.ModuleList(_shallow_copy(layer) for layer in self.layers)  # type: ignore[assignment]
        for layer in model.layers:
            layer.attention = Attention(self.config, attend)
        return model

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
    ) -> PackedOutput:
        """Run the model over packed sequences (`packing.pack` makes them).

        Args:
            input_ids: (total_tokens,) int32 or int64; every sequence is BOS, residues, EOS.
            cu_seqlens: (num_sequences + 1,) int32, starting at 0, ending at total_tokens.
            max_seqlen: tokens of the longest sequence.
            repr_layers: layers to return, 0 (embedding) to num_layers (after the final LayerNorm).
            return_logits: whether to run the language-model head.

        Raises:
            ValueError: a tensor has the wrong shape, dtype or device, a layer does not exist, or logits are
                requested from a checkpoint without a language-model head.
        """
        batch = PackedBatch(input_ids, cu_seqlens, max_seqlen)
        output: PackedOutput = self(batch, repr_layers, return_logits)
        return output

    def forward(
        self,
        batch: PackedBatch | None = None,
        repr_layers: Sequence[int] = (),
        return_logits: bool = False,
    ) -> PackedOutput:
        """As `forward_packed`, for a batch in one piece; forward hooks see it.

        Raises:
            TypeError: `batch` is not a `PackedBatch`.
            ValueError: as `forward_packed`; or the batch has rows of another shape, dtype or device.
        """
        if not isinstance(batch, PackedBatch):
            raise TypeError(
                "ESM2 is not called with sequences or tensors: call model.embed(sequences) with a list of "
                "proteins, or model.forward_packed(input_ids, cu_seqlens, max_seqlen) with the tensors that "
                "esm_packed.packing.pack makes"
            )
        check_packed(batch, self.device)
        for layer in repr_layers:
            if not 0 <= layer <= self.config.num_layers:
                raise ValueError(f"repr_layers: {layer} is not within 0 to {self.config.num_layers}")
        if return_logits and self.lm_head is None:
            raise ValueError(f"{self.model_name} has no language-model head, so it gives no logits")
        with torch.no_grad(), matmul_precision(self.precision_mode):
            return self._forward(batch, set(repr_layers), return_logits)

    def _forward(self, batch: PackedBatch, repr_layers: set[int], return_logits: bool) -> PackedOutput:
        rotary_tables = self.rotary(batch.max_seqlen)
        mask_id = MASK_ID if self.config.token_dropout else None
        representations = {}

        # Each addition to the residual stream is fused with the following LayerNorm. All other activations
        # share one name, so that each is freed before the next one is computed.
        layers = list(self.layers)
        next_norms = [layer.attention_norm for layer in layers[1:]] + [self.final_norm]
        residual, position_ids = kernels.embed_tokens(
            batch.input_ids,
            batch.cu_seqlens,
            self.embedding.weight,
            mask_id,
            self.precision_mode.residual_dtype,
        )
        hidden_states = layers[0].attention_norm(residual)
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            if index in repr_layers:
                representations[index] = residual.clone()

            hidden_states = layer.qkv(hidden_states, rotary_tables, position_ids)
            hidden_states = layer.attention(hidden_states, batch)
            if batch.rows is not None and next_norm is self.final_norm:
                # from here on no token depends on another
                hidden_states, residual = hidden_states[batch.rows], residual[batch.rows]
            hidden_states = layer.attention_out(hidden_states)
            hidden_states = layer.ffn_norm(hidden_states, residual)

            hidden_states = layer.fc1(hidden_states)
            hidden_states = layer.fc2(hidden_states)
            hidden_states = next_norm(hidden_states, residual)

        if len(layers) in repr_layers:
            representations[len(layers)] = hidden_states
        logits = None
        if return_logits and self.lm_head is not None:
            logits = self.lm_head(hidden_states, self.embedding.weight)
        return PackedOutput(representations, logits)

    def embed_packed(
        self, batch: PackedBatch, names: Sequence[str], residue_dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs of each sequence, such as the mean embedding of the last layer of 33, `mean/33`.

        Unlike `embed`, which waits for the device, this does not check for values that overflow.

        Args:
            batch: the sequences, on the model's device.
            names: of the outputs, as `outputs.output_names` gives them.
            residue_dtype: of outputs with a row for each residue, or each pair of residues.

        Returns:
            See `readout.kept_outputs`; on the model's device.

        Raises:
            CheckpointError: contacts are requested, but the checkpoint has no contact-regression weights.
        """
        layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
        contacts: list[torch.Tensor] = []
        if needs_contacts(names):
            output, contacts = forward_with_contacts(self, batch, layers, needs_logits(names))
        else:
            output = self(batch, layers, needs_logits(names))
        return kept_outputs(output, batch, names, residue_dtype, contacts)

    embed = embedding.embed
    contacts = embedding.contacts
    predict_contacts = embedding.predict_contacts
    attention_maps = embedding.attention_maps
    score = scoring.score
    log_probabilities = scoring.log_probabilities
    pseudo_log_likelihood = scoring.pseudo_log_likelihood

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ESM2:
        # `.half()` would round inv_freq and leave `precision` untrue.
        if fn(torch.empty(0, dtype=self.dtype)).dtype != self.dtype:
            raise ValueError("the precision is chosen when loading: ESM2.from_pretrained(..., dtype='fp16')")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def train(self, mode: bool = True) -> ESM2:
        """Not supported: the kernels record no gradients."""
        if mode:
            _refuse_training()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> ESM2:
        """Not supported: the kernels record no gradients."""
        if requires_grad:
            _refuse_training()
        return super().requires_grad_(requires_grad)


def load_in_fp32(checkpoint: Checkpoint, device: torch.device) -> ESM2:
    """The model in FP32 on `device`, or on the CPU if `device` has too little memory.

    Raises:
        RuntimeError: the CPU has too little memory, too.
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


def _shallow_copy(module: _Module) -> _Module:
    """A module of its own with the same parts and parameters."""
    copied = copy.copy(module)
    copied._modules = copied._modules.copy()
    return copied
