"""Figures and pages from benchmark results."""
