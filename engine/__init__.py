"""Graphs compiled ahead of time for a GPU (TensorRT, TensorRT for RTX).

Empty so far: bundles run on ONNX Runtime (`nemostream.runtime.ort`), which needs no building. This room exists so that
what is built from a bundle has its place beside what exports and what runs it.
"""
