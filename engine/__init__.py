"""The bundle's encoder steps made fast on one machine: `nemostream build`.

A step's way: `precision` writes the fp32 graph again with every number typed (16 bit, or 8 bit with the ranges that
`calibration` measured on speech); `tensorrt` compiles it into an engine; ONNX Runtime runs it as it is. What comes out
are `nemostream.plans`. Whether one is good enough is not decided here: `runtime.gate` runs it beside fp32.
"""
