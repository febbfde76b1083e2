"""Tables and plots of `bench.claims.suite`."""

from pathlib import Path

from bench import harness
from bench.claims.studies import STUDIES
from pipeline.system.terminal import console_out

MEASURES = {"top1": ("", "top-1 of the student, %"), "kl": ("-KL", "KL(teacher ‖ student), nats")}
"""What students are compared by: what the names of its tables end in, and what it is."""


def show(found: dict) -> None:
    """Print the tables of a document."""
    options, tables = found["options"], found["tables"]
    seeds = options["seeds"]
    console_out.print(
        f"{options['teacher']} → {options['student']}, {options['samples']:,} samples, {options['val_samples']:,} to "
        f"validate on, {options['epochs']} epochs; {found['date']}, commit {found['commit'] or 'none'}",
        highlight=False,
    )
    for name, rows in tables.items():
        if name in ("teachers", "stores"):
            harness.show_table(name, rows)
            continue
        by_kl = name.removesuffix(": differences").endswith(MEASURES["kl"][0])
        unit, measure, digits = ("nats", "KL(teacher ‖ student)", 4) if by_kl else ("points", "top-1 %", 2)
        if "comparison" in rows[0]:
            shown = [
                {
                    "comparison": row["comparison"],
                    unit: f"{row['mean']:+.{digits}f}{_spread(row['se'], digits)}",
                    "95 %": ""
                    if row["interval"] is None
                    else " … ".join(f"{end:+.{digits}f}" for end in row["interval"]),
                    "p": f"{row['p']:.3f}",
                    "n": len(row["seeds"]),
                }
                for row in rows
            ]
            harness.show_table(f"{name}, paired over seeds, ± se", shown)
        else:
            shown = [
                {
                    "setting": row["setting"],
                    measure: f"{row['mean']:.{digits}f}{_spread(row['sd'], digits)}",
                    "min – max": f"{min(row['seeds']):.{digits}f} – {max(row['seeds']):.{digits}f}",
                    "n": len(row["seeds"]),
                }
                for row in rows
            ]
            harness.show_table(f"{name}, ± sd", shown)
    count = sum(len(rows) for name, rows in tables.items() if name.endswith(": differences"))
    console_out.print(
        f"p of the exact sign-flip test: with {seeds} seeds at least {2.0 ** (1 - seeds):.2g}; {count} comparisons, "
        "not corrected for their number",
        highlight=False,
    )


def _spread(value: float | None, digits: int) -> str:
    return "" if value is None else f" ± {value:.{digits}f}"


def plot(found: dict, out: Path) -> None:
    """A picture per study that was run and measure, means with standard deviations: OUT/STUDY.png and .svg."""
    out.mkdir(parents=True, exist_ok=True)
    for name in STUDIES:
        for measure, (suffix, _) in MEASURES.items():
            if name + suffix in found["tables"]:
                figure = _figure(found, name, measure)
                for kind in ("png", "svg"):
                    figure.savefig(out / f"{name}{suffix}.{kind}", dpi=150)


def _figure(found: dict, name: str, measure: str):
    from matplotlib.figure import Figure

    title = MEASURES[measure][1]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [found["arms"][row["setting"]] | {"name": row["setting"]} for row in found["tables"][name]]
    if name == "fraction":
        # Both losses start from the student of originals alone.
        for loss in ("kd", "ccd"):
            _curve(axes, [row for row in rows if row["loss"] == loss or not row["fraction"]], measure, "fraction", loss)
        axes.set_xlabel("augmented views among those seen, %")
    elif name == "few-shot":
        for row in rows:
            row["curve"] = row["loss"] if row["fraction"] else f"{row['loss']}, originals alone"
        for curve in dict.fromkeys(row["curve"] for row in rows):
            _curve(axes, [row for row in rows if row["curve"] == curve], measure, "share", curve)
        axes.set_xlabel("training samples used, %")
    elif name in ("views", "temperature"):
        for row in rows:
            row["views"] = row["views"] or found["options"]["epochs"]
        for loss in dict.fromkeys(row["loss"] for row in rows):
            _curve(axes, [row for row in rows if row["loss"] == loss], measure, name, loss, 1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("views of each sample" if name == "views" else "temperature")
    else:
        labels = [row["name"] for row in rows]
        values, sd = ([row[measure][key] or 0 for row in rows] for key in ("mean", "sd"))
        axes.barh(labels, values, xerr=sd, capsize=2, height=0.7, color="tab:blue", alpha=0.6)
        for at, row in enumerate(rows):
            axes.plot(row[measure]["seeds"], [at] * len(row[measure]["seeds"]), "k.", markersize=4)
        every = [value for row in rows for value in row[measure]["seeds"]]
        margin = max(max(every) - min(every), 0.5) / 4
        axes.set_xlim(max(min(every) - margin, 0), min(max(every) + margin, 100))
        axes.invert_yaxis()
        axes.set_xlabel(f"{title}; dots: seeds")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
        axes.set_ylabel(f"{title}, ± sd")
        axes.grid(alpha=0.3)
    return figure


def _curve(axes, rows: list[dict], measure: str, along: str, label: str, unit: float = 100) -> None:
    x = [unit * row[along] for row in rows]
    axes.errorbar(
        x,
        [row[measure]["mean"] for row in rows],
        [row[measure]["sd"] or 0 for row in rows],
        fmt="o-",
        markersize=4,
        capsize=2,
        label=label,
    )
