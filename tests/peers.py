"""The work of tests/bench.py as transformers and TRL do it, on the same tokens and with the same settings.

Both get a checkpoint folder, and are imported only if asked for. TRL is given text, hence prompts of whole
words. First comes what our side uses too: the clock and the prompts.
"""
import os
import random
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from sd.llm.lora import TARGETS
from sd.llm.tokenizer import Tokenizer


class Clock(Counter):
    """Name -> seconds, summed; waits for the GPU, if one is used, at both ends."""

    @contextmanager
    def __call__(self, name: str):
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self[name] += time.perf_counter() - start

    def wait(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def words(tokenizer, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Random prompts of `tokens` tokens, each a whole word, so that a peer given text has the same ids."""
    whole = []
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i])
        if text[:1] == " " and text[1:].isalpha() and text.isascii():
            whole.append(i)
    rng = random.Random(seed)
    return [rng.choices(whole or range(tokenizer.vocab_size), k=tokens) for _ in range(rows)]


def generation_times(args, draw, repeat: int = 1) -> dict:
    """Times `draw(n)`, which generates n tokens: the prefill with the first token, and all further tokens.

    Medians of `repeat` times.

    For one token our weights are not packed. For more they are: packing, and the faster prefill that comes of
    it, both count as decoding.
    """
    clocks = []
    draw(1)                                             # one-off set-up is not counted
    draw(args.tokens if args.compile else 2)
    for _ in range(repeat):
        clock = Clock()
        with clock("prefill"):
            draw(1)
        with clock("all"):
            draw(args.tokens)
        clocks.append(clock)
    prefill, whole = (median(clock[part] for clock in clocks) for part in ("prefill", "all"))
    decode = max(whole - prefill, 1e-9)                 # both are noisy
    return {"seconds": {"prefill": prefill, "decode": decode},
            "decode tokens/s": args.batch * (args.tokens - 1) / decode}


def transformers_generation(args, device, _) -> dict:
    from transformers import AutoModelForCausalLM
    tokenizer = Tokenizer(Path(args.model) / "tokenizer.json")
    ids = torch.tensor(words(tokenizer, args.batch, args.prompt, 0), device=device)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.torch_dtype).to(device).train(False)
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                   attention_mask=torch.ones_like(ids))

    def generate(new):
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
    return generation_times(args, generate)


def trl_step(args, device, cond: str) -> dict:
    """The second step of TRL's own trainer at the same settings: GRPO, or SDFT for self-distillation."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    tokenizer = Tokenizer(Path(args.model) / "tokenizer.json")
    common = dict(output_dir="/tmp/sd-bench-trl", per_device_train_batch_size=args.batch,
                  max_completion_length=args.tokens, generation_kwargs={"min_new_tokens": args.tokens},
                  max_steps=2, learning_rate=1e-6, temperature=1.0, bf16=False, gradient_checkpointing=False,
                  report_to=[], save_strategy="no", use_cpu=device.type == "cpu",
                  model_init_kwargs={"dtype": args.dtype}, disable_tqdm=True, logging_strategy="no")
    adapter = None
    if args.lora_rank:
        from peft import LoraConfig
        adapter = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=list(TARGETS))

    def texts(tokens, seed):
        return [tokenizer.decode(p) for p in words(tokenizer, 2 * args.batch, tokens, seed)]

    def alternating(completions, **_):
        return [float(i % 2) for i in range(len(completions))]
    if cond == "grpo":
        from trl import GRPOConfig, GRPOTrainer
        config = GRPOConfig(num_generations=args.batch, **common)
        data = Dataset.from_dict({"prompt": texts(args.prompt, 0)})
        trainer = GRPOTrainer(args.model, alternating, config, data, peft_config=adapter)
    else:
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer
        config = SDFTConfig(num_generations=1, teacher_model_kind=args.teacher, top_k=0,
                            teacher_prompt_template="{prompt}{privileged_context}",
                            distillation_mode="full_logits", **common)
        data = Dataset.from_dict({"prompt": texts(args.prompt, 0),
                                  "privileged_context": texts(args.tokens, 1)})
        trainer = SDFTTrainer(args.model, config, data, peft_config=adapter)
    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.clear()                               # the first step warms up
            self.running = clock("step")
            self.running.__enter__()

        def on_step_end(self, *_, **__):
            self.running.__exit__(None, None, None)
    trainer.add_callback(Watch())
    trainer.train()
    return {"seconds": clock}
