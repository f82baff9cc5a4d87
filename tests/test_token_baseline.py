import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import (
    gradient_variance_proxy,
    logit_gradient_proxy,
    optimal_token_baseline,
    response_statistics,
)

OPTIONS = list(
    itertools.product(["column", "model_token"], [False, True], ["zero_baseline", "keep"])
)
each_option = pytest.mark.parametrize(("alignment", "leave_one_out", "tail"), OPTIONS)


def by_loops(data, *, alignment, leave_one_out, tail):
    """float64, one token at a time, straight from the definition."""
    rewards, mask, logp, sum_p2, ids, importance, valid = data.values()
    b, t_max = mask.shape
    advantages = torch.zeros(b, t_max, dtype=torch.float64)
    for group in set(ids.tolist()):
        rows = [i for i in range(b) if ids[i] == group and valid[i] and mask[i].any()]
        track = {}  # rollout -> {position: (column, W, R)}
        for i in rows:
            columns = [t for t in range(t_max) if mask[i, t]]
            energy, track[i] = 0.0, {}
            for k, t in enumerate(columns):
                w = max(0.0, 1 - 2 * float(logp[i, t].double().exp()) + float(sum_p2[i, t]))
                energy += float(importance[i, t]) ** 2 * w
                to_go = sum(float(rewards[i, s]) for s in columns[k:])
                track[i][t if alignment == "column" else k] = (t, energy, to_go)
        ends = sorted(max(track[i]) + 1 for i in rows)
        second = ends[-2] if len(ends) > 1 else 0
        for i in rows:
            for position, (t, _, to_go) in track[i].items():
                there = [j for j in rows if position in track[j] and not (leave_one_out and j == i)]
                above = sum(track[j][position][1] * track[j][position][2] for j in there)
                below = sum(track[j][position][1] for j in there)
                alone = len(rows) == 1 or (tail == "zero_baseline" and position >= second)
                advantages[i, t] = to_go - (0.0 if alone else above / (below + 1e-8))
    return advantages


def batch(seed, gaps=True):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 7))
    lengths = torch.randint(0, t + 1, (b, 1), generator=generator)
    mask = torch.arange(t) < lengths
    if gaps:
        mask &= torch.rand(b, t, generator=generator) < 0.8
    logits = 2 * torch.randn(b, t, 6, generator=generator)
    p = logits.double().softmax(-1)
    tokens = torch.randint(6, (b, t, 1), generator=generator)
    data = {
        "token_rewards": torch.randn(b, t, generator=generator),
        "mask": mask,
        "logp": p.gather(-1, tokens).squeeze(-1).log().float(),
        "sum_p2": p.square().sum(-1).float(),
        "group_ids": 5 * torch.randint(-1, 2, (b,), generator=generator),
        "importance": 2 * torch.rand(b, t, generator=generator),
        "valid": torch.rand(b, generator=generator) < 0.85,
    }
    return data


@each_option
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_matches_the_definition(alignment, leave_one_out, tail, seed):
    data = batch(seed)
    options = {"alignment": alignment, "leave_one_out": leave_one_out, "tail": tail}
    truth = by_loops(data, **options)
    out = optimal_token_baseline(**data, **options)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)


@each_option
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.01, 100))
def test_order_padding_garbage_and_scale(alignment, leave_one_out, tail, seed, scale):
    data = batch(seed)
    data["token_rewards"] = data["token_rewards"].double()
    options = {"alignment": alignment, "leave_one_out": leave_one_out, "tail": tail}
    out = optimal_token_baseline(**data, **options)
    order = torch.randperm(len(out), generator=torch.Generator().manual_seed(seed))
    permuted = {name: x[order] for name, x in data.items()}
    torch.testing.assert_close(optimal_token_baseline(**permuted, **options), out[order])

    dirty = {}
    for name, x in data.items():
        if x.is_floating_point():
            x = torch.where(data["mask"] & data["valid"][:, None], x, float("nan"))
            x = torch.nn.functional.pad(x, (0, 2), value=float("nan"))
        elif x.ndim == 2:
            x = torch.nn.functional.pad(x, (0, 2), value=False)
        dirty[name] = x
    torch.testing.assert_close(optimal_token_baseline(**dirty, **options)[:, :-2], out)

    scaled = data | {"token_rewards": scale * data["token_rewards"]}
    torch.testing.assert_close(optimal_token_baseline(**scaled, **options), scale * out)


@each_option
def test_an_all_masked_rollout_changes_nothing(alignment, leave_one_out, tail):
    options = {"alignment": alignment, "leave_one_out": leave_one_out, "tail": tail}
    for seed in range(20):
        data = batch(seed)
        out = optimal_token_baseline(**data, **options)
        more = {name: torch.cat([x, x[:1]]) for name, x in data.items()}
        more["mask"][-1], more["valid"][-1] = False, True
        torch.testing.assert_close(optimal_token_baseline(**more, **options)[:-1], out)
        assert (optimal_token_baseline(**more, **options)[-1] == 0).all()


def test_unit_energy_and_equal_lengths_give_the_group_mean():
    # p(y) = 0.5, sum p^2 = 1 puts w = 1 at the first token and 0 after it, so W = 1 everywhere
    rewards = torch.zeros(4, 3, dtype=torch.float64)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    mask = torch.ones(4, 3, dtype=torch.bool)
    logp = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64).log().expand(4, 3)
    sum_p2 = torch.ones(4, 3, dtype=torch.float64)
    ids = torch.tensor([1, 1, 2, 1])
    out = optimal_token_baseline(rewards, mask, logp, sum_p2, ids)
    expected = torch.tensor([1 - 2 / 3, -2 / 3, 0.0, 1 - 2 / 3]).double()[:, None].expand(4, 3)
    torch.testing.assert_close(out, expected, atol=1e-7, rtol=0)


def test_gaps_do_not_matter_to_model_token_alignment():
    data = batch(7, gaps=False)
    generator = torch.Generator().manual_seed(7)
    b, t = data["mask"].shape
    spread = {n: x.clone() for n, x in data.items()}
    places = torch.rand(b, 2 * t, generator=generator).argsort(1)[:, :t].sort(1).values
    for name, x in data.items():
        if x.ndim == 2:
            spread[name] = x.new_zeros(b, 2 * t).scatter(1, places, x)
    plain = optimal_token_baseline(**data)
    assert (plain != 0).any()
    spread_out = optimal_token_baseline(**spread, alignment="model_token")
    torch.testing.assert_close(spread_out.gather(1, places), plain)


def test_the_tail_of_the_longest_rollout():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logp, sum_p2 = torch.full((2, 3), 0.5).log(), torch.full((2, 3), 0.5)
    args = (rewards, mask, logp, sum_p2, torch.zeros(2, dtype=torch.long))
    zero = optimal_token_baseline(*args)
    torch.testing.assert_close(zero[0], torch.tensor([0.0, 1.0, 1.0]), atol=1e-6, rtol=0)
    keep = optimal_token_baseline(*args, tail="keep")
    torch.testing.assert_close(keep[0], torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tail", ["zero_baseline", "keep"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_group_of_one_has_no_baseline(tail, leave_one_out):
    rewards = torch.tensor([[0.25, 0.0, 1.0]])
    stats = (torch.full((1, 3), -0.7), torch.full((1, 3), 0.4))
    mask = torch.ones(1, 3, dtype=torch.bool)
    ids = torch.tensor([9])
    out = optimal_token_baseline(rewards, mask, *stats, ids, tail=tail, leave_one_out=leave_one_out)
    assert torch.equal(out, torch.tensor([[1.25, 1.0, 1.0]]))


def test_leave_one_out_is_unbiased_by_enumeration():
    # Bigram policy over {end, a, b}, at most 3 tokens; all pairs of responses are enumerated.
    torch.manual_seed(0)
    table = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)  # row: previous token
    responses = [(0,)]
    responses += [(x, y) for x in (1, 2) for y in (0,)]
    responses += [(x, y, z) for x in (1, 2) for y in (1, 2) for z in (0, 1, 2)]
    n = len(responses)
    tokens, mask = torch.zeros(n, 3, dtype=torch.long), torch.zeros(n, 3, dtype=torch.bool)
    for i, response in enumerate(responses):
        tokens[i, : len(response)] = torch.tensor(response)
        mask[i, : len(response)] = True
    previous = torch.cat([torch.zeros(n, 1, dtype=torch.long), tokens[:, :-1]], 1)
    stats = response_statistics(table[previous], tokens, mask)
    last = mask.sum(1, keepdim=True) - 1
    outcomes = torch.randn(n, 1, dtype=torch.float64)
    rewards = torch.zeros(n, 3, dtype=torch.float64).scatter(1, last, outcomes)
    probability = stats.logp.sum(1).exp()
    torch.testing.assert_close(probability.sum(), torch.ones((), dtype=torch.float64))
    (truth,) = torch.autograd.grad((probability * rewards.sum(1)).sum(), table, retain_graph=True)

    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    chance = probability.detach()[pairs].prod(1)
    flat = pairs.flatten()
    ids = torch.arange(len(pairs)).repeat_interleave(2)

    def expected_gradient(**options):
        a = optimal_token_baseline(
            rewards[flat], mask[flat], stats.logp[flat], stats.sum_p2[flat], ids, **options
        )
        per_pair = (a * stats.logp[flat]).sum(1).view(-1, 2).mean(1)
        return torch.autograd.grad((chance * per_pair).sum(), table, retain_graph=True)[0]

    for alignment, tail in itertools.product(["column", "model_token"], ["zero_baseline", "keep"]):
        unbiased = expected_gradient(leave_one_out=True, alignment=alignment, tail=tail)
        torch.testing.assert_close(unbiased, truth)
    in_sample = expected_gradient()
    assert in_sample.norm() < 0.9 * truth.norm()  # it shrinks the expected gradient


def test_small_weights_survive_beside_a_large_one():
    # the first rollout's energy is 1e10 times the others'; its own baseline must still be theirs
    rewards = torch.tensor([[1.0], [0.25], [0.75]])
    importance = torch.tensor([[1e3], [1e-2], [1e-2]])
    ones = torch.ones(3, 1)
    out = optimal_token_baseline(
        rewards,
        ones.bool(),
        (0.5 * ones).log(),
        0.5 * ones,
        torch.zeros(3, dtype=torch.long),
        leave_one_out=True,
        importance=importance,
    )
    assert out[0, 0].item() == pytest.approx(1 - 0.5, abs=1e-3)


def test_the_proxy_is_the_squared_gradient_norm_and_never_negative():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 9, requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    stats = response_statistics(logits, torch.arange(4)[None], mask)
    w = logit_gradient_proxy(stats.logp, stats.sum_p2)
    assert not w.requires_grad
    (grad,) = torch.autograd.grad(stats.logp.sum(), logits)
    torch.testing.assert_close(w, grad.square().sum(-1))
    torch.testing.assert_close(w, stats.logit_grad_energy)
    assert logit_gradient_proxy(torch.tensor(0.0), torch.tensor(1 - 1e-6)).item() == 0


def test_variance_proxy():
    data = batch(3)
    a, mask = torch.randn(data["mask"].shape), data["mask"]
    w = logit_gradient_proxy(data["logp"].double(), data["sum_p2"].double())
    rows = [i for i in range(len(mask)) if mask[i].any()]
    power = [float(a[i, mask[i]].mean() ** 2 * w[i, mask[i]].sum()) for i in rows]
    inputs = [torch.where(mask, x, float("nan")) for x in (a, data["logp"], data["sum_p2"])]
    metrics = gradient_variance_proxy(*inputs, mask, grad_norm=0.5)
    assert metrics["variance/total_power"].item() == pytest.approx(sum(power) / len(rows), rel=1e-4)
    assert metrics["variance/mean_energy"].item() == pytest.approx(w[mask].mean().item(), rel=1e-4)
    assert metrics["variance/signal"].item() == 0.25
    assert gradient_variance_proxy(*inputs, torch.zeros_like(mask)) == {}


def test_bad_inputs_are_named():
    data = batch(3)
    i, t = data["mask"].logical_and(data["valid"][:, None]).nonzero()[0].tolist()
    for name in ("token_rewards", "logp", "sum_p2", "importance"):
        bad = data | {name: data[name].clone()}
        bad[name][i, t] = float("nan")
        with pytest.raises(ValueError, match=rf"{name}.*nan at \({i}, {t}\)"):
            optimal_token_baseline(**bad)
    with pytest.raises(ValueError, match="alignment"):
        optimal_token_baseline(**data, alignment="row")
    with pytest.raises(ValueError, match="tail"):
        optimal_token_baseline(**data, tail="zero")
    with pytest.raises(ValueError, match="sum_p2"):
        logit_gradient_proxy(torch.zeros(2), torch.zeros(3))


def test_the_proxy_stays_below_its_bound():
    """sum_p2 that rounding or another engine made too large: (1 - p)^2 bounds the others."""
    lp = torch.tensor([-0.5, -1e-6])
    p = lp.exp()
    assert (logit_gradient_proxy(lp, torch.ones(2)) <= 2 * (1 - p).square() * (1 + 1e-5)).all()


# Edits to stability/token_baseline.py that must turn this file red:
#   importance.double().square()  ->  importance.double()
#   .cumsum(1) of the energy      ->  no cumsum
#   alive.flatten()[slot] <= 1    ->  <= 0                     (the tail keeps its own baseline)
#   own_index if alignment == "model_token" else columns...    ->  columns always
#   .double() -> .float() everywhere                           (leave-one-out by subtraction)
