"""The HDF5 file a run makes."""
