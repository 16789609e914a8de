"""Shards of text and video, and the order they are read in.

Documents (`documents.py`) are encoded (`encoding.py`, `tokenizer.py`), packed into rows (`packing.py`) and written as
tar shards (`writer.py`) with an index (`index.py`) by `build.py`, which puts a manifest (`manifest.py`) beside them.
Videos are cut into clips (`cutting.py`), which `video_shards.py` writes as they are or encoded. Both run here or on
other processes (`executors.py`) and go on after a stop (`folder.py`). What the samples of a folder are is said by
`content.py`. Training reads samples by position (`shards.py`, `decode.py`) from this machine or another (`remote.py`),
in a shuffled order (`order.py`) of one data set or several (`mixture.py`), through a resumable stream (`stream.py`).
"""
