"""Uploaded recordings: admission, and decoding in worker processes."""
