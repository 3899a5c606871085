"""The operating system: files, paths, signals and terminals."""
