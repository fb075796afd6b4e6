"""Cluster: studies on a real Ray of two CPUs, and what is lost there; its failures with a double."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from bisam import __version__
from bisam.experiments.errors import RunError
from bisam.experiments.launch import ray as on_ray
from bisam.experiments.launch.outcomes import Outcome
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train
from tests.support.doubles import Silent

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's sockets and log files

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
SGD = replace(SHORT, method="sgd", rho=None)
QUIET = Machine(log=())


def weights(run):
    return {k: v for k, v in run.checkpoint()["sharp"].items() if isinstance(v, torch.Tensor)}


def same_bits(a, b):
    ours, theirs = weights(a), weights(b)
    same = ("test_best", "test_last", "validation_best", "best_epoch")
    assert [a.result[k] for k in same] == [b.result[k] for k in same]
    return all(torch.equal(ours[k], theirs[k]) for k in ours)


# On a real cluster


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        small = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **small)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import the tests
        yield ray
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()


@pytest.mark.slow
def test_a_study_has_the_bits_of_one_process(ray, tmp_path):
    recipes = [replace(SGD, epochs=1), replace(SHORT, method="sam"), SHORT]
    done, damaged, fresh = (Run.under(tmp_path / "runs", recipe) for recipe in recipes)
    kept = train(done, QUIET)
    damaged.folder.mkdir(parents=True)
    (damaged.folder / "checkpoint.pt").write_bytes(b"garbage")
    progress = Silent()
    outcomes = on_ray.run_all(recipes, tmp_path / "runs", QUIET, progress, address="auto")
    assert [outcome.recipe for outcome in outcomes] == recipes
    assert outcomes[0].result == kept
    assert "checkpoint.pt is damaged" in outcomes[1].error
    assert outcomes[2].result == fresh.result
    assert progress.ended == {outcome.recipe: outcome.error for outcome in outcomes}
    assert not list((tmp_path / "runs").glob(".ray-*"))
    whole = Run.under(tmp_path / "whole", SHORT)
    train(whole, QUIET)
    assert same_bits(whole, fresh)


@dataclass(frozen=True)
class Deadly(Machine):
    """Kills its process in the second epoch, with the lock held: always in bfloat16, else once."""

    folder: Path = Path()

    def fabric(self, precision="32"):
        with (self.folder / precision).open("a") as file:
            file.write("x")
        if precision == "bf16" or (self.folder / precision).read_text() == "x":
            move, calls = Path.replace, []

            def replaced(path, target):
                calls.append(target.name)
                if calls.count("metrics.csv") == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return move(path, target)

            Path.replace = replaced
        return super().fabric(precision)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_goes_on_to_the_same_bits(ray, tmp_path):
    recipes = [SHORT, replace(SHORT, precision="bf16", epochs=30)]
    machine = Deadly(log=(), folder=tmp_path)
    outcomes = on_ray.run_all(recipes, tmp_path / "runs", machine, Silent(), address="auto", retries=2)
    assert outcomes[0].error is None
    assert "its worker was lost 3 times (WorkerCrashedError; short of memory?): the same" in outcomes[1].error
    assert ((tmp_path / "32").read_text(), (tmp_path / "bf16").read_text()) == ("xx", "xxx")
    assert len(Run.under(tmp_path / "runs", recipes[1]).checkpoint()["history"]) == 3  # each made one epoch
    whole = Run.under(tmp_path / "whole", SHORT)
    train(whole, QUIET)
    assert same_bits(whole, Run.under(tmp_path / "runs", SHORT))


class Brief(Machine):
    """Has no time left once a run has begun."""

    def later(self, seconds):
        return replace(self, max_time=1e-3)


@pytest.mark.slow
def test_runs_that_are_out_of_time_go_on_to_the_same_bits(ray, tmp_path):
    recipes, progress = [SHORT, SGD], Silent()
    runs = [Run.under(tmp_path / "runs", recipe) for recipe in recipes]

    def ended(machine):
        outcomes = on_ray.run_all(recipes, tmp_path / "runs", machine, progress, address="auto")
        assert not any(outcome.error for outcome in outcomes)
        return [outcome.out_of_time for outcome in outcomes]

    assert ended(Machine(log=(), max_time=1e-6)) == [True, True]
    assert not any(run.folder.exists() for run in runs)  # none was begun
    assert ended(Brief(log=(), max_time=3600.0)) == [True, True]
    assert [len(run.metrics()) for run in runs] == [1, 1]
    assert progress.ended == {}
    assert ended(QUIET) == [False, False]
    whole = Run.under(tmp_path / "whole", SHORT)
    train(whole, QUIET)
    assert same_bits(whole, runs[0])


@pytest.mark.slow
def test_a_folder_that_workers_do_not_see_is_said_and_not_made(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "marker_file", lambda root: nullcontext(root / "on-another-machine"))
    (outcome,) = on_ray.run_all([SHORT], tmp_path, QUIET, Silent(), address="auto")
    assert f"does not see {tmp_path}: give an --out on storage that all machines share" in outcome.error
    assert not Run.under(tmp_path, SHORT).folder.exists()


INTERRUPTED = """
import sys
from pathlib import Path
from bisam.experiments.launch import ray as on_ray
from bisam.experiments.runs.machine import Machine
from bisam.experiments.recipes.recipe import Recipe

class Progress:
    def epoch(self, recipe, epoch, validation):
        print("epoch", flush=True)
    def done(self, recipe, error, elsewhere=False):
        print(error, flush=True)

recipe = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=100000, batch_size=256)
try:
    on_ray.run_all([recipe], Path(sys.argv[1]), Machine(log=()), Progress(), address="local")
except KeyboardInterrupt:
    print("interrupted")
"""


def descendants(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = {int(child) for task in tasks for child in task.read_text().split()}
    return children | {pid for child in children for pid in descendants(child)}


def ended(pid):
    """Whether a process that is not ours to wait for ends soon."""
    try:
        return bool(select.select([os.pidfd_open(pid)], [], [], 30)[0])
    except ProcessLookupError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="looks into /proc")
def test_ctrl_c_leaves_a_local_cluster_quietly_and_nothing_behind(tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "-c", INTERRUPTED, tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as study:
        assert study.stdout is not None
        assert study.stdout.readline() == "epoch\n"
        others = descendants(study.pid)
        os.killpg(study.pid, signal.SIGINT)  # to the whole group, as a terminal does
        out, err = study.communicate(timeout=60)
    assert out.split()[-1] == "interrupted"
    assert err == ""
    assert len(others) > 2
    assert all(ended(pid) for pid in others)
    assert Run.under(tmp_path, replace(SHORT, epochs=100000)).checkpoint() is not None


# With a double of Ray


class Lost(Exception):
    pass


class Full(Lost):
    pass


class Failed(Lost):
    pass


class Ray:
    """Its tasks end as the script says, one after another."""

    exceptions = SimpleNamespace(RayError=Lost, OutOfMemoryError=Full, RayTaskError=Failed)

    def __init__(self, *script):
        self.script, self.cancelled, self.started = list(script), [], []

    def start(self, recipe, again=False):
        self.started.append(again)
        return object()

    def wait(self, tasks, num_returns=1, timeout=None):
        if self.script and self.script[0] is ConnectionError:
            raise ConnectionError("gone")
        return tasks[:1], tasks[1:]

    def get(self, task):
        end = self.script.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def cancel(self, task, force):
        self.cancelled.append(task)


def played(tmp_path, *script, retries=3):
    ray, outcomes = Ray(*script), []
    tasks = {ray.start(SHORT): SHORT}
    on_ray.run_as_tasks(ray, tasks, ray.start, retries, on_ray.EpochPoller(tmp_path, Silent()), outcomes.append)
    return ray, outcomes


def test_a_lost_task_is_given_again(tmp_path):
    ray, outcomes = played(tmp_path, Lost(), Lost(), Outcome(SHORT, {}))
    assert outcomes == [Outcome(SHORT, {})]
    assert ray.started == [False, True, True]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Lost, "its worker was lost 3 times (Lost; short of memory?): the same command resumes after its last epoch"),
        (Full, "its machine was short of memory 3 times: give each run more --cpus; the same command resumes"),
    ],
)
def test_a_task_that_is_lost_too_often_is_given_up(tmp_path, error, message):
    _, (outcome,) = played(tmp_path, error(), error(), error(), retries=2)
    assert message in outcome.error


def test_what_fails_before_a_run_begins_is_said_and_not_repeated(tmp_path):
    _, (outcome,) = played(tmp_path, Failed("ray::_work()\n  File ...\nModuleNotFoundError: No module named 'bisam'\n"))
    assert outcome.error == "ModuleNotFoundError: No module named 'bisam'"


def test_a_cluster_that_goes_away_is_one_line(tmp_path):
    with pytest.raises(
        RunError, match=r"the connection to the Ray cluster was lost \(gone\): the same command resumes"
    ):
        played(tmp_path, ConnectionError)


def test_epochs_are_told_by_the_run_folders(tmp_path):
    train(Run.under(tmp_path, SHORT), QUIET)
    progress = Silent()
    poller = on_ray.EpochPoller(tmp_path, progress)
    poller.poll([SHORT, SGD])
    poller._next = 0
    poller.poll([SHORT, SGD])
    assert progress.epochs == [(SHORT, 3)]


def test_a_lost_machines_lock_is_waited_for(tmp_path, monkeypatch):
    """Until the lease is over; then it is said that the folder is in use."""
    monkeypatch.setattr(on_ray, "LEASE", 0.1)
    folder = Run.under(tmp_path, SHORT).folder
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        outcome = on_ray.work(SHORT, tmp_path, QUIET, tmp_path, __version__, 1, os.getcwd(), again=True)
    assert "is in use by another process" in outcome.error
    outcome = on_ray.work(SHORT, tmp_path, QUIET, tmp_path, __version__, 1, os.getcwd(), again=True)
    assert outcome.error is None


def test_another_version_on_a_worker_is_said(tmp_path):
    outcome = on_ray.work(SHORT, tmp_path, QUIET, tmp_path, "0.0", 1, os.getcwd(), again=False)
    assert f"has bisam {__version__}, this machine 0.0: install the same version on all" in outcome.error
    assert not Run.under(tmp_path, SHORT).folder.exists()


# The user's mistakes


def test_without_ray_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--ray needs ray: pip install 'bisam\[cluster\]'"):
        on_ray.run_all([SHORT], tmp_path, QUIET, Silent(), address="local")


@pytest.mark.parametrize(
    ("machine", "settings", "message"),
    [
        (Machine(nodes=2), {}, "--nodes 2 with --ray: a run uses one machine there; use --devices instead"),
        (Machine(device="cuda"), {}, "--device cuda with --ray needs --gpus"),
        (Machine(device="cuda:1"), {"gpus": 1}, "Ray assigns the GPUs"),
        (Machine(devices=2), {"gpus": 0.5}, "--devices 2 need --gpus 2, got 0.5"),
        (Machine(), {"gpus": 1.5}, "--gpus 1.5 is neither a whole number nor a fraction of one GPU"),
        (Machine(), {"gpus": -1}, "--gpus is too small: -1"),
        (Machine(), {"cpus": 0}, "--cpus is too small: 0"),
        (Machine(), {"address": "nonsense"}, "--ray 'nonsense' is not an address: use local, auto, host:port"),
    ],
)
def test_a_mistake_is_named(tmp_path, monkeypatch, machine, settings, message):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with pytest.raises(ValueError, match=message):
        on_ray.run_all([SHORT], tmp_path, machine, Silent(), **{"address": "auto", **settings})
    assert not Run.under(tmp_path, SHORT).folder.exists()


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_where_nobody_listens_there_is_no_cluster(tmp_path, monkeypatch, prefix):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"{prefix}127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"--ray {address}: cluster not reachable .*ray start --head"):
            on_ray.run_all([SHORT], tmp_path, QUIET, Silent(), address=address)


def test_a_cluster_that_asks_for_a_token_says_so(tmp_path, monkeypatch):
    def init(**_):
        try:
            raise RuntimeError("AuthenticationError: RPC error: Authentication token is missing or incorrect")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster") from error

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ValueError, match=r"auto requires a token \(Failed to connect.*\): set RAY_AUTH_MODE=token"):
        on_ray.run_all([SHORT], tmp_path, QUIET, Silent(), address="auto")


def test_a_task_knows_its_gpu_as_cuda_and_data_by_their_whole_path():
    machine = on_ray.machine_of_a_task(Machine(data_dir=Path("data")), gpus=0.25)
    assert machine.device == "cuda"
    assert machine.data_dir == Path.cwd() / "data"
    assert on_ray.machine_of_a_task(Machine(), gpus=0).device == "cpu"


def test_a_run_for_which_there_is_no_room_is_said():
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}, {"Alive": False, "Resources": {}}])
    on_ray.check_capacity(ray, 2, 0, strict=True)
    with pytest.raises(ValueError, match="no machine of the cluster has 4 CPUs: give smaller --cpus or --gpus"):
        on_ray.check_capacity(ray, 4, 0, strict=True)
    with pytest.warns(RuntimeWarning, match=r"has 1 CPUs and 0\.5 GPUs: the runs wait for such a machine to join"):
        on_ray.check_capacity(ray, 1, 0.5, strict=False)
