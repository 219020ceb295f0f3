"""Throughput of training, decoding and data loading, activation memory, and the check of a GPU.

Results: docs/results. How to read them: docs/performance.md.
"""
