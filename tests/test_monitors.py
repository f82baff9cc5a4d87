import json
import math

import pytest
import torch

from trimtab.stability import (
    ClipEntropyMonitor,
    GradientNormMonitor,
    MismatchMonitor,
    Reading,
    SignLengthMonitor,
    VarianceMonitor,
    aggregation_weights,
    mismatch_report,
    overall,
)

MASK = torch.ones(4, 5, dtype=torch.bool)


def clip_step(monitor, shift=0.0, entropy=1.0, advantage=1.0):
    ones = torch.ones(4, 5)
    return monitor.observe(
        torch.full((4, 5), shift), advantage * ones, MASK, -ones, entropy * ones, lr=0.1
    )


def test_clipping_goes_from_healthy_to_alarm():
    monitor = ClipEntropyMonitor(warmup=1)
    reading = clip_step(monitor)
    assert reading.state == "healthy" and reading.reason == "every number is within its limits"
    assert reading.metrics["clip/clipped_fraction"] == 0
    reading = clip_step(monitor, shift=0.5)  # every ratio is 1.65 with A > 0
    assert reading.state == "alarm"
    assert "clip/clipped_fraction 1 above 0.5" in reading.reason
    assert clip_step(monitor, shift=0.5, advantage=-1.0).state == "healthy"  # it leaks, unclipped


@pytest.mark.parametrize(
    ("entropies", "states"),
    [
        ([1.0, 1.0, 0.6, 0.4, 0.1], ["healthy", "healthy", "healthy", "watch", "alarm"]),
        ([1.0, 1.0, 1.9, 2.5, 4.5], ["healthy", "healthy", "healthy", "watch", "alarm"]),
    ],
    ids=["collapse", "explosion"],
)
def test_entropy_is_held_against_its_first_steps(entropies, states):
    monitor = ClipEntropyMonitor(warmup=2, smoothing=0.0)
    readings = [clip_step(monitor, entropy=e) for e in entropies]
    assert [r.state for r in readings] == states
    assert readings[-1].metrics["entropy/relative"] == pytest.approx(entropies[-1])
    assert readings[-1].metrics["entropy/change"] == pytest.approx(entropies[-1] - entropies[-2])
    assert "entropy/change" not in readings[0].metrics


def test_a_number_at_its_limit_has_not_passed_it():
    """Both where large is bad and where small is."""
    monitor = MismatchMonitor(k3=(0.25, 0.5), ess=(0.5, 0.25))
    at = [monitor.judge({"mismatch/k3": k3, "mismatch/ess": 1}).state for k3 in (0.25, 0.5, 0.51)]
    assert at == ["healthy", "watch", "alarm"]
    at = [monitor.judge({"mismatch/ess": ess}).state for ess in (0.5, 0.25, 0.24)]
    assert at == ["healthy", "watch", "alarm"]


def test_a_small_signal_beside_the_clipped_away_part_is_an_alarm():
    monitor = ClipEntropyMonitor(clipped=(1.0, 1.0))
    r = torch.tensor([[1.0, 3.0]]).log()
    half, ones = torch.tensor([[True, True]]), torch.ones(1, 2)
    reading = monitor.observe(r, ones, half, -ones, ones)
    assert reading.metrics["clip/signal_ratio"] == pytest.approx(4 / 1.8)
    assert reading.state == "watch" and "clip/signal_ratio 2.22 below 5" in reading.reason
    reading = monitor.judge({"clip/signal_ratio": 1.9})
    assert reading.state == "alarm" and "below 2" in reading.reason
    assert monitor.judge({"clip/signal_ratio": 17.0}).state == "healthy"


def test_variance_growth():
    monitor = VarianceMonitor(warmup=2, smoothing=0.0)
    lp, p2 = torch.full((4, 5), -1.0), torch.full((4, 5), 0.3)

    def step(scale):
        return monitor.observe(torch.full((4, 5), scale), lp, p2, MASK, grad_norm=0.5)

    readings = [step(scale) for scale in (1.0, 1.0, 1.5, 2.0, 4.0)]  # power goes with the square
    assert [r.state for r in readings] == ["healthy", "healthy", "healthy", "watch", "alarm"]
    numbers = readings[-1].metrics
    assert numbers["variance/growth"] == pytest.approx(16)
    power = numbers["variance/total_power"]
    assert numbers["variance/power_to_signal"] == pytest.approx(power / 0.25)
    assert numbers["variance/signal_growth"] == 1


def test_sign_length_coupling_is_seen_under_token_mean_and_gone_under_balanced():
    mask = torch.arange(8) < torch.tensor([2, 2, 8, 8])[:, None]
    outcome, ids = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.long)
    readings = {}
    for rule in ("token_mean", "balanced"):
        weights = aggregation_weights(mask, ids, outcome, rule=rule)
        readings[rule] = SignLengthMonitor().observe(weights, outcome, mask, ids)
    assert readings["token_mean"].state == "alarm"
    assert readings["token_mean"].metrics["coupling/share"] == pytest.approx((4 - 16) / 20)
    assert readings["token_mean"].metrics["coupling/length_gap"] == pytest.approx(0.25)
    assert readings["balanced"].state == "healthy"
    assert readings["balanced"].metrics["coupling/share"] == pytest.approx(0, abs=1e-6)


def test_mismatch():
    monitor = MismatchMonitor(warmup=1, smoothing=0.0)
    lp = torch.full((4, 5), -1.0)
    readings = [monitor.observe(mismatch_report(lp, lp - gap, MASK)) for gap in (0.01, 0.06, 0.5)]
    assert [r.state for r in readings] == ["healthy", "alarm", "alarm"]
    assert "mismatch/growth" in readings[1].reason and "mismatch/k3" not in readings[1].reason
    assert "mismatch/k3" in readings[2].reason
    assert MismatchMonitor().observe(mismatch_report(lp, lp, ~MASK)) == Reading(
        "healthy", "no number to judge", {}
    )
    uneven = mismatch_report(lp, torch.where(torch.arange(5) == 0, lp - 3, lp), MASK)
    assert "mismatch/ess" in MismatchMonitor(k3=(9.0, 9.0)).observe(uneven).reason


def test_gradient_spikes_against_the_median():
    monitor = GradientNormMonitor(window=4)
    # the median is 1 although the mean of the last four is 3
    states = [monitor.observe(n).state for n in (9.0, 1.0, 1.0, 1.0, 1.0, 4.0, 1.0, 20.0, 1.0)]
    assert states == ["healthy"] * 5 + ["watch", "healthy", "alarm", "healthy"]
    reading = monitor.observe(torch.tensor(math.inf))
    assert reading.state == "alarm" and "grad_norm is inf" in reading.reason
    assert monitor.observe(math.nan).state == "alarm"
    assert monitor.observe(1.0).state == "healthy"  # neither joined the median
    assert math.isfinite(monitor.observe(1.0).metrics["grad_norm/median"])


def monitors():
    return [
        (ClipEntropyMonitor(warmup=2), lambda m, x: clip_step(m, entropy=x)),
        (
            VarianceMonitor(warmup=2),
            lambda m, x: m.judge({"variance/total_power": x, "variance/signal": 1.0}),
        ),
        (SignLengthMonitor(), lambda m, x: m.judge({"coupling/share": x / 10})),
        (MismatchMonitor(warmup=2), lambda m, x: m.judge({"mismatch/k3": x / 1000})),
        (GradientNormMonitor(window=4), lambda m, x: m.observe(x)),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_resumed_monitor_reads_the_same(which):
    values = [1.0, 1.1, 0.9, 3.0, 1.0, 12.0, 0.2]
    monitor, step = monitors()[which]
    expected = [step(monitor, x) for x in values]
    first, step = monitors()[which]
    for x in values[:4]:
        step(first, x)
    state = json.loads(json.dumps(first.state_dict()))
    resumed, step = monitors()[which]
    with pytest.raises(ValueError, match="state with keys"):
        resumed.load_state_dict({"other": 1} | state)
    resumed.load_state_dict(state)
    assert [step(resumed, x) for x in values[4:]] == expected[4:]


def test_judging_a_log_is_observing():
    """The numbers of a step, written to a log and read again, give the same readings."""
    live, replayed = ClipEntropyMonitor(warmup=2), ClipEntropyMonitor(warmup=2)
    for entropy in (1.0, 0.9, 0.3):
        reading = clip_step(live, entropy=entropy, shift=0.1)
        logged = {k: v for k, v in reading.metrics.items() if k != "entropy/relative"}
        assert replayed.judge(json.loads(json.dumps(logged))) == reading


def test_limits_are_configurable_and_unknown_numbers_pass_through():
    monitor = GradientNormMonitor(spike=(1.5, 2.0), window=2)
    states = [monitor.judge({"grad_norm": n, "mine": 7.0}).state for n in (1.0, 1.6, 2.0)]
    assert states == ["healthy", "watch", "watch"]
    assert monitor.judge({"mine": 7.0}).metrics == {"mine": 7.0}
    assert MismatchMonitor(k3=(1.0, 2.0)).judge({"mismatch/k3": 0.9}).state == "healthy"


def test_a_number_that_is_not_finite_is_an_alarm_and_does_not_enter_the_trend():
    monitor = MismatchMonitor(warmup=1, smoothing=0.5)
    monitor.judge({"mismatch/k3": 1e-4})
    reading = monitor.judge({"mismatch/k3": math.nan})
    assert reading.state == "alarm" and "mismatch/k3 is nan" in reading.reason
    assert monitor.judge({"mismatch/k3": 1e-4}).metrics["mismatch/growth"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("monitor", "name"),
    [
        (VarianceMonitor, "variance/total_power"),
        (VarianceMonitor, "variance/signal"),
        (ClipEntropyMonitor, "entropy/mean"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_only_a_trend_reads_is_judged_too(monitor, name, value):
    each = monitor(warmup=1)
    assert each.judge({name: 1.0}).state == "healthy"
    reading = each.judge({name: value})
    assert reading.state == "alarm" and f"{name} is {value}" in reading.reason
    after = each.judge({name: 1.0})
    assert after.state == "healthy" and all(math.isfinite(x) for x in after.metrics.values())


def test_parts_of_a_log_are_judged_as_far_as_they_go():
    reading = ClipEntropyMonitor().judge({"clip/clipped_high": 0.6, "entropy/mean": None})
    assert reading == Reading("healthy", "no number to judge", {"clip/clipped_high": 0.6})


@pytest.mark.parametrize("inner", [None, {}, {"seen": 1}])
def test_malformed_states_are_refused_whole(inner):
    monitor = VarianceMonitor(warmup=1)
    monitor.judge({"variance/total_power": 1.0, "variance/signal": 2.0})
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="expected state of variance/signal"):
        monitor.load_state_dict(
            before | {"variance/total_power": before["variance/signal"], "variance/signal": inner}
        )
    assert monitor.state_dict() == before
    with pytest.raises(ValueError, match="a list"):
        GradientNormMonitor().load_state_dict({"norms": {}})


def test_bad_input_is_refused_and_not_recorded():
    monitor = ClipEntropyMonitor()
    clip_step(monitor)
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="finite entropy"):
        clip_step(monitor, entropy=math.nan)
    assert monitor.state_dict() == before
    with pytest.raises(ValueError, match="warmup >= 1"):
        VarianceMonitor(warmup=0)
    with pytest.raises(ValueError, match="window >= 2"):
        GradientNormMonitor(window=1)
    for pair in ((math.nan, 1.0), (3.0, 2.0), 3.0, (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match=r"spike as a pair .* watch <= alarm"):
            GradientNormMonitor(spike=pair)
    with pytest.raises(ValueError, match=r"entropy_fall as a pair .* watch >= alarm"):
        ClipEntropyMonitor(entropy_fall=(0.2, 0.5))
    even = ClipEntropyMonitor(entropy_fall=(0.2, 0.2), warmup=1)
    assert clip_step(even).state == "healthy"


def test_overall_is_the_worst():
    healthy, watch = Reading("healthy", "a", {"x": 1.0}), Reading("watch", "b", {"y": 2.0})
    assert overall([healthy, watch, healthy]) == Reading("watch", "b", {"x": 1.0, "y": 2.0})
    assert overall([healthy, Reading("alarm", "c", {}), watch]).state == "alarm"
    with pytest.raises(ValueError, match="at least one"):
        overall([])


# Edits to stability/readings.py and monitors.py that must turn this file red:
#   low=True  ->  low=False
#   self.seen < self.warmup  ->  self.seen <= self.warmup   in Trend.update, the first one
#   if math.isfinite(norm):  ->  if True:
#   for state in ("alarm", "watch")  ->  ("watch", "alarm")
#   super().state_dict() | {"last_entropy": ...}  ->  super().state_dict()
