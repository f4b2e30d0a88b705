"""JSON files that are read whole: a list of objects, or COCO's captions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources.text_table import (
    NO_OBJECT,
    Listing,
    Record,
    TextTable,
    self_describing,
)

SIZE_LIMIT = 1 << 28
# The images of annotations/captions_val2017.json are in val2017, as COCO is unpacked.
IMAGE_FOLDERS = {r"captions_(\w+)\.json": ("../{}", "../images/{}", "{}", "images/{}")}


@dataclass(frozen=True, slots=True)
class JsonListSource(TextTable):
    """A JSON list of records, or the captions of COCO."""

    description: ClassVar[str] = "JSON lists of records or COCO captions"
    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    image_folders: ClassVar[Mapping[str, Sequence[str]]] = IMAGE_FOLDERS

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
        images, annotations = content.get("images"), content.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return ("image", "caption", "key"), _coco_rows(images, annotations)
        fields = ", ".join(content) or "no fields"
        raise InputError(
            f"{self.path} is neither a list of records nor COCO captions: it has {fields}",
            hint="COCO's captions are in annotations/captions_*.json",
        )


def _coco_rows(images: Sequence[Any], annotations: Sequence[Any]) -> Iterator[Record]:
    try:
        files = {image["id"]: str(image["file_name"]) for image in images}
        for note in annotations:
            file = files.get(note["image_id"])
            key = f"{(file or '').rsplit('.', 1)[0]}:{note['id']}"
            yield {"image": file, "caption": note.get("caption"), "key": key}
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"an image or annotation does not have COCO's format: {error!r}",
            hint="images have id and file_name, annotations id, image_id and caption",
        ) from error
