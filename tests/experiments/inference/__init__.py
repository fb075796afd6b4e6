"""Trained models on data of their runs, on other data, and on files of a user."""
