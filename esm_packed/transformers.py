"""transformers' `EsmModel` and `EsmForMaskedLM` without padding: the same calls, the same outputs, for ESM-2.

from esm_packed.transformers import EsmModel
model = EsmModel.from_pretrained("facebook/esm2_t33_650M_UR50D")
output = model(**tokenizer(sequences, padding=True, return_tensors="pt"))

A batch is unpadded, computed in packs and padded again. transformers, whose configuration and output classes
are used, is imported when a model is loaded.
"""

from __future__ import annotations

import importlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from esm_packed.alphabet import MASK_ID, PAD_ID, VOCAB_SIZE
from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint, CheckpointError, load_checkpoint
from esm_packed.config import LAYER_NORM_EPS, ESM2Config
from esm_packed.model import ESM2
from esm_packed.modules import Linear
from esm_packed.numerics import DType, matmul_precision, resolve_device, resolve_precision
from esm_packed.packing import PackedBatch, default_token_budget, plan_packs

_INSTEAD = {
    "output_attentions": "attention maps are not kept; use transformers' model, or for contacts "
    "esm_packed.ESM2.predict_contacts",
    "labels": "the model is for inference only and computes no loss; train with transformers, whose "
    "checkpoints it reads",
    "inputs_embeds": "only tokens are embedded; pass input_ids",
    "position_ids": "positions count from the first token of each row; omit them",
    "encoder_hidden_states": "there is no cross-attention; leave them out",
    "encoder_attention_mask": "there is no cross-attention; leave it out",
    "device_map": "pass device, such as 'auto' or 'cuda:0'",
    "attn_implementation": "pass attention, one of esm_packed.attention.BACKENDS, or leave it out",
}
"""Arguments of transformers that are not supported, and what to do instead."""


class _Padded(NamedTuple):
    """Outputs as padded batches, zero where there is padding.

    Args:
        layers: layer to (batch, length, hidden_size).
        logits: (batch, length, vocab_size), or None when not asked for.
        first: (batch,) column of the first token of each row.
    """

    layers: dict[int, torch.Tensor]
    logits: torch.Tensor | None
    first: torch.Tensor


class _PackedModel(nn.Module):
    """`esm2` behind the interface of transformers' models. Created by `from_pretrained`.

    Args:
        esm2: computes.
        config: an EsmConfig.
        attention: attention backend; `auto` is chosen again when the model moves to another device.
    """

    def __init__(self, esm2: ESM2, config: Any, attention: str) -> None:
        super().__init__()
        self.esm2 = esm2
        self.config = config
        self._attention = attention
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: DType | None = None,
        torch_dtype: DType | None = None,
        add_pooling_layer: bool = True,
        attention: str = "auto",
        **unsupported: Any,
    ) -> Self:
        """Load a model.

        Args:
            name_or_path: as in `ESM2.from_pretrained`.
            device: `cpu`, `cuda`, `cuda:INDEX`, or `auto` for the first GPU, else the CPU. None is the CPU,
                as in transformers; `.to` moves the model from there.
            dtype: a dtype such as `torch.float16`, or a mode of `numerics.PRECISIONS`. None and `auto` take
                that of the directory's `config.json`, else FP32.
            torch_dtype: older name of `dtype`.
            add_pooling_layer: of `EsmModel`: whether to load the pooler.
            attention: attention backend, one of `attention.BACKENDS`, or `auto`.
            unsupported: arguments of transformers, rejected with an error that names the alternative.

        Raises:
            ImportError: transformers is not installed.
            CheckpointError: the checkpoint is missing, damaged or not an ESM-2, or `EsmForMaskedLM` finds no
                language-model head in it.
            BackendError: the attention backend does not support this device, dtype and head_dim.
            TypeError: `device` is neither a name nor a `torch.device`, or an argument is unknown.
            ValueError: the device or the dtype is unknown or unavailable, or an argument is not supported.

        Warns:
            UserWarning: the checkpoint has no pooler, or no rotary frequencies.
        """
        _refuse(unsupported)
        _transformers()
        device = resolve_device("cpu" if device is None else device)
        checkpoint = load_checkpoint(name_or_path)
        config = _config_of(checkpoint)
        dtype = torch_dtype if dtype is None else dtype
        if dtype is None or str(dtype) == "auto":
            dtype = getattr(config, "dtype", None) or torch.float32
        precision = resolve_precision(dtype, device)
        backend = select_backend(attention, device, precision, checkpoint.config.head_dim)
        model = cls(ESM2.from_checkpoint(checkpoint, device, precision, backend), config, attention)
        model._load_head(checkpoint, add_pooling_layer)
        return model

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and outputs."""
        return self.esm2.dtype

    @property
    def device(self) -> torch.device:
        """Where weights and outputs are."""
        return self.esm2.device

    def train(self, mode: bool = True) -> Self:
        """Not supported: the kernels record no gradients."""
        self.esm2.train(mode)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Not supported: the kernels record no gradients."""
        self.esm2.requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype:
            raise ValueError(
                "the dtype is chosen when loading: "
                f"{type(self).__name__}.from_pretrained(..., dtype={moved.dtype})"
            )
        device = resolve_device(moved.device)
        precision = resolve_precision(self.esm2.precision, device)
        backend = select_backend(self._attention, device, precision, self.esm2.config.head_dim)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if backend[0] != self.esm2.attention_backend:
            self.esm2 = self.esm2.with_attention(backend)
        return self

    @abstractmethod
    def _load_head(self, checkpoint: Checkpoint, add_pooling_layer: bool) -> None:
        """Load the parts of the model other than its layers."""

    def _compute(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        layers: list[int],
        return_logits: bool = False,
    ) -> _Padded:
        token_ids, bounds = unpad(input_ids, attention_mask)
        lengths = bounds[:, 1] - bounds[:, 0]

        def zeros(columns: int) -> torch.Tensor:
            return torch.zeros(*token_ids.shape, columns, dtype=self.dtype, device=self.device)

        padded = {layer: zeros(self.esm2.config.hidden_size) for layer in layers}
        logits = zeros(VOCAB_SIZE) if return_logits else None
        for members in plan_packs(lengths, default_token_budget(self.device)):
            rows = np.concatenate([np.arange(*bounds[row]) + row * token_ids.shape[1] for row in members])
            ends = np.append(0, lengths[members].cumsum()).astype(np.int32)
            packed = PackedBatch(
                torch.from_numpy(token_ids.ravel()[rows]),
                torch.from_numpy(ends),
                int(lengths[members].max()),
            )
            output = self.esm2(packed.to(self.device), layers, return_logits)
            places = torch.from_numpy(rows).to(self.device)
            for layer, states in output.representations.items():
                padded[layer].flatten(0, 1)[places] = states.to(self.dtype)
            if logits is not None:
                logits.flatten(0, 1)[places] = output.logits
        return _Padded(padded, logits, torch.from_numpy(bounds[:, 0]).to(self.device))

    def _kept_layers(self, output_hidden_states: bool | None) -> range:
        """The layers that `hidden_states` has: all of them, or none."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(output_hidden_states, bool):
            raise ValueError(f"output_hidden_states is {output_hidden_states!r}; pass True or False")
        return range(self.esm2.config.num_layers + 1 if output_hidden_states else 0)

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        """`output`, or a tuple of its fields that are not None."""
        as_it_is = self.config.return_dict if return_dict is None else return_dict
        return output if as_it_is else output.to_tuple()


class EsmModel(_PackedModel):
    """transformers' EsmModel for ESM-2, without padding.

    Attributes:
        pooler: dense layer of the pooler; None if the checkpoint has none.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> Any:
        """Run the model over a padded batch.

        Args:
            input_ids: (batch, length) integers, on any device.
            attention_mask: (batch, length), 1 or True for the tokens of each row, which must be contiguous,
                and 0 for the padding before and after them; None if all are tokens.
            output_hidden_states: whether to keep every layer; None takes `config.output_hidden_states`.
            return_dict: False for a plain tuple; None takes `config.return_dict`.
            unsupported: further arguments of transformers, rejected with an error that names the alternative.

        Returns:
            transformers' BaseModelOutputWithPoolingAndCrossAttentions, in `dtype` on `device`:
            `last_hidden_state` (batch, length, hidden_size); `hidden_states`, num_layers + 1 of these, the
            first being the embedding, the last `last_hidden_state`; `pooler_output` (batch, hidden_size), of
            the first token of each row, None without a pooler. Rows of padding are zero, where transformers
            has meaningless values. Values that overflow in a half type are returned unchanged.

        Raises:
            ValueError: a tensor has the wrong shape or values, a row has no token or padding between its
                tokens, or an argument is not supported.
            TypeError: an argument is unknown.
        """
        _refuse(unsupported)
        last, kept = self.esm2.config.num_layers, self._kept_layers(output_hidden_states)
        padded = self._compute(input_ids, attention_mask, list(kept) or [last])
        states = padded.layers[last]
        pooled = None
        if self.pooler is not None:
            first = states[torch.arange(len(states), device=self.device), padded.first]
            with torch.no_grad(), matmul_precision(self.esm2.precision_mode):
                pooled = self.pooler(first).tanh()
        output = _transformers("modeling_outputs").BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=states,
            pooler_output=pooled,
            hidden_states=tuple(padded.layers[layer] for layer in kept) or None,
        )
        return self._returned(output, return_dict)

    def _load_head(self, checkpoint: Checkpoint, add_pooling_layer: bool) -> None:
        self.pooler: Linear | None = None
        if not add_pooling_layer:
            return
        weight, bias = (checkpoint.unused.get(f"pooler.dense.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None:
            warnings.warn(
                f"{checkpoint.source} has no pooler: pooler_output is None, where transformers makes a "
                "random one; add_pooling_layer=False says that none is needed",
                stacklevel=3,
            )
            return
        size = checkpoint.config.hidden_size
        if weight.shape != (size, size) or bias.shape != (size,):
            raise CheckpointError(
                f"{checkpoint.source}: pooler.dense has shapes {tuple(weight.shape)} and "
                f"{tuple(bias.shape)}, not {(size, size)} and {(size,)}"
            )
        pooler = Linear(size, size, dtype=self.dtype, device=self.device).requires_grad_(False).eval()
        pooler.weight.copy_(weight)
        pooler.bias.copy_(bias)
        self.pooler = pooler


class EsmForMaskedLM(_PackedModel):
    """transformers' EsmForMaskedLM for ESM-2, without padding."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> Any:
        """As `EsmModel.forward`, but for the outputs.

        Returns:
            transformers' MaskedLMOutput: `logits` (batch, length, vocab_size), `hidden_states` as in
            `EsmModel.forward`. Rows of padding are zero.
        """
        _refuse(unsupported)
        kept = self._kept_layers(output_hidden_states)
        padded = self._compute(input_ids, attention_mask, list(kept), return_logits=True)
        output = _transformers("modeling_outputs").MaskedLMOutput(
            logits=padded.logits,
            hidden_states=tuple(padded.layers[layer] for layer in kept) or None,
        )
        return self._returned(output, return_dict)

    def _load_head(self, checkpoint: Checkpoint, add_pooling_layer: bool) -> None:
        if self.esm2.lm_head is None:
            raise CheckpointError(
                f"{checkpoint.source} has no language-model head: use EsmModel, or save the checkpoint from "
                "transformers' EsmForMaskedLM"
            )


def esm_config(config: ESM2Config, **changes: Any) -> Any:
    """transformers' EsmConfig as the hub's ESM-2 repositories have it, for a model of this shape.

    Raises:
        ImportError: transformers is not installed.
    """
    settings = {
        "vocab_size": VOCAB_SIZE,
        "mask_token_id": MASK_ID,
        "pad_token_id": PAD_ID,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "layer_norm_eps": LAYER_NORM_EPS,
        "token_dropout": config.token_dropout,
    }
    return _transformers().EsmConfig(**(settings | changes))


def unpad(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The tokens of a padded batch, checked, on the host.

    Args:
        input_ids: (batch, length) integers.
        attention_mask: (batch, length) of 0 and 1; None for all ones.

    Returns:
        (batch, length) token ids, and (batch, 2): first column with a token in each row, and the one behind
        the last.

    Raises:
        ValueError: names the argument, and the row, that does not fit.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shown = getattr(input_ids, "shape", input_ids)
        raise ValueError(f"input_ids must be a (batch, length) tensor of integers, got {shown}")
    token_ids = input_ids.cpu().numpy()
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < VOCAB_SIZE:
        raise ValueError(
            f"input_ids are {token_ids.min()} to {token_ids.max()}, ESM-2's tokens are 0 to "
            f"{VOCAB_SIZE - 1}: use the tokenizer of an ESM-2"
        )
    is_token = np.ones(token_ids.shape, dtype=bool)
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
            shown = getattr(attention_mask, "shape", attention_mask)
            raise ValueError(
                f"attention_mask must be a tensor of shape {tuple(input_ids.shape)}, got {shown}"
            )
        mask = attention_mask.cpu()
        is_token = (mask == 1).numpy()
        if not ((mask == 0).numpy() | is_token).all():
            raise ValueError("attention_mask must hold 1 for tokens and 0 for padding, and nothing else")
    lengths = is_token.sum(1)
    if not lengths.all():
        raise ValueError(f"attention_mask: row {lengths.argmin()} has no token; remove the row")
    first = is_token.argmax(1)
    last = token_ids.shape[1] - is_token[:, ::-1].argmax(1)
    if (holes := last - first != lengths).any():
        raise ValueError(
            f"attention_mask: row {holes.argmax()} has padding between its tokens; pad before or after them"
        )
    return token_ids.astype(np.int32), np.stack([first, last], axis=1)


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Raise for arguments that are given and that these models do not take."""
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        if name in _INSTEAD:
            raise ValueError(f"{name} is not supported: {_INSTEAD[name]}")
        raise TypeError(f"{name!r} is not an argument of esm_packed.transformers' models")


def _config_of(checkpoint: Checkpoint) -> Any:
    """EsmConfig of a checkpoint's directory, or one built from its shape if it is not a directory."""
    if Path(checkpoint.source).is_dir():
        return _transformers().EsmConfig.from_pretrained(checkpoint.source)
    return esm_config(checkpoint.config)


def _transformers(module: str = "") -> Any:
    try:
        return importlib.import_module(f"transformers.{module}".rstrip("."))
    except ImportError as error:
        raise ImportError(
            "esm_packed.transformers needs transformers: pip install 'transformers>=5'"
        ) from error
