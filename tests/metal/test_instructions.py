"""Operations of an element in the shader, counted in what clang makes of it; docs/metal.md publishes them."""

import pytest

from emulator import instructions, project_shader, traffic
from support import tools

pytestmark = tools.module_needs("ziglang")
SHADER = project_shader.ROOT / "metal" / "adam.metal"


@pytest.fixture(scope="module")
def counts() -> dict[str, instructions.Count]:
    return instructions.counts()


def test_the_rule_in_float32_is_the_whole_update(counts):
    """Nine products, four sums, a division and a root; nothing is converted, rounded or decided."""
    assert counts["float32"].of_kind == {"float": 13, "division and root": 2}


def test_the_published_table_is_what_is_counted():
    sizes = {name: traffic.bytes_of_element(formats) for name, formats in traffic.FORMATS.items()}
    assert sizes.keys() == instructions.RUNS.keys()
    table = list(instructions.table(sizes))
    assert traffic.published("instructions") == table, "run python tests/emulator/traffic.py --write"


# The text replaced, and the kind that becomes more.
FAULTS = {
    "a second division": ("AdamState<float> next = adam_rule(", "old.v = old.v / step.constants.eps;\n"
                          "    AdamState<float> next = adam_rule(", "division and root", 1),
    "a decision for each element": ("    encode(next.m, rounding.m, run.m[k]);",
                                    "    if (next.m > 1.0f) run.m[k] = simd_shuffle_xor(k, 1);\n"
                                    "    encode(next.m, rounding.m, run.m[k]);", "shuffle", 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_more_work_is_seen(counts, fault):
    text, replacement, kind, more = FAULTS[fault]
    source = SHADER.read_text()
    assert text in source, f"the shader no longer holds {text!r}; plant this fault elsewhere"
    planted = instructions.counts(source.replace(text, replacement))["float32"]
    assert planted[kind] == counts["float32"][kind] + more


def test_an_operation_of_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="unknown kind: call float @somewhere"):
        instructions.kind_of("  %1 = tail call float @somewhere(float %0)")
