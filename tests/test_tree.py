"""Trees of rollouts: what they share, and that every token is the model's own."""

import pytest
import torch
from tiny_models import causal_lm

from trimtab.rl import Request, Sampling, TransformersEngine, Tree
from trimtab.rl import tree as tree_module

PROMPTS = [[3, 5, 7, 11], [4, 6, 9, 2, 8, 1, 3], [13]]


def engine_of(kind="llama", **options):
    return TransformersEngine(causal_lm(kind), dtype=torch.float32, **options)


def asked(n=12, prompts=PROMPTS, **options):
    options = {"max_tokens": 20, "stop_token_ids": (0, 1, 2)} | options
    shape = Tree(**{"segment": 4, "branches": 2} | options.pop("tree", {}))
    return [
        Request(prompt, Sampling(n=n, seed=i, tree=shape, **options))
        for i, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def dense_logprobs(model, prompt, ids, temperature=1.0):
    logits = model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("stops", [(), (0, 1, 2, 3, 4, 5)])
def test_each_path_has_the_log_probs_of_the_model_on_it_alone(kind, stops):
    model = causal_lm(kind)
    requests = asked(stop_token_ids=stops, temperature=0.7)
    groups = TransformersEngine(model, dtype=torch.float32).generate(requests)
    for request, group in zip(requests, groups, strict=True):
        assert len(group) == 12
        for sample in group:
            expected = dense_logprobs(model, list(request.prompt_ids), sample.token_ids, 0.7)
            assert torch.tensor(sample.logprobs).allclose(expected, atol=2e-5)
            stopped = sample.token_ids[-1] in stops
            assert sample.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(sample.token_ids) == 20
            assert not set(sample.token_ids[:-1]) & set(stops)


def segments_of(sample, size):
    return [tuple(sample.token_ids[i : i + size]) for i in range(0, len(sample.token_ids), size)]


def test_paths_share_what_they_say_and_branch_no_more_than_they_may():
    for group in engine_of().generate(asked(n=16, stop_token_ids=(0, 1, 2, 3, 4, 5))):
        decoded = {}
        for sample in group:
            segments = segments_of(sample, 4)
            assert len(sample.path) == len(segments)
            for depth, owner in enumerate(sample.path):
                known = decoded.setdefault((owner, depth), tuple(segments[: depth + 1]))
                assert known == tuple(segments[: depth + 1]), "one owner, one segment"
        owners = {sample.path for sample in group}
        assert len(owners) == 16, "no two rollouts are one path"


def test_without_an_end_the_tree_doubles_at_each_boundary():
    [group] = engine_of().generate(asked(n=16, prompts=PROMPTS[:1], stop_token_ids=()))
    for depth, count in enumerate((2, 4, 8, 16, 16)):
        assert len({sample.path[: depth + 1] for sample in group}) == count


def test_every_token_is_decoded_once(monkeypatch):
    pools = []

    class Watched(tree_module._TreeCache):
        def __init__(self, lengths):
            super().__init__(lengths)
            pools.append(self)

    monkeypatch.setattr(tree_module, "_TreeCache", Watched)
    [group] = engine_of().generate(asked(n=16, prompts=PROMPTS[:1], stop_token_ids=()))
    assert pools[0].used == 4 * (2 + 4 + 8 + 16 + 16)
    assert sum(len(sample.token_ids) for sample in group) == 16 * 20


def test_when_all_paths_have_ended_others_start_at_an_earlier_boundary():
    stops = tuple(range(0, 24))  # most tokens: paths end within a segment or two
    [group] = engine_of().generate(asked(n=24, prompts=PROMPTS[:1], stop_token_ids=stops))
    assert len(group) == 24 and all(s.finish_reason == "stop" for s in group[:4])
    first = {sample.path[0] for sample in group}
    assert len(first) > 2, "some went back to the prompt"


def test_one_long_segment_is_independent_sampling():
    engine = engine_of()
    tree = engine.generate(asked(n=8, tree={"segment": 20, "branches": 8}))
    plain = engine.generate(
        [
            Request(p, Sampling(n=8, seed=i, max_tokens=20, stop_token_ids=(0, 1, 2)))
            for i, p in enumerate(PROMPTS)
        ]
    )
    for of_tree, of_plain in zip(tree, plain, strict=True):
        assert [s.token_ids for s in of_tree] == [s.token_ids for s in of_plain]


def test_a_tree_depends_on_its_own_seed_alone():
    engine = engine_of()
    together = engine.generate(asked())
    for i, request in enumerate(asked()):
        [alone] = engine.generate([request])
        assert [s.token_ids for s in alone] == [s.token_ids for s in together[i]]
        assert [s.path for s in alone] == [s.path for s in together[i]]


def test_greedy_requests_stand_beside_trees():
    engine = engine_of()
    greedy = Request(PROMPTS[0], Sampling(temperature=0.0, max_tokens=20, stop_token_ids=(0, 1, 2)))
    requests = asked()
    mixed = engine.generate([requests[0], greedy, *requests[1:]])
    assert [len(group) for group in mixed] == [12, 1, 12, 12]
    assert mixed[1] == engine.generate([greedy])[0] and mixed[1][0].path == ()


def test_a_path_that_repeats_itself_ends_as_one_that_was_cut():
    # the random model's most probable tokens soon come several times in a row
    options = {"n": 2, "prompts": PROMPTS[:1], "stop_token_ids": (), "top_k": 1, "max_tokens": 100}
    [free] = engine_of().generate(asked(**options, tree={"segment": 1}))
    assert {len(s.token_ids) for s in free} == {100}
    [group] = engine_of().generate(asked(**options, tree={"segment": 1, "repeats": 3}))
    for sample, longer in zip(group, free, strict=True):
        ids = sample.token_ids
        assert ids == longer.token_ids[: len(ids)] and sample.finish_reason == "length"
        assert len(ids) < 100 and len(set(ids[-3:])) == 1, "ends with the third in a row"
        assert all(len(set(ids[i : i + 3])) > 1 for i in range(len(ids) - 3)), "the first such"


@pytest.mark.parametrize(
    ("name", "value"), [("segment", 0), ("branches", 1), ("repeats", 1), ("repeats", -1)]
)
def test_shapes_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"tree.{name}: expected .*, got {value}"):
        Tree(**{name: value})


# Edits that must turn this file red:
# - rl/tree.py: branch copies one place too few; owners of the parent for the new segment;
#   fall back to the end of the path; `uniforms` of the parent; no branch limit
# - rl/group_cache.py: own_padding not added; the prefix of another prompt
