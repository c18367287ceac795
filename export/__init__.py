"""From a NeMo checkpoint to a bundle. Needs the `export` extra; nothing here is imported at run time.

`checkpoint` reads and refuses, `features`, `encoder` and `decoder` write one kind of graph each through `graph`,
`parity` measures them against NeMo, `bundle` does it all in order.
"""

from nemostream.export.bundle import export_checkpoint

__all__ = ["export_checkpoint"]
