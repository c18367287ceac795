"""Live audio to text with a bundle. Imports neither PyTorch nor NeMo.

A sample's way: `audio` (any PCM to 16 kHz mono) -> `stream` (chunks) -> `scheduler` (batches of ready chunks; one
thread owns the engine) -> a backend behind the seam in `backend` (`ort`: features, encoder step, `greedy` decoding) ->
`stream` again (tokens, hypothesis) -> `tokenizer` (text) -> `recognizer`, which is what users hold.
"""
