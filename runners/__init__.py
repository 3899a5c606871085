"""From FASTA files to embeddings on disk: the command line and what it runs.

`runners/x.py` is imported as `esm_packed.runners.x`.
"""
