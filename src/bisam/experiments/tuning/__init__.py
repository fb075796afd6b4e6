"""Tuning: the search for settings of a recipe by validation score, with Optuna (extra `tune`).

space.py      what is searched: ranges and choices of fields, and of arguments in the expression of a method
search.py     a search as a value, and the folder that belongs to it
database.py   the trials in Optuna's storage: what is tried next, what is pruned, what is known
trials.py     a trial as a value
launch.py     trials in worker processes; a trial is one run for each of its seeds, without a test
figures.py    history, scores against the settings, importances
report.py     the page, the table and the recipe of the best trial
"""
