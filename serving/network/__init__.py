"""Connections, access control, trusted proxies and error responses."""
