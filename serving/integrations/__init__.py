"""Integrations into other servers: Ray Serve, Triton."""
