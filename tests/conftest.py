from __future__ import annotations

import signal

import torch

# Tests compute small tensors, often on a busy machine, where two threads mostly wait for each other.
torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and every process started from here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
