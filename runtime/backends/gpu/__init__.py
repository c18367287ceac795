"""GPU backend: stream state resident on the device, steps launched as CUDA graphs."""
