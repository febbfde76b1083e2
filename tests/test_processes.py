"""Children of tests start at once: forked, with all that they need imported."""

import sys

from support import undrawn
from support.processes import exit_code

from pipeline.training import page


def _imported() -> None:
    assert page.drawn is undrawn.nothing
    assert {"torch._dynamo", "sklearn.datasets", "jinja2"} <= sys.modules.keys()
    assert not any(name.startswith("matplotlib") for name in sys.modules)


def test_children_have_what_they_need_and_draw_no_plots():
    assert exit_code(_imported) == 0
