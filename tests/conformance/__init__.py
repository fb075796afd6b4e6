"""Behaviours of sharpness-aware training as cases that any implementation can be put to: `python -m tests.conformance`.

adapter.py      what an implementation shows of itself, in a few lines
behaviours.py   the cases
reference.py    the formula as a loop, which cases compare with, and which passes all that do not ask for a loss
mutants.py      the reference with defects, which the cases must find
runner.py       from adapters and cases to results
table.py        from results to docs/conformance.md, and back
"""
