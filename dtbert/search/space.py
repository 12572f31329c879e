"""The schedules that a search chooses from, as parameters of an Optuna trial."""

from dataclasses import dataclass
from typing import Any

from optuna import Trial

from dtbert.model import LengthSchedule

# A layer keeps at least this part of the tokens that reach it, and of the sequence: 2 tokens of a window of 384.
LEAST_KEPT = 0.05
LEAST_RATIO = 0.005
# Above 1 the draw means "keep all", so that layers that drop nothing, which cost no scoring, are tried often.
_TOP = 1.1


@dataclass(frozen=True)
class SearchSpace:
    """Schedules of ratios: each layer keeps a factor of what reached it, so that lengths never grow.

    A factor is drawn as its cube, uniformly, so that gentle drops are tried more often than harsh ones.

    Attributes:
        num_layers: of the model.
        scorers: names to choose from; one scorer serves all layers of a schedule.
        keep_question: whether to keep the question first: the choices.
    """

    num_layers: int
    scorers: tuple[str, ...]
    keep_question: tuple[bool, ...] = (False, True)

    def __post_init__(self) -> None:
        if not self.scorers or not self.keep_question:
            raise ValueError("the search needs at least one scorer and one choice of keep_question")
        if len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"a scorer is named twice: {', '.join(self.scorers)}")
        for scorer in self.scorers:
            constant_ratio(0.5, self.num_layers, scorer)  # names an unknown scorer

    def suggest(self, trial: Trial) -> LengthSchedule:
        """The schedule of a trial."""
        scorer = trial.suggest_categorical("scorer", self.scorers)
        keep_question = trial.suggest_categorical("keep_question", self.keep_question)
        ratio, ratios = 1.0, []
        for layer in range(self.num_layers):
            cube = trial.suggest_float(_name(layer), LEAST_KEPT**3, _TOP)
            ratio *= min(1.0, cube ** (1 / 3))
            ratios.append(max(round(ratio, 4), LEAST_RATIO))
        return LengthSchedule.ratios(ratios, scorer=scorer, keep_question=keep_question)

    def parameters_of(self, schedule: LengthSchedule) -> dict[str, Any]:
        """The parameters whose trial has this schedule, to four digits of its ratios.

        Raises:
            ValueError: the schedule is not one of this space.
        """
        schedule.check_layers(self.num_layers)
        if schedule.kind != "ratios":
            raise ValueError("lengths are absolute: the search is over ratios of the sequence's own length")
        if schedule.scorer is None:
            raise ValueError(f"the schedule names no scorer: give it one of {', '.join(self.scorers)}")
        if schedule.scorer not in self.scorers:
            raise ValueError(f"the scorer {schedule.scorer!r} is not among {', '.join(self.scorers)}")
        if schedule.keep_cls or schedule.keep_question not in self.keep_question:
            raise ValueError("keep_cls or keep_question differs from the choices of the search")
        parameters: dict[str, Any] = {"scorer": schedule.scorer, "keep_question": schedule.keep_question}
        before = 1.0
        for layer, ratio in enumerate(schedule.length_config):
            factor = ratio / before
            if factor < LEAST_KEPT or ratio < LEAST_RATIO:
                raise ValueError(
                    f"layer {layer} keeps {factor:.3f} of its tokens and {ratio} of the sequence, the search tries at "
                    f"least {LEAST_KEPT} and {LEAST_RATIO}"
                )
            parameters[_name(layer)] = _TOP if factor == 1 else factor**3
            before = ratio
        return parameters


def constant_ratio(
    factor: float, num_layers: int, scorer: str = "received", keep_question: bool = False
) -> LengthSchedule:
    """The baseline: every layer keeps the same part of the tokens that reach it."""
    ratios = [max(round(factor ** (layer + 1), 4), LEAST_RATIO) for layer in range(num_layers)]
    return LengthSchedule.ratios(ratios, scorer=scorer, keep_question=keep_question)


def _name(layer: int) -> str:
    return f"keep_{layer}_cubed"
