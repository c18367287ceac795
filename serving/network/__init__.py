"""Connections, access control and trusted proxies."""
