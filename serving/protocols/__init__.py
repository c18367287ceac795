"""Protocols of the server: HTTP, WebSocket, OpenAI Realtime, Riva gRPC."""
