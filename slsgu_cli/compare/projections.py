"""The parameters that project states to features, by their names in open_clip."""

import re

TEXT = re.compile(r"(?:text\.)?text_projection(?:\.weight)?")
VISION = re.compile(r"visual\.(?:proj|head\.proj\.weight)")
