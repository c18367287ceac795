"""Live audio to text with a bundle. Imports neither PyTorch nor NeMo.

A sample's way: `audio` (any PCM to 16 kHz mono) -> `vad` (is it worth a step?) -> `stream` (chunks) -> `scheduler`
(batches of ready chunks; one thread owns the engine) -> a backend behind the seam in `backend` (`ort`: features,
encoder step, `greedy` decoding, `boosting`) -> `stream` again (tokens, hypothesis), `endpoint` (where utterances end)
-> `recognition` (one stream: `tokenizer`, `confidence`, `words`, `utterance`) -> `live`, `aio` and `recording`, which
wait, and `recognizer`, which is what users hold.
"""
