"""Parts of the HTML pages.

A page stands alone: pictures and plots are inlined, nothing is loaded and no script runs. All of its text comes from
files that are not trusted, and is escaped.
"""

import io
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from cache import UserError

GREY, BLUE = "#7f7f7f", "#4c78a8"  # of plots; the grey becomes the colour of the page's text
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin:2rem 0 .5rem;border-bottom:1px solid #8884}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.15rem .7rem .15rem 0}
th{font-weight:600}td.n,th.n{text-align:right}
.scroll{overflow-x:auto;overflow-wrap:normal}small,figcaption,caption,.note{opacity:.7;font-size:.85em}
ol,dl{margin:0}ol{padding-left:1.6rem}dt{opacity:.7}dd{margin:0 0 .2rem 1rem}
.pairs,.plots{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
article,.plots figure{border:1px solid #8884;border-radius:.5rem;padding:.7rem;margin:0;min-width:0}
article h3{font-size:1rem;margin:0}.two{display:grid;grid-template-columns:1fr 1fr;gap:.6rem}
.two figure{margin:.4rem 0}.two table{width:100%}.two td{padding-right:.3rem}
img{width:100%;max-width:14rem;display:block}img.small{image-rendering:pixelated}
caption{text-align:left}tr.label td{font-weight:700}svg{max-width:100%;height:auto}
"""


def document(title: str, about: str, sections: dict[str, str]) -> bytes:
    """A whole page, UTF-8: `title` and `about` are text, `sections` HTML by heading; lone surrogates are spelt out."""
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>\n" for heading, content in sections.items())
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1><p>{escape(about)}</p>
{body}</body></html>
"""
    return page.encode(errors="backslashreplace")


def svg(name: str, draw: Callable[[Any], None], below: str, beside: str) -> str:
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
    return text[text.index("<svg") :].replace(GREY, "currentColor")


def note(text: str) -> str:
    """A paragraph in small print; `text` is escaped."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Iterable, rows: Iterable[Iterable]) -> str:
    """Cells are shown by `str` and escaped."""
    first = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    others = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{first}</tr>{others}</table></div>'
