"""The command line: `nemostream transcribe`, `serve`, `export`, `build`, `info`, `doctor` and `bench`."""
