"""Files, paths, signals and terminals: what the other rooms need of the operating system."""
