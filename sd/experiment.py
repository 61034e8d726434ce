"""The paper's claims and further questions, each over seeds: one command, one table, nothing chosen by hand.

    python -m sd.experiment main --seeds 5  grpo, ref, critique
    python -m sd.experiment alignment       ref, with references near to and far from the solver's derivation
    python -m sd.experiment quoting         critiques that quote partially, fully, not at all
    also: divergence, teacher, critic-noise, scale

Further options go to train.py: --steps 20 for a quick look.

Every run calls `train.py` and then `eval.py` as a user would, so nothing here can differ from what they do.
Runs are in OUT/runs, each in a folder named after its options, so experiments share the runs that they have
in common (hence one at a time per OUT). A run that is finished is skipped, one that was killed is resumed.
Tables come from stored results alone: OUT/NAME/table.md and results.json are the same to the digit when made
again. Checkpoints are chosen on validation problems and measured on test problems; intervals are over seeds
and problems together.
"""
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from sd import UserError, command, losses, steps
from sd.task import times_table as tt
from sd.llm.checkpoint import load, write_atomic
from sd.conditions import completion_hidden
from sd.config import Config, parse_config
from sd.critic import QUOTING
from sd.task.symbolic import SymbolicCritic
from sd.problems import EMBEDDED, Problem, embedded
from sd.report import write_report
from sd.llm.sampling import sample, uniforms
from sd.llm.tokenizer import Tokenizer

OWN = {"--seed", "--cond", "--model", "--data", "--val", "--preset", "--resume", "--plan"}   # not passed on
ROOT = Path(__file__).resolve().parent.parent
FIGURE = Path(__file__).parent / "run/pages/alignment.svg"
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)     # 97.5 % of Student's t for 2, 3, … 10 seeds
REFERENCES = ("same", "worded", "half", "reordered", "decomposed")    # nearest the solver's derivation first


def arms(name: str, out: Path) -> dict[str, list[str]]:
    """Name of an arm -> its options for train.py."""
    grpo, ref, critique = (["--cond", cond] for cond in ("grpo", "ref", "critique"))
    if name == "main":
        return {"grpo": grpo, "ref": ref, "critique": critique}
    if name == "alignment":
        return {f"ref {kind}": ref + write_references(kind, out / "data") for kind in REFERENCES} | {
            "critique": critique, "grpo": grpo}
    if name == "scale":
        return {f"{c[1]} width {width}": c + solver_options(width, out)
                for width in (64, 128) for c in (grpo, ref, critique)}
    values = {"quoting": QUOTING, "critic-noise": (0.0, 0.1, 0.25, 0.5),        # else called like the option
              "divergence": losses.DIVERGENCES, "teacher": ("base", "ema", "live")}[name]
    of_critics = name in ("quoting", "critic-noise")
    return {f"{c[1]} {value}": [*c, f"--{name}", str(value)]
            for c in ([critique] if of_critics else [ref, critique]) for value in values} | (
        {"ref": ref} if of_critics else {})


def reference(problem: Problem, kind: str) -> str:
    """A reference solution of one kind: the facts stay, the derivation moves away from the solver's."""
    pairs, rng = tt.read_problem(problem.problem), random.Random(f"{problem.id} {kind}")
    if kind == "same":
        equations = tt.derive(tt.State(list(pairs)), False, tt.SYMBOLS)
        return steps.render(list(map(str, equations)), problem.answer)
    if kind == "half":
        pairs = tt.author_order(pairs, rng)
    elif kind != "worded":
        pairs = rng.choice([pairs[i:] + pairs[:i] for i in range(1, len(pairs))] + [pairs[::-1]])
    if kind != "decomposed":
        return tt.reference_text(pairs, [a * b for a, b in pairs])
    parts = [f"{a} multiplied by {b // 2} makes {a * (b // 2)}, then {a} multiplied by {b - b // 2} makes "
             f"{a * (b - b // 2)}, then {a * (b // 2)} plus {a * (b - b // 2)} gives {a * b}"
             for a, b in pairs]
    return "first " + ", then ".join(parts) + f", so {problem.answer} is correct"


def write_references(kind: str, folder: Path) -> list[str]:
    files = {split: folder / f"{kind}-{split}.jsonl" for split in ("train", "val")}
    for split, file in files.items():
        rows = [asdict(replace(p, solution=reference(p, kind))) for p in embedded(split)]
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(files["train"]), "--val", str(files["val"])]


def solver_options(width: int, out: Path) -> list[str]:
    """Options for another solver width and its own hard problems, made on first use (~10 minutes each)."""
    if width == 128:
        return []
    folder = out / f"solver-{width}"
    if not (folder / "val.jsonl").exists():
        run_command([sys.executable, "-m", "sd.pretrain", "--width", str(width), "--out", str(folder)], 2)
    return ["--model", str(folder), "--data", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl")]


def run_command(command: list[str], threads: int = 1) -> None:
    """Runs one of this project's commands. Raises UserError with its last line of stderr if it fails."""
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, text=True,
                            capture_output=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise UserError(f"{' '.join(command[1:])}: {' '.join(result.stderr.strip().splitlines()[-1:])}")


def place(runs: Path, config: Config) -> Path:
    """A run's folder. No two runs share a name: it ends with a digest of all options, defaults too."""
    changed = [f"{f.name}-{Path(str(getattr(config, f.name))).name}" for f in fields(config)
               if getattr(config, f.name) != f.default and f.name not in ("cond", "seed")]
    digest = sha256(json.dumps(asdict(config)).encode()).hexdigest()[:8]
    return runs / "-".join([config.cond, *changed, f"seed{config.seed}", digest])


def run(runs: Path, options: list[str]) -> Path:
    """Trains and measures one arm and seed, on one thread, unless that is done. Returns the run's folder."""
    python, wanted = sys.executable, parse_config("", options)[0]
    kept = place(runs, replace(wanted, keep=True))          # the same, with more of it kept, serves as well
    folder = kept if (kept / "test.json").exists() else place(runs, wanted)
    result = folder / "test.json"
    if result.exists():
        return folder
    if any(folder.glob("state-*.safetensors")):
        run_command([python, "train.py", "--resume", str(folder)])          # does nothing if finished
    else:
        shutil.rmtree(folder, ignore_errors=True)           # killed before its first state
        run_command([python, "train.py", *options, "--out", str(folder)])
    test = ["--temperature", str(wanted.temperature), "--max-new-tokens", str(wanted.max_new_tokens)]
    test += ["--test", f"{wanted.model}/test.jsonl"] if wanted.model else []
    if checkpoints := sorted(folder.glob("step-*")):
        run_command([python, "eval.py", *map(str, checkpoints), *test, "--json", str(folder / "kept.json")])
    # last: once test.json is there, the run is done
    run_command([python, "eval.py", str(folder / "best"), *test, "--json", str(result)])
    print(f"{folder}: test Avg {json.loads(result.read_text())['avg@12']['mean']:.2f}", flush=True)
    return folder


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values` (seeds, problems), from the variances over seeds and problems.

    Student's t over the seeds, since a bootstrap over three covers the truth only some 80 times in 100; the
    problems are many enough for the normal distribution. With one seed, over the problems alone.
    """
    (S, P), mean = values.shape, values.mean()
    half = 1.96 ** 2 * values.mean(0).var(ddof=1) / P
    if S > 1:
        half += T[min(S, len(T) + 1) - 2] ** 2 * values.mean(1).var(ddof=1) / S
    return float(mean - half ** 0.5), float(mean + half ** 0.5)


def summary(runs: dict[str, list[Path]]) -> dict:
    """The numbers of all arms, from what their runs, one per seed, stored."""
    arms, per_problem, problems, names = {}, {}, {}, list(runs)
    for name, folders in runs.items():
        tests = [json.loads((f / "test.json").read_text()) for f in folders]
        rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
                for f in folders]
        arm = {key: [t[key]["mean"] for t in tests] for key in ("avg@12", "maj@12", "pass@12")}
        arm["length"] = float(np.mean([t["mean_length"] for t in tests]))
        arm["rollouts"] = max(row.get("rollouts", 0) for row in rows[0])
        arm["seconds"] = float(np.mean([r[-1]["seconds"] for r in rows]))
        if all((f / "kept.json").exists() for f in folders):
            every = [json.loads((f / "kept.json").read_text()) for f in folders]
            arm["best checkpoint per metric"] = {
                key: [max(t[key]["mean"] for t in of_run) for of_run in every]
                for key in ("avg@12", "maj@12", "pass@12")}
        arms[name], problems[name] = arm, tests[0].get("split")
        per_problem[name] = 100 * np.array([t["values"]["avg"] for t in tests])          # (seeds, problems)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i] if problems[a] == problems[b]]
    differences = {f"{a} - {b}": [float((per_problem[a] - per_problem[b]).mean()),
                                  *interval(per_problem[a] - per_problem[b])] for a, b in pairs}
    return {"seeds": len(folders), "arms": arms, "differences in avg@12": differences}


def table(result: dict) -> str:
    """The summary in Markdown."""
    spread = lambda values: f"{np.mean(values):.1f}" + (
        f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
    columns = ["avg@12", "maj@12", "pass@12"]
    lines = ["| | Avg@12 | Maj@12 | Pass@12 | length | rollouts | seconds |", "|---|---|---|---|---|---|---|"]
    for name, arm in result["arms"].items():
        lines.append(f"| {name} | {' | '.join(spread(arm[key]) for key in columns)} | {arm['length']:.1f} | "
                     f"{arm['rollouts']:,} | {arm['seconds']:.0f} |")
    over = "seeds and problems" if result["seeds"] > 1 else "problems alone"
    lines += ["", f"{result['seeds']} seeds, mean ± standard deviation; test problems, checkpoint chosen on "
              f"validation; intervals over {over}.", "", "| difference in Avg@12 | mean | 95 % interval |",
              "|---|---|---|"]
    lines += [f"| {name} | {mean:+.1f} | {low:+.1f} to {high:+.1f} |"
              for name, (mean, low, high) in result["differences in avg@12"].items()]
    if any("best checkpoint per metric" in arm for arm in result["arms"].values()):
        lines += ["", "The paper's way, the best checkpoint for each metric on the test problems themselves "
                  "(optimistic):", "", "| | Avg@12 | Maj@12 | Pass@12 |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {' | '.join(spread(arm['best checkpoint per metric'][key]) for key in columns)} |"
            for name, arm in result["arms"].items() if "best checkpoint per metric" in arm]
    if distances := result.get("distance"):
        lines += ["", "| reference | KL(teacher, student) on correct steps, nats per token | Avg@12 |",
                  "|---|---|---|"]
        lines += [f"| {name} | {value:.4f} | {np.mean(result['arms'][name]['avg@12']):.1f} |"
                  for name, value in distances.items()]
    return "\n".join(lines) + "\n"


def distance(name: str, problems: list[Problem], model, tokenizer: Tokenizer) -> float:
    """How far a context is from the initial solver: KL(teacher || student) per token of correct steps."""
    critic, prompts = SymbolicCritic(), [tokenizer.student_prompt(p.problem) for p in problems]
    out = sample(model, prompts, tokenizer.eos, Config.max_new_tokens, Config.temperature, 1,
                 uniforms(len(problems), Config.max_new_tokens, 0, "distance"))
    texts, total, count = list(map(tokenizer.decode, out.completions())), 0.0, 0
    critiques = critic.batch(problems, texts, out.truncated.tolist())
    for problem, prompt, ids, text, critique in zip(problems, prompts, out.completions(), texts, critiques):
        right = steps.parse(text).steps[:critique.wrong]
        if not right:
            continue
        _, end = steps.token_span(tokenizer.pieces(ids), 0, right[-1].end)
        kind = "critique" if name == "critique" else "ref"
        context = critique.text if name == "critique" else reference(problem, name.split()[1])
        with torch.no_grad():
            scored = [losses.log_probs(model.lm_head(completion_hidden(model, [p], [ids])[:end]),
                                       Config.temperature)
                      for p in (prompt, tokenizer.teacher_prompt(problem.problem, kind, context))]
        total, count = total + losses.forward_kl(*scored, None).sum().item(), count + end
    return total / max(1, count)


def figure(result: dict) -> str:
    """Avg@12 against each context's measured distance, as an SVG in the reader's light or dark scheme."""
    avg = {name: float(np.mean(arm["avg@12"])) for name, arm in result["arms"].items()}
    spread = {name: float(np.std(arm["avg@12"], ddof=1)) if len(arm["avg@12"]) > 1 else 0.0
              for name, arm in result["arms"].items()}
    distances = result["distance"]
    low, high = np.log10(min(distances.values())) - 0.15, np.log10(max(distances.values())) + 0.15
    x = lambda value: 60 + 460 * (np.log10(value) - low) / (high - low)         # logarithmic
    y = lambda value: 290 - 2.6 * value
    parts = [f'<path class="rule" d="M60 {y(v):.0f}H520"/>'
             f'<text class="end" x="52" y="{y(v) + 4:.0f}">{v}</text>' for v in range(0, 101, 20)]
    parts += [f'<text class="middle" x="{x(v):.0f}" y="308">{v:g}</text>'
              for v in (0.01, 0.03, 0.1, 0.3, 1, 3) if low <= np.log10(v) <= high]
    parts += [f'<path class="{name} line" d="M60 {y(avg[name]):.1f}H520"/>'
              f'<text class="{name}" x="526" y="{y(avg[name]) + below:.0f}">{name}</text>'
              for name, below in zip(sorted(("grpo", "critique"), key=avg.get), (11, -3))]
    for i, (name, distance) in enumerate(distances.items()):
        at, value, (kind, *which) = x(distance), avg[name], name.split()
        parts.append(f'<path class="{kind} line" d="M{at:.1f} {y(value - spread[name]):.1f}'
                     f'V{y(value + spread[name]):.1f}"/>'
                     f'<circle class="{kind}" cx="{at:.1f}" cy="{y(value):.1f}" r="4"/>' +
                     "".join(f'<text x="{at + 8:.1f}" y="{y(value) + (-6 if i % 2 else 13):.1f}">{w}</text>'
                             for w in which))
    return FIGURE.read_text().replace("<!--PARTS-->", "\n".join(parts))


@command("sd.experiment", __doc__)
def main(parser) -> None:
    parser.add_argument("name", choices=("main", "alignment", "quoting", "divergence", "teacher",
                                         "critic-noise", "scale"))
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("experiments"),
                        help="folder of runs and tables (default: experiments)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                        help="runs at a time, one thread each (default: one per core)")
    parser.add_argument("--optimistic", action="store_true", help="also measure every checkpoint on the "
                        "test problems, to report as the paper does")
    args, extra = parser.parse_known_args()     # the rest goes to train.py: --steps 20, say, for a quick look
    if own := OWN & {word.split("=")[0] for word in extra}:
        parser.error(f"{own.pop()} is the experiment's own; leave it out (--seeds says how many)")
    out = (args.out / args.name).resolve()
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be 1 or more")
    options = arms(args.name, out)
    extra += ["--keep"] if args.optimistic else []
    for arm in options.values():
        parse_config("", [*arm, *extra])                # a wrong option is reported once, and now
    print(f"{args.name}: {len(options) * args.seeds} runs, {args.jobs} at a time, to {out.parent}/runs; "
          "the same command, if stopped, goes on", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {(name, seed): pool.submit(run, out.parent / "runs", [*arm, "--seed", str(seed), *extra])
                for seed in range(args.seeds) for name, arm in options.items()}
        try:
            runs = {name: [jobs[name, seed].result() for seed in range(args.seeds)] for name in options}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    result = summary(runs)
    if args.name == "alignment":
        model, tokenizer = load(EMBEDDED)
        result["distance"] = {name: distance(name, embedded("val"), model, tokenizer)
                              for name in options if name != "grpo"}
        write_atomic(out / "figure.svg", figure(result))
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    write_atomic(out / "table.md", table(result))
    write_report([folder for folders in runs.values() for folder in folders], out / "report.html")
    print(f"{table(result)}\nwritten: {out}/table.md, results.json, report.html")


if __name__ == "__main__":
    sys.exit(main())
