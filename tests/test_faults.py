"""What can fail beside the code: memory, a rank of two, the critic's server, the folder. Nothing is lost."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load_file

from sd import conditions
from sd.answers import equal, final_answer
from sd.problems import Problem
from sd.rollouts import Critique, Rollout
from sd.run import runs
from sd.run.client import ChatClient
from sd.steps import parse
from sd.task.symbolic import SymbolicCritic
from tests.conftest import ROOT, Trainer

SHORT = ["--cond", "critique", "--batch", 4, "--steps", 3, "--eval-samples", 1, "--eval-every", 10]


def ahead(base):
    trainer = Trainer(base)
    results = base, out_of_memory(trainer, base / "memory"), a_rank_dies(trainer, base / "rank")
    trainer.close()
    return results


def out_of_memory(trainer, out):
    first = trainer(["--cond", "ref", "--batch", 64, "--micro-batch", 64, "--steps", 1, "--epochs", 2,
                     "--eval-samples", 1, "--out", out], room=200 * 2 ** 20)
    return first, trainer(["--resume", out, "--micro-batch", 8], room=200 * 2 ** 20)


def test_out_of_memory_is_told_and_the_run_goes_on_with_a_smaller_batch(ahead):
    base, ((code, text), resumed), _ = ahead["test_faults"].result()
    assert code == 1 and "Traceback" not in text, text
    assert text.splitlines()[-2] == f"after step 0; go on with: python train.py --resume {base}/memory"
    assert text.splitlines()[-1].startswith("train.py: out of memory (") and "smaller" in text
    code, text = resumed
    assert code == 0 and "done." in text, text


def a_rank_dies(trainer, out):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
         *map(str, SHORT), "--steps", "400", "--epochs", "100", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("step    2/"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    ranks = {re.search(rb"\0RANK=(\d)\0", open(f"/proc/{pid}/environ", "rb").read())[1]: int(pid)
             for pid in children}
    os.kill(ranks[b"1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    begun = time.time()
    resumed = trainer(["--resume", out],
                      lambda text: f"step {steps[-1] + 1:4d}/" in text or time.time() - begun > 60,
                      signal.SIGTERM)
    return process.returncode, errors, resumed


def test_a_rank_that_dies_ends_the_others_within_a_minute_and_the_run_goes_on(ahead):
    base, _, (status, errors, (code, text)) = ahead["test_faults"].result()
    assert status != 0 and f"go on with: python train.py --resume {base}/rank" in errors, errors
    assert code == 143 and "from step 0\n" in text, text        # the last state: a minute has not passed


class Scribe(BaseHTTPRequestHandler):
    """A chat server that writes as the exact critic; it hangs up for good after `server.left` answers."""

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        said = re.split(r"~~~.*\n", prompt.split("Your task:\n")[1])[1:4]
        problem, trace, truth = (part.strip() for part in said)
        self.server.left -= 1
        self.server.keys.add(self.headers.get("Authorization"))
        if self.server.left < 0:
            return
        cut, trace = "ran out of tokens" in prompt, parse(trace)
        problem = Problem("p", problem, truth.splitlines()[0])
        answer = final_answer(trace, cut)
        critique = SymbolicCritic()(Rollout(problem, [], [], None, cut, trace, answer,
                                            float(equal(answer, problem.answer))))
        message = {"content": "<think>\nlet me see </think>" + critique.text}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())

    def log_message(self, *args):
        pass


def test_a_server_that_dies_in_mid_run_costs_nothing_and_its_key_is_written_nowhere(
        tmp_path, here, monkeypatch, trainer):
    """Nothing is trained on half of a batch: resumed, the run is the one that the exact critic gives."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setattr(conditions, "ChatClient", partial(ChatClient, retries=1, backoff=0.01))
    assert here(*SHORT, *trainer.data, "--out", tmp_path / "exact")[0] == 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Scribe) as server:
        server.daemon_threads, server.left, server.keys = True, 6, set()        # a step and a half
        server.handle_error = lambda *args: None
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        code, said = here(*SHORT, *trainer.data, "--critic", f"{url}#scribe", "--out", tmp_path / "run")
        resume, last = said.splitlines()[-2:]
        assert code == 2 and last.startswith(f"train.py: {url}/chat/completions: no answer"), said
        assert resume == f"after step 1; go on with: python train.py --resume {tmp_path / 'run'}"
        assert "step    1/3  loss" in said and "step    2/3" not in said
        server.left = 100
        code, more = here("--resume", tmp_path / "run")
        assert code == 0 and server.keys == {"Bearer sk-very-secret"}, more
        assert f"OPENAI_API_KEY if it is set: {url}#scribe" in more.splitlines()[0]
        server.shutdown()
    for name in ("best", "last"):
        one, other = (load_file(tmp_path / run / name / "model.safetensors") for run in ("run", "exact"))
        assert all(one[key].equal(other[key]) for key in one)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"very-secret" not in path.read_bytes()
    assert "very-secret" not in said + more


def test_three_steps_in_a_row_without_one_critique_that_teaches_end_the_run(tmp_path, here, monkeypatch,
                                                                            trainer):
    """It trained on nothing, at a loss of 0, to its end. Resumed, it counts on from its state."""
    usable, asked = SymbolicCritic.batch, []

    def batch(self, rollouts):
        asked.append(len(rollouts))
        if len(asked) in (3, 8):
            return usable(self, rollouts)
        return [Critique("", f"text {len(asked)}", malformed=f"reason {len(asked)}") for _ in rollouts]

    monkeypatch.setattr(SymbolicCritic, "batch", batch)
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    code, text = here(*SHORT, *trainer.data, "--batch", 1, "--steps", 7, "--out", tmp_path / "run")
    resume, last = text.splitlines()[-2:]
    assert code == 2 and "step 6: in three steps" in last and "reason 6" in last, text
    assert resume.startswith("after step 5; go on with") and asked == [1] * 6
    rows = list(map(json.loads, (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()))
    assert [row["critique"] for row in rows if row["malformed"]] == ["text 1", "text 2", "text 4", "text 5",
                                                                     "text 6"]
    code, text = here("--resume", tmp_path / "run")             # not repaired
    assert code == 2 and "step 6: in three steps" in text.splitlines()[-1] and len(asked) == 7
    code, text = here("--resume", tmp_path / "run")             # repaired
    assert code == 0 and len(asked) == 9, text


def test_a_malformed_critique_is_counted_and_its_rollout_trains_nothing(tmp_path, here, monkeypatch, trainer):
    """One usable critique in a batch of four: loss and gradient are those of a batch of its rollout alone."""
    usable, numbers = SymbolicCritic.batch, {}
    broken = lambda self, rollouts: [c if i == 0 else Critique("", "", malformed="cut off")
                                     for i, c in enumerate(usable(self, rollouts))]
    for size, batch in ((1, usable), (4, broken)):
        monkeypatch.setattr(SymbolicCritic, "batch", batch)
        code, text = here(*SHORT, *trainer.data, "--batch", size, "--steps", 1, "--out", tmp_path / str(size))
        assert code == 0, text
        rows = map(json.loads, (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines())
        numbers[size] = next(row for row in rows if "loss" in row)
    for name in ("loss", "grad_norm"):
        assert numbers[4][name] == pytest.approx(numbers[1][name], rel=1e-4) and numbers[1][name] > 0.01
    assert [n["critique_malformed"] for n in numbers.values()] == [0, 3]


@pytest.mark.parametrize("folder", ["/proc/run", "locked/run"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_sampled(folder, tmp_path, here):
    """/proc is one for everybody; permissions do not hold root off."""
    if folder.startswith("locked"):
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        (tmp_path / "locked").mkdir(mode=0o555)
        folder = tmp_path / folder
    code, text = here(*SHORT, "--out", folder)
    assert code == 2 and text.startswith("train.py: ") and str(folder) in text and text.count("\n") == 1
