"""Export of a checkpoint to a bundle. Needs the `export` extra; the runtime does not import this package.

`sources` finds the checkpoint; `checkpoint` and `transformers_checkpoint` read and validate it, with the readers of
file formats `state_dict`, `safetensors` and `sentencepiece_model`; `languages` orders the languages; `features`,
`encoder` and `decoder` write the graphs with `graph`; `parity` compares the graphs with a `reference`; `bundle` runs
these steps.
"""

from nemostream.export.bundle import export_checkpoint

__all__ = ["export_checkpoint"]
