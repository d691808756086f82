"""Data of the Hugging Face hub as hf:// addresses, from a server that answers as the hub does, on this machine."""

import hashlib
import io
import json
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tessera import bundle, storage
from tessera.data.files import FilesConfig
from tessera.errors import TesseraError

pytestmark = pytest.mark.run
pytest.importorskip("huggingface_hub")
parquet = pytest.importorskip("pyarrow.parquet")
TOKEN = "hf_secret"


class Hub:
    """Data sets in memory, and the routes of the hub that read them: information, trees, paths and files."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # by data set, owner/name, then path
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.failures = 0  # how many of the next requests fail
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def respond(self) -> None:
                url = urlsplit(self.path)
                path, query = unquote(url.path), parse_qs(url.query)
                form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
                hub.requests.append((self.command, path, self.headers.get("Range")))
                if hub.failures:
                    hub.failures -= 1
                    self.send(503, b"busy")
                    return
                match = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(.*))?", path)
                assert match is not None
                name, route = match[1], match[2] or ""
                trusted = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if name not in hub.files or (name in hub.private and not trusted):
                    # The hub does not show strangers what exists.
                    self.send(404 if trusted else 401, b"", {"X-Error-Code": "RepoNotFound"})
                elif path.startswith("/api/"):
                    self.describe(name, route, query, form)
                elif name in hub.gated and not trusted:
                    self.send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
                else:
                    self.file(hub.files[name].get(route.removeprefix("resolve/main/")))

            do_GET = do_HEAD = do_POST = respond  # noqa: N815

            def describe(self, name: str, route: str, query: dict, form: dict) -> None:
                files = hub.files[name]
                if route == "":
                    self.json({"id": name, "sha": "0" * 40, "private": name in hub.private})
                elif route.startswith("tree/main"):
                    below = route.removeprefix("tree/main").strip("/")
                    paths = [path for path in hub.tree(name) if path.startswith(f"{below}/" if below else "")]
                    if not paths:
                        self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                        return
                    depth = below.count("/") + 1 if below else 0
                    if query["recursive"] != ["True"] and query["recursive"] != ["true"]:
                        paths = [path for path in paths if path.count("/") == depth]
                    self.json([hub.entry(name, path) for path in paths])
                else:
                    assert route == "paths-info/main"
                    self.json([hub.entry(name, path) for path in form["paths"] if path in hub.tree(name)])
                assert files

            def file(self, content: bytes | None) -> None:
                if content is None:
                    self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                    return
                limits = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if limits is None:
                    self.send(200, content)
                else:
                    start, end = int(limits[1]), int(limits[2]) + 1
                    self.send(206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

            def json(self, content: object) -> None:
                self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response_only(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else content)

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def tree(self, name: str) -> list[str]:
        """The paths of all files and folders."""
        files = self.files[name]
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        return sorted([*files, *folders])

    def entry(self, name: str, path: str) -> dict:
        content = self.files[name].get(path)
        if content is None:
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture
def hub(fresh_storage, monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": False})
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    yield hub
    hub.server.shutdown()


def images(count: int) -> list[bytes]:
    contents, pixels = [], np.random.default_rng(0)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (8, 8), np.uint8)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    return contents


def tar(samples: list[bytes], first: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, image in enumerate(samples, start=first):
            for suffix, content in (("png", image), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def table(samples: list[bytes]) -> bytes:
    import pyarrow

    buffer = io.BytesIO()
    column = [{"bytes": image, "path": None} for image in samples]
    parquet.write_table(pyarrow.table({"image": column, "label": [n % 2 for n in range(len(samples))]}), buffer)
    return buffer.getvalue()


def shards() -> dict[str, bytes]:
    samples = images(64)
    return {f"data/{n}.tar": tar(samples[32 * n : 32 * n + 32], 32 * n) for n in range(2)}


def test_objects_of_the_hub_are_listed_read_and_checked(hub):
    hub.files["owner/name"] = {"README.md": b"text", "data/a.tar": bytes(range(256)) * 40000, "data/b/c.tar": b"c"}
    place = storage.locate("hf://datasets/owner/name")
    assert storage.listing(place) == ["README.md", "data/a.tar", "data/b/c.tar"]
    assert storage.listing(place / "data") == ["a.tar", "b/c.tar"]
    assert storage.matching(place / "data/*.tar") == [place / "data/a.tar"]
    assert storage.is_folder(place)
    assert storage.is_folder(place / "data/b")
    assert not storage.exists(place / "data/d")
    hub.requests.clear()
    assert storage.read_range(place / "data/a.tar", 300, 100) == (bytes(range(256)) * 2)[300:400]
    # These bytes alone, in one request.
    assert [each for each in hub.requests if each[2]] == [
        ("GET", "/datasets/owner/name/resolve/main/data/a.tar", "bytes=300-399")
    ]
    hub.failures = 1
    assert storage.read(place / "data/a.tar") == hub.files["owner/name"]["data/a.tar"]
    assert not hub.failures
    storage.fetch(place / "data/b/c.tar").unlink()
    hub.files["owner/name"]["data/b/c.tar"] = b"other"
    with pytest.raises(TesseraError, match="c.tar has changed since its index.*1 bytes then, 5 now"):
        storage.fetch(place / "data/b/c.tar")


def test_what_the_hub_refuses_is_one_error(hub, tessera, recipe, monkeypatch):
    hub.files |= {"owner/gated": shards(), "owner/private": shards()}
    hub.gated, hub.private = {"owner/gated"}, {"owner/private"}
    words = "size: 8, channels: 1, hflip: false"
    for name in ("none", "private"):
        outcome = tessera("train", recipe, f"data={{path: 'hf://datasets/owner/{name}/data', {words}}}")
        assert outcome.code == 1
        assert f"owner/{name}/data does not exist, or its repository does not, or HF_TOKEN has no access" in outcome.err
    outcome = tessera("train", recipe, f"data={{path: 'hf://datasets/owner/gated/data', {words}}}")
    assert outcome.code == 1
    assert "without permission (GatedRepoError" in outcome.err
    assert "set HF_TOKEN to a token that may read it" in outcome.err
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": TOKEN})
    place = storage.locate("hf://datasets/owner/private/data/0.tar")
    assert storage.read(place) == hub.files["owner/private"]["data/0.tar"]
    outcome = tessera("train", recipe, "run_dir=hf://owner/name/run")
    assert outcome.code == 1
    assert "cannot write hf://owner/name/run/in-use.json: hf:// is read only; give a local folder" in outcome.err


@pytest.mark.slow
def test_training_on_tars_and_what_else_is_read_from_the_hub(hub, tessera, recipe, tmp_path, tiny_model):
    files = hub.files["owner/name"] = shards() | {"table/train.parquet": table(images(64))}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    words = "size: 8, channels: 1, shuffle_shards: 2, hflip: false"
    for place, run in ((tmp_path / "data", "local"), ("hf://datasets/owner/name/data", "remote")):
        outcome = tessera("train", recipe, f"data={{path: '{place}', {words}}}", f"run_dir={tmp_path / run}")
        assert outcome.code == 0, outcome.err
    weights = [next((tmp_path / run).rglob("step-000000004/model.safetensors")) for run in ("local", "remote")]
    local, remote = map(load_file, weights)
    assert local.keys() == remote.keys()
    assert all(tensor.equal(remote[name]) for name, tensor in local.items())
    shutil.rmtree(tmp_path / "cache")
    places = (str(tmp_path / "table"), "hf://datasets/owner/name/table/train.parquet")
    local, remote = (FilesConfig(path=place, size=8, channels=1).open() for place in places)
    assert len(local) == len(remote) == 64
    assert np.array_equal(local.pixels(5), remote.pixels(5))
    bundle.save(tiny_model, tmp_path / "bundle")
    paths = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    files |= {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in paths}
    weights = bundle.load(bundle.localize("hf://datasets/owner/name/bundle")).network.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in tiny_model.network.state_dict().items())
