"""Runs: the folder of a training run, and the machine that it is computed on."""
