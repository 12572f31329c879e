"""Smaller budgets under load: answers that cost less, before requests are refused."""

from collections.abc import Sequence


class Shedding:
    """Which budget holds, by how many windows wait.

    Of n budgets the first holds from 1 / (n + 1) of the queue on, the next from 2 / (n + 1), and so on; each until
    the queue is half as long as where it began, so that it does not come and go with every request.

    Args:
        budgets: falling; none never sheds.
        max_queue: windows that may wait.
    """

    def __init__(self, budgets: Sequence[float], max_queue: int) -> None:
        self._budgets = budgets
        self._begins = [max_queue * (level + 1) / (len(budgets) + 1) for level in range(len(budgets))]
        self._level = 0

    def budget(self, waiting: int) -> float | None:
        """The largest budget that a request may have now; None is any."""
        while self._level < len(self._begins) and waiting >= self._begins[self._level]:
            self._level += 1
        while self._level and waiting < self._begins[self._level - 1] / 2:
            self._level -= 1
        return self._budgets[self._level - 1] if self._level else None
