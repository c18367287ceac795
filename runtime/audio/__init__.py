"""Audio input: files, containers, resampling, silence and voice activity detection."""
