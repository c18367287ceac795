"""Greedy RNN-T decoding, phrase boosting, confidence."""
