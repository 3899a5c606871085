from __future__ import annotations

import gc
import importlib.util
import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

# A shell starts background jobs with Ctrl-C ignored, and every process started from here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# These fork the test process and come first: once Ray has run there, a child may wait for a lock for ever.
FORKING = ("test_download.py", "test_embedding_dataset.py", "test_store.py")

# Test processes take a file at a time. They end together when the files that take longest come first.
LONGEST = ("test_ray.py", "test_compile.py", "test_kill.py", "test_triton_kernels.py", "test_tune.py")


def pytest_configure(config: pytest.Config) -> None:
    """Set up what tests compute with, but not in the process that only hands them out: this takes seconds."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    gc.disable()  # until all is imported: every collection would go through what torch holds
    import torch
    from hypothesis import settings

    # Triton reads this when a kernel is decorated, so it is set before any kernel is imported.
    if HAS_TRITON and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter_bf16
        import interpreter_memory
        import interpreter_speed

        interpreter_bf16.install()
        interpreter_memory.install()
        interpreter_speed.install()

    import demo_weights

    demo_weights.install()

    # More examples: HYPOTHESIS_PROFILE=thorough. No deadline: the machine may be busy.
    settings.register_profile("quick", max_examples=25, deadline=None)
    settings.register_profile("thorough", max_examples=300, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

    # Tests compute small tensors, often on a busy machine, where two threads mostly wait for each other.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or Triton's library reports what is never freed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.path.name not in FORKING, item.path.name not in LONGEST))


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose operations run as Triton kernels: a GPU, else the CPU through Triton's interpreter."""
    import torch

    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    monkeypatch.setattr("esm_packed.kernels.dispatch.TRITON_DEVICES", {"cpu"})
    return torch.device("cpu")


@pytest.fixture
def cuda_device() -> torch.device:
    """The first GPU, for tests marked `gpu`."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)
