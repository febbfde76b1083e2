"""How many views pay, by what was measured: docs/choosing.md has the curve and what it cannot tell."""

EPOCHS = 16
"""Of the students there, and so how many views "one per epoch" is."""
VIEWS = {
    1: (0.43, -0.38, 1.23),
    2: (0.61, 0.31, 0.91),
    4: (0.21, 0.09, 0.33),
    8: (0.12, 0.02, 0.23),
}
"""Views -> points of accuracy, less those of one view per epoch: mean, and the ends of its 95 % interval."""


def on_views(views: int, epochs: int | None = None) -> str:
    """The line for a job of so many views, whose students take so many epochs if that is known."""
    count = max(count for count in VIEWS if count <= views)
    mean, low, high = (f"{value:+.2f}" for value in VIEWS[count])
    line = (
        f"{count} view{'s' * (count > 1)} for {EPOCHS} epochs made {mean} points ({low} to {high}) against one per "
        f"epoch in our tests, at {count / EPOCHS:.0%} of its cost (docs/choosing.md)"
    )
    unseen = 0 if epochs is None else max(views - epochs, 0)
    return f"{unseen:,} of the views are seen by no student of {epochs:,} epochs; {line}" if unseen else line
