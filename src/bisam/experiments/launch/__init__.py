"""Launch: many runs of a study.

outcomes.py   how a run ended; finished runs are not run again
work.py       what a process does with a run
processes.py  worker processes on this machine
workers.py    a pool of processes that do one job after another
stacks.py     jobs of several seeds that are trained at once
ray.py        tasks on a Ray cluster
estimate.py   the time that runs will take
"""
