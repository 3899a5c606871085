"""Where ESM-2's official checkpoints are found: torch.hub's cache, the Hugging Face cache, or the internet.

A file under its final name is complete and verified: downloads go to `NAME.pt.part`, are resumed after a cut,
and are renamed once their SHA-256 is right. What was hashed is noted in `NAME.pt.sha256`, in the format of
`sha256sum`, with the size and time of the file, so that later loads need not hash it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from esm_packed.errors import CheckpointError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called as `progress(what, bytes_done, bytes_in_all)`; the total is None where it is unknown."""

MODEL_URL = "https://dl.fbaipublicfiles.com/fair-esm"
MODEL_URL_VARIABLE = "ESM_PACKED_MODEL_URL"

OFFICIAL_FILES: dict[str, tuple[str, int]] = {
    "esm2_t6_8M_UR50D": ("46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928", 30099493),
    "esm2_t12_35M_UR50D": ("7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e", 134095705),
    "esm2_t30_150M_UR50D": ("881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62", 592774773),
    "esm2_t33_650M_UR50D": ("ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c", 2604537549),
    "esm2_t36_3B_UR50D": ("7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500", 5678116398),
}
"""SHA-256 and size of fair-esm's own files, where known (the 15B model's are not)."""

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60.0
_RETRY_SECONDS = (1.0, 4.0, 15.0)


class _NotDownloaded(Exception):
    """The network's side of a failed download: no server, no such file, or cut off too often."""


class _TransferCut(Exception):
    """The connection ended early; what arrived is in the part file."""


def checkpoint_directory() -> Path:
    """torch.hub's checkpoint cache, which fair-esm uses too (`TORCH_HOME` moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def contact_regression_path(path: Path) -> Path:
    """Path of the contact-regression file that belongs to fair-esm's `path`."""
    return path.with_name(f"{path.stem}-contact-regression.pt")


def find_or_download(name: str, progress: Progress | None = None, *, base_url: str | None = None) -> Path:
    """The official checkpoint `name`, from torch.hub's cache, the local Hugging Face cache, or the internet.

    Args:
        name: one of `config.ESM2_MODELS`.
        progress: told about bytes hashed and downloaded.
        base_url: mirror of fair-esm's server; None takes `$ESM_PACKED_MODEL_URL`, then the official one.

    Returns:
        A fair-esm `.pt` file, or a transformers directory in the Hugging Face cache.

    Raises:
        CheckpointError: it is nowhere and cannot be downloaded, there is no room for it, or the file under
            its name is not the official one.
    """
    path = checkpoint_directory() / f"{name}.pt"
    if path.is_file():
        digest = file_sha256(path, progress, remember=True)
        expected = OFFICIAL_FILES.get(name, (digest, 0))[0]
        if digest != expected:
            raise CheckpointError(
                f"{path} is not the official {name}: its sha256 is {digest}, fair-esm's file has {expected}. "
                "It is damaged or a different model: remove it to download it again, or move it and load "
                "it by its path."
            )
        return path
    if snapshot := hugging_face_snapshot(name):
        return snapshot

    server = base_url or os.environ.get(MODEL_URL_VARIABLE) or MODEL_URL
    model_url = f"{server.rstrip('/')}/models/{path.name}"
    regression_path = contact_regression_path(path)
    regression_url = f"{server.rstrip('/')}/regression/{regression_path.name}"
    try:
        _download(model_url, path, progress, OFFICIAL_FILES.get(name, (None, 0))[0])
    except _NotDownloaded as error:
        size = f" ({OFFICIAL_FILES[name][1]:,} bytes)" if name in OFFICIAL_FILES else ""
        raise CheckpointError(
            f"{name} is not on this machine and could not be downloaded ({error}). "
            f"Download {model_url}{size} elsewhere and put it at {path}; for contact prediction also put "
            f"{regression_url} at {regression_path}. Set TORCH_HOME for another cache directory or "
            f"{MODEL_URL_VARIABLE} for another server, or load a file elsewhere by its path."
        ) from error
    digest = file_sha256(path, progress, remember=True)
    if name not in OFFICIAL_FILES:
        logger.warning("%s: no official hash is known; trusting this download, sha256 %s", path, digest)

    if not regression_path.is_file():
        try:
            _download(regression_url, regression_path, progress)
        except (_NotDownloaded, CheckpointError) as error:
            logger.warning(
                "no contact-regression weights (%s): only contacts need them; put %s at %s",
                error,
                regression_url,
                regression_path,
            )
    return path


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold the weights of a transformers directory, safetensors before pickles.

    Raises:
        CheckpointError: there are none, a shard that the index names is missing, or there is a LoRA adapter.
    """
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} contains a PEFT adapter, such as LoRA: load it with peft, save the merged model "
            "with model.merge_and_unload().save_pretrained(DIR), and load DIR"
        )
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return (directory / single,)
        if (index := directory / f"{single}.index.json").is_file():
            return shards(index)
    raise CheckpointError(
        f"{directory} contains no weights: expected model.safetensors or pytorch_model.bin, or one of them "
        "in shards with its .index.json"
    )


def shards(index: Path) -> tuple[Path, ...]:
    """The weight files that a transformers index file names.

    Raises:
        CheckpointError: the index cannot be read, or a shard is missing.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        paths = tuple(index.parent / str(name) for name in names if Path(str(name)).name == name)
        missing = [str(path) for path in paths if not path.is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weight files: {error!r}") from error
    if missing or not paths or len(paths) < len(names):
        raise CheckpointError(f"{index} lists files that are not next to it: {', '.join(missing) or names}")
    return paths


def read_json(path: Path) -> Any:
    """Contents of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a file, not JSON, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")  # reading a pipe would wait for its writer
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def expand_user(path: str) -> Path:
    """The path with `~` replaced by a home directory; as it is, where there is none to be found."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises RuntimeError)


def hugging_face_snapshot(name: str) -> Path | None:
    """Directory of `facebook/NAME` in the local Hugging Face cache; None if it is not there whole."""
    repository = _hugging_face_cache() / f"models--facebook--{name}"
    current = ""
    with contextlib.suppress(OSError):
        current = (repository / "refs" / "main").read_text().strip()
    snapshots = (repository / "snapshots").glob("*")
    for snapshot in sorted(snapshots, key=lambda path: (path.name != current, path)):
        with contextlib.suppress(CheckpointError):
            weight_files(snapshot)
            if (snapshot / "config.json").is_file():
                return snapshot
    return None


def _hugging_face_cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return expand_user(value)
    if value := os.environ.get("HF_HOME"):
        return expand_user(value) / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_user(cache) / "huggingface" / "hub"


def file_sha256(path: Path, progress: Progress | None = None, *, remember: bool = False) -> str:
    """SHA-256 of a file, taken from `PATH.sha256` if that was written for the file as it is now.

    Args:
        path: the file.
        progress: told about bytes hashed.
        remember: write `PATH.sha256` (nothing happens where that is not allowed).

    Raises:
        CheckpointError: the file cannot be read.
    """
    sidecar = path.with_name(f"{path.name}.sha256")
    try:
        status = path.stat()
        stamp = f"# size {status.st_size} mtime_ns {status.st_mtime_ns}"
        note = sidecar.read_text().split("\n") if sidecar.is_file() else []
        noted = re.match("[0-9a-f]{64}", note[1]) if len(note) > 1 else None
        if noted and note[0] == stamp:
            return noted[0]
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if identity not in _hashed:
            _hashed[identity] = _hash(path, status.st_size, progress)
        digest = _hashed[identity]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if noted and noted[0] != digest:
        logger.warning("%s has changed: sha256 was %s, is %s", path, noted[0], digest)
    if remember:
        with contextlib.suppress(OSError):
            temporary = sidecar.with_name(f"{sidecar.name}.{os.getpid()}")
            temporary.write_text(f"{stamp}\n{digest}  {path.name}\n")
            temporary.replace(sidecar)
    return digest


_hashed: dict[tuple[int, int, int, int], str] = {}
"""Files hashed by this process: device, inode, size, mtime_ns to SHA-256; renaming keeps them valid."""


def _hash(path: Path, size: int, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"checking {path.name}", done, size)
    return digest.hexdigest()


def _download(url: str, path: Path, progress: Progress | None, sha256: str | None = None) -> None:
    """Put the file at `url` under `path`, whole and with the right hash or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(path.parent) as locked:
            if path.is_file():  # by the process we waited for
                return
            # Where locks do not work (some NFS), processes do not share a part file, and nothing is resumed.
            owner = "" if locked else f".{socket.gethostname()}-{os.getpid()}"
            part = path.with_name(f"{path.name}{owner}.part")
            try:
                _fetch_with_retries(url, part, path, progress)
                _refuse_web_page(url, part)
                if sha256 is not None and (digest := file_sha256(part, progress)) != sha256:
                    _remove(part)
                    raise CheckpointError(
                        f"{url} is not the official file: sha256 {digest}, expected {sha256}. The download "
                        f"was discarded; try again, or download the file elsewhere and put it at {path}."
                    )
                part.replace(path)
                _validator_path(part).unlink(missing_ok=True)
            finally:
                if not locked:
                    _remove(part)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}. "
            "TORCH_HOME can name another directory for checkpoints."
        ) from error


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock, which the kernel releases even after a kill; False if unsupported."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _lock(descriptor, directory)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is downloading to %s: waiting for it", directory)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _fetch_with_retries(url: str, part: Path, path: Path, progress: Progress | None) -> None:
    for wait in (*_RETRY_SECONDS, None):
        try:
            return _fetch(url, part, path, progress)
        except _TransferCut as cut:
            if wait is None:
                raise _NotDownloaded(f"{url}: {cut}; try again to resume the download") from cut
            logger.warning("%s: %s; resuming", url, cut)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _fetch(url: str, part: Path, path: Path, progress: Progress | None) -> None:
    """Download `url` into the part file, resuming if the server still has the same file."""
    held = part.stat().st_size if part.is_file() else 0
    validator = _validator_path(part)
    headers = {"User-Agent": "esm-packed"}
    if held and (identity := _read_validator(validator)):
        # The last byte is requested again, so that the range of a complete part is satisfiable.
        headers |= {"Range": f"bytes={held - 1}-", "If-Range": identity}
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than this file, so it is a part of something else
            _remove(part)
        raise _NotDownloaded(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _NotDownloaded(f"{url}: {getattr(error, 'reason', error)}") from error
    with response:
        start = held - 1 if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        if length and not re.fullmatch("[0-9]{1,18}", length):
            raise _NotDownloaded(f"{url}: the server's Content-Length is not a number: {length[:40]!r}")
        total = start + int(length) if length else None
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            _remove(part)
            raise _TransferCut("the server sent a range other than the requested one")
        # At warning level, because Python shows that without any logging having been set up.
        size = f"{total:,} bytes" if total is not None else "unknown size"
        held_text = f", {start:,} already there" if start else ""
        logger.warning("downloading %s (%s%s) to %s", url, size, held_text, path)
        free = shutil.disk_usage(part.parent).free
        if total is not None and free < total - start:
            raise CheckpointError(
                f"not enough disk space for {path}: {total - start:,} bytes needed, {free:,} free. "
                "TORCH_HOME can name another directory for checkpoints."
            )
        if start == 0:
            part.unlink(missing_ok=True)
            validator.unlink(missing_ok=True)
            if identity := response.headers.get("ETag") or response.headers.get("Last-Modified"):
                with contextlib.suppress(UnicodeEncodeError):
                    validator.write_text(identity, encoding="ascii")
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            done = start
            for chunk in _chunks(response):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(f"downloading {path.name}", done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise _TransferCut(f"cut off after {done:,} of {total:,} bytes")


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body; a network error ends it, a writing error in the caller does not look like one."""
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _TransferCut(f"cut off ({error})") from error
        if not chunk:
            return
        yield chunk


def _refuse_web_page(url: str, part: Path) -> None:
    with part.open("rb") as file:
        if file.read(1) == b"<":
            _remove(part)
            raise _NotDownloaded(f"{url}: received a web page (the network's login page?)")


def _validator_path(part: Path) -> Path:
    """Holds the ETag of what the part file is a part of."""
    return part.with_name(f"{part.name}.etag")


def _read_validator(path: Path) -> str | None:
    """The ETag or date that was noted; None if there is none that a header could hold."""
    try:
        noted = path.read_text(encoding="ascii")
    except (FileNotFoundError, ValueError):
        return None
    return noted if noted.isprintable() else None


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_path(part).unlink(missing_ok=True)
