"""Questions in, answers out: dtbert at its budgets against the same tokens and spans around its peers."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench.checkpoints import Checkpoint, reason
from bench.windows import Batch
from torch import Tensor
from tqdm import tqdm

from cpu_bench.comparison import DTYPES, Effort
from cpu_bench.peers import BASE, Engine, NotTimed, engines
from cpu_bench.timing import Contender, measure, trial
from dtbert.evaluation import read_squad
from dtbert.model import LengthSchedule, PackedBatch
from dtbert.qa import QuestionAnswerer

_BUDGETS = (None, 0.7, 0.5, 0.33, 0.25)
# Tokens that go through an engine together: one window, or several.
_BATCH_TOKENS = (384, 2048)
_TRIED = 64

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answering:
    """An answerer at a budget; a peer's has its engine in the place of the model."""

    provider: str
    setting: str
    answerer: QuestionAnswerer
    budget: float | None

    @property
    def name(self) -> str:
        budget = "" if self.budget is None else f"budget {self.budget}"
        return ", ".join(filter(None, (self.provider, self.setting, budget)))

    def answers(self, pairs: Pairs) -> list[str]:
        return [answer.text for answer in self.answerer.answer_many(pairs, budget=self.budget)]


def end_to_end(
    checkpoint: Checkpoint, squad: Path, questions: int, threads: int, effort: Effort, wanted: Callable[[str], bool]
) -> Iterator[dict[str, Any]]:
    """A row for each dtype: questions a second of the shipped model, tokens and spans included.

    Answers are compared with those of transformers in float32, at full length.
    """
    pairs = [(one.question, one.context) for one in read_squad(squad)][:questions]
    for name, dtype in DTYPES.items():
        title = f"end to end {checkpoint.name} {name}"
        available = list(engines(checkpoint, dtype, threads, functools.partial(_wanted, wanted, title)))
        if not any(isinstance(entry, Engine) for entry in available):
            continue
        own = QuestionAnswerer.load(dtype=dtype)
        expected = _around(Engine(BASE, "", "", checkpoint.reference), own, 384).answers(pairs)
        best, left_out = dict[str, tuple[float, Answering]](), [e for e in available if isinstance(e, NotTimed)]
        for engine in tqdm([e for e in available if isinstance(e, Engine)], title, leave=False):
            for tokens in _BATCH_TOKENS:
                for answering in _of(engine, own, tokens):
                    try:
                        seconds = trial(functools.partial(answering.answers, pairs[:_TRIED]))
                    except Exception as error:
                        left_out.append(NotTimed(engine.provider, engine.setting, reason(error)))
                        continue
                    key = f"{answering.provider} {answering.budget}"
                    if key not in best or seconds < best[key][0]:
                        best[key] = seconds, answering
        yield {
            "model": checkpoint.name,
            "dtype": name,
            "questions": len(pairs),
            "results": _timed([one for _, one in best.values()], pairs, expected, effort, title),
            "not_timed": [entry._asdict() for entry in left_out],
        }


def _wanted(wanted: Callable[[str], bool], title: str, provider: str) -> bool:
    return wanted(f"{title} {provider}")


def _of(engine: Engine, own: QuestionAnswerer, tokens: int) -> list[Answering]:
    if engine.provider == "dtbert":
        answerer = copy.copy(own)
        answerer.batch_tokens = tokens
        return [Answering("dtbert", f"{tokens} tokens", answerer, budget) for budget in _BUDGETS]
    return [_around(engine, own, tokens)]


def _around(engine: Engine, own: QuestionAnswerer, tokens: int) -> Answering:
    answerer: Any = copy.copy(own)
    answerer.batch_tokens = tokens

    def forward(packed: PackedBatch, schedule: LengthSchedule | None = None) -> tuple[Tensor, Tensor]:
        batch = Batch.of_packed(packed)
        start, end = torch.cat(batch.windows_of(engine.run(batch))).unbind(1)
        return start, end

    answerer.model = SimpleNamespace(forward_packed=forward, device=torch.device("cpu"))
    setting = ", ".join(filter(None, (engine.setting, f"{tokens} tokens")))
    return Answering(engine.provider, setting, answerer, None)


def _timed(
    chosen: Sequence[Answering], pairs: Pairs, expected: Sequence[str], effort: Effort, title: str
) -> list[dict[str, Any]]:
    rounds = max(3, effort.rounds // 2)
    # Every question is timed, dealt out to the rounds, so that each gets texts of all kinds.
    dealt = [pairs[first::rounds] for first in range(rounds)]
    shares = [len(part) / len(pairs) for part in dealt]
    agreement, contenders = {}, []
    for one in tqdm(chosen, f"{title}, checking answers", leave=False):
        found = one.answers(pairs)
        agreement[one.name] = sum(map(str.__eq__, found, expected)) / len(pairs)
        calls = [functools.partial(one.answers, part) for part in dealt]
        estimate = trial(functools.partial(one.answers, pairs[:_TRIED])) * len(pairs) / _TRIED
        contenders.append(Contender(one.name, calls, shares, functools.partial(one.answers, pairs[:1]), estimate))
    times = measure(contenders, rounds, title)
    return [
        {
            "provider": one.provider,
            "setting": one.setting,
            "budget": one.budget,
            "questions_per_second": round(len(pairs) / times[one.name]["ms"] * 1e3, 1),
            "same_answers": round(agreement[one.name], 4),
            **times[one.name],
        }
        for one in chosen
    ]
