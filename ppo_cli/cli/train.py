"""`ppo-cli train`."""

import io
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppo_cli.cli import completion, options
from ppo_cli.cli.reward_options import consent, reward_lines
from ppo_cli.cli.signals import handling
from ppo_cli.cli.streams import say_at_once
from ppo_cli.errors import DivergenceError, Interrupted, PPOCliError, UsageError
from ppo_cli.utils import launcher

if TYPE_CHECKING:
    from ppo_cli.cli.display import Display
    from ppo_cli.config.schema import RunConfig
    from ppo_cli.reporting.summary import TrainingSummary
    from ppo_cli.training.run import Training

Overrides = Mapping[tuple[str, str], Any]
"""Values of options by section and key; None for what was not given."""
SAME_SIGNAL = 1.0
"""Seconds within which a signal to one of several processes counts once: a launcher passes on what
the terminal or the batch system has sent to the process as well."""
REQUEST, TRAINING, TRIAL = "Model, data and reward", "Training", "Resuming and trying out"
HANGUP = {signal.SIGHUP} if hasattr(signal, "SIGHUP") else set()  # Windows has none


def train(
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="CONFIG",
            autocompletion=completion.configurations,
            help="Name (see 'ppo-cli config'), YAML file, or run directory. Default: tiny.",
            rich_help_panel=REQUEST,
        ),
    ] = None,
    sentiment: Annotated[
        str | None,
        typer.Option(
            "--sentiment",
            metavar="LABEL",
            autocompletion=completion.labels,
            help="positive, negative or another label of the classifier. Default: positive, or the "
            "configuration's.",
            rich_help_panel=REQUEST,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="FILE.py:FUNCTION[=WEIGHT]",
            help="Score with this Python function or URL instead of the classifier; with "
            "--sentiment, besides it (repeats).",
            rich_help_panel=REQUEST,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="DIR",
            autocompletion=completion.runs,
            help="Run directory. Default: ppo-good, ppo-bad or ppo-LABEL.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=1,
            help="Number of PPO steps. Default: the configuration's.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            max=2**32 - 1,
            help="Seed of all random numbers. Default: the configuration's.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(
            "--kl",
            metavar="NATS",
            help="KL per response to end at, with the best score there.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            autocompletion=completion.devices,
            help="auto, cpu, cuda, cuda:N or mps. Default: auto.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            autocompletion=completion.settings,
            help="Change a key of the configuration, such as ppo.init_kl_coef=0.1 (repeats).",
            rich_help_panel=REQUEST,
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            metavar="NAME,...",
            autocompletion=completion.trackers,
            help="Send all metrics to aim, clearml, comet_ml, dvclive, mlflow, swanlab, "
            "tensorboard, trackio, wandb, or none (repeats).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            min=1,
            max=1024,
            metavar="N",
            help="Share the run's batches among N processes of this machine, one a GPU.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    trust_remote_code: options.Trust = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the run directory's newest checkpoint.",
            rich_help_panel=TRIAL,
        ),
    ] = False,
    allow_changed_inputs: Annotated[
        bool,
        typer.Option(
            "--allow-changed-inputs",
            help="With --resume: continue although a model or the prompts have changed.",
            rich_help_panel=TRIAL,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a run directory that exists.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Load and check everything, say what the run will take, write nothing.",
            rich_help_panel=TRIAL,
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="With --dry-run: make a few small steps, to say time and memory.",
            rich_help_panel=TRIAL,
        ),
    ] = True,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress.", rich_help_panel=options.OUTPUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the summary as one JSON object.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
) -> int:
    """Tune a language model with PPO towards a sentiment, or a reward of your own.

    Examples:
        ppo-cli train --sentiment positive --seed 1
        ppo-cli train --config gpt2-imdb --kl 4 --dry-run
        ppo-cli train --set policy.model=gpt2 --set prompts.source=reviews.csv --output my-run
        ppo-cli train --output my-run --resume
    """
    from ppo_cli.cli.console import busy, hush, note, print_tables, write_json
    from ppo_cli.cli.launch import launch
    from ppo_cli.config.trackers import as_names, check_installed
    from ppo_cli.kernels.switch import configured

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other: keep the run or replace it")
    if allow_changed_inputs and not resume:
        raise UsageError("--allow-changed-inputs is for --resume: leave it out, or resume a run")
    overrides = {
        ("reward", "sentiment"): sentiment,
        ("run", "output"): output,
        ("run", "steps"): steps,
        ("run", "seed"): seed,
        ("run", "kl_budget"): kl,
        ("run", "device"): device,
        ("ppo", "log_with"): _trackers(track),
    }
    rewards = reward or []
    launcher.check(num_processes)
    launches = (num_processes or 1) > launcher.count()
    with _started_together() as together, _silent(launches):
        if resume:
            settings, changes, consented = _settings_to_resume(
                config, assignments or [], overrides, rewards
            )
            if changes:
                note(f"resuming with changed settings: {', '.join(changes)}")
        else:
            settings = _settings_to_start(config, assignments or [], overrides, overwrite, rewards)
            consented = settings.reward.foreign
        together.timeout = settings.run.timeout
        check_installed(as_names(settings.ppo.log_with))
        if dry_run and measure and (launches or launcher.count() > 1):
            raise UsageError("--dry-run measures one process: start one, or add --no-measure")
    if launches:
        return launch(num_processes or 1)
    kernels = configured(settings.policy.kernels)
    if not quiet:
        note(
            f"policy {settings.policy.model}, {settings.reward.describe()}, "
            f"prompts {settings.prompts.name} -> {settings.output}"
        )
        note(*reward_lines(settings.reward))
    # The request is known to be sound; only now come the imports that take seconds.
    with busy(quiet=quiet):
        from ppo_cli.cli.display import make_display
        from ppo_cli.reporting.tables import summary_table
        from ppo_cli.training.build import build_training
        from ppo_cli.training.fast_paths import report as fast_path_lines
        from ppo_cli.utils import processes
        from ppo_cli.utils.device import resolve_device

        hush()
    display = make_display(quiet)
    with kernels, StopSignals(quiet or launcher.index() > 0) as stop:
        training = build_training(
            settings,
            resume=resume,
            overwrite=overwrite,
            trusted=trust_remote_code or (),
            tell=(lambda _: None) if quiet else note,
            allow_changed_inputs=allow_changed_inputs,
            consented=consented,
        )
        if dry_run:
            training.directory.unlock()
            _say_what_it_takes(training, measure, as_json)
            note(
                f"all is well: {len(training.prompts.train)} prompts, "
                f"{training.reward.describe()}, {settings.run.steps} steps on "
                f"{resolve_device(settings.run.device)}; nothing was written",
                *fast_path_lines(training.fast_paths),
            )
            return 0
        if resume and not quiet:
            note(f"going on from step {training.step}")
            if training.stopped_early:
                note(
                    f"the run ended there, early: {training.stopped_early}; to make more steps "
                    "change that setting with --set, or set it to null"
                )
        summary = run(training, display, stop)
    number = next(filter(None, processes.gather(stop.signal)), None)
    if as_json:
        write_json({**summary.as_dict(), "interrupted": number is not None})
    else:
        print_tables([summary_table(summary)])
    if number is not None:
        command = _resume_command(summary.run, settings)
        note(f"stopped after step {summary.steps}; go on with:", f"  {command}")
        return 128 + number
    if not quiet:
        _closing_notes(summary, settings)
        note(*(f"  {command}" for command in training.trackers.viewers()))
    return 0


@contextmanager
def _silent(is_silent: bool) -> Iterator[None]:
    """Drop what is said in the block, which the processes that are started then say again."""
    with redirect_stderr(io.StringIO()) if is_silent else nullcontext():
        yield


class _Together:
    """How long the processes of a run wait for each other, in seconds."""

    timeout = 600.0


@contextmanager
def _started_together() -> Iterator[_Together]:
    """Around what can be checked at once: then the processes of a launcher find each other.

    Raises:
        Exception: the block raised it on one of the processes.
    """
    together, fault = _Together(), None
    try:
        yield together
    except Exception as error:
        if launcher.count() == 1:
            raise
        fault = error
    if launcher.count() > 1:
        from ppo_cli.utils import processes

        processes.start(together.timeout)
        with processes.agreed():
            if fault is not None:
                raise fault


def _trackers(given: Sequence[str] | None) -> list[str] | None:
    """The trackers of `--track`, which repeats and takes lists; `none` for none of them."""
    if given is None:
        return None
    names = [name.strip() for text in given for name in text.split(",")]
    return [] if names == ["none"] else names


def _settings_to_start(
    config: str | None,
    assignments: Sequence[str],
    overrides: Overrides,
    overwrite: bool,
    rewards: Sequence[str],
) -> "RunConfig":
    """Settings of a new run, which may be written where they say.

    Raises:
        UsageError: a setting is wrong, or the place is not free.
    """
    from ppo_cli.cli.console import note
    from ppo_cli.config.loading import DEFAULT_CONFIG, config_file, load_config, recorded_run
    from ppo_cli.data.fingerprint import inputs_of
    from ppo_cli.training.run_directory import RunDirectory

    name = DEFAULT_CONFIG if config is None else config
    settings = load_config(name, assignments=assignments, overrides=overrides, rewards=rewards)
    before = load_config(name, assignments=assignments).reward if rewards else settings.reward
    if before.score_every is not None and settings.reward.score_every is None:
        note("reward.score_every is off: none of the terms scores unfinished texts")
    inputs = inputs_of(settings)
    old = None if config is None else recorded_run(config)
    if old is not None:  # its own run.yaml may be replaced: the settings have been read
        versions = RunDirectory(old).recorded().get("versions")
        release = versions.get("ppo-cli", "?") if isinstance(versions, dict) else "?"
        note(f"settings of the run in {old} (ppo-cli {release}); the new run: {settings.output}")
    elif config is not None:
        inputs["--config"] = str(config_file(config))
    RunDirectory(settings.output).check_writable(overwrite, inputs)
    return settings


def _settings_to_resume(
    config: str | None, assignments: Sequence[str], overrides: Overrides, rewards: Sequence[str]
) -> "tuple[RunConfig, list[str], list[str]]":
    """Settings of a run that is resumed, and how they differ from those it was started with.

    Then the functions and endpoints of its reward that the command names: those of `config`, which
    the user gives, or those of `rewards`.

    Without `config` they are those of `run.yaml`, changed by the options. Then a configuration is
    needed only to find the run: by its output, which a sentiment may name.

    Raises:
        UsageError: there is no such run, or a setting differs that may not change within a run.
    """
    from ppo_cli.config.loading import DEFAULT_CONFIG, change_config, load_config, recorded_run
    from ppo_cli.config.reward_options import with_consent
    from ppo_cli.data.consent import check_consent
    from ppo_cli.data.fingerprint import Inputs
    from ppo_cli.training.resume import resumed_config
    from ppo_cli.training.run_directory import RunDirectory

    names_run = [a for a in assignments if a.startswith(("run.output=", "reward.sentiment="))]
    old = None if config is None else recorded_run(config)
    if old is not None and overrides["run", "output"] is None and not names_run:
        overrides = {**overrides, ("run", "output"): str(old)}  # the run itself is resumed
    settings = load_config(
        DEFAULT_CONFIG if config is None else config,
        assignments=names_run if config is None else assignments,
        overrides=overrides,
        rewards=rewards,
    )
    consented = settings.reward.foreign
    directory = RunDirectory.existing(settings.output)
    directory.check_resumable()
    if config is None:
        own = directory.config()
        settings = change_config(own, assignments=assignments, overrides=overrides)
        try:
            reward, consented = with_consent(settings.reward, rewards)
        except ValueError as error:
            raise UsageError(str(error)) from error
        settings = settings.model_copy(update={"reward": reward})
        inputs = Inputs(directory.recorded().get("inputs"))
        check_consent(reward, consented, str(directory.path), inputs)
    return *resumed_config(directory, settings), consented


def _say_what_it_takes(training: "Training", measure: bool, as_json: bool) -> None:
    """Print what the run will take.

    Raises:
        PPOCliError: it does not fit; the message says what would.
    """
    import time

    import psutil

    from ppo_cli.cli.console import print_tables, write_json
    from ppo_cli.reporting.estimate import estimate_table, size
    from ppo_cli.training.estimate import estimate

    found = estimate(training, time.time() - psutil.Process().create_time(), measure=measure)
    if as_json:
        write_json(found.as_dict())
    else:
        print_tables([estimate_table(found)])
    for space in found.lacking:
        advice = found.remedies if space.kind != "disk" else ["free some space, or lower run.keep"]
        raise PPOCliError(
            f"the run does not fit: it needs about {size(space.needed)} of {space.kind}, and "
            f"{size(space.available)} are there. What helps:\n" + "\n".join(advice)
        )


def run(training: "Training", display: "Display", stop: "StopSignals") -> "TrainingSummary":
    """Make the steps of a run, show them, finish it, and let other processes write there again."""
    stop.training = training
    with display, _unlocked_at_the_end(training):
        display.status("evaluating the reference on held-out prompts")
        for report in training.steps():
            display.show(report)
        display.status("evaluating the tuned model, saving")
        return training.finish()


def _closing_notes(summary: "TrainingSummary", settings: "RunConfig") -> None:
    """Say how the run ended, what it saved and what to do next."""
    from ppo_cli.cli.console import note

    run = shlex.quote(summary.run)
    reward = consent(settings.reward)
    if summary.stopped_early:
        made = f"{summary.steps} of {summary.planned_steps} steps"
        note(f"ended early, after {made}: {summary.stopped_early}")
    if summary.after["score"] <= summary.before["score"]:
        note(
            "the model scores no higher than the reference: give it more steps, or another "
            f"ppo.{settings.ppo.step_size_key} or ppo.init_kl_coef"
        )
    note(f"saved {run} with the weights of {summary.weights}")
    note(f"{summary.seconds:.0f} s of training ({summary.pace}); next:")
    note(f'  ppo-cli generate {run} --reference --prompt "This movie" -n 3{reward}')
    note(f"  ppo-cli compare {run}{reward}")
    note(f"  ppo-cli plot {run} --terminal")


def _resume_command(run: str, settings: "RunConfig") -> str:
    return f"ppo-cli train --output {shlex.quote(run)} --resume{consent(settings.reward)}"


@contextmanager
def _unlocked_at_the_end(training: "Training") -> Iterator[None]:
    """Unlock the run directory at the end; add to an error's message how the run can be resumed."""
    try:
        yield
    except (Exception, Interrupted) as error:
        if isinstance(error, Exception):  # a second signal waits for no tracker
            training.trackers.finish()
        error_with_notes: Any = error
        if notes := _how_to_resume(training, error):
            error_with_notes.__notes__ = notes  # as `add_note` does from Python 3.11 on
        raise
    finally:
        training.directory.unlock()


def _how_to_resume(training: "Training", error: BaseException) -> list[str]:
    command = _resume_command(str(training.directory.path), training.config)
    if training.state.checkpoint is None:
        return []
    if isinstance(error, DivergenceError):
        if training.config.run.on_divergence == "rollback":
            return []
        # The same settings would lead to the same error.
        command += " --set run.on_divergence=rollback"
    return [
        f"go on from the checkpoint of step {training.state.saved_step} with:",
        f"  {command}",
    ]


class StopSignals:
    """Handles SIGINT, SIGTERM and SIGHUP: the first requests a stop after the step, a second stops.

    Before training begins the first one stops at once, too. A terminal that closes sends SIGHUP
    more than once, so a SIGHUP is never the second signal. A run under `nohup` ignores it.
    """

    def __init__(self, quiet: bool) -> None:
        self.signal: int | None = None
        self.training: Training | None = None
        self._quiet = quiet
        self._taken_at = 0.0
        self._handling = handling(self._handle, always=(signal.SIGINT, signal.SIGTERM))

    def __enter__(self) -> "StopSignals":
        self._handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handling.__exit__(*error)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in HANGUP and self.signal is not None:
            return
        if launcher.count() > 1:
            before, self._taken_at = self._taken_at, time.monotonic()
            if self._taken_at < before + SAME_SIGNAL:
                return
        if self.signal is not None or self.training is None:
            raise Interrupted(number)
        self.signal = number
        self.training.request_stop()
        if not self._quiet:
            say_at_once("stopping after this step; a second signal stops at once")
