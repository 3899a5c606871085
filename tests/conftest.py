from __future__ import annotations

import torch

# Tests compute small tensors, often on a busy machine, where two threads mostly wait for each other.
torch.set_num_threads(1)
