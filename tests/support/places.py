"""Where things lie that many tests take."""

import sys
from pathlib import Path

import slsgu_cli

ROOT = Path(__file__).parents[2]
DEMO = Path(slsgu_cli.__file__).parent / "demo"
# A command that does as img2dataset does, without a network.
FAKE_IMG2DATASET = f"{sys.executable} {Path(__file__).with_name('fake_img2dataset.py')}"
