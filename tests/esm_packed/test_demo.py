"""The shipped demo model and the example proteins are what their descriptions say."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "esm_packed" / "demo"
PROTEINS = REPOSITORY / "examples" / "proteins.fasta"
HELD_OUT = REPOSITORY / "tests" / "data" / "mycoplasma_every_16th.fasta"
RESIDUES = "LAGVSERTIDPKQNFYMHWC"
TRAINED_ON = [
    1135,
    801,
    681,
    670,
    736,
    523,
    441,
    649,
    628,
    447,
    492,
    451,
    332,
    392,
    455,
    312,
    317,
    227,
    167,
    144,
]
"""How many of 10,000 residues of the proteins that the demo model was trained on are each of `RESIDUES`."""

pytest.importorskip("esm.pretrained", reason="fair-esm 2.0.0 is not installed")


@pytest.fixture(scope="module")
def train_demo() -> ModuleType:
    """examples/train_demo.py, which is a script and not installed."""
    spec = importlib.util.spec_from_file_location("train_demo", REPOSITORY / "examples" / "train_demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    """The demo file as `weights_only` reads it."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(DEMO / "esm2_demo.pt", weights_only=True)


@pytest.fixture(scope="module")
def records() -> dict[str, tuple[str, str]]:
    """Accession -> (rest of the header, sequence) of the example proteins."""
    parsed: dict[str, tuple[str, str]] = {}
    for record in PROTEINS.read_text().split(">")[1:]:
        header, *lines = record.splitlines()
        accession, description = header.split(maxsplit=1)
        assert accession not in parsed, f"{accession} occurs twice"
        parsed[accession] = (description, "".join(lines))
    return parsed


def test_demo_is_about_a_megabyte_of_fp16(checkpoint: dict[str, Any]) -> None:
    weights = checkpoint["model"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert 0.5e6 < (DEMO / "esm2_demo.pt").stat().st_size < 1.5e6
    assert (DEMO / "esm2_demo-contact-regression.pt").stat().st_size < 10_000
    tied = weights["encoder.lm_head.weight"], weights["encoder.sentence_encoder.embed_tokens.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_demo_rotary_frequencies_are_the_fp16_rounded_ones(checkpoint: dict[str, Any]) -> None:
    config = checkpoint["cfg"]["model"]
    head_dim = config.encoder_embed_dim // config.encoder_attention_heads
    exact = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    rounded = exact.half()
    assert not torch.equal(rounded.float(), exact)
    for layer in range(config.encoder_layers):
        stored = checkpoint["model"][f"encoder.sentence_encoder.layers.{layer}.self_attn.rot_emb.inv_freq"]
        assert torch.equal(stored, rounded)


def test_demo_loads_in_fair_esm_with_every_tensor_as_stored(
    train_demo: ModuleType, checkpoint: dict[str, Any]
) -> None:
    model = train_demo.load_checkpoint(DEMO)
    assert model.token_dropout
    regression = torch.load(DEMO / "esm2_demo-contact-regression.pt", weights_only=True)["model"]
    assert regression["contact_head.regression.weight"].shape == (1, model.num_layers * model.attention_heads)
    stored = {
        key.removeprefix("encoder.sentence_encoder.").removeprefix("encoder."): tensor
        for key, tensor in (checkpoint["model"] | regression).items()
    }
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(loaded[key], tensor.float()), key


def test_demo_predicts_unseen_residues_better_than_residue_frequencies(train_demo: ModuleType) -> None:
    held_out = train_demo.read_proteins(HELD_OUT)
    trained_on = "".join(residue * count for residue, count in zip(RESIDUES, TRAINED_ON, strict=True))
    frequencies = train_demo.residue_log_frequencies([train_demo.encode(trained_on)])
    model = train_demo.load_checkpoint(DEMO)
    model_perplexity, baseline_perplexity, num_scored = train_demo.perplexities(model, held_out, frequencies)
    assert num_scored > 1000
    assert model_perplexity < 0.97 * baseline_perplexity


def test_saved_checkpoint_reads_back_as_the_rounded_model(train_demo: ModuleType, tmp_path: Path) -> None:
    model = train_demo.new_model(seed=1)
    train_demo.save_checkpoint(model, tmp_path)
    train_demo.round_to_fp16(model)
    loaded = train_demo.load_checkpoint(tmp_path).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded[key], tensor), key


def test_crops_and_batches_keep_every_protein_within_bounds(train_demo: ModuleType) -> None:
    rng = train_demo.np.random.default_rng(0)
    proteins = [train_demo.np.full(length, 5) for length in (1, 40, 320, 321, 5000)]
    crops = train_demo.crops_of_one_epoch(proteins, 320, rng)
    assert max(map(len, crops)) <= 320
    lost = sum(map(len, proteins)) - sum(map(len, crops))
    assert 0 <= lost < 2 * train_demo.SHORTEST_CROP
    batches = train_demo.batches_by_length(crops, 1000)
    assert sum(map(len, batches)) == len(crops)
    assert all(train_demo.pad(batch).size <= 1000 for batch in batches)


def test_corruption_touches_standard_residues_only(train_demo: ModuleType) -> None:
    rng = train_demo.np.random.default_rng(0)
    tokens = train_demo.pad([train_demo.np.tile(train_demo.encode("MKXLV").astype("int64"), 4000)])
    corrupted, chosen = train_demo.corrupt(tokens, rng)
    standard = train_demo.np.isin(tokens, train_demo.STANDARD_IDS)
    assert not (chosen & ~standard).any()
    assert (corrupted == tokens)[~chosen].all()
    assert chosen.sum() / standard.sum() == pytest.approx(0.15, abs=0.01)
    assert (corrupted[chosen] == train_demo.MASK_ID).mean() == pytest.approx(0.8, abs=0.03)


def test_example_proteins_are_standard_and_of_known_length(records: dict[str, tuple[str, str]]) -> None:
    assert 24 <= len(records) <= 36
    for accession, (description, sequence) in records.items():
        assert description, accession
        assert set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY"), accession
    known_lengths = {
        "P01308": 110,
        "P42212": 238,
        "P00698": 147,
        "P69905": 142,
        "P68871": 147,
        "P02185": 154,
        "P99999": 105,
        "P0DP23": 149,
        "P62805": 103,
        "P04637": 393,
        "P62593": 286,
        "P00156": 380,
        "P0DTC2": 1273,
    }
    assert {accession: len(records[accession][1]) for accession in known_lengths} == known_lengths
    longer_than_the_default_maximum = [key for key, (_, sequence) in records.items() if len(sequence) > 1022]
    assert longer_than_the_default_maximum == ["P0DTC2"]


# UniProt publishes a CRC64 of every sequence; these five are quoted from UniProt's entries.
@pytest.mark.parametrize(
    ("accession", "checksum"),
    [
        ("P01308", "C2C3B23B85E520E5"),
        ("P04637", "AD5C149FD8106131"),
        ("P69905", "15E13666573BBBAE"),
        ("P08100", "6F4F6FCBA34265B2"),
        ("P03069", "2ED1B8E35D509578"),
    ],
)
def test_example_proteins_have_uniprots_checksums(
    records: dict[str, tuple[str, str]], accession: str, checksum: str
) -> None:
    crc = 0
    for residue in records[accession][1].encode():
        crc ^= residue
        for _ in range(8):
            crc = (crc >> 1) ^ (0xD800000000000000 if crc & 1 else 0)
    assert f"{crc:016X}" == checksum
