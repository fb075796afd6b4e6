"""Mutants of the core: bisam with one defect each, and which test finds it: `python -m tests.mutants`.

Not to be confused with tests/conformance/mutants.py, whose defects are in the reference of the conformance suite.
"""
