import io
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from slsgu_cli.errors import InputError
from slsgu_cli.figures import curves, pictures, style
from slsgu_cli.figures.curves import pareto_plot, step_plot
from slsgu_cli.figures.pictures import Example, before_after_plot, cosine_plot
from slsgu_cli.figures.style import VERMILION, png
from slsgu_cli.records.directions import FALLBACK, Direction
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Criterion, LayerScore, Precision, Tower, Trial, Trials

LAYER = "visual.transformer.resblocks.11.attn.out_proj.weight"

pytestmark = pytest.mark.usefixtures("drawing")


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that become PNG bytes, to look at what is in them."""
    figures = []

    def keep(figure, **options):
        figures.append(figure)
        return png(figure, **options)

    monkeypatch.setattr(curves, "png", keep)
    monkeypatch.setattr(pictures, "png", keep)
    return figures


def score(layer, alignment, importance, front, tower=Tower.VISION):
    return LayerScore(layer, tower, (4,), importance, alignment, 1.0, 1.0, 1.0, front)


SCORES = [
    score("visual.proj", 0.01, 0.1, True),
    score(LAYER, 0.001, 0.02, True),
    score("visual.conv1.weight", 0.1, 0.01, False),
    score("visual.ln_post.weight", 0.2, 0.02, False),
    score("text_projection", 0.2, 0.02, True, Tower.TEXT),
]


def trials(figures):
    return Trials(
        name="facebook",
        forget="f",
        model_fingerprint="m",
        evals={},
        precision=Precision.FP32,
        directions=(Direction.GRADIENT,),
        retain_data=None,
        criterion=Criterion.FA1,
        margin=None,
        baseline_forget=Accuracy(95.0, 100.0, 30),
        baseline_utility={"brands": Accuracy(62.0, 90.0, 1000), "objects": Accuracy(55.0, 80.0, 9)},
        trials=tuple(
            Trial(
                LAYER,
                Tower.VISION,
                FALLBACK,
                step,
                step * 0.02,
                Accuracy(fa, fa, 30),
                0.0,
                None
                if ta is None
                else {"brands": Accuracy(ta, 1, 9), "objects": Accuracy(50, 1, 9)},
            )
            for step, fa, ta in figures
        ),
        version="0.1.0",
    )


def size(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return image.size


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(figure):
    """Return the texts that are really drawn; ticks keep others beyond the axes."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        draw = Text.draw
        patch.setattr(Text, "draw", lambda self, *a, **k: (seen.append(self), draw(self, *a, **k)))
        figure.canvas.draw()
    return [text for text in seen if text.get_visible() and text.get_text().strip()]


def assert_readable(figure, *, inside=True):
    """No two texts overlap and, unless the figure grows to fit, none is cut."""
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in texts(figure)
        if text.get_rotation() != 45
    ]
    for (one, a), (two, b) in combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        up = min(a.y1, b.y1) - max(a.y0, b.y0)
        # The boxes count room for descenders, so neighbouring lines may touch.
        assert across <= 0 or up <= 3, (one, two)
    for one, box in boxes:
        fits = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert fits or not inside, one


def test_pareto_names_the_front_of_its_tower_and_crosses_the_rest(drawn):
    width, height = size(pareto_plot(SCORES, tower=Tower.VISION, title="facebook"))
    assert width > height > 400
    (figure,) = drawn
    assert legend(figure) == ["visual.proj", "visual.11.attn.out_proj", "2 other layers"]
    points = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[0].collections}
    assert points["visual.proj"] == [[0.01, 0.1]]
    assert sorted(points["2 other layers"]) == [[0.1, 0.01], [0.2, 0.02]]
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("log", "log")


def test_pareto_front_layers_differ_in_colour_or_marker(drawn):
    many = [score(f"visual.layer{k}.weight", 0.1 / k, 0.1 / k, True) for k in range(1, 25)]
    pareto_plot(many, tower=Tower.VISION, title="many")
    marks = [
        (to_hex(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes())
        for c in drawn[0].axes[0].collections
    ]
    assert len(set(marks)) == len(marks) == 24
    assert_readable(drawn[0])


def test_pareto_draws_zeros(drawn):
    zeros = [*SCORES, score("visual.a", 0.0, 0.5, True), score("visual.b", 0.3, 0.0, False)]
    pareto_plot(zeros, tower=Tower.VISION, title="zeros")
    axes = drawn[0].axes[0]
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert points["visual.a"] == [[0.0, 0.5]]
    assert [0.3, 0.0] in points["3 other layers"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "symlog")
    assert_readable(drawn[0])


def test_pareto_keeps_the_sign_of_signed_alignments(drawn):
    signed = [*SCORES, score("visual.a", -0.03, 0.5, True)]
    pareto_plot(signed, tower=Tower.VISION, title="signed")
    axes = drawn[0].axes[0]
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert points["visual.a"] == [[-0.03, 0.5]]
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlim()[0] < -0.03
    assert_readable(drawn[0])


def test_pareto_plot_with_zero_alignments():
    flat = [score(f"visual.{k}", 0.0, 0.0, True) for k in range(3)]
    assert size(pareto_plot(flat, tower=Tower.VISION, title="flat"))


def test_pareto_without_a_layer_of_the_tower_is_an_input_error():
    with pytest.raises(InputError, match="no layer of the text tower"):
        pareto_plot(SCORES[:2], tower=Tower.TEXT, title="none")


def test_steps_start_at_the_original_model_and_skip_missing_accuracies(drawn):
    search = trials([(10, 0, 60.0), (5, 40, None), (7.5, 0, 61.0)])
    step_plot(search, move=(LAYER, FALLBACK), chosen=7.5)
    axes, above = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["FA@1"] == [[0, 95], [5, 40], [7.5, 0], [10, 0]]
    assert lines["TA@1 brands"] == [[0, 62], [7.5, 61], [10, 60]]
    assert [x for x, _ in lines["chosen step 7.5"]] == [7.5, 7.5]
    assert legend(drawn[0])[:2] == ["FA@1", "FA@5"]
    percent = np.array(above.get_xlim()) / np.array([1, axes.get_xlim()[1]])
    assert percent.tolist() == pytest.approx([0, 2.0])
    assert_readable(drawn[0])


def test_the_step_axes_agree_after_doubling_only(drawn):
    search = trials([(5.0 * 2**k, 90, None) for k in range(10)])
    step_plot(search, move=(LAYER, FALLBACK))
    axes, above = drawn[0].axes
    for step in (0, 3, 5, 640, 2560):
        below = axes.transData.transform((step, 0))[0]
        assert above.transData.transform((2 * step, 0))[0] == pytest.approx(below, abs=0.01)
    assert not [line for line in axes.lines if "chosen" in str(line.get_label())]
    assert_readable(drawn[0])


def test_a_layer_without_trials_is_an_input_error():
    with pytest.raises(InputError, match=r"did not try the layer visual\.proj"):
        step_plot(trials([(5, 0, 60)]), move=("visual.proj", FALLBACK))


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("thumbnails", [True, False])
def test_cosine_maps_mark_the_forgotten_name(drawn, after, thumbnails):
    generator = np.random.default_rng(0)
    names = ["facebook", "a $5 name", "youtube", "a rather long name of a thing"]
    before = generator.uniform(0, 0.4, (4, 4))
    later = before * 0.5 if after else None
    images = generator.integers(0, 256, (4, 32, 32, 3), np.uint8) if thumbnails else None
    size(cosine_plot(before, later, names, forgotten=["facebook"], thumbnails=images))
    figure = drawn[0]
    maps = [axes for axes in figure.axes if axes.texts]
    assert len(maps) == 1 + after
    for axes, values in zip(maps, (before, later), strict=False):
        shown = [float(text.get_text()) for text in axes.texts]
        np.testing.assert_allclose(shown, values.ravel(), atol=0.005)
        assert axes.images[0].get_clim() == (
            min(before.min(), 1 if later is None else later.min()),
            before.max(),
        )
        assert [patch.get_xy() for patch in axes.patches] == [(-0.5, -0.5)]
        colours = [to_hex(label.get_color()) for label in axes.get_xticklabels()]
        assert [colour == VERMILION.lower() for colour in colours] == [True, False, False, False]
    shown = [len(axes.images) for axes in figure.axes if axes.images and axes not in maps]
    assert shown == (1 + after) * thumbnails * [4]
    assert_readable(figure, inside=False)


def test_thumbnails_stand_at_the_height_of_their_rows(drawn):
    images = np.stack([np.full((8, 8, 3), 40 * row, np.uint8) for row in range(3)])
    cosine_plot(np.eye(3), np.eye(3), list("abc"), forgotten=["b"], thumbnails=images)
    figure = drawn[0]
    maps = [axes for axes in figure.axes if axes.texts]
    thumbnails = [image for axes in figure.axes if axes not in maps for image in axes.images]
    assert len(thumbnails) == 2 * 3
    for image in thumbnails:
        row = int(image.get_array()[0, 0, 0]) // 40
        middle = np.mean(
            image.axes.transData.transform([(0, y) for y in image.get_extent()[2:]])[:, 1]
        )
        assert maps[0].transData.transform((0, row))[1] == pytest.approx(middle, abs=1)


def test_a_large_cosine_map_is_not_annotated(drawn):
    names = [f"class {k}" for k in range(40)]
    width, _ = size(cosine_plot(np.eye(40), None, names, forgotten=["class 3"]))
    assert width < 3000
    assert not any(axes.texts for axes in drawn[0].axes)


EXAMPLE = Example(
    np.zeros((64, 64, 3), np.uint8),
    "facebook",
    (("facebook", 0.93), ("letter f", 0.03), ("flipboard", 0.02), ("figma", 0.01), ("a", 0.0)),
    (("a name that is too long for its place", 0.4), ("b", 0.2), ("c", 0.1), ("d", 0.1), ("e", 0)),
)


def test_before_after_draws_every_guess_of_every_example(drawn):
    other = Example(np.zeros((20, 20), np.uint8), "$ sign", (("$ sign", 1.0),), (("$ sign", 0.5),))
    before_after_plot([EXAMPLE, other, EXAMPLE], concept="facebook")
    figure = drawn[0]
    lengths = [
        [patch.get_width() for patch in axes.patches][1::2] for axes in figure.axes if axes.patches
    ]
    assert lengths == [
        [p for _, p in EXAMPLE.before],
        [1.0],
        [p for _, p in EXAMPLE.before],
        [p for _, p in EXAMPLE.after],
        [0.5],
        [p for _, p in EXAMPLE.after],
    ]
    assert "93.0%" in [text.get_text() for text in texts(figure)]
    assert_readable(figure)


def test_only_the_forgotten_concept_is_in_the_forget_colour(drawn):
    other = Example(EXAMPLE.image, "figma", EXAMPLE.before, EXAMPLE.after)
    before_after_plot([EXAMPLE, other], concept="facebook")
    coloured = [
        text.get_text() for text in texts(drawn[0]) if to_hex(text.get_color()) == VERMILION.lower()
    ]
    assert sorted(coloured) == ["93.0%", "facebook", "facebook"]


def test_a_figure_is_the_same_bytes_each_time():
    one, two = (step_plot(trials([(5, 0, 60)]), move=(LAYER, FALLBACK)) for _ in range(2))
    assert one == two


def test_drawing_leaves_pyplot_alone_and_stdout_clean():
    code = (
        "import sys\n"
        "from slsgu_cli.figures.curves import pareto_plot\n"
        "from slsgu_cli.records.method import LayerScore, Tower\n"
        "score = LayerScore('visual.proj', Tower.VISION, (2,), .1, .1, 1., 1., 1., True)\n"
        "assert pareto_plot([score], tower=Tower.VISION, title='t').startswith(b'\\x89PNG')\n"
        "sys.exit(any(name in sys.modules for name in ('matplotlib.pyplot', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("fonts", [[], ["SimHei"]])
def test_chinese_names_are_drawn_or_a_missing_font_is_reported_once(
    fonts, listener, monkeypatch, recwarn
):
    monkeypatch.setattr(style.fontManager, "get_font_names", lambda: ["DejaVu Sans", *fonts])
    style._cjk_fonts.cache_clear()
    for title in ("a name", "\u84dd\u8272", "\u7ea2\u8272"):
        figure = style.blank(2, 1)
        text = figure.text(0.5, 0.5, title)
        png(figure)
        assert text.get_fontfamily() == ["sans-serif", *([] if title.isascii() else fonts)]
    style._cjk_fonts.cache_clear()
    assert not recwarn.list
    assert len(listener.heard) == (not fonts)
