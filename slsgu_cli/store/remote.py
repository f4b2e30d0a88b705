"""Stores on S3 and other file systems of fsspec."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.store.atomic import partial_name
from slsgu_cli.store.cache import cached

# Object stores: a file appears whole or not at all, and a folder is no more than a name.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}

# Seconds to wait for a connection and for an answer, and how often botocore tries. s3fs tries
# again on top of that.
CONNECT, READ, TRIES = 5, 8, 3


@dataclass(slots=True)
class Remote:
    """A file system, the path on it, and the options that open it."""

    fs: Any
    root: str
    options: dict[str, Any]

    @classmethod
    def open(cls, url: str) -> "Remote":
        """Open a URL or folder. Raises InputError, and MissingError where there is no bucket."""
        try:
            protocol = fsspec.core.split_protocol(url)[0]
            options = _s3_options() if protocol in ("s3", "s3a") else {}
            fs, root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            hint = "pip install 'slsgu[s3]'" if "s3fs" in str(error) else None
            raise InputError(f"cannot open the store {url}: {error}", hint=hint) from error
        if options:
            _look_into(url, fs, str(root))
        return cls(fs, str(root).rstrip("/"), options)

    @property
    def protocols(self) -> tuple[str, ...]:
        """The names of the file system in URLs."""
        protocol = self.fs.protocol
        return protocol if isinstance(protocol, tuple) else (protocol,)

    def asynchronous(self) -> Any:
        """Return the same file system for the event loop of another library, such as zarr."""
        if not self.fs.async_impl:
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            return AsyncFileSystemWrapper(self.fs, asynchronous=True)
        return fsspec.filesystem(self.protocols[0], asynchronous=True, **self.options)

    def put(self, built: Path, target: str) -> None:
        """Upload a file, or the files of a folder: those at its top last, because they complete it.

        All other files below `target` are removed.
        """
        if built.is_file():
            self._put_file(built, target)
            return
        below = [path for path in sorted(built.rglob("*")) if path.is_file()]
        names = {path: path.relative_to(built).as_posix() for path in below}
        top = [path for path in below if path.parent == built]
        rest = [path for path in below if path.parent != built]
        there = set(self.fs.find(target)) if self.fs.exists(target) else set()
        root = self.fs._strip_protocol(target)
        for old in sorted(there & {f"{root}/{names[path]}" for path in top}):
            self.fs.rm_file(old)
        if rest:
            self.fs.put([str(path) for path in rest], [f"{target}/{names[path]}" for path in rest])
        for stale in sorted(there - {f"{root}/{name}" for name in names.values()}):
            self.fs.rm_file(stale)
        for path in top:
            self._put_file(path, f"{target}/{names[path]}")

    def _put_file(self, built: Path, target: str) -> None:
        if not OBJECT_STORES.isdisjoint(self.protocols):
            self.fs.put_file(str(built), target)
            return
        folder, _, name = target.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        partial = f"{folder}/{partial_name(name)}"
        try:
            self.fs.put_file(str(built), partial)
            if self.fs.exists(target):
                self.fs.rm_file(target)
            self.fs.mv(partial, target)
        finally:
            if self.fs.exists(partial):
                self.fs.rm_file(partial)

    @contextmanager
    def copied(self, path: str, *, fresh: bool = False) -> Iterator[Path]:
        """Yield a copy of a file on this machine, unless `fresh` from the cache."""
        if fresh:
            with tempfile.TemporaryDirectory(prefix="slsgu-") as folder:
                self.fs.get_file(path, str(Path(folder, "copy")))
                yield Path(folder, "copy")
            return
        identity = f"{self.fs.unstrip_protocol(path)}\n{self.fs.ukey(path)}"
        with cached(identity, lambda copy: self.fs.get_file(path, str(copy))) as copy:
            yield copy


def _s3_options() -> dict[str, Any]:
    """Return the options of s3fs: fresh listings, bounded waits and retries.

    The user's own configuration of fsspec takes precedence. Raises ImportError.
    """
    try:
        from aiobotocore.session import AioSession
    except ImportError as error:
        raise ImportError("S3 needs the package s3fs") from error
    set_by_user = fsspec.config.conf.get("s3", {})
    session = AioSession(profile=set_by_user.get("profile"))
    session.register("before-call.s3", _send_at_once)
    retries = {"mode": "standard", "total_max_attempts": TRIES}
    ours = {"connect_timeout": CONNECT, "read_timeout": READ, "retries": retries}
    config = {**ours, **set_by_user.get("config_kwargs", {})}
    return {"session": session, "use_listings_cache": False, "config_kwargs": config}


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Send the content of a request without asking the server first.

    Otherwise aiohttp drops the time limit of the final response.
    """
    params["headers"].pop("Expect", None)


def _look_into(url: str, fs: Any, root: str) -> None:
    """Require a bucket that exists and can be read. Raises InputError and MissingError."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

    bucket, key, _ = fs.split_path(root)
    try:
        fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise InputError(
            f"there are no credentials for the store {url}",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ) from error
    except FileNotFoundError as error:
        raise MissingError(
            f"there is no bucket {bucket}: {error}",
            hint="check the name in --store; slsgu does not create buckets",
        ) from error
    except PermissionError as error:
        raise InputError(
            f"no permission to read the store {url}: {error}",
            hint="check AWS_PROFILE or AWS_ACCESS_KEY_ID and its permissions",
        ) from error
    except (OSError, BotoCoreError) as error:
        raise InputError(f"cannot open the store {url}: {error}") from error
