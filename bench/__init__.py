"""The benchmark of this repository: `python bench/run.py` is the command. A package so that no name clashes with others."""
