"""fair-esm 2.0.0, the independent truth: seeded checkpoints in its format, its model in every precision."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import esm.multihead_attention
import esm.rotary_embedding
import numpy as np
import torch
import torch.nn.functional as F
from esm.data import Alphabet
from esm.model.esm2 import ESM2 as FairESM2

ALPHABET = Alphabet.from_architecture("ESM-1b")


def write_checkpoint(path: Path, *, num_layers: int, num_heads: int, head_dim: int, seed: int = 0) -> Path:
    """A checkpoint in fair-esm's format, with weights large enough that attention is far from uniform."""
    hidden_size = num_heads * head_dim
    model = FairESM2(num_layers, hidden_size, num_heads, ALPHABET)
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "inv_freq" in name:
            state[name] = tensor.half().float()
        elif "norm" in name:
            state[name] = noise * 0.2 + (1 if name.endswith("weight") else 0)
        elif name.endswith("bias"):
            state[name] = noise * 0.2
        elif "q_proj" in name or "k_proj" in name:
            state[name] = noise * 2 / hidden_size**0.5
        elif tensor.ndim == 2 and "embed_tokens" not in name:
            state[name] = noise * 1.2 / tensor.shape[1] ** 0.5
        else:
            state[name] = noise
    state["embed_tokens.weight"][ALPHABET.padding_idx] = 0
    state["lm_head.weight"] = state["embed_tokens.weight"]

    trunk = {name: t for name, t in state.items() if not name.startswith(("lm_head", "contact_head"))}
    weights = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in trunk.items()}
    weights |= {f"encoder.{name}": t for name, t in state.items() if name.startswith("lm_head")}
    cfg = Namespace(
        encoder_layers=num_layers,
        encoder_embed_dim=hidden_size,
        encoder_attention_heads=num_heads,
        token_dropout=True,
    )
    torch.save({"cfg": {"model": cfg}, "model": weights}, path)
    regression = {name: tensor for name, tensor in state.items() if name.startswith("contact_head")}
    torch.save({"model": regression}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def load(path: Path, dtype: torch.dtype) -> FairESM2:
    """fair-esm's own model from its own file; `torch.load` there needs the pickle allowed since torch 2.6."""
    data = torch.load(path, weights_only=False)
    regression = torch.load(path.with_name(f"{path.stem}-contact-regression.pt"), weights_only=False)
    model, _ = esm.pretrained.load_model_and_alphabet_core(path.stem, data, regression)
    inv_freq = [layer.self_attn.rot_emb.inv_freq.clone() for layer in model.layers]
    model = model.to(dtype).eval()
    if dtype in (torch.float16, torch.bfloat16):
        for layer, stored in zip(model.layers, inv_freq, strict=True):
            layer.self_attn.rot_emb.inv_freq = stored
    return model


@contextmanager
def faithful(dtype: torch.dtype) -> Iterator[None]:
    """Lift what makes fair-esm a bad reference: FP32 softmax in a double model, half-precision angles."""
    softmax, rotate = esm.multihead_attention.utils_softmax, esm.rotary_embedding.apply_rotary_pos_emb

    def softmax_in_own_precision(x: torch.Tensor, dim: int, onnx_trace: bool = False) -> torch.Tensor:
        return F.softmax(x, dim, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    def rotate_in_table_precision(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rotated: torch.Tensor = rotate(x.to(cos.dtype), cos, sin)
        return rotated.to(x.dtype)

    esm.multihead_attention.utils_softmax = softmax_in_own_precision
    esm.rotary_embedding.apply_rotary_pos_emb = rotate_in_table_precision
    try:
        with torch.inference_mode():
            yield
    finally:
        esm.multihead_attention.utils_softmax = softmax
        esm.rotary_embedding.apply_rotary_pos_emb = rotate


def run(model: FairESM2, sequences: Sequence[str]) -> list[dict[str, Any]]:
    """For each sequence alone its representations and means by layer, and its logits."""
    results = []
    layers = range(model.num_layers + 1)
    with faithful(model.embed_tokens.weight.dtype):
        for sequence in sequences:
            tokens = torch.tensor([[ALPHABET.cls_idx, *ALPHABET.encode(sequence), ALPHABET.eos_idx]])
            output = model(tokens, repr_layers=layers)
            representations = {layer: output["representations"][layer][0] for layer in layers}
            results.append(
                {
                    "representations": representations,
                    "logits": output["logits"][0],
                    "mean": {layer: r[1:-1].mean(0) for layer, r in representations.items()},
                }
            )
    return results


def end_to_end(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What `run` returns, with the rows of all sequences one after the other, as packed ones are."""
    layers = list(results[0]["representations"])
    return (
        {f"layer {layer}": torch.cat([r["representations"][layer] for r in results]) for layer in layers}
        | {f"mean {layer}": torch.stack([r["mean"][layer] for r in results]) for layer in layers}
        | {"logits": torch.cat([r["logits"] for r in results])}
    )


def random_sequences(
    lengths: Sequence[int], seed: int, letters: str = "LAGVSERTIDPKQNFYMHWCXBUZO"
) -> list[str]:
    """Random proteins of the given lengths."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), length)) for length in lengths]
