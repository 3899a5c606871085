"""From FASTA files to embeddings on disk: the command line and what it runs."""
