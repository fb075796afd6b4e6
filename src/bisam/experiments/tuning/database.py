"""Database: the trials of a search in Optuna's storage, an SQLite file.

One process alone opens it: that of the command. It asks Optuna for the values of each trial, passes on the scores that
the workers send, and tells them what is pruned. So SQLite suffices, which is not meant for several writers.

Trial n draws its random numbers from the seed n. A search that was interrupted, and one whose storage was lost, goes on
as it would have done; with several workers the order in which trials end has an effect too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bisam.experiments.errors import RunError, reason
from bisam.experiments.runs.results import Validated
from bisam.experiments.tuning.search import DATABASE, Search, differences
from bisam.experiments.tuning.space import Dimension, Range
from bisam.experiments.tuning.trials import WORST, State, Trial, count

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

STARTUP = 5
"""Trials that are complete before one is pruned."""
WARM_UP = 3
"""No trial is pruned in the first of so many parts of its epochs: what learns slowly can be best in the end."""
_STUDY = "tune"
_SEARCH, _RESULT, _ERROR = "search", "result", "error"
ENOUGH_FOR_IMPORTANCES = 20
"""Trials from which on importances are computed: the best quarter of them are five then."""


class Database:
    """The storage of a search.

    Args:
        study: Optuna's study.
        search: what is searched.
    """

    def __init__(self, study: Study, search: Search) -> None:
        self._study, self._search = study, search
        self._distributions = {name: _distribution(one) for name, one in search.space.items()}
        self._open: dict[int, Any] = {}  # Optuna's trials that are in progress, by number
        self._reported = defaultdict[int, set[int]](set)  # completed epochs or steps whose score is known, by number

    def trials(self) -> list[Trial]:
        """All trials that have begun, by number."""
        from optuna.trial import TrialState

        left_out = (TrialState.WAITING, TrialState.FAIL)
        return [self._trial(one) for one in self._study.get_trials(deepcopy=False) if one.state not in left_out]

    def unfinished(self) -> list[Trial]:
        """Trials of an earlier command that are to be resumed, which are in progress now."""
        from optuna import Trial as Asked
        from optuna.trial import TrialState

        found: list[Trial] = []
        for one in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if one.params.keys() == self._search.space.keys():
                asked = self._open[one.number] = Asked(self._study, one._trial_id)
                asked.set_user_attr(_ERROR, None)
                self._reported[one.number] = {*one.intermediate_values}
                found.append(self._trial(self._frozen(one.number)))
                continue
            self._study.tell(one.number, state=TrialState.FAIL)  # the process was killed while it chose the values
            if (values := one.system_attrs.get("fixed_params")) is not None:
                self._study.enqueue_trial(values)
        return found

    def begin(self) -> Trial:
        """The next trial, with new values."""
        self._prepare()
        asked = self._study.ask(self._distributions)
        self._open[asked.number] = asked
        values = {name: self._search.space[name].value(value) for name, value in asked.params.items()}
        return Trial(asked.number, values, "unfinished")

    def report(self, number: int, completed: int, score: float, length: int) -> bool:
        """Note a validation score of the first seed of a trial; return whether it is to be pruned.

        Args:
            number: of the trial.
            completed: epochs or steps until then.
            score: validation score after them.
            length: epochs or steps of the run.
        """
        if self._search.pruner == "none" or completed >= length:
            return False
        if completed not in self._reported[number]:  # of a resumed trial some are known
            self._reported[number].add(completed)
            self._open[number].report(score, completed)
        return completed >= _warm_up(self._search) and self._open[number].should_prune()

    def prune(self, number: int, seconds: float) -> Trial:
        """Note that a trial was stopped because its score is below the median of the others."""
        from optuna.trial import TrialState

        self._open[number].set_user_attr(_RESULT, {"seconds": seconds})
        return self._tell(number, None, TrialState.PRUNED)

    def complete(self, number: int, results: Sequence[Validated]) -> Trial:
        """Note the results of the seeds of a trial; one that diverged makes it the worst of all."""
        diverged = next((one.diverged for one in results if one.diverged is not None), None)
        noted = {
            "scores": [one.score for one in results],
            "epochs": [one.epoch for one in results],
            "diverged": diverged,
            "metric": results[0].metric,
            "headline": results[0].headline,
            "examples": results[0].examples,
            "seconds": sum(one.seconds for one in results),
        }
        self._open[number].set_user_attr(_RESULT, noted)
        return self._tell(number, WORST if diverged is not None else fmean(one.score for one in results))

    def repeat(self, number: int, of: Trial) -> Trial:
        """Note that a trial has the recipe, and so the scores, of one that has ended."""
        from optuna.trial import TrialState

        known = self._frozen(of.number)
        noted = {**known.user_attrs.get(_RESULT, {}), "seconds": 0.0, "repeats": of.number}
        self._open[number].set_user_attr(_RESULT, noted)
        pruned = known.state == TrialState.PRUNED
        return self._tell(number, None if pruned else known.value, TrialState.PRUNED if pruned else None)

    def fail(self, number: int, error: str) -> Trial:
        """Note why a trial failed. It stays unfinished, and the next command resumes it."""
        self._open.pop(number).set_user_attr(_ERROR, error)
        return self._trial(self._frozen(number))

    def importances(self) -> dict[str, float]:
        """The share of each setting in what makes the best quarter of the trials differ from the others; none if few.

        They are PED-ANOVA's (Watanabe et al., 2023), https://arxiv.org/abs/2304.10255, of the best tenth if that is at
        least five trials.
        """
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        complete = count(self.trials(), "complete")
        if complete < ENOUGH_FOR_IMPORTANCES or len(self._search.space) < 2:
            return {}
        best = PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / complete))
        return dict(get_param_importances(self._study, evaluator=best))

    def _prepare(self) -> None:
        """Set what chooses the values of the next trial; before the first one, enqueue what is to be tried first."""
        trials = self._study.get_trials(deepcopy=False)
        if not trials:
            for values in self._search.grid if self._search.sampler == "grid" else [self._search.first or {}]:
                if values:
                    self._study.enqueue_trial(values)
        self._study.sampler = _sampler(self._search, len(trials))

    def _tell(self, number: int, value: float | None, state: Any = None) -> Trial:
        del self._open[number]
        return self._trial(self._study.tell(number, value, state=state))

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _trial(self, frozen: FrozenTrial) -> Trial:
        from optuna.trial import TrialState

        noted, error = frozen.user_attrs.get(_RESULT, {}), frozen.user_attrs.get(_ERROR)
        result: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in noted.items()}
        state: State = "unfinished"
        if frozen.state == TrialState.COMPLETE:
            state = "complete" if noted.get("diverged") is None else "diverged"
        elif frozen.state == TrialState.PRUNED:
            state = "pruned"
        elif error is not None:
            state = "failed"
        return Trial(
            frozen.number,
            {name: self._search.space[name].value(value) for name, value in frozen.params.items()},
            state,
            reported=dict(frozen.intermediate_values),
            error=error,
            **result,
        )


@contextmanager
def opened(folder: Path, search: Search) -> Generator[Database]:
    """Open the storage in a folder that this process holds, and create it if there is none.

    Raises:
        ValueError: Optuna is not installed.
        RunError: the file is damaged, or belongs to another search.
        OSError: the disk is full or read-only.
    """
    check_installed()
    import optuna
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / DATABASE
    with open(path, "ab"):  # an error of the system is named for what it is
        pass
    storage = None
    try:
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        except RuntimeError as error:  # of another version of Optuna
            raise _unusable(path, error) from error
        study = optuna.create_study(
            storage=storage,
            study_name=_STUDY,
            direction="maximize",
            pruner=_pruner(search),
            load_if_exists=True,
        )
        _check(study, search, folder)
        yield Database(study, search)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise _unusable(path, error) from error
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _unusable(path: Path, error: Exception) -> RunError:
    cause = error.__cause__ or error
    why = reason(getattr(cause, "orig", None) or cause)  # that of SQLite, without the statement
    return RunError(
        f"{path} cannot be used ({why}): if the disk is not full, move this file away, and the same command makes it "
        "again from the run folders"
    )


def check_installed() -> None:
    """Check that Optuna is installed.

    Raises:
        ValueError: it is not.
    """
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise ValueError("bisam tune needs optuna: pip install 'bisam[tune]'")


def _check(study: Study, search: Search, folder: Path) -> None:
    here: Mapping[str, Any] = search.to_dict()
    if (there := study.user_attrs.get(_SEARCH)) is None:
        study.set_user_attr(_SEARCH, here)
    elif found := differences(here, there):
        raise RunError(f"{folder} belongs to another search ({'; '.join(found)}): give another --out")


def _sampler(search: Search, number: int) -> BaseSampler:
    from optuna import samplers

    if search.sampler == "tpe":
        return samplers.TPESampler(seed=number)
    return samplers.RandomSampler(seed=number)  # the values of a grid are enqueued


def _pruner(search: Search) -> BasePruner:
    from optuna import pruners

    if search.pruner == "none":
        return pruners.NopPruner()
    return pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=_warm_up(search))


def _warm_up(search: Search) -> int:
    """Epochs or steps before which no trial is pruned."""
    return -(-search.base.length // WARM_UP)


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna import distributions

    if not isinstance(dimension, Range):
        return distributions.CategoricalDistribution(dimension.values)
    if dimension.whole:
        step = 1 if dimension.step is None else round(dimension.step)
        return distributions.IntDistribution(round(dimension.low), round(dimension.high), log=dimension.log, step=step)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
