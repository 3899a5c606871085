"""What may be chosen where an input is faulty; imports nothing, for the command line's help."""

from __future__ import annotations

CHOICES = {
    "invalid": ("error", "x", "skip"),
    "duplicates": ("error", "first", "rename"),
    "gaps": ("error", "drop"),
}
"""Of a field of `fasta.ReadOptions`, which says what each means; the first is the default."""
