"""Benchmarks: each measures ratios in one run, writes JSON and prints one table."""
