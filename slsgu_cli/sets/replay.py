"""Rebuild a set from the request in its manifest."""

from dataclasses import dataclass
from shlex import quote

from slsgu_cli.errors import StaleError
from slsgu_cli.records.codec import decode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import read_manifest
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class Replayed:
    """A rebuilt set; `same` says for each part whether its rows are unchanged."""

    manifest: SetManifest
    same: dict[str, bool]


def replay(store: Store, name: str) -> Replayed:
    """Build the set `name` again from its manifest, without the rows that were dropped by hand.

    Raises StaleError if the manifest does not contain the request.
    """
    before = read_manifest(store, name)
    if not before.request:
        raise StaleError(
            f"the manifest of {name} does not contain its request",
            hint=f"run `slsgu build-sets {quote(name)}` with its sources",
        )
    request = decode(BuildRequest, before.request)
    after = build_sets(store, request)
    old = {part: ref.fingerprint for part, ref in before.blocks().items()}
    new = {part: ref.fingerprint for part, ref in after.blocks().items()}
    return Replayed(after, {part: old.get(part) == new[part] for part in new})
