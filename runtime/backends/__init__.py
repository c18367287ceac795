"""Backends: what runs the model's graphs. `base` defines the interface, `cpu` and `gpu` implement it."""
