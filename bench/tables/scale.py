"""Memory and traffic of a rank, from 1 to 1024 ranks, computed: the tables of docs/scale.md.

bench/scale.py is the command. tests hold the bytes of a parameter against real optimizers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .names import BF16_STATE, INT8_STATE, MASTER, MASTER_FP32, MASTER_INT8, OPTIONS, as_code
from .text import number, table

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALES_BYTES = 2 * 2 / 32  # of int8 state: a bfloat16 for m and one for v, for each 32 neighbours
REMAINDER_BYTES = 2  # of master weights

MACS = (16, 64, 128, 512)  # GB of memory, as they are sold: powers of two
USABLE = 0.75  # of it
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
SHARDED_RANKS = RANKS[1:]
GATHERED = "bfloat16"  # compute_dtype of nn.fully_shard
# Transformer blocks of a model of so many parameters, each wrapped by itself.
BLOCKS_OF = {1e8: 12, 1e9: 24, 1e10: 40, 1e11: 80, 1e12: 128}
EXAMPLE = 1e9  # parameters
# The cable's gigabits per second.
LINKS = {"1 Gb/s Ethernet": 1, "10 Gb/s Ethernet": 10, "Thunderbolt 4": 40, "Thunderbolt 5": 80}


class Bytes(NamedTuple):
    """Bytes of one parameter."""

    parameter: float
    gradient: float
    m: float
    v: float
    scales: float
    remainder: float

    @property
    def total(self) -> float:
        return sum(self)


class Setup(NamedTuple):
    dtype: str  # of the parameters
    options: dict[str, Any]

    @property
    def code(self) -> str:
        return f"`{as_code(self.options)}`" if self.options else "none (as mlx.optimizers)"

    @property
    def bytes(self) -> Bytes:
        dtype = ITEM_BYTES[self.dtype]
        state_dtype = self.options.get("state_dtype", self.dtype)
        moment = ITEM_BYTES[state_dtype]
        scales = SCALES_BYTES if state_dtype == "int8" else 0
        remainder = REMAINDER_BYTES if self.options.get("master_weights") else 0
        return Bytes(dtype, dtype, moment, moment, scales, remainder)


SETUPS = [
    Setup("float32", {}),
    *(Setup("float32", OPTIONS[name]) for name in (BF16_STATE, INT8_STATE)),
    Setup("bfloat16", {}),
    Setup("bfloat16", {"state_dtype": "float32"}),
    *(Setup("bfloat16", OPTIONS[name]) for name in (INT8_STATE, MASTER, MASTER_FP32, MASTER_INT8)),
]
# The most, what keeps float32's precision of parameters in the fewest bytes, and the least.
CHOSEN = [SETUPS[0], SETUPS[-1], SETUPS[5]]


class Sending(NamedTuple):
    """The bytes of a parameter that a rank sends in a step, on a ring of very many ranks."""

    name: str
    parts: str
    bytes: float

    def of(self, parameters: float, ranks: int) -> float:
        """Bytes on a ring of `ranks`: each part is sent in so many pieces, all but one of them."""
        return parameters * self.bytes * (ranks - 1) / ranks


SENDINGS = [
    Sending("data parallel, float32", "4 + 4", 8),
    Sending("data parallel, bfloat16", "2 + 2", 4),
    Sending("fully sharded, float32", "4 + 4", 8),
    Sending("fully sharded, `compute_dtype=mx.bfloat16`", "2 + 2", 4),
    Sending("the same, gathered again in the backward pass", "2 + 2 + 2", 6),
]


def stored(setup: Setup, parameters: float, ranks: int = 1) -> float:
    """Bytes of a rank's share of parameters, gradients and state."""
    return setup.bytes.total * parameters / ranks


def blocks_of(parameters: float) -> int:
    return BLOCKS_OF[min(BLOCKS_OF, key=lambda size: abs(math.log(size / parameters)))]


def gathered(parameters: float, again: bool) -> float:
    """Bytes of whole parameters beside the shards, and of one block's gradient before it is scattered.

    All parameters, since MLX keeps what the forward pass gathers until the backward pass; with `again`, one block's.
    """
    whole = parameters * ITEM_BYTES[GATHERED]
    block = whole / blocks_of(parameters)
    return (block if again else whole) + block


def usable(mac: int) -> float:
    return USABLE * mac * 2**30


def fewest_ranks(setup: Setup, parameters: float, mac: int, again: bool) -> int | None:
    """The number of Macs that hold a fully sharded model, a power of two; None if more than 1024."""
    if stored(setup, parameters) <= usable(mac):
        return 1
    beside = gathered(parameters, again)
    for power in range(1, 11):
        if stored(setup, parameters, 2**power) + beside <= usable(mac):
            return 2**power
    return None


def size_text(count: float) -> str:
    unit, scale = next((x for x in (("TB", 1e12), ("GB", 1e9)) if count >= x[1]), ("MB", 1e6))
    return f"{number(count / scale)} {unit}"


def count_text(parameters: float) -> str:
    """A number of parameters in words."""
    scale, name = (1e9, "billion") if parameters >= 1e9 else (1e6, "million")
    return f"{number(parameters / scale)} {name}"


def power_text(parameters: float) -> str:
    """A number of parameters, as a power of ten if it is one."""
    exponent = round(math.log10(parameters))
    digits = str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if parameters == 10**exponent else count_text(parameters)


def bytes_table() -> str:
    columns = ["parameters", "options", *Bytes._fields, "**all**"]
    rows = [
        [setup.dtype, setup.code, *(f"{x:g}" if x else "" for x in setup.bytes), f"**{setup.bytes.total:g}**"]
        for setup in SETUPS
    ]  # fmt: skip
    return table(columns, rows, left=2)


def one_mac_table() -> str:
    rows = [
        [setup.dtype, setup.code, *(count_text(usable(mac) / setup.bytes.total) for mac in MACS)] for setup in SETUPS
    ]
    return table(["parameters", "options", *(f"{mac} GB" for mac in MACS)], rows, left=2)


def share_table(parameters: float = EXAMPLE) -> str:
    """A rank's share with every setup, for one size."""
    rows = [
        [setup.dtype, setup.code, *(size_text(stored(setup, parameters, ranks)) for ranks in RANKS)] for setup in SETUPS
    ]
    columns = ["parameters", "options", "1 rank, or data parallel", *map(str, SHARDED_RANKS)]
    return table(columns, rows, left=2)


def sizes_table(sizes: tuple[float, ...] = tuple(BLOCKS_OF)) -> str:
    """A rank's share with chosen setups, for every size; and what is gathered beside it."""
    rows = []
    for parameters in sizes:
        for setup in CHOSEN:
            shares = [size_text(stored(setup, parameters, ranks)) for ranks in RANKS]
            beside = [size_text(gathered(parameters, again)) for again in (False, True)]
            rows.append([power_text(parameters), setup.dtype, setup.code, *shares, *beside])
    columns = [
        "", "parameters", "options", "1 rank, or data parallel", *map(str, SHARDED_RANKS), "gathered", "again",
    ]  # fmt: skip
    return table(columns, rows, left=3)


def ranks_table(sizes: tuple[float, ...] = tuple(BLOCKS_OF)) -> str:
    rows = []
    for parameters in sizes:
        for setup in CHOSEN:
            cells = []
            for mac in MACS:
                found = [fewest_ranks(setup, parameters, mac, again) for again in (False, True)]
                cells.append(" / ".join("–" if n is None else str(n) for n in found))
            rows.append([power_text(parameters), setup.dtype, setup.code, *cells])
    columns = ["", "parameters", "options", *(f"{mac} GB" for mac in MACS)]
    return table(columns, rows, left=3)


def traffic_table(parameters: float = EXAMPLE) -> str:
    rows = [
        [sending.name, sending.parts, *(size_text(sending.of(parameters, n)) for n in SHARDED_RANKS)]
        for sending in SENDINGS
    ]  # fmt: skip
    return table(["", "bytes of a parameter", *map(str, SHARDED_RANKS)], rows, left=2)


def links_table() -> str:
    rows = [[name, f"{8 / gigabits:g} s"] for name, gigabits in LINKS.items()]
    return table(["link", "a gigabyte takes at least"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "bytes": bytes_table,
    "one_mac": one_mac_table,
    "ranks": ranks_table,
    "share": share_table,
    "sizes": sizes_table,
    "traffic": traffic_table,
    "links": links_table,
}


def shown(parameters: float) -> str:
    """The tables for one model, as text."""
    beside, again = (size_text(gathered(parameters, again)) for again in (False, True))
    return "\n".join(
        [
            f"{count_text(parameters)} parameters: memory of a rank",
            share_table(parameters),
            f"\nBeside a share, fully sharded: {beside} gathered, or {again} if gathered again",
            "\nMacs that hold it fully sharded: as MLX gathers / gathered again",
            ranks_table((parameters,)),
            "\nSent by a rank in a step, for a number of ranks",
            traffic_table(parameters),
        ]
    )
