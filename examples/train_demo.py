"""Train the tiny ESM-2 that ships as `demo`, with fair-esm's own model class, on one CPU thread.

    python examples/train_demo.py FASTA [FASTA ...] --held-out HELD_OUT.fasta -o esm_packed/demo --minutes 36

Masked-language modeling as in ESM-2: 15% of the residues are chosen, of which 80% become `<mask>`, 10% a
random residue and 10% stay. The exponential moving average of the weights, rounded to FP16, is what is
evaluated and stored, in the layout of fair-esm's checkpoints. Needs `pip install fair-esm==2.0.0`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from esm.model.esm2 import ESM2
from esm.pretrained import load_model_and_alphabet_local
from torch.nn.functional import cross_entropy

from esm_packed.alphabet import BOS_ID, EOS_ID, MASK_ID, PAD_ID, encode

NAME = "esm2_demo"
"""fair-esm picks the loader by the file name: it must start with `esm2`."""
NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS = 5, 96, 6

STANDARD_RESIDUES = "LAGVSERTIDPKQNFYMHWC"
STANDARD_IDS = encode(STANDARD_RESIDUES)
UNKNOWN_ID = int(encode("X")[0])

EVALUATION_SEED = 20
EVALUATION_MAX_LENGTH = 1022
MASKED_FRACTION = 0.15
EMA_DECAY = 0.998
SHORTEST_CROP = 32

Tokens = npt.NDArray[np.int64]


def read_proteins(path: Path) -> list[Tokens]:
    """Residue ids of every record of a plain FASTA file; whatever is no standard residue becomes X."""
    proteins: list[Tokens] = []
    for record in ("\n" + path.read_text()).split("\n>")[1:]:
        sequence = "".join("".join(record.split("\n")[1:]).split()).upper().rstrip("*")
        residues = "".join(residue if residue in STANDARD_RESIDUES else "X" for residue in sequence)
        if residues:
            proteins.append(encode(residues).astype(np.int64))
    return proteins


def read_training_proteins(paths: list[Path], held_out: list[Tokens]) -> list[Tokens]:
    """All distinct proteins of `paths` that are not among `held_out`."""
    seen = {protein.tobytes() for protein in held_out}
    distinct: list[Tokens] = []
    for path in paths:
        for protein in read_proteins(path):
            if protein.tobytes() not in seen:
                seen.add(protein.tobytes())
                distinct.append(protein)
    return distinct


def crops_of_one_epoch(proteins: list[Tokens], crop_length: int, rng: np.random.Generator) -> list[Tokens]:
    """Every protein in pieces of at most `crop_length` residues, cut elsewhere in every epoch."""
    crops: list[Tokens] = []
    for protein in proteins:
        if len(protein) <= crop_length:
            crops.append(protein)
            continue
        first_cut = int(rng.integers(SHORTEST_CROP, crop_length + 1))
        pieces = np.split(protein, range(first_cut, len(protein), crop_length))
        crops.extend(piece for piece in pieces if len(piece) >= SHORTEST_CROP)
    return crops


def batches_by_length(sequences: list[Tokens], token_budget: int) -> list[list[Tokens]]:
    """Sequences of similar length together, so that little of a padded batch is padding."""
    batches: list[list[Tokens]] = []
    batch: list[Tokens] = []
    for sequence in sorted(sequences, key=len):
        # Sorted ascending: the newcomer is the longest and sets the padded length.
        if batch and (len(batch) + 1) * (len(sequence) + 2) > token_budget:
            batches.append(batch)
            batch = []
        batch.append(sequence)
    return [*batches, batch] if batch else batches


def pad(batch: list[Tokens]) -> Tokens:
    """(sequences, longest + 2) ids: BOS, residues, EOS, padding."""
    tokens = np.full((len(batch), max(map(len, batch)) + 2), PAD_ID, dtype=np.int64)
    for row, sequence in zip(tokens, batch, strict=True):
        row[: len(sequence) + 2] = (BOS_ID, *sequence, EOS_ID)
    return tokens


def endless_training_batches(
    proteins: list[Tokens], crop_length: int, token_budget: int, rng: np.random.Generator
) -> Iterator[Tokens]:
    """Padded batches in random order, epoch after epoch."""
    while True:
        batches = batches_by_length(crops_of_one_epoch(proteins, crop_length, rng), token_budget)
        for index in rng.permutation(len(batches)):
            yield pad(batches[index])


def corrupt(tokens: Tokens, rng: np.random.Generator) -> tuple[Tokens, npt.NDArray[np.bool_]]:
    """BERT's 80/10/10 corruption of 15% of the standard residues; returns the input and what was chosen."""
    chosen = np.isin(tokens, STANDARD_IDS) & (rng.random(tokens.shape) < MASKED_FRACTION)
    fate = rng.random(tokens.shape)
    corrupted = np.where(chosen & (fate < 0.8), MASK_ID, tokens)
    random_residues = rng.choice(STANDARD_IDS, size=tokens.shape)
    return np.where(chosen & (fate >= 0.9), random_residues, corrupted), chosen


def new_model(seed: int) -> ESM2:
    """An untrained model whose rotary frequencies are rounded to FP16, as in every published ESM-2."""
    torch.manual_seed(seed)
    model = ESM2(NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS)
    with torch.no_grad():
        # The embedding is also the output layer: torch's default, unit variance, means huge logits at first.
        model.embed_tokens.weight.normal_(std=HIDDEN_SIZE**-0.5)
        model.embed_tokens.weight[PAD_ID] = 0
        for layer in model.layers:
            inv_freq = layer.self_attn.rot_emb.inv_freq
            inv_freq.copy_(inv_freq.half())
            for last_of_branch in (layer.self_attn.out_proj, layer.fc2):
                last_of_branch.weight.mul_((2 * NUM_LAYERS) ** -0.5)
        # There are no structures to fit contacts to: uniform weights, so that the file is complete.
        model.contact_head.regression.weight.fill_(1 / (NUM_LAYERS * NUM_HEADS))
        model.contact_head.regression.bias.zero_()
    return model


def round_to_fp16(model: ESM2) -> None:
    """Give every tensor of `model` the value it will have when read back from the FP16 file."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.half())


def save_checkpoint(model: ESM2, directory: Path) -> None:
    """Write `model` in FP16 in fair-esm's layout: the weights, and beside them the contact regression."""
    # A tensor is halved once, so that lm_head.weight and embed_tokens.weight stay one tensor in the file.
    halved = {tensor.data_ptr(): tensor.half() for tensor in model.state_dict().values()}
    weights, regression = {}, {}
    for key, tensor in model.state_dict().items():
        if key.startswith("contact_head."):
            regression[key] = halved[tensor.data_ptr()]
        else:
            prefix = "encoder." if key.startswith("lm_head.") else "encoder.sentence_encoder."
            weights[prefix + key] = halved[tensor.data_ptr()]
    config = argparse.Namespace(
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
    )
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({"cfg": {"model": config}, "model": weights}, directory / f"{NAME}.pt")
    torch.save({"model": regression}, directory / f"{NAME}-contact-regression.pt")


def load_checkpoint(directory: Path) -> ESM2:
    """Read back what `save_checkpoint` wrote, through fair-esm's own loader."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, _ = load_model_and_alphabet_local(str(directory / f"{NAME}.pt"))
    return model


def residue_log_frequencies(proteins: list[Tokens]) -> torch.Tensor:
    """log frequency of each of the standard residues, in the order of `STANDARD_IDS`."""
    counts = np.bincount(np.concatenate(proteins), minlength=MASK_ID + 1)[STANDARD_IDS]
    return torch.tensor(counts / counts.sum()).log()


def masked_residues(
    held_out: list[Tokens], seed: int = EVALUATION_SEED, token_budget: int = 4096
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(input, chosen positions, chosen residues as index into STANDARD_IDS) of each batch.

    The choice depends on the seed and the order of the proteins only, not on how they are batched.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[int, Tokens] = {}
    cut = [protein[:EVALUATION_MAX_LENGTH] for protein in held_out]
    for protein in cut:
        chosen = np.isin(protein, STANDARD_IDS) & (rng.random(len(protein)) < MASKED_FRACTION)
        inputs[id(protein)] = np.where(chosen, MASK_ID, protein)
    residue_index = np.full(MASK_ID + 1, -1)
    residue_index[STANDARD_IDS] = np.arange(len(STANDARD_IDS))
    for batch in batches_by_length(cut, token_budget):
        tokens = torch.from_numpy(pad([inputs[id(protein)] for protein in batch]))
        chosen_positions = tokens == MASK_ID
        originals = torch.from_numpy(pad(batch))[chosen_positions]
        yield tokens, chosen_positions, torch.from_numpy(residue_index)[originals]


def perplexities(model: ESM2, held_out: list[Tokens], baseline: torch.Tensor) -> tuple[float, float, int]:
    """Perplexity of the model, of the residue frequencies `baseline`, and the number of residues scored."""
    model.eval()
    model_nll = baseline_nll = 0.0
    num_scored = 0
    with torch.no_grad():
        for tokens, chosen_positions, targets in masked_residues(held_out):
            logits = model(tokens)["logits"][chosen_positions]
            # Over the full 33-token vocabulary: probability spent on other tokens counts against the model.
            log_probabilities = logits.double().log_softmax(-1)[:, torch.from_numpy(STANDARD_IDS).long()]
            model_nll -= log_probabilities.gather(1, targets[:, None]).sum().item()
            baseline_nll -= baseline[targets].sum().item()
            num_scored += len(targets)
    return math.exp(model_nll / num_scored), math.exp(baseline_nll / num_scored), num_scored


def train(proteins: list[Tokens], arguments: argparse.Namespace) -> ESM2:
    """Train until `--minutes` or `--steps` is reached; returns the averaged weights."""
    rng = np.random.default_rng(arguments.seed)
    model = new_model(arguments.seed)
    average = new_model(arguments.seed)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    not_decayed = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": not_decayed, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.98),
    )
    batches = endless_training_batches(proteins, arguments.crop_length, arguments.batch_tokens, rng)
    model.train()
    start = last_report = time.monotonic()
    tokens_seen = residues_chosen = 0
    nll_sum = 0.0
    step = 0
    while True:
        elapsed = time.monotonic() - start
        progress = max(
            step / arguments.steps if arguments.steps else 0.0,
            elapsed / (60 * arguments.minutes) if arguments.minutes else 0.0,
        )
        if progress >= 1:
            break
        warm_up = min(1.0, (step + 1) / arguments.warm_up_steps)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * warm_up * decay

        tokens = next(batches)
        corrupted, chosen = corrupt(tokens, rng)
        logits = model(torch.from_numpy(corrupted))["logits"][torch.from_numpy(chosen)]
        loss = cross_entropy(logits, torch.from_numpy(tokens[chosen]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            weight = 1 - min(EMA_DECAY, step / (step + 10))
            for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(current, weight)

        tokens_seen += int((tokens != PAD_ID).sum())
        nll_sum += loss.item() * int(chosen.sum())
        residues_chosen += int(chosen.sum())
        if time.monotonic() - last_report > arguments.report_seconds:
            elapsed = time.monotonic() - start
            remaining = elapsed / progress - elapsed if progress else math.inf
            print(
                f"step {step}  {tokens_seen / 1e6:.2f} M tokens  {tokens_seen / elapsed:.0f} tokens/s  "
                f"loss {nll_sum / residues_chosen:.4f}  lr {optimizer.param_groups[0]['lr']:.2e}  "
                f"ETA {remaining / 60:.1f} min",
                flush=True,
            )
            last_report = time.monotonic()
            nll_sum, residues_chosen = 0.0, 0
    elapsed = time.monotonic() - start
    print(
        f"trained {step} steps, {tokens_seen} tokens, {elapsed / 60:.1f} min, "
        f"{tokens_seen / elapsed:.0f} tokens/s"
    )
    return average


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fasta", nargs="+", type=Path, help="plain FASTA files to train on")
    parser.add_argument(
        "--held-out", type=Path, required=True, help="FASTA file to evaluate on, never trained on"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument(
        "--minutes", type=float, help="wall-clock limit of training; the first limit reached counts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--crop-length", type=int, default=320, help="longest training crop, in residues")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a batch, padding included")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of warm-up and cosine decay")
    parser.add_argument("--warm-up-steps", type=int, default=200)
    parser.add_argument("--report-seconds", type=float, default=15.0)
    parser.add_argument(
        "--evaluate-only", action="store_true", help="evaluate the checkpoint already in the directory"
    )
    arguments = parser.parse_args()
    if not (arguments.evaluate_only or arguments.steps or arguments.minutes):
        parser.error("give --steps, --minutes or both")
    return arguments


def main() -> None:
    """Train, store, evaluate."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    held_out = read_proteins(arguments.held_out)
    training = read_training_proteins(arguments.fasta, held_out)
    num_residues = sum(map(len, training))
    print(
        f"training on {len(training)} distinct proteins, {num_residues} residues; held out: {len(held_out)}"
    )
    if not arguments.evaluate_only:
        model = train(training, arguments)
        round_to_fp16(model)
        save_checkpoint(model, arguments.output)
    # Always from the file: what is evaluated is what is shipped.
    model = load_checkpoint(arguments.output)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model_perplexity, baseline_perplexity, num_scored = perplexities(
        model, held_out, residue_log_frequencies(training)
    )
    print(f"{num_parameters} parameters, {(arguments.output / f'{NAME}.pt').stat().st_size} bytes")
    print(
        f"held out {arguments.held_out.name}: perplexity {model_perplexity:.3f}, residue frequencies "
        f"{baseline_perplexity:.3f}, over {num_scored} masked residues"
    )


if __name__ == "__main__":
    main()
