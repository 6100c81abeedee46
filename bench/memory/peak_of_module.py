"""Run a module as `python -m` does, then print the peak of MLX's memory: python peak_of_module.py MODULE ARGS…"""

import runpy
import sys

import mlx.core as mx

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    print(f"peak memory: {mx.get_peak_memory()} bytes")
