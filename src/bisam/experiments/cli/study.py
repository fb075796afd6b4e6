"""A study as a subject of `bisam run`, `report`, `plot` and `list`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bisam.experiments.cli.folders import check_data_dir
from bisam.experiments.cli.idle import refuse_idle
from bisam.experiments.cli.options import Launch, flag, with_file
from bisam.experiments.cli.plan import show_runs, show_times
from bisam.experiments.cli.progress import Display
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.errors import CopyError, DamagedError, RunError, to_find
from bisam.experiments.launch.outcomes import Done, Outcome, collect_outcomes, known_outcome
from bisam.experiments.recipes import config
from bisam.experiments.recipes.changes import pairs
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.recipes.versions import VERSION
from bisam.experiments.runs.archive import Source, source, write_archive
from bisam.experiments.runs.durations import duration
from bisam.experiments.runs.folder import Finished, Run, finished, read_recipe
from bisam.experiments.runs.machine import Machine, threads
from bisam.experiments.runs.signals import exit_code, ignore_further, past_tense
from bisam.experiments.studies.study import Analyses, Study, expand

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StudySubject:
    """A study on the command line."""

    study: Study

    @property
    def name(self) -> str:
        """The study's name."""
        return self.study.name

    def listed(self) -> tuple[str, str, str]:
        """Title, number of runs and methods, for `bisam list`."""
        from bisam.experiments.reports.groups import title

        recipes = self.study.recipes(None)
        methods = list(dict.fromkeys(title(recipe) for recipe in recipes))
        shown = ", ".join(methods) if len(methods) < 6 else f"{len(methods)} methods"
        return self.study.title, f"{len(recipes)} x {self.study.seeds} seeds", shown

    def check(self, launch: Launch, machine: Machine, given: frozenset[str]) -> None:
        """Refuse flags that have no effect on this study, and devices and loggers that are missing.

        Raises:
            ValueError: there are some; it names them.
        """
        from bisam.experiments.training import loggers

        if launch.ray is None:
            _refuse("without --ray there is no cluster", given & {"gpus", "cpus", "retries"})
        else:
            _refuse("with --ray, --cpus and --gpus decide how many runs there are at a time", given & {"workers"})
            _refuse("with --ray each run is a task", given & {"stack"})
        recipes = self._changed(launch, machine)
        if launch.config is not None and (own := config.changes(launch.config)[1]):
            errors.print(f"bisam: {launch.config}: without effect is {', '.join(own)}, of which a study has its own")
        refuse_idle(recipes, machine, given, frozenset(pairs(launch.changes, "epochs=1")))
        if launch.stack is not None:
            self._check_stack(recipes, machine, given)
        loggers.check(machine.log)
        if launch.ray is None and machine.nodes > 1:
            raise ValueError(
                f"--nodes {machine.nodes}: each run of a study is on one machine; on many machines use --ray"
            )
        if launch.dry_run:  # it checks what takes time after it has printed the runs
            return
        _refuse("without --dry-run nothing is estimated", given & {"estimate"})
        _check_names(recipes)
        _check_methods(recipes)
        if self.study.analyses is not None:
            from bisam.experiments.analyses.catalogue import known

            known(self.study.analyses.what)  # fails here, before the first run, if a package is missing

    def _check_stack(self, recipes: Sequence[Recipe], machine: Machine, given: frozenset[str]) -> None:
        from bisam.experiments.training.stacked.checks import check

        _refuse("a stack writes metrics.csv and no other log", given & {"log", "log_every"})
        if self.study.analyses is not None:
            raise ValueError(f"--stack keeps no weights, which the analyses of {self.name} need: leave --stack out")
        for recipe in recipes:
            check(recipe, machine)

    def plan(self, launch: Launch, machine: Machine, out: Path) -> int:
        """Print the runs, and an estimate of the time of those that are left."""
        recipes, workers = self._recipes(launch, machine), launch.workers or machine.slots
        left, unmeasured = show_runs(recipes, out / self.study.folder, self.study.analyses)
        _check_names(recipes)
        _check_methods(left)
        count = sum(left.values())
        said = f"{count} of {len(recipes)} runs of {self.name} are left"
        if self.study.analyses is not None:
            said += f", and the analyses of {unmeasured}"
        if not launch.estimate or not count:
            console.print(said)
            return 0
        if launch.ray is None:
            machine.fabric()
        threads(min(workers, len(recipes)))  # as in the processes of the runs
        seconds = show_times(left, machine, launch.stack)
        time = "?" if seconds is None else duration(seconds / min(workers, count))
        more = "" if self.study.analyses is None else ", without the time of the analyses"
        console.print(f"{said}, about {time} in {workers} processes{more}")
        return 0

    def run(self, launch: Launch, machine: Machine, out: Path) -> int:
        """Run what is not finished yet, and report."""
        recipes, root = self._recipes(launch, machine), out / self.study.folder
        analyses = self.study.analyses
        units = 0 if analyses is None else len(analyses.what)
        with Display(recipes, units, quiet=launch.quiet, verbose=launch.verbose) as display:
            try:
                outcomes = _launched(recipes, root, launch, machine, display, analyses)
            except KeyboardInterrupt as error:
                ignore_further()
                display.stop()
                errors.print(f"{past_tense(error)}: {_goes_on(display.finished, len(recipes), launch)}")
                return exit_code(error)
        if any(outcome.out_of_time for outcome in outcomes):
            show_failed(outcomes)
            errors.print(f"--max-time is over: {_goes_on(display.finished, len(recipes), launch)}")
            return 130
        if any(outcome.result for outcome in outcomes):
            from bisam.experiments.cli.study_report import report

            wanted = dict.fromkeys(replace(recipe, seed=0) for recipe in recipes)
            runs, left_out = all_finished(root, here := Source(out, out))
            found = [run for run in runs if without_seed(run) in wanted]
            report(self.study, self._arranged(found, list(wanted)), left_out, here, out / self.name)
        return show_failed(outcomes)

    def report(self, changes: tuple[str, ...], out: Path, to: Path | None) -> int:
        """Print the table, and write the report."""
        from bisam.experiments.cli.study_report import report

        with source(out) as place:
            report(self.study, *self._finished(changes, place), place, to or place.beside / self.name)
        return 0

    def archive(self, changes: tuple[str, ...], out: Path, to: Path) -> int:
        """Write its finished runs to one file: those that `report` shows."""
        place, root = Source(out, out), out / self.study.folder
        runs, damaged = self._finished(changes, place)
        faults = _faults(runs)
        for fault in faults:
            errors.print(f"bisam: skipped: {fault}")
        without = [fault.path for fault in faults if isinstance(fault, DamagedError)]
        size = write_archive(to, root, sorted(map(_folder, runs)), without)
        unfinished = _unfinished(root, {*self.study.changed(None, changes), *map(without_seed, runs)})
        left = [f"{count} {kind}" for kind, count in (("unfinished", unfinished), ("damaged", len(damaged))) if count]
        said = f"{len(runs)} runs of {self.name}, {size / 1e3:,.0f} kB" + f"; left out: {', '.join(left)}" * bool(left)
        console.print(f"{to}: {said}", soft_wrap=True, highlight=False)
        return 0

    def figure(self, name: str | None, changes: tuple[str, ...], out: Path) -> Figure:
        """A figure of its runs, by default its first one.

        Raises:
            ValueError: the name is unknown, or no finished run is in that figure.
        """
        from bisam.experiments.reports import analyses, figures, predictor_plot
        from bisam.experiments.reports.parts import compared

        with source(out) as place:
            runs, _ = self._finished(changes, place)
            entries, _ = analyses.read(runs if name == predictor_plot.NAME else ())
        if name != predictor_plot.NAME:
            return figures.draw(name or self.study.figures[0], runs, self.study.regret)
        if (own := self.study.analyses) is None:
            raise ValueError(f"{name} shows the analyses of a study, and {self.name} has none: try bisam list")
        comparisons, _, _ = compared(runs, entries, own)
        return predictor_plot.predictors(comparisons, own.shown)

    def _changed(self, launch: Launch, machine: Machine) -> list[Recipe]:
        changes = with_file(launch.config, launch.changes, launch.epochs)
        return self.study.changed(launch.epochs, _pinned(changes, machine.data_dir))

    def _recipes(self, launch: Launch, machine: Machine) -> list[Recipe]:
        return expand(self._changed(launch, machine), launch.seeds or self.study.seeds, self.study.first_seed)

    def _finished(self, changes: tuple[str, ...], place: Source) -> tuple[list[Finished], list[str]]:
        """Its finished runs, or else runs of its methods with other settings in its folder; and the damaged ones."""
        runs, left_out = all_finished(place.folder / self.study.folder, place)
        with suppress(ValueError, RunError):  # its runs can be reported without the weights that they started with
            changes = _pinned(changes, Machine().data_dir)
        wanted = dict.fromkeys(self.study.changed(None, changes))
        found = [run for run in runs if without_seed(run) in wanted]
        if not found and runs and not changes:
            methods = {recipe.method for recipe in wanted}
            found = [run for run in runs if run.recipe.method in methods]
            if found:
                errors.print(f"bisam: no finished run has the settings of {self.name}: these runs have other settings")
        if not found:
            again = " ".join(["bisam run", self.name, *(f"--set {change}" for change in changes)])
            remedy = to_find(again, self.study.folder, place.given)
            if place.archived:
                remedy = f"it has runs in {', '.join(sorted(path.name for path in place.folder.iterdir()))}"
            raise ValueError(f"no finished run of {self.name} in {place.given}: {remedy}")
        if earlier := sorted({run.recipe.version for run in found} - {VERSION}):
            count, which = sum(run.recipe.version in earlier for run in found), " or ".join(map(str, earlier))
            errors.print(
                f"bisam: {count} of {len(found)} runs have recipe version {which}, whose results are not those of "
                f"version {VERSION}: they are reported in groups of their own"
            )
        return self._arranged(found, list(wanted)), left_out

    def _arranged(self, runs: list[Finished], recipes: list[Recipe]) -> list[Finished]:
        """Runs in the order of the report."""
        from bisam.experiments.reports.groups import arranged

        return arranged(runs, recipes, self.study.baselines)


def _pinned(changes: tuple[str, ...], data_dir: Path) -> tuple[str, ...]:
    """The values of `--set`, with a checksum of initial weights: without it runs would resume with other ones."""
    if not (weights := pairs(changes, "epochs=1").get("weights")) or weights.lower() == "none":
        return changes
    from bisam.experiments.models.initial import pinned

    others = [one for one in changes if one.partition("=")[0].strip() != "weights"]
    return *others, f"weights={pinned(weights, data_dir)}"


def _check_names(recipes: Collection[Recipe]) -> None:
    """Check that the data sets and models of recipes exist."""
    from bisam.experiments.data import check_name as check_dataset
    from bisam.experiments.models.build import check_name as check_model

    for dataset in dict.fromkeys(recipe.dataset for recipe in recipes):
        check_dataset(dataset)
    for model in dict.fromkeys(recipe.model for recipe in recipes):
        check_model(model)


def _check_methods(recipes: Iterable[Recipe]) -> None:
    for recipe in recipes:
        recipe.check_trainable()


def _launched(
    recipes: Sequence[Recipe],
    root: Path,
    launch: Launch,
    machine: Machine,
    display: Display,
    analyses: Analyses | None,
) -> Sequence[Outcome]:
    """Outcomes of the runs and their analyses, in processes of this machine or on a cluster."""
    if all(known_outcome(recipe, root, analyses) for recipe in recipes):  # what trains takes seconds to load
        return collect_outcomes(recipes, root, display, _none_left, analyses)
    check_data_dir(recipes, machine)
    if launch.ray is None:
        machine.fabric()  # fails here, before the first run, if the device is missing
        from bisam.experiments.launch.processes import run_all

        return run_all(recipes, root, launch.workers or machine.slots, machine, display, analyses, launch.stack)
    from bisam.experiments.launch.ray import run_all as run_on_ray

    return run_on_ray(
        recipes,
        root,
        machine,
        display,
        address=launch.ray,
        gpus=launch.gpus,
        cpus=launch.cpus,
        retries=launch.retries,
        analyses=analyses,
    )


def _none_left(left: Sequence[Recipe], _: Done) -> None:
    raise AssertionError(left)


def all_finished(root: Path, place: Source) -> tuple[list[Finished], list[str]]:
    """The finished runs in `root`, each once, and the reasons why damaged ones are left out, which are printed too.

    Raises:
        RunError: a run in an archive is damaged.
    """
    runs, left_out = list[Finished](), list[str]()
    for run in finished(root):
        if isinstance(run, Finished):
            runs.append(run)
            continue
        if isinstance(run, CopyError):  # nothing is missing without it
            errors.print(f"bisam: skipped: {place.fault(run)}")
            continue
        if place.archived:
            raise place.fault(run)
        errors.print(f"bisam: skipped: {run}")
        if isinstance(run, DamagedError):
            left_out.append(f"{run.path.relative_to(root).as_posix()} ({run.reason})")
        else:
            left_out.append(str(run).replace(f"{root}/", ""))
    return runs, left_out


def _faults(runs: Iterable[Finished]) -> list[RunError]:
    """Why the analyses and the statistics of some finished runs cannot be read."""
    from bisam.experiments.reports import analyses

    _, faults = analyses.read(runs := list(runs))
    for run in runs:
        try:
            Run(_folder(run), run.recipe).stats()
        except RunError as error:
            faults.append(error)
    return faults


def _unfinished(root: Path, recipes: Collection[Recipe]) -> int:
    """The number of runs in `root` that are of these recipes and have no result."""
    count = 0
    for path in root.glob("*/seed-*/recipe.json"):
        if not path.with_name("result.json").exists():
            with suppress(RunError):
                count += replace(read_recipe(path.parent), seed=0, version=VERSION) in recipes
    return count


def _folder(run: Finished) -> Path:
    assert run.folder is not None  # of a run that was read from one
    return run.folder


def without_seed(run: Finished) -> Recipe:
    """The recipe of a run as studies list it, with seed 0 and the latest version."""
    return replace(run.recipe, seed=0, version=VERSION)


def show_failed(outcomes: Sequence[Outcome]) -> int:
    """Print one line for each reason why runs failed or did not start.

    Returns:
        The exit code: 2 if none could start; 1 if some failed, or all diverged. Some that diverge are a part of many
        studies, as at the largest radii of a grid.
    """

    def reason(outcome: Outcome) -> tuple[str, bool]:
        return outcome.error or "", outcome.started

    failed = sorted((outcome for outcome in outcomes if outcome.error), key=reason)
    for (error, started), same in itertools.groupby(failed, key=reason):
        first, *others = same
        more = f" and {len(others)} more" if others else ""
        which = f"{first.recipe.slug}, seed {first.recipe.seed}{more}"
        state = "in use elsewhere" if first.elsewhere else "failed" if started else "did not start"
        errors.print(f"bisam: {which} {state}: {error}")
    if not failed:
        return int(all(outcome.result is not None and outcome.result.get("diverged") for outcome in outcomes))
    return 1 if any(outcome.started for outcome in outcomes) else 2


def _goes_on(finished: int, runs: int, launch: Launch) -> str:
    stacks = "" if launch.stack is None else ", and an interrupted stack begins again"
    return f"{finished} of {runs} runs are finished; the same command resumes the others{stacks}"


def _refuse(why: str, idle: frozenset[str]) -> None:
    if idle:
        raise ValueError(f"{why}: leave {', '.join(map(flag, sorted(idle)))} out")
