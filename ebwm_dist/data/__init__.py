"""Token shards and the order they are read in.

Documents (`documents.py`) are encoded (`encoding.py`, `tokenizer.py`), packed into rows (`packing.py`) and written as
tar shards with an index (`writer.py`) by `build.py`, which puts a manifest (`manifest.py`) beside them. Training reads
rows by position (`shards.py`) in a shuffled order (`order.py`) through a resumable stream (`stream.py`).
"""
