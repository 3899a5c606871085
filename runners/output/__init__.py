"""The HDF5 file created by a run."""
