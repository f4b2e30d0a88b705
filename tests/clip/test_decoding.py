import threading
import time

import numpy as np
import pytest

from slsgu_cli.clip import decoding
from slsgu_cli.clip.decoding import DecodeError, Picture, decode_in_order


def pixels(data: bytes):
    return Picture(np.full((2, 2, 3), data[0], dtype=np.uint8))


def test_order_is_kept_though_some_are_slow():
    def decode(data):
        time.sleep(0.02 if data[0] % 3 == 0 else 0)
        return pixels(data)

    found = list(decode_in_order(((i, bytes([i])) for i in range(40)), decode))
    assert [tag for tag, _ in found] == list(range(40))
    assert all(result.pixels[0, 0, 0] == tag for tag, result in found)


def test_failures_are_results_with_a_reason():
    def decode(data):
        if data == b"x":
            raise DecodeError("broken image")
        return pixels(data)

    found = dict(decode_in_order([("a", b"x"), ("b", None), ("c", b"1")], decode))
    assert found["a"].reason == "broken image"
    assert found["b"].reason == "no image"
    assert found["c"].reason is None


def test_digests_tell_encoded_images_apart():
    (_, a), (_, b), (_, c) = decode_in_order([(0, b"1x"), (1, b"1y"), (2, b"1x")], pixels)
    assert a.source_digest == c.source_digest != b.source_digest


def test_few_are_in_flight(monkeypatch):
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
