"""A directory at a URL, accessed with fsspec: reads, writes, and errors in plain words."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dtrain.errors import DtrainError, PlanError, first_line
from dtrain.run.remote.chunks import CHUNK, NUM_AT_ONCE, ChunkedUpload, abort, at_once, unfinished

_Value = TypeVar("_Value")

_PAUSES_S = (0.5, 2.0, 5.0)
_PATIENT_S = (*_PAUSES_S, 15.0, 30.0)
_NUM_DOWNLOADS = 4
_EXTRAS = {"s3fs": "pip install 'dtrain[s3]'"}
# A missing server is detected in seconds. botocore repeats nothing: s3fs does, for 2 s, then we.
_S3_OPTIONS = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 0}}


class RemoteStoreError(DtrainError, OSError):
    """A directory at a URL cannot be read or written."""


def is_url(text: str | os.PathLike[str]) -> bool:
    """Return whether the location of runs is a URL, not a directory."""
    return "://" in os.fspath(text)


class RemoteStore:
    """A directory at a URL. Its files have names, relative to it, with `/` between the parts.

    All methods raise `RemoteStoreError` when the URL does not answer, after some tries, or refuses
    access.
    """

    def __init__(self, url: str, *, patient: bool = False) -> None:
        """Open the directory. No request is sent yet.

        Args:
            url: the URL of the directory.
            patient: whether to wait for a server that is away for a minute. Use it when a training
                is at stake, not a command.

        Raises:
            PlanError: it is not such a URL, or the package for it is missing.
        """
        self.url = url if url.endswith("://") else url.rstrip("/")
        self._fs, self._root = _open(self.url)
        self._patient = patient
        self._is_local = "file" in _protocols(self._fs)
        self._is_s3 = "s3" in _protocols(self._fs)

    def check(self) -> None:
        """Check that files can be written, read and removed there.

        Raises:
            PlanError: they cannot. The error gives the reason.
        """
        name = f".dtrain-probe-{secrets.token_hex(4)}"
        try:
            self.write(name, b"dtrain")
            if self.read(name) != b"dtrain":
                raise RemoteStoreError(
                    f"{self.url} does not return what was written to it", code="url.unreliable"
                )
            self.remove(name)
        except RemoteStoreError as error:
            raise PlanError(str(error), code=error.code) from error

    def files(self, below: str = "") -> dict[str, Mapping[str, Any]]:
        """Return fsspec's description of each file below a name, by name. Empty without any."""
        empty: dict[str, Any] = {}
        found = self._run_or(lambda: self._fs.find(self._path(below), detail=True), empty)
        return {path[len(self._root) + 1 :]: info for path, info in found.items()}

    def matching(self, pattern: str) -> dict[str, Mapping[str, Any]]:
        """Return fsspec's description of the files that match a glob pattern, by name."""
        # fsspec's `glob` leaves out what it cannot list: a checkpoint would seem not to exist
        found: dict[str, Mapping[str, Any]] = {"": {"type": "directory"}}
        for part in pattern.split("/"):
            folders = [name for name, info in found.items() if info["type"] == "directory"]
            inside = {name: info for folder in folders for name, info in self._list(folder).items()}
            found = {n: info for n, info in inside.items() if fnmatchcase(n.split("/")[-1], part)}
        return {name: info for name, info in found.items() if info["type"] != "directory"}

    def _list(self, name: str) -> dict[str, Mapping[str, Any]]:
        """Return what is in a directory, by name."""
        empty: list[Any] = []
        found = self._run_or(lambda: self._fs.ls(self._path(name), detail=True), empty)
        return {info["name"].rstrip("/")[len(self._root) + 1 :]: info for info in found}

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file. None when there is no such file."""
        return self._run_or(lambda: bytes(self._fs.cat_file(self._path(name))), None)

    def write(self, name: str, data: bytes) -> None:
        """Write a file. Readers see the old one or the new one."""
        path = self._path(name)
        if not self._is_local:
            self._run(lambda: self._fs.pipe_file(path, data))
            return
        temporary = f"{path}.{secrets.token_hex(4)}"
        self._run(lambda: self._fs.pipe_file(temporary, data))
        self._run(lambda: os.replace(temporary, path))

    def create_exclusive(self, name: str, data: bytes) -> None:
        """Write a file that only one process can make, with a conditional request if possible.

        Raises:
            FileExistsError: there is such a file.
        """
        path = self._path(name)

        def make() -> None:
            if not self._is_local:
                self._fs.pipe_file(path, data, mode="create")
                return
            temporary = f"{path}.{secrets.token_hex(4)}"
            self._fs.pipe_file(temporary, data)
            try:
                os.link(temporary, path)
            finally:
                os.unlink(temporary)

        try:
            self._retry(make)
        except Exception as error:  # older libraries have no specific error for this
            existing = self.read(name)
            if existing is None:
                raise _store_error(self.url, error) from error
            if existing != data:  # otherwise it is dtrain's, and only the answer was lost
                raise FileExistsError(name) from error

    def put(self, source: Path, name: str) -> None:
        """Copy a file of this host to the URL, with little of it in memory at once."""
        path = self._path(name)
        with source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if self._is_s3 and size > CHUNK:
                self._put_in_chunks(file.fileno(), path, size)
            else:
                self._run(lambda: self._fs.put_file(str(source), path))

    def _put_in_chunks(self, fd: int, path: str, size: int) -> None:
        with self._run(lambda: ChunkedUpload(self._fs, path, size)) as upload:

            def send(number: int) -> None:
                data = os.pread(fd, upload.chunk, number * upload.chunk)
                self._run(lambda: upload.send(number, data))

            at_once(upload.num_at_once, send, range(upload.num_chunks))
            self._run(upload.complete)

    def get(self, files: Mapping[str, Path]) -> list[str]:
        """Copy files to this host, with little of them in memory at once.

        Args:
            files: the path of each copy, by the name of the file.

        Returns:
            The names of those that do not exist at the URL.
        """
        missing: list[str] = []
        # s3fs then streams, and continues what was cut; else it holds several chunks of 50 MB
        options = {"max_concurrency": 1} if self._is_s3 else {}

        def download(name: str) -> bool:
            self._fs.get_file(self._path(name), str(files[name]), **options)
            return True

        def fetch(name: str) -> None:
            if not self._run_or(lambda: download(name), False):
                missing.append(name)

        at_once(_NUM_DOWNLOADS, fetch, files)
        return missing

    def remove_unfinished(self) -> None:
        """Remove what killed processes have uploaded of large files: it costs money at S3.

        Nothing is being uploaded.
        """
        if self._is_s3:

            def remove(upload: dict[str, str]) -> None:
                self._run_or(lambda: abort(self._fs, upload), None)

            found = self._run(lambda: unfinished(self._fs, self._root))
            at_once(NUM_AT_ONCE, remove, found)

    def copy(self, name: str, to: str) -> None:
        if self._is_local:
            os.makedirs(os.path.dirname(self._path(to)), exist_ok=True)
        self._run(lambda: self._fs.cp_file(self._path(name), self._path(to)))

    def remove(self, *names: str) -> None:
        """Remove files. A missing file is no error."""
        paths = [self._path(name) for name in names]
        if len(paths) == 1:
            self._run_or(lambda: self._fs.rm_file(paths[0]), None)
        elif paths:  # in one request, where the server supports it
            self._run_or(lambda: self._fs.rm(paths), None)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _run(self, action: Callable[[], _Value]) -> _Value:
        try:
            return self._retry(action)
        except Exception as error:  # each library behind fsspec has its own error
            raise _store_error(self.url, error) from error

    def _run_or(self, action: Callable[[], _Value], missing: _Value) -> _Value:
        with contextlib.suppress(FileNotFoundError):
            try:
                return self._retry(action)
            except FileNotFoundError:
                raise
            except Exception as error:
                raise _store_error(self.url, error) from error
        return missing

    def _retry(self, action: Callable[[], _Value]) -> _Value:
        """Run an action that a network error may interrupt, with some retries."""
        pauses = _PATIENT_S if self._patient else _PAUSES_S
        for pause_s in () if self._is_local else pauses:
            try:
                return action()
            except (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError):
                raise
            except Exception as error:
                if _lacks_credentials(error):
                    raise
            time.sleep(pause_s)
        return action()


def _open(url: str) -> tuple[Any, str]:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise PlanError(
            f"the URL of runs at {parts.hostname} contains a password, which others could read in "
            "the files of a run; remove it: credentials are read from the environment",
            code="url.password",
        )
    if parts.scheme == "memory":
        raise PlanError(
            "runs at memory:// would be lost when the process that wrote them ends",
            code="url.in-memory",
        )
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if parts.scheme in ("s3", "s3a"):
        options["config_kwargs"] = dict(_S3_OPTIONS)
        for library in ("botocore", "aiobotocore"):  # they log where they have found credentials
            logging.getLogger(library).setLevel(logging.WARNING)
    if parts.scheme in ("file", "local"):
        options["auto_mkdir"] = True
    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _package(parts.scheme)
        raise PlanError(
            f"runs at {parts.scheme}:// need the package {package}: "
            f"{_EXTRAS.get(package, f'pip install {package}')}",
            code="plan.missing-package",
        ) from error
    except Exception as error:
        raise PlanError(
            f"runs cannot be kept at {url}: {first_line(error)}", code="url.invalid"
        ) from error
    if not root.strip("/"):
        raise PlanError(
            f"{url} names no bucket or directory; give one, for example s3://bucket/runs",
            code="url.invalid",
        )
    return fs, root.rstrip("/")


def _package(scheme: str) -> str:
    from fsspec.registry import known_implementations

    return str(known_implementations[scheme]["class"]).partition(".")[0]


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _store_error(url: str, error: Exception) -> RemoteStoreError:
    reason = first_line(error)
    if isinstance(error, FileNotFoundError):
        return RemoteStoreError(
            f"{url} does not exist: {reason}; create the bucket, or give another URL",
            code="url.not-found",
        )
    if isinstance(error, PermissionError) or _lacks_credentials(error):
        return RemoteStoreError(
            f"{url} denies access: {reason}; credentials are read from the environment, for "
            "example AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            code="url.no-access",
        )
    return RemoteStoreError(f"{url} cannot be reached: {reason}", code="url.unreachable")


def _lacks_credentials(error: Exception) -> bool:
    return "Credential" in type(error).__name__
