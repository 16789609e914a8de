"""A folder of shards: sample format, manifest, index, reader, writer, video codec."""
