"""What `interpreter_speed` describes once is what Triton describes every time."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

import interpreter_speed
from triton.language import core

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU, not in the interpreter"
)

TYPES = [
    (core.float32, None),
    (core.float16, [8]),
    (core.int32, [4, 8]),
    (core.pointer_type(core.bfloat16), [16]),
]


@pytest.mark.parametrize("element_type, shape", TYPES, ids=str)
def test_tensors_and_their_types_are_tritons(element_type: core.dtype, shape: list[int] | None) -> None:
    own_type = ours_type = element_type
    if shape is not None:
        own_type, ours_type = object.__new__(core.block_type), core.block_type(element_type, shape)
        interpreter_speed.BLOCK_TYPE_INIT(own_type, element_type, shape)
        for name, value in vars(own_type).items():
            assert str(getattr(ours_type, name)) == str(value), name
    own = object.__new__(core.tensor)
    interpreter_speed.TENSOR_INIT(own, "handle", own_type)
    ours = core.tensor("handle", ours_type)
    assert vars(ours).keys() == vars(own).keys()
    for name, value in vars(own).items():
        assert str(getattr(ours, name)) == str(value), name
