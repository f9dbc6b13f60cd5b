"""Directories of several ranks, collected at a run's URL by ranks that share no disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import RunDir


class RemoteRankFiles:
    """One directory of each rank, on its way to rank 0."""

    def __init__(self, url: str, purpose: str) -> None:
        self._store = RemoteStore(f"{url}/.{purpose}")

    @classmethod
    def of(cls, run: RunDir, purpose: str) -> RemoteRankFiles | None:
        """Return the directories of a run. None if all ranks see the run directory."""
        url = run.url
        return None if url is None else cls(url, purpose)

    def upload(self, folder: Path) -> None:
        for path in folder.iterdir():
            self._store.put(path, f"{folder.name}/{path.name}")

    def download(self, folders: Iterable[Path]) -> None:
        """Download the directories that other ranks have sent, and remove them at the URL."""
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            names = self._store.files(folder.name)
            self._store.get({name: folder / Path(name).name for name in names})
            self._store.remove(*names)
