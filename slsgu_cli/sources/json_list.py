"""JSON files that are read whole: a list of objects, or COCO's captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources import coco
from slsgu_cli.sources.text_table import NO_OBJECT, Listing, TextTable, self_describing

SIZE_LIMIT = 1 << 28


@dataclass(frozen=True, slots=True)
class JsonListSource(TextTable):
    """A JSON list of records, or the captions of COCO."""

    description: ClassVar[str] = "JSON lists of records or COCO captions"
    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    image_folders: ClassVar[Mapping[str, Sequence[str]]] = coco.IMAGE_FOLDERS

    def listing(self, file: Any) -> Listing:
        """Return the columns and the rows. Raises InputError."""
        text = file.read(SIZE_LIMIT + 1)
        if len(text) > SIZE_LIMIT:
            raise InputError(
                f"{self.path} has more than {SIZE_LIMIT:,} characters",
                hint="convert it to JSON lines",
            )
        try:
            value = parse_json(text)
        except ValueError as error:
            raise InputError(f"{self.path} cannot be read as JSON: {error}") from error
        if isinstance(value, list):
            return self_describing(row if isinstance(row, dict) else NO_OBJECT for row in value)
        content = value if isinstance(value, dict) else {}
        if (listing := coco.captions(content)) is not None:
            return listing
        fields = ", ".join(content) or "no fields"
        raise InputError(
            f"{self.path} is neither a list of records nor COCO captions: it has {fields}",
            hint="COCO's captions are in annotations/captions_*.json",
        )
