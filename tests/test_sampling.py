"""Sampling against a loop without a cache, a batch or a pad; and the distribution against softmax."""
import pytest
import torch

from sd import losses
from sd.conditions import completion_hidden
from sd.llm.model import ModelConfig, Transformer
from sd.llm.sampling import draw, sample, uniforms

CONFIG = ModelConfig(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6,
                     rope_theta=100.0, max_position_embeddings=64, qk_norm=True)
EOS, LIMIT = 3, 30
PROMPTS = [[int(v) for v in torch.randint(1, 12, (n,), generator=torch.Generator().manual_seed(n))]
           for n in (2, 9, 1, 5, 12, 3, 7, 4, 6, 8)]


@pytest.fixture(scope="module")
def model():
    model, source = Transformer(CONFIG), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7, generator=source)
    return model


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@torch.no_grad()
def greedy(model, prompt, limit=LIMIT):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] != EOS):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def chi_square(ids, probabilities):
    expected = probabilities * len(ids)
    return float(((ids.bincount(minlength=len(probabilities)) - expected) ** 2 / expected).sum())


def test_ragged_prompts_sampled_together_equal_one_by_one_even_if_memory_held_nan(model, poisoned):
    """An unwritten slot held NaN; its weight is 0, but 0 * NaN is NaN: rows with short prompts ended at once.

    Short and long completions together also see that dropping finished rows leaves the others alone.
    """
    alone = [greedy(model, p) for p in PROMPTS]
    lengths = [len(c) for c in alone]
    assert min(lengths) <= 8 and max(lengths) == LIMIT and len(set(lengths)) >= 4, lengths  # its own premise
    for order in (list(range(len(PROMPTS))), list(range(len(PROMPTS)))[::-1]):
        out = sample(model, [PROMPTS[i] for i in order], EOS, LIMIT, temperature=0)
        assert out.completions() == [alone[i] for i in order]
        assert out.logprobs.isfinite().all()


def test_stops_at_eos_counts_it_and_flags_what_ran_out_of_tokens(model):
    out = sample(model, PROMPTS, EOS, 12, 1.5, 4, uniforms(40, 12, 0))
    assert 0 < out.truncated.sum() < len(out.truncated)
    for ids, n, logprobs, cut, c in zip(out.ids, out.lengths.tolist(), out.logprobs, out.truncated,
                                        out.completions()):
        assert len(c) == n and EOS not in c[:-1]
        assert (n == 12 and c[-1] != EOS) if cut else c[-1] == EOS
        assert not ids[n:].any() and not logprobs[n:].any() and (logprobs[:n] < 0).all()
    first = sample(model, [PROMPTS[0]], out.completions()[0][0], 12, temperature=1.5,
                   noise=uniforms(40, 12, 0))
    assert first.completions() == [out.completions()[0][:1]] and not first.truncated.any()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
def test_logprobs_are_those_the_loss_computes_on_the_same_ids(model, temperature):
    out = sample(model, PROMPTS, EOS, LIMIT, temperature, 2, uniforms(20, LIMIT, 1))
    completions = out.completions()
    assert min(map(len, completions)) < 8 < max(map(len, completions))
    with torch.no_grad():
        hidden = completion_hidden(model, [p for p in PROMPTS for _ in range(2)], completions)
        logp = losses.of_token(losses.log_probs(model.lm_head(hidden), temperature),
                               torch.tensor(sum(completions, [])))
    sampled = torch.cat([row[:n] for row, n in zip(out.logprobs, out.lengths)])
    torch.testing.assert_close(sampled, logp, atol=2e-5, rtol=1e-4)


def test_a_group_continues_its_own_prompt_with_the_distribution_of_single_samples(model):
    greedily = sample(model, PROMPTS, EOS, LIMIT, temperature=0, group=3)
    assert greedily.completions() == [greedy(model, p) for p in PROMPTS for _ in range(3)]
    out = sample(model, PROMPTS[:2], EOS, 2, 1.3, 4000, uniforms(8000, 2, 2))
    for prompt, ids in zip(PROMPTS, out.ids.view(2, 4000, -1)):
        with torch.no_grad():
            first = (model(torch.tensor([prompt]))[0, -1] / 1.3).softmax(-1)
            common = int(first.index_fill(0, torch.tensor([EOS]), 0).argmax())
            second = (model(torch.tensor([prompt + [common]]))[0, -1] / 1.3).softmax(-1)
        assert chi_square(ids[:, 0], first) < 40                        # 11 degrees of freedom, p = 4e-5
        assert chi_square(ids[ids[:, 0] == common, 1], second) < 40


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_softmax_of_logits_over_temperature(temperature):
    logits = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5])
    ids, logprobs = draw(logits.expand(20_000, 5), temperature, uniforms(20_000, 1, 0)[:, 0])
    expected = (logits / temperature).softmax(-1)
    assert chi_square(ids, expected) < 24                               # 4 degrees of freedom, p = 8e-5
    torch.testing.assert_close(logprobs, expected.log()[ids])


def test_the_seed_decides_the_samples(model):
    one, same, other = (sample(model, PROMPTS, EOS, LIMIT, 1.0, 2, uniforms(20, LIMIT, seed))
                        for seed in (5, 5, 6))
    assert one.completions() == same.completions() != other.completions()
    assert torch.equal(one.logprobs, same.logprobs)


def test_a_rollout_does_not_depend_on_the_others_in_its_batch(model):
    """So one process and two, or another memory limit, train on the same rollouts; here rounding decides nothing."""
    noise = uniforms(20, LIMIT, 7)
    together = sample(model, PROMPTS, EOS, LIMIT, 1.2, 2, noise).completions()
    apart = [sample(model, PROMPTS[i:i + 3], EOS, LIMIT, 1.2, 2, noise[2 * i:2 * i + 6]).completions()
             for i in (0, 3, 6, 9)]
    assert together == sum(apart, [])


def test_the_ends_of_the_interval_never_draw_an_impossible_token():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 2.0, float("-inf")]]).expand(2, 5)
    assert draw(logits, 1.0, torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64))[0].tolist() == [1, 3]
