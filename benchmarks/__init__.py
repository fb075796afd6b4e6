"""Speed and memory against the bars of this project: `python -m benchmarks.objective`, `.step`, `.pipeline`."""
