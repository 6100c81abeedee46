"""Loss curves as a picture: by matplotlib where it is installed, else as a small SVG."""

from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#d55e00", "#0072b2", "#009e73")


def smoothed(losses: list[float], memory: float = 0.95) -> list[float]:
    """A running mean that forgets; its first values are means of what there is."""
    mean, weight, result = 0.0, 0.0, []
    for loss in losses:
        mean = memory * mean + (1 - memory) * loss
        weight = memory * weight + (1 - memory)
        result.append(mean / weight)
    return result


def save_loss_plot(path: Path, curves: dict[str, list[float]]) -> Path:
    """Draw the curves; return the file, which without matplotlib is an .svg beside `path`."""
    try:
        import matplotlib
    except ImportError:
        path = path.with_suffix(".svg")
        path.write_text(_svg(curves), encoding="utf-8")
        return path
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=COLOURS[i], alpha=0.2, linewidth=0.8)
        # Curves that coincide must both be seen: the first lies wide under the second.
        width = 5 if i == 0 and len(curves) > 1 else 1.8
        axes.plot(steps, smoothed(losses), color=COLOURS[i], linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per character)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _svg(curves: dict[str, list[float]]) -> str:
    width, height, margin = 800, 450, 60
    lines = {name: smoothed(losses) for name, losses in curves.items()}
    values = [loss for line in lines.values() for loss in line]
    low, high, steps = min(values), max(values), max(map(len, lines.values()))

    def place(step: int, loss: float) -> str:
        x = margin + (width - 2 * margin) * step / max(1, steps - 1)
        y = margin + (height - 2 * margin) * (high - loss) / ((high - low) or 1)
        return f"{x:.1f},{y:.1f}"

    def text(x: float, y: float, content: str, colour: str = "#333", anchor: str = "middle") -> str:
        return (
            f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(content)}</text>'
        )

    right, bottom = width - margin, height - margin
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{margin},{margin}V{bottom}H{right}" fill="none" stroke="#333"/>',
        text(width / 2, 30, "Training loss (nats per character)"),
        text(width / 2, height - 15, "step"),
        text(margin, bottom + 20, "1"),
        text(right, bottom + 20, str(steps)),
        text(margin - 8, margin + 5, f"{high:.2f}", anchor="end"),
        text(margin - 8, bottom + 5, f"{low:.2f}", anchor="end"),
    ]
    for i, (name, line) in enumerate(lines.items()):
        points = " ".join(place(step, loss) for step, loss in enumerate(line))
        stroke = 6 if i == 0 and len(lines) > 1 else 2
        parts.append(
            f'<polyline points="{points}" fill="none" '
            f'stroke="{COLOURS[i]}" stroke-width="{stroke}"/>'
        )
        parts.append(text(right, margin + 20 * (i + 1), name, COLOURS[i], "end"))
    return "\n".join([*parts, "</svg>\n"])
