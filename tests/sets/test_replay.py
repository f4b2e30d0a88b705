from dataclasses import fields, replace

import pytest

from slsgu_cli.cli.app import app
from slsgu_cli.errors import UsageError
from slsgu_cli.records.options import BuildRequest, MetadataSource
from slsgu_cli.records.sets import Concept, ModelSpec, Screening
from slsgu_cli.sets import build
from slsgu_cli.sets.requests import build_command, with_collection

PLAIN = BuildRequest(
    name="mickey", concept="mickey", model=ModelSpec("local-dir:clip"), sources=["a.parquet"]
)
FULL = BuildRequest(
    name="mickey",
    concept="Mickey Mouse",
    model=ModelSpec("ViT-B-32", "openai"),
    sources=["a.parquet?kind=brand&kind=object", "b b.tar"],
    match=["Mickey Mouse", "--mickey"],
    not_match=["mouse pad"],
    regex=True,
    max_forget=7,
    retain_sources=["-c.tar"],
    retain_samples=20,
    retain_exclude=["minnie"],
    evals={"brands": "heldout.parquet?kind=brand", "objects": "o"},
    classes={"brands": "imagenet"},
    templates={"objects": "templates.txt"},
    forget_eval="brands",
    image_column="pixels",
    caption_column="words",
    label_column="name",
    seed=3,
    screening=Screening(min_similarity=0.25, near_duplicates=4),
)


@pytest.mark.parametrize("request_", [PLAIN, FULL], ids=["defaults", "everything"])
def test_the_command_line_makes_the_same_request(request_, monkeypatch):
    asked = []

    def remember(store, request):
        asked.append(request)
        raise UsageError("that will do")

    monkeypatch.setattr(build, "build_sets", remember)
    program, *words = build_command(request_)
    assert program == "slsgu"
    with pytest.raises(SystemExit):
        app([*words, "--quiet"])
    for field in fields(BuildRequest):
        meant, got = getattr(request_, field.name), getattr(asked[0], field.name)
        assert got == (type(got)(meant) if isinstance(meant, list) else meant), field.name


def test_a_command_omits_defaults():
    told = build_command(PLAIN)
    assert told == [
        "slsgu",
        "build-sets",
        "mickey",
        "--model",
        "local-dir:clip",
        "--source",
        "a.parquet",
    ]


def collected(*concepts):
    request = BuildRequest(name="mickey", concept="mickey", model=ModelSpec("m"), sources=())
    source = MetadataSource(metadata=("a.parquet",), url_column="link")
    return with_collection(request, concepts, source)


def test_sets_from_metadata_are_requested_by_it_and_others_by_their_manifest():
    assert build_command(collected()) == [
        "slsgu",
        "build-sets",
        "mickey",
        "--model",
        "m",
        "--metadata",
        "a.parquet",
        "--url-col",
        "link",
    ]
    again = ["slsgu", "build-sets", "mickey", "--replay"]
    assert build_command(collected(Concept("a", ("a",)), Concept("b", ("b",)))) == again
    assert build_command(replace(PLAIN, dropped={"forget": ("key",)})) == again
