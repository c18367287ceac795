"""Measurements, one module per question: `nemostream bench NAME`, or `python -m nemostream.benchmarks.NAME`.

latency      how long does a step take, and a chunk from speech to text?
capacity     how many people can talk at once? (`load` lets them talk)
throughput   how much recorded audio per second?
accuracy     how many words are wrong? (`corpora` is what they are counted on)
baseline     the same step beside NeMo, transformers, ONNX Runtime, sherpa-onnx (`ring`, `sides`, `nemo`)
cost         does a long stream cost more, and what does a wide batch cost?
serve        how many callers can a server listen to?
transcripts  how right are the words' times and confidences?
quick        a bit of all that in under a minute
synthetic    the full-size model of random weights, for whoever has no other (without NeMo: `random_bundle`)
report       results as tables, plots and pages; results beside earlier ones

`features` tells what confidence, boosting, words and utterances cost of a step, `boosting` which phrases it finds.
`record` is the result file and the arithmetic, `timed` our backends as they are timed, `floor` what the machine allows
at best. `gpu_check`, `gpu_speed` and `gpu_report` are what a GPU has to show, `precision` what the numbers a GPU
computes in cost in words.
"""
