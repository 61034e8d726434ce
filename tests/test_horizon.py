"""The map over lengths: the rules' choices, crossings and figures, on ledgers written by hand."""
import re
from xml.etree import ElementTree

import numpy as np

from sd.config import Config
from sd.experiment import ARMS, summary, table
from sd.report import read_rows
from sd.study import horizon
from sd.study.horizon import (CONDS, LENGTHS, RATES, crossing, curves, decline, figure, horizon_table, passing,
                              rate_table, variants)
from sd.study.ledger import LEDGER, METRICS, ROOT, make_job
from tests.test_experiment import line


def rate_arms(change=()):
    """critique 60, ref 40, grpo 20 at the end everywhere, untrained 4; but `change`: arm -> ends of three seeds."""
    level = {"critique": 60.0, "ref": 40.0, "grpo": 20.0}
    ends = {arm: [level[arm.split()[0]]] * 3 for arm in ARMS["rate"]} | dict(change)
    return {arm: [line(0.0, curve=(4.0, 90.0, end)) for end in values] for arm, values in ends.items()}


def test_the_rate_is_the_largest_without_a_collapse_from_three_products_on():
    assert "by the rule: 8e-4." in rate_table(rate_arms())
    fallen = {"grpo --lr 8e-4 --products 5": [20.0, 0.9, 20.0]}             # below a quarter of 4, in one seed
    text = rate_table(rate_arms(fallen))
    assert "by the rule: 4e-4." in text and "| 13.6 (1 collapsed) |" in text
    assert "by the rule: 8e-4." in rate_table(rate_arms({"grpo --lr 8e-4 --products 5": [20.0, 1.0, 20.0]}))
    assert "by the rule: 8e-4." in rate_table(rate_arms({"grpo --lr 8e-4 --products 2": [0.0, 0.0, 0.0]}))
    low = {f"grpo --lr {rate} --products 3": [0.0] * 3 for rate in RATES}
    assert "by the rule: none." in rate_table(rate_arms(low))


def test_the_order_must_hold_in_each_seed():
    equal = horizon.EQUAL_RATE
    text = rate_table(rate_arms({f"grpo --lr {equal} --products 2": [20.0, 41.0, 20.0],
                                 f"ref --lr {equal} --products 4": [40.0, 40.0, 60.0]}))
    assert "In the paper's order in each seed: 3, 5, 6." in text
    nowhere = {f"ref --lr {equal} --products {n}": [70.0] * 3 for n in LENGTHS}
    assert "In the paper's order in each seed: no length." in rate_table(rate_arms(nowhere))
    best = rate_table(rate_arms({"grpo --lr 2e-4 --products 3": [25.0, 10.0, 30.0]}))
    assert "grpo's own best rate at 2, 3, 4, 5, 6 products: 2e-4." in best
    text = rate_table(rate_arms({"grpo --lr 4e-4 --products 3": [25.0] * 3}))
    assert "at 2, 4, 5, 6 products: 2e-4." in text and "at 3 products: 4e-4." in text


def horizon_arms():
    """critique 80; ref 90, 80, … 50; grpo 95, 75, 55, 35, 15; and so in each of three seeds but grpo's third."""
    arms = {}
    for arm in ARMS["horizon"]:
        n = int(arm.split()[-1])
        avg = {"critique": 80.0, "ref": 90.0 - 10 * (n - 2), "grpo": 95.0 - 20 * (n - 2)}[arm.split()[0]]
        last = avg + 25 if arm.startswith("grpo --products") else avg
        arms[arm] = [line(end, curve=(4.0, 21.0, end)) for end in (avg, avg, last)]
    return arms


def test_the_crossing_is_the_length_from_which_grpo_stays_below():
    """By hand: grpo 95, 75, 55, 35, 15 and, in the third seed, 120, 100, 80, 60, 40; ref 90, 80, 70, 60, 50."""
    text = crossing(variants(horizon_arms()))
    assert "grpo ends below ref from this length on: 3, 3, 6 products" in text
    assert "grpo ends below critique from this length on: 3, 3, 5 products" in text
    assert "grpo, 8e-4 ends below ref from this length on: 3, 3, 3 products" in text
    arms = horizon_arms()
    arms["grpo --products 6"][1] = line(50.0, curve=(4.0, 21.0, 50.0))                  # level is not below
    assert "ref from this length on: 3, never, 6 products" in crossing(variants(arms))


def test_the_table_says_when_a_level_is_passed_and_what_became_of_the_signal():
    lines = [line(0.0, curve=(4.0, 19.0, 60.0)), line(0.0, curve=(4.0, 21.0, 30.0))]    # mean 4, 20, 45
    assert passing(lines, 20) == "10 / 32 / 1k" and passing(lines, 50) == "–"
    text = horizon_table(horizon_arms())
    assert re.search(r"\| 2 \| 4.0 \| 80.0 ± 0.0 \| 90.0 ± 0.0 \| 103.3 ± 14.4 \| 95.0 ± 0.0 \|", text)
    assert "| grpo, 6 | 25% | 25% | 0.500 | 0.500 |" in text


def test_the_figures_show_every_arm_at_every_length():
    svg = figure(horizon_arms())
    ElementTree.fromstring(svg)
    assert all(f">{name}</text>" in svg for name in variants(horizon_arms()))
    paths = re.findall(r'class="(orange|blue|green)( dashed)?" d="M48\.0 (\S+?)L[^"]*"', svg)       # from two products on
    heights = {(colour, dashed): float(y) for colour, dashed, y in paths}
    assert len(paths) == 6 and heights["orange", ""] > heights["blue", ""]               # 80 is below 90
    ElementTree.fromstring(curves(horizon_arms()))
    drawn = re.findall(r'class="(?:orange|blue|green)" d="M\S+ \S+L\S+ \S+L', curves(horizon_arms()))
    assert len(drawn) == 3 * 3 * 5                          # three points each, so not the legend's


def test_the_default_rate_is_the_one_chosen():
    assert Config.lr == float(horizon.EQUAL_RATE)


def test_the_published_numbers_are_those_of_the_ledger():
    """The tables of README and RESULTS.md, worked out anew from the shipped ledger."""
    ledger, pages = list(read_rows(LEDGER)), {}
    for name in ("README.md", "sd/RESULTS.md"):
        pages[name] = (ROOT / name).read_text(encoding="utf-8")

    def cells(arm, seeds, metrics):
        lines = [make_job(arm, seed, []).find(ledger) for seed in range(seeds)]
        values = {metric: [found["test"][metric] for found in lines] for metric in metrics}
        return " | ".join(f"{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}" for v in values.values())

    for cond in CONDS:
        assert f"| `{cond}` | {cells(cond, 5, METRICS)} | " in pages["README.md"]
    for name, arms in ARMS.items():
        lines = {arm: [make_job(arm, seed, []).find(ledger) for seed in range(3)] for arm in arms}
        if name in ("main", "gap") or None in sum(lines.values(), []):
            continue                                                    # not measured yet, as RESULTS.md says
        text = {"rate": rate_table, "horizon": horizon_table}.get(name, lambda lines: table(summary(lines)))(lines)
        rows = [row for row in text.splitlines() if row.startswith("| ")]
        assert len(rows) > 2 and set(rows) <= set(pages["sd/RESULTS.md"].splitlines()), name
    text = decline({arm: [make_job(arm, 0, []).find(ledger)] for arm in ARMS["long"]})
    assert set(text.splitlines()) <= set(pages["sd/RESULTS.md"].splitlines())
