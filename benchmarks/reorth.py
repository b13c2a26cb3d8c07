"""What re-orthogonalising a factor does to the loss, on a few rows seen again and again.

The embedded tiny-t5 trains one LoRA on the same synthetic rows at every step, from the same seed. Every k steps A is
re-orthogonalised: hard or soft, with and without `rescale`, Adam's moments mapped and not; once never. The table has
the loss before and after each time (dropout off); the curves go to CSV and, if matplotlib is installed, into a picture.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import world
from benchmarks.common import parser, publish
from cl_runner.config.schema import RunConfig
from cl_runner.methods import make_method
from cl_runner.methods.protocol import Source
from cl_runner.training.loop import train_stage
from cl_runner.training.stage import StageRun

Rows = list[dict[str, Any]]
# Named as the settings: how, whether the update stays as it was, whether Adam's moments go over.
CURVES: dict[str, dict[str, Any] | None] = {
    "never": None,
    **{
        f"{how}{', rescale' if rescale else ''}, moments {'mapped' if moments else 'kept'}": {
            "how": how, "rescale": rescale, "moments": moments,
        }
        for rescale in (False, True) for how in ("hard", "soft") for moments in (False, True)
    },
}  # fmt: skip


def logged(made: world.World, option: Mapping[str, Any] | None, given: argparse.Namespace) -> Rows:
    """The log of a stage of ``given.steps`` steps, each on all rows."""
    values = made.config.model_dump()
    values["adapter"]["dropout"] = 0.0
    values["training"].update(global_batch=given.rows, micro_batch=given.rows, epochs=given.steps)
    values["output"]["log_every"] = 1
    own = None if option is None else {**option, "every": given.every}
    config = RunConfig.model_validate({**values, "method": {"name": "seqlora", "reorthogonalise": own}})
    made.room.method = make_method(config)
    made.room.adapters.restore([], {}, None)
    stage = StageRun(made.room, config, 0)
    found: Rows = []
    try:
        made.room.method.build(stage)
        examples = world.tiny_rows(made, given.rows, given.task)
        train_stage(stage, Source(examples, [stage.plan.name] * given.rows), log=found.append, tick=lambda *_: None)
    finally:
        stage.close()
    return found


def summary(name: str, rows: Rows) -> dict[str, Any]:
    """A line of the table."""
    losses = [row["loss"] for row in rows if "loss" in row]
    again = [row for row in rows if "reorthogonalised" in row]
    rises = [row["loss_after"] - row["loss_before"] for row in again]
    worst = [max(losses[row["step"] : row["step"] + 10], default=0.0) - row["loss_before"] for row in again]
    return {
        "A": name,
        "loss before → after": "; ".join(f"{row['loss_before']:.3f} → {row['loss_after']:.3f}" for row in again),
        "largest rise at once": max(rises, default=None),
        "within ten steps": max(worst, default=None),
        "loss at the end": losses[-1],
    }


def write_csv(curves: Mapping[str, Rows], file: Path) -> None:
    """One row a step, one column a curve."""
    losses = {name: [row["loss"] for row in rows if "loss" in row] for name, rows in curves.items()}
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["step", *losses])
        writer.writerows([step, *of_step] for step, of_step in enumerate(zip(*losses.values(), strict=True), 1))


def draw(curves: Mapping[str, Rows], file: Path, title: str) -> str:
    """A picture of the losses; returns what to say."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no picture: matplotlib is not installed"
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, rescale in ((axes[0], False), (axes[1], True)):
        for name, rows in curves.items():
            option = CURVES[name]
            if option is not None and option["rescale"] != rescale:
                continue
            losses = [row["loss"] for row in rows if "loss" in row]
            how = {"color": "grey"} if option is None else {
                "color": {"hard": "tab:red", "soft": "tab:blue"}[option["how"]],
                "linestyle": "--" if option["moments"] else "-",
            }  # fmt: skip
            axis.plot(range(1, len(losses) + 1), losses, label=name.replace(", rescale", ""), linewidth=1, **how)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_title(f"rescale: {str(rescale).lower()}", fontsize=10)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("loss of the step")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    return f"drew {file}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=8, help="rows, all of them in every step (default %(default)s)")
    made.add_argument("--steps", type=int, default=160, help="optimizer steps (default %(default)s)")
    made.add_argument("--every", type=int, default=40, help="k (default %(default)s)")
    made.add_argument("--task", default="yahoo", help="whose synthetic rows (default %(default)s)")
    made.add_argument("--csv", type=Path, default=Path("bench/reorth.csv"), help="(default %(default)s)")
    made.add_argument("--picture", type=Path, default=Path("bench/reorth.png"), help="(default %(default)s)")
    given = made.parse_args()
    tiny = world.tiny(1)
    curves = {name: logged(tiny, option, given) for name, option in CURVES.items()}
    publish("reorth", given, {"A every k steps": [summary(name, rows) for name, rows in curves.items()]})
    given.csv.parent.mkdir(parents=True, exist_ok=True)
    write_csv(curves, given.csv)
    title = f"tiny-t5, {given.rows} synthetic rows, A re-orthogonalised every {given.every} steps"
    print(f"wrote {given.csv}; {draw(curves, given.picture, title)}")


if __name__ == "__main__":
    main()
