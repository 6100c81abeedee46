"""Tools around the optimizers: the report, `install`, `run`, and timing."""
