"""Processes of test_warmup.py: spawned, so importable by name."""

import time

import trimtab.rl.warmup as warmup
from trimtab.rl import ChainSumTask, warm_up


class CharacterSums(ChainSumTask):
    """Another task with the same settings."""


def warm_up_in_process(config, log, seconds, saving=False):
    """Warms up, sleeping in the training (or after the weights are saved); logs what happened."""
    train = warmup._train

    def note(text):
        with open(log, "a") as file:
            file.write(f"{text}\n")

    def slow(*arguments):
        model, tokenizer = train(*arguments)
        save = model.save_pretrained

        def slow_save(*arguments, **options):
            save(*arguments, **options)
            note("saved")
            time.sleep(seconds)

        if saving:
            model.save_pretrained = slow_save
        else:
            note("trained")
            time.sleep(seconds)
        return model, tokenizer

    warmup._train = slow
    note(warm_up(ChainSumTask(shots=1), config, []).name)
