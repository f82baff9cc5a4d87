"""GEM: does supervised fine-tuning keep more entropy and diversity than with cross-entropy?

    python benchmarks/claims/gem_entropy.py    # what came out: results/claims/gem_entropy.json

Source: arXiv 2408.16673. A pretrained model meets a fine-tuning set with one answer for each
question, though several are right; does it forget the others? Questions are the two-digit numbers
n in 20..99 of which 12 ways to write n = a + b are right answers, at most two digits each. A small
Llama is pretrained on all of them (cross-entropy, answers drawn anew in each step), then fine-tuned
on one fixed answer for each of half of the questions, by cross-entropy, by GEM (`gem_loss`, beta
0.7, both forms), for the same steps.

Measured on the fine-tuning questions and on the others, from 32 samples at temperature 1: entropy
of the answer in nats (mean of -log p of the samples), number of distinct answers, share that is
right, distinct right answers; and the held-out loss, cross-entropy in nats of all right answers
(which is what the model was to remember). The linear form's gradient is that of 0.7 times
cross-entropy of z / 0.7, exactly, so where both fit the data, a GEM model is a cross-entropy model
read at temperature 1 / 0.7. A control says how much that alone does: the cross-entropy model,
sampled and measured at temperature 1 / 0.7.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from common import Rows, mean_and_error, run_claim
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.triton_kernels.gem import gem_loss

CLAIM = "GEM keeps more entropy and diversity than cross-entropy in fine-tuning (arXiv 2408.16673)"
WAYS, SAMPLES, ANSWER, STEPS = 12, 32, 5, 300
PLUS, END, BEGIN = 10, 11, 12  # digits are 0..9
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "gem_linear": lambda z, y: gem_loss(z, y, beta=0.7).mean(),
    "gem_logsigmoid": lambda z, y: gem_loss(z, y, beta=0.7, h="logsigmoid").mean(),
}


def corpus() -> tuple[Tensor, Tensor]:
    """Questions [80, 3] and their right answers [80, WAYS, 6], as ids."""
    questions, answers = [], []
    for n in range(20, 100):
        parts = [(a, n - a) for a in range(10, n - 9)]
        if len(parts) < WAYS:
            parts += [(a, n - a) for a in range(1, 10)]
        step = len(parts) / WAYS
        chosen = [parts[int(i * step)] for i in range(WAYS)]
        questions.append([BEGIN, n // 10, n % 10])
        answers.append([[a // 10, a % 10, PLUS, b // 10, b % 10, END] for a, b in chosen])
    return torch.tensor(questions), torch.tensor(answers)


def answer_logits(model: LlamaForCausalLM, questions: Tensor, answers: Tensor) -> Tensor:
    """[B, 6, V] logits that predict the answers."""
    ids = torch.cat([questions, answers], 1)
    return model(ids[:, :-1], use_cache=False).logits[:, questions.shape[1] - 1 :]


def train(model, questions: Tensor, answers: Tensor, loss_of, steps: int, lr: float, seed: int):
    """In place; answers [N, W, 6], of which one is drawn for each question of a batch."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(len(questions), (40,), generator=random)
        ways = torch.randint(answers.shape[1], (40,), generator=random)
        target = answers[rows, ways]
        logits = answer_logits(model, questions[rows], target)
        loss = loss_of(logits.flatten(0, 1), target.flatten())
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, questions: Tensor, answers: Tensor, temperature: float
) -> dict[str, float]:
    """From SAMPLES answers to each question, and the loss of all right ones."""
    rows = questions.repeat_interleave(SAMPLES, 0)
    logp = torch.zeros(len(rows))
    sampled = rows[:, :0]
    for _ in range(ANSWER + 1):
        ids = torch.cat([rows, sampled], 1)
        scores = model(ids, use_cache=False).logits[:, -1]
        scores = (scores / temperature).log_softmax(-1)
        token = torch.multinomial(scores.exp(), 1)
        logp += scores.gather(1, token)[:, 0]
        sampled = torch.cat([sampled, token], 1)
    groups = [set(map(tuple, group.tolist())) for group in sampled.view(-1, SAMPLES, ANSWER + 1)]
    a, b = sampled[:, 0] * 10 + sampled[:, 1], sampled[:, 3] * 10 + sampled[:, 4]
    shape = (
        (sampled[:, 2] == PLUS) & (sampled[:, 5] == END) & (sampled[:, [0, 1, 3, 4]] < 10).all(1)
    )
    right = shape & (a + b == rows[:, 1] * 10 + rows[:, 2])
    kept = [
        len(set(map(tuple, group[ok].tolist())))
        for group, ok in zip(sampled.view(-1, SAMPLES, ANSWER + 1), right.view(-1, SAMPLES))
    ]
    every = questions.repeat_interleave(answers.shape[1], 0), answers.flatten(0, 1)
    logits = answer_logits(model, *every) / temperature
    loss = F.cross_entropy(logits.flatten(0, 1), every[1].flatten(), reduction="sum")
    return {
        "entropy": float(-logp.mean()),
        "distinct": sum(map(len, groups)) / len(groups),
        "right": float(right.float().mean()),
        "distinct right": sum(kept) / len(kept),
        "held-out loss": float(loss / len(every[0])),
    }


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    questions, answers = corpus()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        sizes = dict(vocab_size=16, hidden_size=64, intermediate_size=192, num_hidden_layers=2)
        base = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes, **ends))
        pretraining = 300 if arguments.quick else 2500
        train(base, questions, answers, F.cross_entropy, pretraining, 3e-3, seed)
        tuned = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)) < 40
        one = torch.arange(len(questions))[:, None], torch.randint(WAYS, (len(questions), 1))
        for name, loss_of in ({"(pretrained)": None} | LOSSES).items():
            model = copy.deepcopy(base)
            if loss_of is not None:
                train(model, questions[tuned], answers[one][tuned], loss_of, STEPS, 1e-3, seed)
            hotter = {f"{name}, hotter": 1 / 0.7} if name == "cross_entropy" else {}
            for reading, temperature in ({name: 1.0} | hotter).items():
                for where, rows in (("fine-tuned", tuned), ("others", ~tuned)):
                    torch.manual_seed(seed)
                    result = measure(model, questions[rows], answers[rows], temperature)
                    found.setdefault((where, reading), []).append(result)
    rows = [
        {"questions": where, "loss": name}
        | {key: mean_and_error([r[key] for r in results])[0] for key in results[0]}
        | {"by_seed": results}
        for (where, name), results in sorted(found.items())
    ]
    more = {}
    for where in ("fine-tuned", "others"):
        for key in ("entropy", "distinct right"):
            pairs = zip(found[where, "gem_linear"], found[where, "cross_entropy"], strict=True)
            more[where, key] = mean_and_error([gem[key] - ce[key] for gem, ce in pairs])
    against_hotter = mean_and_error(
        [
            gem["distinct right"] - ce["distinct right"]
            for where in ("fine-tuned", "others")
            for gem, ce in zip(
                found[where, "gem_linear"], found[where, "cross_entropy, hotter"], strict=True
            )
        ]
    )
    clear = [mean > 2 * error for mean, error in more.values()]
    word = "holds" if all(clear) else "in part" if any(clear) else "does not hold"
    said = "; ".join(f"{k} ({w}) {m:+.3f} +- {e:.3f}" for (w, k), (m, e) in more.items())
    return rows, (
        f"{word}: linear GEM minus cross-entropy, {arguments.seeds} seeds: {said}; distinct right "
        "answers minus those of cross-entropy at temperature 1 / 0.7: "
        f"{against_hotter[0]:+.3f} +- {against_hotter[1]:.3f}"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=3, quick=1)
