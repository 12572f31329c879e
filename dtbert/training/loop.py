"""The training loop: resumable, on one device or several."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtbert.kernels.cpu import computes_natively
from dtbert.model import BertForQuestionAnswering, BertForSequenceClassification
from dtbert.training.backend import TrainingBackend
from dtbert.training.checkpoint import RunFolder
from dtbert.training.data import LabelledBatch, TrainingData
from dtbert.training.distillation import SpanTeacher, TextTeacher
from dtbert.training.length_drop import SubModel, sub_models
from dtbert.training.losses import span_loss
from dtbert.training.options import TrainingOptions
from dtbert.training.precision import NarrowWeights
from dtbert.training.step import Pass, SpanModel, losses_of_step
from dtbert.training.texts import ClassifierModel, text_label_loss, text_losses_of_step

logger = logging.getLogger(__name__)

# Measures the model that is trained; `main` decides when it is best, larger is better.
Measure = Callable[[], Mapping[str, float]]

# What the numbers of a step's data stand for.
_WHAT = {"window": "Questions", "text": "Texts"}
# A GPU is given so many steps before the first one's loss is looked at, so that it never waits for the next.
_STEPS_AHEAD = 2


class TrainingError(ValueError):
    """Training cannot go on: the loss or its gradient is not a number."""


class _Taken(NamedTuple):
    """A step that has been taken, or that a GPU has been told to take.

    ``numbers``, of the loss of each pass and the gradient's norm, are on the host once ``arrived``.
    """

    step: int
    epoch: int
    indices: list[int]
    learning_rate: float
    numbers: Tensor
    arrived: torch.cuda.Event | None


class Trainer:
    """Trains a model in a folder; the same call goes on where an interrupted one stopped.

    Args:
        model: of `dtbert.weights.load_trainable` or `load_trainable_classifier`, on its device.
        data: the questions, or of a classifier the texts.
        options: how.
        folder: where checkpoints and metrics go; None in all processes but the first.
        tokenizer_folder: whose tokenizer goes along with the models.
        evaluate: measures the model during training; the ``"main"`` of what it returns decides which is best.
        teacher: from which the full model learns, with ``options.distillation``: of the same kind as the model. With
            ``options.bf16`` its weights become bfloat16. A CPU that only emulates bfloat16 computes in float32, which
            is logged.

    Attributes:
        step, num_steps: how many steps have been taken, and of how many.

    With torch.distributed initialised, each process takes every n-th window of a step, gradients are averaged, and the
    first process alone evaluates and writes. Data order, dropout and sub-models are functions of the seed, the step
    and the process, so on a CPU a run that goes on after an interruption, with as many processes and threads, ends
    with the same weights as one that was not interrupted; with more than two processes, within rounding.

    Raises:
        ValueError: a window does not fit into ``batch_tokens``, or the folder's checkpoint is damaged.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering | BertForSequenceClassification,
        data: TrainingData,
        options: TrainingOptions,
        folder: RunFolder | None,
        tokenizer_folder: Path,
        evaluate: Measure | None = None,
        teacher: SpanTeacher | TextTeacher | None = None,
    ) -> None:
        data.check_fits(options.batch_tokens)
        if (teacher is None) != (options.distillation is None):
            raise ValueError("a teacher and options.distillation go together: give both or neither")
        self.model, self.data, self.options = model, data, options
        self._folder, self._tokenizer_folder = folder, tokenizer_folder
        self._evaluate, self._teacher = evaluate, teacher
        distributed = dist.is_initialized()
        self._world, self._rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        self._trained = _passes_of(model, teacher, options)
        self._optimizer = _optimizer(self._trained, options)
        self._plan, self._lengths = _plan(data, options), data.lengths
        self.num_steps, self.step, self._best = len(self._plan), 0, -math.inf
        self._resume()
        narrow = options.bf16 and computes_natively(model.device, torch.bfloat16)
        if options.bf16 and not narrow:
            logger.warning(
                "bf16: this CPU has no instructions for products in bfloat16, a step of which takes some ten times as "
                "long as in float32: computed in float32"
            )
        self._narrow = NarrowWeights(self._trained) if narrow else None
        if teacher is not None and narrow:
            teacher.passes.bfloat16()
        self._module = self._computing

    def run(self, report: Callable[[dict[str, Any]], None] | None = None) -> bool:
        """Train to the end.

        Args:
            report: called after each step with its record, as it stands in ``metrics.jsonl``.

        Returns:
            False where there was nothing left to do.

        Raises:
            TrainingError: the loss or its gradient is NaN or infinite; the step and the questions are named, and the
                last checkpoint stays.
            OSError: a checkpoint cannot be written; the one before stays.
        """
        if self.step == self.num_steps and (self._folder is None or self._folder.has_model("last")):
            return False
        if self.step < self.num_steps and self._world > 1:
            self._module = DistributedDataParallel(self._computing)
        try:
            self._take_steps(report)
        finally:
            # DistributedDataParallel must go before its process group does. Its destructor, were it the last to hold
            # the group, would wait for gloo's thread under Python's lock, and the thread, now and then, for that lock.
            self._module = self._computing
        if self._folder is not None:
            self._folder.save_model("last", self.model, self._tokenizer_folder)
        return True

    @property
    def _computing(self) -> nn.Module:
        """What the passes go through."""
        return self._trained if self._narrow is None else self._narrow.module

    def _take_steps(self, report: Callable[[dict[str, Any]], None] | None) -> None:
        taken: deque[_Taken] = deque()
        ahead = _STEPS_AHEAD if self.model.device.type == "cuda" else 0
        clock = time.perf_counter()
        while self.step < self.num_steps:
            taken.append(self._take_step(*self._plan[self.step]))
            self.step += 1
            last = self.step == self.num_steps
            measures, saves = (
                last or self._is_due(every) for every in (self.options.eval_every, self.options.save_every)
            )
            while len(taken) > (0 if measures or saves else ahead):
                record = self._record(taken.popleft()) | {"seconds": time.perf_counter() - clock}
                if self._folder is not None:
                    if measures and not taken:
                        record |= self._measure(self._folder)
                    self._folder.log(record)
                    if saves and not taken:
                        self._save(self._folder)
                if report is not None:
                    report(record)
                clock = time.perf_counter()

    def _is_due(self, every: int) -> bool:
        if every == 0:
            return self._plan[self.step - 1][0] != self._plan[self.step][0]
        return self.step % every == 0

    def _take_step(self, epoch: int, indices: list[int]) -> _Taken:
        options = self.options
        # A process without a window of its own goes through the motions, for the others wait for it.
        own = indices[self._rank :: self._world]
        labelled = self.data.collate(own or indices[:1], self.model.device)
        weight = self._world / len(indices) if own else 0.0
        torch.manual_seed((options.seed * 1_000_003 + self.step) * 4099 + self._rank)
        drawn = []
        if options.length_drop is not None:
            drawn = sub_models(options.length_drop, self.model.config.num_hidden_layers, options.seed, self.step)
        rate = options.learning_rate_at(self.step, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        losses = self._backward(labelled, drawn, weight)
        if self._world > 1:
            # Each process's gradient counts for its part of the processes, for which the weight makes up.
            dist.all_reduce(losses)
            losses /= self._world
        norm = nn.utils.clip_grad_norm_(self._trained.parameters(), options.max_grad_norm)
        self._optimizer.step()
        if self._narrow is not None:
            self._narrow.refresh()
        numbers, arrived = torch.cat([losses, norm[None]]), None
        if numbers.is_cuda:
            numbers, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        return _Taken(self.step + 1, epoch, indices, rate, numbers, arrived)

    def _record(self, taken: _Taken) -> dict[str, Any]:
        """What is logged of a step; TrainingError where it went wrong."""
        if taken.arrived is not None:
            taken.arrived.synchronize()
        *losses, norm = taken.numbers.tolist()
        loss = sum(losses)
        if not math.isfinite(loss) or not math.isfinite(norm):
            ids = dict.fromkeys(self.data.id_of(index) for index in taken.indices)
            raise TrainingError(
                f"step {taken.step}: the loss is {loss}, its gradient's norm {norm}; the last checkpoint stays as "
                f"it is. Try a lower learning rate. {_WHAT[self.data.unit]}: {', '.join(ids)}"
            )
        record = {
            "step": taken.step,
            "epoch": taken.epoch,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": taken.learning_rate,
            "tokens": sum(self._lengths[index] for index in taken.indices),
        }
        return {**record, "full_loss": losses[0] * len(losses)} if len(losses) > 1 else record

    def _losses(self, labelled: Any, drawn: list[SubModel]) -> Iterator[Tensor]:
        options, module = self.options, self._module
        keep = None if self._teacher is None else self._teacher.distillation.keep
        backend = TrainingBackend(options.hidden_dropout, options.attention_dropout, keep=keep)
        if isinstance(self._trained, ClassifierModel):
            of_texts = self._teacher.loss if isinstance(self._teacher, TextTeacher) else text_label_loss
            return text_losses_of_step(module, labelled, backend, drawn, of_texts, options.sub_model_loss)
        full_loss = self._teacher.loss if isinstance(self._teacher, SpanTeacher) else _label_loss
        answer_loss = 0.0 if options.length_drop is None else options.length_drop.answer_loss
        return losses_of_step(module, labelled, backend, drawn, full_loss, options.sub_model_loss, answer_loss)

    def _backward(self, labelled: Any, drawn: list[SubModel], weight: float) -> Tensor:
        """The gradients of all passes; returns each pass's part of the loss."""
        module = self._module
        losses = self._losses(labelled, drawn)
        found = []
        for index in range(1 + len(drawn)):
            # Gradients travel once, with those of the last pass, in which no layer is left out.
            waits = index < len(drawn) and isinstance(module, DistributedDataParallel)
            with module.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = next(losses) * weight
                loss.backward()
            if self._narrow is not None and not waits:
                self._narrow.hand_over()
            found.append(loss.detach())
        return torch.stack(found)

    def _measure(self, folder: RunFolder) -> dict[str, float]:
        if self._evaluate is None:
            return {}
        self.model.eval()
        measured = dict(self._evaluate())
        self.model.train()
        if measured["main"] > self._best:
            self._best = measured["main"]
            folder.save_model("best", self.model, self._tokenizer_folder)
        return measured

    def _resume(self) -> None:
        state = None if self._folder is None else self._folder.load_state()
        if self._world > 1:
            shared = [state]
            dist.broadcast_object_list(shared)
            state = shared[0]
        if state is None:
            return
        self._trained.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self._best = state["step"], state["best"]

    def _save(self, folder: RunFolder) -> None:
        model, optimizer = self._trained.state_dict(), self._optimizer.state_dict()
        folder.save_state({"step": self.step, "best": self._best, "model": model, "optimizer": optimizer})


def _label_loss(full: Pass, labelled: LabelledBatch) -> Tensor:
    return span_loss(full.logits, labelled.batch.packing, labelled.starts, labelled.ends)


def _passes_of(
    model: BertForQuestionAnswering | BertForSequenceClassification,
    teacher: SpanTeacher | TextTeacher | None,
    options: TrainingOptions,
) -> SpanModel | ClassifierModel:
    projection = _projection(model, teacher, options.seed)
    passes: SpanModel | ClassifierModel
    if isinstance(model, BertForSequenceClassification):
        if options.length_drop is not None and options.length_drop.answer_loss:
            raise ValueError("a classifier has no span head: it is trained without an answer_loss")
        passes, head = ClassifierModel(model, projection), [model.pooler, model.classifier]
    else:
        passes, head = SpanModel(model, projection), [model.span]
    if teacher is not None:
        if isinstance(teacher, TextTeacher) != isinstance(passes, ClassifierModel):
            raise ValueError("the teacher of a classifier is a TextTeacher, that of a span head a SpanTeacher")
        # What no loss reaches must not be waited for by DistributedDataParallel.
        for part in head:
            part.requires_grad_(teacher.distillation.trains_head)
    return passes


def _projection(
    model: BertForQuestionAnswering | BertForSequenceClassification,
    teacher: SpanTeacher | TextTeacher | None,
    seed: int,
) -> nn.Linear | None:
    """From the student's width to the teacher's, where hidden states are compared and the widths differ."""
    if teacher is None or teacher.distillation.kind != "intermediate":
        return None
    widths = model.config.hidden_size, teacher.config.hidden_size
    if widths[0] == widths[1]:
        return None
    projection = nn.Linear(*widths)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        projection.weight.normal_(0, model.config.initializer_range, generator=generator)
        projection.bias.zero_()
    return projection.to(model.device)


def _optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One-dimensional parameters are biases and LayerNorms.
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def _plan(data: TrainingData, options: TrainingOptions) -> list[tuple[int, list[int]]]:
    """The epoch and the windows of each step."""
    plan: list[tuple[int, list[int]]] = []
    for epoch in range(math.ceil(options.epochs)):
        batches = data.batches(options.batch_tokens, options.seed, epoch)
        part = min(1.0, options.epochs - epoch)
        plan += [(epoch, batch) for batch in batches[: max(1, round(part * len(batches)))]]
    return plan
