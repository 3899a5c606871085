"""Precision validation: what half precision and packing change, judged."""
