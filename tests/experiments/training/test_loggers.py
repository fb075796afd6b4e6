"""Loggers: TensorBoard, wandb and MLflow for real and offline; their failures with doubles."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from importlib.machinery import ModuleSpec
from itertools import accumulate
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from bisam.experiments.launch import processes
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, Writer
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training import loggers
from bisam.experiments.training.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*``noload`` loader strategy"),  # mlflow's use of SQLAlchemy
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),  # mlflow's, until the process ends
]

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
NAMES = ("tensorboard", "wandb", "mlflow")


@pytest.fixture
def run(tmp_path):
    return Run.under(tmp_path / "study", SHORT)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


# The content of each logger


def tensorboard(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(run.folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow(run):
    with loggers.without_empty_folder(Path("mlruns")):
        client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{run.folder.parents[1] / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "bisam"]
    name = f"{run.folder.parent.name}/{run.folder.name}"
    (found,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == name]
    assert found.info.status == "FINISHED"
    assert found.data.params["method"] == run.recipe.method
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return {name: [(m.step, m.value) for m in points] for name, points in histories.items() if name != "epoch"}


def wandb(run):
    """The history in the last part of the run."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    parts = sorted((run.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({part.name for part in parts}) == 1  # one id
    found = {}
    for record in map(protocol.Record.FromString, records(parts[-1].read_bytes())):
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append((int(items["_step"]), value))
        if record.HasField("run"):
            config = {item.key or item.nested_key[0]: item.value_json for item in record.run.config.update}
            assert config["method"] == f'"{run.recipe.method}"'
            assert record.run.display_name == f"{run.folder.parent.name}/{run.folder.name}"
    return found


def records(data: bytes):
    """The payloads of a file in LevelDB's log format."""
    at, payload = 7, b""
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield payload
            payload = b""


HAS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """An empty database of MLflow: it takes seconds to make one."""
    path = tmp_path_factory.mktemp("tables") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # where it makes a folder
        pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture(params=NAMES)
def name(request, run):
    pytest.importorskip(request.param)
    if request.param == "mlflow":
        run.folder.mkdir(parents=True)
        shutil.copy(request.getfixturevalue("tables"), run.folder.parents[1])
    return request.param


def same_as_metrics(run, name):
    """The logger has each epoch once, with what metrics.csv says, and the test scores of the result."""
    rows = list(csv.DictReader((run.folder / "metrics.csv").read_text().splitlines()))
    found = HAS[name](run)
    scores = {key: found.pop(key) for key in ("test_best", "test_last") if key in found}
    assert scores.keys() == {"test_best", "test_last"} or name == "wandb"  # which has them in its summary
    for key, points in scores.items():
        assert points[-1][0] == len(rows)
        assert math.isclose(points[-1][1], run.result[key], rel_tol=1e-6)
    # Steps of wandb are losses.
    places = (
        list(accumulate(int(row["losses"]) for row in rows)) if name == "wandb" else [int(row["epoch"]) for row in rows]
    )
    assert set(found) == set(rows[0]) - ({"epoch"} if name != "wandb" else set())
    for metric, points in found.items():
        expected = [(place, float(row[metric])) for place, row in zip(places, rows, strict=True)]
        assert [step for step, _ in points] == [step for step, _ in expected]
        if metric in ("seconds", "relative_time"):  # of the first of two times, where an epoch was computed twice
            continue
        for (_, value), (_, written) in zip(points, expected, strict=True):
            assert math.isclose(value, written, rel_tol=1e-6) or (math.isnan(value) and math.isnan(written))


def test_a_logger_has_the_metrics_and_is_quiet(run, name, capfd, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    train(run, Machine(log=(name,)))
    assert not list(here.iterdir())
    same_as_metrics(run, name)
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_goes_on_in_the_same_place(run, name):

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, Machine(log=(name,)), interrupt)
    train(run, Machine(log=(name,)))
    same_as_metrics(run, name)


KILLED = """
import os, signal, sys
from pathlib import Path
from bisam.experiments.runs.machine import Machine
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, Writer
from bisam.experiments.training.train import train

calls, replace = 0, Path.replace
def replaced(path, target):
    global calls
    calls += target.name == "metrics.csv"
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
Path.replace = replaced
recipe = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
train(Run.under(Path(sys.argv[1]), recipe), Machine(log=(sys.argv[2],)))
"""


@pytest.mark.slow
def test_an_epoch_that_is_logged_again_after_a_kill_is_there_once(run, name):
    """Killed after the second epoch was logged and before it was saved."""
    command = [sys.executable, "-c", KILLED, run.folder.parents[1], name]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(run.checkpoint()["history"]) == 1
    train(run, Machine(log=(name,)))
    same_as_metrics(run, name)


def test_a_logger_that_joins_later_gets_the_whole_run(run, name):

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, Machine(log=()), interrupt)
    train(run, Machine(log=(name,)))
    same_as_metrics(run, name)


@pytest.mark.slow
def test_two_runs_make_the_tables_of_mlflow_at_once(tmp_path):
    pytest.importorskip("mlflow")
    recipes = [SHORT, Recipe(method="sgd", epochs=1, batch_size=256)]
    silent = SimpleNamespace(epoch=lambda *_: None, done=lambda *_: None)
    outcomes = processes.run_all(recipes, tmp_path, 2, Machine(log=("mlflow",)), silent)
    assert [outcome.error for outcome in outcomes] == [None, None]
    for recipe in recipes:
        same_as_metrics(Run.under(tmp_path, recipe), "mlflow")


def test_a_run_that_mlflow_does_not_know_is_begun_there(run, tables):
    run.folder.mkdir(parents=True)
    shutil.copy(tables, run.folder.parents[1])
    (run.folder / "mlflow.id").write_text("0123456789abcdef0123456789abcdef")
    train(run, Machine(log=("mlflow",)))
    same_as_metrics(run, "mlflow")


# Missing packages and failures


def test_an_unknown_logger_is_named():
    with pytest.raises(ValueError, match="unknown logger 'wandbb', did you mean 'wandb'"):
        loggers.check(["tensorboard", "wandbb"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_installed_is_named(run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"--log {name} needs {name}: pip install {name}"):
        train(run, Machine(log=(name,)))


class Service:
    """A double of wandb and its server."""

    def __init__(self, monkeypatch):
        self.rows, self.closed, self.options, self.fails = {}, 0, {}, None
        self.axes, self.summary = {}, {}
        module = ModuleType("wandb")
        module.__spec__ = ModuleSpec("wandb", None)
        module.Settings = type("Settings", (SimpleNamespace,), {"model_fields": {"finish_timeout": None}})
        module.setup = lambda settings: None
        module.errors = SimpleNamespace(UsageError=type("UsageError", (Exception,), {}))
        module.init = self.init
        self.usage_error = module.errors.UsageError
        monkeypatch.setitem(sys.modules, "wandb", module)

    def reach(self, at):
        if self.fails is not None and self.fails[0] == at:
            raise self.fails[1]

    def init(self, **options):
        self.reach("init")
        self.options = options
        return SimpleNamespace(
            step=max(self.rows, default=-1) + 1,
            log=self.log,
            finish=self.finish,
            define_metric=lambda name, step_metric: self.axes.update({name: step_metric}),
            summary=self.summary,
        )

    def log(self, row, step, commit):
        self.reach("log")
        assert commit
        assert step not in self.rows
        self.rows[step] = row

    def finish(self):
        self.reach("finish")
        self.closed += 1


@pytest.fixture
def service(monkeypatch):
    return Service(monkeypatch)


def test_a_run_has_one_id_for_its_life_and_sends_each_epoch_once(run, service):
    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, Machine(log=("wandb",)), interrupt)
    first, _ = service.options, service.rows.popitem()  # it never arrived
    train(run, Machine(log=("wandb", "wandb")))
    assert first["id"] == service.options["id"]
    assert first["resume"] == "allow"
    assert first["config"] == SHORT.to_dict()
    assert (first["project"], first["tags"]) == ("bisam", ["study"])
    assert first["settings"]["finish_timeout"] == 60
    rows = run.metrics()
    assert list(service.rows) == list(accumulate(int(row["losses"]) for row in rows))
    assert [row["epoch"] for row in service.rows.values()] == [1, 2, 3]
    assert [row["validation"] for row in service.rows.values()] == [row["validation"] for row in rows]
    assert service.axes == {"*": "epoch", "step/*": "losses"}
    assert service.summary == {key: run.result[key] for key in ("test_best", "test_last")}
    assert service.closed == 1


def test_a_folder_that_is_made_anew_is_another_run(tmp_path, service):
    ids = []
    for name in ("a", "b"):
        loggers.loggers(["wandb"], tmp_path / name / "slug" / "seed-0", SHORT.to_dict())
        ids.append(service.options["id"])
    assert len(set(ids)) == 2


def test_the_users_project_is_taken(run, service, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    loggers.loggers(["wandb"], run.folder, SHORT.to_dict())
    assert service.options["project"] == "mine"


@pytest.mark.parametrize(("at", "rows"), [("init", 0), ("log", 0), ("finish", 3)])
def test_a_run_survives_a_logger_that_fails(run, service, at, rows):
    service.fails = (at, ConnectionError("the network\nis down"))
    message = rf"--log wandb failed and is disabled for {run.folder}: ConnectionError: the network is down"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        assert train(run, Machine(log=("wandb",)))
    assert len(warned) == 1
    assert len(service.rows) == rows


def test_a_user_without_an_account_is_told_before_it_costs_an_epoch(run, service):
    service.fails = ("init", service.usage_error("No API key configured."))
    with pytest.raises(ValueError, match=r"--log wandb: No API key configured\. Without an account, set WANDB_MODE"):
        train(run, Machine(log=("wandb",)))
    assert run.checkpoint() is None


def test_a_server_of_mlflow_that_is_not_there_is_survived(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.warns(RuntimeWarning, match="--log mlflow failed and is disabled") as warned:
        assert train(run, Machine(log=("mlflow",)))
    assert len(warned) == 1


class Tracker:
    """A double of mlflow and its database."""

    def __init__(self, monkeypatch):
        self.points, self.params, self.ended = [], {}, []
        module = ModuleType("mlflow")
        module.__spec__ = ModuleSpec("mlflow", None)
        module.entities = SimpleNamespace(Metric=lambda *point: point, Param=lambda *pair: pair)
        module.exceptions = SimpleNamespace(MlflowException=RuntimeError)
        module.MlflowClient = lambda uri: self
        monkeypatch.setitem(sys.modules, "mlflow", module)

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifact_location):
        assert artifact_location.startswith("file:///")
        return "1"

    def create_run(self, experiment, run_name, tags):
        assert tags["study"] == "study"
        return self.get_run("a-run")

    def get_run(self, id_):
        assert id_ == "a-run"
        epochs = {name: value for name, value, _, _ in self.points if name in ("epoch", "step/losses")}
        info = SimpleNamespace(run_id=id_, lifecycle_stage="active")
        return SimpleNamespace(info=info, data=SimpleNamespace(metrics=epochs))

    def log_batch(self, id_, metrics=(), params=()):
        self.points += metrics
        self.params |= dict(params)

    def set_terminated(self, id_):
        self.ended.append(id_)


def test_mlflow_is_told_each_epoch_once(run, monkeypatch):
    tracker = Tracker(monkeypatch)

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, Machine(log=("mlflow",)), interrupt)
    assert (run.folder / "mlflow.id").read_text() == "a-run"
    train(run, Machine(log=("mlflow",)))
    told = [(step, value) for name, value, _, step in tracker.points if name == "validation"]
    assert told == [(row["epoch"], row["validation"]) for row in run.metrics()]
    told = {name: value for name, value, _, step in tracker.points if name.startswith("test_") and step == 3}
    assert told == {key: run.result[key] for key in ("test_best", "test_last")}
    assert tracker.params["method"] == "bisam_log"
    assert tracker.ended == ["a-run"]


# Step metrics


def steps_of(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(run.folder / "tensorboard" / "steps"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_step_metrics_are_there_once_also_of_an_epoch_that_was_interrupted(run, service, monkeypatch):
    """Every second one of 15 losses in 3 epochs has step metrics, but not the last of an epoch, which the epoch has."""
    tracker, calls = Tracker(monkeypatch), 0
    machine = Machine(log=("tensorboard", "wandb", "mlflow"), log_every=2)
    usual = loggers.TensorBoard.log_step

    def interrupted(self, scalars, losses):
        nonlocal calls
        usual(self, scalars, losses)
        calls += 1
        if calls == 4:
            service.log({"lost": True}, losses, commit=True)  # as the others, which are told after it
            tracker.points.append(("step/losses", losses, 0, losses))
            raise KeyboardInterrupt

    monkeypatch.setattr(loggers.TensorBoard, "log_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run, machine)
    assert len(run.metrics()) == 1
    train(run, machine)
    assert [row["losses"] for row in run.metrics()] == [5, 5, 5]
    places = [2, 4, 6, 8, 12, 14]
    found = steps_of(run)
    assert set(found) >= {"step/loss", "step/learning_rate", "step/images_per_second"}
    assert all([step for step, _ in points] == places for points in found.values())
    assert all(value > 0 for _, value in found["step/loss"])
    assert sorted(service.rows) == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    told = [step for name, _, _, step in tracker.points if name == "step/losses"]
    assert told == places


def test_without_step_metrics_a_logger_has_the_epochs_alone(run):
    train(run, Machine(log=("tensorboard",), log_every=0))
    assert not (run.folder / "tensorboard" / "steps").exists()
    same_as_metrics(run, "tensorboard")


def test_tensorboard_has_the_recipe_as_hyper_parameters(run):
    train(run, Machine(log=("tensorboard",)))
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    data = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
    events = accumulator(str(run.folder / "tensorboard"))
    events.Reload()
    start = data.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    values = start.session_start_info.hparams
    assert values["method"].string_value == "bisam_log"
    assert values["rho"].number_value == 0.4
    assert set(values) == set(SHORT.to_dict())


# The clock


class Clock:
    """The time that the loggers see."""

    def __init__(self, monkeypatch):
        self.now = 1_800_000_000.0
        monkeypatch.setattr(loggers, "time", SimpleNamespace(time=self.read))

    def read(self):
        self.now += 0.001
        return self.now


@pytest.mark.parametrize("change", [-86_400, 0.5, 3_600], ids="{:g} s".format)
@pytest.mark.parametrize("stops", [(2,), (1, 2)], ids=str)
def test_tensorboard_shows_all_epochs_in_order_whatever_the_clock_does(run, monkeypatch, change, stops):
    clock = Clock(monkeypatch)

    for stop in stops:

        def interrupt(row, stop=stop):
            if row["epoch"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(run, Machine(log=("tensorboard",)), interrupt)
        clock.now += change
    train(run, Machine(log=("tensorboard",)))
    same_as_metrics(run, "tensorboard")
    assert times_are_in_order(run)


def times_are_in_order(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(run.folder / "tensorboard"))
    events.Reload()
    times = [event.wall_time for event in events.Scalars("validation")]
    return times == sorted(times)


def test_a_clock_that_goes_back_within_a_run_leaves_the_epochs_in_order(run, monkeypatch):
    clock = Clock(monkeypatch)
    train(run, Machine(log=("tensorboard",)), lambda row: setattr(clock, "now", clock.now - 1000))
    same_as_metrics(run, "tensorboard")
    assert times_are_in_order(run)


def test_an_epoch_that_was_logged_and_not_saved_is_there_once_after_the_clock_went_back(run, monkeypatch):
    clock = Clock(monkeypatch)
    save = Writer.save

    def failing(self, state, history):
        if len(history) == 2:
            raise OSError("No space left on device")
        save(self, state, history)

    monkeypatch.setattr(Writer, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        train(run, Machine(log=("tensorboard",)))
    monkeypatch.setattr(Writer, "save", save)
    clock.now -= 10_000
    train(run, Machine(log=("tensorboard",)))
    same_as_metrics(run, "tensorboard")


def test_tensorboard_goes_on_behind_files_of_torchs_own_writer(run, monkeypatch):
    """Of bisam 0.1, under a clock that was ahead."""
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(run.folder / "tensorboard"))
    writer.add_scalar("validation", 0.5, 1)
    writer.close()
    (written,) = (run.folder / "tensorboard").iterdir()
    second = int(written.name.split(".")[3])
    written.rename(written.with_name(written.name.replace(str(second), str(second + 50_000))))
    board = loggers.TensorBoard(run.folder, {})
    for epoch in (2, 3):
        board.log({"validation": epoch / 10}, epoch, 10 * epoch)
    assert [step for step, _ in tensorboard(run)["validation"]] == [1, 2, 3]
    assert times_are_in_order(run)
