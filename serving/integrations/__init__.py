"""Servers of others that run the engine: Ray Serve, Triton."""
