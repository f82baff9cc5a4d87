import json
import multiprocessing
import os
import signal
import string
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from warmup_workers import CharacterSums, warm_up_in_process

from trimtab.rl import ChainSumTask, WarmupConfig, warm_up
from trimtab.rl.chain_sum import CHARACTERS, Styles
from trimtab.rl.warmup import IGNORED, WarmupModule, _Documents, character_tokenizer

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def config(tmp_path):
    return WarmupConfig(
        hidden_size=16, layers=1, heads=2, ffn=16, reasoning_steps=3, mixture_steps=2,
        batch_documents=2, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def folders(config):
    return sorted(path.name for path in Path(config.cache_dir).glob("base-*") if path.is_dir())


# ---------------------------------------------------------------- the tokenizer


def test_round_trip_through_a_folder(tmp_path):
    made = character_tokenizer(CHARACTERS, 64)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("", CHARACTERS, "Q:7+5-3=\nA:#9\n", "\n \n", "<>", "9" * 300):
        for tokenizer in (made, loaded):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert len(loaded) == 64 == len(loaded.get_vocab())
    ids = [loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id, loaded.unk_token_id]
    assert ids == [0, 1, 2, 3]
    assert loaded.encode("x", add_special_tokens=False) == [3]  # a character it does not know
    with pytest.raises(
        ValueError, match=f"vocab_size: expected at least {4 + len(CHARACTERS)}, got 9"
    ):
        character_tokenizer(CHARACTERS, 9)
    assert len(character_tokenizer(string.digits, 14)) == 14


def test_prompts_begin_with_bos_once_like_the_documents(tmp_path, config):
    """`encode(prompt)`, as the loop calls it, and what the warm-up trains on."""
    task = ChainSumTask()
    made = character_tokenizer(task.characters(), 64)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    prompt = task.problem("train", 0).prompt
    for tokenizer in (made, loaded):
        ids = tokenizer.encode(prompt)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert ids[1:] == tokenizer.encode(prompt, add_special_tokens=False)
        assert tokenizer(prompt)["input_ids"] == ids
        assert tokenizer.eos_token_id not in ids
        document = task.document(0, config.styles)
        row, _ = _Documents(task, config, tokenizer)._row(document)
        assert row == tokenizer.encode("".join(q + a for q, a in document))


def test_every_document_and_prompt_is_known_to_the_tokenizer():
    task = ChainSumTask()
    tokenizer = character_tokenizer(task.characters(), 64)
    styles = Styles(worked=0.4, checked=0.4)
    texts = [q + a for i in range(200) for q, a in task.document(i, styles)]
    texts += [task.problem(split, i).prompt for split in ("train", "heldout") for i in range(50)]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer.encode(text)
    used = set("".join(texts))
    assert used < set(task.characters())


def test_labels_cover_answers_only(config):
    task = ChainSumTask(shots=1)
    tokenizer = character_tokenizer(task.characters(), 64)
    batches = list(_Documents(task, config, tokenizer))
    assert len(batches) == 5
    ids, labels = batches[0]
    assert ids.shape == labels.shape == (2, ids.shape[1])
    for row, answers in enumerate(labels):
        document = task.document(row, config.reasoning_styles)
        wanted = "".join(answer for _, answer in document)
        assert tokenizer.decode(answers[answers != IGNORED].tolist()) == wanted
        shown = answers != IGNORED  # labels are shifted: the next id
        assert torch.equal(ids[row, 1:][shown[:-1]], answers[:-1][shown[:-1]])
    reasoning = "".join(tokenizer.decode(batch[0].flatten().tolist()) for batch in batches[:3])
    assert "A:#" not in reasoning  # the first phase has no direct answer


# ---------------------------------------------------------------- the cache


def test_base_loads_and_is_cached(config, monkeypatch):
    task = ChainSumTask(shots=1)
    folder = warm_up(task, config, [])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert model.config.vocab_size == 64 and model.config.eos_token_id == 1
    assert model(torch.tensor([[2, 5]])).logits.shape == (1, 2, 64)
    assert all(p.isfinite().all() for p in model.parameters())
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["task"] == {"class": "ChainSumTask", "shots": 1} | recipe["task"]
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with monkeypatch.context() as patched:
        patched.setattr("trimtab.rl.warmup._train", None)
        assert warm_up(task, config, []) == folder
        assert warm_up(ChainSumTask(shots=1), replace(config), []) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps


def test_another_task_or_configuration_has_another_base(config):
    first = warm_up(ChainSumTask(shots=1), config, [])
    weights = AutoModelForCausalLM.from_pretrained(first).state_dict()
    changed = (
        (ChainSumTask(shots=2), config),
        (ChainSumTask(shots=1, max_terms=3), config),
        (CharacterSums(shots=1), config),
        (ChainSumTask(shots=1), replace(config, seed=1)),
        (ChainSumTask(shots=1), replace(config, styles=Styles(0.5, 0.5))),
        (ChainSumTask(shots=1), replace(config, muon_lr=0.1)),
    )
    others = [warm_up(task, other, []) for task, other in changed]
    assert len({first, *others}) == 7 == len(folders(config))
    elsewhere = replace(config, cache_dir=f"{config.cache_dir}-2")
    again = warm_up(ChainSumTask(shots=1), elsewhere, [])  # the place is no part of the key
    assert again.name == first.name
    same = AutoModelForCausalLM.from_pretrained(again).state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_warm_up_leaves_the_callers_random_numbers(config):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    warm_up(ChainSumTask(shots=1), config, [])
    assert torch.equal(torch.get_rng_state(), state)


def wait_for(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_train_once(config, tmp_path):
    """Each training appends a line; both processes start before either trains."""
    log = tmp_path / "log"
    processes = [
        SPAWN.Process(target=warm_up_in_process, args=(config, str(log), 0.5)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text().count("trained") == 1
    assert log.read_text().count("base-") == 2 and len(folders(config)) == 1


@pytest.mark.parametrize("moment", ["while it trains", "while it saves"])
def test_a_killed_warm_up_leaves_no_base(config, tmp_path, moment):
    log = tmp_path / "log"
    saving = moment == "while it saves"
    process = SPAWN.Process(target=warm_up_in_process, args=(config, str(log), 60.0, saving))
    process.start()
    wait_for(log)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(folders(config)) == saving and not any(Path(n).suffix == "" for n in folders(config))
    folder = warm_up(ChainSumTask(shots=1), config, [])  # the lock of the dead one is free
    AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert folders(config) == [folder.name]  # what the dead one had half saved is gone


def test_refusals():
    for name in ("hidden_size", "layers", "heads", "ffn", "vocab_size", "batch_documents"):
        with pytest.raises(ValueError, match=f"{name}: expected a count >= 1, got 0"):
            WarmupConfig(**{name: 0})
    for name in ("reasoning_steps", "mixture_steps"):
        with pytest.raises(ValueError, match=f"{name}: expected a count >= 0, got -1"):
            WarmupConfig(**{name: -1})
    with pytest.raises(ValueError, match="heads: expected hidden_size / heads to be even"):
        WarmupConfig(hidden_size=12, heads=4)


@pytest.mark.parametrize(("first", "second"), [(4, 0), (0, 4), (1, 1)])
def test_rate_falls_over_both_phases(config, first, second):
    config = replace(config, reasoning_steps=first, mixture_steps=second)
    module = WarmupModule(config, character_tokenizer(CHARACTERS, 64))
    rates = [module._rate(step) for step in range(first + second)]
    assert all(0 < rate <= 1 for rate in rates)
    falling = [module._rate(step) for step in range(first, first + second)]
    assert falling == sorted(falling, reverse=True)


# Edits to rl/warmup.py that must turn this file red:
#   backend.post_processor = ...                                     ->  removed       (no <bos>)
#   with FileLock(...)                                               ->  nullcontext()
#   unfinished = cache / f"..."                                      ->  folder        (a torn base)
#   del recipe["warmup"]["cache_dir"]                                ->  removed
#   with torch.random.fork_rng(devices=[])                           ->  nullcontext()
