"""esm-packed and its rivals, each loaded with the same weights and fed the way its users feed it.

`prepare` makes the batches, `run` computes (only this is timed), `embeddings` and `logits` give what the last
`run` computed, in the order of the sequences.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import fair_esm_reference
import torch
from esm.data import FastaBatchedDataset
from transformers import EsmConfig, EsmModel

from esm_packed.alphabet import BOS_ID, EOS_ID, MASK_ID, PAD_ID, VOCAB_SIZE, encode
from esm_packed.config import ESM2Config
from esm_packed.model import ESM2, LAYER_NORM_EPS
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch, pack, plan_packs
from esm_packed.weights import load_checkpoint, save_fair_esm

PADDED_TOKENS_PER_BATCH = 4096


class Provider(Protocol):
    """One contender of the benchmark.

    `backend` says how it computes, `padded_tokens` how many tokens `run` computes, padding included;
    `rounded_frequencies` whether its rotary frequencies are the checkpoint's, which are rounded to FP16.
    """

    backend: str
    padded_tokens: int
    rounded_frequencies: bool

    def prepare(self, sequences: Sequence[str]) -> None: ...

    def run(self) -> None: ...

    def embeddings(self) -> torch.Tensor: ...

    def logits(self) -> list[torch.Tensor] | None: ...


class _Batched:
    """Rows of embeddings that `run` collects batch by batch, put back into the order of the sequences."""

    rounded_frequencies = True

    def __init__(self) -> None:
        self.members: list[Sequence[int]] = []
        self.rows: list[torch.Tensor] = []
        self.padded_tokens = 0

    def embeddings(self) -> torch.Tensor:
        rows = torch.cat(self.rows)
        ordered = torch.empty_like(rows)
        ordered[torch.tensor([index for members in self.members for index in members])] = rows
        return ordered

    def logits(self) -> list[torch.Tensor] | None:
        return None


def sorted_batches(sequences: Sequence[str], extra_tokens_per_sequence: int) -> list[list[int]]:
    """Batches by length as fair-esm's esm-extract makes them."""
    dataset = FastaBatchedDataset([str(index) for index in range(len(sequences))], sequences)
    batches: list[list[int]] = dataset.get_batch_indices(PADDED_TOKENS_PER_BATCH, extra_tokens_per_sequence)
    return batches


class EsmPacked(_Batched):
    """This package: packs of `token_budget` tokens, mean of the last layer."""

    def __init__(self, model: ESM2, token_budget: int) -> None:
        super().__init__()
        self.model = model
        self.token_budget = token_budget
        self.backend = f"{model.attention_backend}, packs of {token_budget} tokens"

    def prepare(self, sequences: Sequence[str]) -> None:
        packs = make_packs(sequences, self.token_budget)
        self.members = [members for members, _ in packs]
        self.batches = [batch for _, batch in packs]
        self.padded_tokens = sum(batch.total_tokens for batch in self.batches)

    def run(self) -> None:
        last = self.model.config.num_layers
        self.rows = [self.model.embed_packed(batch, [last])[last] for batch in self.batches]


def make_packs(sequences: Sequence[str], token_budget: int) -> list[tuple[list[int], PackedBatch]]:
    """For each pack the indices of its sequences, and the packed batch."""
    token_ids = [encode(sequence) for sequence in sequences]
    plan = plan_packs([len(ids) + SPECIAL_TOKENS for ids in token_ids], token_budget)
    return [(members.tolist(), pack([token_ids[index] for index in members])) for members in plan]


class FairEsm(_Batched):
    """fair-esm 2.0.0 as its script esm-extract runs it; its forward pass always computes logits too."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "esm2_peer.pt"
            save_fair_esm(load_checkpoint(model_name), path)
            self.model = fair_esm_reference.load(path, torch.float32)
        self.backend = f"esm-extract, toks_per_batch {PADDED_TOKENS_PER_BATCH}"

    def prepare(self, sequences: Sequence[str]) -> None:
        convert = fair_esm_reference.ALPHABET.get_batch_converter()
        self.members = sorted_batches(sequences, extra_tokens_per_sequence=1)
        self.lengths = [[len(sequences[index]) for index in members] for members in self.members]
        self.tokens = [convert([("", sequences[index]) for index in batch])[2] for batch in self.members]
        self.padded_tokens = sum(tokens.numel() for tokens in self.tokens)

    @torch.no_grad()
    def run(self) -> None:
        last = self.model.num_layers
        self.rows = []
        for tokens, lengths in zip(self.tokens, self.lengths, strict=True):
            hidden_states = self.model(tokens, repr_layers=[last])["representations"][last]
            self.rows.append(_residue_means(hidden_states, lengths))


class Transformers(_Batched):
    """transformers' EsmModel with SDPA, sorted by length into batches of at most 4,096 padded tokens."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        checkpoint = load_checkpoint(model_name)
        self.model = EsmModel(hub_config(checkpoint.config), add_pooling_layer=False).eval()
        tensors = {
            name.removeprefix("esm."): tensor
            for name, tensor in hub_tensors(checkpoint.tensors).items()
            if not name.startswith("lm_head.") and not name.endswith(".rotary_embeddings.inv_freq")
        }
        tensors["rotary_embeddings.inv_freq"] = checkpoint.tensors["layers.0.self_attn.rot_emb.inv_freq"]
        self.model.load_state_dict(tensors, strict=True)
        self.backend = f"{self.model.config._attn_implementation}, {PADDED_TOKENS_PER_BATCH} padded tokens"

    def prepare(self, sequences: Sequence[str]) -> None:
        self.members = sorted_batches(sequences, SPECIAL_TOKENS)
        self.lengths = [[len(sequences[index]) for index in members] for members in self.members]
        self.input_ids, self.masks = [], []
        for members in self.members:
            rows = [token_ids_with_ends(sequences[index]) for index in members]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
            self.input_ids.append(padded)
            self.masks.append((padded != PAD_ID).long())
        self.padded_tokens = sum(input_ids.numel() for input_ids in self.input_ids)

    @torch.inference_mode()
    def run(self) -> None:
        self.rows = []
        for input_ids, mask, lengths in zip(self.input_ids, self.masks, self.lengths, strict=True):
            hidden_states = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
            self.rows.append(_residue_means(hidden_states, lengths))


def _residue_means(hidden_states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    means = [row[1 : length + 1].mean(0) for row, length in zip(hidden_states, lengths, strict=True)]
    return torch.stack(means)


def token_ids_with_ends(sequence: str) -> torch.Tensor:
    """BOS, residues, EOS as int64."""
    return torch.tensor([BOS_ID, *encode(sequence).tolist(), EOS_ID])


def hub_config(config: ESM2Config) -> EsmConfig:
    """The configuration of the hub's ESM-2 repositories."""
    return EsmConfig(
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        pad_token_id=PAD_ID,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_size,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        layer_norm_eps=LAYER_NORM_EPS,
        token_dropout=config.token_dropout,
        attn_implementation="sdpa",
    )


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
    """A checkpoint's tensors under the names they have on the Hugging Face hub."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _HUB_NAMES.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
