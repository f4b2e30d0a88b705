import numpy as np
import pytest

import slsgu_cli.sets.image_buffer
from slsgu_cli.errors import InputError
from slsgu_cli.sets.image_buffer import image_buffer
from slsgu_cli.store.store import Store


# Memory for all of 20 images of 36 bytes, for 7 of them, and for none.
@pytest.mark.parametrize("memory", [1 << 20, 4 * 7 * 36, 0])
def test_images_are_returned_by_number_and_the_file_is_removed(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(slsgu_cli.sets.image_buffer, "spare", lambda device: memory)
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 3), dtype=np.uint8)
    store = Store(str(tmp_path / "store"))
    with image_buffer(store, height=3, width=4) as buffer:
        numbers = [buffer.put(image) for image in images]
        assert numbers == list(range(20))
        for place in (19, 0, 7, 6):
            assert np.array_equal(buffer.get(numbers[place]), images[place])
        buffer.clear()
        assert [buffer.put(image) for image in images[::-1]] == numbers
        for place in (19, 0, 7, 6):
            assert np.array_equal(buffer.get(19 - place), images[place])
    assert list((tmp_path / "store").iterdir()) == []


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    class Full:
        def seek(self, *offset):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: Full())
    monkeypatch.setattr(slsgu_cli.sets.image_buffer, "spare", lambda device: 0)
    with (
        pytest.raises(InputError, match="No space left") as caught,
        image_buffer(Store(str(tmp_path)), height=1, width=1) as buffer,
    ):
        buffer.put(np.zeros((1, 1, 3), dtype=np.uint8))
    assert "--store" in caught.value.hint
