"""`embed --reuse`: rows of an earlier output are found by their residues, and only the rest is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import esm_packed
from esm_packed.errors import UsageError
from esm_packed.model import ESM2
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch
from esm_packed.runners.cli import main as cli
from esm_packed.runners.state.cut import FLOPS_PER_SHARD

OLD = {"a": "MKTAYIAKQR", "b": "GSHMSLFD" * 5, "c": "MKTAYIAKQRG", "long": "MLKVDE" * 30}
NEW = {
    "new": "MWWY",
    "renamed b": OLD["b"],
    "a": OLD["a"],
    "copy": "MWWY",
    "long": OLD["long"],
    "c": "MKTAYIAKQRW",
}
OPTIONS: dict[str, Any] = {"model": "demo", "device": "cpu", "progress": False}


def write(path: Path, proteins: dict[str, str]) -> Path:
    path.write_text(
        "".join(f">{name.replace(' ', '_')}\n{residues}\n" for name, residues in proteins.items())
    )
    return path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Residues of each sequence that the model computes."""
    original, lengths = ESM2.embed_packed, []

    def count(self: ESM2, batch: PackedBatch, *rest: Any) -> dict[str, torch.Tensor]:
        lengths.extend((batch.cu_seqlens.diff() - SPECIAL_TOKENS).tolist())
        return original(self, batch, *rest)

    monkeypatch.setattr(ESM2, "embed_packed", count)
    yield lengths


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"include": ["mean", "per_residue", "unmasked_nll"], "layers": [2, 5], "store_dtype": "fp16"},
        {"include": ["per_residue", "logits"], "parts": True},
        {"include": ["mean", "per_residue", "contacts"], "store_dtype": "fp16"},
        {"include": ["contacts"], "parts": True},
        {"include": ["mean", "per_residue"], "windows": (50, 10)},
    ],
)
def test_only_what_is_new_is_computed(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1e7)
    options = OPTIONS | options
    old, new = write(tmp_path / "old.fasta", OLD), write(tmp_path / "new.fasta", NEW)
    esm_packed.embed_file(old, tmp_path / "old.h5", **options).close()
    full = esm_packed.embed_file(new, tmp_path / "full.h5", **options)
    computed.clear()
    found = esm_packed.embed_file(new, tmp_path / "new.h5", reuse=tmp_path / "old.h5", **options)
    assert sorted(computed) == [len(NEW["new"]), len(NEW["c"])]
    with full, found:
        assert found.attributes["plan_hash"] == full.attributes["plan_hash"], (
            "the same run, computed in less time"
        )
        assert list(found.ids) == list(full.ids)
        for name in full.ids:
            np.testing.assert_allclose(found[name], full[name], rtol=1e-3, atol=1e-5)
            if "per_residue" in full.kinds:
                np.testing.assert_allclose(
                    found.per_residue(name), full.per_residue(name), rtol=1e-3, atol=1e-5
                )
        with esm_packed.open(tmp_path / "old.h5") as earlier:
            np.testing.assert_array_equal(found["a"], earlier["a"])
            np.testing.assert_array_equal(found["renamed_b"], earlier["b"])


def test_the_hash_is_that_of_the_residues_as_computed(tmp_path: Path) -> None:
    fasta = write(tmp_path / "in.fasta", {"a": "mktAYIAKQR", "b": "MKTAYIAKQR" + "G" * 10, "x": "MKBXUZO"})
    esm_packed.embed_file(fasta, tmp_path / "out.h5", max_length=10, **OPTIONS).close()
    hashes = [
        hashlib.blake2b(text, digest_size=16).hexdigest().encode() for text in (b"MKTAYIAKQR", b"MKBXUZO")
    ]
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["sequence_hash"][:].tolist() == [hashes[0], hashes[0], hashes[1]]


def test_cut_sequences_are_found_under_another_max_length(tmp_path: Path, computed: list[int]) -> None:
    fasta = write(tmp_path / "in.fasta", OLD)
    esm_packed.embed_file(fasta, tmp_path / "old.h5", max_length=40, **OPTIONS).close()
    computed.clear()
    esm_packed.embed_file(
        fasta, tmp_path / "new.h5", max_length=50, reuse=tmp_path / "old.h5", **OPTIONS
    ).close()
    assert computed == [50], "all but the one that is cut elsewhere"


def test_rows_that_were_recomputed_or_failed_are_computed_again(tmp_path: Path, computed: list[int]) -> None:
    fasta = write(tmp_path / "in.fasta", OLD)
    esm_packed.embed_file(fasta, tmp_path / "old.h5", **OPTIONS).close()
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        file["status"][1], file["status"][2] = 1, 2
    computed.clear()
    esm_packed.embed_file(fasta, tmp_path / "new.h5", reuse=tmp_path / "old.h5", **OPTIONS).close()
    assert sorted(computed) == [len(OLD["c"]), len(OLD["b"])]


def test_an_interrupted_run_is_continued_with_or_without(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    old, new = write(tmp_path / "old.fasta", OLD), write(tmp_path / "new.fasta", NEW)
    esm_packed.embed_file(old, tmp_path / "old.h5", **OPTIONS).close()
    with monkeypatch.context() as patches:
        patches.setattr(ESM2, "embed_packed", lambda *call: pytest.fail("broken"))
        with pytest.raises(BaseException, match="broken"):
            esm_packed.embed_file(new, tmp_path / "new.h5", reuse=tmp_path / "old.h5", **OPTIONS)
    for reuse in (tmp_path / "old.h5", None):
        with esm_packed.embed_file(new, tmp_path / "new.h5", reuse=reuse, **OPTIONS) as found:
            assert len(found) == len(NEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"layers were 5, now 3"),
        ({"include": ["mean", "logits"]}, r"kinds were mean, now mean, logits"),
        ({"dtype": "bf16"}, r"dtype was 'fp32', now 'bf16'"),
        ({"model": "random:esm2_t6_8M_UR50D"}, r"model_sha256 was"),
        ({"windows": (50, 10)}, r"windows was"),
        ({"reuse": "new.fasta"}, r"not an HDF5 file"),
        ({"reuse": "nothing.h5"}, r"No such file"),
        ({"output": "old.h5", "overwrite": True}, r"would overwrite the input"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_computed(
    tmp_path: Path, computed: list[int], options: dict[str, Any], message: str
) -> None:
    fasta = write(tmp_path / "new.fasta", OLD)
    esm_packed.embed_file(fasta, tmp_path / "old.h5", **OPTIONS).close()
    computed.clear()
    options = OPTIONS | options
    output = tmp_path / options.pop("output", "new.h5")
    reuse = tmp_path / options.pop("reuse", "old.h5")
    with pytest.raises(UsageError, match=message):
        esm_packed.embed_file(fasta, output, reuse=reuse, **options)
    assert not computed
    assert (tmp_path / "old.h5").exists()


def test_the_command_counts_what_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write(tmp_path / "old.fasta", OLD), write(tmp_path / "new.fasta", NEW)
    esm_packed.embed_file(old, tmp_path / "old.h5", **OPTIONS).close()
    command = ["embed", str(new), "-o", str(tmp_path / "new.h5"), "--model", "demo", "--device", "cpu"]
    assert cli.main([*command, "--reuse", str(tmp_path / "old.h5")]) == 0
    assert "reused              3 sequences" in capsys.readouterr().out
