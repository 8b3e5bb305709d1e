"""Faults in a real cluster under load, and what clients saw of them. `python tests/chaos/run.py --help`."""
