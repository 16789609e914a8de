"""Write blocks of rows as WebDataset tars whose bytes depend on nothing but the rows, each with an index beside it.

The index gives key, payload offset, payload size and number of rows of every member, so that a row is read with one
`pread`; the tars themselves are plain WebDataset shards.
"""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ebwm_dist.data.content import LatentContent, TokenContent
from ebwm_dist.data.files import sha256_of_file, write_json
from ebwm_dist.data.manifest import Shard

TAR_BLOCK = 512  # bytes of the header in front of every member's payload


@dataclass(frozen=True)
class Member:
    """One member of a tar: `rows` rows in an npy payload of `size` bytes from `offset` on."""

    key: str
    offset: int
    size: int
    rows: int


def npy_bytes(block: np.ndarray) -> bytes:
    """Return `block` in npy format 1.0, C order."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(block), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class ShardWriter:
    """Write the blocks of one split to `{split}-000000.tar`, `{split}-000001.tar`, ... in `folder`."""

    def __init__(self, folder: Path, split: str, content: TokenContent | LatentContent, members_per_shard: int) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._content = content
        self._members_per_shard = members_per_shard
        self._key = 0
        self._members: list[Member] = []
        self._file: BinaryIO | None = None

    def write(self, block: np.ndarray) -> None:
        """Append a block of rows `[R, S+1]` or `[R, F, E]` as one member."""
        assert block.shape[1:] == self._content.shape, f"a block {block.shape} of {self._content.shape}"
        # Imported here: webdataset imports torch, which worker processes of the tools do not need.
        from webdataset.writer import TarWriter

        if self._file is None:
            self._file = open(self._folder / self._name, "wb")  # noqa: SIM115 (closed with the shard)
            self._tar = TarWriter(self._file, user="ebwm", group="ebwm", mode=0o644, mtime=0, encoder=False)
        payload = npy_bytes(block.astype(self._content.array_dtype))
        key = f"{self._key:08d}"
        offset = self._tar.tarstream.offset + TAR_BLOCK
        self._tar.write({"__key__": key, "npy": payload})
        self._members.append(Member(key, offset, len(payload), len(block)))
        self._key += 1
        if len(self._members) == self._members_per_shard:
            self.close()

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):06d}.tar"

    def close(self) -> None:
        """Finish the current shard: it is on disk, with its index, before it is listed."""
        if self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path = self._folder / self._name
        samples = sum(member.rows for member in self._members)
        shard = Shard(self._name, samples, path.stat().st_size, sha256_of_file(path))
        index = {"shard": shard.path, "members": [asdict(member) for member in self._members]}
        write_json(self._folder / shard.index_path, index)
        self.shards.append(shard)
        self._members = []
