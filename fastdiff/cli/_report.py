"""What ``fastdiff demo`` leaves for people: sample grids, plots, an HTML page, and a summary on the terminal."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.training._files import replacing

__all__ = ["plot_distances", "plot_losses", "print_summary", "read_losses", "save_grid", "write_html", "write_text"]

_BEFORE, _AFTER, _INK = "#8a94a6", "#0b6bcb", "#1d2433"


def write_text(path: Path, text: str) -> None:
    """Writes a whole file, or none."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_losses(path: Path) -> list[float]:
    """The loss column of a ``loss.csv``."""
    return [float(line.split(",")[1]) for line in path.read_text().splitlines()[1:]]


def save_grid(images: Tensor, columns: int, title: str, path: Path, scale: int = 5) -> None:
    """Saves images [10 * columns, 1, 8, 8] in [-1, 1] as a labelled PNG, a row for each class, ink dark on white."""
    from PIL import Image, ImageDraw, ImageFont

    size, gap, left, top = 8 * scale, 4, 30, 34
    rows = len(images) // columns
    width, height = left + columns * (size + gap) + 6, top + rows * (size + gap) + 6
    picture = Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    draw.text((left, top / 2), title, fill=30, font=font, anchor="lm")
    ink = ((1.0 - images[:, 0].clamp(-1, 1)) * 127.5).round().byte().numpy()
    for k, cell in enumerate(ink):
        x, y = left + (k % columns) * (size + gap), top + (k // columns) * (size + gap)
        picture.paste(Image.fromarray(cell).resize((size, size), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x - 1, y - 1, x + size, y + size), outline=225)
        if k % columns == 0:
            draw.text((left / 2, y + size / 2), str(k // columns), fill=90, font=font, anchor="mm")
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def plot_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Training losses, raw and averaged over the last 25 steps; one panel each, with the same scale."""
    figure, axes = _figure(2, (9.6, 3.4))
    for axis, (name, losses), colour in zip(axes, curves.items(), (_BEFORE, _AFTER), strict=True):
        steps = range(1, len(losses) + 1)
        window = [sum(losses[max(0, i - 25) : i]) / min(i, 25) for i in steps]
        axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps, window, color=colour, linewidth=1.8)
        axis.set(title=f"{name}: loss {window[-1]:.3f} at step {len(losses)}", xlabel="step", yscale="log")
    axes[0].set_ylabel("mean squared error of the velocity")
    _save(figure, path)


def plot_distances(results: dict[str, Any], path: Path) -> None:
    """Fréchet distance by step count before and after reflow, and the level of real digits."""
    from matplotlib.ticker import LogLocator

    figure, (axis,) = _figure(1, (5.0, 3.6))
    counts = [int(n) for n in results["steps"]]
    for when, colour in (("before", _BEFORE), ("after", _AFTER)):
        values = [results["steps"][str(n)][when]["frechet"] for n in counts]
        axis.plot(counts, values, marker="o", color=colour, label=f"{when} reflow")
    reference = results["reference"]
    axis.axhspan(reference["frechet_real_min"], reference["frechet_real_max"], color="#2e9e5b", alpha=0.25)
    axis.axhline(reference["frechet_real"], color="#2e9e5b", linewidth=1, label="real digits")
    axis.set(xscale="log", yscale="log", xlabel="Euler steps", ylabel="Fréchet distance")
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.legend(frameon=False)
    _save(figure, path)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # Figure and its own canvas, not pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def print_summary(results: dict[str, Any], out: Path) -> None:
    """The table of the report, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console, reference = Console(), results["reference"]
    table = Table(title="Generated digits, by Euler steps")
    table.add_column("steps", justify="right")
    for heading in ("accuracy before", "after", "Fréchet before", "after"):
        table.add_column(heading, justify="right")
    for n, row in results["steps"].items():
        cells = [f"{row[when]['accuracy']:.3f}" for when in ("before", "after")]
        table.add_row(n, *cells, *(f"{row[when]['frechet']:.2f}" for when in ("before", "after")))
    table.add_section()
    table.add_row("real", f"{reference['classifier_accuracy']:.3f}", "", f"{reference['frechet_real']:.2f}", "")
    means = reference["class_means"]
    table.add_row("class means", f"{means['accuracy']:.3f}", "", f"{means['frechet']:.2f}", "")
    console.print(table)
    for name, text in (("training_step", "training step"), ("sampling_4_steps", "sampling, 4 steps")):
        row = results["speed"][name]
        console.print(
            f"{text}: {row['ours_ms']:.1f} ms, PyTorch reference {row['reference_ms']:.1f} ms: "
            f"{row['speedup']:.2f}x (quartiles {row['speedup_q1']:.2f}-{row['speedup_q3']:.2f})",
            highlight=False,
            soft_wrap=True,
        )
    total = results["seconds"]["total"]
    part = "since it was resumed" if results["resumed"] else "in all"
    console.print(f"{total:.0f} s {part}; report: {out / 'report.html'}", highlight=False, soft_wrap=True)


# --------------------------------------------------------------------------------------------------------------- HTML

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1d2433; background: #f5f6f8;
       margin: 0; }
main { max-width: 1280px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 40px 0 10px; }
p { max-width: 46em; margin: 8px 0; }
.lead { color: #4a5468; }
.card { background: #fff; border: 1px solid #e2e5eb; border-radius: 10px; padding: 18px 20px; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid #edeff3; }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; color: #4a5468; border-bottom: 2px solid #d9dde5; }
tr.ref td { color: #4a5468; background: #fafbfc; }
td.best { font-weight: 700; color: #0b6bcb; }
.two { display: grid; grid-template-columns: minmax(0, 8fr) minmax(0, 5fr); gap: 16px; align-items: start; }
.grid { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 16px; }
.grid .card { padding: 10px 12px; }
.card img { width: 100%; height: auto; display: block; }
.wide { grid-column: span 3; }
.narrow { max-width: 900px; }
td:first-child { white-space: nowrap; }
figure { margin: 0; }
figcaption, .small { color: #4a5468; font-size: 14px; }
code { font: 14px ui-monospace, Menlo, Consolas, monospace; background: #eef0f4; border-radius: 4px; padding: 1px 5px; }
@media (max-width: 900px) { .grid { grid-template-columns: 1fr 1fr; } .wide { grid-column: span 2; }
                            .two { grid-template-columns: 1fr; } }
"""


def write_html(results: dict[str, Any], out: Path) -> None:
    """Writes ``out/report.html``, with every picture inside it."""
    settings, reference, speed = results["settings"], results["reference"], results["speed"]
    environment, build = results["environment"], results["environment"]["fastdiff"]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in results["seconds"].items() if name != "total")
    first = next(iter(results["steps"].values()))
    one_step = f"{first['before']['frechet']:.1f} to {first['after']['frechet']:.1f}"
    grids = "\n".join(
        f'<figure class="card">{_image(out / f"samples-{int(n):02d}-{when}.png", f"{_steps(n)}, {when} reflow")}'
        f"<figcaption><b>{_steps(n)}, {when} reflow</b><br>accuracy {row[when]['accuracy']:.3f}, Fréchet distance "
        f"{row[when]['frechet']:.2f}</figcaption>"
        "</figure>"
        for when in ("before", "after")
        for n, row in results["steps"].items()
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastdiff demo</title><style>{_STYLE}</style></head><body><main>
<h1>A diffusion transformer learns handwritten digits</h1>
<p class="lead">A class-conditional DiT of {results["parameters"] / 1e6:.1f} million parameters was trained as a
rectified flow for {settings["steps"]:,} steps on {1797 - reference["images"]:,} of scikit-learn's 1,797 real 8&times;8
digits, then straightened by one round of reflow: {settings["num_pairs"]:,} pairs of noise and what the model makes of
it in {settings["pair_steps"]} steps, {settings["reflow_steps"]:,} training steps on these pairs.
{"The part since it was resumed" if results["resumed"] else "Everything"}, this page included, took
{results["seconds"]["total"]:.0f} s on {html.escape(_device_text(results))}.</p>

<h2>How good the samples are</h2>
<div class="two"><div class="card">{_score_table(results)}
<p>Reflow took the Fréchet distance of one-step samples from {one_step}.</p></div>
<figure class="card">{_image(out / "frechet.png", "Fréchet distance by step count")}</figure></div>
<p class="small">{reference["images"]} samples for each entry, one for every held-out digit and of its class, compared
with these {reference["images"]} digits. Accuracy is that of a classifier trained on the other real digits; the Fréchet
distance is taken in its 32 features (lower is better; it varies by a unit or so from draw to draw). Real digits are
{reference["images"]} training digits in place of samples: mean of eight draws, {reference["frechet_real_min"]:.2f} to
{reference["frechet_real_max"]:.2f}. The class means show why accuracy alone will not do: ten blurry averages are read
correctly, and are nothing like handwriting.</p>

<h2>The samples</h2>
<p>Above before reflow, below after; in each, a row for every class. The same place in every grid starts from the same
noise, so what differs between grids is due to the model and the number of steps alone.</p>
<div class="grid">
{grids}
<figure class="card">{_image(out / "samples-real.png", "real digits")}<figcaption><b>real digits</b><br>of the training
part, for comparison</figcaption></figure>
<figure class="card wide">{_image(out / "loss.png", "loss curves")}<figcaption><b>training</b><br>The loss of reflow is
lower because its pairs are fixed: a straight path can be followed exactly, while independent pairs cross and leave a
variance that no model can predict.</figcaption></figure>
</div>

<h2>Speed</h2>
<div class="card narrow">{_speed_table(speed)}</div>
<p class="small">Batch of {speed["batch_size"]}; our kernels and the plain PyTorch reference
(<code>fastdiff.use_backend("reference")</code>) in turns in this process, medians of {speed["rounds"]}; a ratio above 1
means that ours are faster. Matrix products and attention, most of the work at this size, are PyTorch's in both.</p>

<h2>Run</h2>
<p class="small">seed {settings["seed"]}, device {html.escape(settings["device"])}, {environment["threads"]} threads;
DiT with patches of 2, width {settings["hidden_size"]}, {settings["depth"]} blocks, {settings["num_heads"]} heads;
AdamW, batch {settings["batch_size"]}, cosine learning rate from {settings["lr"]:g} (reflow {settings["reflow_lr"]:g}),
weights averaged with decay {settings["ema_decay"]:g}. torch {html.escape(environment["torch"])}, fastdiff
{html.escape(str(build.get("version")))} (CPU kernels: {html.escape(str(build.get("cpu_isa")))}), Python
{environment["python"]}. Seconds: {phases}.</p>
<p class="small">Beside this page: the pictures, <code>model-before-reflow.safetensors</code>,
<code>model.safetensors</code>, all figures in <code>results.json</code>, and checkpoints in <code>state/</code>.</p>
</main></body></html>
"""
    write_text(out / "report.html", page)


def _score_table(results: dict[str, Any]) -> str:
    rows = []
    for n, row in results["steps"].items():
        before, after = row["before"], row["after"]
        best = "after" if after["frechet"] < before["frechet"] else "before"
        distances = (
            f"<td{' class=best' if when == best else ''}>{row[when]['frechet']:.2f}</td>"
            for when in ("before", "after")
        )
        accuracies = f"<td>{before['accuracy']:.3f}</td><td>{after['accuracy']:.3f}</td>"
        rows.append(f"<tr><td>{_steps(n)}</td>{''.join(distances)}{accuracies}</tr>")
    reference = results["reference"]
    means = reference["class_means"]
    for name, distance, accuracy in (
        ("real digits", reference["frechet_real"], reference["classifier_accuracy"]),
        ("class means", means["frechet"], means["accuracy"]),
    ):
        rows.append(
            f'<tr class="ref"><td>{name}</td><td colspan="2">{distance:.2f}</td>'
            f'<td colspan="2">{accuracy:.3f}</td></tr>'
        )
    return (
        "<table><thead><tr><th>Euler steps</th><th>Fréchet distance before</th><th>after reflow</th>"
        f"<th>accuracy before</th><th>after reflow</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _speed_table(speed: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{text}</td><td>{row['ours_ms']:.1f} ms</td><td>{row['reference_ms']:.1f} ms</td>"
        f"<td><b>{row['speedup']:.2f}&times;</b> ({row['speedup_q1']:.2f}&ndash;{row['speedup_q3']:.2f})</td></tr>"
        for text, row in (("training step", speed["training_step"]), ("sampling, 4 steps", speed["sampling_4_steps"]))
    )
    heading = "<th></th><th>fastdiff</th><th>PyTorch reference</th><th>ratio (quartiles)</th>"
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table>"


def _steps(n: str) -> str:
    return f"{n} step" if n == "1" else f"{n} steps"


def _device_text(results: dict[str, Any]) -> str:
    if results["settings"]["device"] != "cpu":
        return f"{results['settings']['device']}"
    threads = results["environment"]["threads"]
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
