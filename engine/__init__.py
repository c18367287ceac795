"""Convert and compile the encoder steps of a bundle for one machine: `nemostream build`.

`precision` rewrites the fp32 graph with a type for every tensor (16 bit, or 8 bit with the ranges that `calibration`
measures on speech), `tensorrt` compiles it into an engine, ONNX Runtime runs it as it is. `validate` compares the
result with fp32. Engines are stored by `nemostream.plans`.
"""
