"""Held-out synthetic samples -> which state of a student, or which of several students, loses least."""

import logging
import math
from collections.abc import Sequence

from torch import Tensor, nn

from qimera.assessment.estimation import estimate_on_held_out
from qimera.config.settings import DistillationSettings
from qimera.machine.checkpoint import State
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher, as_teacher

logger = logging.getLogger(__name__)


def choose(students: Sequence[Student], teacher: nn.Module, bank: SampleBank) -> int:
    """Return which of several students has the lowest estimated drop; the first of equals, and NaN comes last.

    Raises:
        ConfigError: the bank has no held-out samples.
    """
    teacher = as_teacher(teacher, bank.input_spec)
    drops = [estimate_on_held_out(student, teacher, bank).drop for student in students]
    logger.info("estimated drops: %s points", ", ".join(f"{drop:.2f}" for drop in drops))
    return min(range(len(drops)), key=lambda number: (math.isnan(drops[number]), drops[number]))


class BestState:
    """The state of a student in training that had the lowest estimated drop.

    The state before the first step is the first candidate (step 0), one follows every ``settings.select_every`` steps,
    and the last step is one too. With ``select_every`` of 0 nothing is looked at or kept.
    """

    def __init__(self, student: Student, teacher: Teacher, bank: SampleBank, settings: DistillationSettings) -> None:
        self.student, self.teacher, self.bank, self.settings = student, teacher, bank, settings
        self.lowest = float("inf")
        self.step = settings.num_steps
        """The step that the best state is from."""
        self.state: dict[str, Tensor] = {}

    def consider(self, step: int) -> None:
        """Judge the student if it is time to, and keep a copy of its state if it is the best so far."""
        every, last = self.settings.select_every, self.settings.num_steps
        if not every or (step % every and step != last):
            return
        now = estimate_on_held_out(self.student, self.teacher, self.bank).drop
        logger.debug("step %d: estimated drop %.2f points", step, now)
        if now < self.lowest:
            self.lowest, self.step = now, step
            self.state = {name: value.clone() for name, value in self.student.module.state_dict().items()}

    def state_dict(self) -> State:
        """Return what ``load_state_dict`` needs to go on."""
        return {"lowest": self.lowest, "step": self.step, "state": self.state}

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned."""
        self.lowest, self.step, self.state = state["lowest"], state["step"], state["state"]

    def restore_(self) -> None:
        """Give the student its best state."""
        if self.state:
            self.student.module.load_state_dict(self.state)
            logger.info("kept the state of step %d of %d", self.step, self.settings.num_steps)
