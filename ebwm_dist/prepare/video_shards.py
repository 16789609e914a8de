"""Make a data folder of video: files -> clips -> shards of clips, or of their latents -> manifest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ebwm_dist.data.format.manifest import SPLITS, Manifest, Shard, Split
from ebwm_dist.data.format.sample_format import ClipFormat
from ebwm_dist.data.format.video_codec import encode_clip, encode_jpeg, encode_png
from ebwm_dist.data.format.writer import ClipWriter
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.build_state import Report, begin, finish, up_to_date, write_rejects
from ebwm_dist.prepare.cutting import Clip, Cut, Rejects, find_videos, plan_clips, probe_videos, read_frames
from ebwm_dist.prepare.latent_shards import Encoding, LatentStore
from ebwm_dist.prepare.listing import REJECTS_FILE, describe_inputs
from ebwm_dist.prepare.shard_tasks import (
    VERSION,
    Batch,
    BuildRecord,
    Made,
    ShardTask,
    Source,
    Store,
    make_shards,
    shards_of,
)
from ebwm_dist.workers.executors import LOCAL, Work


@dataclass(frozen=True)
class VideoFiles:
    """Clips that are cut out of video files."""

    clips: tuple[Clip, ...]
    cut: Cut

    def describe(self) -> list[Any]:
        cut = self.cut
        frames = [cut.frames, cut.frame_interval, cut.height, cut.width, cut.crop]
        return [frames, [[clip.video.name, clip.video.sha256, clip.start] for clip in self.clips]]

    def batches(self, rejects: Rejects) -> Iterator[Batch]:
        for video, group in groupby(self.clips, key=lambda clip: clip.video):
            starts = [clip.start for clip in group]
            try:
                frames, members = read_frames(video, starts, self.cut)
            except DataError as error:
                rejects.add(error, video.name, len(starts))
                continue
            interval = self.cut.frame_interval
            infos = [{"video": video.name, "start": start, "frame_interval": interval} for start in starts]
            yield Batch(frames, members, infos)

    def groups(self, rejected: Set[str]) -> set[str]:
        return {clip.video.name for clip in self.clips} - rejected


@dataclass(frozen=True)
class ClipStore(Store):
    """Store clips as they are."""

    sample_format: ClipFormat

    def write(self, task: ShardTask, batches: Iterable[Batch], record: BuildRecord) -> Shard | None:
        sample_format = self.sample_format
        writer = ClipWriter(task.folder, task.split, sample_format, task.clips_per_shard, first_shard=task.number)
        for frames, members, infos in batches:
            for chosen, info in zip(members, infos, strict=True):
                clip = frames[chosen]
                if sample_format.storage == "mp4":
                    writer.write(encode_clip(clip, sample_format.frame_interval), info)
                else:
                    encode = encode_png if sample_format.storage == "png" else encode_jpeg
                    writer.write([encode(frame) for frame in clip], info)
        writer.close()
        return writer.shards[0] if writer.shards else None


def cut_clips(
    inputs: Sequence[str | Path],
    out: Path,
    cut: Cut,
    *,
    storage: str = "mp4",
    encoding: Encoding | None = None,
    clips_per_shard: int = 64,
    on_error: str = "fail",
    work: Work = LOCAL,
) -> Report:
    """Make the data folder `out` of clips of video files, or of their latents if there is an `encoding`.

    With `on_error="skip"` videos that cannot be read are left out and listed in `rejects.jsonl`. Of a video that is
    damaged further in only those clips are left out that share a shard with the damage.
    """
    begun = time.monotonic()
    files = find_videos(inputs, (out,), cut)
    described = describe_inputs(files)
    clip_format = ClipFormat(cut.frames, cut.frame_interval, cut.height, cut.width, storage)
    store: Store = ClipStore(clip_format) if encoding is None else LatentStore.of(clip_format, encoding)
    source: dict[str, Any] = {"inputs": described, "cut": asdict(cut), "version": VERSION}
    source |= {"clips_per_shard": clips_per_shard, "stored": store.describe()}
    existing = up_to_date(out, source)
    if existing is not None and (on_error == "skip" or not existing.source["rejects"]):
        return Report(existing, time.monotonic() - begun, up_to_date=True, rejects=existing.source["rejects"])

    rejects = Rejects(on_error)
    videos = probe_videos(files, [str(file["sha256"]) for file in described], rejects)
    clips, short = plan_clips(videos, cut)
    parts: dict[str, list[Source]] = {}
    for split in SPLITS:
        firsts = range(0, len(clips[split]), clips_per_shard)
        parts[split] = [VideoFiles(tuple(clips[split][first : first + clips_per_shard]), cut) for first in firsts]
    notes = [f"{len(short):,} videos are too short and left out: {', '.join(short[:4])}"] if short else []
    return build(out, parts, clips_per_shard, store, source, rejects, work, begun, notes)


def build(
    out: Path,
    parts: dict[str, list[Source]],
    clips_per_shard: int,
    store: Store,
    source: dict[str, Any],
    rejects: Rejects,
    work: Work,
    begun: float,
    notes: Sequence[str] = (),
) -> Report:
    """Make the data folder `out`, each of the `parts` of a split a shard.

    Args:
        out: the folder.
        parts: of each split.
        clips_per_shard: most clips of a part.
        store: how they are stored.
        source: inputs and settings that the folder is made from.
        rejects: what could not be read so far, and what to do about it.
        work: executor.
        begun: `time.monotonic()` at the start.
        notes: lines of the report.
    """
    begin(out)
    tasks = [
        ShardTask(out.resolve(), split, number, clips_per_shard, part, store, rejects.on_error)
        for split in SPLITS
        for number, part in enumerate(parts[split])
    ]
    made = make_shards(tasks, work)
    unreadable = [*rejects.listed, *(reject for m in made for reject in m.record.rejects)]
    write_rejects(out, unreadable)
    sample_format = store.final_format(made)
    groups = {split: _groups(made, split) for split in SPLITS}
    splits = {}
    for split in SPLITS:
        shards = shards_of(made, split)
        if not shards:
            what = "clip" if sample_format.frames > 1 else "image"
            raise UserError(f"no {what} is left for the {split} split, see {out / REJECTS_FILE}")
        frames = sample_format.frames * sum(shard.samples for shard in shards)
        counts = {"videos": len(groups[split]), sample_format.unit: frames}
        splits[split] = Split(shards, len(groups[split]), {name: counts[name] for name in sample_format.totals})
    held_out = tuple(sorted(groups["val"] - groups["train"]))
    source = {**source, "rejects": len({reject.file for reject in unreadable})}
    manifest = Manifest(out, sample_format, splits, held_out, source)
    finish(manifest)
    seconds, kept = time.monotonic() - begun, sum(m.kept for m in made)
    return Report(manifest, seconds, kept=kept, rejects=source["rejects"], notes=tuple(notes))


def _groups(made: Iterable[Made], split: str) -> set[str]:
    """Return the names of the groups that a split has clips of."""
    names: set[str] = set()
    for m in made:
        if m.task.split == split:
            names |= m.task.source.groups({reject.file for reject in m.record.rejects})
    return names
