"""The figure of a verification: forget accuracy while models are trained further."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from slsgu_cli.canvas import INK, MARKERS, MUTED, SERIES, VERMILION, blank, dress, plain, png
from slsgu_cli.plots import TITLE
from slsgu_cli.verification.records import Check, Subject
from slsgu_cli.verification.relearn import NEW

# The original, the first edit, and what else is compared.
COLOURS = (INK, VERMILION, *SERIES)
PANELS = {
    Check.FINETUNE: "trained on the retain set",
    Check.RELEARN: "trained on images of the concept too",
}


def relearning_plot(subjects: Sequence[Subject], *, concept: str) -> bytes:
    """Draw FA@1 against training steps, a line a model; the original stands first."""
    ran = {finding.check for subject in subjects for finding in subject.findings}
    panels = [check for check in PANELS if check in ran]
    figure = blank(5.2 * len(panels), 4.4, layout="constrained")
    for place, check in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        dress(axes)
        _draw(axes, subjects, check)
        axes.set_title(PANELS[check], loc="left", **TITLE)
        axes.set_xlabel("training steps", color=INK)
        axes.set_ylim(-2, 103)
        if place == 0:
            axes.set_ylabel(f"FA@1, {plain(concept, 30)}, %", color=INK)
    # The last panel has every line there is.
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return png(figure)


def _draw(axes: Axes, subjects: Sequence[Subject], check: Check) -> None:
    """Draw every curve of a check: the original's dashed, a new name's in grey."""
    for place, subject in enumerate(subjects):
        finding = subject.finding(check)
        for curve in finding.curves if finding else ():
            new = curve.name == NEW
            axes.plot(
                [point.step for point in curve.points],
                [point.forget.top1 for point in curve.points],
                f"{MARKERS[place % len(MARKERS)]}{'-' if place else '--'}",
                color=MUTED if new else COLOURS[place % len(COLOURS)],
                linewidth=2,
                markersize=5,
                clip_on=False,
                label=plain(f"{subject.label}, a new name" if new else subject.label, 40),
            )
