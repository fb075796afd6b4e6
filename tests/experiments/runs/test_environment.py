"""The environment that results name."""

from __future__ import annotations

import subprocess

from bisam.experiments.runs import environment


def test_the_commit_is_this_projects_or_unknown(tmp_path, monkeypatch):
    """A copy inside another project's repository must not claim that project's commit."""
    package = tmp_path / "venv" / "bisam" / "experiments" / "runs"
    package.mkdir(parents=True)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.commit() == "unknown"
