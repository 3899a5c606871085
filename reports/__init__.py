"""Figures and reports from result files."""
