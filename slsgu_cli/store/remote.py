"""Stores on S3 and other file systems of fsspec."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.store.atomic import partial_name
from slsgu_cli.store.cache import cached

# Object stores: a file appears whole or not at all, and a folder is no more than a name.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}

# Seconds to wait for a connection and for an answer.
CONNECT, READ = 5, 8


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
            options = _s3_options(url) if protocol in ("s3", "s3a") else {}
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


class _TransientError(OSError):
    """A failed request that s3fs sends again."""


@dataclass(slots=True)
class _Answers:
    """Report failed requests to the S3 server at `url`, and have s3fs send them again.

    If the server has never answered, its address may be wrong, and requests fail at once.
    """

    url: str
    answered: bool = False

    def check(self, http_response: Any, parsed: dict[str, Any], **_: Any) -> None:
        """Raise _TransientError for an answer that blames the server."""
        self.answered = True
        error, status = parsed.get("Error", {}), http_response.status_code
        code = error.get("Code")
        if status >= 500 or status == 429 or code in ("RequestTimeout", "SlowDown"):
            self._retry(f"{status} {error.get('Message') or code or ''}".strip())

    def fail(self, exception: Exception, **_: Any) -> None:
        """Raise _TransientError, or OSError if the server has never answered."""
        from botocore.exceptions import ConnectionClosedError, HTTPClientError
        from botocore.exceptions import ConnectionError as NoConnection

        if not isinstance(exception, NoConnection | HTTPClientError):
            return
        # The query of a URL does not help the user.
        reason = re.sub(r"\?[^\s\"]*", "", str(exception))
        if not self.answered and not isinstance(exception, ConnectionClosedError):
            raise OSError(reason) from exception
        self._retry(reason)

    def _retry(self, reason: str) -> None:
        # The number of tries is that of s3fs.
        progress.note(f"{self.url}: {reason}; a request is sent up to 5 times")
        raise _TransientError(reason)


def _s3_options(url: str) -> dict[str, Any]:
    """Return the options of s3fs: fresh listings, bounded waits, reported retries.

    The user's own configuration of fsspec takes precedence. Raises ImportError.
    """
    try:
        from aiobotocore.session import AioSession
        from s3fs.core import S3_RETRYABLE_ERRORS, add_retryable_error
    except ImportError as error:
        raise ImportError("S3 needs the package s3fs") from error
    set_by_user = fsspec.config.conf.get("s3", {})
    session = AioSession(profile=set_by_user.get("profile"))
    if _TransientError not in S3_RETRYABLE_ERRORS:
        add_retryable_error(_TransientError)
    answers = _Answers(url)
    session.register("before-call.s3", _send_at_once)
    session.register("after-call.s3", answers.check)
    session.register("after-call-error.s3", answers.fail)
    # s3fs alone retries: it also repeats a download that breaks off.
    retries = {"mode": "standard", "total_max_attempts": 1}
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
        raise InputError(
            f"cannot open the store {url}: {error}",
            hint="check AWS_ENDPOINT_URL and the network connection, then run this again",
        ) from error
