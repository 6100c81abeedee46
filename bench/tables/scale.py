"""Memory and traffic of a rank, from 1 to 1024 ranks: `python bench/scale.py [--check]` writes the tables of docs/scale.md.

Arithmetic alone: nothing is measured. tests/benchmarks/test_scale.py compares the bytes of a parameter with real optimizers.
For a model of your own, `python bench/scale.py --parameters 7e9` prints the tables and writes nothing.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: the package `bench` stands there, not its modules

from bench.documents import rewrite  # noqa: E402
from bench.options import (  # noqa: E402
    BF16_STATE,
    INT8_STATE,
    MASTER,
    MASTER_FP32,
    MASTER_INT8,
    OPTIONS,
    as_code,
)
from bench.saved import number, table  # noqa: E402

DOCUMENT = ROOT / "docs" / "scale.md"

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
# Gigabits per second, of the cable.
LINKS = {"1 Gb/s Ethernet": 1, "10 Gb/s Ethernet": 10, "Thunderbolt 4": 40, "Thunderbolt 5": 80}


class Bytes(NamedTuple):
    """Of one parameter."""

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
        return f"`{as_code(self.options)}`" if self.options else "none (as stock)"

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
    """What a rank sends in a step, in bytes of a parameter, for a ring of very many ranks."""

    name: str
    parts: str
    bytes: float

    def of(self, parameters: float, ranks: int) -> float:
        """On a ring of so many, each part is sent in `ranks` pieces, all but one of them."""
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

    All parameters, since MLX keeps what the forward pass has gathered until the backward pass; or one block's, `again`.
    """
    whole = parameters * ITEM_BYTES[GATHERED]
    block = whole / blocks_of(parameters)
    return (block if again else whole) + block


def usable(mac: int) -> float:
    return USABLE * mac * 2**30


def fewest_ranks(setup: Setup, parameters: float, mac: int, again: bool) -> int | None:
    """How many Macs hold a fully sharded model, as a power of two; None: more than 1024, or no number."""
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
    """A count of parameters in words."""
    scale, name = (1e9, "billion") if parameters >= 1e9 else (1e6, "million")
    return f"{number(parameters / scale)} {name}"


def power_text(parameters: float) -> str:
    """Powers of ten as such."""
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
        [setup.dtype, setup.code, *(count_text(usable(mac) / setup.bytes.total) for mac in MACS)]
        for setup in SETUPS
    ]
    return table(["parameters", "options", *(f"{mac} GB" for mac in MACS)], rows, left=2)


def share_table(parameters: float = EXAMPLE) -> str:
    """Of every setup, for one size."""
    rows = [
        [setup.dtype, setup.code, *(size_text(stored(setup, parameters, ranks)) for ranks in RANKS)]
        for setup in SETUPS
    ]
    columns = ["parameters", "options", "1 rank, or data parallel", *map(str, SHARDED_RANKS)]
    return table(columns, rows, left=2)


def sizes_table(sizes: tuple[float, ...] = tuple(BLOCKS_OF)) -> str:
    """Of chosen setups, for every size; and what is gathered beside the share."""
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


BLOCKS: dict[str, Callable[[], str]] = {
    "bytes": bytes_table,
    "one-mac": one_mac_table,
    "ranks": ranks_table,
    "share": share_table,
    "sizes": sizes_table,
    "traffic": traffic_table,
    "links": links_table,
}


def content(name: str) -> str:
    """What stands in the block of a name. An unknown one is a KeyError."""
    return BLOCKS[name]()


def show(parameters: float) -> None:
    print(f"{count_text(parameters)} parameters: memory of a rank")
    print(share_table(parameters))
    beside, again = (size_text(gathered(parameters, again)) for again in (False, True))
    print(f"\nBeside a share, fully sharded: {beside} gathered, or {again} if gathered again")
    print("\nMacs that hold it fully sharded: as MLX gathers / gathered again")
    print(ranks_table((parameters,)))
    print("\nSent by a rank in a step, for a number of ranks")
    print(traffic_table(parameters))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the document differs"
    )
    parser.add_argument("--parameters", type=float, help="print the tables for so many parameters")
    options = parser.parse_args(arguments)
    if options.parameters is not None:
        if not 1 <= options.parameters < math.inf:
            parser.error(f"--parameters must be at least 1 but got {options.parameters:g}")
        show(options.parameters)
        return 0
    is_stale = rewrite(DOCUMENT, content, options.check)
    if is_stale and options.check:
        print("scale.py: docs/scale.md differs; run python bench/scale.py")
    return int(is_stale and options.check)


if __name__ == "__main__":
    sys.exit(main())
