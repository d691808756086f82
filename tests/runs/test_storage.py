"""Training from and into a bucket."""

import asyncio
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import fsspec
import numpy as np
import pytest
import requests
from PIL import Image
from safetensors.torch import load_file

from tessera import bundle, storage
from tessera.data.files import FilesConfig
from tessera.errors import TesseraError
from tessera.files import InUse
from tessera.monitoring.logger import read_log
from tessera.training import checkpoint
from tessera.training.checkpoint import remote

pytestmark = pytest.mark.run


def write_tars(folder: Path, count: int = 4, samples: int = 32) -> Path:
    """Tars of gray images of 8 x 8 pixels in two classes."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0)
    for number in range(count):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as archive:
            for sample in range(samples):
                buffer = io.BytesIO()
                Image.fromarray(pixels.integers(0, 256, (8, 8), np.uint8)).save(buffer, "PNG")
                for suffix, content in (("png", buffer.getvalue()), ("cls", str(sample % 2).encode())):
                    member = tarfile.TarInfo(f"{number:03d}-{sample:03d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def data_words(path: object) -> list[str]:
    return [f"data={{path: '{path}', size: 8, channels: 1, shuffle_shards: 2, hflip: false}}"]


def state(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.relative_to(folder)} {name}": tensor.numpy().tobytes()
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def untimed(run: Path) -> list[dict]:
    timed = ("images_per_second", "mfu", "data_wait", "memory")
    return [{name: value for name, value in record.items() if name not in timed} for record in read_log(run)]


@pytest.fixture
def bucket(tmp_path, fresh_storage) -> Path:
    """A folder that `file://` serves; the copies are in a folder of the test."""
    return tmp_path / "bucket"


def test_a_run_in_a_bucket_is_the_local_run_and_continues_on_another_machine(tessera, recipe, tmp_path, bucket):
    write_tars(bucket / "data")
    words = ["training.checkpoint_every=2", "training.keep_last=2"]
    local = [*data_words(bucket / "data"), f"run_dir={tmp_path / 'local'}", "training.steps=6"]
    assert tessera("train", recipe, *local, *words).code == 0
    place = f"file://{bucket}/run"
    remote_words = [*data_words(f"file://{bucket}/data"), f"run_dir={place}"]
    first = tessera("train", recipe, *remote_words, *words, "training.steps=4")
    assert first.code == 0, first.err
    assert first.out.strip() == place
    partial = bucket / "run/checkpoints/step-000000005"  # an upload that was cut off
    shutil.copytree(bucket / "run/checkpoints/step-000000004", partial)
    (partial / checkpoint.TRAINER_STATE).unlink()
    shutil.rmtree(tmp_path / "cache")  # another machine
    assert tessera("train", recipe, *remote_words, *words, "training.steps=6").code == 0
    assert not any(path.is_file() for path in partial.rglob("*"))
    assert not (bucket / "run" / remote.IN_USE).exists()
    steps = [each.name for each in bundle.checkpoints(bucket / "run") if any(map(Path.is_file, each.rglob("*")))]
    assert steps == [each.name for each in bundle.checkpoints(tmp_path / "local")]
    assert state(bucket / "run/checkpoints") == state(tmp_path / "local/checkpoints")
    assert untimed(bucket / "run") == untimed(tmp_path / "local")
    shutil.rmtree(tmp_path / "cache")
    assert tessera("sample", place, "--out", tmp_path / "a", "--num-samples", 1, "num_steps=2").code == 0
    assert tessera("sample", tmp_path / "local", "--out", tmp_path / "b", "--num-samples", 1, "num_steps=2").code == 0
    images = [np.asarray(Image.open(sorted((tmp_path / name).rglob("*.png"))[0])) for name in "ab"]
    assert np.array_equal(*images)


def test_averages_in_a_bucket_continue_on_another_machine_and_give_other_lengths(tessera, recipe, tmp_path, bucket):
    words = ["data={kind: digits}", "training.ema={kind: power, snapshot_every: 2}", "training.checkpoint_every=4"]
    assert tessera("train", recipe, *words, f"run_dir={tmp_path / 'local'}", "training.steps=8").code == 0
    place = f"file://{bucket}/run"
    for steps in (4, 8):
        done = tessera("train", recipe, *words, f"run_dir={place}", f"training.steps={steps}")
        assert done.code == 0, done.err
        shutil.rmtree(tmp_path / "cache")  # another machine
    averages = state(tmp_path / "local/ema-snapshots")
    assert len(averages) > 4
    assert state(bucket / "run/ema-snapshots") == averages
    for source, name in ((place, "a"), (tmp_path / "local", "b")):
        out = tessera(
            "sample", source, "--ema-length", 0.08, "--out", tmp_path / name, "--num-samples", 1, "num_steps=2"
        )
        assert out.code == 0, out.err
    images = [np.asarray(Image.open(sorted((tmp_path / name).rglob("*.png"))[0])) for name in "ab"]
    assert np.array_equal(*images)


def test_two_runs_in_one_place(bucket, monkeypatch):
    monkeypatch.setattr(remote, "LEASE", 0.4)
    first, second = (checkpoint.RemoteRun(f"file://{bucket}/run") for _ in range(2))
    monkeypatch.setattr(remote, "_is_alive", lambda process: True)
    lines: list[str] = []
    with first.exclusive(lines.append):
        with pytest.raises(InUse, match=r"bucket/run is in use by process \d+ on .*: wait for it"):
            second._acquire({"id": "b", "machine": "m", "process": 1}, lines.append)
        assert "waiting up to" in lines[0]
    with second.exclusive(lines.append):  # released
        assert len(lines) == 1
    # Of a process that was killed: at once on this machine, after a while on another.
    storage.create(f"{second.address}/{remote.IN_USE}", json.dumps({"id": "x", "machine": "m", "process": 1}).encode())
    with second.exclusive(lines.append):
        assert len(lines) == 2
    monkeypatch.setattr(remote, "_is_alive", lambda process: False)
    owner = {"id": "x", "machine": remote.platform.node(), "process": 1}
    storage.create(f"{second.address}/{remote.IN_USE}", json.dumps(owner).encode())
    with second.exclusive(lines.append):
        assert len(lines) == 2
        storage.create(f"{second.address}/{remote.IN_USE}", json.dumps({**owner, "id": "y"}).encode(), overwrite=True)
        assert second._lost.wait(5)
        with pytest.raises(TesseraError, match="taken over by another run"):
            second.push()


# Real servers

SERVERS = {
    "s3": ("s3fs", "moto", "from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"),
    "gs": (
        "gcsfs",
        "gcp_storage_emulator",
        "from gcp_storage_emulator.__main__ import main; "
        "main(['start', '-H', '127.0.0.1', '--port', sys.argv[1], '--in-memory', '-q'])",
    ),
}


@pytest.fixture(scope="module", params=list(SERVERS))
def server(request) -> Iterator[tuple[str, str]]:
    """A protocol, and the address of a server of it in a process of its own: moto's, or an emulator of Google's."""
    client, package, code = SERVERS[request.param]
    pytest.importorskip(client)
    pytest.importorskip(package)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; {code}", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                requests.get(url, timeout=5)
                break
            except requests.RequestException:
                time.sleep(0.1)
        yield request.param, url
    finally:
        process.kill()
        process.wait()


class Proxy:
    """Forwards requests to a server, after `fault(method, path)` chose what goes wrong."""

    def __init__(self, server: str) -> None:
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.refusal: tuple[int, bytes] | None = None
        self.requests, self.faults = [], []
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.refusal:
                    self.answer(proxy.refusal[0], {}, proxy.refusal[1])
                    return
                fault = proxy.fault(self.command, self.path)
                proxy.requests.append((self.command, self.path))
                if fault:
                    proxy.faults.append(fault)
                if fault == "slow":
                    time.sleep(0.5)
                elif fault == "cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                elif fault in ("500", "503"):
                    code = {"500": "InternalError", "503": "SlowDown"}[fault]
                    self.answer(int(fault), {}, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())
                    return
                skipped = ("host", "connection", "accept-encoding")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
                headers["Host"] = self.headers["Host"]
                with proxy.lock:  # the emulator answers one request at a time
                    if "ifGenerationMatch=0" in self.path and proxy.has_object(self.path, content):
                        self.answer(412, {}, b"{}")
                        return
                    reply = requests.request(
                        self.command, server + self.path, data=content, headers=headers, timeout=60, stream=True
                    )
                    content = reply.raw.read()
                self.answer(reply.status_code, reply.headers, content, fault == "truncated")

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

            def answer(self, status: int, headers, content: bytes, truncated: bool = False) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", len(content)) if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                with suppress(ConnectionError):  # the client no longer needs the answer
                    self.wfile.write(content[: len(content) // 2] if truncated else content)
                if truncated:
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = server

    def has_object(self, path: str, content: bytes) -> bool:
        """Whether the object of an upload exists: the emulator of Google's server ignores this condition."""
        bucket, name = re.search(r"/b/([^/]+)/o", path), re.search(rb'"name": "([^"]+)"', content)
        assert bucket is not None
        assert name is not None
        url = f"{self.address}/storage/v1/b/{bucket[1]}/o/{quote(name[1].decode(), safe='')}"
        return requests.get(url, timeout=60).status_code == 200


@pytest.fixture
def cloud(server, tmp_path, monkeypatch) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server, and the address of a new bucket behind it."""
    (protocol, url), name = server, f"bucket-{random.randrange(10**9)}"
    proxy = Proxy(url)
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    if protocol == "s3":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(storage, "_known", {})
    monkeypatch.setattr(storage, "_stored", {})
    monkeypatch.setattr(storage, "_folders", set())
    storage._prepare(protocol)
    fsspec.get_filesystem_class(protocol).clear_instance_cache()  # with the address of another proxy
    if protocol == "s3":
        requests.put(f"{url}/{name}", timeout=60).raise_for_status()
    else:
        requests.post(f"{url}/storage/v1/b?project=test", json={"name": name}, timeout=60).raise_for_status()
    yield proxy, f"{protocol}://{name}"
    proxy.server.shutdown()


def without_long_waits(monkeypatch) -> None:
    """Make waits between requests short, of ours and of gcsfs."""
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.1)
    gcsfs = pytest.importorskip("gcsfs")
    short = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100))
    monkeypatch.setattr(gcsfs.retry, "asyncio", short)


def upload(folder: Path, url: str) -> None:
    for path in sorted(folder.iterdir()):
        storage.upload(path, f"{url}/{path.name}")


@pytest.mark.slow
def test_faults_of_a_server_are_waited_out_and_at_the_end_named(cloud, tmp_path, monkeypatch):
    proxy, place = cloud
    without_long_waits(monkeypatch)
    is_s3 = place.startswith("s3")
    source = write_tars(tmp_path / "data", 2)
    chance = random.Random(0)
    kinds = ["503", "500", "cut", "truncated", "slow"]
    proxy.fault = lambda method, path: chance.choice(kinds) if chance.random() < 0.3 else None
    upload(source, f"{place}/data")
    folder = storage.locate(f"{place}/data")
    for _ in range(8):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert storage.listing(folder) == ["000.tar", "001.tar"]
        for name in ("000.tar", "001.tar"):
            assert storage.read(folder / name) == (source / name).read_bytes()
            assert storage.read_range(folder / name, 512, 100) == (source / name).read_bytes()[512:612]
    assert set(proxy.faults) == set(kinds)
    if is_s3:
        name = f"{place.removeprefix('s3://')}/data/000.tar"
        web = storage.locate(f"{proxy.url}/{name}")
        with pytest.raises(TesseraError, match=r"cannot read without permission \(ClientResponseError: 403"):
            storage.read(web)
        storage._call(f"s3://{name}", "open", lambda files, path: files.chmod(path, acl="public-read"))
        assert storage.read(web) == (source / "000.tar").read_bytes()
    assert not list(folder.glob("*.partial"))
    tries = 8 if is_s3 else 3
    for kind, name in (("503", "SlowDown"), ("500", "InternalError"), ("cut", "Error"), ("truncated", "")):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        proxy.fault = lambda method, path, kind=kind: kind if method == "GET" else None
        with pytest.raises(TesseraError, match=rf"000.tar: could not download in {tries} attempts(.|\n)*{name}"):
            storage.fetch(folder / "000.tar")
        assert not list(folder.glob("*"))  # nothing half-written


@pytest.mark.slow
def test_bad_places_in_a_bucket(cloud, tmp_path, monkeypatch, tessera, recipe):
    proxy, place = cloud
    upload(write_tars(tmp_path / "data", 2), f"{place}/data")
    nowhere = f"{place.partition(':')[0]}://no-such-bucket-here"
    missing = tessera("train", recipe, *data_words(f"{nowhere}/data"))
    assert missing.code == 1
    assert "no-such-bucket-here/data does not exist, or its bucket does not" in missing.err
    target = tessera("train", recipe, *data_words(f"{place}/data"), f"run_dir={nowhere}/run")
    assert target.code == 1
    assert f"cannot write {nowhere}/run" in target.err
    assert "create the bucket first" in target.err
    if nowhere.startswith("gs"):
        # The emulator lets everybody in. What Google's server answers without credentials, and with those of another:
        for status, reason in ((401, "Anonymous caller does not have storage.objects.get access"), (403, "no access")):
            proxy.refusal = (status, json.dumps({"error": {"code": status, "message": reason}}).encode())
            refused = tessera("train", recipe, *data_words(f"{place}/other"))
            assert refused.code == 1
            assert "without permission" in refused.err
            assert reason in refused.err
            assert "gcloud auth application-default login" in refused.err
            assert len(refused.err.splitlines()) == 1
        return
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    nobody = tessera("train", recipe, *data_words(f"{place}/data"))
    assert nobody.code == 1
    assert "without permission" in nobody.err
    assert "AWS_ACCESS_KEY_ID" in nobody.err


@pytest.mark.slow
def test_an_index_in_a_bucket_is_its_listing_and_notices_a_changed_shard(cloud, tmp_path, monkeypatch, tessera, recipe):
    proxy, place = cloud
    source = write_tars(tmp_path / "data", 2)
    upload(source, f"{place}/data")
    index = f"{place}/data/index.parquet"
    check = tessera("data", "check", f"{place}/data", "--size", 8, "--write-index", index, "--out", tmp_path / "c")
    assert check.code == 0, check.err
    assert check.out.endswith(f"to train on the accepted samples: data.path={index}\n")
    monkeypatch.setattr(storage, "_known", {})
    shutil.rmtree(tmp_path / "cache")
    proxy.requests.clear()
    done = tessera("train", recipe, *data_words(f"{place}/data"))
    assert done.code == 0, done.err
    lists = [path for _, path in proxy.requests if "list-type" in path or path.partition("?")[0].endswith("/o")]
    assert proxy.requests
    assert all(re.search("max-keys=1(&|$)|maxResults=1(&|$)", path) for path in lists), lists
    write_tars(tmp_path / "other", 2, 40)
    storage.upload(tmp_path / "other/001.tar", f"{place}/data/001.tar")
    storage.upload(tmp_path / "data/001.tar", f"{place}/data/000.tar")  # of the same size
    monkeypatch.setattr(storage, "_known", {})
    shutil.rmtree(tmp_path / "cache")
    dataset = FilesConfig(path=index, size=8, channels=1).open()
    changed = tessera("train", recipe, *data_words(f"{place}/data"), f"run_dir={tmp_path}/second")
    assert changed.code == 1
    assert "has changed since its index was written" in changed.err
    for name, difference in (("000.tar", "of the same size, but with another ETag"), ("001.tar", "bytes then, ")):
        with pytest.raises(TesseraError, match=rf"{name} has changed .* {difference}"):
            _ = [dataset.encoded(row) for row in range(len(dataset)) if name in dataset.name(row)]


@pytest.mark.slow
def test_bundles_and_large_files_in_a_bucket(cloud, tmp_path, tiny_model):
    _, place = cloud
    bundle.save(tiny_model, Path(f"{place}/bundle"))
    with pytest.raises(TesseraError, match="bundle exists already"):
        bundle.save(tiny_model, Path(f"{place}/bundle"))
    loaded = bundle.load(bundle.localize(f"{place}/bundle"))
    weights = tiny_model.network.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in loaded.network.state_dict().items())
    large = tmp_path / "large"
    large.write_bytes(random.Random(0).randbytes(6 * 2**20))  # uploaded in parts
    storage.upload(large, f"{place}/large")
    assert storage.read(storage.locate(f"{place}/large")) == large.read_bytes()
    # Only one of two processes that create an object at once does.
    assert storage.create(f"{place}/lock", b"1")
    assert not storage.create(f"{place}/lock", b"2")
    assert storage.content(f"{place}/lock") == b"1"
    storage.remove([f"{place}/lock", f"{place}/lock"])
    assert storage.content(f"{place}/lock") is None


PREFIXES = ("AWS", "TESSERA", "STORAGE", "NO_GCE")  # of environment variables

# As in test_interruption: forks do not repeat the imports.
KILLER = """
import importlib, json, os, pathlib, random, signal, sys, time
import pyarrow.parquet, torch
from tessera import cli
from tessera.training import loop
torch.set_num_threads(1)
words, run, kills, client = json.loads(sys.argv[1])
importlib.import_module(client)
rng, records = random.Random(0), []

def fork():
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        sys.argv = ["tessera", *words]
        cli.main()
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        code = 70
    os._exit(code)

def newest():
    return max((path.name for path in pathlib.Path(run, "checkpoints").glob("step-" + "[0-9]" * 9)), default="")

for number in range(kills):
    before, child = newest(), fork()
    if number % 4:  # while its first checkpoints are uploaded
        while newest() <= before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1))
    else:  # at any time from the start
        time.sleep(rng.uniform(0.2, 3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    records.append({"killed": os.WIFSIGNALED(status), "newest": newest()})
_, status = os.waitpid(fork(), 0)
print("\\nresult:" + json.dumps({"kills": records, "code": os.waitstatus_to_exitcode(status)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_with_everything_in_a_bucket_killed_20_times(
    cloud, tmp_path, tessera, recipe, environment, autoencoder_folder
):
    """Data, latent cache, text of the run and checkpoints are in the bucket, behind a server with faults."""
    proxy, place = cloud
    source, steps = write_tars(tmp_path / "data", 4), 48
    upload(source, f"{place}/data")
    settings = recipe.read_text().replace(
        "data: {kind: digits}", f"codec: {{kind: autoencoder-kl, source: {autoencoder_folder}}}"
    )
    recipe.write_text(settings.replace("patch_size: 4", "patch_size: 2"))

    def words(data: str, cache: str) -> list[str]:
        options = f"size: 16, upscale: true, channels: 3, shuffle_shards: 2, hflip: false, cache: '{cache}'"
        return [f"data={{path: '{data}', {options}}}", f"training.steps={steps}", "training.keep_last=2"]

    local = words(str(source), str(tmp_path / "latents"))
    assert tessera("data", "cache", recipe, *local, "--shard-size", 16).code == 0
    whole = tessera("train", recipe, *local, f"run_dir={tmp_path / 'whole'}", "training.checkpoint_every=16")
    assert whole.code == 0, whole.err
    remote_words = words(f"{place}/data", f"{place}/latents")
    made = tessera("data", "cache", recipe, *remote_words, "--shard-size", 16)
    assert made.code == 0, made.err
    chance = random.Random(0)
    proxy.fault = lambda method, path: chance.choice(["503", "500", "cut"]) if chance.random() < 0.02 else None
    protocol, _, name = place.partition("://")
    run = Path(os.environ["TESSERA_CACHE"], "runs", protocol, name, "run")
    command = ["train", str(recipe), *remote_words, f"run_dir={place}/run", "training.checkpoint_every=2"]
    process = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps([command, str(run), 20, SERVERS[protocol][0]])],
        env={**environment, **{name: os.environ[name] for name in os.environ if name.startswith(PREFIXES)}},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "result:" in process.stdout, process.stderr
    result = json.loads(process.stdout.rpartition("result:")[2])
    assert result["code"] == 0, process.stderr[-3000:]
    assert sum(kill["killed"] for kill in result["kills"]) >= 15
    assert len({kill["newest"] for kill in result["kills"]}) >= 8  # killed at different steps
    assert proxy.faults
    proxy.fault = lambda method, path: None
    fresh = tmp_path / "fresh"
    names = storage.listing(storage.locate(f"{place}/run"))
    storage.copy_folder(storage.locate(f"{place}/run"), fresh, names)
    newest, expected = (bundle.checkpoints(each)[0] for each in (fresh, tmp_path / "whole"))
    assert newest.name == expected.name == f"step-{steps:09d}"
    assert state(newest) == state(expected)
    assert untimed(fresh) == untimed(tmp_path / "whole")
    whole_ones = {name.split("/")[1] for name in names if name.endswith(f"/{checkpoint.TRAINER_STATE}")}
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == whole_ones
    assert len(whole_ones) == 2
