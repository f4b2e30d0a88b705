"""Build a set again from what its manifest says of how it was made."""

from dataclasses import dataclass
from shlex import quote

from slsgu_cli.build_request import BuildRequest
from slsgu_cli.curation.building import build
from slsgu_cli.errors import StaleError
from slsgu_cli.layout import read_manifest
from slsgu_cli.records import SetManifest, decode
from slsgu_cli.shelf import blocks
from slsgu_cli.store import Store


@dataclass(frozen=True, slots=True)
class Replayed:
    """A set that was built again, and by part whether its rows are those it had."""

    manifest: SetManifest
    same: dict[str, bool]


def replay(store: Store, name: str) -> Replayed:
    """Build the set `name` once more, rows dropped by hand included.

    Raises StaleError where the manifest does not say how.
    """
    before = read_manifest(store, name)
    if not before.request:
        raise StaleError(
            f"the manifest of {name} does not say how it was built",
            hint=f"run `slsgu build-sets {quote(name)}` with its sources",
        )
    request = decode(BuildRequest, before.request)
    after = build(store, request)
    had = {part: ref.fingerprint for part, ref in blocks(before)}
    has = {part: ref.fingerprint for part, ref in blocks(after)}
    return Replayed(after, {part: had.get(part) == has[part] for part in has})
