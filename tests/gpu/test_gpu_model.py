"""The whole model on a GPU: every precision and attention backend against FP64, graphs, TF32, NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tolerances import relative_error
from workloads import token_lengths

from esm_packed import ESM2
from esm_packed.alphabet import encode
from esm_packed.attention import BACKENDS, WAITING_BACKENDS, BackendError
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.kernels import dispatch
from esm_packed.numerics import PRECISIONS, Precision
from esm_packed.outputs import mean_of, output_names
from esm_packed.packing import PackedBatch, pack

pytestmark = pytest.mark.gpu

Record = Callable[[str, Any], None]

SHAPES = {"8M": ESM2_MODELS["esm2_t6_8M_UR50D"], "650M_3_layers": ESM2Config(3, 1280, 20)}
MODES = ["fp16", "bf16", "fp32", "tf32"]
HALF_RESIDUAL = Precision("fp16_residual_fp16", torch.float16, torch.float16)
TIMES_PYTORCHS_ERROR = 3.0
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def known_names() -> Iterator[None]:
    """`random:` knows the shapes above, and `dtype` the FP16 residual stream."""
    with pytest.MonkeyPatch.context() as patch:
        for shape, config in SHAPES.items():
            patch.setitem(ESM2_MODELS, f"test_{shape}", config)
        patch.setitem(PRECISIONS, HALF_RESIDUAL.name, HALF_RESIDUAL)
        yield


@cache
def load(shape: str, mode: str, backend: str, device: torch.device) -> ESM2:
    """A model with random weights; the test is skipped where the backend cannot serve."""
    with known_names():
        try:
            return ESM2.from_pretrained(f"random:test_{shape}", device=device, dtype=mode, attention=backend)
        except BackendError as error:
            pytest.skip(str(error))


def random_batch(
    lengths: list[int], device: torch.device, letters: str = "LAGVSERTIDPKQNFYMHWC"
) -> PackedBatch:
    """Random proteins of so many tokens, one with masks."""
    generator = torch.Generator().manual_seed(sum(lengths))
    sequences = []
    for length in lengths:
        choice = torch.randint(len(letters), (length - 2,), generator=generator).tolist()
        sequences.append("".join(letters[index] for index in choice))
    if lengths[0] > 20:
        sequences[0] = sequences[0][:5] + "<mask>" * 7 + sequences[0][12:]
    return pack([encode(sequence) for sequence in sequences]).to(device)


@cache
def checked_batch(device: torch.device) -> PackedBatch:
    """UniRef lengths, among them very short ones."""
    return random_batch([*token_lengths("uniref", 2500), 3, 3, 65], device)


def results_of(model: ESM2, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Every layer, its mean over residues, and the logits, in FP64."""
    layers = range(model.config.num_layers + 1)
    output = model.forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers, return_logits=True
    )
    assert output.logits is not None
    means = model.embed_packed(batch, output_names(["mean"], layers))
    return (
        {f"layer {layer}": states.double() for layer, states in output.representations.items()}
        | {name.replace("/", " "): mean.double() for name, mean in means.items()}
        | {"logits": output.logits.double()}
    )


@cache
def truth(shape: str, device: torch.device) -> dict[str, torch.Tensor]:
    """What the FP64 mode computes, which runs no Triton."""
    return results_of(load(shape, "fp64", "auto", device), checked_batch(device))


@cache
def pytorch_errors(shape: str, mode: str, device: torch.device) -> dict[str, float]:
    """Relative errors of the same model in plain PyTorch."""
    model = load(shape, mode, "reference", device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TRITON_DEVICES", set())
        return errors_of(results_of(model, checked_batch(device)), shape, device)


def errors_of(results: dict[str, torch.Tensor], shape: str, device: torch.device) -> dict[str, float]:
    """Relative L2 error of every result."""
    return {name: relative_error(results[name], expected) for name, expected in truth(shape, device).items()}


@every_backend
@pytest.mark.parametrize("mode", MODES)
@every_shape
def test_model_is_as_close_to_fp64_as_pytorch(
    shape: str, mode: str, backend: str, cuda_device: torch.device, record_property: Record
) -> None:
    model = load(shape, mode, backend, cuda_device)
    assert model.attention_backend == backend
    errors = errors_of(results_of(model, checked_batch(cuda_device)), shape, cuda_device)
    allowed = pytorch_errors(shape, mode, cuda_device)
    last = f"mean {model.config.num_layers}"
    record_property("relative_error_of_last_mean", errors[last])
    record_property("relative_error_of_last_mean_in_pytorch", allowed[last])
    record_property("max_relative_error", max(errors.values()))
    for name, error in errors.items():
        bound = TIMES_PYTORCHS_ERROR * allowed[name] + torch.finfo(torch.float32).eps
        assert error <= bound, f"{name}: {error:.2e}, PyTorch {allowed[name]:.2e}"


@pytest.mark.parametrize("mode", MODES)
@every_shape
def test_model_packed_equals_alone(
    shape: str, mode: str, cuda_device: torch.device, record_property: Record
) -> None:
    model = load(shape, mode, "auto", cuda_device)
    batch = checked_batch(cuda_device)
    last = model.config.num_layers
    packed = model.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, [last])
    rows = packed.representations[last].double()
    worst = 0.0
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        bounds = torch.tensor([0, end - start], dtype=torch.int32, device=cuda_device)
        alone = model.forward_packed(batch.input_ids[start:end].contiguous(), bounds, end - start, [last])
        worst = max(worst, relative_error(alone.representations[last], rows[start:end]))
    record_property("max_relative_difference", worst)
    record_property("attention_backend", model.attention_backend)
    error = pytorch_errors(shape, mode, cuda_device)[f"layer {last}"]
    assert worst <= (1e-5 if mode == "fp32" else 2 * TIMES_PYTORCHS_ERROR * error)


@pytest.mark.parametrize("global_switch", ["ieee", "tf32"])
@every_shape
def test_tf32_model_only_where_asked_for(
    shape: str,
    global_switch: str,
    cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", global_switch)
    last = f"layer {SHAPES[shape].num_layers}"
    errors = {}
    for mode in ("fp32", "tf32"):
        model = load(shape, mode, "auto", cuda_device)
        errors[mode] = errors_of(results_of(model, checked_batch(cuda_device)), shape, cuda_device)[last]
    record_property("relative_errors", errors)
    assert errors["fp32"] < 1e-5 < errors["tf32"]


@every_shape
def test_model_error_of_a_half_residual_stream(
    shape: str, cuda_device: torch.device, record_property: Record
) -> None:
    """Recorded, not judged: what an FP16 residual stream would cost in accuracy."""
    batch = checked_batch(cuda_device)
    for mode in ("fp16", HALF_RESIDUAL.name):
        errors = errors_of(results_of(load(shape, mode, "auto", cuda_device), batch), shape, cuda_device)
        record_property(mode, errors)


@every_backend
def test_model_graph_replay_with_other_lengths(
    backend: str, cuda_device: torch.device, record_property: Record
) -> None:
    if backend in WAITING_BACKENDS:
        pytest.skip(f"{backend} waits for the device")
    model = load("8M", "fp16", backend, cuda_device)
    capacity, max_seqlen, total_tokens = 64, 1024, 3000
    packs = [token_lengths("uniref", total_tokens), [1024, 3, 900, 3, 1000, 70], [50] * 60, [700, 5, 20]]

    def fixed_size(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = random_batch(lengths, cuda_device)
        filled = batch.cu_seqlens.new_full((capacity + 1,), sum(lengths))
        filled[: len(lengths) + 1] = batch.cu_seqlens
        left_over = batch.input_ids.new_full((total_tokens - sum(lengths),), 5)
        return torch.cat([batch.input_ids, left_over]), filled

    def forward(input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        layer = model.config.num_layers
        output = model.forward_packed(input_ids, cu_seqlens, max_seqlen, [layer], return_logits=True)
        return output.representations[layer]

    input_ids, cu_seqlens = fixed_size(packs[0])
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            forward(input_ids, cu_seqlens)
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = forward(input_ids, cu_seqlens)

    differences, same_bits = [], []
    for lengths in packs:
        other_ids, other_bounds = fixed_size(lengths)
        input_ids.copy_(other_ids)
        cu_seqlens.copy_(other_bounds)
        graph.replay()
        eager = forward(other_ids, other_bounds)
        in_use = slice(sum(lengths))
        differences.append(relative_error(replayed[in_use], eager[in_use]))
        same_bits.append(torch.equal(replayed[in_use], eager[in_use]))
    record_property("relative_differences", differences)
    record_property("same_bits", same_bits)
    assert max(differences) <= 1e-4


@every_backend
def test_model_never_waits_for_the_device(backend: str, cuda_device: torch.device) -> None:
    if backend in WAITING_BACKENDS:
        pytest.skip(f"{backend} waits for the device")
    model = load("8M", "fp16", backend, cuda_device)
    batch = checked_batch(cuda_device)
    layer = model.config.num_layers
    model.embed_packed(batch, [mean_of(layer)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.embed_packed(batch, [mean_of(layer)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
@pytest.mark.parametrize("mode", ["fp16", "fp32"])
def test_model_nan_stays_in_its_sequence(mode: str, backend: str, cuda_device: torch.device) -> None:
    """One residue with a NaN embedding: the other sequences keep their very bits."""
    model = load("8M", mode, backend, cuda_device)
    letter = encode("W")[0]
    batch = random_batch([40, 64, 3, 300, 65, 17], cuda_device, letters="LAGVSERTIDPKQNFYMHC")
    poisoned = 3
    start, end = batch.cu_seqlens[poisoned : poisoned + 2].tolist()
    input_ids = batch.input_ids.clone()
    input_ids[start + 7] = int(letter)
    last = model.config.num_layers

    def forward() -> torch.Tensor:
        output = model.forward_packed(input_ids, batch.cu_seqlens, batch.max_seqlen, [last])
        return output.representations[last]

    clean = forward()
    row = model.embedding.weight[int(letter)].clone()
    model.embedding.weight[int(letter)] = float("nan")
    try:
        dirty = forward()
    finally:
        model.embedding.weight[int(letter)] = row
    others = torch.ones(len(input_ids), dtype=torch.bool, device=cuda_device)
    others[start:end] = False
    assert torch.equal(dirty[others], clean[others])
    assert dirty[start:end].isnan().all()
