"""esm-packed and its rivals, each loaded with the same weights and used the way its users do.

`prepare` creates the batches on the device, `run` computes (only this is timed), `embeddings` and `logits`
return the results of the last `run` in the order of the sequences. A rival's packages are imported when it is
created.
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from contenders.batching import LAYOUTS, computed_lengths
from contenders.flash_attn_stand_in import flash_attn_importable
from measuring import DEVICE, flops_of

from esm_packed.alphabet import BOS_ID, EOS_ID, PAD_ID, encode
from esm_packed.checkpoints import load_checkpoint, save_fair_esm
from esm_packed.config import ESM2Config
from esm_packed.graphs import GraphedESM2
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS, matmul_precision
from esm_packed.outputs import mean_of
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch
from esm_packed.transformers import EsmModel, esm_config


class Provider(Protocol):
    """One contender of the benchmark.

    `backend` says how it computes, `token_budget` how many tokens, padding included, `prepare` puts into a
    batch, `padded_tokens` how many tokens `run` computes, padding included; `rounded_frequencies` says
    whether its rotary frequencies are the checkpoint's, which are rounded to FP16; `weight_bytes` is the size
    of its parameters and buffers.
    """

    backend: str
    token_budget: int
    padded_tokens: int
    rounded_frequencies: bool
    weight_bytes: int

    def prepare(self, sequences: Sequence[str]) -> None: ...

    def run(self) -> None: ...

    def embeddings(self) -> torch.Tensor: ...

    def logits(self) -> list[torch.Tensor] | None: ...


class _Batched:
    """Rows of embeddings that `run` collects per batch, restored to the order of the sequences."""

    token_budget: int
    rounded_frequencies = True

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.members: list[Sequence[int]] = []
        self.rows: list[torch.Tensor] = []
        self.padded_tokens = 0
        self.weight_bytes = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))

    def embeddings(self) -> torch.Tensor:
        rows = torch.cat(self.rows)
        ordered = torch.full_like(rows, torch.nan)  # rows no batch computes must not look like embeddings
        ordered[torch.tensor([index for members in self.members for index in members])] = rows
        return ordered.cpu()

    def logits(self) -> list[torch.Tensor] | None:
        return None


def lay_out(
    sequences: Sequence[str], token_budget: int, layout: str = "packed"
) -> list[tuple[list[int], PackedBatch]]:
    """For each pack, the indices of its sequences and the batch on the device."""
    token_ids = [encode(sequence) for sequence in sequences]
    way = LAYOUTS[layout]
    plan = way.plan([len(ids) + SPECIAL_TOKENS for ids in token_ids], token_budget)
    return [
        (members.tolist(), way.lay_out([token_ids[index] for index in members], token_budget).to(DEVICE))
        for members in plan
    ]


class EsmPacked(_Batched):
    """This package: batches of `token_budget` tokens in one of `batching.LAYOUTS`, mean of the last layer.

    With `graphs` forward passes are replayed as CUDA graphs, which requires the layout `fixed`.
    """

    def __init__(
        self, model: ESM2, token_budget: int, layout: str = "packed", *, graphs: bool = False
    ) -> None:
        super().__init__(model)
        self.computing = GraphedESM2(model) if graphs else LAYOUTS[layout].prepare(model)
        self.token_budget = token_budget
        self.layout = layout
        self.backend = "sdpa, masked" if layout.startswith("padded") else model.attention_backend

    def prepare(self, sequences: Sequence[str]) -> None:
        batches = lay_out(sequences, self.token_budget, self.layout)
        self.members = [members for members, _ in batches]
        self.batches = [batch for _, batch in batches]
        self.padded_tokens = sum(batch.total_tokens for batch in self.batches)
        lengths = np.concatenate([computed_lengths(batch, self.layout) for batch in self.batches])
        self.computed_flops = flops_of(self.model.config, lengths - SPECIAL_TOKENS)

    def run(self) -> None:
        last = self.model.config.num_layers
        self.rows = [
            self.computing.embed_packed(batch, [mean_of(last)])[mean_of(last)] for batch in self.batches
        ]


class FairEsm(_Batched):
    """fair-esm 2.0.0 with batches formed as in its script esm-extract.

    Its forward pass always computes logits as well. FP16 means `model.half()`, which also computes the rotary
    angles in FP16.
    """

    def __init__(self, model_name: str, dtype: str, token_budget: int) -> None:
        reference = importlib.import_module("fair_esm_reference")
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "esm2_peer.pt"
            save_fair_esm(load_checkpoint(model_name), path)
            model = reference.load(path, torch.float32)
        super().__init__(model.to(DEVICE, PRECISIONS[dtype].dtype))
        self._convert = reference.ALPHABET.get_batch_converter()
        self.token_budget = token_budget
        self.backend = "batches as esm-extract forms them"
        self.precision = PRECISIONS[dtype]

    def prepare(self, sequences: Sequence[str]) -> None:
        dataset = importlib.import_module("esm.data").FastaBatchedDataset
        numbered = dataset([str(index) for index in range(len(sequences))], sequences)
        self.members = numbered.get_batch_indices(self.token_budget, 1)
        self.lengths = [[len(sequences[index]) for index in members] for members in self.members]
        self.tokens = [
            self._convert([("", sequences[index]) for index in batch])[2].to(DEVICE) for batch in self.members
        ]
        self.padded_tokens = sum(tokens.numel() for tokens in self.tokens)

    @torch.no_grad()
    def run(self) -> None:
        last = self.model.num_layers
        self.rows = []
        with matmul_precision(self.precision):
            for tokens, lengths in zip(self.tokens, self.lengths, strict=True):
                hidden_states = self.model(tokens, repr_layers=[last])["representations"][last]
                self.rows.append(_residue_means(hidden_states, lengths))


class Transformers(_Batched):
    """transformers' EsmModel with SDPA on padded batches of `layout`, means over residues."""

    prefix = "esm."
    """Prefix of tensor names on the hub, which the model's own names lack."""

    def __init__(
        self,
        model_name: str,
        dtype: str,
        token_budget: int,
        layout: str = "padded",
        *,
        compiled: bool = False,
    ) -> None:
        checkpoint = load_checkpoint(model_name)
        with torch.device(DEVICE):  # the fastest place to create values that are replaced immediately
            model = self._make(checkpoint.config)
        tensors = {
            name.removeprefix(self.prefix): tensor for name, tensor in hub_tensors(checkpoint.tensors).items()
        }
        frequencies = checkpoint.tensors["layers.0.self_attn.rot_emb.inv_freq"]
        wanted = model.state_dict()
        tensors |= {name: frequencies for name in wanted if name.endswith("inv_freq")}
        # Not strict: versions differ in buffers, and the results are checked against FP64 anyway.
        model.load_state_dict({name: tensors[name] for name in wanted if name in tensors}, strict=False)
        model = model.to(DEVICE, PRECISIONS[dtype].dtype).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("inv_freq"):  # `from_pretrained` also leaves it in FP32
                buffer.data = frequencies.to(DEVICE, torch.float32)
        super().__init__(model)
        self._forward: Callable[..., Any] = torch.compile(model, dynamic=True) if compiled else model
        self._feed(token_budget, layout, dtype)
        self.backend = f"{model.config._attn_implementation}, {LAYOUTS[layout].algorithm}"

    def _feed(self, token_budget: int, layout: str, dtype: str) -> None:
        self.token_budget, self.layout, self.precision = token_budget, layout, PRECISIONS[dtype]

    def _make(self, config: ESM2Config) -> Any:
        hub = esm_config(config, attn_implementation="sdpa")
        return importlib.import_module("transformers").EsmModel(hub, add_pooling_layer=False)

    def prepare(self, sequences: Sequence[str]) -> None:
        lengths = [len(sequence) + SPECIAL_TOKENS for sequence in sequences]
        plan = LAYOUTS[self.layout].plan(lengths, self.token_budget)
        self.members = [members.tolist() for members in plan]
        self.lengths = [[len(sequences[index]) for index in members] for members in self.members]
        self.inputs = []
        for members in self.members:
            input_ids, mask = padded_inputs([sequences[index] for index in members])
            self.inputs.append((input_ids.to(DEVICE), mask.to(DEVICE)))
        self.padded_tokens = sum(input_ids.numel() for input_ids, _ in self.inputs)

    @torch.no_grad()
    def run(self) -> None:
        self.rows = []
        with matmul_precision(self.precision):
            for (input_ids, mask), lengths in zip(self.inputs, self.lengths, strict=True):
                output = self._forward(input_ids=input_ids, attention_mask=mask)
                self.rows.append(_residue_means(output.last_hidden_state, lengths))


class PackedTransformers(Transformers):
    """This package's EsmModel on the same batches, which it unpads and pads again in the timed call."""

    def __init__(self, model_name: str, dtype: str, token_budget: int, layout: str = "padded") -> None:
        model = EsmModel.from_pretrained(model_name, device=DEVICE, dtype=dtype, add_pooling_layer=False)
        _Batched.__init__(self, model)
        self._forward = model
        self._feed(token_budget, layout, dtype)
        self.backend = model.esm2.attention_backend

    def prepare(self, sequences: Sequence[str]) -> None:
        super().prepare(sequences)
        self.padded_tokens = sum(int(mask.sum()) for _, mask in self.inputs)


class Faesm(Transformers):
    """faesm's FAEsmModel: transformers' model with FlashAttention, or with SDPA if that is missing."""

    def __init__(self, model_name: str, dtype: str, token_budget: int) -> None:
        super().__init__(model_name, dtype, token_budget)
        self.backend = "flash_attn" if self.model.config.use_fa else "sdpa, padded, sorted by length"

    def _make(self, config: ESM2Config) -> Any:
        faesm = importlib.import_module("faesm.esm")
        hub = esm_config(config, attn_implementation="eager")  # it replaces the attention itself
        hub.use_fa = faesm.flash_attn_installed and DEVICE.type == "cuda"
        return faesm.FAEsmModel(hub, add_pooling_layer=False)


class EsmEfficient(_Batched):
    """esm-efficient's ESM2 on packed tokens, means over residues.

    It has no token dropout and computes its own rotary frequencies: its embedding is scaled by 0.88 and its
    frequencies are set to the checkpoint's, so that it computes the same model. If flash-attn is missing, it
    uses a stand-in based on PyTorch's packed attention.
    """

    def __init__(self, model_name: str, dtype: str, token_budget: int) -> None:
        with flash_attn_importable() as attention:
            esme = importlib.import_module("esme.esm")
        checkpoint = load_checkpoint(model_name)
        config = checkpoint.config
        half = PRECISIONS[dtype].dtype
        model = esme.ESM2(config.num_layers, config.hidden_size, config.num_heads, dtype=half)
        tensors = {_esme_name(name): tensor for name, tensor in checkpoint.tensors.items()}
        tensors["lm_head.final.weight"] = tensors["embed_tokens.weight"]
        if config.token_dropout:
            tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"] * (1 - 0.15 * 0.8)
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        for layer in model.layers:
            layer.self_attn.rot_emb.inv_freq = checkpoint.tensors[
                "layers.0.self_attn.rot_emb.inv_freq"
            ].float()
        super().__init__(model.to(DEVICE).eval())
        self.token_budget = token_budget
        self.backend = attention
        self.precision = PRECISIONS[dtype]

    def prepare(self, sequences: Sequence[str]) -> None:
        batches = lay_out(sequences, self.token_budget)
        self.members = [members for members, _ in batches]
        self.lengths = [[len(sequences[index]) for index in members] for members in self.members]
        self.inputs = [
            (batch.input_ids.long(), (batch.cu_seqlens, batch.max_seqlen), batch.cu_seqlens.tolist())
            for _, batch in batches
        ]
        self.padded_tokens = sum(batch.total_tokens for _, batch in batches)

    @torch.no_grad()
    def run(self) -> None:
        self.rows = []
        with matmul_precision(self.precision):
            for tokens, pad_args, bounds in self.inputs:
                states = self.model.forward_representation(tokens, pad_args)
                means = [states[a + 1 : b - 1].float().mean(0) for a, b in pairwise(bounds)]
                self.rows.append(torch.stack(means))


_ESME_NAMES = {
    r"\.self_attn_layer_norm\.": ".self_attn.norm.",
    r"\.final_layer_norm\.": ".final.0.",
    r"\.fc1\.": ".final.1.",
    r"\.fc2\.": ".final.3.",
    r"\.(q|k|v|out)_proj\.": r".\1.",
    r"^lm_head\.(weight|bias)$": r"lm_head.final.\1",
}


def _esme_name(name: str) -> str:
    for pattern, replacement in _ESME_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _residue_means(hidden_states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    rows = zip(hidden_states, lengths, strict=True)
    return torch.stack([row[1 : length + 1].float().mean(0) for row, length in rows])


def token_ids_with_ends(sequence: str) -> torch.Tensor:
    """BOS, residues, EOS as int64."""
    return torch.tensor([BOS_ID, *encode(sequence).tolist(), EOS_ID])


def padded_inputs(sequences: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask for transformers, both (num_sequences, max_seqlen) int64 on the CPU."""
    rows = [token_ids_with_ends(sequence) for sequence in sequences]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    return input_ids, (input_ids != PAD_ID).long()


_HUB_NAMES = {
    r"^embed_tokens\.": "esm.embeddings.word_embeddings.",
    r"^emb_layer_norm_after\.": "esm.encoder.emb_layer_norm_after.",
    r"^contact_head\.": "esm.contact_head.",
    r"^layers\.": "esm.encoder.layer.",
    r"\.self_attn_layer_norm\.": ".attention.LayerNorm.",
    r"\.final_layer_norm\.": ".LayerNorm.",
    r"\.self_attn\.q_proj\.": ".attention.self.query.",
    r"\.self_attn\.k_proj\.": ".attention.self.key.",
    r"\.self_attn\.v_proj\.": ".attention.self.value.",
    r"\.self_attn\.rot_emb\.": ".attention.self.rotary_embeddings.",
    r"\.self_attn\.out_proj\.": ".attention.output.dense.",
    r"\.fc1\.": ".intermediate.dense.",
    r"\.fc2\.": ".output.dense.",
}


def hub_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under their names on the Hugging Face hub."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _HUB_NAMES.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
