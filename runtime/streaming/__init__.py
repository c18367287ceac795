"""Streams: chunking, batching, sessions, snapshots."""
