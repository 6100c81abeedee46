"""Copy bandwidth, the limit to compare an update with: a plain copy that moves as many bytes as the update reads and
writes.

On a GPU, MLX computes `x + 0`. On the CPU, NumPy does so in place, as the update is in place (a store to other memory
reads it first, which takes a third of the bandwidth), in as many threads as the kernels: NumPy releases the GIL. More
than PIECE_BYTES, which is much larger than caches, are copied in pieces.
"""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from mlx_fused_adam import _ext

PIECE_BYTES = 1 << 28
BYTES_OF_A_THREAD = 1 << 18  # below, handing a slice to a thread takes longer than copying it


class CopyBandwidth:
    def __init__(self, traffic_bytes: int, device: str):
        words = max(1, traffic_bytes // 2 // 4)  # float32, each read once and written once
        most = PIECE_BYTES // 4
        self.pieces = [most] * (words // most) + [words % most] * (words % most > 0)
        self.threads = _ext.num_threads()
        if device == "gpu":
            self.array = mx.ones((self.pieces[0],))
            mx.eval(self.array)
            self.step = self._copy_on_gpu
        else:
            self.array = np.ones(self.pieces[0], np.float32)
            self.pool = ThreadPoolExecutor(self.threads)
            self.step = self._copy_on_cpu

    def _copy_on_gpu(self) -> None:
        for words in self.pieces:
            mx.eval(self.array[:words] + 0)

    def _copy_on_cpu(self) -> None:
        for words in self.pieces:
            count = min(self.threads, max(1, 4 * words // BYTES_OF_A_THREAD))
            first, *others = np.array_split(self.array[:words], count)
            jobs = [self.pool.submit(np.add, part, 0, out=part) for part in others]
            np.add(first, 0, out=first)
            for job in jobs:
                job.result()
