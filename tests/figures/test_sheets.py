import io

import numpy as np
from PIL import Image

from slsgu_cli.figures.sheets import (
    AnsweredImage,
    Strip,
    Tile,
    answers_png,
    sheet_html,
    sheet_png,
)
from slsgu_cli.records.targets import Answer
from slsgu_cli.targets.models import encoded

RED, BLUE = (encoded(Image.new("RGB", (32, 32), colour)) for colour in ("red", "blue"))
STRIPS = [
    Strip("an icon of <b>", True, {"first": [Tile(RED, "rose")] * 3, "second": [Tile(BLUE)] * 3}),
    Strip("a star", False, {"first": [Tile(RED)], "second": [Tile(BLUE)]}),
]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)


def count(png, colour):
    return int((pixels(png) == colour).all(axis=1).sum())


def test_every_image_is_on_the_sheet_at_one_size():
    sheet = sheet_png("title", STRIPS)
    assert count(sheet, (255, 0, 0)) == count(sheet, (0, 0, 255)) == 4 * 96 * 96


def test_the_page_contains_its_images_and_escapes_prompts():
    page = sheet_html("title", ["a note"], STRIPS)
    assert page.count("data:image/png;base64,") == 8
    assert "&lt;b&gt;" in page and "<b>an" not in page and "http" not in page
    assert page.count("rose") == 3


def test_answers_are_drawn_next_to_their_image():
    answers = [Answer("x", "What is it?", "a star", "a sun"), Answer("x", "A logo?", "no", "no")]
    one = answers_png("title", [AnsweredImage(RED, True, answers)])
    more = AnsweredImage(BLUE, False, answers[:1])
    two = answers_png("title", [AnsweredImage(RED, True, answers), more])
    assert count(one, (255, 0, 0)) == count(two, (255, 0, 0)) == 96 * 96
    assert count(two, (0, 0, 255)) == 96 * 96
