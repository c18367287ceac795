"""What benchmarks share: result records, load, corpora, competing implementations."""
