"""The command line: `nemostream transcribe`, `serve`, `export`, `build`, `bench`, `info`, `doctor`."""
