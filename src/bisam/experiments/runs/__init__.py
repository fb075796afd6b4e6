"""Runs: the folder of a run, its files, and the machine that computes it.

folder.py       the files of a run, its lock, and the finished runs in a folder
checkpoint.py   the format of checkpoint.pt, and its checksum
results.py      the format of result.json and metrics.csv, and their checks
weights.py      the weights of a finished run
files.py        atomic and durable writes; JSON and CSV
durations.py    seconds as text, and text as seconds
signals.py      Ctrl-C and SIGTERM
environment.py  versions, hardware and commit
machine.py      devices, data folder and loggers of a run; child processes and threads
"""
