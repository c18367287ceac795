"""The GPU backend: device-resident slots and CUDA-graph-captured steps."""
