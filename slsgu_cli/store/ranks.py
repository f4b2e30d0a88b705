"""A store that several processes share: only rank 0 writes to it."""

from typing import Any

from slsgu_cli import processes
from slsgu_cli.store.store import Arrays, Store


class RankStore(Store):
    """A store in which every rank reads, and rank 0 alone writes and holds locks."""

    @property
    def has_locks(self) -> bool:
        """Whether this process waits for others: only rank 0 does."""
        return super().has_locks and processes.is_first()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write `data` at `path` on rank 0."""
        if processes.is_first():
            super().write_bytes(path, data)

    def write_tensors(
        self, path: str, arrays: Arrays, header: Any, *, keep_first: bool = False
    ) -> None:
        """Write a safetensors file on rank 0."""
        if processes.is_first():
            super().write_tensors(path, arrays, header, keep_first=keep_first)

    def remove(self, path: str) -> None:
        """Remove the artifact at `path` on rank 0."""
        if processes.is_first():
            super().remove(path)

    def require_writable(self, path: str) -> None:
        """Raise InputError on rank 0 if it cannot write at `path`."""
        if processes.is_first():
            super().require_writable(path)
