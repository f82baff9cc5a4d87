"""Two gloo processes with groups of their own take the gradient of one process."""

import pytest
import torch
from prefix_cases import dense_gradient, relative_l2
from prefix_cases import model_of as architecture
from prefix_workers import groups_of, model_of, no_prefix_on_rank_1, run
from processes import run_ranks
from tiny_models import causal_lm

from trimtab.rl.prefix import SharedPrefix

MEMORY = ["keep", "recompute", "offload"]
CASES = [("ddp", m) for m in MEMORY]
CASES += [("fsdp2", m, checkpointing) for m in MEMORY[:2] for checkpointing in (False, True)]
CASES += [("fsdp2", x) for x in ("joint", "joint, dense", "dense", "after an error")]
CASES += [("fsdp2", x) for x in ("root alone", "root alone, keep", "whole after forward")]
CASES += [("fsdp2", x) for x in ("whole after forward, keep", "hybrid")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    run_ranks(run, (2, str(folder)), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def truth():
    """Mean over the ranks of each rank's sum, trajectory by trajectory in one process."""
    groups = [group for rank in range(2) for group in groups_of(rank) if group is not None]
    return sum(dense_gradient(model_of(), *group)[1] for group in groups) / 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradient_is_that_of_one_process(ranks, truth, case):
    assert torch.equal(ranks[0][case], ranks[1][case]), "ranks disagree"
    assert relative_l2(ranks[0][case], truth) < 1e-12


@pytest.mark.parametrize("how", ["no prefix", "no prefix, keep", "no prefix, dense"])
def test_a_prompt_of_one_token_on_one_rank(ranks, how):
    groups = [no_prefix_on_rank_1(rank) for rank in range(2)]
    truth = sum(dense_gradient(model_of(), *group)[1] for group in groups) / 2
    for rank, found in enumerate(ranks):
        assert relative_l2(found["fsdp2", how], truth) < 1e-12
        prompt, responses, _ = groups[rank]
        expected = log_probabilities(prompt, responses)
        torch.testing.assert_close(found["logp", how], expected, atol=1e-12, rtol=0)


def test_router_loss_of_a_prompt_of_one_token_on_one_rank(ranks):
    """What that rank computes beside the others' prefix is in no trajectory."""
    for rank, found in enumerate(ranks):
        prompt, responses, _ = no_prefix_on_rank_1(rank)
        step = SharedPrefix(architecture("qwen3_moe"), min_bound=1e9, router_loss=True)
        with torch.no_grad(), step.group(prompt) as g:
            dense = g.statistics(responses).router_loss
        torch.testing.assert_close(found["router loss, no prefix"], dense, atol=1e-6, rtol=0)


def test_a_rank_that_is_idle_first_and_gradients_that_cancel(ranks):
    for found in ranks:
        assert found["idle first"] > 0
        assert found["cancelled"] < 1e-12


def test_replicas_are_those_of_ddp(ranks):
    for rank, found in enumerate(ranks):
        own = [group for group in groups_of(rank) if group is not None]
        truth = sum(dense_gradient(model_of(), *group)[1] for group in own)
        assert relative_l2(found["own replicas"], truth) < 1e-12


def log_probabilities(prompt, responses):
    """[G, T], 0 at padding."""
    model = model_of()
    found = torch.zeros(len(responses), max(map(len, responses)), dtype=torch.float64)
    for row, response in enumerate(responses):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        found[row, : len(response)] = logp.detach()
    return found


def test_the_route_is_the_same_on_all_ranks(ranks):
    assert [found["route"] for found in ranks] == [0.0, 0.0]


def test_mixed_precision_of_fsdp2_is_verified_as_bf16(ranks):
    """Its parameters are fp32 for all but the model. The bound is of a rank's own FLOPs."""
    step = SharedPrefix(causal_lm("llama_gqa", num_hidden_layers=6), min_bound=0, verify="never")
    with step.group(range(60)) as g:
        g.accumulate([list(range(20))] * 8, lambda out, _: out.logp.sum())
    bound = step.metrics()["prefix/bound"]
    for found in ranks:
        assert found["mixed"] == (True, pytest.approx(bound))


def test_log_probabilities_of_a_sharded_model(ranks):
    for rank, found in enumerate(ranks):
        prompt, responses, _ = groups_of(rank)[0]
        expected = log_probabilities(prompt, responses)
        torch.testing.assert_close(found["logp"], expected, atol=1e-12, rtol=0)


def test_an_error_leaves_no_gradient(ranks):
    for found in ranks:
        assert found["grads after an error"] == [None] * len(found["grads after an error"])


def test_what_a_sharded_model_cannot_do_is_refused(ranks):
    for found in ranks:
        assert "branches are not supported under FSDP2" in found["branch"]
        assert "prefix_memory: expected keep or recompute under FSDP2" in found["offload"]
        assert "got a DTensor (FSDP2 shards them)" in found["fused"]


# Edits that must turn this file red:
#   prefix_parallel.py: synchronize does nothing   (each wave is reduced, and phase C again)
#   prefix_parallel.py: most returns its count     (hangs: ranks with fewer waves do not take part)
#   prefix.py: _finish without take_part           (dense route: the waves' sums stay on the ranks)
#   sharding.py: all_reduce_gradients without the division
