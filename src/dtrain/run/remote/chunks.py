"""Large files are uploaded to S3 in chunks, a few at the same time. Each is repeated alone.

s3fs would do that with settings, but for the repeats: if the server answers one chunk with 500, it
starts again with the whole file. If the answer to the last request is lost, it reports an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Lock
from typing import Any, TypeVar

_Item = TypeVar("_Item")

CHUNK = 6 << 20
"""The size of a chunk in bytes. S3 requires at least 5 MiB, except for the last one."""
NUM_AT_ONCE = 3
"""With these, a process needs 40 MB: each chunk is copied once or twice on its way."""
_MOST_CHUNKS = 10_000
"""S3 allows no more for one file. So chunks are larger, and fewer, for a file above 63 GB."""


def at_once(num: int, action: Callable[[_Item], object], items: Iterable[_Item]) -> None:
    """Run an action on each item, on up to `num` at the same time. None begins after one failed.

    Raises:
        Exception: an action raised it.
    """
    remaining, lock, failed = iter(items), Lock(), Event()

    def following() -> Iterator[_Item]:
        while not failed.is_set():
            with lock:  # the items may come from a generator
                try:
                    item = next(remaining)
                except StopIteration:
                    return
            yield item

    def work() -> None:
        try:
            for item in following():
                action(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(num) as pool:
        workers = [pool.submit(work) for _ in range(num)]
    for worker in workers:
        worker.result()


class ChunkedUpload:
    """A multipart upload to S3. As a context manager, it is aborted if there is an error.

    Args:
        fs: an `S3FileSystem`.
        path: the path of the file there.
        size: its size in bytes.
    """

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self._size = fs, path, size
        self.chunk = max(CHUNK, -(-size // _MOST_CHUNKS))
        self.num_chunks = -(-size // self.chunk)
        self.num_at_once = max(1, NUM_AT_ONCE * CHUNK // self.chunk)
        bucket, key, _ = fs.split_path(path)
        begun = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        self._upload = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}
        self._tags: dict[int, str] = {}
        self._was_asked = False

    def __enter__(self) -> ChunkedUpload:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            with suppress(Exception):  # if the server is away, the next attempt does it
                abort(self._fs, self._upload)

    def send(self, number: int, data: bytes) -> None:
        """Upload a chunk. Its first number is 0."""
        answer = self._fs.call_s3("upload_part", **self._upload, PartNumber=number + 1, Body=data)
        self._tags[number + 1] = answer["ETag"]

    def complete(self) -> None:
        """Make the file exist, of which all chunks are uploaded."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self._tags.items())]
        is_repeated, self._was_asked = self._was_asked, True
        try:
            chunks = {"Parts": parts}
            self._fs.call_s3("complete_multipart_upload", **self._upload, MultipartUpload=chunks)
        except FileNotFoundError:  # it was completed, and only the answer was lost?
            if not is_repeated or self._fs.size(self._path) != self._size:
                raise


def unfinished(fs: Any, below: str) -> list[dict[str, str]]:
    """Return the first 1000 uploads below a path of S3 that are neither complete nor aborted."""
    bucket, key, _ = fs.split_path(below)
    found = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
    return [
        {"Bucket": bucket, "Key": each["Key"], "UploadId": each["UploadId"]}
        for each in found.get("Uploads", [])
    ]


def abort(fs: Any, upload: dict[str, str]) -> None:
    """Remove what was uploaded."""
    fs.call_s3("abort_multipart_upload", **upload)
