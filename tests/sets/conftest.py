import pytest
from places import DEMO

from slsgu_cli.clip import models, tokenizers
from slsgu_cli.records.sets import ModelSpec


@pytest.fixture(scope="module")
def one_tokenizer():
    """Load the embedded model's vocabulary once for all builds of a file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        tokenize = tokenizers.tokenizer(models.resolve(ModelSpec(f"local-dir:{DEMO / 'clip'}")))
        patch.setattr(tokenizers, "tokenizer", lambda model: tokenize)
        yield
