"""HTML pages from templates, which lie beside the code that fills them.

A page stands alone: pictures and plots are inlined, nothing is loaded and no script runs. All of its text comes from
files that are not trusted, and is escaped.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cache import UserError

GREY, BLUE = "#7f7f7f", "#4c78a8"  # of plots; the grey becomes the colour of the page's text


def document(template: str, **values: object) -> bytes:
    """A whole page, UTF-8, of a template by its path from where the packages lie; lone surrogates are spelt out.

    Templates extend `pipeline/system/page.html`, which asks for a `title` and the line `about` below it.
    """
    return _templates().get_template(template).render(values).encode(errors="backslashreplace")


@functools.cache
def _templates() -> Any:
    import jinja2  # a tenth of a second that no other command need wait for

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[2]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def svg(name: str, draw: Callable[[Any], None], below: str, beside: str) -> Markup:
    """A plot that `draw` puts on matplotlib axes, with its two labels, in the colours of the page.

    `name` makes its ids differ from those of the page's other plots. Raises UserError without matplotlib.
    """
    try:
        import matplotlib  # a second that no other command need wait for
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        raise UserError("plots need matplotlib", found="none installed", fix="pip install matplotlib") from None
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, **dict.fromkeys(colours, GREY)}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4, 2.6))
        axes: Any = figure.add_axes((0.15, 0.17, 0.82, 0.72))  # a layout engine would take as long as all the drawing
        draw(axes)
        axes.set(xlabel=below, ylabel=beside)
        axes.spines[["top", "right"]].set_visible(False)
        for along, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if type(axis.get_major_formatter()) is ScalarFormatter:  # neither names nor powers of ten
                axes.locator_params(along, nbins=6)
                axes.ticklabel_format(axis=along, useOffset=False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return Markup(text[text.index("<svg") :].replace(GREY, "currentColor"))  # matplotlib has escaped its texts
