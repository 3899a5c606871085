"""The state of a run on disk: the request, its plan, claims and shards."""
