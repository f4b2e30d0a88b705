"""Locks in a store: one holder at a time, and gone when the holder ends."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest

from slsgu_cli.store.locks import held, holder
from slsgu_cli.store.store import Store

PATH, FILE = "gradients/a.safetensors", "locks/gradients-a.safetensors.lock"


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def test_a_lock_exists_for_as_long_as_the_block(store, tmp_path):
    with held(store, PATH, what="it"):
        assert holder(tmp_path / "store" / FILE).startswith(f"process {os.getpid()} (since 20")
    assert not store.exists(FILE)
    with pytest.raises(KeyError), held(store, PATH, what="it"):
        raise KeyError
    assert not store.exists(FILE)


def test_threads_acquire_it_one_after_another(store):
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
    assert not store.exists(FILE)


def test_a_killed_process_releases_its_lock(store, tmp_path):
    code = f"""
        import time
        from slsgu_cli.store.locks import held
        from slsgu_cli.store.store import Store
        with held(Store({store.root!r}), {PATH!r}, what="it"):
            print("held", flush=True)
            time.sleep(600)
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert f"process {process.pid} " in holder(tmp_path / "store" / FILE)
        process.kill()
        process.wait()
    assert holder(tmp_path / "store" / FILE) is None
    with held(store, PATH, what="it"):
        assert f"process {os.getpid()} " in holder(tmp_path / "store" / FILE)
    assert not store.exists(FILE)


def test_a_store_that_does_not_wait_has_no_locks(store):
    quick = Store(store.url, waits=False)
    with held(store, PATH, what="it"), held(quick, PATH, what="it"):
        pass
