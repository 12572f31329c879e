"""The training loop: resumable, on one device or several."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtbert.model import BertForQuestionAnswering
from dtbert.training.backend import TrainingBackend
from dtbert.training.checkpoint import RunFolder
from dtbert.training.data import LabelledBatch, TrainingSet
from dtbert.training.length_drop import LengthDrop
from dtbert.training.losses import DistillationLoss
from dtbert.training.step import SpanModel, losses_of_step

# Measures the model as it is now; `main` decides which model is best, larger is better.
Evaluator = Callable[[BertForQuestionAnswering], Mapping[str, float]]


class TrainingError(ValueError):
    """Training cannot go on: the loss or its gradient is not a number."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: passes over the data; parts of one are allowed.
        batch_tokens: tokens of a step, over all devices.
        learning_rate: the highest, after the warm-up; it falls to 0 linearly.
        warmup: part of all steps in which it rises.
        weight_decay: decoupled; none on biases and LayerNorm.
        max_grad_norm: longer gradients are scaled to this length.
        hidden_dropout, attention_dropout: probabilities.
        seed: of data order, dropout and sub-models.
        length_drop: how sub-models are drawn; None for plain fine-tuning.
        distillation: how sub-models learn from the full model (`dtbert.training.losses.distillation_loss`).
        save_every: steps between checkpoints.
        eval_every: steps between evaluations; 0: at the end of each epoch.
        bf16: autocast to bfloat16.
    """

    epochs: float = 2.0
    batch_tokens: int = 6144
    learning_rate: float = 3e-5
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    seed: int = 0
    length_drop: LengthDrop | None = None
    distillation: DistillationLoss = "cross_entropy"
    save_every: int = 100
    eval_every: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 0, math.inf),
            ("batch_tokens", 0, math.inf),
            ("learning_rate", 0, math.inf),
            ("max_grad_norm", 0, math.inf),
            ("save_every", 0, math.inf),
        ):
            if not low < getattr(self, name) < high:
                raise ValueError(f"{name} must be above {low}, not {getattr(self, name)}")
        for name in ("warmup", "hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("weight_decay", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.length_drop is not None:
            self.length_drop.check()


@dataclass
class _Progress:
    step: int = 0
    best: float = -math.inf
    history: list[float] = field(default_factory=list)


class Trainer:
    """Trains a span-answering model in a folder; the same call goes on where an interrupted one stopped.

    Args:
        model: of `dtbert.weights.load_trainable`, on its device.
        data: the questions.
        options: how.
        folder: where checkpoints and metrics go.
        tokenizer_folder: whose tokenizer goes along with the models.
        evaluate: measures the model during training; the ``"main"`` of what it returns decides which is best.

    With torch.distributed initialised, each process takes every n-th window of a step, and gradients are averaged.
    Data order, dropout and sub-models are functions of the seed and the step, so a run that goes on after an
    interruption, with as many processes and threads, ends with the same weights as one that was not interrupted.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering,
        data: TrainingSet,
        options: TrainingOptions,
        folder: RunFolder,
        tokenizer_folder: Path,
        evaluate: Evaluator | None = None,
    ) -> None:
        self.model, self.data, self.options, self.folder = model, data, options, folder
        self._tokenizer_folder, self._evaluate = tokenizer_folder, evaluate
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._module: nn.Module = SpanModel(model)
        if self._world > 1:
            self._module = DistributedDataParallel(self._module)
        self._optimizer = _optimizer(model, options)
        self._plan = _plan(data, options)
        self._progress = _Progress()

    @property
    def num_steps(self) -> int:
        return len(self._plan)

    @property
    def step(self) -> int:
        """Steps that have been taken."""
        return self._progress.step

    def run(self, report: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train to the end.

        Args:
            report: called after each step with its record, as it stands in ``metrics.jsonl``.

        Raises:
            TrainingError: the loss or its gradient is NaN or infinite; the step and the questions are named, and the
                last checkpoint stays.
            OSError: a checkpoint cannot be written; the one before stays.
        """
        self._resume()
        while self.step < self.num_steps:
            start = time.perf_counter()
            record = self._step(self._plan[self.step])
            self._progress.step += 1
            record = {"step": self.step, **record, "seconds": time.perf_counter() - start}
            last = self.step == self.num_steps
            if last or self._is_due(self.options.eval_every):
                record |= self._measure()
            if self._rank == 0:
                self.folder.log(record)
            if last or self._is_due(self.options.save_every):
                self._save()
            if report is not None:
                report(record)
        if self._rank == 0:
            self.folder.save_model("last", self.model, self._tokenizer_folder)

    def _is_due(self, every: int) -> bool:
        if every == 0:
            epoch_now, epoch_next = (self._plan[index][0] for index in (self.step - 1, self.step))
            return epoch_now != epoch_next
        return self.step % every == 0

    def _step(self, place: tuple[int, list[int]]) -> dict[str, Any]:
        epoch, indices = place
        options = self.options
        device = self.model.device
        labelled = self.data.collate(indices[self._rank :: self._world] or indices[:1], device)
        # A process without a window of its own goes through the motions, for the others wait for it.
        weight = self._world / len(indices) if indices[self._rank :: self._world] else 0.0
        backend = TrainingBackend(options.hidden_dropout, options.attention_dropout)
        torch.manual_seed((options.seed * 1_000_003 + self.step) * 4099 + self._rank)
        sub_models = []
        if options.length_drop is not None:
            layers = self.model.config.num_hidden_layers
            sub_models = options.length_drop.sub_models(layers, options.seed, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.num_steps, options)
        self._optimizer.zero_grad(set_to_none=True)
        losses = self._backward(labelled, backend, sub_models, weight)
        summed = torch.stack(losses).sum()
        if self._world > 1:
            # DistributedDataParallel averages gradients over processes, which the weight makes up for.
            dist.all_reduce(summed)
        loss = summed.item() / self._world
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss}, its gradient's norm {norm.item()}; the last checkpoint "
                f"stays as it is. Try a lower learning rate. Questions: {', '.join(dict.fromkeys(labelled.ids))}"
            )
        self._optimizer.step()
        return {
            "epoch": epoch,
            "loss": loss,
            "gradient_norm": norm.item(),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "tokens": sum(self.data.parts[index].num_tokens for index in indices),
        }

    def _backward(
        self, labelled: LabelledBatch, backend: TrainingBackend, sub_models: list[Any], weight: float
    ) -> list[Tensor]:
        found = []
        device = self.model.device.type
        losses: Iterable[Tensor] = losses_of_step(
            self._module, labelled, backend, sub_models, self.options.distillation
        )
        iterator = iter(losses)
        for index in range(1 + len(sub_models)):
            last = index == len(sub_models)
            # Gradients travel once, with those of the last pass, in which no layer is left out.
            module = self._module
            with nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync():
                with torch.autocast(device, torch.bfloat16, enabled=self.options.bf16):
                    loss = next(iterator) * weight
                loss.backward()
            found.append(loss.detach())
        return found

    def _measure(self) -> dict[str, float]:
        if self._evaluate is None or self._rank != 0:
            return {}
        self.model.eval()
        measured = dict(self._evaluate(self.model))
        self.model.train()
        if measured["main"] > self._progress.best:
            self._progress.best = measured["main"]
            self.folder.save_model("best", self.model, self._tokenizer_folder)
        return measured

    def _resume(self) -> None:
        state = self.folder.load_state(self.model.device) if self._rank == 0 or self._world == 1 else None
        if self._world > 1:
            shared = [state]
            dist.broadcast_object_list(shared)
            state = shared[0]
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._progress.step, self._progress.best = state["step"], state["best"]

    def _save(self) -> None:
        if self._rank != 0:
            return
        self.folder.save_state(
            {
                "step": self.step,
                "best": self._progress.best,
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
            }
        )


def learning_rate(step: int, num_steps: int, options: TrainingOptions) -> float:
    """Linear warm-up, then linear decay to 0 at ``num_steps``."""
    warmup = options.warmup * num_steps
    if step < warmup:
        return options.learning_rate * (step + 1) / (warmup + 1)
    return options.learning_rate * (num_steps - step) / max(1.0, num_steps - warmup)


def _optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    # One-dimensional parameters are biases and LayerNorms.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def _plan(data: TrainingSet, options: TrainingOptions) -> list[tuple[int, list[int]]]:
    """The epoch and the windows of each step."""
    plan: list[tuple[int, list[int]]] = []
    for epoch in range(math.ceil(options.epochs)):
        batches = data.batches(options.batch_tokens, options.seed, epoch)
        part = min(1.0, options.epochs - epoch)
        plan += [(epoch, batch) for batch in batches[: max(1, round(part * len(batches)))]]
    return plan


def describe(options: TrainingOptions) -> dict[str, Any]:
    """The options as plain values, for ``run.json``."""
    fields = asdict(options)
    if options.length_drop is not None:
        fields["length_drop"] = {**options.length_drop._asdict(), "scorers": list(options.length_drop.scorers)}
    return fields
