"""The model as a service: live speech in, live text out, over Riva gRPC, OpenAI's HTTP and WebSocket, and our own.

Everything that does not know a transport is in `session`; each transport has a file of its own.
"""
