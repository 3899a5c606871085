"""What `dispatch` promises of every operation: its registration, its tracing, and the way a call takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import run_python
from torch.utils._python_dispatch import TorchDispatchMode

from esm_packed import kernels

ROOT = Path(__file__).parents[2]
NUM_HEADS, HEAD_DIM = 2, 16
HIDDEN_SIZE, FFN_SIZE = NUM_HEADS * HEAD_DIM, 64
MASK_ID = 32
OPERATIONS = sorted(set(kernels.__all__) - {"linear"})  # a function of torch's, which needs no registration

all_operations = pytest.mark.parametrize("name", OPERATIONS)

# The interpreter's numpy reports the mean that a compiler's example without residues has.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=["pytorch", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where operations run: as plain PyTorch on the CPU, or as Triton kernels."""
    if request.param == "pytorch":
        return torch.device("cpu")
    triton_device: torch.device = request.getfixturevalue("triton_device")
    return triton_device


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    import torch._dynamo  # 3 s, which only the process that runs these tests need spend

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_tensors(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "embedding": (33, HIDDEN_SIZE),
        "norm_weight": (HIDDEN_SIZE,),
        "norm_bias": (HIDDEN_SIZE,),
        "qkv_weight": (3 * HIDDEN_SIZE, HIDDEN_SIZE),
        "qkv_bias": (3 * HIDDEN_SIZE,),
        "fc1_weight": (FFN_SIZE, HIDDEN_SIZE),
        "fc1_bias": (FFN_SIZE,),
        "fc2_weight": (HIDDEN_SIZE, FFN_SIZE),
        "fc2_bias": (HIDDEN_SIZE,),
    }
    tensors = {name: torch.randn(shape).div(shape[-1] ** 0.5).to(dtype) for name, shape in shapes.items()}
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.outer(torch.arange(40.0), 0.1 ** torch.arange(HEAD_DIM // 2))
    tensors |= {"cos": angles.cos().to(table_dtype), "sin": angles.sin().to(table_dtype)}
    tensors["head_weight"] = torch.tensor([0.5, -2.0], dtype=table_dtype)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def batch_of(lengths: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    torch.manual_seed(1)
    input_ids = torch.randint(4, 33, (sum(lengths),), dtype=torch.int32)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return input_ids.to(device), cu_seqlens.to(device), max(lengths)


def transformer_layer(
    operations: Any,
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    tensors: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """All operations, each with keyword arguments, in the order of a transformer layer.

    Args:
        operations: `kernels`, or what has the same functions.
    """
    norm = {"weight": tensors["norm_weight"], "bias": tensors["norm_bias"], "eps": 1e-5}
    weight = tensors["embedding"]
    residual_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    residual, position_ids = operations.embed_tokens(
        input_ids=input_ids, cu_seqlens=cu_seqlens, weight=weight, mask_id=MASK_ID, out_dtype=residual_dtype
    )
    plain, _ = operations.embed_tokens(
        input_ids=input_ids, cu_seqlens=cu_seqlens, weight=weight, mask_id=None, out_dtype=weight.dtype
    )
    hidden_states = operations.layer_norm(hidden_states=residual, **norm)

    tables = {"cos": tensors["cos"], "sin": tensors["sin"]}
    projection = {"weight": tensors["qkv_weight"], "bias": tensors["qkv_bias"]}
    qkv = operations.linear_rotary(
        hidden_states=hidden_states, **projection, **tables, position_ids=position_ids
    )
    qkv = qkv.view(-1, 3, NUM_HEADS, HEAD_DIM)
    operations.rotary_qk_(qkv=qkv, **tables, position_ids=position_ids)
    operations.rotary_qk_packed_(qkv=qkv, **tables, cu_seqlens=cu_seqlens)
    query, key, value = qkv.unbind(1)
    attended = operations.packed_attention(
        query=query, key=key, value=value, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, softmax_scale=0.25
    )
    scores = tensors["head_weight"].new_zeros(query.shape[0], max_seqlen - 2)
    sums = operations.add_attention_maps_(
        query=query,
        key=key,
        weight=tensors["head_weight"],
        scores=scores,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        softmax_scale=0.25,
    )
    delta = attended.view(-1, HIDDEN_SIZE) + plain
    hidden_states = operations.add_layer_norm_(delta=delta, residual=residual, **norm)

    fc1 = {"weight": tensors["fc1_weight"], "bias": tensors["fc1_bias"]}
    hidden_states = operations.linear_gelu(hidden_states=hidden_states, **fc1)
    hidden_states = F.linear(hidden_states, tensors["fc2_weight"])
    operations.bias_gelu_(hidden_states=hidden_states, bias=tensors["fc2_bias"])
    means = operations.segment_mean(hidden_states=hidden_states, cu_seqlens=cu_seqlens)
    maxima = operations.segment_max(hidden_states=hidden_states, cu_seqlens=cu_seqlens)
    return residual, hidden_states, scores, sums, means, maxima


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies that keep their strides: the views `unbind` gives of a projection stay such views."""

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = torch.empty(0, dtype=value.dtype, device=value.device)
        storage.set_(value.untyped_storage().clone(), value.storage_offset(), value.shape, value.stride())
        return storage

    return {name: copy(value) for name, value in arguments.items()}


def tensors_in(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in arguments.values() if isinstance(value, torch.Tensor)]


@cache
def layer_calls(device: torch.device, dtype: torch.dtype) -> list[tuple[str, dict[str, Any]]]:
    """Each call within `transformer_layer`: the operation, and its arguments."""
    calls = []

    def recorded(operation: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(kernels, operation)

        def call(**arguments: Any) -> Any:
            calls.append((operation, copied(arguments)))
            return function(**arguments)

        return call

    operations = SimpleNamespace(**{operation: recorded(operation) for operation in OPERATIONS})
    transformer_layer(operations, *batch_of([3, 17, 5], device), model_tensors(device, dtype))
    return calls


def calls_of(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Copies of the arguments that each call of one operation gets within `transformer_layer`."""
    return [copied(arguments) for operation, arguments in layer_calls(device, dtype) if operation == name]


def registered(name: str) -> Any:
    return getattr(torch.ops.esm_packed, name).default


class Dispatched(TorchDispatchMode):
    """Collects the names of the registered operations of ours that pass torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "esm_packed":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


OF_REGISTRATION = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
OF_RESULTS = ("test_schema", "test_faketensor")
"""An operation is registered once: what it computes with is of no matter to the other two."""


@all_operations
@pytest.mark.parametrize(
    "device, dtype, checks",
    [
        ("pytorch", torch.float64, OF_REGISTRATION),
        ("triton", torch.float16, OF_RESULTS),
        pytest.param("pytorch", torch.float16, OF_REGISTRATION, marks=pytest.mark.slow),  # 3 s
        pytest.param("triton", torch.float32, OF_REGISTRATION, marks=pytest.mark.slow),  # 7 s
    ],
    indirect=["device"],
    ids=str,
)
def test_opcheck(name: str, dtype: torch.dtype, device: torch.device, checks: tuple[str, ...]) -> None:
    """What an operation modifies, returns and promises to the compiler agrees with what it does."""
    calls = calls_of(name, device, dtype)
    assert calls
    for arguments in calls:
        torch.library.opcheck(registered(name), (), arguments, test_utils=checks)


@all_operations
def test_registered_and_plain_calls_agree(name: str, device: torch.device) -> None:
    for arguments in calls_of(name, device, torch.float16):
        plain, through_torch = copied(arguments), copied(arguments)
        results = getattr(kernels, name)(**plain), registered(name)(**through_torch)
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        torch.testing.assert_close(tensors_in(through_torch), tensors_in(plain), rtol=0, atol=0)


@all_operations
def test_positional_and_keyword_arguments_agree(name: str, device: torch.device) -> None:
    for arguments in calls_of(name, device):
        by_keyword, by_position = copied(arguments), copied(arguments)
        results = (
            getattr(kernels, name)(**by_keyword),
            getattr(kernels, name)(*by_position.values()),
        )
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        torch.testing.assert_close(tensors_in(by_position), tensors_in(by_keyword), rtol=0, atol=0)


@all_operations
def test_eager_calls_bypass_the_dispatcher(name: str, device: torch.device) -> None:
    arguments = calls_of(name, device)[0]
    with Dispatched() as dispatched:
        getattr(kernels, name)(**copied(arguments))
        assert dispatched.names == []
        registered(name)(**copied(arguments))
        assert dispatched.names == [name]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "device, dtype",
    [("pytorch", torch.float32), pytest.param("triton", torch.float16, marks=pytest.mark.slow)],  # 10 s
    indirect=["device"],
    ids=str,
)
def test_a_layer_compiles_whole_and_once_for_all_shapes(dtype: torch.dtype, device: torch.device) -> None:
    """The first shape may be taken for the only one; from the second on all are served."""
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return transformer_layer(kernels, *arguments)

    tensors = model_tensors(device, dtype)
    compilations = []
    for lengths in ([3, 17, 5], [4, 20, 3, 9], [33, 6, 3, 3, 8, 2]):
        batch = batch_of(lengths, device)
        torch._dynamo.mark_dynamic(batch[0], 0)
        torch._dynamo.mark_dynamic(batch[1], 0)
        actual = compiled(*batch, tensors)
        compilations.append(backend.frame_count)
        expected = transformer_layer(kernels, *batch, tensors)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert compilations[1] <= 2
    assert compilations[2] == compilations[1]
    targets = {str(node.target) for graph in backend.graphs for node in graph.graph.nodes}
    assert {name for name in OPERATIONS if f"esm_packed.{name}.default" in targets} == set(OPERATIONS)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "device",
    ["pytorch", pytest.param("triton", marks=pytest.mark.slow)],
    indirect=True,  # 6 s
)
def test_mark_dynamic_alone_serves_every_shape(device: torch.device) -> None:
    """Where no Python number changes, the first compilation serves every number of tokens and sequences."""
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return transformer_layer(kernels, *arguments)

    tensors = model_tensors(device, torch.float32)
    for lengths in ([3, 17, 5], [4, 17, 3, 9], [17, 6, 3, 3, 8]):
        input_ids, cu_seqlens, max_seqlen = batch_of(lengths, device)
        torch._dynamo.mark_dynamic(input_ids, 0)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        compiled(input_ids, cu_seqlens, max_seqlen, tensors)
    assert backend.frame_count == 1


def test_a_second_import_leaves_the_operations_as_they_are() -> None:
    """With the repository on sys.path transformers imports the folder as `kernels`, to see its version."""
    code = (
        "import kernels as other\n"
        "from esm_packed import kernels\n"
        "assert other is not kernels\n"
        "print(*(name for name in kernels.__all__ if getattr(other, name) is not getattr(kernels, name)))\n"
    )
    done = run_python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_kernels_serve_a_machine_without_triton() -> None:
    """`triton` cannot be imported, and every module of the kernels that needs it is left alone."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from esm_packed import kernels\n"
        "from esm_packed.kernels import dispatch\n"
        "assert not dispatch.TRITON_DEVICES\n"
        "x = torch.randn(4, 8)\n"
        "one, zero = torch.ones(8), torch.zeros(8)\n"
        "expected = torch.nn.functional.layer_norm(x, (8,), one, zero, 1e-5)\n"
        "assert torch.equal(kernels.layer_norm(x, one, zero, 1e-5), expected)\n"
        "assert torch.equal(torch.ops.esm_packed.layer_norm(x, one, zero, 1e-5), expected)\n"
        "kernels.bias_gelu_(x, zero)\n"
        "print(*(name for name in sys.modules if name.startswith('triton.')))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
