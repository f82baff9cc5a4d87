import itertools
import json
import math

import pytest
import torch
import workers
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from tiny_models import causal_lm

from trimtab.rl import (
    Request,
    Sampling,
    SuccessRates,
    TransformersEngine,
    allocate_budget,
    allocation_value,
    budget_metrics,
    with_greedy_extras,
)
from trimtab.stability import remax_advantages

NAN = math.nan


def best_value(rates, budget, low, high):
    """The largest value any allocation reaches, by dynamic programming over prompts."""
    best = {0: 0.0}
    for p in rates:
        worth = [(1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2 for n in range(high + 1)]
        reached = {}
        for (spent, value), n in itertools.product(best.items(), range(low, high + 1)):
            total = spent + n
            if total <= budget:
                reached[total] = max(reached.get(total, -math.inf), value + worth[n])
        best = reached
    return best[budget]


@settings(deadline=None, max_examples=60)
@given(
    rates=st.lists(
        st.sampled_from([0.0, 0.03, 0.125, 0.3, 0.5, 0.8, 0.97, 1.0]), min_size=1, max_size=5
    ),
    low=st.integers(1, 3),
    span=st.integers(0, 6),
    share=st.floats(0, 1),
)
def test_the_allocation_is_optimal_and_exact(rates, low, span, share):
    high = low + span
    budget = len(rates) * low + round(share * len(rates) * span)
    rates = torch.tensor(rates, dtype=torch.float64)
    counts = allocate_budget(rates, budget, low=low, high=high)
    assert counts.dtype == torch.int64 and counts.sum() == budget
    assert ((counts >= low) & (counts <= high)).all()
    best = best_value(rates.tolist(), budget, low, high)
    assert allocation_value(rates, counts).item() == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_rollouts_go_where_they_teach():
    rates = torch.tensor([0.0, 0.05, 0.3, 0.95, 1.0])
    counts = allocate_budget(rates, 40, low=2, high=32).tolist()
    assert counts[0] == counts[4] == 2  # no value
    assert counts[3] == 2  # little: (1 - p)^2 says that the prompt is learnt
    assert counts[1] > counts[2] > 2  # a rare success needs more tries to be mixed
    uniform = torch.full((5,), 8)
    assert allocation_value(rates, torch.tensor(counts)) > allocation_value(rates, uniform)


def test_unseen_prompts_get_the_uniform_share():
    counts = allocate_budget(torch.tensor([NAN, 0.5, 1.0, NAN]), 41, low=2, high=30)
    assert counts.tolist() == [10, 19, 2, 10]
    assert allocate_budget(torch.full((3,), NAN), 10, low=1, high=9).tolist() == [4, 3, 3]


def test_the_surplus_goes_to_prompts_that_never_succeeded():
    counts = allocate_budget(torch.tensor([0.0, 0.5, 1.0, 0.0]), 21, low=2, high=6)
    assert counts.tolist() == [6, 6, 3, 6]
    assert allocate_budget(torch.zeros(3), 8, low=2, high=4).tolist() == [3, 3, 2]
    assert allocate_budget(torch.ones(2), 5, low=2, high=4).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("rates", "budget", "bounds", "message"),
    [
        ([0.5, 0.5], 3, {"low": 2}, r"budget in \[4, 256\] for 2 prompts with 2 to 128.*got 3"),
        ([0.5, 0.5], 9, {"high": 4}, r"budget in \[4, 8\]"),
        ([0.5], 4, {"low": 0}, "1 <= low <= high"),
        ([0.5], 4, {"low": 5, "high": 4}, "1 <= low <= high"),
        ([1.5], 4, {}, r"success_rates in \[0, 1\] or NaN"),
        ([[0.5]], 4, {}, r"success_rates \[M\]"),
        ([], 4, {}, r"budget in \[0, 0\]"),
    ],
)
def test_impossible_requests_are_refused(rates, budget, bounds, message):
    with pytest.raises(ValueError, match=message):
        allocate_budget(torch.tensor(rates), budget, **bounds)


def test_success_rates_are_those_of_the_latest_group():
    store = SuccessRates()
    assert store.rates(["a"]).isnan().all()
    rewards = torch.tensor([1.0, 0.0, 0.4, NAN, 1.0])
    valid = torch.tensor([True, True, True, False, True])
    store.observe(["a", "b", "a", "b", "a"], rewards, valid=valid)
    torch.testing.assert_close(
        store.rates(["b", "a", "c"]), torch.tensor([0, 2 / 3, NAN]).double(), equal_nan=True
    )
    store.observe(["a", "a"], torch.tensor([0.0, 1.0]))
    assert store.rates(["a"]).item() == 0.5 and len(store) == 2


def test_decay_smoothing_and_threshold():
    store = SuccessRates(decay=0.5, smoothing=True, threshold=0.9)
    store.observe([7] * 4, torch.tensor([1.0, 0.9, 1.0, 0.0]))
    assert store.rates([7]).item() == pytest.approx((2 + 0.5) / (4 + 1))
    store.observe([7] * 2, torch.tensor([1.0, 1.0]))
    assert store.rates([7]).item() == pytest.approx((1 + 2 + 0.5) / (2 + 2 + 1))


def test_a_resumed_store_goes_on(tmp_path):
    store = SuccessRates(decay=0.9)
    store.observe(["x", "y", "x"], torch.tensor([1.0, 0.0, 0.0]))
    torch.save(store.state_dict(), tmp_path / "state.pt")
    other = SuccessRates(decay=0.9)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (store, other):
        each.observe(["x"], torch.tensor([1.0]))
    assert torch.equal(store.rates(["x", "y"]), other.rates(["x", "y"]))
    for state in ({}, {"prompts": [["x", 3.0, 2.0]]}, {"prompts": [["x", 0.0, 0.0]]}):
        with pytest.raises(ValueError, match="expected"):
            other.load_state_dict(state)
    assert torch.equal(store.rates(["x", "y"]), other.rates(["x", "y"]))


def test_every_rank_holds_the_rates_of_all(tmp_path):
    run_ranks(workers.success_rates_over_ranks, (2, str(tmp_path)), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for rank in range(2):
        assert "finite rewards" in (tmp_path / f"refused_{rank}").read_text()
    assert first == second == {"prompts": [["a", 2.0, 3.0], ["c", 1.0, 1.0], ["b", 0.0, 1.0]]}


def test_ids_survive_json_and_tensors_are_no_ids():
    store = SuccessRates()
    store.observe([1, "1"], torch.tensor([1.0, 0.0]))
    other = SuccessRates()
    other.load_state_dict(json.loads(json.dumps(store.state_dict())))
    assert other.rates([1, "1"]).tolist() == [1.0, 0.0]
    ids = torch.tensor([1, 2])
    for call in (lambda: store.observe(ids, torch.ones(2)), lambda: store.rates(ids)):
        with pytest.raises(ValueError, match=r"prompt_ids of str or int.*Tensor"):
            call()


def test_gains_too_small_for_a_float_are_still_compared():
    counts = allocate_budget(torch.full((3,), 0.5), 4500, low=2, high=4000)
    assert counts.tolist() == [1500, 1500, 1500]


def test_bad_observations_change_nothing():
    store = SuccessRates()
    store.observe(["a"], torch.ones(1))
    for prompts, rewards, valid in (
        (["a"], torch.ones(2), None),
        (["a"], torch.tensor([NAN]), None),
        (["a"], torch.ones(1), torch.ones(1)),
    ):
        with pytest.raises(ValueError, match="expected"):
            store.observe(prompts, rewards, valid=valid)
    assert store.state_dict() == {"prompts": [["a", 1.0, 1.0]]}
    with pytest.raises(ValueError, match="decay"):
        SuccessRates(decay=1.0)
    with pytest.raises(ValueError, match="threshold"):
        SuccessRates(threshold=NAN)


def test_metrics_by_difficulty():
    rates = torch.tensor([0.0, 0.1, 0.5, 0.5, 1.0, NAN])
    counts = torch.tensor([2, 8, 4, 6, 2, 5])
    found = {k.removeprefix("budget/"): v.item() for k, v in budget_metrics(rates, counts).items()}
    mixed = [0, 1 - 0.1**8 - 0.9**8, 1 - 2 * 0.5**4, 1 - 2 * 0.5**6, 0]
    assert found == pytest.approx(
        {
            "rollouts_unseen": 5,
            "rollouts_0": 2,
            "rollouts_1": 2,
            "rollouts_0_0.25": 8,
            "rollouts_0.5_0.75": 5,
            "mixed_expected": sum(mixed) / 5,
        },
        rel=1e-6,
    )
    with pytest.raises(ValueError, match=r"counts \[M\]"):
        budget_metrics(rates, counts[1:])


def test_greedy_extras_ride_in_one_batch_and_never_touch_the_sampled_rows():
    model = causal_lm()
    engine = TransformersEngine(model, dtype=torch.float32)
    sampling = Sampling(n=3, max_tokens=6, temperature=0.8, top_k=5, stop_token_ids=(1,))
    requests = [Request([2, 3, 4], sampling), Request([5], sampling, {"id": "b"})]
    plain = engine.generate(requests)
    mixed = with_greedy_extras(requests)
    assert [r.sampling.temperature for r in mixed] == [0.8, 0.0, 0.8, 0.0]
    assert [r.sampling.n for r in mixed] == [3, 1, 3, 1] and mixed[3].meta == {
        "id": "b",
        "greedy": True,
    }
    assert mixed[1].sampling.stop_token_ids == (1,) and mixed[1].sampling.max_tokens == 6
    samples = engine.generate(mixed)
    tokens = lambda groups: [[s.token_ids for s in group] for group in groups]
    assert tokens(samples[::2]) == tokens(plain)
    alone = engine.generate([r for r in mixed if r.sampling.temperature == 0])
    assert tokens(samples[1::2]) == tokens(alone)
    for mine, other in zip(samples[1] + samples[3], alone[0] + alone[1], strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5)

    # on to the advantages: reward = length
    rows = [(i // 2, i % 2 == 1, s) for i, group in enumerate(samples) for s in group]
    rewards = torch.tensor([float(len(s.token_ids)) for *_, s in rows])
    greedy = torch.tensor([g for _, g, _ in rows])
    advantages, _ = remax_advantages(rewards, torch.tensor([p for p, *_ in rows]), greedy)
    for (p, is_greedy, _), reward, advantage in zip(rows, rewards, advantages, strict=True):
        want = 0 if is_greedy else reward - len(alone[p][0].token_ids)
        assert advantage == want
    with pytest.raises(ValueError, match=r"requests\[0\]: expected temperature > 0"):
        with_greedy_extras([Request([1], Sampling(temperature=0.0))])


# Edits to rl/budget.py that must turn this file red:
#   heapq.heappush(heap, (-_log_gain(rates[i], counts[i]), i))  ->  with _log_gain(rates[i], low)
#   a + 2 * b + high  ->  high                       in _log_gain
#   for rows in (hopeful, others)  ->  (others, hopeful)
#   self.decay * before[1]  ->  before[1]
#   counts: reward > self.threshold  ->  >=
