"""What Tab completes: configurations, keys, metrics, run directories and other values.

Nothing here imports torch, and nothing is said of an error: a shell that asks gets fewer answers.
"""

import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

VARIABLE = "_PPO_CLI_COMPLETE"
"""Names the shell that asks; the variables with its words are typer's."""
Answer = tuple[str, str]
"""A completion, and what it is; shells show the second beside it, if they can."""
BREAKS = "=:"  # bash makes words of their own of these
MAX_BYTES = 1 << 18  # of a run's metrics that are read


def answer(command: Any) -> int:
    """Answer the shell that asks, and return the exit code; of any error nothing is said."""
    out, begun = io.StringIO(), ""
    is_bash = os.environ[VARIABLE] == "complete_bash"
    os.environ["COLUMNS"] = "9999"  # a text that is wrapped would be several answers in fish
    try:
        if is_bash:
            begun = _join_words()
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            code = command.main(prog_name="ppo-cli", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except Exception:
        return 1
    lines = out.getvalue()
    if is_bash:
        lines = "".join(f"{_escaped(li.removeprefix(begun))}\n" for li in lines.splitlines() if li)
    sys.stdout.write(lines)
    return int(code or 0)


def _join_words() -> str:
    """Join the words that bash has cut at `=` and `:`; what it takes for complete of the last."""
    lexer = shlex.shlex(os.environ.get("COMP_WORDS", ""), posix=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        given, current = list(lexer), int(os.environ["COMP_CWORD"])
    except ValueError:  # an open quote: bash does not cut inside
        return ""
    words: list[str] = []
    begun = ""
    for number, word in enumerate(given[: current + 1]):
        is_break = not word.strip(BREAKS)
        if number > 1 and (is_break or words[-1].endswith(tuple(BREAKS))):
            begun = words.pop() + (word if is_break else "")
            word = begun if is_break else begun + word
        else:
            begun = ""
        words.append(word)
    if len(given) <= current:  # a new word has begun
        words.append("")
        begun = ""
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    return begun.partition("=")[2] if begun.startswith("-") else begun


def _escaped(value: str) -> str:
    """A value as bash takes it for one word; a tilde at its start stays."""
    home = "~" if value.startswith("~") else ""
    return home + "".join(
        c if c.isalnum() or c in "_-./:=,@%+" else f"\\{c}" for c in value[len(home) :]
    )


def configurations(incomplete: str) -> list[Answer]:
    """Names of shipped configurations, YAML files and run directories."""
    from ppo_cli.config.loading import shipped_configs

    def about(entry: os.DirEntry) -> str:
        if entry.name.endswith((".yaml", ".yml")):
            return "file"
        return "run" if _is_run(entry) else ""

    return [(name, "shipped") for name in shipped_configs()] + _paths(incomplete, about)


def sweeps(incomplete: str) -> list[Answer]:
    """Names of shipped sweeps, and YAML files."""
    from ppo_cli.config.loading import shipped_configs
    from ppo_cli.config.sweep_loading import SWEEPS

    files = _paths(incomplete, lambda one: "file" if one.name.endswith((".yaml", ".yml")) else "")
    return [(name, "shipped") for name in shipped_configs(SWEEPS)] + files


def settings(incomplete: str) -> list[Answer]:
    """`section.key=`; behind the sign, and where one key is left, the values of that key."""
    from ppo_cli.config.keys import keys

    name, sign, _ = incomplete.partition("=")
    found = [key for key in keys() if (key.name == name if sign else key.name.startswith(name))]
    answers = [] if sign else [(f"{key.name}=", key.about) for key in found]
    if len(found) == 1:  # with two answers, the shell puts no space behind the sign
        values = devices() if found[0].name == "run.device" else found[0].values
        answers += [(f"{found[0].name}={value}", found[0].about) for value in values]
    return answers


def runs(incomplete: str) -> list[Answer]:
    """Run directories, and the folders beside them."""
    return _paths(incomplete, lambda entry: "run" if _is_run(entry) else "")


def models(incomplete: str) -> list[Answer]:
    """Run directories and folders of models, and the folders beside them."""

    def about(entry: os.DirEntry) -> str:
        if _is_run(entry):
            return "run"
        names = ("config.json", "adapter_config.json")
        return "model" if any(os.path.isfile(os.path.join(entry.path, n)) for n in names) else ""

    return _paths(incomplete, about)


def classifiers(incomplete: str) -> list[Answer]:
    """The embedded classifier, and folders of models."""
    return [("embedded", "comes with ppo-cli"), *models(incomplete)]


def labels() -> list[str]:
    """The labels of most classifiers."""
    return ["positive", "negative"]


def devices() -> list[str]:
    """Devices, and each NVIDIA GPU that Linux has."""
    present = os.listdir("/dev") if os.path.isdir("/dev") else []
    numbers = sorted(name[6:] for name in present if name[:6] == "nvidia" and name[6:].isdigit())
    return ["auto", "cpu", "cuda", *(f"cuda:{number}" for number in numbers), "mps"]


def trackers(incomplete: str) -> list[str]:
    """Trackers; of a list separated by commas the last."""
    from ppo_cli.config.trackers import PACKAGES

    before = incomplete[: incomplete.rfind(",") + 1]
    given = before.split(",")
    return [before + name for name in PACKAGES if name not in given] + ([] if before else ["none"])


def metrics(ctx: Any) -> list[Answer]:
    """The metrics of the runs that are named already; without any, those that there are."""
    from ppo_cli.evaluation.quality import all_statistics

    known = all_statistics()
    # Of a command line that ends within an option, the arguments are left in `ctx.args`.
    named = [*(ctx.params.get("runs") or ()), *ctx.args]
    found = dict.fromkeys(key for run in named for key in _recorded_metrics(run))
    keys = found or [key for key, what in known.items() if not what.is_array and "NAME" not in key]
    return [(key, known[key].meaning if key in known else "") for key in keys if key.isprintable()]


def statistics() -> list[Answer]:
    """The keys that `stats --explain` explains."""
    from ppo_cli.evaluation.quality import all_statistics

    return [("all", "every key"), *((key, s.meaning) for key, s in all_statistics().items())]


def _recorded_metrics(run: str) -> Iterator[str]:
    """The keys in the last lines of a run's metrics."""
    try:
        with open(os.path.join(os.path.expanduser(run), "metrics.jsonl"), "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - MAX_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut at the start, or while it is written
            continue
        yield from row.keys() - {"step"} if isinstance(row, dict) else ()


def _is_run(entry: os.DirEntry) -> bool:
    return os.path.isfile(os.path.join(entry.path, "run.yaml"))


def _paths(incomplete: str, about: Callable[[os.DirEntry], str]) -> list[Answer]:
    """The files and folders that `about` knows, and folders on the way to others.

    Nothing where it knows none of them: the shell then completes paths as it always does.
    """
    folder, begun = os.path.split(incomplete)
    wanted: list[Answer] = []
    others: list[Answer] = []
    for entry in _entries(os.path.expanduser(folder) or "."):
        path = os.path.join(folder, entry.name)
        if not entry.name.startswith(begun) or entry.name[0] == "." != begun[:1]:
            continue
        if what := about(entry):
            wanted.append((path, what))
        elif entry.is_dir():
            others.append((f"{path}/", "folder"))
    return wanted + others if wanted else []


def _entries(folder: str) -> Iterable[os.DirEntry]:
    """What is in a folder, by name; names that a shell could not show are left out."""
    try:
        with os.scandir(folder) as entries:
            printable = [entry for entry in entries if entry.name.isprintable()]
    except OSError:
        return []
    return sorted(printable, key=lambda entry: entry.name)
