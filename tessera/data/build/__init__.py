"""`tessera data build`: from sources in any layout to shards of even size with an index.

Three steps, each of which resumes and can be done by many processes: every sample is measured (as `tessera data check`
does), the samples are selected once, and the shards are written. The selection needs all measurements, because copies
are searched across all sources.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tessera import storage
from tessera.data import index
from tessera.data.build.recipe import BuildRecipe, read_recipe
from tessera.data.build.select import class_numbers, left_out_line, left_out_lines, select_samples
from tessera.data.build.write import RECORDS, SHARDS, ShardWriter, frame_limit
from tessera.data.check import scan
from tessera.data.check.findings import ScanResult
from tessera.data.check.scan import ALL, ScanShard
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.index import arrow
from tessera.data.processes import run_in_processes
from tessera.data.resolve import resolve_data
from tessera.errors import TesseraError
from tessera.files import PARTIAL, atomic_file, cache_folder, exclusive_lock, read_array, read_json, this_writer
from tessera.settings import diff, read_yaml, to_yaml, validate

RECIPE, SUMMARY, LEFT_OUT = "recipe.yaml", "summary.json", "left-out.jsonl"
WORK, SELECTION, ROWS = "work", "selection.json", "rows.npy"
SELECTED_LEFT_OUT = "left-out-selected.jsonl"
FORMAT = 1  # of the work; another format is made again
MAX_CHANGES = 8  # settings that an error lists
UNUSABLE_NOTES = ("invalid-labels", "label-types", "several-layouts")  # after which nothing is built

Progress = Callable[[str], Callable[[int, int], None]]
__all__ = ["BuildRecipe", "Builder", "Built", "build", "read_recipe"]


@dataclass(frozen=True)
class Built:
    """How far a build is. waiting: parts that other shards have not measured. written, shards: how many shards exist,
    and of how many. summary: of a complete build."""

    waiting: int = 0
    written: int = 0
    shards: int = 0
    summary: dict[str, Any] | None = None


def build(recipe: BuildRecipe, workers: int = 1, shard: ScanShard = ALL, progress: Progress | None = None) -> Built:
    """Build a data set, or one shard of the work: index i of count n. Raises TesseraError."""
    builder = Builder(recipe)
    builder.begin()
    builder.scan(workers, shard, progress)
    if waiting := builder.missing_parts():
        return Built(waiting=waiting)
    writer = builder.writer()
    missing = [number for number in range(shard.index, len(writer), shard.count) if not writer.is_written(number)]
    builder.write(writer, missing, workers, progress("writing") if progress else None)
    return builder.finish(writer)


class Builder:
    """The steps of a build."""

    def __init__(self, recipe: BuildRecipe) -> None:
        self.recipe = recipe
        self.output = storage.locate(recipe.output)
        remote = storage.is_remote(self.output)
        name = hashlib.sha256(str(self.output).encode()).hexdigest()[:16]
        default = cache_folder() / "builds" / name if remote else self.output / WORK
        self.work = default if recipe.work is None else Path(recipe.work).expanduser()

    @cached_property
    def datasets(self) -> tuple[FilesDataset, ...]:
        """The data of each source. Raises TesseraError."""
        datasets = tuple(FilesDataset(self.recipe.files_config(source)) for source in self.recipe.sources)
        for dataset in datasets:
            for note in dataset.notes:
                if note.kind in UNUSABLE_NOTES:
                    raise TesseraError(note.text)
        return datasets

    @cached_property
    def reference(self) -> FilesDataset | None:
        if self.recipe.reference is None:
            return None
        config = resolve_data(self.recipe.reference, (1, 1))
        if not isinstance(config, FilesConfig):
            raise TesseraError(f"reference {self.recipe.reference}: embedded data has no files; expected a path")
        return FilesDataset(
            config.model_copy(update={"size": (1, 1), "frames": self.recipe.frames, "fps": self.recipe.fps})
        )

    def _scanned(self) -> Iterator[tuple[FilesDataset, Path, str]]:
        """Every data set that is measured, the folder of its parts, and its name."""
        for number, dataset in enumerate(self.datasets):
            yield dataset, self.work / f"parts-{number}", dataset.config.paths[0]
        if self.reference is not None:
            yield self.reference, self.work / "parts-reference", self.recipe.reference or ""

    def begin(self) -> None:
        """Save the recipe in the output. Raises TesseraError if the output holds something else."""
        if self.recipe.captioner is not None:
            from tessera.encoders.captioner import check_folder

            check_folder(Path(self.recipe.captioner.source).expanduser())
        path, address = self.output / RECIPE, storage.address(self.output)
        storage.check_writable(address)
        if not storage.exists(path):
            if not storage.is_remote(self.output) and self.output.exists():
                if not self.output.is_dir():
                    raise TesseraError(f"output {address} is a file; expected a folder, or a path that does not exist")
                # What another shard, which began at the same time, has written since is no other data.
                names = (each.name for each in self.output.iterdir() if PARTIAL not in each.name)
                if others := [name for name in names if name not in (RECIPE, WORK, SHARDS)]:
                    raise TesseraError(
                        f"output {address} holds {others[0]} and no {RECIPE}, so data build did not write it: give "
                        "another folder as output"
                    )
            with atomic_file(path, this_writer()) as partial:
                partial.write_text(to_yaml(self.recipe), encoding="utf-8")
            storage.publish(path)
            return
        saved = validate(BuildRecipe, read_yaml(storage.fetch(path), BuildRecipe), f"{address}/{RECIPE}")
        if changes := diff(_by_number(saved), _by_number(self.recipe)):
            lines = [f"  {name}: {before!r} there, {after!r} now" for name, before, after in changes[:MAX_CHANGES]]
            raise TesseraError(
                f"output {address} was begun with another recipe:\n" + "\n".join(lines) + "\n"
                f"give another output, or remove {address} to build it again"
            )

    def scan(self, workers: int, shard: ScanShard, progress: Progress | None) -> None:
        """Measure the samples of a shard that were not measured yet."""
        for dataset, folder, name in self._scanned():
            scan.scan(dataset, folder, workers, shard, progress(f"measuring {name}") if progress else None)

    def missing_parts(self) -> int:
        """How many parts were not measured, or have changed since."""
        return sum(len(scan.missing_parts(dataset, folder)) for dataset, folder, _ in self._scanned())

    def writer(self) -> ShardWriter:
        """The samples of each shard. The first process selects them, the others read the selection."""
        key = self._key()
        with exclusive_lock(self.work, on_wait=lambda: None):
            facts = self._read_selection(key) or self._select(key)
        rows = read_array(self.work / ROWS)
        count = max(-(-len(rows) // self.recipe.samples_per_shard), 1)
        limits = tuple(len(rows) * number // count for number in range(count + 1))
        names, labels = class_numbers(self._results())
        several = any(dataset.table["other_captions"].null_count < len(dataset) for dataset in self.datasets)
        key = f"{key}-{facts['count']}"
        return ShardWriter(
            self.recipe, self.datasets, rows, limits, labels, names, several, key, self.output, self.work
        )

    def _key(self) -> str:
        """A hash of everything that the output depends on: the recipe, the state of all files, their texts."""
        facts: list[Any] = [FORMAT, self.recipe.identity()]
        for dataset, folder, _ in self._scanned():
            facts.append(scan.part_keys(dataset, folder))
            facts.append(index.fingerprint(dataset.table))
        if self.recipe.captioner is not None:
            from tessera.encoders.captioner import fingerprint

            facts.append(fingerprint(Path(self.recipe.captioner.source).expanduser()))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _results(self) -> list[ScanResult]:
        """The measurements of each source."""
        tables = [scan.open_parts(dataset, folder) for dataset, folder, _ in self._scanned()]
        reference = tables[len(self.datasets)] if self.reference is not None else None
        return [
            ScanResult(dataset, table, (), source.path, reference, self.recipe.reference or "")
            for dataset, table, source in zip(self.datasets, tables, self.recipe.sources)
        ]

    def _read_selection(self, key: str) -> dict[str, Any] | None:
        if not (self.work / SELECTION).exists():
            return None
        facts = read_json(self.work / SELECTION, "remove it to have it made again")
        return facts if facts.get("key") == key else None

    def _select(self, key: str) -> dict[str, Any]:
        """Select the samples and save which they are. Raises TesseraError if there are none."""
        if (summary := self._summary()) is not None and not summary["key"].startswith(key):
            raise TesseraError(
                f"{storage.address(self.output)} is complete ({summary['written']:,} samples), and its sources have "
                "changed since: give another output, or remove it to build it again"
            )
        results = self._results()
        selection = select_samples(self.recipe, results)
        if not len(selection.rows):
            counts = ", ".join(f"{number:,} {kind}" for kind, number in selection.counts().items())
            raise TesseraError(
                f"no sample of {', '.join(source.path for source in self.recipe.sources)} is selected: {counts}"
            )
        with atomic_file(self.work / ROWS) as partial, partial.open("wb") as file:
            np.save(file, selection.rows)
        with atomic_file(self.work / SELECTED_LEFT_OUT) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(left_out_lines(selection, results))
        facts = {"key": key, "count": len(selection.rows), "left_out": selection.counts()}
        with atomic_file(self.work / SELECTION) as partial:
            partial.write_text(json.dumps(facts), encoding="utf-8")
        return facts

    def write(
        self, writer: ShardWriter, missing: list[int], workers: int, progress: Callable[[int, int], None] | None
    ) -> None:
        """Write shards. A captioner is loaded by one process, whose batches are the parallel work."""
        total = len(writer.rows)
        done = total - sum(writer.limits[number + 1] - writer.limits[number] for number in missing)
        for count in _write_all(writer, missing, workers if self.recipe.captioner is None else 1):
            done += count
            if progress is not None:
                progress(done, total)

    def finish(self, writer: ShardWriter) -> Built:
        """Write the index and the summary, if all shards exist."""
        if storage.is_remote(self.output):
            storage.listing(self.output / SHARDS)  # the sizes of all shards by one request
        written = sum(writer.is_written(number) for number in range(len(writer)))
        result = Built(0, written, len(writer))
        if written < len(writer):
            return result
        with exclusive_lock(self.work, on_wait=lambda: None):  # the last shards may end at the same time
            if (summary := self._summary()) is not None and summary["key"] == writer.key:
                return replace(result, summary=summary)
            self._write_left_out(writer)
            self._write_index(writer)
            summary = self._summarize(writer)
            with atomic_file(self.output / SUMMARY, this_writer()) as partial:
                partial.write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            storage.publish(self.output / SUMMARY)
            for folder in (self.output, self.output / SHARDS, self.work, self.work / RECORDS):
                for partial in folder.glob("*" + PARTIAL):  # of processes that were killed
                    partial.unlink(missing_ok=True)
        return replace(result, summary=summary)

    def _summary(self) -> dict[str, Any] | None:
        path = self.output / SUMMARY
        return read_json(storage.fetch(path)) if storage.exists(path) else None

    def _write_left_out(self, writer: ShardWriter) -> None:
        """Every sample that is left out: those of the selection, then those that could not be written."""
        path = self.output / LEFT_OUT
        with atomic_file(path, this_writer()) as partial, partial.open("wb") as file:
            with (self.work / SELECTED_LEFT_OUT).open("rb") as selected:
                shutil.copyfileobj(selected, file)
            for number in range(len(writer)):
                for row, reason, detail in (writer.read_metadata(number) or {})["left_out"]:
                    dataset, own = writer.place(row)
                    line = left_out_line(dataset.config.paths[0], scan.short_name(dataset, own), reason, detail)
                    file.write(line.encode())
        storage.publish(path)

    def _write_index(self, writer: ShardWriter) -> None:
        """The index, from the records in the memory-mapped work: it is never in memory as a whole."""
        root, names, numbers = self.output.absolute(), writer.class_names, range(len(writer))

        def part(number: int) -> Any:
            record = writer.read_record(number)
            columns = {name: record[name] for name in record.column_names}
            return index.build(root, names, path=arrow().repeat(writer.name(number), len(record)), **columns)

        shards = index.build(root, names, path=[writer.name(number) for number in numbers], offset=[0] * len(writer))
        index.write_parts(map(part, numbers), shards, self.output / index.FILE)

    def _summarize(self, writer: ShardWriter) -> dict[str, Any]:
        facts = read_json(self.work / SELECTION)
        records = [writer.read_metadata(number) or {} for number in range(len(writer))]
        left_out = Counter(facts["left_out"])
        for record in records:
            left_out.update(reason for _, reason, _ in record["left_out"])
        samples = sum(map(len, self.datasets))
        notes = [note.text for dataset in self.datasets for note in dataset.notes if note.severity != "note"]
        if cut := sum(record["cut"] for record in records):
            limit = frame_limit(self.recipe)
            notes.append(f"{cut:,} clips had more than {limit:,} frames, of which the first are written (max_frames)")
        return {
            "samples": samples,
            "written": samples - left_out.total(),
            "left_out": dict(left_out.most_common()),
            "sources": {dataset.config.paths[0]: len(dataset) for dataset in self.datasets},
            "classes": len(writer.class_names),
            "shards": {writer.name(number): record["sha256"] for number, record in enumerate(records)},
            "bytes": sum(record["bytes"] for record in records),
            "notes": notes,
            "key": writer.key,
        }


def _by_number(recipe: BuildRecipe) -> dict[str, Any]:
    """What the output depends on, with the sources as a mapping, so that each setting of each has a name."""
    identity = recipe.identity()
    return identity | {"sources": {str(number): source for number, source in enumerate(identity["sources"], start=1)}}


def _write_all(writer: ShardWriter, missing: list[int], workers: int) -> Iterator[int]:
    if workers > 1 and len(missing) > 1:
        yield from run_in_processes(writer.write, missing, workers)
        return
    for number in missing:
        yield from writer.write(number)
