"""Where the pictures of one run lie: in the store, or in a folder that the user named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsgu_cli.layout import check_name
from slsgu_cli.store import Store

GENERATIONS, ANSWERS = "generations", "answers"


@dataclass(frozen=True, slots=True)
class Album:
    """A folder of pictures and the record that stands beside it once it is complete."""

    store: Store
    folder: str
    record: str

    @classmethod
    def at(cls, store: Store, name: str, out: Path | None, kind: str = GENERATIONS) -> "Album":
        """Return the album of the set `name`: at `out`, or else in the store."""
        if out is not None:
            return cls(Store(str(out)), "", f"{kind}.json")
        folder = f"{kind}/{check_name(name)}"
        return cls(store, folder, f"{folder}.json")

    def write(self, path: str, data: bytes) -> None:
        """Write one file of the album."""
        self.store.write_bytes(self._inside(path), data)

    def finish(self, record: Any) -> None:
        """Write what the album shows. Written last, it says that the album is complete."""
        self.store.write_record(self.record, record)

    def begin(self) -> None:
        """Remove what an earlier run left, its record first."""
        self.store.remove(self.record)
        if self.folder:
            self.store.remove(self.folder)

    def where(self, path: str) -> str:
        """Return where a file of the album lies, for people and other programs."""
        return self.store.where(self._inside(path))

    def _inside(self, path: str) -> str:
        return f"{self.folder}/{path}" if self.folder else path
