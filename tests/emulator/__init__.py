"""Runs Metal kernels on Linux and checks every access; see README.md."""
