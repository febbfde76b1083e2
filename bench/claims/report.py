"""Tables and plots of `bench.claims.suite`."""

from pathlib import Path

from bench import harness
from bench.claims.studies import STUDIES
from pipeline.system.terminal import console_out


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
        if "comparison" in rows[0]:
            shown = [
                {
                    "comparison": row["comparison"],
                    "points": f"{row['mean']:+.2f}{_spread(row['se'])}",
                    "95 %": "" if row["interval"] is None else "{:+.2f} … {:+.2f}".format(*row["interval"]),
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
                    "top-1 %": f"{row['mean']:.2f}{_spread(row['sd'])}",
                    "min – max": f"{min(row['seeds']):.2f} – {max(row['seeds']):.2f}",
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


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def plot(found: dict, out: Path) -> None:
    """A picture per study that was run, means with standard deviations: OUT/STUDY.png and .svg."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    for name in STUDIES:
        if name not in found["tables"]:
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        rows = [found["arms"][row["setting"]] | {"name": row["setting"]} for row in found["tables"][name]]
        if name == "fraction":
            # Both losses start from the student of originals alone.
            for loss in ("kd", "ccd"):
                _curve(axes, [row for row in rows if row["loss"] == loss or not row["fraction"]], "fraction", loss)
            axes.set_xlabel("augmented views among those seen, %")
        elif name == "few-shot":
            for row in rows:
                row["curve"] = row["loss"] if row["fraction"] else f"{row['loss']}, originals alone"
            for curve in dict.fromkeys(row["curve"] for row in rows):
                _curve(axes, [row for row in rows if row["curve"] == curve], "share", curve)
            axes.set_xlabel("training samples used, %")
        elif name in ("views", "temperature"):
            for row in rows:
                row["views"] = row["views"] or found["options"]["epochs"]
            for loss in dict.fromkeys(row["loss"] for row in rows):
                _curve(axes, [row for row in rows if row["loss"] == loss], name, loss, 1)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("views of each sample" if name == "views" else "temperature")
        else:
            labels = [row["name"] for row in rows]
            values, sd = ([row["top1"][key] or 0 for row in rows] for key in ("mean", "sd"))
            axes.barh(labels, values, xerr=sd, capsize=2, height=0.7, color="tab:blue", alpha=0.6)
            for at, row in enumerate(rows):
                axes.plot(row["top1"]["seeds"], [at] * len(row["top1"]["seeds"]), "k.", markersize=4)
            every = [value for row in rows for value in row["top1"]["seeds"]]
            margin = max(max(every) - min(every), 0.5) / 4
            axes.set_xlim(max(min(every) - margin, 0), min(max(every) + margin, 100))
            axes.invert_yaxis()
            axes.set_xlabel("top-1 of the student, %; dots: seeds")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
            axes.set_ylabel("top-1 of the student, %, ± sd")
            axes.grid(alpha=0.3)
        for kind in ("png", "svg"):
            figure.savefig(out / f"{name}.{kind}", dpi=150)


def _curve(axes, rows: list[dict], along: str, label: str, unit: float = 100) -> None:
    x = [unit * row[along] for row in rows]
    axes.errorbar(
        x,
        [row["top1"]["mean"] for row in rows],
        [row["top1"]["sd"] or 0 for row in rows],
        fmt="o-",
        markersize=4,
        capsize=2,
        label=label,
    )
