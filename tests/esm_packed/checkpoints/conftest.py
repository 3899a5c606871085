from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from checkpoint_files import CONFIG, Tensors

from esm_packed.checkpoints import RandomTensors


@pytest.fixture
def no_unexpected_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return dict(RandomTensors(CONFIG, seed=5))
