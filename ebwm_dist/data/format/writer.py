"""Write samples as WebDataset tars whose bytes depend on the samples alone, each with an index beside it.

A shard gets its name when it is complete and on disk, and then its index (`index.py`): one with an index is finished.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ebwm_dist.data.format.index import TAR_BLOCK, IndexEntry, Member, write_index
from ebwm_dist.data.format.manifest import Shard
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, TokenFormat
from ebwm_dist.files import naming, rename, sha256_of_file


class _TarShards:
    """Write records to `{split}-{number}.tar` in `folder`, the numbers from `first_shard` on.

    Keys follow from the number of the shard, so that shards can be written by different processes.
    """

    def __init__(self, folder: Path, split: str, records_per_shard: int, first_shard: int) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._records_per_shard = records_per_shard
        self._number = first_shard
        self._file: BinaryIO | None = None

    def _append(self, files: dict[str, bytes], checksums: Sequence[int]) -> None:
        """Append a record of the members `files`, by extension, which holds a sample for each checksum."""
        # Imported here: webdataset imports torch, which worker processes of the tools do not need.
        from webdataset.writer import TarWriter

        if self._file is None:
            self._records: list[IndexEntry] = []
            self._checksums: list[int] = []
            self._file = open(self._partial, "wb")  # noqa: SIM115 (closed with the shard)
            self._tar = TarWriter(self._file, user="ebwm", group="ebwm", mode=0o644, mtime=0, encoder=False)
        key = f"{self._number * self._records_per_shard + len(self._records):08d}"
        members, end = [], self._tar.tarstream.offset
        for extension in sorted(files):  # as TarWriter does
            members.append(Member(extension, end + TAR_BLOCK, len(files[extension])))
            end += TAR_BLOCK + -(-len(files[extension]) // TAR_BLOCK) * TAR_BLOCK
        with naming(self._folder / self._name):
            self._tar.write({"__key__": key, **files})
        assert self._tar.tarstream.offset == end
        self._records.append(IndexEntry(key, tuple(members), len(checksums)))
        self._checksums += checksums
        if len(self._records) == self._records_per_shard:
            self.close()

    @property
    def _name(self) -> str:
        return f"{self._split}-{self._number:06d}.tar"

    @property
    def _partial(self) -> Path:
        return self._folder / f".{self._name}.{os.getpid()}.tmp"

    def close(self) -> None:
        """Finish the current shard: it is on disk, with its index, before it is listed."""
        if self._file is None:
            return
        path = self._folder / self._name
        with naming(path):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        samples, size = len(self._checksums), self._partial.stat().st_size
        shard = Shard(self._name, samples, size, sha256_of_file(self._partial))
        (self._folder / shard.index_path).unlink(missing_ok=True)
        rename(self._partial, path)
        write_index(self._folder, shard, self._records, self._checksums)
        self.shards.append(shard)
        self._number += 1


class ShardWriter(_TarShards):
    """Write blocks of tokens or latents, `members_per_shard` of them to a shard."""

    def __init__(
        self,
        folder: Path,
        split: str,
        sample_format: TokenFormat | LatentFormat,
        members_per_shard: int,
        first_shard: int = 0,
    ) -> None:
        super().__init__(folder, split, members_per_shard, first_shard)
        self._format = sample_format

    def write(self, block: np.ndarray) -> None:
        """Append a block of samples `[R, S+1]` or `[R, F, E]` as one member."""
        assert block.shape[1:] == self._format.shape, f"a block {block.shape} of {self._format.shape}"
        rows = np.ascontiguousarray(block, self._format.array_dtype)
        self._append({"npy": npy_bytes(rows)}, [zlib.crc32(row) for row in rows])


class ClipWriter(_TarShards):
    """Write clips, `clips_per_shard` of them to a shard."""

    def __init__(self, folder: Path, split: str, sample_format: ClipFormat, clips_per_shard: int, first_shard: int = 0):
        super().__init__(folder, split, clips_per_shard, first_shard)
        self._format = sample_format

    def write(self, media: bytes | Sequence[bytes], info: dict[str, Any]) -> None:
        """Append a clip, as one mp4 file or as an image of each frame, with its description `info`.

        Where there are classes, the description holds the `label`.
        """
        images = [media] if isinstance(media, bytes) else list(media)
        description = json.dumps(info, sort_keys=True, ensure_ascii=False).encode("utf-8")
        files = {"json": description, **dict(zip(self._format.media, images, strict=True))}
        if self._format.classes:
            files["cls"] = str(info["label"]).encode("ascii")
        checksum = 0
        for extension in sorted(files):
            checksum = zlib.crc32(files[extension], checksum)
        self._append(files, [checksum])


def npy_bytes(block: np.ndarray) -> bytes:
    """Return `block` in npy format 1.0, C order."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, block, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
