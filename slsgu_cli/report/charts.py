"""Charts of the page: matplotlib figures as inline SVG that follows the page's colours."""

import hashlib
import re
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.figure import Figure

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.figures.curves import draw_layers, draw_steps, draw_training
from slsgu_cli.figures.style import FAINT, INK, MUTED, PALE, blank, svg
from slsgu_cli.records.method import LayerScore, Move, Trials
from slsgu_cli.records.verification import Check, VerifiedModel

SIZE = (5.0, 3.6)
# The greys of figures, and the variables of the page's style that replace them.
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    PALE: "var(--rule)",
    FAINT: "var(--faint)",
    "#ffffff": "var(--paper)",
}


def front_chart(scores: Sequence[LayerScore], title: str) -> Markup:
    """Draw importance against alignment; layers on the front have the numbers of the table."""
    figure = blank(*SIZE)
    axes = figure.add_subplot()
    for number, point in enumerate(draw_layers(axes, scores), start=1):
        axes.annotate(
            str(number), point, (6, 4), textcoords="offset points", color=INK, weight="bold"
        )
    # The page's caption and text say the rest.
    axes.set_xlabel("alignment (less is better)")
    axes.set_ylabel("importance (more is better)")
    figure.subplots_adjust(left=0.15, right=0.97, top=0.97, bottom=0.14)
    front = [known_as(score.layer) for score in scores if score.front]
    numbered = ", ".join(f"{number} {name}" for number, name in enumerate(front, start=1))
    return _inline(
        figure,
        f"Importance against alignment of the {len(scores)} layers of the {title}. "
        f"On the Pareto front, as in the table: {numbered}",
    )


def step_chart(trials: Trials, move: Move, *, chosen: float | None = None) -> Markup:
    """Draw all accuracies against the step along one move."""
    figure = blank(*SIZE)
    axes = figure.add_subplot()
    draw_steps(axes, trials, move, chosen=chosen, size=4)
    axes.set_ylabel("accuracy, %", color=INK)
    _add_legend(figure, top=0.85)
    description = (
        f"Forget accuracy and retained accuracy of {trials.name} against the step along "
        f"{known_as(move[0])}; the tables have the numbers"
    )
    return _inline(figure, description)


def training_chart(models: Sequence[VerifiedModel], check: Check, description: str) -> Markup:
    """Draw the forget accuracy of models against the steps of further training."""
    figure = blank(*SIZE)
    axes = figure.add_subplot()
    draw_training(axes, models, check)
    axes.set_ylabel("FA@1, %", color=INK)
    _add_legend(figure, top=0.96)
    return _inline(figure, description)


def _add_legend(figure: Figure, *, top: float) -> None:
    """Put a legend with two columns below the axes, and leave room for it."""
    labels = len(figure.axes[0].get_legend_handles_labels()[1])
    figure.legend(loc="lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    bottom = 0.17 + 0.058 * -(-labels // 2)
    figure.subplots_adjust(left=0.13, right=0.97, top=top, bottom=bottom)


def _inline(figure: Figure, description: str) -> Markup:
    """Return a figure for the page. `description` is for readers who do not see it."""
    drawn = svg(figure)
    drawn = drawn[drawn.index("<svg") :]
    for grey, variable in VARIABLES.items():
        drawn = drawn.replace(grey, variable)
    # A page has many charts, so ids get a prefix. Only those in use are kept.
    prefix = hashlib.sha256(f"{description}{drawn}".encode()).hexdigest()[:12]
    used = {*re.findall(r'(?:href="|url\()#([\w.-]+)', drawn)}
    drawn = re.sub(
        r' id="([\w.-]+)"', lambda m: f' id="c{prefix}-{m[1]}"' if m[1] in used else "", drawn
    )
    drawn = re.sub(r'(href="|url\()#', rf"\g<1>#c{prefix}-", drawn)
    head = Markup('<svg role="img" aria-label="{}" ').format(description)
    return head + Markup(drawn.removeprefix("<svg "))
