"""The network: embeddings, then layers that may drop tokens; dropped tokens are restored at the end."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from dtbert.kernels import Backend, Packing
from dtbert.kernels.parameters import Embeddings
from dtbert.model.batch import PackedBatch
from dtbert.model.config import BertConfig
from dtbert.model.layer import Layer, TokensLeft
from dtbert.model.policy import Policy
from dtbert.model.scorers import SpanHead


class PackedEncoding(NamedTuple):
    """What the encoder makes of a packed batch.

    ``states`` are ``[T, H]``, dropped tokens restored, or ``[K, H]`` of those that are left where nothing is restored,
    and ``packing`` is theirs; ``kept`` holds, per layer, int64 rows of the packed batch that left that layer, or None
    where nothing had been dropped so far; ``hidden_states``, on request, the input of the first layer and the output of
    each, of the tokens that were left; ``significance``, on request, per layer what its tokens scored, as `TokensLeft`
    holds it, or None where it dropped nothing; ``lengths``, per layer, how many tokens of each sequence left it.
    """

    states: Tensor
    packing: Packing
    kept: tuple[Tensor | None, ...]
    hidden_states: tuple[Tensor, ...]
    lengths: tuple[tuple[int, ...], ...]
    significance: tuple[Tensor | None, ...] = ()


class Encoder(nn.Module):
    """Embeddings and layers over packed batches, with drop-and-restore.

    ``skip_layers`` are passed by, as are the policy's own.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            config.hidden_size,
            config.layer_norm_eps,
        )
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))

    def forward(
        self,
        batch: PackedBatch,
        schedule: Policy | None = None,
        *,
        backend: Backend,
        span_head: SpanHead | None = None,
        keep_hidden_states: bool = False,
        skip_layers: Collection[int] = (),
        targets: Sequence[Packing] | None = None,
        output_kept: bool = False,
        restores: bool = True,
    ) -> PackedEncoding:
        """Encode; arguments that are not explained here are those of `TokensLeft`."""
        asked = span_head, keep_hidden_states, targets, output_kept, restores
        tokens = TokensLeft(batch, schedule, len(self.layers), backend, *asked)
        states = backend.embed(batch.ids, self.embeddings)
        hidden_states, kept, lengths = [states], [], []
        skipped = {*skip_layers, *(() if schedule is None else schedule.skip_layers)}
        for index, layer in enumerate(self.layers):
            if index not in skipped:
                states = layer(states, tokens, backend)
            kept.append(tokens.rows)
            lengths.append(tokens.left.packing.seqlens)
            if keep_hidden_states:
                hidden_states.append(states)
        scores = () if tokens.significance is None else map(tokens.significance.get, range(len(self.layers)))
        outputs = tuple(hidden_states) if keep_hidden_states else ()
        packing = batch.packing if restores else tokens.left.packing
        return PackedEncoding(tokens.restore(states), packing, tuple(kept), outputs, tuple(lengths), tuple(scores))
