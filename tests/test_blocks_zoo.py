"""Every architecture that transformers ships, by its default config, without storage."""

import logging

import pytest
import torch
import transformers
from torch.utils._device import _device_constructors
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from trimtab.optim.blocks import infer_blocks

HEADS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "PRETRAINING")
MAPPINGS = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS] + ["MODEL_MAPPING_NAMES"]
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip

# One head that no attribute speaks of (the first), and convolutions without heads.
WITHOUT_HEAD_SIZE = {
    "GroupViTModel",
    "Apertus1p5Model",
    "JanusForConditionalGeneration",
    "WavTokenizerModel",
}


def shorten(config):
    """At most 4 layers, in the configs of towers too."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shorten(value)
        elif key in LAYERS and isinstance(value, int):
            setattr(config, key, min(4, value))
        elif key == "layer_types" and isinstance(value, list):
            setattr(config, key, value[:4])


def built(name):
    """The model on meta, shortened if its config allows it; None where it cannot be built."""
    model_class = getattr(transformers, name, None)
    for short in (True, False):
        try:
            config = model_class.config_class()
            if short:
                shorten(config)
            with torch.device("meta"):
                return model_class(config)
        except Exception:  # a library is missing, or the default config is none to build from
            continue
    return None


@pytest.mark.slow
def test_every_architecture_of_transformers(caplog, monkeypatch):
    monkeypatch.undo()  # the poisoned torch.empty of conftest.py allocates in spite of meta
    _device_constructors.cache_clear()
    names = set()
    for kind in CONFIG_MAPPING_NAMES:
        found = (getattr(modeling_auto, mapping).get(kind) for mapping in MAPPINGS)
        name = next((name for name in found if name), None)
        names.add(name[0] if isinstance(name, (tuple, list)) else name)
    built_ones, without = 0, set()
    for name in sorted(names - {None}):
        model = built(name)
        if model is None:
            continue
        built_ones += 1
        shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        for preset in ("rows", "paper", "snr"):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "trimtab"):
                blocks = infer_blocks(model, preset)
            assert {key: entry.layout.shape for key, entry in blocks.items()} == shapes, name
            assert len(str(blocks).splitlines()) == 1 + len(shapes)
            if any(doubt in caplog.text for doubt in ("heads of", "order of q")):
                without.add(name)
    assert built_ones > 400
    assert without <= WITHOUT_HEAD_SIZE
