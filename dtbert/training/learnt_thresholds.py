"""Thresholds learnt by gradient: masks are soft while they learn, and hard when they are used (Kim et al. 2021).

The soft model keeps a part of each token: the sigmoid of how far the logarithm of its share is above that of the
layer's threshold, over a temperature, times what the layers before kept. By that part others attend to it, and its
state is the layer's output, for the rest the one that entered. As the temperature falls it becomes the hard model,
dropped tokens' restored states included. Learned Token Pruning's soft model (section 3.3) takes shares as they are, and
scales the output; scorers' shares differ by orders of magnitude, so that here their logarithms are compared. The
weights stay as they are: they learn to do without tokens by LengthDrop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtbert.kernels import Backend
from dtbert.kernels.reference import attention_logits, score_of, split_heads
from dtbert.model import BertConfig, BertForQuestionAnswering, PackedBatch, SpanLogits, Threshold
from dtbert.model.layer import Layer
from dtbert.model.scorers import LayerView, Text, scorer_named
from dtbert.training.losses import distillation_loss

# A layer's threshold begins where this part of the tokens lies below.
_FIRST_DROPPED = 0.1
# Its logarithm is that of nothing.
_NOTHING = 1e-30


@dataclass(frozen=True)
class ThresholdLearning:
    """How thresholds are learnt.

    Attributes:
        work_weight: of the soft model's multiply-accumulates, as a part of the full model's, beside the cross-entropy
            of the full model's answer against its own: the higher, the more tokens go.
        steps: of Adam.
        windows: of each step.
        learning_rate: of the thresholds' logarithms.
        temperature: of the logarithms of shares.

    Raises:
        ValueError: a number that is not above 0.
    """

    work_weight: float
    steps: int = 60
    windows: int = 8
    learning_rate: float = 0.1
    temperature: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")


class SoftPass:
    """What the soft model makes of one sequence of n tokens.

    Attributes:
        logits: ``[n]`` each.
        left: by layer, the parts of the tokens that leave it, ``[n]``.
        log_shares: by layer, of the tokens that enter it, ``[n]``.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering,
        batch: PackedBatch,
        policy: Threshold,
        log_thresholds: Tensor,
        temperature: float,
    ) -> None:
        self._backend, self._text, self._policy = Backend(), Text(batch), policy
        self._span_head = model.span_head(self._backend)
        self.left: list[Tensor] = []
        self.log_shares: list[Tensor] = []
        asks, first = batch.token_type_ids == 0, batch.position_ids == 0
        states = self._backend.embed(batch.ids, model.encoder.embeddings)
        entered = states.new_ones(len(states))
        of_layers = zip(model.encoder.layers, log_thresholds, policy.keeps_question, strict=True)
        for layer, log_threshold, keep_question in of_layers:
            assert isinstance(layer, Layer)
            forced = (asks & keep_question) | (first & policy.keep_cls)
            output, log_shares = self._layer(layer, states, entered)
            mask = torch.sigmoid((log_shares - log_threshold) / temperature).masked_fill(forced, 1.0)
            entered = entered * mask
            states = torch.lerp(states, output, entered[:, None])
            self.left.append(entered)
            self.log_shares.append(log_shares)
        self.logits = SpanLogits(*self._span_head(states).unbind(1))

    def _layer(self, layer: Layer, states: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
        """The output for all tokens, and the logarithms of their shares."""
        backend, packing = self._backend, self._text.batch.packing
        qkv = backend.linear(states, layer.qkv)
        query, key, value = split_heads(qkv, layer.num_heads)
        log_entered = entered.clamp_min(_NOTHING).log()
        attention = (attention_logits(query, key) + log_entered).softmax(-1)
        context = (attention @ value).transpose(0, 1).flatten(1)
        scorer = scorer_named(self._policy.scorers[layer.index])
        if scorer.attention is not None:
            asking = attention * entered[None, :, None]
            scores = score_of(scorer.attention, asking, value, self._text.batch.token_type_ids)
        else:
            at_hand = layer.index, states, qkv, packing, layer.num_heads, self._text, None
            scores = scorer.function(LayerView(*at_hand, backend, self._span_head))
        log_shares = scores if scorer.logarithmic else scores.clamp_min(_NOTHING).log()
        if scorer.attention is None:
            log_shares = log_shares + log_entered
        states = backend.add_norm(context, layer.attention_output, states, layer.attention_norm)
        wide = backend.linear(states, layer.intermediate, layer.activation)
        return backend.add_norm(wide, layer.output, states, layer.output_norm), log_shares.log_softmax(0)


def soft_work(left: Sequence[Tensor], config: BertConfig) -> Tensor:
    """Multiply-accumulates of the layers with parts of tokens, over those with all tokens."""
    d, f, n = config.hidden_size, config.intermediate_size, len(left[0])
    before, work = left[0].new_tensor(float(n)), left[0].new_zeros(())
    for parts in left:
        kept = parts.sum()
        work = work + (3 * before + kept) * d * d + 2 * kept * d * f + 2 * before * before * d
        before = kept
    return work / (len(left) * (4 * n * d * d + 2 * n * d * f + 2 * n * n * d))


def learn_thresholds(
    model: BertForQuestionAnswering, windows: Sequence[PackedBatch], start: Threshold, options: ThresholdLearning
) -> Threshold:
    """The policy with the thresholds that a model learns on windows of its own.

    Args:
        model: whose weights stay as they are; its answers with all tokens are what is learnt.
        windows: of one sequence each; taken in turn.
        start: all but its thresholds: scorer, what is always kept; floors and ceilings have no part while it learns.
        options: how.

    Raises:
        ValueError: there are no windows, the policy is not of as many layers as the model, or has more than thresholds,
            a scorer and what is kept.
    """
    if not windows:
        raise ValueError("there are no windows to learn thresholds on")
    start.check_layers(model.config.num_hidden_layers)
    if start.remembers or start.skip_layers:
        raise ValueError("thresholds are learnt of scores of a layer's own, with no layer left out")
    log_thresholds = _first(model, windows[: options.windows], start).requires_grad_()
    optimizer = torch.optim.Adam([log_thresholds], lr=options.learning_rate)
    said: dict[int, SpanLogits] = {}
    for step in range(options.steps):
        optimizer.zero_grad()
        for number in range(step * options.windows, (step + 1) * options.windows):
            number %= len(windows)
            batch = windows[number]
            if number not in said:
                with torch.no_grad():
                    said[number] = model.forward_packed(batch, backend=Backend())
            with torch.enable_grad():
                soft = SoftPass(model, batch, start, log_thresholds, options.temperature)
                loss = distillation_loss(soft.logits, said[number], batch.packing)
                loss = loss + options.work_weight * soft_work(soft.left, model.config)
                (loss / options.windows).backward()
        optimizer.step()
    shares = log_thresholds.detach().exp().clamp_max(0.5).tolist()
    return Threshold(
        tuple(float(f"{share:.4g}") for share in shares),
        scorer=start.scorer,
        keep_cls=start.keep_cls,
        keep_question=start.keep_question,
        floor=start.floor,
        ceiling=start.ceiling,
    )


@torch.no_grad()
def _first(model: BertForQuestionAnswering, windows: Sequence[PackedBatch], start: Threshold) -> Tensor:
    """Logarithms of thresholds below which a tenth of the tokens lies where nothing is dropped."""
    nothing = torch.full((start.num_layers,), -torch.inf, device=model.device)
    shares = [SoftPass(model, batch, start, nothing, 1.0).log_shares for batch in windows]
    return torch.stack([torch.cat(layer).float().quantile(_FIRST_DROPPED) for layer in zip(*shares, strict=True)])
