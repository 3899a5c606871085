"""FASTA files to tokens."""
