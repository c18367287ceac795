"""Streaming speech recognition server: Riva gRPC, OpenAI's HTTP and WebSocket APIs, and nemostream's own WebSocket.

`session` holds everything that does not depend on a protocol; each protocol has its own module in `protocols`.
"""
