"""Conversion of FASTA files to tokens."""
