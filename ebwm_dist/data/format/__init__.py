"""What a folder of shards is: sample format, manifest, index, reader and writer."""
