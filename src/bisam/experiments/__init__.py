"""Experiments: recipes, runs, studies and reports on top of the library (extra `experiments`)."""
