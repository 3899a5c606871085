"""Checkpoints of ESM-2: found or downloaded, read in every format, written in fair-esm's."""

from esm_packed.checkpoints.formats import load_checkpoint, save_fair_esm
from esm_packed.checkpoints.names import Checkpoint, rounded_inv_freq, tensor_shapes
from esm_packed.checkpoints.random import RandomTensors
from esm_packed.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "RandomTensors",
    "load_checkpoint",
    "rounded_inv_freq",
    "save_fair_esm",
    "tensor_shapes",
]
