import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.optim import AdamMini, from_adamw_state, from_authors_state, to_adamw_state

SETTINGS = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model, optimizers, steps, seed=0):
    """Gives every optimizer's parameters the same random gradients, then steps it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    param.grad = model.get_parameter(name).grad
            optimizer.step()


def over_copy(model, make):
    return make(copy.deepcopy(model))


@pytest.mark.parametrize("preset", ["rows", "paper", "snr"])
@pytest.mark.parametrize("named", [True, False])
def test_adamw_state_becomes_what_adam_mini_would_have_kept(model, preset, named):
    adamw = torch.optim.AdamW(model.named_parameters(), **SETTINGS)
    ours = over_copy(model, lambda m: AdamMini.for_model(m, preset=preset, **SETTINGS))
    train(model, [adamw, ours], steps=5)
    state_dict = copy.deepcopy(adamw.state_dict())
    names = None
    if not named:  # as AdamW(model.parameters()) saves it
        names = state_dict["param_groups"][0].pop("param_names")
    fresh = over_copy(model, lambda m: AdamMini.for_model(m, preset=preset, **SETTINGS))
    fresh.load_state_dict(from_adamw_state(fresh, state_dict, names=names))
    for a, b in zip(fresh.param_groups, ours.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            # The same gradients went to both; moments do not depend on the parameters.
            torch.testing.assert_close(
                fresh.state[p]["exp_avg_sq"], ours.state[q]["exp_avg_sq"], rtol=1e-6, atol=0
            )
            torch.testing.assert_close(fresh.state[p]["exp_avg"], ours.state[q]["exp_avg"])
            assert fresh.state[p]["step"] == ours.state[q]["step"] == 5
    train(model, [fresh], steps=1, seed=1)  # goes on
    assert fresh.state[fresh.param_groups[0]["params"][0]]["step"] == 6


def test_the_schedule_goes_on(model):
    """A recursive scheduler multiplies the rate that the group has: it must be the old one."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    adamw = torch.optim.AdamW(model.named_parameters(), **SETTINGS)
    schedule = cosine(adamw, 20)
    for _ in range(12):
        train(model, [adamw], steps=1)
        schedule.step()
    saved = copy.deepcopy((adamw.state_dict(), schedule.state_dict()))
    ours = over_copy(model, lambda m: AdamMini.for_model(m, **SETTINGS))
    next_schedule = cosine(ours, 20)
    next_schedule.load_state_dict(saved[1])
    ours.load_state_dict(from_adamw_state(ours, saved[0]))
    for _ in range(5):
        rates = [group["lr"] for group in ours.param_groups]
        assert rates == pytest.approx([adamw.param_groups[0]["lr"]] * 2)
        for optimizer, scheduler in ((adamw, schedule), (ours, next_schedule)):
            optimizer.step()
            scheduler.step()


def test_rates_that_one_group_cannot_have_are_refused():
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))
    adamw = torch.optim.AdamW([{"params": [a], "lr": 1e-2}, {"params": [b], "lr": 1e-3}])
    a.grad, b.grad = torch.randn(4, 3), torch.randn(5)
    adamw.step()
    with pytest.raises(ValueError, match=r"one lr each, found \[0.001, 0.01\] in one group"):
        from_adamw_state(AdamMini([a, b]), adamw.state_dict())
    ours = AdamMini([{"params": [a]}, {"params": [b]}], lr=torch.tensor(1.0))
    ours.load_state_dict(from_adamw_state(ours, adamw.state_dict()))
    assert [float(group["lr"]) for group in ours.param_groups] == pytest.approx([1e-2, 1e-3])
    assert all(isinstance(group["lr"], torch.Tensor) for group in ours.param_groups)


def test_positions_match_where_nobody_has_names():
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))
    adamw = torch.optim.AdamW([a, b])
    a.grad, b.grad = torch.randn(4, 3), torch.randn(5)
    adamw.step()
    ours = AdamMini([{"params": [a]}, {"params": [b]}])  # other groups, the same order
    ours.load_state_dict(from_adamw_state(ours, adamw.state_dict()))
    torch.testing.assert_close(ours.state[a]["exp_avg_sq"], a.grad.square().mean(1) * 1e-3)
    torch.testing.assert_close(ours.state[b]["exp_avg_sq"], b.grad.square() * 1e-3)


def test_parameters_without_state_stay_without():
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))
    adamw = torch.optim.AdamW([a, b])
    a.grad = torch.randn(4, 3)
    adamw.step()
    ours = AdamMini([a, b])
    ours.load_state_dict(from_adamw_state(ours, adamw.state_dict()))
    assert a in ours.state and b not in ours.state


def test_export_gives_adamw_the_moment_of_the_block_and_comes_back(model):
    ours = AdamMini.for_model(model, preset="paper", **SETTINGS)
    train(model, [ours], steps=3)
    groups = [dict(group, params=group["params"]) for group in ours.param_groups]
    for group in groups:
        group["params"] = list(zip(group.pop("param_names"), group["params"], strict=True))
    adamw = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], lr=1.0
    )
    adamw.load_state_dict(to_adamw_state(ours))
    for param, state in ours.state.items():
        v = adamw.state[param]["exp_avg_sq"]
        assert v.shape == param.shape and adamw.state[param]["step"] == 3
        torch.testing.assert_close(v, ours.layout(param).expand(state["exp_avg_sq"]).clone())
    assert adamw.param_groups[0]["lr"] == SETTINGS["lr"]
    back = from_adamw_state(ours, adamw.state_dict())
    for number, state in ours.state_dict()["state"].items():
        torch.testing.assert_close(back["state"][number]["exp_avg_sq"], state["exp_avg_sq"])
    adamw.step()  # takes a step with what it was given


def test_elementwise_switch_to_adamw_and_back_changes_nothing():
    """With elementwise blocks both optimizers are the same: three of six steps each way."""

    def run(switch):
        torch.manual_seed(0)
        bias = nn.Parameter(torch.randn(7))
        optimizer = torch.optim.AdamW([bias], **SETTINGS)
        for step in range(6):
            if switch and step == 3:
                ours = AdamMini([bias], **SETTINGS)
                ours.load_state_dict(from_adamw_state(ours, optimizer.state_dict()))
                optimizer = ours
            bias.grad = torch.randn(7)
            optimizer.step()
        return bias

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=1e-7)


def test_the_authors_checkpoints_convert(model):
    adam_mini = pytest.importorskip("adam_mini")
    theirs_model = copy.deepcopy(model)
    theirs = adam_mini.Adam_mini(
        list(theirs_model.named_parameters()), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
        dim=32, n_heads=4, n_kv_heads=2, verbose=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    grads = {}
    for _ in range(4):
        for name, param in theirs_model.named_parameters():
            param.grad = torch.randn(param.shape, generator=generator)
            grads.setdefault(name, []).append(param.grad)
        theirs.step()
    ours = AdamMini.for_model(model, preset="paper", **SETTINGS)
    ours.load_state_dict(from_authors_state(ours, theirs.state_dict()))
    for group in ours.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            layout = ours.layout(param)
            m = torch.zeros_like(param)
            v = torch.zeros(layout.state_shape)
            for grad in grads[name]:
                m = m.lerp(grad, 0.1)
                mean = grad.square().mean() if "norm" in name else layout.mean(grad.square())
                v = v.lerp(mean.expand_as(v), 0.05)  # the authors: one rate per norm
            state = ours.state[param]
            assert state["step"] == 4
            torch.testing.assert_close(state["exp_avg"], m)
            torch.testing.assert_close(state["exp_avg_sq"], v)


def adamw_with(model, **changes):
    adamw = torch.optim.AdamW(model.named_parameters(), **changes)
    train(model, [adamw], steps=1)
    return adamw.state_dict()


def test_what_does_not_correspond_is_named(model):
    ours = AdamMini.for_model(model)
    with pytest.raises(ValueError, match="amsgrad=False"):
        from_adamw_state(ours, adamw_with(model, amsgrad=True))
    state_dict = adamw_with(model)
    with pytest.raises(ValueError, match=r"names: expected one for each of 12 .* found 1"):
        from_adamw_state(ours, state_dict, names=["a"])
    missing = copy.deepcopy(state_dict)
    missing["param_groups"][0]["param_names"][0] = "other"
    with pytest.raises(ValueError, match=r"in one of them only: \['model.embed_tokens.*other"):
        from_adamw_state(ours, missing)
    wrong = copy.deepcopy(state_dict)
    wrong["state"][0]["exp_avg_sq"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' with shape \(64, 32\)"):
        from_adamw_state(ours, wrong)
    with pytest.raises(ValueError, match="state_dict: expected a dict, found AdamW"):
        from_adamw_state(ours, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="state_dict: expected groups of an Adam"):
        from_adamw_state(ours, torch.optim.SGD(model.named_parameters(), lr=1.0).state_dict())
    with pytest.raises(ValueError, match="pass names= in the order of the old optimizer"):
        unnamed = torch.optim.AdamW(model.parameters())
        train_unnamed = [torch.zeros_like(p) for p in model.parameters()]
        for p, grad in zip(model.parameters(), train_unnamed, strict=True):
            p.grad = grad
        unnamed.step()
        from_adamw_state(ours, unnamed.state_dict())
    with pytest.raises(ValueError, match="one named parameter per group"):
        from_authors_state(ours, state_dict)
    with pytest.raises(ValueError, match="expected named parameters"):
        from_adamw_state(AdamMini(list(model.parameters())), state_dict)
    assert not ours.state


# Five edits to conversion.py, each of which must turn a test red:
# 1. `_averaged`: layout.mean(v.sqrt()) instead of layout.mean(v).
# 2. `_from_authors`: m.reshape(param.shape) -> m.t().reshape(param.shape).
# 3. `from_adamw_state`: drop the step (write 0).
# 4. `_converted`: match by position although there are names.
# 5. `to_adamw_state`: exp_avg_sq of AdamMini as it is.
