"""The state of a run on disk: what was asked, its plan, claims and shards."""
