"""COCO's captions: a JSON file of images and of annotations, several for an image."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slsgu_cli.errors import InputError
from slsgu_cli.sources.text_table import Listing, Record

# The images of annotations/captions_val2017.json are in val2017, as COCO is unpacked.
IMAGE_FOLDERS = {r"captions_(\w+)\.json": ("../{}", "../images/{}", "{}", "images/{}")}


def captions(content: Mapping[str, Any]) -> Listing | None:
    """Return columns and rows of COCO's captions; None if the content is something else.

    The rows raise InputError for a malformed image or annotation.
    """
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return None
    return ("image", "caption", "key"), _rows(images, annotations)


def _rows(images: Sequence[Any], annotations: Sequence[Any]) -> Iterator[Record]:
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
