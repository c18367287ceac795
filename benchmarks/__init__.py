"""Measurements, one module per question: `python -m nemostream.benchmarks.NAME`.

`step` asks how long one streaming step takes beside NeMo's, `synthetic` makes the full-size checkpoint it needs.
"""
