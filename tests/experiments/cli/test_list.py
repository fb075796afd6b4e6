"""`bisam list`, and the file that it prints."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("cyclopts")

from bisam.experiments.cli import completion, list as listing

UPDATE = "BISAM_UPDATE_LIST=1 python -m pytest -n 0 tests/experiments/cli/test_list.py"


def test_the_file_is_that_of_the_studies_data_sets_models_and_methods():
    found = json.dumps(listing.entries(), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("BISAM_UPDATE_LIST"):
        completion.FILE.write_text(found, encoding="utf-8")
    assert completion.FILE.read_text(encoding="utf-8") == found, f"write it again: {UPDATE}"


def test_every_name_is_printed(bisam):
    code, out, err = bisam("list")
    assert (code, err) == (0, "")
    found = listing.entries()
    for name in (*(row[0] for rows in found["groups"].values() for row in rows), *found["datasets"], *found["models"]):
        assert name in out
    assert all(name in " ".join(out.split()) for name in found["methods"])
