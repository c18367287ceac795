"""Uploaded recordings: admission, decoding in separate processes, and transcription."""
