"""The work of each question, by what the layers kept of its windows."""

from collections.abc import Sequence

import torch

from dtbert.model import AdaptivePolicy, LayerKept, Macs
from dtbert.qa import Prepared, QuestionAnswerer
from dtbert.qa.answering import Watch
from dtbert.qa.windows import Example, Part


class KeptWork:
    """Multiply-accumulates of questions as they are answered.

    Attributes:
        of_questions: of each that could be read, the sum over its windows.
    """

    def __init__(self, answerer: QuestionAnswerer, policy: AdaptivePolicy) -> None:
        self._answerer, self._policy = answerer, policy.resolve(answerer.own_scorer)
        self.of_questions: list[Macs] = []

    def watch(self, prepared: Prepared) -> Watch:
        """What `answer_prepared` tells of these questions, which come after those before."""
        examples = [one for one in prepared.examples if isinstance(one, Example)]
        first = len(self.of_questions)
        self.of_questions += [Macs(0, 0)] * len(examples)
        config = self._answerer.config
        with torch.inference_mode():  # as it answers
            backend = self._answerer.model.backend_name

        def add(parts: Sequence[Part], kept: Sequence[LayerKept]) -> None:
            for part, lengths in zip(parts, zip(*(layer.lengths for layer in kept), strict=True), strict=True):
                question = len(examples[part.row].question.ids) + 2
                macs = self._policy.macs_of_kept(
                    config, part.num_tokens, lengths, question_length=question, backend=backend
                )
                before = self.of_questions[first + part.row]
                self.of_questions[first + part.row] = Macs(*map(sum, zip(before, macs, strict=True)))

        return add
