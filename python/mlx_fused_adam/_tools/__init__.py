"""Commands and helpers around the optimizers: the report, `install`, `run` and what takes times."""
