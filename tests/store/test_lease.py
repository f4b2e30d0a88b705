"""Leases in a store: one holder at a time, renewed while it lives, and gone when it does not."""

import json
import threading
from dataclasses import replace

import pytest

from slsgu_cli.errors import UsageError
from slsgu_cli.store import sharing
from slsgu_cli.store.sharing import Holder, held
from slsgu_cli.store.store import Store

PATH, FILE = "gradients/a.safetensors", "leases/gradients-a.safetensors.json"


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def write(store, holder):
    store.write_bytes(FILE, sharing._written(holder))


def elsewhere(**changes):
    """A holder on another machine, whose processes cannot be seen from here."""
    return replace(Holder.here(), host="elsewhere", machine="another", **changes)


def test_a_lease_stands_for_as_long_as_the_block(store):
    with held(store, PATH, what="it"):
        said = json.loads(store.read_bytes(FILE))
        assert said["pid"] > 0
        assert said["since"].endswith(" UTC")
    assert not store.exists(FILE)
    with pytest.raises(KeyError), held(store, PATH, what="it"):
        raise KeyError
    assert not store.exists(FILE)


def test_threads_hold_it_one_after_another(store, monkeypatch):
    monkeypatch.setattr(sharing, "LOOK", 0.01)
    inside, most = [], []

    def work():
        with held(store, PATH, what="it"):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 8


def test_one_that_is_not_renewed_is_taken_over(store, listener):
    write(store, elsewhere(seconds=0.2, pid=17))
    with held(store, PATH, what="it"):
        assert json.loads(store.read_bytes(FILE))["host"] != "elsewhere"
    assert "it: process 17 on elsewhere has been silent for 0.2 s" in listener.heard


def test_one_that_is_renewed_is_waited_for(store, monkeypatch):
    """Its holder writes it anew at every look, ten times as long as its term, and then goes."""
    other = elsewhere(seconds=0.1)
    write(store, other)
    looks = iter(range(1, 11))

    def sleep(seconds):
        sharing.time.monotonic.now += 0.09
        beat = next(looks, None)
        if beat is None:
            store.remove(FILE)
        else:
            write(store, replace(other, beat=beat))

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    monkeypatch.setattr(sharing.time, "monotonic", Clock())
    monkeypatch.setattr(sharing.time, "sleep", sleep)
    with held(store, PATH, what="it"):
        assert next(looks, None) is None


def test_a_holder_renews_its_lease(store, monkeypatch):
    monkeypatch.setenv(sharing.VARIABLE, "0.1")
    with held(store, PATH, what="it"):
        renewed = threading.Event()
        while not renewed.wait(0.01):
            if json.loads(store.read_bytes(FILE))["beat"] > 1:
                renewed.set()


def test_a_lease_that_another_process_took_is_left_alone(store):
    with held(store, PATH, what="it"):
        write(store, elsewhere())
    assert json.loads(store.read_bytes(FILE))["host"] == "elsewhere"


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'{"pid": "x"}'])
def test_a_damaged_lease_blocks_no_longer_than_any(store, monkeypatch, listener, content):
    monkeypatch.setattr(sharing, "TERM", 0.2)
    store.write_bytes(FILE, content)
    with held(store, PATH, what="it"):
        pass
    assert any("an unknown host has been silent" in text for text in listener.heard)


def test_a_store_that_does_not_wait_has_none(store):
    quick = Store(store.url, waits=False)
    with held(store, PATH, what="it"), held(quick, PATH, what="it"):
        pass


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan", "inf"])
def test_a_term_of_no_sense(store, monkeypatch, seconds):
    monkeypatch.setenv(sharing.VARIABLE, seconds)
    with pytest.raises(UsageError, match="SLSGU_LEASE is"), held(store, PATH, what="it"):
        pass
