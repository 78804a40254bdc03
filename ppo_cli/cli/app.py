"""Registers the commands, and turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from ppo_cli.cli import completion, streams
from ppo_cli.cli.compare import compare
from ppo_cli.cli.config import config
from ppo_cli.cli.doctor import doctor
from ppo_cli.cli.export import export
from ppo_cli.cli.generate import generate
from ppo_cli.cli.help import Group, register
from ppo_cli.cli.init import init
from ppo_cli.cli.plot import plot
from ppo_cli.cli.push import push
from ppo_cli.cli.runs import runs
from ppo_cli.cli.stats import stats
from ppo_cli.cli.sweep import sweep
from ppo_cli.cli.train import train
from ppo_cli.errors import (
    Interrupted,
    PPOCliError,
    UsageError,
    did_you_mean,
    is_lost_process,
    is_out_of_memory,
    without_secrets,
)
from ppo_cli.utils import launcher
from ppo_cli.utils.text import escape_controls


class _Group(Group):
    """Shows the help where no command is given, and skips its own options where one is.

    Typer would import pydantic to check options that are not given. That takes as long as typer
    itself, and doubles the time until a mistyped option is reported.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            raise typer.Exit(2)
        options = self.params, self.add_help_option
        if args and not args[0].startswith("-"):
            self.params, self.add_help_option = [], False
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params, self.add_help_option = options

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            # `streams` handles readers of this program's output. Typer would exit silently.
            lost: Any = PPOCliError("broken pipe: a program that this one writes to has ended")
            lost.__notes__ = getattr(error, "__notes__", [])
            raise lost from error


app = typer.Typer(
    name="ppo-cli",
    cls=_Group,
    help="Steer a language model's sentiment with Proximal Policy Optimization.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SPACE, PLACE = ": free some space", ": choose another place with --output"
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: SPACE,
    errno.EACCES: PLACE,
    errno.EPERM: PLACE,
    errno.EROFS: PLACE,
}
# What to change where a command runs out of memory.
SMALLER = {
    "train": "lower ppo.mini_batch_size (raise ppo.gradient_accumulation_steps as much and the "
    "result stays the same), rollout.batch_size or reward.batch_size, set "
    "ppo.gradient_checkpointing=true, or use a smaller model",
    "generate": "ask for fewer samples (-n) or shorter ones (--max-new-tokens), give fewer prompts "
    "at a time, or use a smaller model",
    "compare": "lower --samples, --max-new-tokens or the numbers of --best-of-n, or use smaller "
    "models",
}
COMMANDS = {
    "Train": (train, sweep),
    "Look": (compare, generate, plot, stats, runs),
    "Share": (export, push),
    "Set up": (init, config, doctor),
}
"""The commands by their groups in the help."""
for group, commands in COMMANDS.items():
    for command in commands:
        register(app, command, group)


def _version(wanted: bool) -> None:
    if wanted:
        from ppo_cli import __version__

        print(f"ppo-cli {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    command = context.invoked_subcommand
    if launcher.count() > 1 and command != "train":
        raise UsageError(
            f"{command} runs in one process, and a launcher started {launcher.count()}: call it "
            "without the launcher, or unset WORLD_SIZE"
        )


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    streams.settle()
    if _is_secondary():
        streams.silence()
    if launcher.is_ours():
        from ppo_cli.cli.launch import stop_with_launcher

        stop_with_launcher()
    _quieten()
    # Importing torch and transformers makes millions of lasting objects. Garbage collections that
    # visit them again and again took a fifth of `generate`'s time.
    gc.set_threshold(50_000, 20, 50)
    code = _run()
    if launcher.count() > 1:  # threads of gloo and NCCL may abort an interpreter that ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    command = typer.main.get_command(app)
    if completion.VARIABLE in os.environ:
        return completion.answer(command)
    try:
        result = command.main(prog_name="ppo-cli", standalone_mode=False)
        sys.stdout.flush()
        _leave()
        return result if isinstance(result, int) else 0
    except PPOCliError as error:
        return _fail(str(error), error.exit_code, error)
    except Interrupted as error:
        return _fail("interrupted", 128 + error.number, error)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if (usage := _usage_message(error, command)) is not None:
            return _fail(usage, 2)
        return _fail(_explain(error), 1, error)


def _usage_message(error: Exception, command: Any) -> str | None:
    """Click's message about a mistyped command line, on one line, with the nearest name."""
    if type(error).__name__ == "Abort":
        return "interrupted"
    if not hasattr(error, "format_message"):
        return None
    message = str(error.format_message()).replace("Value error, ", "").rstrip()
    if not message:
        return None
    context = getattr(error, "ctx", None)
    if "No such command" in message and isinstance(command, Group) and context is not None:
        names = command.list_commands(context)
        typed = message.partition("'")[2].partition("'")[0]
        if "Did you mean" not in message:
            message += did_you_mean(typed, names) or f" There are {', '.join(names)}."
    path = context.command_path if context is not None else "ppo-cli"
    return f"{without_secrets(' '.join(message.split()))} (see '{path} --help')"


def _explain(error: Exception) -> str:
    """Message for an error of the operating system, or for an unexpected one."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if is_out_of_memory(error):
        smaller = SMALLER.get(_asked(), "end other programs, or use a larger machine")
        return f"out of memory: {smaller}"
    if _is_lost(error):
        return "another process of this run died or does not answer"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}{REMEDIES.get(error.errno, '')}"
    return (
        f"unexpected {type(error).__name__}: {without_secrets(first)} "
        "(PPO_CLI_DEBUG=1 shows where; please report it)"
    )


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    """Print the message, and below it the notes of `error` (PEP 678); return the exit code."""
    is_agreed = getattr(error, "is_agreed", False)  # then all processes raise it
    if _is_secondary():
        if not _is_started() and (error is None or isinstance(error, UsageError)):
            return 0  # the main process says it, unless a launcher ends it because of this one
        if is_agreed:
            _leave()
        is_told = is_agreed or error is None or isinstance(error, Interrupted)
        if is_told or (_is_lost(error) and launcher.local_index()):
            return code
        sys.stderr = sys.__stderr__
        message = f"process {launcher.index()}: {message}"
        error = None  # the main process has its notes, too
    if os.environ.get("PPO_CLI_DEBUG") == "1":
        traceback.print_exc()
    _say("error: ", [*message.splitlines(), *getattr(error, "__notes__", ())])
    if is_agreed:
        sys.stderr.flush()
        _leave()
    return code


def _asked() -> str:
    """The command, as far as it can be told before the command line is read."""
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def _is_secondary() -> bool:
    """Whether another process says what this one would say: the main one, or one a machine."""
    return bool(launcher.index() if _asked() == "train" else launcher.local_index())


def _is_started() -> bool:
    """Whether the processes of a run have found each other. Does not import torch."""
    processes = sys.modules.get("ppo_cli.utils.processes")
    return processes is not None and processes.count() > 1


def _leave() -> None:
    """Wait for the other processes, where there are some."""
    if _is_started():
        sys.modules["ppo_cli.utils.processes"].leave()


def _is_lost(error: BaseException | None) -> bool:
    return launcher.count() > 1 and error is not None and is_lost_process(error)


def _say(label: str, lines: Sequence[str]) -> None:
    """Print lines on standard error; the label stands before the first."""
    for number, line in enumerate(lines or [""]):
        prefix = " " * len(label) if number else label
        print(prefix + escape_controls(line), file=sys.stderr)


def _quieten() -> None:
    """Show this program's warnings on one line each, and none of the libraries'."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["MPLBACKEND"] = "agg"  # no windows; a notebook's backend may not be installed
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("PPO_CLI_DEBUG") == "1":
        return
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"ppo_cli\..*")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _say("warning: ", str(message).splitlines())

    warnings.showwarning = show
