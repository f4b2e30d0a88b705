"""Figures that are not drawn: drawing takes longer than a tiny model's search."""


def undrawn(figure, file, *, format, **options):
    """Write a stand-in for the drawn figure; it replaces `Figure.savefig`."""
    width, height = figure.get_size_inches()
    text = f"a figure of {width:g} x {height:g} inches that was not drawn"
    file.write((f"<svg ><text>{text}</text></svg>" if format == "svg" else text).encode())
