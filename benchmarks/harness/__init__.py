"""Shared code of the benchmarks: result records, load generator, corpora, roofline, competing implementations."""
