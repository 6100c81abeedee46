"""torch's Adam, as an implementation. In its own file, so that torch is imported only where it takes part."""

from typing import Any

import mlx.core as mx
import numpy as np
import torch

from .problem import BETAS, SETTINGS, START, Problem, Values, adam_step


class TorchAdam:
    """torch.optim.Adam(fused=True). It always corrects the bias, which costs no traffic.

    Its gradients are row-major, as torch's autograd makes them. (Given a column-major one, torch
    2.13 on the CPU reads it in memory order: the step is wrong, and slower.)
    """

    def __init__(self, problem: Problem, device: str):
        self.tensors = problem.tensors
        self.stored_bytes = 3 * problem.size * problem.dtype.size
        self.dtype = self.state_dtype = problem.dtype
        self.device = device
        self.parameters = {}
        for path, parameter in problem.parameters.items():
            tensor = torch.nn.Parameter(self._copy(parameter))
            tensor.grad = self._copy(problem.gradients[path])
            self.parameters[path] = tensor
        self.optimizer = torch.optim.Adam(
            self.parameters.values(), SETTINGS.learning_rate, BETAS, SETTINGS.eps, fused=True
        )
        for path, tensor in self.parameters.items():
            self.optimizer.state[tensor] = {
                "step": torch.full((), float(START), device=device),
                "exp_avg": self._copy(problem.state[path]["m"]),
                "exp_avg_sq": self._copy(problem.state[path]["v"]),
            }
        self.steps = START

    def _copy(self, x: mx.array) -> Any:
        if x.dtype == mx.bfloat16:  # NumPy has no bfloat16: hand over the bits
            bits = np.array(mx.contiguous(x).view(mx.uint16))
            return torch.from_numpy(bits).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(np.array(x, order="C")).to(self.device)

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.device == "mps":
            torch.mps.synchronize()

    def sample(self, path: str, indices: np.ndarray) -> Values:
        parameter = self.parameters[path]
        state = self.optimizer.state[parameter]
        where = torch.from_numpy(indices).to(self.device)
        tensors = {
            "parameter": parameter.detach(),
            "gradient": parameter.grad,
            "m": state["exp_avg"],
            "v": state["exp_avg_sq"],
        }
        return {name: x.flatten()[where].float().cpu().numpy().astype(np.float64) for name, x in tensors.items()}

    def expect(self, before: Values) -> Values:
        return adam_step(before, self.steps + 1)
