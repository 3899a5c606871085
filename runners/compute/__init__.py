"""Computing shards: the pipeline around the model, in this process or on Ray."""
