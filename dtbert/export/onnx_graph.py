"""A model and a schedule as an ONNX graph for one sequence: a BERT's dozen operators, written one by one.

Dropped tokens are gathered away, so that whatever runs the graph is spared their work. All operators are those of the
standard, of opset 20, in float32; `Backend` says what each step is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dtbert.kernels.overlap import OVERLAP_REACH, OVERLAP_UNIT
from dtbert.model import BertForQuestionAnswering, LengthSchedule
from dtbert.model.padded import schedule_of_lengths
from dtbert.model.policy import Policy
from dtbert.weights.quantize import is_quantizable, quantize_rows

OPSET = 20
# Of the file's form: the first that has this opset.
_IR_VERSION = 9

INPUTS = ("input_ids", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")


def onnx_graph(model: BertForQuestionAnswering, policy: Policy | None = None, *, int8: bool = False) -> onnx.ModelProto:
    """The graph: ``input_ids`` and ``token_type_ids``, int64 ``[1, n]``, to start and end logits, float32 ``[1, n]``.

    Args:
        model: on a CPU or not, its weights in any layout.
        policy: tokens that each layer keeps; all by default.
        int8: hold matrices in 8 bits with a scale per row; they are computed with in float32.

    Raises:
        ValueError: a scorer or a policy that the graph cannot compute, a schedule for another number of layers, or a
            model that computes in int8 or fp8.
    """
    if model.product_dtype != model.dtype:
        name = str(model.product_dtype).removeprefix("torch.")
        raise ValueError(
            f"the model computes in {name}, an ONNX file in float32: load it in another dtype; int8=True (`--int8`) "
            "holds its matrices in 8 bits"
        )
    schedule = schedule_of_lengths("an ONNX file", policy)
    if schedule is not None:
        schedule = schedule.resolve(model.config.own_scorer)
        schedule.check_layers(model.config.num_hidden_layers)
        check_scorers(schedule)
    return _Network(model, schedule, int8).model()


def check_scorers(schedule: LengthSchedule) -> None:
    """Raise ValueError where a layer drops by a scorer that the graph cannot compute."""
    missing = sorted(set(schedule.scorers) - set(_SCORERS))
    if missing:
        raise ValueError(
            f"an ONNX file cannot compute the scorer {', '.join(map(repr, missing))}: choose a schedule with one of "
            f"{', '.join(_SCORERS)}"
        )


class _Writer:
    """Nodes and constants; the same operator on the same inputs is one node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._outputs: dict[str, list[str]] = {}
        self._constants: dict[str, onnx.TensorProto] = {}

    @property
    def constants(self) -> list[onnx.TensorProto]:
        return list(self._constants.values())

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node of one output."""
        return self.ops(kind, 1, *inputs, name=name, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, name: str = "", **attributes: Any) -> list[str]:
        """The outputs of a node."""
        key = repr((kind, inputs, name, attributes))
        if key not in self._outputs:
            first = name or f"{kind}_{len(self.nodes)}"
            self._outputs[key] = [first, *(f"{first}.{number}" for number in range(1, outputs))]
            self.nodes.append(helper.make_node(kind, inputs, self._outputs[key], name=first, **attributes))
        return self._outputs[key]

    def constant(self, name: str, values: NDArray[Any]) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(f"int64{list(values)}", np.array(values, np.int64))

    def number(self, value: float, dtype: type[np.generic] = np.float32) -> str:
        """A scalar."""
        return self.constant(f"{dtype.__name__}({value})", np.array(value, dtype))


class _Network(_Writer):
    """The graph of a model, which reads downward in the order it runs; what passes between is names.

    Attributes:
        rows: where the tokens that are left stand in the sequence, int64 ``[n]``; None while all are left.
        final: logits of all tokens, ``[n0, 2]``, of which those of dropped tokens stay; None while none is dropped.
    """

    def __init__(self, model: BertForQuestionAnswering, schedule: LengthSchedule | None, int8: bool) -> None:
        super().__init__()
        self.config, self._schedule, self._int8 = model.config, schedule, int8
        self._values = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
        self.ids, self.segments = (self.op("Squeeze", name, self.ints(0)) for name in INPUTS)
        self.length = self.op("Shape", self.ids)
        bounds = self.number(0, np.int64), self.op("Squeeze", self.length, self.ints(0)), self.number(1, np.int64)
        self.positions = self.op("Range", *bounds)
        lengths = range(1, model.config.max_position_embeddings + 1)
        kept = [() if schedule is None else schedule.lengths(length) for length in lengths]
        # By layer, the first column what enters the first one; a sequence of 0 tokens does not exist.
        self._lengths = np.array([[n, *after] for n, after in zip(lengths, kept, strict=True)]).T
        self.rows: str | None = None
        self.final: str | None = None

    def model(self) -> onnx.ModelProto:
        """The whole."""
        states = self.embed()
        skipped = () if self._schedule is None else self._schedule.skip_layers
        for layer in range(self.config.num_hidden_layers):
            if layer not in skipped:
                states = self.layer(states, layer)
        logits = self.restored(self.span(states))
        columns = self.ops("Split", 2, self.op("Transpose", logits, perm=[1, 0]), axis=0, num_outputs=2)
        for name, column in zip(OUTPUTS, columns, strict=True):
            self.op("Identity", column, name=name)
        shape: list[int | str] = [1, "tokens"]
        graph = helper.make_graph(
            self.nodes,
            "dtbert",
            [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in INPUTS],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in OUTPUTS],
            self.constants,
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, producer_name="dtbert", opset_imports=[opset], ir_version=_IR_VERSION)

    def embed(self) -> str:
        tables = {"word": self.ids, "token_type": self.segments, "position": self.positions}
        word, token_type, position = (self.rows_of(f"encoder.embeddings.{name}", ids) for name, ids in tables.items())
        return self.norm(self.op("Add", self.op("Add", word, token_type), position), "encoder.embeddings.norm")

    def layer(self, states: str, index: int) -> str:
        """States ``[n, H]`` of the tokens that are left to those of the tokens that the layer keeps."""
        config, name = self.config, f"encoder.layers.{index}"
        heads = self.ints(0, config.num_attention_heads, config.head_size)
        query, key, value = self.ops("Split", 3, self.linear(states, f"{name}.qkv"), axis=1, num_outputs=3)
        query = self.op("Mul", query, self.number(config.head_size**-0.5))
        query = self.op("Transpose", self.op("Reshape", query, heads), perm=[1, 0, 2])  # [N, n, D]
        key = self.op("Transpose", self.op("Reshape", key, heads), perm=[1, 2, 0])  # [N, D, n]
        value = self.op("Transpose", self.op("Reshape", value, heads), perm=[1, 0, 2])  # [N, n, D]
        if self.drops_at(index):
            probabilities, states = self.drop(_View(index, states, query, key))
        else:
            probabilities = self.attention(query, key)
        context = self.op("Transpose", self.op("MatMul", probabilities, value), perm=[1, 0, 2])
        context = self.op("Reshape", context, self.ints(0, config.hidden_size))
        summed = self.op("Add", self.linear(context, f"{name}.attention_output"), states)
        states = self.norm(summed, f"{name}.attention_norm")
        wide = self.activate(self.linear(states, f"{name}.intermediate"))
        return self.norm(self.op("Add", self.linear(wide, f"{name}.output"), states), f"{name}.output_norm")

    def attention(self, query: str, key: str) -> str:
        """Probabilities ``[N, q, n]``."""
        return self.op("Softmax", self.op("MatMul", query, key), axis=-1)

    def span(self, states: str) -> str:
        """Start and end logits side by side, ``[n, 2]``."""
        return self.linear(states, "span")

    def drops_at(self, layer: int) -> bool:
        """Whether the layer keeps fewer tokens of a sequence of any length than the one before."""
        return self._schedule is not None and not np.array_equal(*self._lengths[layer : layer + 2])

    def drop(self, view: "_View") -> tuple[str, str]:
        """Attention of the tokens that a layer keeps, and the states with which these entered it.

        From here on the others' logits are final: those of the states that entered the layer.
        """
        assert self._schedule is not None
        significance = self.preferred(_SCORERS[self._schedule.scorers[view.layer]](self, view), view.layer)
        lengths = self.constant(f"lengths.{view.layer}", np.append(0, self._lengths[view.layer + 1]))
        count = self.op("Gather", lengths, self.length)
        _, chosen = self.ops("TopK", 2, significance, count)  # ties to the lower place, by the standard
        kept, _ = self.ops("TopK", 2, chosen, count, largest=0)  # ascending
        if self._schedule.scorers[view.layer] == "received":
            probabilities = self.op("Gather", self.attention(view.query, view.key), kept, axis=1)
        else:
            probabilities = self.attention(self.op("Gather", view.query, kept, axis=1), view.key)
        self.final = self.restored(self.span(view.states))
        self.rows = kept if self.rows is None else self.op("Gather", self.rows, kept)
        return probabilities, self.op("Gather", view.states, kept)

    def preferred(self, significance: str, layer: int) -> str:
        """Infinite at tokens that stay whatever their score."""
        assert self._schedule is not None
        keep_question = self._schedule.keeps_question[layer]
        for keep, of_all in ((keep_question, self.segments), (self._schedule.keep_cls, self.positions)):
            if keep:
                first = self.op("Equal", self.left(of_all), self.number(0, np.int64))
                significance = self.op("Where", first, self.number(np.inf), significance)
        return significance

    def left(self, of_all: str) -> str:
        """What a vector over the whole sequence holds for the tokens that are left."""
        return of_all if self.rows is None else self.op("Gather", of_all, self.rows)

    def restored(self, logits: str) -> str:
        """The logits of all tokens, from those of the tokens that are left."""
        if self.rows is None or self.final is None:
            return logits
        return self.op("ScatterND", self.final, self.op("Unsqueeze", self.rows, self.ints(1)), logits)

    def overlap(self) -> str:
        """`Backend.question_overlap` of the whole sequence, exact: sums of whole numbers in float64."""
        zero, one = self.number(0, np.int64), self.ints(1)
        asked = self.op("Cast", self.op("Equal", self.segments, zero), to=TensorProto.DOUBLE)
        before, after = self.op("Pad", asked, self.ints(1, -1)), self.op("Pad", asked, self.ints(-1, 1))
        asks = self.op("Mul", asked, self.op("Mul", before, after))  # all of the question but its ends
        told = self.op("Sub", self.number(1, np.float64), asked)
        same = self.op("Equal", self.op("Unsqueeze", self.ids, one), self.ids)
        same = self.op("Cast", same, to=TensorProto.DOUBLE)  # [n, n]
        unit = self.number(OVERLAP_UNIT, np.float64)
        places = self.op("Max", self.op("MatMul", same, told), self.number(1, np.float64))
        share = self.op("Floor", self.op("Div", unit, places))
        wanted = self.op("Greater", self.op("MatMul", same, asks), self.number(0, np.float64))
        share = self.op("Mul", self.op("Mul", share, told), self.op("Cast", wanted, to=TensorProto.DOUBLE))
        distance = self.op("Abs", self.op("Sub", self.op("Unsqueeze", self.positions, one), self.positions))
        nearness = self.op("Max", self.op("Sub", self.number(OVERLAP_REACH, np.int64), distance), zero)
        near = self.op("MatMul", self.op("Cast", nearness, to=TensorProto.DOUBLE), share)
        scale = self.number(OVERLAP_REACH * OVERLAP_UNIT)
        return self.op("Div", self.op("Cast", near, to=TensorProto.FLOAT), scale)

    def linear(self, x: str, name: str) -> str:
        """``x @ weight.T + bias``."""
        weight = self._values[f"{name}.weight"]
        if self._int8 and is_quantizable(tuple(weight.shape)):
            values, scale = quantize_rows(weight)
            # Made float32 once, when the file is loaded: a runtime may run DequantizeLinear anew for each text.
            stored = self.op("Cast", self.constant(f"{name}.int8", values.T.numpy()), to=TensorProto.FLOAT)
            matrix = self.op("Mul", stored, self.constant(f"{name}.scale", scale.float().numpy()))
        else:
            matrix = self.constant(f"{name}.weight", weight.T.numpy())
        return self.op("Add", self.op("MatMul", x, matrix), self.vector(f"{name}.bias"))

    def rows_of(self, name: str, ids: str) -> str:
        """Rows of a table."""
        table = self._values[name]
        if self._int8 and is_quantizable(tuple(table.shape)):
            values, scale = quantize_rows(table)
            found = self.op(
                "Cast", self.op("Gather", self.constant(f"{name}.int8", values.numpy()), ids), to=TensorProto.FLOAT
            )
            scales = self.constant(f"{name}.scale", scale.float()[:, None].numpy())
            return self.op("Mul", found, self.op("Gather", scales, ids))
        return self.op("Gather", self.constant(name, table.numpy()), ids)

    def norm(self, x: str, name: str) -> str:
        weights = self.vector(f"{name}.weight"), self.vector(f"{name}.bias")
        return self.op("LayerNormalization", x, *weights, axis=-1, epsilon=self.config.layer_norm_eps)

    def vector(self, name: str) -> str:
        return self.constant(name, self._values[name].numpy())

    def activate(self, x: str) -> str:
        activation = self.config.activation
        if activation == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if activation == "relu":
            return self.op("Relu", x)
        return self.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")


class _View(NamedTuple):
    """What a layer has at hand when it chooses: states ``[n, H]``, queries ``[N, n, D]``, keys ``[N, D, n]``."""

    layer: int
    states: str
    query: str
    key: str


def _received(network: _Network, view: _View) -> str:
    return network.op("ReduceSum", network.attention(view.query, view.key), network.ints(0, 1), keepdims=0)


def _cls(network: _Network, view: _View) -> str:
    first = network.op("Gather", view.query, network.ints(0), axis=1)
    return network.op("ReduceSum", network.attention(first, view.key), network.ints(0, 1), keepdims=0)


def _answer(network: _Network, view: _View) -> str:
    return network.op("ReduceMax", network.span(view.states), network.ints(1), keepdims=0)


def _overlap(network: _Network, view: _View) -> str:
    return network.left(network.overlap())


def _answer_overlap(network: _Network, view: _View, weight: float = 2.0) -> str:
    log_overlap = network.op("Log", network.op("Add", network.overlap(), network.number(0.1)))
    weighed = network.op("Mul", log_overlap, network.number(weight))
    return network.op("Add", _answer(network, view), network.left(weighed))


# Those of `dtbert.model.scorers` that are a few operators: a name of float32 [n].
_SCORERS: dict[str, Callable[[_Network, _View], str]] = {
    "received": _received,
    "cls": _cls,
    "answer": _answer,
    "overlap": _overlap,
    "answer_overlap": _answer_overlap,
    "answer_overlap_3": partial(_answer_overlap, weight=3.0),
}
