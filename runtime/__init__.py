"""Speech recognition with a bundle, live or offline. Imports neither PyTorch nor NeMo.

The path of a sample: `audio` (conversion to mono at the model's rate, VAD) -> `streaming` (chunks, batches of ready
chunks of all streams) -> a backend behind the interface in `backends.base` (features, encoder, and greedy decoding with
`decoding`) -> `streaming` again (hypothesis) -> `text` (text, words, utterances). `model` is the public interface.
"""
