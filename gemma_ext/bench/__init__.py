"""Measuring tools of the scripts in ``benchmarks/``: data, truth, timing, ceilings, report."""
