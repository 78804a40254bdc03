"""The commands' registration, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ppo_cli.cli.compare import compare
from ppo_cli.cli.config import config
from ppo_cli.cli.generate import generate
from ppo_cli.cli.plot import plot
from ppo_cli.cli.stats import stats
from ppo_cli.cli.train import train
from ppo_cli.errors import PPOCliError, did_you_mean
from ppo_cli.text import escape_controls

app = typer.Typer(
    name="ppo-cli",
    help="Steer a language model's sentiment with Proximal Policy Optimization.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, generate, compare, plot, stats, config):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from ppo_cli import __version__

        print(f"ppo-cli {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show becomes an escape
            stream.reconfigure(errors="backslashreplace")
    _quieten()
    sys.exit(_run())


def _run() -> int:
    command = typer.main.get_command(app)
    try:
        result = command.main(prog_name="ppo-cli", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except PPOCliError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has gone, as in `ppo-cli generate ... | head`: that is no fault.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (usage := _usage_message(error, command)) is not None:
            return _fail(usage, 2)
        return _fail(*_explain(error))


def _usage_message(error: Exception, command: Any) -> str | None:
    """What click says of a mistyped command line, in one line with the nearest name."""
    if type(error).__name__ == "Abort":
        return "interrupted"
    if not hasattr(error, "format_message"):
        return None
    message = str(error.format_message()).replace("Value error, ", "").rstrip()
    if not message:
        return None
    context = getattr(error, "ctx", None)
    if "No such command" in message and isinstance(command, TyperGroup) and context is not None:
        names = command.list_commands(context)
        typed = message.partition("'")[2].partition("'")[0]
        if "Did you mean" not in message:
            message += did_you_mean(typed, names) or f" There are {', '.join(names)}."
    path = context.command_path if context is not None else "ppo-cli"
    return f"{' '.join(message.split())} (see '{path} --help')"


def _explain(error: Exception) -> tuple[str, int]:
    """A message and a code for what no one foresaw."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in first.lower():
        return (
            "out of memory: lower ppo.mini_batch_size and rollout.batch_size (with "
            "ppo.gradient_accumulation_steps the batch stays as it is), or use a smaller model",
            1,
        )
    if isinstance(error, OSError) and error.errno is not None:
        import errno

        place = f"{error.filename}: " if error.filename else ""
        remedy = {
            errno.ENOSPC: ": free some space, then go on with --resume",
            errno.EACCES: ": choose another place with --output",
            errno.EROFS: ": choose another place with --output",
        }.get(error.errno, "")
        return f"{place}{error.strerror}{remedy}", 1
    return (
        f"unexpected {type(error).__name__}: {first} "
        "(PPO_CLI_DEBUG=1 shows where; please report it)",
        1,
    )


def _fail(message: str, code: int) -> int:
    if os.environ.get("PPO_CLI_DEBUG") == "1":
        traceback.print_exc()
    for number, line in enumerate(message.splitlines() or [""]):
        prefix = "error: " if number == 0 else "       "
        print(prefix + escape_controls(line), file=sys.stderr)
    return code


def _quieten() -> None:
    """Our own warnings in one line each; the libraries' chatter not at all."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("PPO_CLI_DEBUG") == "1":
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"ppo_cli\..*")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {escape_controls(str(message))}", file=sys.stderr)

    warnings.showwarning = show
