"""Progress of a run, shown while it works."""
