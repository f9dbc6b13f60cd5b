"""A real server that speaks S3, on this machine, for tests; it ends by its pid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from dtrain.ports import free_candidate
from dtrain.run.remote.store import RemoteStore
from support.launch import until

BUCKET = "bucket"
# not in this file, which may be in a run's record of the code
KEYS = {name: token_hex(12) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}


class S3:
    """The server, with one bucket."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "s3.log"
        self.endpoint = f"http://127.0.0.1:{free_candidate('127.0.0.1', str(folder))}"
        self.without_keys = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # no cloud is asked for keys
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }
        self.env = {**self.without_keys, **KEYS}

    def __enter__(self) -> S3:
        port = self.endpoint.rpartition(":")[2]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            until("the S3 server", self._answers, 90)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return bool(urlopen(f"{self.endpoint}/moto-api/", timeout=10).status == 200)
        except (URLError, OSError):
            return False


@contextmanager
def with_bucket(folder: Path) -> Iterator[S3]:
    """Run a server that has the bucket. The environment of this process stays as it was."""
    with S3(folder) as server:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            make_bucket()
        yield server


def make_bucket() -> None:
    """With the server's variables in our environment."""
    RemoteStore(f"s3://{BUCKET}")._fs.mkdir(BUCKET)
