"""Choices for handling faulty input; imports nothing, so that the command line's help can use it."""

from __future__ import annotations

CHOICES = {
    "invalid": ("error", "x", "skip"),
    "duplicates": ("error", "first", "rename"),
    "gaps": ("error", "drop"),
}
"""Allowed values of the fields of `fasta.ReadOptions`, which explains them; the first is the default."""
