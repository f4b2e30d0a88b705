import threading

import numpy as np
import pytest

from slsgu_cli.sets.tokenizing import CHUNK, tokenizing


def codes(texts):
    return np.asarray([[ord(letter) for letter in text] for text in texts], dtype=np.int32)


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_tokens_come_in_the_order_of_the_captions(count):
    texts = [f"{number:05}" for number in range(count)]
    with tokenizing(codes) as captions:
        for text in texts:
            captions.add(text)
        assert np.array_equal(captions.tokens(), codes(texts))


def test_waiting_chunks_are_cancelled_when_the_work_ends_early():
    begun, first, wait = [], threading.Event(), threading.Event()

    def slow(texts):
        begun.append(len(texts))
        first.set()
        wait.wait(10)
        return codes(texts)

    with pytest.raises(KeyError), tokenizing(slow) as captions:
        for number in range(4 * CHUNK):
            captions.add(str(number))
        assert first.wait(10)
        threading.Timer(0.2, wait.set).start()
        raise KeyError
    assert begun == [CHUNK]


def test_an_error_of_the_tokenizer_is_raised_with_the_tokens():
    def broken(texts):
        raise ValueError(f"{len(texts)} texts")

    with tokenizing(broken) as captions:
        captions.add("a")
        with pytest.raises(ValueError, match="1 texts"):
            captions.tokens()
