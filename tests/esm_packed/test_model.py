"""The interface of the model: arguments, layers, precision, and the memory that loading takes."""

from __future__ import annotations

import copy
import pickle
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading_memory import measured
from models import model_of
from programs import run_python

import esm_packed
from esm_packed import ESM2
from esm_packed import model as model_module
from esm_packed.alphabet import encode
from esm_packed.attention import sdpa_attention
from esm_packed.checkpoints import (
    Checkpoint,
    CheckpointError,
    RandomTensors,
    load_checkpoint,
    save_fair_esm,
)
from esm_packed.config import ESM2Config
from esm_packed.kernels.matmul import separate_heads_
from esm_packed.kernels.reference import rotary_qk_
from esm_packed.modules import Linear, QKVProjection
from esm_packed.numerics import PRECISIONS, DType
from esm_packed.packing import pack
from esm_packed.runners.state.request import EmbedRequest


@pytest.fixture(scope="module")
def demo() -> ESM2:
    return ESM2.from_pretrained("demo", device="cpu")


def test_the_package_lists_what_it_offers() -> None:
    names = ["ESM2", "EmbeddingDataset", "EmbeddingFile", "__version__", "embed_file", "open", "read_fasta"]
    assert dir(esm_packed) == names
    assert all(hasattr(esm_packed, name) for name in names)


def test_embed_keeps_the_order_and_the_shapes(demo: ESM2) -> None:
    sequences = ["MKT", "M", "ACDEFGHIKLMNPQRSTVWY", "mk<mask>"]
    means = demo.embed(sequences)
    rows = demo.embed(sequences, per_residue=True, token_budget=1)
    assert [array.shape for array in rows] == [(3, 96), (1, 96), (20, 96), (3, 96)]
    for mean, residues in zip(means, rows, strict=True):
        assert mean.dtype == residues.dtype == np.float32
        assert np.linalg.norm(mean - residues.mean(0)) <= 5e-6 * np.linalg.norm(mean)
    assert demo.embed([]) == []


def test_layers_count_from_both_ends(demo: ESM2) -> None:
    sequence = ["MKTAYIAK"]
    for layer in range(6):
        np.testing.assert_array_equal(
            demo.embed(sequence, layer=layer), demo.embed(sequence, layer=layer - 6)
        )
    embedding = demo.embed(sequence, layer=0, per_residue=True)[0]
    table = demo.embedding.weight[encode(sequence[0]).astype(np.int64)].numpy()
    np.testing.assert_allclose(embedding, 0.88 * table, rtol=1e-6)


@pytest.mark.parametrize(
    "sequences, kind, named",
    [
        ("MKT", TypeError, "one string"),
        (None, TypeError, "sequences is None; pass a list of strings"),
        (3, TypeError, "sequences is 3; pass a list of strings"),
        ({"a": "MKT"}, TypeError, r"sequences is a dict.*pass list\(sequences\.values\(\)\)"),
        ([("a", "MKT")], TypeError, r"sequences\[0\] is a tuple"),
        (["MK", ""], ValueError, r"sequences\[1\] is empty"),
        (["MK", "MJ"], ValueError, r"sequences\[1\]: 'J' at position 2"),
    ],
)
def test_sequences_that_cannot_be_embedded_are_named(
    demo: ESM2, sequences: list[str], kind: type[Exception], named: str
) -> None:
    with pytest.raises(kind, match=named):
        demo.embed(sequences)


def test_the_precision_cannot_be_changed_behind_the_model(demo: ESM2) -> None:
    for change in (demo.half, demo.double, lambda: demo.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="chosen when loading"):
            change()
    assert demo.to("cpu") is demo
    assert demo.embedding.weight.dtype == torch.float32


def test_a_probe_can_be_trained_on_the_representations(demo: ESM2) -> None:
    batch = pack([encode("MKT")])
    output = demo.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, [5])
    probe = torch.nn.Linear(96, 1)
    probe(output.representations[5]).sum().backward()
    assert probe.weight.grad is not None


@pytest.mark.parametrize("device", ["mps", "meta", "tpu", "cuda"])
def test_devices_that_cannot_serve_are_refused(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=f"device '?{device}"):
        ESM2.from_pretrained("demo", device=device)


@pytest.mark.parametrize("device", [None, 0, ["cpu"]])
def test_what_is_no_device_is_named(device: object) -> None:
    with pytest.raises(TypeError, match=r"device is .*; pass 'auto', 'cpu', 'cuda' or 'cuda:INDEX'"):
        ESM2.from_pretrained("demo", device=device)  # type: ignore[arg-type]


def test_devices_may_be_in_capitals() -> None:
    assert ESM2.from_pretrained("demo", device="CPU").device == torch.device("cpu")


def test_forward_hooks_see_every_part(demo: ESM2) -> None:
    """What a hook sees, computed again by torch's own modules from the weights of that part."""
    seen: dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}
    layer = list(demo.layers)[1]
    with ExitStack() as hooks:
        for name, part in layer.named_children():
            hooks.enter_context(
                part.register_forward_hook(
                    lambda part, inputs, output, name=name: seen.update({name: (inputs, output.clone())})
                )
            )
        demo.embed(["MKTAYIAK"])
    assert list(seen) == ["attention_norm", "qkv", "attention", "attention_out", "ffn_norm", "fc1", "fc2"]
    for name in ("qkv", "attention_out", "fc1", "fc2"):
        (states, *others), output = seen[name]
        part = getattr(layer, name)
        weights = part.unpacked()
        expected = torch.nn.functional.linear(states, weights["weight"], weights["bias"])
        if name == "qkv":
            (cos, sin), position_ids = others
            heads = expected.view(10, 3, demo.config.num_heads, demo.config.head_dim)
            rotary_qk_(heads, cos, sin, position_ids)
            separate_heads_(output.T, demo.config.head_dim)
        torch.testing.assert_close(
            output, torch.nn.functional.gelu(expected) if name == "fc1" else expected, rtol=1e-4, atol=1e-4
        )
    (delta, _), normalized = seen["ffn_norm"]
    assert torch.equal(delta, seen["attention_out"][1]) and torch.equal(normalized, seen["fc1"][0][0])


def test_another_attention_shares_the_weights_and_leaves_the_model_alone(demo: ESM2) -> None:
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[0].shape[0])
        return sdpa_attention(*arguments)

    other = demo.with_attention(("counted", counted))
    batch = pack([encode("MKTAYIAK"), encode("AC")])
    expected = demo.embed_packed(batch, ["mean/5"])["mean/5"]
    assert not calls
    assert torch.equal(other.embed_packed(batch, ["mean/5"])["mean/5"], expected)
    assert calls == [14] * 5
    assert (demo.attention_backend, other.attention_backend) == ("sdpa", "counted")
    for (name, mine), (_, its) in zip(demo.named_parameters(), other.named_parameters(), strict=True):
        assert mine is its, name


def test_another_attention_may_come_with_another_precision_of_the_same_weights(demo: ESM2) -> None:
    backend = ("sdpa", sdpa_attention)
    half_stream = replace(PRECISIONS["fp32"], name="half stream", residual_dtype=torch.float16)
    other = demo.with_attention(backend, half_stream)
    assert (other.precision, demo.precision) == ("half stream", "fp32")
    batch = pack([encode("MKTAYIAK")])
    streams = [model(batch, [2]).representations[2].dtype for model in (other, demo)]
    assert streams == [torch.float16, torch.float32]
    with pytest.raises(ValueError, match=r"precision 'fp16': the weights that are shared are torch\.float32"):
        demo.with_attention(backend, PRECISIONS["fp16"])


@pytest.mark.parametrize("per_residue", [False, True])
def test_a_list_of_layers_gives_a_dict_in_one_pass(demo: ESM2, per_residue: bool) -> None:
    sequences = ["MKTAYIAK", "ACD"]
    expected = {layer: demo.embed(sequences, layer=layer, per_residue=per_residue) for layer in (2, 0, -1)}
    passes = []
    hook = demo.register_forward_hook(lambda model, arguments, output: passes.append(arguments))
    several = demo.embed(sequences, layer=[2, 0, -1], per_residue=per_residue)
    hook.remove()
    assert len(passes) == 1
    assert list(several) == [2, 0, -1], "keyed as asked for, in that order"
    for layer, arrays in expected.items():
        for actual, array in zip(several[layer], arrays, strict=True):
            np.testing.assert_array_equal(actual, array)
    assert demo.embed([], layer=[1, 2]) == {1: [], 2: []}
    both = demo.embed(["ACD"], layer=(5, -1))
    np.testing.assert_array_equal(both[5][0], both[-1][0])
    third: Any = np.int64(3)
    assert list(demo.embed(["ACD"], layer=[third])) == [3]


@pytest.mark.parametrize(
    "layer, kind, said",
    [
        ("6", TypeError, "layer '6' is not a number or a list of numbers"),
        (2.0, TypeError, "layer 2.0 is not a number"),
        ([1, "2"], TypeError, r"layer \[1, '2'\] is not a number or a list"),
        ([], ValueError, "layer is empty"),
        ([1, 9], ValueError, "layer 9 does not exist"),
        (True, TypeError, "layer True is not a number or a list of numbers; pass an int such as -1"),
        ([True], TypeError, r"layer \[True\] is not a number"),
        (np.bool_(True), TypeError, "is not a number"),
        (torch.tensor([True, False]), TypeError, "is not a number"),
        (torch.tensor(1.0), TypeError, "is not a number"),
        ({1: "a"}, TypeError, "layer {1: 'a'} is not a number or a list"),
        (b"1", TypeError, "layer b'1' is not a number"),
        (None, TypeError, "layer None is not a number"),
    ],
)
def test_layers_that_are_no_numbers_are_refused(
    demo: ESM2, layer: object, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        demo.embed(["MK"], layer=layer)  # type: ignore[call-overload]


@pytest.mark.parametrize("layer", [np.int64(3), np.array(3), torch.tensor(3)])
def test_a_layer_may_be_an_array_of_one_integer(demo: ESM2, layer: int) -> None:
    (row,) = demo.embed(["MKT"], layer=layer)
    np.testing.assert_array_equal(row, demo.embed(["MKT"], layer=3)[0])


def test_layers_may_be_an_array(demo: ESM2) -> None:
    several = demo.embed(["MKT"], layer=torch.tensor([0, -1]))  # type: ignore[call-overload]
    assert list(several) == [0, -1]


def test_calling_the_model_says_what_to_call(demo: ESM2) -> None:
    for arguments in ([torch.zeros(1, 4, dtype=torch.int64)], [["MKT"]], []):
        with pytest.raises(TypeError, match=r"call model\.embed\(sequences\).* or model\.forward_packed\("):
            demo(*arguments)


def test_training_is_refused(demo: ESM2) -> None:
    for train in (demo.train, lambda: demo.train(True), demo.requires_grad_):
        with pytest.raises(NotImplementedError, match=r"inference only.*fair-esm or transformers"):
            train()
    assert demo.eval() is demo and demo.train(False) is demo and demo.requires_grad_(False) is demo
    assert not any(parameter.requires_grad for parameter in demo.parameters())


@pytest.mark.parametrize(
    "dtype",
    ["float16", torch.float16, "torch.float16", "half", "fp16", "FP16", np.float16, np.dtype("float16")],
)
def test_the_dtype_may_be_spelt_as_in_torch_and_numpy(dtype: DType) -> None:
    model = ESM2.from_pretrained("demo", dtype=dtype, device="cpu")
    assert model.precision == "fp16"
    assert model.dtype == torch.float16


def test_the_default_device_is_that_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve_device(name: str | torch.device) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(model_module, "resolve_device", resolve_device)
    ESM2.from_pretrained("demo")
    assert asked == ["auto"] == [EmbedRequest((), Path("out.h5")).device]


@pytest.mark.parametrize("layer", [6, -7])
def test_layers_that_do_not_exist_are_refused(demo: ESM2, layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} does not exist: the model has layers 0 to 5"):
        demo.embed(["MK"], layer=layer)


def test_arguments_of_forward_packed_are_checked(demo: ESM2) -> None:
    batch = pack([encode("MKT"), encode("AC")])
    ids, cu_seqlens, longest = batch.input_ids, batch.cu_seqlens, batch.max_seqlen
    with pytest.raises(
        ValueError, match=r"input_ids must be a 1-D int32 or int64 tensor on cpu, got .*float32"
    ):
        demo.forward_packed(ids.float(), cu_seqlens, longest)
    with pytest.raises(ValueError, match="input_ids must be a 1-D"):
        demo.forward_packed(ids[None], cu_seqlens, longest)
    with pytest.raises(ValueError, match="cu_seqlens must be a 1-D int32 tensor"):
        demo.forward_packed(ids, cu_seqlens.long(), longest)
    with pytest.raises(ValueError, match="max_seqlen = 0 is not within 1 to 9 tokens"):
        demo.forward_packed(ids, cu_seqlens, 0)
    with pytest.raises(ValueError, match="max_seqlen = 4, but a sequence has 5 tokens"):
        demo.forward_packed(ids, cu_seqlens, 4)
    for wrong in ([1, 5, 9], [0, 5, 8], [0, 10, 9]):
        with pytest.raises(ValueError, match="cu_seqlens must increase from 0 to 9 tokens"):
            demo.forward_packed(ids, torch.tensor(wrong, dtype=torch.int32), longest)
    with pytest.raises(ValueError, match="repr_layers: 9 is not within 0 to 5"):
        demo.forward_packed(ids, cu_seqlens, longest, [9])


def test_what_the_checkpoint_lacks_is_missed_only_when_asked_for() -> None:
    checkpoint = load_checkpoint("demo")
    kept = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(("lm_head", "contact_head"))
    }
    whole = ESM2.from_pretrained("demo", device="cpu")
    model = model_of(Checkpoint("trunk", checkpoint.config, kept, "", ""), whole.precision_mode)
    np.testing.assert_array_equal(model.embed(["MKT"]), whole.embed(["MKT"]))
    batch = pack([encode("MKT")])
    with pytest.raises(ValueError, match="trunk has no language-model head"):
        model.forward_packed(batch.input_ids, batch.cu_seqlens, 5, return_logits=True)
    with pytest.raises(CheckpointError, match=r"NAME-contact-regression\.pt"):
        model.predict_contacts("MKT")


def test_precision_mode_sets_the_dtype_of_the_weights() -> None:
    model = ESM2.from_pretrained("demo", dtype="bf16", device="cpu")
    assert model.precision == "bf16"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.rotary.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("mode", ["fp16", "bf16", "fp32", "fp64"])
def test_rows_come_back_in_fp32_whatever_computed_them(demo: ESM2, mode: str) -> None:
    model = ESM2.from_pretrained("demo", dtype=mode, device="cpu")
    expected = np.float64 if mode == "fp64" else np.float32
    for per_residue in (False, True):
        (rows,) = model.embed(["MKTAYIAK"], per_residue=per_residue)
        assert rows.dtype == expected
        (truth,) = demo.embed(["MKTAYIAK"], per_residue=per_residue)
        assert np.linalg.norm(rows - truth) < 0.05 * np.linalg.norm(truth)


@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
@pytest.mark.parametrize("mode", ["fp16", "bf16", "fp32"])
def test_the_residual_stream_has_the_dtype_of_the_setting(mode: str, residual: torch.dtype) -> None:
    """In values, not in name only: an FP32 stream holds what no half type does."""
    assert PRECISIONS[mode].residual_dtype == torch.float32
    model = model_of(load_checkpoint("demo"), replace(PRECISIONS[mode], residual_dtype=residual))
    batch = pack([encode("MKTAYIAKQRQISFVK"), encode("ACDEFGH")])
    layers = list(range(model.config.num_layers))
    output = model.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers)
    for layer, stream in output.representations.items():
        assert stream.dtype == residual, f"layer {layer}"
        for half in (torch.float16, torch.bfloat16):
            share_held = float((stream.to(half).to(residual) == stream).float().mean())
            if half == residual:
                assert share_held == 1.0
            else:
                assert share_held < 0.5, f"layer {layer} holds {half} numbers only"


def test_the_residual_stream_holds_more_than_fp16_can() -> None:
    """Two additions of 40,000 overflow a stream in FP16, and only there."""
    checkpoint = load_checkpoint("demo")
    tensors = dict(checkpoint.tensors)
    for layer in (0, 1):
        tensors[f"layers.{layer}.fc2.bias"] = torch.full((96,), 40_000.0)
    changed = Checkpoint("changed", checkpoint.config, tensors, "", "")
    batch = pack([encode("MKTAYIAK")])
    for residual in (torch.float32, torch.float16):
        model = model_of(changed, replace(PRECISIONS["fp16"], residual_dtype=residual))
        output = model.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, [2])
        assert bool(output.representations[2].isfinite().all()) == (residual == torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_loading_holds_the_model_and_one_tensor_more(tmp_path: Path, dtype: str) -> None:
    config = ESM2Config(6, 640, 10)
    path = tmp_path / "esm2_large.pt"
    save_fair_esm((config, RandomTensors(config)), path)
    (line,) = measured("of_model", path, dtype)
    peak, model_size = map(int, line.split())
    hidden = config.hidden_size
    one_layer_in_fp32 = 12 * hidden**2 * 4
    largest_merged_tensor = 4 * hidden**2 * 4
    allowed = largest_merged_tensor if dtype == "fp32" else one_layer_in_fp32
    assert model_size > 59e6
    assert peak <= model_size + allowed, f"{peak / 1e6:.0f} MB for a model of {model_size / 1e6:.0f} MB"


def test_computing_imports_no_compiler() -> None:
    """Torch's takes a second or more to import, and an interrupted import ends in errors of its own."""
    program = """
import sys
import esm_packed
esm_packed.ESM2.from_pretrained("demo", device="cpu").embed(["MKTAYIAKQR"])
print(*{"torch._dynamo", "sympy"} & sys.modules.keys())
"""
    run = run_python(program)
    assert run.stdout == "\n", run.stderr


def test_rotary_tables_grow_and_outlive_what_was_captured_with_them() -> None:
    model = ESM2.from_pretrained("demo", device="cpu")
    first, _ = model.rotary(5)
    assert len(first) == 1026
    again, _ = model.rotary(1026)
    assert again.data_ptr() == first.data_ptr()
    grown, _ = model.rotary(1027)
    assert len(grown) == 2052
    assert torch.equal(grown[:1026], first)
    assert any(cos is first for cos, _ in model.rotary._outgrown)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_packed_weights_are_copied_pickled_and_moved(dtype: str) -> None:
    def weights_are_packed(model: ESM2) -> bool:
        return all(module.weight.is_mkldnn for module in model.modules() if isinstance(module, Linear))

    model = ESM2.from_pretrained("demo", device="cpu", dtype=dtype)
    is_packed = dtype != "fp64" and torch.backends.mkldnn.is_available()
    expected = model.embed(["MKTAYIAK", "MK"])
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert weights_are_packed(other) == is_packed
        np.testing.assert_array_equal(other.embed(["MKTAYIAK", "MK"]), expected)


def demo_qkv() -> dict[str, torch.Tensor]:
    """Of the first layer, from the checkpoint."""
    tensors = load_checkpoint("demo").tensors
    parts = [f"layers.0.self_attn.{part}_proj" for part in "qkv"]
    return {
        name: torch.cat([tensors[f"{part}.{name}"] for part in parts]).double() for name in ("weight", "bias")
    }


def first_qkv(model: ESM2) -> QKVProjection:
    return next(iter(model.layers)).qkv


def test_weights_have_the_checkpoint_order_where_kernels_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back, as `.to("cuda")` and `.to("cpu")` are."""
    model = ESM2.from_pretrained("demo", device="cpu", dtype="fp64")
    expected = model.embed(["MKTAYIAK"])
    interleaved = first_qkv(model).weight
    assert not torch.equal(interleaved, demo_qkv()["weight"])
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("esm_packed.modules.wants_interleaved_heads", lambda weight: False)
        model.to("cpu")
        for name, values in demo_qkv().items():
            assert torch.equal(getattr(first_qkv(model), name), values)
        np.testing.assert_allclose(model.embed(["MKTAYIAK"]), expected, rtol=1e-12, atol=1e-12)
    model.to("cpu")
    assert torch.equal(first_qkv(model).weight, interleaved)
    np.testing.assert_array_equal(model.embed(["MKTAYIAK"]), expected)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_weights_survive_a_move_that_fails(dtype: str) -> None:
    expected = ESM2.from_pretrained("demo", device="cpu", dtype=dtype).embed(["MKTAYIAK"])
    for num_moved in range(0, 20, 3):
        model = ESM2.from_pretrained("demo", device="cpu", dtype=dtype)
        left = [num_moved]

        def move(tensor: torch.Tensor, left: list[int] = left) -> torch.Tensor:
            left[0] -= tensor.numel() > 0
            if left[0] < 0:
                raise MemoryError
            return tensor.clone()

        with pytest.raises(MemoryError):
            model._apply(move)
        for _ in range(2):
            np.testing.assert_allclose(model.embed(["MKTAYIAK"]), expected, rtol=1e-5, atol=1e-5)
            model.to("cpu")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_a_state_dict_is_in_checkpoint_order(
    dtype: str, assign: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = ESM2.from_pretrained("demo", device="cpu", dtype=dtype)
    expected = model.embed(["MKTAYIAK"])
    state = {name: values.clone() for name, values in model.state_dict().items()}
    for name, values in demo_qkv().items():
        assert torch.equal(state[f"layers.0.qkv.{name}"].double(), values)
    torch.save(state, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("esm_packed.modules.wants_interleaved_heads", lambda weight: False)
        other = ESM2.from_pretrained("demo", device="cpu", dtype=dtype)
    for target in (other, model):
        target.load_state_dict({name: torch.zeros_like(values) for name, values in saved.items()})
        assert not target.embed(["MKTAYIAK"])[0].any()
        target.load_state_dict(saved, assign=assign)
        np.testing.assert_allclose(target.embed(["MKTAYIAK"]), expected, rtol=1e-4, atol=1e-5)
    for name, values in saved.items():
        assert torch.equal(values, state[name]), "the caller's tensors were reordered"
