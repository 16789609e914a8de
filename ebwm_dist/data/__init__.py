"""Shards of text and video: what a folder of them is (`format/`), and the order they are read in (`loading/`).

`prepare/` makes such folders. Training reads samples by position (`format/reader.py`) from this machine or another
(`remote.py`), in a shuffled order of one data set or several, through a resumable stream (`loading/stream.py`).
"""
