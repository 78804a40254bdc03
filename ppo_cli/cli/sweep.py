"""`ppo-cli sweep`."""

import shlex
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppo_cli.cli import completion
from ppo_cli.cli.signals import handling
from ppo_cli.cli.streams import say_at_once
from ppo_cli.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from ppo_cli.config.sweep_loading import SweepSettings
    from ppo_cli.sweep.run import Sweep


def sweep(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|FILE.yaml]",
            autocompletion=completion.sweeps,
            help="What to sweep. Without it: list those that ship.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=1024, metavar="N", help="Trials at a time.")
    ] = 1,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, metavar="N", help="Number of trials in all."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="DIR", help="Directory. Default: sweep-NAME."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            autocompletion=completion.settings,
            help="Change a value of all trials (repeats).",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a sweep: its unfinished trials, then the others."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a sweep that exists.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, say what it will take, write nothing."),
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of a sweep's file.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.")
    ] = False,
) -> int:
    """Try ranges of settings: many training runs, and which of them was best.

    Examples:
        ppo-cli sweep kl-and-learning-rate --dry-run
        ppo-cli sweep kl-and-learning-rate --jobs 2 --trials 12
        ppo-cli sweep kl-and-learning-rate --resume
    """
    from ppo_cli.cli.console import note, print_tables, write_json, write_result
    from ppo_cli.config.loading import shipped_configs
    from ppo_cli.config.sweep import sweep_schema
    from ppo_cli.config.sweep_loading import SWEEPS, load_sweep

    if schema:
        write_result(sweep_schema(), None)
        return 0
    if file is None:
        for shipped, path in shipped_configs(SWEEPS).items():
            about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            write_result(f"{shipped}: {about}", None)
        return 0
    if resume and (overwrite or dry_run):
        other = "--overwrite" if overwrite else "--dry-run"
        raise UsageError(f"--resume and {other} exclude each other: leave one of them out")
    settings = load_sweep(file, assignments=assignments or (), trials=trials, output=output)
    check_objective(settings)
    if dry_run:
        _say_what_it_takes(settings, jobs, overwrite, as_json)
        return 0
    from ppo_cli.cli.sweep_display import make_sweep_display
    from ppo_cli.reporting.sweep_tables import trial_table, words
    from ppo_cli.sweep.run import open_sweep

    with _StopSignals() as stop:
        made = open_sweep(settings, jobs=jobs, resume=resume, overwrite=overwrite)
        stop.sweep = made
        try:
            if not quiet:
                runs = f"{made.planned} trials"
                runs += f" of {len(settings.seeds)} runs" if settings.seeds[1:] else ""
                note(f"{settings.name}: {runs}, {jobs} at a time -> {settings.output}")
            with make_sweep_display(made, jobs, quiet) as display:
                for progress in made.run():
                    display.show(progress)
            summary = made.finish()
        finally:
            made.directory.unlock()
    if as_json:
        write_json({**summary.as_dict(), "interrupted": stop.signal is not None})
    else:
        print_tables([trial_table(summary.trials, summary.sweep, str(settings.output))])
    if stop.signal is not None:
        note("stopped; nothing is lost. Go on with:", f"  {_resume_command(settings, file, jobs)}")
        return 128 + stop.signal
    if not quiet:
        note(*words(summary))
        _next_steps(made, summary.best.number if summary.best else None)
    return 0 if summary.count("finished") else 1


def check_objective(settings: "SweepSettings") -> None:
    """Raise `UsageError` where no run has the metric that shall be made best."""
    from ppo_cli.errors import did_you_mean
    from ppo_cli.evaluation.quality import all_statistics

    key = settings.sweep.objective
    known = {name for name, statistic in all_statistics().items() if not statistic.is_array}
    near = did_you_mean(key, known)
    # A reward of several terms has metrics of their own names.
    if key not in known and not key.startswith(("eval/rewards/", "env/rewards/")):
        raise UsageError(
            f"{settings.name}: objective: no run has the metric '{key}'.{near} "
            "docs/metrics.md and 'ppo-cli stats RUN' list them"
        )


def _say_what_it_takes(
    settings: "SweepSettings", jobs: int, overwrite: bool, as_json: bool
) -> None:
    """Print ranges, number of runs, and the time and disk they take; write nothing."""
    from ppo_cli.cli.console import note, print_tables, write_json
    from ppo_cli.reporting.estimate import seconds, size
    from ppo_cli.reporting.sweep_tables import ranges_table
    from ppo_cli.sweep import search
    from ppo_cli.sweep.directory import SweepDirectory
    from ppo_cli.sweep.estimate import estimate_run

    search.check_installed()
    SweepDirectory(settings.output).check_writable(settings, overwrite)
    if not as_json:
        print_tables([ranges_table(settings.sweep, settings.whole)])
        note("measuring a run")
    run = estimate_run(settings, jobs)
    count = search.planned_trials(settings.sweep)
    runs = count * len(settings.seeds)
    each = run["times"]["total"]
    at_once = min(jobs, count)
    disk = next(space["needed"] for space in run["spaces"] if space["kind"] == "disk")
    if as_json:
        write_json({
            "trials": count, "runs": runs, "jobs": jobs, "seconds": each * runs / at_once,
            "run": dict(run),
        })  # fmt: skip
        return
    seeds = len(settings.seeds)
    pruned = "" if settings.sweep.pruner == "none" else ", less what is pruned"
    note(
        f"{count} trials x {seeds} seed{'s' if seeds > 1 else ''} = {runs} runs, {at_once} at a "
        "time",
        f"about {seconds(each * runs / at_once)}, {seconds(each)} a run{pruned}",
        f"about {size(disk)} of disk a run; keep: {settings.sweep.keep} decides what stays",
        "nothing was written",
    )


def _resume_command(settings: "SweepSettings", file: str, jobs: int) -> str:
    """The command that goes on, with the options that change settings."""
    given = settings.assignments[len(settings.sweep.set) :]
    parts = ["ppo-cli", "sweep", file, "--output", str(settings.output), "--resume"]
    parts += ["--trials", str(settings.sweep.trials)]
    parts += ["--jobs", str(jobs)] if jobs > 1 else []
    for text in given:
        parts += ["--set", text]
    return shlex.join(parts)


def _next_steps(made: "Sweep", best: int | None) -> None:
    from ppo_cli.cli.console import note
    from ppo_cli.sweep.directory import BEST, FILES, RECORD

    folder = made.directory.path
    files = [name for name in FILES if name != RECORD and (folder / name).exists()]
    note(f"{shlex.quote(str(folder))} has {', '.join(files)}, and a run directory for each trial")
    if best is not None:
        trial = next(iter(made.directory.runs(best, made.settings.seeds).values())).path
        note(
            "next:",
            f"  ppo-cli train --config {shlex.quote(str(folder / BEST))}",
            f"  ppo-cli compare {shlex.quote(str(trial))}",
        )


class _StopSignals:
    """Passes signals on to the runs: with the first they end after their step, then at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.sweep: Sweep | None = None
        self._handling = handling(self._handle)

    def __enter__(self) -> "_StopSignals":
        self._handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handling.__exit__(*error)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.sweep is None:
            raise Interrupted(number)
        if self.signal is None:
            say_at_once("the runs stop after their step; a second signal stops them at once")
        self.signal = self.signal or number
        self.sweep.stop(number)
