"""Official checkpoints are found, downloaded whole or not at all, resumed, and verified."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from esm_packed.checkpoints import CheckpointError, RandomTensors, download, load_checkpoint, save_fair_esm
from esm_packed.checkpoints.download import file_sha256, find_or_download
from esm_packed.config import ESM2_MODELS, ESM2Config

NAME = "esm2_t6_8M_UR50D"
UNKNOWN = "esm2_t48_15B_UR50D"  # its hash is not known
MODEL = b"PK\x03\x04" + os.urandom(300_000)
REGRESSION = b"PK\x03\x04" + os.urandom(500)


class Server(ThreadingHTTPServer):
    """A local stand-in for fair-esm's server, with the faults of real ones."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {f"/models/{name}.pt": MODEL for name in (NAME, UNKNOWN)}
        self.files |= {f"/regression/{name}-contact-regression.pt": REGRESSION for name in (NAME, UNKNOWN)}
        self.ignores_range = False
        self.etag: str | None = '"one"'
        self.cut_after: list[int] = []
        """Bytes of the body after which each of the next requests is cut off."""
        self.delay = 0.0
        self.together: threading.Barrier | None = None
        """Holds requests for a model until so many have come."""
        self.content_length: str | None = None
        """Sent in place of the true one."""
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def model_ranges(self) -> list[str | None]:
        return [requested for path, requested in self.requests if path.startswith("/models")]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.server.requests.append((self.path, requested))
        time.sleep(self.server.delay)
        if self.server.together is not None and self.path.startswith("/models"):
            self.server.together.wait(60)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if requested and not self.server.ignores_range and self.headers.get("If-Range") == self.server.etag:
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", self.server.content_length or str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.cut_after:
            body = body[: self.server.cut_after.pop(0)]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Path:
    """An empty torch.hub and Hugging Face cache, and a network that consists of `server`."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "http_proxy", "HTTP_PROXY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("ESM_PACKED_MODEL_URL", server.url)
    monkeypatch.setattr(download, "_RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setitem(download.OFFICIAL_FILES, NAME, (hashlib.sha256(MODEL).hexdigest(), len(MODEL)))
    return tmp_path / "torch" / "hub" / "checkpoints"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


COMPLETE = [f"{NAME}-contact-regression.pt", f"{NAME}.pt", f"{NAME}.pt.sha256"]


def test_a_good_download(cache: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = find_or_download(NAME, lambda *event: seen.append(event))
    assert path == cache / f"{NAME}.pt"
    assert path.read_bytes() == MODEL
    assert (cache / f"{NAME}-contact-regression.pt").read_bytes() == REGRESSION
    assert names(cache) == COMPLETE
    announced = caplog.messages[0]
    assert f"{len(MODEL):,} bytes" in announced and str(path) in announced and server.url in announced
    assert (f"downloading {NAME}.pt", len(MODEL), len(MODEL)) in seen
    assert any(what.startswith("checking") for what, _, _ in seen)

    asked = len(server.requests)
    assert find_or_download(NAME) == path
    assert len(server.requests) == asked, "what is there is not asked for again"


def test_the_side_file_is_what_sha256sum_reads(cache: Path) -> None:
    path = find_or_download(NAME)
    digest = hashlib.sha256(MODEL).hexdigest()
    side_file = cache / f"{NAME}.pt.sha256"
    assert f"{digest}  {NAME}.pt\n" in side_file.read_text()
    if shutil.which("sha256sum"):
        subprocess.run(
            ["sha256sum", "--strict", "-c", side_file.name], cwd=cache, check=True, capture_output=True
        )
    assert file_sha256(path) == digest


@pytest.mark.parametrize("cuts", [[1], [100_000], [100_000, 0, 150_000], [len(MODEL) - 1]])
def test_a_cut_transfer_is_resumed(cache: Path, server: Server, cuts: list[int]) -> None:
    server.cut_after = list(cuts)
    assert find_or_download(NAME).read_bytes() == MODEL
    assert names(cache) == COMPLETE
    ranges = server.model_ranges()
    assert ranges[0] is None and len(ranges) == len(cuts) + 1
    assert ranges[1] == f"bytes={cuts[0] - 1}-"


def test_a_download_given_up_is_resumed_by_the_next(cache: Path, server: Server) -> None:
    server.cut_after = [50_000] * 4
    with pytest.raises(CheckpointError, match=r"cut off after 199,997 of 300,004 bytes.*resume"):
        find_or_download(NAME)
    assert names(cache) == [f"{NAME}.pt.part", f"{NAME}.pt.part.etag"]
    server.requests.clear()
    assert find_or_download(NAME).read_bytes() == MODEL
    assert server.model_ranges() == ["bytes=199996-"]
    assert names(cache) == COMPLETE


def test_a_part_that_is_whole_is_not_fetched_again(cache: Path, server: Server) -> None:
    """Killed after the last byte, before the file got its name."""
    cache.mkdir(parents=True)
    (cache / f"{NAME}.pt.part").write_bytes(MODEL)
    (cache / f"{NAME}.pt.part.etag").write_text('"one"')
    assert find_or_download(NAME).read_bytes() == MODEL
    assert server.model_ranges() == [f"bytes={len(MODEL) - 1}-"]


@pytest.mark.parametrize(
    "fault", ["ignores range", "file changed", "no etag", "etag lost", "etag damaged", "part too long"]
)
def test_a_part_that_cannot_be_resumed_is_dropped(cache: Path, server: Server, fault: str) -> None:
    cache.mkdir(parents=True)
    part = cache / f"{NAME}.pt.part"
    part.write_bytes(b"something else" * 10_000)
    (cache / f"{NAME}.pt.part.etag").write_text('"one"')
    if fault == "ignores range":
        server.ignores_range = True
    elif fault == "file changed":
        server.etag = '"two"'
    elif fault == "no etag":
        server.etag = None
    elif fault == "etag lost":
        (cache / f"{NAME}.pt.part.etag").unlink()
    elif fault == "etag damaged":
        (cache / f"{NAME}.pt.part.etag").write_bytes(b"\xff\r\n\n")
    else:
        part.write_bytes(b"x" * (len(MODEL) + 10))
        with pytest.raises(CheckpointError, match="416"):
            find_or_download(NAME)
    assert find_or_download(NAME).read_bytes() == MODEL
    assert names(cache) == COMPLETE


def test_a_server_without_ranges_and_a_cut(cache: Path, server: Server) -> None:
    server.ignores_range, server.cut_after = True, [200_000, 10]
    assert find_or_download(NAME).read_bytes() == MODEL


@pytest.mark.parametrize("resumed", [False, True])
def test_a_wrong_hash_leaves_nothing_behind(cache: Path, server: Server, resumed: bool) -> None:
    right = server.files[f"/models/{NAME}.pt"]
    server.files[f"/models/{NAME}.pt"] = MODEL[:-1] + bytes([MODEL[-1] ^ 1])
    server.cut_after = [1000] if resumed else []
    with pytest.raises(CheckpointError, match="not the official file"):
        find_or_download(NAME)
    assert names(cache) == []
    server.files[f"/models/{NAME}.pt"] = right
    assert find_or_download(NAME).read_bytes() == MODEL


def test_an_unknown_hash_is_trusted_once_and_noted(
    cache: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    path = find_or_download(UNKNOWN)
    digest = hashlib.sha256(MODEL).hexdigest()
    assert any(digest in message and "trusting" in message for message in caplog.messages)
    assert digest in path.with_name(f"{path.name}.sha256").read_text()
    caplog.clear()
    find_or_download(UNKNOWN)
    assert not caplog.messages
    path.write_bytes(MODEL + b"!")
    find_or_download(UNKNOWN)
    assert "has changed" in caplog.messages[0] and digest in caplog.messages[0]


def test_a_log_in_page_is_no_model(cache: Path, server: Server) -> None:
    server.files[f"/models/{UNKNOWN}.pt"] = b"<!DOCTYPE html><title>Airport WiFi</title>"
    with pytest.raises(CheckpointError, match="web page"):
        find_or_download(UNKNOWN)
    assert names(cache) == []


@pytest.mark.parametrize(
    "length", ["abc", "-5", "1e9", "\u0661\u0662".encode().decode("latin-1"), "9" * 5000]
)
def test_a_length_that_is_no_number(cache: Path, server: Server, length: str) -> None:
    server.content_length = length
    with pytest.raises(CheckpointError, match=rf"{NAME}\.pt: .*Content-Length.*Download .* elsewhere"):
        find_or_download(NAME)
    assert names(cache) == []


@pytest.mark.parametrize("url", ["no-address", "http://[bad", "htp://x", "http://a b", "http://x:port"])
def test_a_mirror_that_is_no_address(cache: Path, url: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"could not be downloaded.*ESM_PACKED_MODEL_URL for another server"
    ):
        find_or_download(NAME, base_url=url)


def test_not_on_the_server(cache: Path, server: Server) -> None:
    server.files.clear()
    with pytest.raises(CheckpointError, match="HTTP 404"):
        find_or_download(NAME)
    assert names(cache) == []


def test_no_contact_regression_is_a_warning(
    cache: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    del server.files[f"/regression/{NAME}-contact-regression.pt"]
    assert find_or_download(NAME).read_bytes() == MODEL
    assert "only contacts need them; put" in caplog.messages[-1]
    assert str(cache / f"{NAME}-contact-regression.pt") in caplog.messages[-1]


def test_no_network_says_which_file_goes_where(
    cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESM_PACKED_MODEL_URL")
    monkeypatch.setattr(download, "MODEL_URL", "http://127.0.0.1:1/fair-esm/")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(f"facebook/{NAME}")
    message = str(caught.value)
    assert "refused" in message
    assert f"Download http://127.0.0.1:1/fair-esm/models/{NAME}.pt (300,004 bytes)" in message
    assert f"put it at {cache / NAME}.pt" in message
    assert f"regression/{NAME}-contact-regression.pt at {cache / NAME}-contact-regression.pt" in message
    assert not server.requests


def test_the_mirror_can_be_an_argument(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESM_PACKED_MODEL_URL", "http://127.0.0.1:1")
    assert find_or_download(NAME, base_url=f"{server.url}/").read_bytes() == MODEL


def test_no_room(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"not enough disk space.*300,004 bytes needed, 1,000 free"):
        find_or_download(NAME)
    assert names(cache) == []


def test_no_room_half_way(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device.*TORCH_HOME"):
            find_or_download(NAME)
    assert f"{NAME}.pt" not in names(cache)
    assert find_or_download(NAME).read_bytes() == MODEL


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path, server: Server) -> None:
    """A file where the directory should be, because root may write anywhere."""
    (tmp_path / "torch").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*TORCH_HOME"):
        find_or_download(NAME)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache(cache: Path, server: Server) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o555)
    with pytest.raises(CheckpointError, match="Permission denied"):
        find_or_download(NAME)
    cache.chmod(0o755)


def _download_in_child(url: str, expected: tuple[str, int]) -> None:
    download.OFFICIAL_FILES[NAME] = expected
    assert find_or_download(NAME, base_url=url).read_bytes()[:4] == b"PK\x03\x04"


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_download_at_once(
    cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:  # as on some network file systems

        def no_lock(descriptor: int, directory: Path) -> bool:
            return False

        monkeypatch.setattr(download, "_lock", no_lock)
        server.together = threading.Barrier(4)
    server.delay = 0.2
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_download_in_child, args=(server.url, download.OFFICIAL_FILES[NAME]))
        for _ in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert (cache / f"{NAME}.pt").read_bytes() == MODEL
    assert names(cache) == COMPLETE
    assert len(server.model_ranges()) == (1 if locks else 4), "with locks, the others wait for the first"


# What is on this machine already


def test_another_file_under_an_official_name_is_refused(cache: Path, server: Server) -> None:
    cache.mkdir(parents=True)
    path = cache / f"{NAME}.pt"
    path.write_bytes(MODEL)
    assert find_or_download(NAME) == path
    path.write_bytes(MODEL + b"!")
    with pytest.raises(CheckpointError, match=f"{NAME}.pt is not the official {NAME}"):
        find_or_download(NAME)
    assert path.exists() and not server.requests


def test_a_file_is_hashed_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_or_download(NAME)
    monkeypatch.setattr(download, "_hashed", {})  # as in another process
    hashed: list[Path] = []

    def zeros(path: Path, size: int, progress: object) -> str:
        hashed.append(path)
        return "0" * 64

    monkeypatch.setattr(download, "_hash", zeros)
    digest = hashlib.sha256(MODEL).hexdigest()
    assert file_sha256(path) == digest and not hashed
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert file_sha256(path) == "0" * 64 and hashed == [path]

    (cache / f"{NAME}.pt.sha256").write_text("nonsense\n\n")
    assert file_sha256(path) == "0" * 64
    other = tmp_path / "other"
    other.write_bytes(b"x")
    file_sha256(other)
    assert not other.with_name("other.sha256").exists(), "nothing is written beside users' own files"
    with pytest.raises(CheckpointError, match="cannot read"):
        file_sha256(tmp_path / "missing")


def _snapshot(repository: Path, revision: str, *files: str) -> Path:
    directory = repository / "snapshots" / revision
    directory.mkdir(parents=True)
    for file in files:
        (directory / file).write_text("{}")
    return directory


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", None])
def test_the_hugging_face_cache(
    cache: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "there"))
    hub = {
        "HF_HOME": tmp_path / "there" / "hub",
        "HF_HUB_CACHE": tmp_path / "there",
        "XDG_CACHE_HOME": tmp_path / "there" / "huggingface" / "hub",
        None: tmp_path / "home" / ".cache" / "huggingface" / "hub",
    }[variable]
    repository = hub / f"models--facebook--{NAME}"
    _snapshot(repository, "a", "config.json", "tokenizer.json")  # weights never asked for
    _snapshot(repository, "b", "model.safetensors")
    incomplete = _snapshot(repository, "c", "config.json")
    index = {"weight_map": {"x": "pytorch_model-1.bin"}}
    (incomplete / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert download.hugging_face_snapshot(NAME) is None
    older = _snapshot(repository, "d", "config.json", "model.safetensors")
    newer = _snapshot(repository, "e", "config.json", "pytorch_model.bin")
    assert find_or_download(NAME) in (older, newer)
    for current in (older, newer):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(current.name)
        assert find_or_download(NAME) == current
    assert not server.requests

    cache.mkdir(parents=True)
    (cache / f"{NAME}.pt").write_bytes(MODEL)
    assert find_or_download(NAME) == cache / f"{NAME}.pt", "fair-esm's own file comes first"


def test_homes_that_do_not_exist(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, "~nouser/cache")
        assert download.hugging_face_snapshot(NAME) is None
        monkeypatch.delenv(variable)


def test_from_the_network_to_tensors(
    cache: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ESM2Config(1, 32, 2)
    weights = dict(RandomTensors(config))
    save_fair_esm((config, weights), tmp_path / "esm2_x.pt")
    content = (tmp_path / "esm2_x.pt").read_bytes()
    server.files[f"/models/{NAME}.pt"] = content
    regression = (tmp_path / "esm2_x-contact-regression.pt").read_bytes()
    server.files[f"/regression/{NAME}-contact-regression.pt"] = regression
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(download.OFFICIAL_FILES, NAME, (sha256, len(content)))
    checkpoint = load_checkpoint(f"facebook/{NAME}")
    assert (checkpoint.model_name, checkpoint.sha256) == (NAME, sha256)
    assert checkpoint.config == config
    assert all((checkpoint.tensors[name] == weights[name]).all() for name in weights)


def test_the_official_files_are_those_of_known_models() -> None:
    assert set(download.OFFICIAL_FILES) == set(ESM2_MODELS) - {UNKNOWN}
    assert all(len(sha256) == 64 and size > 10**7 for sha256, size in download.OFFICIAL_FILES.values())
