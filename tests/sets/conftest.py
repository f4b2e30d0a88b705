import pytest
from places import DEMO

from slsgu_cli.clip import models
from slsgu_cli.records.sets import ModelSpec


@pytest.fixture(scope="module")
def one_tokenizer():
    """Load the embedded model's vocabulary once for all builds of a file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        tokenize = models.tokenizer(models.resolve(ModelSpec(f"local-dir:{DEMO / 'clip'}")))
        patch.setattr(models, "tokenizer", lambda model: tokenize)
        yield
