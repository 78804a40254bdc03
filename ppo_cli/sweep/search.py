"""How a sweep chooses the values of its trials: an optuna study in a journal on disk.

optuna is imported where it is used: only `sweep` needs it.
"""

from __future__ import annotations

import itertools
import json
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_cli.config.sweep import SweepConfig
from ppo_cli.config.sweep_loading import SweepSettings
from ppo_cli.errors import MissingPackageError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler

STUDY = "sweep"
LIMIT = "max_kl"  # name of the constraint
RESULT = "result"  # of a trial's attributes: what it came to
MIN_FOR_IMPORTANCE = 4  # finished trials


def check_installed() -> None:
    """Raise `MissingPackageError` where optuna is absent."""
    try:
        with _quiet():
            import optuna  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "a sweep needs the package optuna: pip install 'ppo-cli[sweep]'"
        ) from error


def open_study(journal: Path, settings: SweepSettings) -> Study:
    """Open the study in `journal`, or begin one.

    The caller has the lock of the sweep: what a killed process left, a lock or half a line, is
    removed.
    """
    with _quiet():
        import optuna
        from optuna.storages.journal import JournalFileBackend

        _mend(journal)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        run = settings.base.run
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
            study_name=STUDY,
            load_if_exists=True,
            direction="maximize" if settings.sweep.maximises else "minimize",
        )
        pruners: Mapping[str, Any] = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(settings.sweep.startup_trials),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(
                min_resource=max(run.eval_every, 1), max_resource=max(run.steps, 2)
            ),
        }
        study.pruner = pruners[settings.sweep.pruner]()
        return study


def planned_trials(sweep: SweepConfig) -> int:
    """How many trials the sweep makes: a grid ends when all combinations were tried."""
    if sweep.sampler != "grid":
        return sweep.trials
    return min(sweep.trials, len(_grid(sweep)))


def ask(study: Study, settings: SweepSettings) -> Trial:
    """Begin a trial.

    Its values follow from the sampler's seed, its number and what is known of the others: they are
    the same whether the sweep was interrupted before or not.
    """
    sweep = settings.sweep
    with _quiet():
        from optuna.trial import TrialState

        number = len(study.get_trials(deepcopy=False))
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if sweep.sampler == "grid" and not waiting:
            study.enqueue_trial(_grid(sweep)[number])
        study.sampler = _sampler(sweep, number - len(waiting))
        trial = study.ask()
        suggest(trial, settings)
        return trial


def suggest(trial: Trial, settings: SweepSettings) -> dict[str, Any]:
    """The values of a trial: those it has, and new ones where a kill left it without."""
    for key, parameter in settings.sweep.parameters.items():
        if parameter.choices is not None:
            trial.suggest_categorical(key, parameter.choices)
        elif key in settings.whole:
            low, high = parameter.ends
            trial.suggest_int(key, low, high, step=parameter.step or 1, log=parameter.log)
        else:
            low, high = map(float, parameter.ends)
            trial.suggest_float(key, low, high, step=parameter.step, log=parameter.log)
    return dict(trial.params)


def unfinished(study: Study, settings: SweepSettings) -> list[Trial]:
    """The trials that were running when the sweep ended."""
    with _quiet():
        import optuna
        from optuna.trial import TrialState

        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        trials = []
        for frozen in running:
            study.sampler = _sampler(settings.sweep, frozen.number)
            trials.append(optuna.trial.Trial(study, frozen._trial_id))
            suggest(trials[-1], settings)
        return trials


def report(trial: Trial, step: int, value: float) -> bool:
    """Record an evaluation; whether the trial shall end."""
    with _quiet():
        trial.report(value, step)
        return trial.should_prune()


def tell(
    study: Study, trial: Trial, state: str, result: Mapping[str, Any], excess: float | None
) -> None:
    """Record how a trial ended.

    Args:
        study: it is a trial of.
        trial: it.
        state: finished, pruned or failed.
        result: what it came to, its `value` among it.
        excess: by how much it is over the limit of KL, at most 0 where it keeps it; None without a
            limit.
    """
    with _quiet():
        from optuna.trial import TrialState

        states = {
            "finished": TrialState.COMPLETE,
            "pruned": TrialState.PRUNED,
            "failed": TrialState.FAIL,
        }
        trial.set_user_attr(RESULT, {"state": state, **result})
        if excess is not None:
            trial.set_constraint(LIMIT, excess)
        study.tell(trial.number, result["value"] if state == "finished" else None, states[state])


def importances(study: Study) -> dict[str, float]:
    """Share of each parameter in what distinguishes the best tenth of finished trials (PED-ANOVA).

    Empty where fewer than `MIN_FOR_IMPORTANCE` have finished, or where there is one parameter.
    """
    with _quiet():
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator
        from optuna.trial import TrialState

        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(finished) < MIN_FOR_IMPORTANCE or len(finished[0].params) < 2:
            return {}
        found = optuna.importance.get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator()
        )
        return found if sum(found.values()) > 0 else {}


def _sampler(sweep: SweepConfig, number: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    seed = (sweep.sampler_seed + 1_000_003 * number) % 2**32
    if sweep.sampler == "tpe":
        return TPESampler(n_startup_trials=sweep.startup_trials, seed=seed)
    return RandomSampler(seed)


def _grid(sweep: SweepConfig) -> list[dict[str, Any]]:
    """All combinations, in an order that the sampler's seed gives.

    optuna's GridSampler stops its study when all are tried, which it cannot where trials are asked
    for one by one.
    """
    values = [parameter.values or [] for parameter in sweep.parameters.values()]
    combinations = [
        dict(zip(sweep.parameters, each, strict=True)) for each in itertools.product(*values)
    ]
    random.Random(sweep.sampler_seed).shuffle(combinations)
    return combinations


def _mend(journal: Path) -> None:
    """Remove what a process that was killed in the middle of a write has left."""
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content.rpartition(b"\n")[0]
    kept = len(whole) + 1 if whole or content.startswith(b"\n") else 0
    lines = content[:kept].splitlines(keepends=True)
    if lines and not _is_json(lines[-1]):  # a disk that lost the end of a line, not its length
        kept -= len(lines[-1])
    if kept < len(content):
        with journal.open("r+b") as file:
            file.truncate(kept)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's warnings, which are about experimental parts of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
