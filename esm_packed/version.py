"""The version, alone in a file that imports nothing, so that building the package does not import torch."""

__version__ = "0.1.0"
