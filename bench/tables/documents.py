"""Writes the figures in README.md and docs/ from a published run: `python bench/readme.py [--check]`.

What stands between `<!-- bench:NAME -->` and `<!-- end -->` is made by the function of that name here from
bench/results/cpu.json and precision.json, tables and sentences alike, so no figure is typed by hand. `--check` writes nothing
and fails if a document differs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: the package `bench` stands there, not its modules

from bench import finetuning as finetuned  # noqa: E402
from bench import precision_figures, saved  # noqa: E402
from bench.documents import filled, rewrite  # noqa: E402
from bench.figures import (  # noqa: E402
    OF_PROBE,
    PEAK_OVER_STOCK,
    PEAK_OVER_STOCK_COMPILED,
    TIMES_STOCK,
    TIMES_STOCK_COMPILED,
    TIMES_TORCH,
    WHOLE_SETS,
    Case,
    Measure,
    extra_bytes,
    figure,
    over_row_major,
    ratio,
)
from bench.names import (  # noqa: E402
    OURS,
    OURS_COMPILED,
    STOCK,
    STOCK_CLIPPED,
    STOCK_CLIPPED_COMPILED,
    STOCK_COMPILED,
)
from bench.options import GUARDED, INT8_STATE, OPTIONS, as_code  # noqa: E402
from bench.saved import Results, bytes_text, number, percent  # noqa: E402

DOCUMENTS = [
    ROOT / name for name in ("README.md", "docs/index.md", "docs/options.md", "docs/mlx-lm.md")
]
RESULTS = ROOT / "bench" / "results" / "cpu.json"
PRECISION = RESULTS.with_name("precision.json")
FINETUNING = RESULTS.with_name("finetuning.json")
NOT_YET = "Not measured yet."
MODEL_OF_OPTIONS = "SmolLM-135M"  # whose updates give the options' times
COLUMNS = saved.SUMMARY_COLUMNS.index("× torch") + 1  # of the summary, that README shows
LARGE = 1_000_000  # elements from which one tensor's update is memory traffic and little else


def updates(results: Results) -> list[Case]:
    return [case for case in results["cases"] if not case["is_training_step"]]


def training_steps(results: Results) -> list[Case]:
    return [case for case in results["cases"] if case["is_training_step"]]


def measured(cases: list[Case], measure: Measure) -> list[tuple[float, Case]]:
    """The cases that have the figure, with it, from the lowest on."""
    found = [(x, case) for case in cases if (x := measure(case)) is not None]
    return sorted(found, key=lambda pair: pair[0])


def group(case: Case) -> tuple[str, ...]:
    """What a case has to stand for in a shortened table: a kind of tensors, dtype and layout."""
    return (case["suite"], case["dtype"], case["gradient_layout"])


def chosen(results: Results) -> list[Case]:
    """The rows of the README's table: all sets of parameters, large float32 buffers, each group's worst against torch."""
    cases = updates(results)
    worst: dict[tuple[str, ...], Case] = {}
    for _, case in reversed(measured(cases, TIMES_TORCH)):
        worst[group(case)] = case

    def is_chosen(case: Case) -> bool:
        is_large = case["case"] == "4096×4096" and case["dtype"] == "float32"
        is_set = case["suite"] in WHOLE_SETS
        return is_set or is_large or case is worst.get(group(case))

    return [case for case in cases if is_chosen(case)]


def named(case: Case) -> str:
    layout = "" if case["gradient_layout"] == "autograd" else f", {case['gradient_layout']}"
    return f"{case['case']}, {case['dtype']}{layout}"


def span(values: list[float], form: Callable[[float], str] = number) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def load_results() -> Results:
    """Of the published runs; None for one of precision.py or finetuning.py that is not there."""
    others = {"precision": PRECISION, "finetuning": FINETUNING}
    found = {
        name: saved.load_json(path) if path.exists() else None for name, path in others.items()
    }
    return saved.load_json(RESULTS) | found


def memory(results: Results) -> str:
    """The whole steps whose memory was measured, with and without the option that needs least; and their picture."""
    cases = results.get("memory")
    if not cases:
        return NOT_YET
    lines = []
    for case in cases:

        def peak(name: str, case: Case = case) -> str:
            return bytes_text(figure(case, name, "peak_bytes"))

        less = percent(1 - PEAK_OVER_STOCK_COMPILED(case))
        with_codes = percent(1 - ratio(INT8_STATE, STOCK_COMPILED, "peak_bytes")(case))
        lines.append(
            f"- {case['case']}, {case['dtype']}: stock {peak(STOCK_COMPILED)} compiled, {peak(STOCK)} eager; "
            f"ours {peak(OURS_COMPILED)} compiled, **{less} less**, and {peak(OURS)} eager; with "
            f"`{as_code(OPTIONS[INT8_STATE])}` {peak(INT8_STATE)}, **{with_codes} less** than compiled stock"
        )
    picture = (
        "![Peak memory of a whole training step, stock, ours and options](bench/results/memory.png)"
    )
    return "\n".join([*lines, "", picture])


def options(results: Results) -> str:
    """What each option costs in memory, loss and time."""
    precision = results.get("precision")
    if not precision:
        return NOT_YET
    rows = [
        [
            run["dtype"],
            precision_figures.options_text(run),
            number(precision_figures.stored_bytes(run)),
            precision_figures.signed_percent(precision_figures.over_reference(precision, run)),
            number(time_over_plain(results, run)),
        ]
        for run in precision["runs"]
        if not run["seed"]
    ]
    noise = precision_figures.plain_percent(precision_figures.noise(precision))
    columns = ["parameters", "optimizer", "B/param", "loss against float32", "time, × ours"]
    note = (
        f"Other seeds move the float32 loss by up to {noise}. Trained: the example's model, {precision['settings']['steps']} "
        f"steps. Time: updates of {MODEL_OF_OPTIONS}, over ours without options and with parameters of the same dtype. "
        "[Losses and picture](bench/results/precision.md)."
    )
    return f"{saved.table(columns, rows, left=2)}\n\n{note}"


def time_over_plain(results: Results, run: Case) -> float | None:
    """An update's time with the run's optimizer over ours without options; None where it was not timed."""
    for case in updates(results):
        if case["case"] == MODEL_OF_OPTIONS and case["dtype"] == run["dtype"]:
            return ratio(run["contender"], OURS)(case)
    return None


def memory_range(results: Results) -> str:
    parts = []
    for how, measure in (("eager", PEAK_OVER_STOCK), ("compiled", PEAK_OVER_STOCK_COMPILED)):
        saved_parts = [1 - ratio for ratio, _ in measured(training_steps(results), measure)]
        parts.append(
            f"{span(saved_parts, percent)} of an {how} step's peak".replace("an comp", "a comp")
        )
    return " and ".join(parts)


def update_memory(results: Results) -> str:
    large = [case for case in updates(results) if case["parameters"] >= LARGE]
    most = max(extra * case["parameters"] for extra, case in measured(large, extra_bytes))
    key = "peak_extra_bytes_per_parameter"
    stock = [x for x, _ in measured(large, lambda case: figure(case, STOCK_COMPILED, key))]
    return (
        f"at most {bytes_text(most)} in all, whatever the model (with bias correction and weight decay a few "
        f"scalars more); stock's compiled one "
        f"{span(stock, lambda x: f'{x:.0f}')} bytes per parameter"
    )


def training(results: Results) -> str:
    """Without the update's share, which is within the noise where forward and backward take long."""
    shown = saved.TRAINING_COLUMNS.index("× stock") + 1
    rows = [row[:shown] for case in training_steps(results) for row in saved.training_rows(case)]
    return saved.table(saved.TRAINING_COLUMNS[:shown], rows, left=2)


def training_words(results: Results) -> str:
    eager = measured(training_steps(results), TIMES_STOCK)
    compiled = measured(training_steps(results), TIMES_STOCK_COMPILED)
    (least, where_least), (most, where_most) = compiled[0], compiled[-1]
    return (
        f"Compiled, ours is {number(most)} times as fast as stock in “{where_most['case']}” and {number(least)} times in "
        f"“{where_least['case']}”; eager, {span([x for x, _ in eager])} times."
    )


def summary(results: Results) -> str:
    columns = saved.SUMMARY_COLUMNS[:COLUMNS]
    rows = [saved.summary_row(case)[:COLUMNS] for case in chosen(results)]
    return saved.table(columns, rows, left=3)


def torch(results: Results) -> str:
    found = measured(updates(results), TIMES_TORCH)
    slower = [(x, case) for x, case in found if x < 1]
    text = f"torch's fused Adam is faster than ours in {len(slower)} of {len(found)} updates"
    if slower:
        worst, case = slower[0]
        text += f"; at worst it takes {percent(worst)} of our time ({named(case)})"
    models = measured([c for c in updates(results) if c["suite"] == "models"], TIMES_TORCH)
    if models:
        text += (
            f". With whole models ours runs at {span([x for x, _ in models])} times torch's speed"
        )
    return text + "."


def stock(results: Results) -> str:
    large = [c for c in updates(results) if c["parameters"] >= LARGE]
    small = [c for c in updates(results) if c["parameters"] < LARGE]

    def both(cases: list[Case]) -> str:
        eager = [x for x, _ in measured(cases, TIMES_STOCK)]
        compiled = [x for x, _ in measured(cases, TIMES_STOCK_COMPILED)]
        return f"{span(eager)} times (eager) and {span(compiled)} times (compiled)"

    text = f"From a million parameters on, ours is {both(large)} as fast as stock"
    return f"{text}; with fewer, {both(small)}." if small else f"{text}."


def layouts(results: Results) -> str:
    """The worst layout, against stock."""
    cases = [case for case in updates(results) if case["suite"] == "layouts"]
    eager, compiled = measured(cases, TIMES_STOCK), measured(cases, TIMES_STOCK_COMPILED)
    if not eager or not compiled:
        return NOT_YET
    return (
        f"Gradients of other layers and shapes (convolutions, experts, narrow matrices, scattered strides): "
        f"{span([x for x, _ in eager])} times (eager) and {span([x for x, _ in compiled])} times (compiled) as fast as "
        f"stock. Least: {named(eager[0][1])}, and compiled {named(compiled[0][1])}."
    )


def finetuning(results: Results) -> str:
    """Peak memory of full fine-tuning by mlx-lm."""
    found = results.get("finetuning")
    if not found:
        return NOT_YET
    versions = found["machine"]["versions"]
    return (
        f"{saved.table(finetuned.COLUMNS, finetuned.cells(found['rows']), left=2)}\n\n"
        f"`pip install '.[cpu,bench,integration]' && {found['settings']['command']}` "
        f"(about ten minutes): shapes of SmolLM-135M, batch 1; "
        f"mlx-lm {found['settings']['mlx-lm']}, "
        f"mlx {versions['mlx']}, device {found['machine']['device']}."
    )


def guard(results: Results) -> str:
    """What clipping and skipping cost, for ours and for stock, from a million parameters on."""
    cases = [case for case in updates(results) if case["parameters"] >= LARGE]
    ours = [x for x, _ in measured(cases, ratio(GUARDED, OURS))]
    if not ours:
        return NOT_YET
    costs = {
        "eager": [x for x, _ in measured(cases, ratio(STOCK_CLIPPED, STOCK))],
        "compiled": [x for x, _ in measured(cases, ratio(STOCK_CLIPPED_COMPILED, STOCK_COMPILED))],
    }
    faster = [x for x, _ in measured(cases, ratio(STOCK_CLIPPED_COMPILED, GUARDED))]
    models = [
        f"{number(x)} ({case['case']}, {case['dtype']})"
        for x, case in measured(cases, ratio(GUARDED, OURS))
        if case["suite"] == "models"
    ]
    return (
        f"Both options together make an update {span(ours)} times as long; of whole models {', '.join(models)}. "
        f"`clip_grad_norm` makes stock's {span(costs['eager'])} times (eager) and {span(costs['compiled'])} times "
        f"(compiled) as long. Ours with both is {span(faster)} times as fast as compiled stock with `clip_grad_norm`."
    )


def falls_short(results: Results) -> str:
    """A list: one weakness a line."""
    cases = updates(results)
    lines = []
    large = [c for c in cases if c["suite"] == "buffers" and c["parameters"] >= LARGE]
    transposed = measured(
        [c for c in large if c["gradient_layout"] == "column-major"],
        lambda case: over_row_major(case, large),
    )
    if transposed:
        factors = span([x for x, _ in transposed])
        lines.append(f"Column-major gradients: an update takes {factors} times as long.")
    probe = measured(large, OF_PROBE)
    if probe:
        worst, case = probe[0]
        lines.append(
            "Large tensors, against a loop that moves the same bytes: "
            f"{span([x for x, _ in probe], percent)} of its speed. Worst: {named(case)}."
        )
    slowest = measured(cases, TIMES_STOCK_COMPILED)[:1]
    if slowest:
        ratio, case = slowest[0]
        lines.append(f"Least gain over compiled stock: {number(ratio)} times ({named(case)}).")
    return "\n".join(f"- {line}" for line in lines)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "memory": memory,
    "memory-range": memory_range,
    "options": options,
    "update-memory": update_memory,
    "training": training,
    "training-words": training_words,
    "summary": summary,
    "torch": torch,
    "stock": stock,
    "falls-short": falls_short,
    "layouts": layouts,
    "guard": guard,
    "finetuning": finetuning,
    "origin": saved.origin,
}


def render(text: str, results: Results, to_root: str = "") -> str:
    """The text with every block made anew, its links by way of `to_root`. A block of unknown name is a KeyError."""
    return filled(text, contents(results, to_root))


def contents(results: Results, to_root: str = "") -> Callable[[str], str]:
    """What stands in the block of a name."""
    return lambda name: BLOCKS[name](results).replace("](bench/", f"]({to_root}bench/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="readme.py", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a document differs"
    )
    options = parser.parse_args(arguments)
    results = load_results()
    status = 0
    for document in DOCUMENTS:
        to_root = "../" if document.parent.name == "docs" else ""
        is_stale = rewrite(document, contents(results, to_root), options.check)
        if is_stale and options.check:
            print(
                f"readme.py: {document.name} differs from bench/results; run python bench/readme.py"
            )
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
