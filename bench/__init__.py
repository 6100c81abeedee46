"""The benchmarks of this repository; bench/README.md has the commands. A package, so that no module's name clashes."""
