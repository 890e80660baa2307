"""The figures of ``python -m benchmarks.fine_tune`` as the tables of docs/fine-tuning.md, and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from ..machine import ROOT, described
from ..plots import CONVOLUTIONS, OURS, new_figure
from ..results import Figures
from ..tables import Listing, markdown

FILE = ROOT / "docs/fine-tuning/results.json"
PRUNING = ROOT / "docs/fine-tuning/pruning.json"
NETWORKS = ("convolution", "attention")
STAGES = {"convolution": "none", "3": "the last stage", "2": "the last two stages", "1": "all three stages"}


def runs(result: Figures, network: str) -> list[Figures]:
    """Runs of all seeds; for attention, with the tuned strength."""
    strength = next(one["strength"] for one in result["tuning"] if one["network"] == network)
    return [one for one in result["runs"] if one["network"] == network and one["strength"] == strength]


def accuracies(result: Figures, network: str) -> list[list[float]]:
    """Per cent by seed, before training and after each epoch."""
    stage = result["recipe"]["first_stage"]
    own = next(one for one in result["conversion"] if one["first_stage"] == stage)
    before = own["correct_before" if network == "convolution" else "correct_after"] / own["images"]
    return [[100 * before, *(100 * epoch["top1"] for epoch in run["epochs"])] for run in runs(result, network)]


def draw(result: Figures, path: Path) -> None:
    """Accuracy by epoch: the mean over the seeds, and the range from lowest to highest."""
    recipe, images = result["recipe"], result["conversion"][0]["images"]
    stages = STAGES[str(recipe["first_stage"])]
    title = f"ResNet-20 fine-tuned on {recipe['train_images']:,} images of CIFAR-10, attention in {stages}"
    figure = new_figure(title, result["machine"], 4.2)
    panel = figure.subplots()
    for network, shade, mark in (("convolution", CONVOLUTIONS, "s--"), ("attention", OURS, "o-")):
        by_epoch = list(zip(*accuracies(result, network), strict=True))
        epochs, means = range(len(by_epoch)), [statistics.mean(values) for values in by_epoch]
        panel.plot(epochs, means, mark, color=shade, label=network)
        ends = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        panel.fill_between(epochs, *ends, color=shade, alpha=0.2, lw=0)
    panel.set_xticks(range(recipe["epochs"] + 1))
    panel.set(xlabel="epochs of training", ylabel=f"top-1 accuracy on {images:,} validation images, %")
    panel.grid(alpha=0.25)
    seeds = len(recipe["seeds"])
    panel.legend(title=f"mean of {seeds} seeds, lowest to highest", loc="lower right")
    figure.savefig(path, dpi=130)


def conversion(result: Figures) -> Listing:
    """What a conversion changes."""
    rows = []
    for own in result["conversion"]:
        correct = [f"{own[when]:,} ({own[when] / own['images']:.2%})" for when in ("correct_before", "correct_after")]
        equal = f"{own['equal_predictions']:,} of {own['images']:,}"
        rows.append([STAGES[str(own["first_stage"])], *correct, equal, f"{own['largest_difference']:.1e}"])
    header = ["attention in", "correct before", "correct after", "equal predictions", "largest difference of a logit"]
    caption = f"The largest logit is {result['conversion'][0]['largest_logit']:.1f}; float32."
    return Listing(header, rows, caption, 1)


def accuracy(result: Figures) -> Listing:
    """The final results of all seeds."""
    rows, ends = [], {}
    for network in NETWORKS:
        own = accuracies(result, network)
        ends[network] = [values[-1] for values in own]
        losses = [run["epochs"][-1]["loss"] for run in runs(result, network)]
        by_seed = ", ".join(f"{end:.2f}" for end in ends[network])
        row = [network, f"{own[0][0]:.2f}", by_seed, spread(ends[network], 2), spread(losses, 3)]
        rows.append([*row, f"{runs(result, network)[0]['rate']:g}"])
    gains = [after - before for before, after in zip(*(ends[network] for network in NETWORKS), strict=True)]
    caption = f"Attention less convolution, seed by seed: {', '.join(f'{gain:+.2f}' for gain in gains)} points, "
    caption += f"mean {spread(gains, 2, '+')}. ±: standard deviation of the seeds. {described(result['machine'])}."
    if "all_stages" in result:
        own = [run["epochs"][-1] for run in result["all_stages"]]
        tops, losses = [100 * one["top1"] for one in own], [one["loss"] for one in own]
        before = accuracies(result, "attention")[0][0]
        row = ["attention in all stages", f"{before:.2f}", ", ".join(f"{top:.2f}" for top in tops), spread(tops, 2)]
        rows.append([*row, spread(losses, 3), f"{result['all_stages'][0]['rate']:g} (not tuned)"])
    header = ["network", "top-1 before, %", "after, by seed", "mean", "validation loss", "learning rate"]
    return Listing(header, rows, caption, 1)


def cost(result: Figures) -> Listing:
    """Time and parameters by how much attends."""
    rows, least = [], result["cost"]["convolution"]["step"]["median"]
    for name, own in result["cost"].items():
        times = [f"{own[w]['median']:.2f} ({own[w]['lowest']:.2f} to {own[w]['highest']:.2f})" for w in WAYS]
        rows.append([STAGES[name], f"{own['parameters']:,}", *times, f"{own['step']['median'] / least:.1f}"])
    header = ["attention in", "parameters", "CPU seconds a training step (lowest to highest)", "CPU seconds forward"]
    caption = f"{result['recipe']['batch']} images; CPU seconds of the process. {described(result['machine'])}."
    return Listing([*header, "steps of convolution"], rows, caption, 1)


def rates(result: Figures) -> Listing:
    """Accuracy on the held-out images, by learning rate."""
    found = {(one["network"], one["rate"]): one["epochs"][-1]["top1"] for one in result["tuning"]}
    used = {network: runs(result, network)[0]["rate"] for network in NETWORKS}
    rows = [
        [f"{rate:g}", *(f"{found[n, rate]:.2%}{' (chosen)' if rate == used[n] else ''}" for n in NETWORKS)]
        for rate in sorted({rate for _, rate in found})
    ]
    return Listing(["learning rate", *NETWORKS], rows, words=1)


def strengths(result: Figures) -> Listing:
    """What the strength affects."""
    seed, rows = result["recipe"]["seeds"][0], []
    ends = {one["strength"]: one["epochs"][-1]["top1"] for one in result["runs"] if one["seed"] == seed}
    for one in result["strengths"]:
        end = f"{ends[one['strength']]:.2%}" if one["strength"] in ends else ""
        sizes = [
            f"{one[key]:.3g}" if key in one else "" for key in ("weight_norm", "weight_gradient", "query_gradient")
        ]
        name = "convolution" if one["strength"] is None else f"s = {one['strength']:g}"
        rows.append([name, f"{one['error']:.1e}", *sizes, end])
    header = [
        "",
        "largest error of a logit",
        "norm of M",
        "gradient of M",
        "gradient of W_Q",
        f"top-1 after, seed {seed}",
    ]
    return Listing(header, rows, words=1)


def pruning(result: Figures) -> Listing:
    """Accuracy without some of each layer's heads (taps), and after another epoch of training."""
    rows = []
    for place, one in enumerate(result["pruned"][0]["pruned"]):
        row = [f"{one['count']}"]
        for network in NETWORKS:
            own = [run["pruned"][place] for run in result["pruned"] if run["network"] == network]
            row += [spread([100 * each[when] for each in own], 1) for when in ("top1", "trained")]
        rows.append(row)
    header = ["removed of 9", "convolution: taps, top-1, %", "one more epoch", "attention: heads, top-1, %"]
    seeds = len({run["seed"] for run in result["pruned"]})
    caption = f"Mean ± standard deviation of {seeds} seeds. {described(result['machine'])}."
    return Listing([*header, "one more epoch"], rows, caption, 1)


def scratch(result: Figures) -> Listing:
    """Both networks from random weights."""
    rows, tops = [], {}
    for network in NETWORKS:
        own = [run for run in result["scratch"] if run["network"] == network]
        tops[network] = [100 * run["top1"] for run in own]
        rows.append([network, spread(tops[network], 1), f"{own[0]['rate']:g}"])
    more = statistics.mean(tops["attention"]) - statistics.mean(tops["convolution"])
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in tops.values()))
    caption = f"Attention less convolution: {more:+.1f} ± {error:.1f} points (standard error)."
    return Listing(["network", "top-1, %", "learning rate"], rows, caption, 1)


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean and standard deviation of a sample; one value alone."""
    if len(values) == 1:
        return f"{values[0]:{sign}.{digits}f}"
    return f"{statistics.mean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


WAYS = ("step", "forward")
TABLES: dict[str, Callable[[Figures], Listing]] = {
    "conversion": conversion,
    "accuracy": accuracy,
    "cost": cost,
    "rates": rates,
    "strengths": strengths,
}
OF_PRUNING: dict[str, Callable[[Figures], Listing]] = {"pruning": pruning, "scratch": scratch}


def table(name: str) -> str:
    """One of the page's tables."""
    if name in OF_PRUNING:
        return markdown(OF_PRUNING[name](json.loads(PRUNING.read_text())))
    return markdown(TABLES[name](json.loads(FILE.read_text())))
