"""Streams, from audio to results.

`chunker` cuts a stream's audio into chunks, `scheduler` runs the chunks of all streams in batches, with the data in
`state`, and `session` makes results and events of their outputs. `live` (threads), `aio` (asyncio) and `offline` (whole
recordings) are its interfaces. `snapshot` saves and restores a stream.
"""
