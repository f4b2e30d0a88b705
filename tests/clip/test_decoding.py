import threading
import time

import numpy as np
import pytest

from slsgu_cli.clip import decoding
from slsgu_cli.clip.decoding import Decoded, decode_in_order


def pixels(data: bytes):
    return Decoded(np.full((2, 2, 3), data[0], dtype=np.uint8), None, data)


def test_slow_images_do_not_change_the_order():
    def decode(data):
        time.sleep(0.02 if data[0] % 3 == 0 else 0)
        return pixels(data)

    found = list(decode_in_order(((i, bytes([i])) for i in range(40)), decode))
    assert [tag for tag, _ in found] == list(range(40))
    assert all(result.pixels[0, 0, 0] == tag for tag, result in found)


def test_rows_without_an_image_have_a_reason():
    results = dict(decode_in_order([("a", None), ("b", b"1")], pixels))
    assert (results["a"].reason, results["b"].reason) == ("no image", None)


def test_few_images_are_decoded_ahead(monkeypatch):
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    taken = 0

    def source():
        nonlocal taken
        for index in range(1000):
            taken += 1
            yield index, b"1"

    results = decode_in_order(source(), pixels)
    for _ in range(10):
        next(results)
    assert taken <= 10 + 2 * decoding.DECODED_AHEAD
    results.close()


def test_an_interrupted_consumer_does_not_wait(monkeypatch):
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    begun, ended, release = [], [], threading.Event()
    before = set(threading.enumerate())

    def decode(data):
        begun.append(1)
        release.wait(60)
        ended.append(1)
        return pixels(data)

    def source():
        for index in range(6):
            yield index, b"1"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(decode_in_order(source(), decode))
    assert not ended
    threads = set(threading.enumerate()) - before
    release.set()
    for thread in threads:
        thread.join()
    assert len(begun) <= 2
