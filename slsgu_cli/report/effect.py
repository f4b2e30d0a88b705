"""What the edit did: figures before and after, guesses for single images, cosines."""

from typing import TYPE_CHECKING

from slsgu_cli.naming import known_as
from slsgu_cli.records import Accuracy, EditHeader, SetManifest
from slsgu_cli.report.figures import change, cosine, count, interval, percent
from slsgu_cli.report.gather import Dossier
from slsgu_cli.report.grids import Head, paragraph, table
from slsgu_cli.report.images import cosine_table, example_card
from slsgu_cli.report.markup import Child, Html, element, joined
from slsgu_cli.report.sections import Section, section

if TYPE_CHECKING:
    from slsgu_cli.report.looks import Looks

IMAGES, COSINES = "Single images", "Cosine similarities"


def result(dossier: Dossier) -> Section:
    """Tell in words and figures what the edit did."""
    # An edit carries its figures; only the search's record says that the rows are the same.
    doubt = dossier.trials.trouble and paragraph(
        "These figures are the edit's own, of the time it was made. ",
        dossier.trials.trouble,
        class_="notice",
    )
    return section(
        "Result",
        dossier.edit,
        lambda edit: joined((doubt, _result(edit, dossier.manifest.record))),
    )


def lead(edit: EditHeader) -> Html:
    """Return the result in two sentences; nothing for an edit that was never measured."""
    before, after = edit.baseline_forget, edit.forget
    if before is None or after is None:
        return paragraph("The edit was made by hand: it carries no figures.", class_="lead")
    told: list[Child] = [
        f"Of {count(after.rows)} images of ",
        element("strong", edit.concept),
        f", the model named {percent(before.top1)} rightly before the edit and ",
        element("strong", percent(after.top1)),
        " after it: ",
        "not one of them any more" if after.top1 == 0 else "not all of them are forgotten",
        f". The name was among its first five guesses for {percent(before.top5)} and is for "
        f"{percent(after.top5)}. ",
    ]
    for name, was in sorted((edit.baseline_utility or {}).items()):
        now = (edit.utility or {}).get(name)
        if now is not None:
            told.append(
                f"Accuracy on {name} ({count(now.rows)} other images) went from "
                f"{percent(was.top1)} to {percent(now.top1)}. "
            )
    return paragraph(*told, class_="lead")


def _result(edit: EditHeader, manifest: SetManifest | None) -> Html:
    accuracies = {"": (edit.baseline_forget, edit.forget)}
    for name, was in sorted((edit.baseline_utility or {}).items()):
        accuracies[name] = was, (edit.utility or {}).get(name)
    rows = [
        _row(f"TA@{k} {name}" if name else f"FA@{k}", was, now, attribute)
        for name, (was, now) in accuracies.items()
        for k, attribute in ((1, "top1"), (5, "top5"))
    ]
    heads = (Head("figure", False), Head("original"), Head("edited"), Head("change, points"),
             Head("images"), Head("95% interval, edited"))  # fmt: skip
    held_out = (
        ""
        if manifest is None or manifest.forget_eval
        else "The images that measure FA were also used for the gradient. "
    )
    meaning = paragraph(
        "The search did not reach its goal. " if edit.forgotten is False else None,
        f"The edit was searched for together with those of {', '.join(edit.joint.names)}, and its "
        "figures are those with all of them in place. "
        if edit.joint
        else None,
        "FA: how often images of the concept get its name, first (@1) or among the first five "
        "(@5). TA: the same for everything else. ",
        held_out,
        "The interval says how far the share of ever more such images may lie from the one seen "
        "(Wilson, 95%).",
        class_="quiet",
    )
    caption = f"Accuracy with {known_as(edit.layer)} as it was and as edited"
    return joined((lead(edit), table(heads, rows, caption=caption), meaning))


def _row(
    figure: str, was: Accuracy | None, now: Accuracy | None, attribute: str
) -> tuple[Child, ...]:
    before = None if was is None else getattr(was, attribute)
    after = None if now is None else getattr(now, attribute)
    return (
        figure,
        None if before is None else percent(before),
        None if after is None else percent(after),
        None if before is None or after is None else change(after - before),
        count(was.rows) if was else None,
        interval(getattr(now, attribute), now.rows) if now and now.rows else None,
    )


def examples(looks: "Looks") -> Section:
    """Show single images with the names they got before and after."""
    concept = looks.names[0]
    cards = [
        example_card(example, concept=concept, number=number)
        for number, example in enumerate(looks.examples, start=1)
    ]
    intro = paragraph(
        f"The first images of {concept}, and of other names with many images, in the order of the "
        "evaluation set: none was picked for how it came out. The five names the model finds "
        "most probable, the right one in bold."
    )
    return Section(IMAGES, joined((intro, element("div", *cards, class_="examples"))))


def cosines(looks: "Looks") -> Section:
    """Show how near images and names are, before and after."""
    span = (
        float(min(looks.before.min(), looks.after.min())),
        float(max(looks.before.max(), looks.after.max())),
    )
    tables = [
        cosine_table(values, looks.names, looks.thumbnails, span=span, caption=caption)
        for values, caption in ((looks.before, "Before"), (looks.after, "After"))
    ]
    concept = looks.names[0]
    was, now = (cosine(float(values[0, 0])) for values in (looks.before, looks.after))
    few, many = count(min(looks.images)), count(max(looks.images))
    intro = paragraph(
        "Mean cosine similarity of a name's images (rows) with each name (columns); the "
        f"stronger the tint, the nearer. Images of {concept} and its name: {was} before, "
        f"{now} after. {few if few == many else f'{few} to {many}'} images a row."
    )
    return Section(COSINES, joined((intro, *tables)))
