"""vLLM 0.32 without vLLM: its two interfaces of logits processors, and engines that drive them.

Where vLLM is installed, ``test_vllm.py`` compares the interfaces with the real ones.
"""

from __future__ import annotations

import random
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Any
    added: Any
    moved: Any


class LogitsProcessorV1(ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory):
        raise NotImplementedError

    @abstractmethod
    def apply(self, logits):
        raise NotImplementedError

    @abstractmethod
    def is_argmax_invariant(self):
        raise NotImplementedError

    @abstractmethod
    def update_state(self, batch_update):
        raise NotImplementedError


@dataclass(frozen=True)
class LogitsProcRequestState:
    device: Any
    max_num_reqs: int
    vocab_size: int
    all_token_ids: Any
    prompt_len: Any
    prefill_len: Any
    total_len: Any


@dataclass(frozen=True)
class LogitsContext:
    expanded_idx_mapping: torch.Tensor
    idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray
    expanded_local_pos: torch.Tensor
    input_ids: torch.Tensor
    pos: torch.Tensor
    seq_lens_upper_bound_np: np.ndarray


class LogitsProcessorV2(ABC):
    def __init__(self, vllm_config, req_states):  # noqa: B027
        pass

    @classmethod
    def validate_params(cls, sampling_params):
        return None

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):  # noqa: B027
        pass

    @abstractmethod
    def apply(self, logits, ctx):
        raise NotImplementedError


V1 = "vllm.v1.sample.logits_processor"
V2 = "vllm.v1.worker.gpu.sample.logits_processor"


def install(monkeypatch) -> None:
    """Put the interfaces where vLLM would be."""
    names = {V1: (BatchUpdate, MoveDirectionality), V2: (LogitsContext, LogitsProcRequestState)}
    for name, classes in names.items():
        for end in [i for i, letter in enumerate(name) if letter == "."]:
            monkeypatch.setitem(sys.modules, name[:end], types.ModuleType(name[:end]))
        module = types.ModuleType(name)
        for each in classes:
            setattr(module, each.__name__, each)
        module.LogitsProcessor = LogitsProcessorV1 if name == V1 else LogitsProcessorV2
        monkeypatch.setitem(sys.modules, name, module)


def params(**changes: Any) -> Any:
    """The fields of ``SamplingParams`` that matter here."""
    asked = {"extra_args": None, "max_tokens": 16, "logprobs": None, "detokenize": True}
    return SimpleNamespace(**{**asked, **changes})


def config(folder: Any, width: int, **changes: Any) -> Any:
    """The fields of ``VllmConfig`` that matter here."""
    model = {"tokenizer": str(folder), "tokenizer_revision": None, "enable_prompt_embeds": False}
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**model, **changes}, get_vocab_size=lambda: width),
        parallel_config=SimpleNamespace(rank=0, data_parallel_index=0),
    )


@dataclass
class Request:
    params: Any
    prompt: list[int]
    wanted: int
    output: list[int] = field(default_factory=list)

    @property
    def done(self):
        return len(self.output) >= self.wanted


class EngineV1:
    """A persistent batch as ``InputBatch`` keeps it: rows are filled, condensed and swapped."""

    def __init__(self, processor, target, seed, capacity=4, asynchronous=False):
        self.processor, self.target, self.capacity = processor, target, capacity
        self.random = random.Random(seed)
        self.asynchronous = asynchronous
        self.rows: list[Request] = []
        self.moves = self.preempted = 0

    def run(self, requests):
        waiting, running = list(requests), []
        for _ in range(500):
            leaving = [each for each in running if each.done]
            if running and self.random.random() < 0.2:  # preempted, and back later
                victim = self.random.choice(running)
                if victim not in leaving:
                    leaving.append(victim)
                    waiting.append(victim)
                    self.preempted += 1
            running = [each for each in running if each not in leaving]
            count = self.random.randint(0, self.capacity - len(running))
            coming, waiting = waiting[:count], waiting[count:]
            running += coming
            if not running and not waiting:
                return
            self._change(leaving, coming)
            if running:
                self._step()
        raise AssertionError("the requests never end")

    def _change(self, leaving, coming):
        rows = dict(enumerate(self.rows))
        free = sorted(row for row, each in rows.items() if each in leaving)
        for row in free:
            del rows[row]
        added, moved = [], []
        for each in coming:
            row = free.pop(0) if free else max(rows, default=-1) + 1
            rows[row] = each
            added.append((row, each.params, each.prompt, each.output))
        while rows and free and free[0] < max(rows):  # condense
            empty, last = free.pop(0), max(rows)
            rows[empty] = rows.pop(last)
            moved.append((last, empty, MoveDirectionality.UNIDIRECTIONAL))
        if len(rows) > 1 and self.random.random() < 0.5:  # reorder
            a, b = self.random.sample(range(len(rows)), 2)
            rows[a], rows[b] = rows[b], rows[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        self.moves += len(moved)
        self.rows = [rows[row] for row in range(len(rows))]
        if free or added or moved:
            update = BatchUpdate(len(self.rows), sorted(free, reverse=True), added, moved)
            self.processor.update_state(update)
        else:
            self.processor.update_state(None)

    def _step(self):
        logits = torch.cat([self.target([*e.prompt, *e.output]) for e in self.rows])
        result = self.processor.apply(logits.clone())
        assert result.shape == logits.shape
        for row, each in enumerate(self.rows):
            # A chunk of a prompt has a row, too, whose token is thrown away.
            if each.output or self.random.random() < 0.8:
                token = int(result[row].argmax())
                if self.asynchronous:  # the placeholder is filled in before the next apply()
                    each.output.append(-1)
                    each.output[-1] = token
                else:
                    each.output.append(token)


class EngineV2:
    """Slots that are recycled without notice, rows in any order, and drafts to verify."""

    def __init__(self, make, target, width, seed, slots=4, length=64):
        self.target, self.random = target, random.Random(seed)
        ids = torch.zeros(slots, length, dtype=torch.int32)
        self.ids, self.lengths, self.free = ids, {}, list(range(slots))
        self.states = LogitsProcRequestState(
            torch.device("cpu"), slots, width, SimpleNamespace(gpu=ids), None, None, None
        )
        self.processor = make(self.states)
        self.drafted = self.accepted = 0

    def run(self, requests, drafts=0):
        waiting, running = list(requests), {}
        for _ in range(500):
            for slot in [slot for slot, each in running.items() if each.done]:
                del running[slot]
                self.free.append(slot)
            if running and self.random.random() < 0.2:  # preempted, and back later
                slot = self.random.choice(list(running))
                waiting.append(running.pop(slot))
                self.free.append(slot)
            while waiting and self.free and self.random.random() < 0.8:
                slot, each = self.free.pop(), waiting.pop(0)
                text = [*each.prompt, *each.output]
                self.ids[slot] = -7  # what a former request left
                self.ids[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
                self.lengths[slot] = len(text)
                running[slot] = each
                self.processor.add_request(slot, each.params)
            if not running and not waiting:
                return
            if running:
                self.processor.apply_staged_writes()
                self._step(running, drafts)
        raise AssertionError("the requests never end")

    def _step(self, running, drafts):
        batch = list(running)
        self.random.shuffle(batch)
        rows = []  # slot, number of the draft, position, token fed, text
        for slot in batch:
            length = self.lengths[slot]
            text = self.ids[slot, :length].tolist()
            count = self.random.randint(0, drafts) if running[slot].output else 0
            guess = [self.random.randrange(5, 60) for _ in range(count)]
            if guess:  # without fusion, this guess would be right
                guess[0] = int(self.target(text).argmax())
            for number in range(count + 1):
                seen = [*text, *guess[:number]]
                rows.append((slot, number, length - 1 + number, seen[-1], seen))
            self.drafted += count
        columns = [torch.tensor(each) for each in zip(*(row[:4] for row in rows), strict=True)]
        slots, numbers, positions, fed = columns
        mapping = torch.tensor(batch)
        context = LogitsContext(
            slots.int(), mapping.int(), mapping.numpy(), numbers.int(), fed.int(), positions, None
        )
        logits = torch.cat([self.target(row[4]) for row in rows])
        result = self.processor.apply(logits.clone(), context)
        for place, (slot, number, _, _, seen) in enumerate(rows):
            length = self.lengths[slot]
            if seen != self.ids[slot, :length].tolist() or running[slot].done:
                continue  # an earlier draft was refused
            self.accepted += number > 0
            token = int(result[place].argmax())
            self.ids[slot, length] = token
            self.lengths[slot] += 1
            running[slot].output.append(token)
