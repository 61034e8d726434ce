"""The work of sd/bench.py done by others, on the same tokens and at the same setting: transformers' and TRL's own forms.

Both get the folder of a checkpoint, and are imported only if asked for. TRL is given text, hence prompts of whole words.
Above them is what both sides use: the clock and the prompts.
"""
import os
import random
import time
from contextlib import contextmanager

import torch

from sd.checkpoint import load


class Clock:
    """Seconds by name, summed; waits for the device at both ends."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextmanager
    def __call__(self, name: str):
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        yield
        wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def words(tokenizer, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Random prompts of `tokens` tokens, each a word of its own, so that a peer which is given text has the same ids."""
    rng = random.Random(seed)
    whole = [i for i in range(tokenizer.vocab_size) if (text := tokenizer.decode([i]))[:1] == " " and text[1:].isalpha()
             and text.isascii()] or range(tokenizer.vocab_size)
    return [rng.choices(whole, k=tokens) for _ in range(rows)]


def speeds(clock: Clock, args) -> dict:
    prefill, everything = clock.seconds["prefill"], clock.seconds["all"]
    decode = max(everything - prefill, 1e-9)            # two noisy numbers
    return {"seconds": {"prefill": prefill, "decode": decode}, "decode tokens/s": args.batch * (args.tokens - 1) / decode,
            "tokens/s": args.batch * args.tokens / everything}


def transformers_generation(args, device) -> dict:
    from transformers import AutoModelForCausalLM
    _, tokenizer, _ = load(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.torch_dtype).to(device).train(False)
    ids, clock = torch.tensor(words(tokenizer, args.batch, args.prompt, 0), device=device), Clock(device)
    draw = lambda n: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    draw(2)
    with clock("prefill"):
        draw(1)
    with clock("all"):
        draw(args.tokens)
    return speeds(clock, args)


def trl_step(args, device, cond: str) -> dict:
    """The second step of TRL's own trainer at the same setting: GRPO, or SDFT for self-distillation."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    _, tokenizer, _ = load(args.model)
    common = dict(output_dir="/tmp/sd-bench-trl", per_device_train_batch_size=args.batch, max_completion_length=args.tokens,
                  generation_kwargs={"min_new_tokens": args.tokens}, max_steps=2, learning_rate=1e-6, temperature=1.0,
                  bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", use_cpu=device.type == "cpu",
                  model_init_kwargs={"dtype": args.dtype}, disable_tqdm=True, logging_strategy="no")
    texts = [tokenizer.decode(p) for p in words(tokenizer, 2 * args.batch, args.prompt, 0)]
    if cond == "grpo":
        from trl import GRPOConfig, GRPOTrainer
        trainer = GRPOTrainer(args.model, lambda completions, **_: [float(i % 2) for i in range(len(completions))],
                              GRPOConfig(num_generations=args.batch, **common), Dataset.from_dict({"prompt": texts}))
    else:
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer
        shown = [tokenizer.decode(p) for p in words(tokenizer, 2 * args.batch, args.tokens, 1)]
        trainer = SDFTTrainer(args.model, SDFTConfig(num_generations=1, teacher_model_kind=args.teacher, top_k=0,
                              distillation_mode="full_logits", teacher_prompt_template="{prompt}{privileged_context}", **common),
                              Dataset.from_dict({"prompt": texts, "privileged_context": shown}))
    clock = Clock(device)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.running = clock("step")
            self.running.__enter__()

        def on_step_end(self, *_, **__):
            clock.seconds.pop("step", None)             # the first step warms up
            self.running.__exit__(None, None, None)
    trainer.add_callback(Watch())
    trainer.train()
    return {"seconds": clock.seconds, "total": clock.seconds["step"],
            "tokens/s": args.batch * args.tokens / clock.seconds["step"]}
