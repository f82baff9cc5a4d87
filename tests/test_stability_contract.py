"""What every function of the pack promises, whatever it computes (tests/stability_cases.py)."""

from pathlib import Path

import pytest
import stability_cases as cases
import torch
import workers
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks

from trimtab import stability

each = pytest.mark.parametrize("name", cases.CASES)
seeds = given(seed=st.integers(0, 2**20))
quick = settings(deadline=None, max_examples=8)


def run(name, p):
    return {key: x.double() for key, x in cases.CASES[name](p, None).items()}


def assert_same(found, expected, rows=None, **tolerance):
    """Equal outputs; `rows` of the expected ones where an output has one entry a row."""
    assert found.keys() == expected.keys()
    for key, x in found.items():
        want = expected[key]
        if key == "row" and rows is not None:
            want = want[rows]
        torch.testing.assert_close(x, want, **({"rtol": 1e-9, "atol": 1e-10} | tolerance), msg=key)


@each
@quick
@seeds
def test_the_order_of_rows_does_not_matter(name, seed):
    p = cases.problem(seed)
    order = torch.randperm(len(p["mask"]), generator=torch.Generator().manual_seed(seed))
    assert_same(run(name, cases.rows_of(p, order)), run(name, p), rows=order)


@each
@quick
@seeds
def test_padding_gaps_and_garbage_do_not_matter(name, seed):
    p = cases.problem(seed)
    t = p["mask"].shape[1]
    expected = run(name, p)
    columns = [0, seed % t, t]  # in front, somewhere (a tool's tokens in every row), behind
    wide = cases.padded(p, columns)
    found = run(name, cases.dirty(wide))
    if found.get("row", torch.zeros(0)).ndim == 2:
        real = [c + sum(x <= c for x in columns) for c in range(t)]
        others = [c for c in range(t + len(columns)) if c not in real]
        assert (found["row"][:, others] == 0).all()
        found["row"] = found["row"][:, real]
    assert_same(found, expected)


OF_THE_BATCH = ("grpo batch", "reinforce_pp", "reinforce_pp baseline")  # scaled by all of it


@pytest.mark.parametrize(
    "name",
    [n for n in (*cases.ADVANTAGES, *cases.MASKS, *cases.LOSSES) if n not in OF_THE_BATCH],
)
@quick
@seeds
def test_rows_of_other_groups_do_not_matter(name, seed):
    p = cases.problem(seed)
    rows = (p["ids"] == p["ids"][-1]).nonzero().flatten()
    found, expected = run(name, cases.rows_of(p, rows)), run(name, p)
    assert_same({"row": found["row"]}, {"row": expected["row"]}, rows=rows)


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "opo", "remax", "tree", "tree sizes", "otb"])
@quick
@seeds
def test_advantages_scale_with_the_rewards_and_do_not_see_a_shift(name, seed):
    p = cases.problem(seed)
    expected = run(name, p)["row"]
    for key in ("rewards", "token_rewards"):
        p[key] = 3 * p[key] + (5 if key == "rewards" else 0)
    torch.testing.assert_close(run(name, p)["row"], 3 * expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "grpo batch", "reinforce_pp", "reinforce_pp baseline"])
@quick
@seeds
def test_normalised_advantages_do_not_see_the_scale_of_rewards(name, seed):
    p = cases.problem(seed)
    expected = run(name, p)["row"]
    for key in ("rewards", "token_rewards"):
        p[key] = 100 * p[key]
    torch.testing.assert_close(run(name, p)["row"], expected, rtol=1e-3, atol=1e-3)  # the epsilons


def extremes():
    """Log-ratios of +-1e4, a group of one, rows without and with one token; fp32."""
    p = cases.problem(0, rows=8, width=4)
    p["mask"] = torch.tensor([[0] * 4, [1, 0, 0, 0], *[[1] * 4] * 6], dtype=torch.bool)
    p["logp"][3], p["old"][4], p["logp"][5, ::2], p["old"][5, 1::2] = -1e4, -1e4, -1e4, -1e4
    p["logp"][6], p["sum_p2"][6] = 0, 1  # certain of its tokens
    return {k: x.float() if x.is_floating_point() else x for k, x in p.items()}


@each
def test_extreme_inputs_give_finite_numbers(name):
    for key, x in run(name, extremes()).items():
        assert x.isfinite().all(), f"{key}: {x}"


@each
def test_a_batch_without_a_token_gives_zeros_and_no_token_metrics(name):
    p = extremes()
    p["mask"] = torch.zeros_like(p["mask"])
    found = run(name, p)
    assert all(x.isfinite().all() for x in found.values())
    if name in cases.METRICS and name != "groups":
        assert not found
    row = found.get("row")
    if row is not None and row.ndim == 2:
        assert (row == 0).all()


@pytest.mark.parametrize("name", cases.LOSSES)
def test_extreme_inputs_give_finite_gradients(name):
    p = extremes()
    leaves = {key: p[key].requires_grad_() for key in ("logp", "kl", "value")}
    dirty = cases.dirty(p)
    loss = cases.CASES[name](dirty, None)["row"]
    loss.sum().backward()
    for key, x in leaves.items():
        if x.grad is not None:
            assert x.grad.isfinite().all(), key
            if x.grad.ndim == 2:
                assert (x.grad[~p["mask"]] == 0).all(), key


@each
def test_what_is_not_finite_where_it_counts_is_refused(name):
    p = cases.problem(3)
    b, t = p["mask"].nonzero()[-1].tolist()
    refused = 0
    for key, x in p.items():
        if not x.is_floating_point():
            continue
        broken = dict(p)
        broken[key] = x.clone()
        broken[key][(b, t) if x.ndim == 2 else b] = float("nan")
        try:
            found = cases.CASES[name](broken, None)
        except ValueError as error:
            assert "finite" in str(error)
            refused += 1
        else:
            assert all(torch.as_tensor(y).isfinite().all() for y in found.values()), key
    if name != "out of set":  # whose input is bool
        assert refused


def test_two_processes_get_what_one_gets(tmp_path):
    """Groups straddle the ranks, which hold unequal numbers of rows and of columns, one none.

    And what one rank refuses the other does not wait for.
    """
    run_ranks(workers.stability_over_ranks, (2, str(tmp_path)), 2)
    for rank in range(2):
        refused = torch.load(tmp_path / f"refused_{rank}.pt")
        assert set(refused.values()) == {True}, [n for n, yes in refused.items() if not yes]
        assert refused
        assert "same optional arguments" in (tmp_path / f"unlike_{rank}").read_text()
    p = cases.problem(0)
    rows = workers.stability_rows(p, 0)
    for name in cases.CASES:
        if name in cases.MASKS or name == "aggregation by the sign of advantages":
            continue  # at a threshold fp32 may decide otherwise
        for rank in range(2):
            mixed = torch.load(tmp_path / f"mixed_{rank}.pt")[name]
            assert_same(mixed, run(name, p), rows=rows[rank], rtol=1e-3, atol=1e-4)
    for seed in range(4):
        p = cases.problem(seed)
        rows = workers.stability_rows(p, seed)
        results = [torch.load(tmp_path / f"{seed}_{rank}.pt") for rank in range(2)]
        for name in cases.CASES:
            expected = run(name, p)
            for rank in range(2):
                assert_same(results[rank][name], expected, rows=rows[rank])


def test_the_cases_are_all_there_are():
    """A new function of the pack joins the contract, or says here why it has none."""
    elsewhere = {
        "DEFAULT_RHO", "PrunedStatistics", "Reading", "MismatchReport", "overall",  # no functions
        "ClipEntropyMonitor", "GradientNormMonitor", "MismatchMonitor", "SignLengthMonitor",
        "VarianceMonitor",  # test_monitors.py
        "HOST_NAMES", "StabilityWatch", "Verdict",  # test_watch.py
        "apply_weights", "broadcast_advantages", "logit_gradient_proxy", "trust_region_bounds",
        "linear_response_statistics", "response_statistics", "pruned_statistics",
        "replayed_statistics", "pad_support", "pruning_metrics",  # their inputs are logits
        "pack_padded", "pad_packed", "sign_length_coupling",
    }  # fmt: skip
    text = Path(cases.__file__).read_text()
    missing = [n for n in stability.__all__ if f"s.{n}" not in text and n not in elsewhere]
    assert missing == []


# Edits that must turn this file red:
#   stability/statistics.py, segment_sum: return sums without `total`        (ranks)
#   stability/statistics.py, reward_to_go: drop the outer masked             (gaps)
#   stability/token_baseline.py: width = mask.shape[1]                       (ranks of other widths)
#   stability/losses.py, dppo_kl: rest_q > 0 -> rest_q >= 0                  (certain tokens)
#   stability/_numerics.py, ratio: drop the clamp                            (extremes)
