from dataclasses import dataclass
@dataclass(frozen=True)
class Backend:
    description: str
    is_fused: bool
def backend_of(device): return Backend("cpu", True)
