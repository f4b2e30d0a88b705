import threading
from itertools import pairwise

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from PIL import Image
from torchvision import transforms

from slsgu_cli.clip import batches, models, tokenizers
from slsgu_cli.clip.batches import even_spans, pixel_normalizer, spans, text_features, to_tokens
from slsgu_cli.clip.towers import text_tower
from slsgu_cli.prefetch import AHEAD, prefetch


@pytest.fixture(scope="module")
def tower():
    return text_tower(tiny_clip.fresh_model())


def prompts():
    """Prompts of mixed lengths, in no order of length."""
    texts = [" ".join(["red"] * (1 + 5 * i % 11)) + f" {i}" for i in range(20)]
    return open_clip.SimpleTokenizer(context_length=16)(texts)


def test_pixels_are_scaled_as_torchvision_scales_them(tiny_model):
    spec = tokenizers.input_spec(models.resolve(tiny_model))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    expected = torch.stack([scale(Image.fromarray(image)) for image in images])
    found = pixel_normalizer(spec, "cpu")(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    # The backward of some convolutions ends the process otherwise.
    assert found.is_contiguous()


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_keeps_the_order(threads):
    assert list(prefetch(lambda n: n * n, range(40), threads=threads)) == [n * n for n in range(40)]
    assert list(prefetch(str, [])) == []


def test_reading_ahead_is_bounded():
    started = []
    reading = prefetch(lambda n: started.append(n) or n, range(1000))
    assert next(reading) == 0
    reading.close()
    assert len(started) <= AHEAD + 2


def test_reading_ahead_runs_in_parallel_with_the_consumer():
    consumed = threading.Event()

    def read(n):
        if n == 0:
            return n
        assert consumed.wait(10)
        return n

    for n in prefetch(read, range(3)):
        if n == 0:
            consumed.set()


def test_an_error_in_reading_reaches_the_consumer():
    def read(n):
        if n == 5:
            raise ValueError("row 5")
        return n

    seen = []
    with pytest.raises(ValueError, match="row 5"):
        seen.extend(iter_into(seen, prefetch(read, range(9))))
    assert seen == [0, 1, 2, 3, 4]


def iter_into(seen, items):
    for item in items:
        seen.append(item)
    return []


def test_spans_cover_every_row_once():
    for rows in (0, 1, 7, 8, 9):
        covered = [row for start, stop in spans(rows, 4) for row in range(start, stop)]
        assert covered == list(range(rows))
        assert all(0 < stop - start <= 4 for start, stop in spans(rows, 4))


def test_even_spans_cover_every_row_once_in_few_equal_parts():
    for rows in range(40):
        sizes = [stop - start for start, stop in even_spans(rows, 4)]
        covered = [row for start, stop in even_spans(rows, 4) for row in range(start, stop)]
        assert covered == list(range(rows))
        assert len(sizes) == len(spans(rows, 4))
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize("size", [1, 3, 20, 64])
@torch.no_grad()
def test_text_features_come_in_the_prompts_order(size, tower, monkeypatch):
    monkeypatch.setitem(batches.TEXTS_PER_FORWARD, "cpu", size)
    tokens = prompts()
    expected = tower.owner.encode_text(tokens, normalize=True)
    torch.testing.assert_close(text_features(tower, tokens, "cpu"), expected, atol=2e-6, rtol=1e-5)


def test_groups_of_like_lengths_cover_every_prompt_once(tower):
    tokens = prompts()
    groups = batches.by_length(tower, tokens, 6)
    assert sorted(torch.cat(groups).tolist()) == list(range(20))
    lengths = [tower.lengths(tokens)[rows] for rows in groups]
    assert all(int(a.max()) <= int(b.min()) for a, b in pairwise(lengths))


def test_tokens_are_the_inputs_of_the_embedding():
    tokens = to_tokens(np.array([[1, 2], [3, 4]], np.int32), "cpu")
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [[1, 2], [3, 4]]
