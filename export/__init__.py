"""Export of a NeMo checkpoint to a bundle. Needs the `export` extra; the runtime does not import this package.

`checkpoint` reads and validates the checkpoint; `features`, `encoder` and `decoder` write the graphs with `graph`;
`parity` compares the graphs with NeMo; `bundle` runs these steps.
"""

from nemostream.export.bundle import export_checkpoint

__all__ = ["export_checkpoint"]
