"""Where each feedback wins: tables and figures over the number of products of a problem.

They read lines of the ledger (ledger.py), which hold a run's test scores and its curve. `rate`
chooses the learning rate and the default length by two rules, written down before any test problem
was looked at:
- One rate for all: the largest at which no run of 3 to 6 products, in any condition and seed, ends
  on validation problems below a quarter of the untrained solver's Avg (a collapse).
- The default length: the shortest at which, at that rate, in each seed, grpo ends on validation
  below ref, and ref below critique. If there is none, the longest.
A rate at which grpo collapses is out, so the others are not measured there.
"""
import numpy as np

from sd.run.figure import Panel, panels
from sd.study.ledger import Arms, Lines

LENGTHS = range(2, 7)
RATES = ("2e-4", "4e-4", "8e-4")
EQUAL_RATE = "4e-4"
OWN_RATE = "8e-4"       # grpo's best of the three on validation problems, at each length
CONDS = ("critique", "ref", "grpo")
COLOURS = {"critique": "orange", "ref": "blue", "grpo": "green"}
TEACHERS = {"base": "blue", "ema": "orange", "live": "green"}
PASSED = (20, 50)       # percent on validation problems


def ends(lines: Lines) -> np.ndarray:
    """Validation Avg at the end of each run (S)."""
    return np.array([line["curve"][-1]["avg"] for line in lines])


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, which is 0 for one seed."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=len(values) > 1):.1f}"


def mean(lines: Lines, name: str) -> np.ndarray:
    """The mean over seeds of a column of the curves (E)."""
    return np.mean([[row[name] for row in line["curve"]] for line in lines], 0)


def rate_table(arms: Arms) -> str:
    """Final validation Avg at each rate, collapses marked; then what the rules choose."""
    out = ["| products | rate | " + " | ".join(CONDS) + " |", "|---|---|---|---|---|"]
    stable = list(RATES)
    for products in LENGTHS:
        for rate in RATES:
            cells = []
            for cond in CONDS:
                lines = arms.get(f"{cond} --lr {rate} --products {products}")
                curves = [line["curve"] for line in lines or []]
                collapsed = sum(curve[-1]["avg"] < curve[0]["avg"] / 4 for curve in curves)
                note = f" ({collapsed} collapsed)" if collapsed else ""
                cells.append(f"{ends(lines).mean():.1f}{note}" if lines else "–")
                if collapsed and products > 2 and rate in stable:
                    stable.remove(rate)
            out.append(f"| {products} | {rate} | {' | '.join(cells)} |")
    chosen = stable[-1] if stable else "none"
    ordered, own = [], {}
    for products in LENGTHS:
        critique, ref, grpo = (ends(arms[f"{cond} --lr {EQUAL_RATE} --products {products}"])
                               for cond in CONDS)
        if (grpo < ref).all() and (ref < critique).all():
            ordered.append(str(products))
        scores = {rate: ends(arms[f"grpo --lr {rate} --products {products}"]).mean()
                  for rate in RATES}
        own.setdefault(max(scores, key=scores.get), []).append(str(products))
    out += [
        f"\nValidation Avg@4 after the last step, mean of {len(critique)} seeds.",
        f"The rate for all, by the rule: {chosen}.",
        f"In the paper's order in each seed: {', '.join(ordered) or 'no length'}.",
        *(f"grpo's own best rate at {', '.join(at)} products: {rate}." for rate, at in own.items())]
    return "\n".join(out) + "\n"


def variants(arms: Arms) -> dict[str, dict[int, Lines]]:
    """An arm's name without its length -> length -> lines."""
    found = {}
    for arm, lines in arms.items():
        name, products = arm.split(" --products ")
        name = name.replace(" --divergence", ",").replace(" --lr", ",")
        found.setdefault(name, {})[int(products)] = lines
    return found


def horizon_table(arms: Arms) -> str:
    """Test Avg at each length; what it took to pass PASSED; why grpo's signal fades."""
    found = variants(arms)
    out = ["| products | untrained | " + " | ".join(found) + " |", "|---" * (len(found) + 2) + "|"]
    for products in LENGTHS:
        start = mean(found["critique"][products], "avg")[0]
        cells = []
        for lines in found.values():
            values = [line["test"]["avg@12"] for line in lines[products]]
            cells.append(mean_and_spread(values))
        out.append(f"| {products} | {start:.1f} | {' | '.join(cells)} |")
    out.append(f"\nTest Avg@12, mean ± standard deviation over {len(values)} seeds; the\n"
               "untrained solver's on validation problems.\n")
    for level in PASSED:
        out += [f"| passes {level} % | " + " | ".join(found) + " |",
                "|---" * (len(found) + 1) + "|"]
        for products in LENGTHS:
            cells = [passing(lines[products], level) for lines in found.values()]
            out.append(f"| {products} | {' | '.join(cells)} |")
        out.append("")
    out += ["Step, rollouts and sampled tokens at the first evaluation at which the seeds' mean\n"
            "validation Avg@4 is that high.\n",
            "| | groups with a signal, first 10 steps | last | entropy, first 10 steps | last |",
            "|---|---|---|---|---|"]
    for name in ("grpo", f"grpo, {OWN_RATE}"):
        for products, lines in found[name].items():
            values = [mean(trained(lines), column)[at] for column in ("signal", "entropy")
                      for at in (0, -1)]
            out.append(f"| {name}, {products} | {values[0]:.0%} | {values[1]:.0%} | "
                       f"{values[2]:.3f} | {values[3]:.3f} |")
    out.append("\n" + crossing(found))
    return "\n".join(out) + "\n"


def trained(lines: Lines) -> Lines:
    """The runs without their first evaluation, before which nothing was sampled."""
    return [{"curve": line["curve"][1:]} for line in lines]


def passing(lines: Lines, level: float) -> str:
    """When the mean curve first passes `level`: step / rollouts / tokens."""
    high = np.flatnonzero(mean(lines, "avg") >= level)
    if len(high) == 0:
        return "–"
    step = mean(lines, "step")[high[0]]
    rollouts = mean(lines, "rollouts")[high[0]]
    tokens = mean(lines, "tokens")[high[0]]
    return f"{step:.0f} / {rollouts:,.0f} / {tokens / 1000:,.0f}k"


def crossing(found: dict[str, dict[int, Lines]]) -> str:
    """For each seed, the length from which on grpo ends below the others on test problems."""
    out = []
    for other in ("ref", "critique"):
        for name in ("grpo", f"grpo, {OWN_RATE}"):
            starts = []
            for seed in range(len(found[name][LENGTHS[0]])):
                scores = [[found[arm][n][seed]["test"]["avg@12"] for n in LENGTHS]
                          for arm in (name, other)]
                below = np.less(*scores)
                first = len(below)
                while first and below[first - 1]:
                    first -= 1
                starts.append(str(LENGTHS[first]) if first < len(below) else "never")
            out.append(f"{name} ends below {other} from this length on: {', '.join(starts)} "
                       "products (by seed).")
    return "\n".join(out)


def figure(arms: Arms) -> str:
    """Test Avg@12 against the number of products, an SVG."""
    legend, means, dots = {}, [], []
    for name, lines in variants(arms).items():
        colour = COLOURS[name.split(",")[0]]
        legend[name] = colour if name in COLOURS else f"{colour} dashed"
        points = []
        for n in LENGTHS:
            values = [line["test"]["avg@12"] for line in lines[n]]
            points.append((n, np.mean(values)))
            dots += [(colour, (n, value)) for value in values]
        means.append((legend[name], points))
    panel = Panel("products in a problem", LENGTHS[0], LENGTHS[-1], LENGTHS, means, dots)
    return panels("Avg@12 on test problems after training: seeds and mean", legend, [[panel]],
                  560, 260)


def curves(arms: Arms) -> str:
    """Validation Avg against steps, rollouts and sampled tokens, a column per length, an SVG."""
    found = variants(arms)
    rows = []
    for label, name, unit in (("steps", "step", 1), ("rollouts", "rollouts", 1),
                              ("thousand tokens", "tokens", 1000)):
        row = []
        for products in LENGTHS:
            drawn, most = [], 1
            for cond in CONDS:
                lines = found[cond][products]
                at = mean(lines, name) / unit
                drawn.append((COLOURS[cond], zip(at, mean(lines, "avg"))))
                most = max(most, round(at[-1]))
            row.append(Panel(label, 0, most, (0, most), drawn, title=f"{products} products"))
        rows.append(row)
    return panels("Avg@4 on validation problems during training", COLOURS, rows, 126, 100)


def decline(arms: Arms) -> str:
    """When each long run was best, when it had lost a tenth of that, and what changed; by seed."""
    out = ["| | best Avg@4, at step | a tenth lower from step | at the end | length, best and end "
           "| entropy, best and end |", "|---|---|---|---|---|---|"]
    for name, lines in arms.items():
        rows = []
        for line in lines:
            curve = line["curve"]
            best = max(curve, key=lambda row: row["avg"])
            later = [row for row in curve if row["step"] > best["step"]]
            low = [row["step"] for row in later if row["avg"] < 0.9 * best["avg"]]
            near = curve[1] if best is curve[0] else best   # nothing is sampled before the first
            last = curve[-1]
            rows.append((f"{best['avg']:.1f}, {best['step']}", str(low[0]) if low else "never",
                         f"{last['avg']:.1f}", f"{near['length']:.0f}, {last['length']:.0f}",
                         f"{near['entropy']:.3f}, {last['entropy']:.3f}"))
        out.append(f"| {name} | {' | '.join(map('; '.join, zip(*rows)))} |")
    return "\n".join(out) + "\n"


def long_curves(arms: Arms) -> str:
    """Validation Avg over a long run, a panel per condition, an SVG."""
    legend = {}
    drawn = {"critique": [], "ref": []}
    for name, lines in arms.items():
        cond, *_, teacher, _, kind = name.split()
        style = TEACHERS[teacher] + (" dashed" if kind == "reverse" else "")
        legend[f"{teacher}, {kind}"] = style
        drawn[cond].append((style, zip(mean(lines, "step"), mean(lines, "avg"))))
    most = round(mean(lines, "step")[-1])
    row = []
    for cond, joined in drawn.items():
        row.append(Panel("steps", 0, most, (0, most), joined, title=cond))
    return panels("Avg@4 on validation problems over ten times as many steps", legend, [row],
                  340, 220)
