"""Vocabulary pruning in `generate`, as the trainer prunes: the same safe set, the same log-probs.

    output = model.generate(
        ids, **pruned_generation(rho, temperature=0.7), output_scores=True,
        return_dict_in_generate=True,
    )
    logp = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)

`logp` [B, T] is what `response_statistics(..., temperature=0.7, prune=rho).logp` computes in the
trainer, up to the rounding of the two engines. Mask what follows the end of a row: it is padding.

Of transformers (read and tested at 5.0.0 and 5.23.0, generation/utils.py):
* `_get_logits_processor` puts the caller's processors before the temperature, so they see unscaled
  logits; that is why the processor needs the temperature.
* Sampling keeps the 50 most probable tokens unless told otherwise (GenerationConfig's default), and
  checkpoints bring more (top_k, top_p, repetition_penalty); `pruned_generation` switches all off.
* `generate_batch` uses no processors of the caller: give its generation config min_p=rho, top_k=0.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..stability import DEFAULT_RHO


class VocabularyPruningLogitsProcessor(LogitsProcessor):
    """Sets the scores of all tokens outside the safe set to -inf.

    S = {v : z_v / temperature >= max_u z_u / temperature + ln rho}, decided in fp32, or in fp64 for
    fp64 scores. Tokens that other processors have set to -inf stay so, and S is taken among the
    rest; a row without a finite score is left as it is. Greedy decoding does not change, since the
    largest score is in S. Put it last of several processors.

    Args:
        rho: smallest kept probability relative to the largest, in (0, 1).
        temperature: > 0, the one that `generate` samples with, whose warper comes later.

    Raises:
        ValueError: an argument out of range; when called, scores that are not [B, V] floats.

    Source:
        arXiv 2512.23087 (abstract read).
    """

    def __init__(self, rho: float = DEFAULT_RHO, *, temperature: float = 1.0) -> None:
        if not 0 < rho < 1:
            raise ValueError(f"rho: expected a ratio in (0, 1), found {rho}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a finite number > 0, found {temperature}")
        self.rho = rho
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V], in their dtype, with -inf outside the safe set."""
        if scores.ndim != 2 or not scores.is_floating_point():
            found = f"{tuple(scores.shape)} of {scores.dtype}"
            raise ValueError(f"scores: expected [B, V] of a floating dtype, found {found}")
        x = scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature
        # "outside" by <, not "inside" by >=: a NaN stays and shows, as it does in token_stats
        outside = x < x.amax(-1, keepdim=True) + math.log(self.rho)
        return scores.masked_fill(outside, -math.inf)


def pruned_generation(rho: float = DEFAULT_RHO, *, temperature: float = 1.0) -> dict[str, Any]:
    """Keyword arguments of `generate` that sample from the softmax over the safe set.

    They override the model's generation config: everything in it that truncates the distribution or
    penalises tokens is off, since the trainer does not know of it. Constraints stay as the config
    or the caller sets them (min_new_tokens, bad_words_ids, suppress_tokens, ...); with those the
    log-probs are of the constrained distribution.

    Args:
        rho: smallest kept probability relative to the largest, in (0, 1).
        temperature: > 0.

    Returns:
        A new dict for `model.generate(ids, **pruned_generation(...))`.

    Raises:
        ValueError: an argument out of range.

    Source:
        arXiv 2512.23087 (abstract read).
    """
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": float(temperature),  # transformers refuses an int
        "top_k": 0,
        "top_p": 1.0,
        "min_p": None,
        "top_h": None,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "logits_processor": [VocabularyPruningLogitsProcessor(rho, temperature=temperature)],
    }
