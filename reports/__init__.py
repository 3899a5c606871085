"""Figures and reports from result files.

`reports/x.py` is imported as `esm_packed.reports.x`.
"""
