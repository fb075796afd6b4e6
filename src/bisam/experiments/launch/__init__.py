"""Launch: many runs of a study.

outcomes.py   how a run ended; finished runs are not run again
processes.py  worker processes on this machine
ray.py        tasks on a Ray cluster
estimate.py   the time that runs will take
"""
