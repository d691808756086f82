"""Small data sets of every layout, for tests. An image is recognized by its gray level."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from tessera.data import FilesConfig
from tessera.data.check import CheckRequest, report_findings, scan_data
from tessera.data.files import FilesDataset


def png(value: int = 0, size: int = 8, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, format=kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            raw = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def table(path: Path, *values: int, metadata: bytes | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pyarrow.table({"image": [png(value) for value in values], **columns})
    parquet.write_table(rows if metadata is None else rows.replace_schema_metadata({b"huggingface": metadata}), path)
    return path


def config(path: Any, **changes: Any) -> FilesConfig:
    return FilesConfig(path=[str(one) for one in path] if isinstance(path, list) else str(path), size=8, **changes)


def open_data(path: Any, **changes: Any) -> FilesDataset:
    return config(path, **changes).open()


def samples(source: FilesDataset) -> list[tuple[int, str | None, str | None]]:
    """Gray level, class name and caption of every sample."""
    names = source.class_names
    return [
        (int(source.pixels(i)[0, 0, 0]), names[source.label(i)] if names else None, source.caption(i))
        for i in range(len(source))
    ]


def findings(path: Any, out: Path, **options: Any) -> dict[str, list[Any]]:
    """Rows and names by kind of finding, without the kinds that small data sets of plain images have."""
    request = CheckRequest(str(path), out)
    scan_data(request)
    plain = ("few-images", "blank", "duplicates", "near-duplicates", "conflicts", "imbalance")
    checked = report_findings(request, **options)
    return {each.kind: [*each.samples, *each.names] for each in checked.findings if each.kind not in plain}
