"""Conformance suite for implementations of sharpness-aware training: `python -m tests.conformance`.

adapter.py      the interface between an implementation and the cases
behaviours.py   the cases
reference.py    the formula as a loop: the cases compare with it, and it passes all cases that do not need a loss
mutants.py      the reference with defects that the cases must detect
runner.py       runs cases on adapters
table.py        writes results to docs/conformance.md, and reads them
"""
