"""The results: the list of figures, the goals, and the table."""

import statistics
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """A bound for `of`: for the value, or for the value's ratio to plain TCP's value."""

    of: Literal["value", "plain"]
    sign: Literal["<=", ">="]
    bound: float

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.sign == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}{'x plain' if self.of == 'plain' else ''}"


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    key: str
    title: str
    unit: str
    goal: Goal | None = None


@dataclass
class Results:
    """Figure's key -> side's name -> one value per run."""

    figures: dict[str, Figure] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def declare(self, *figures: Figure) -> None:
        """Fix the order of the figures in the table, whichever side adds a value first."""
        for figure in figures:
            self.figures[figure.key] = figure
            self.values.setdefault(figure.key, {})

    def add(self, figure: Figure, side: str, value: float) -> None:
        self.declare(figure)
        self.values[figure.key].setdefault(side, []).append(value)

    def value(self, key: str, side: str) -> float | None:
        """Return the median over the runs; None for a side without this figure."""
        values = self.values[key].get(side)
        return statistics.median(values) if values else None

    def ratio(self, key: str, side: str, other: str) -> float | None:
        """Return this side's value divided by the other side's value."""
        value, reference = self.value(key, side), self.value(key, other)
        return value / reference if value is not None and reference else None

    def spread(self, key: str, side: str, other: str) -> list[float]:
        """Return the ratio of each run, for sides measured in turns."""
        pairs = zip(self.values[key].get(side, []), self.values[key].get(other, []), strict=False)
        return [value / reference for value, reference in pairs if reference]

    def verdict(self, key: str, side: str) -> str:
        """Return the goal, and whether the value reaches the goal."""
        goal = self.figures[key].goal
        if goal is None:
            return ""
        found = self.value(key, side) if goal.of == "value" else self.ratio(key, side, "plain")
        if found is None:
            return str(goal)
        return f"{goal} {'yes' if goal.is_met(found) else 'NO'}"

    def table(self, side: str, base: str | None) -> str:
        """Return one line per figure, in columns; `base` is the checkout for comparison."""
        head = ["figure", "unit", "plain", "stock", side]
        head += ["/plain", "/stock"]
        head += [base, f"{side}/{base}", "min..max"] if base else []
        rows = [[*head, "goal"]]
        for key, figure in self.figures.items():
            row = [figure.title, figure.unit]
            row += [number(self.value(key, each)) for each in ("plain", "stock", side)]
            row += [number(self.ratio(key, side, each)) for each in ("plain", "stock")]
            if base:
                spread = self.spread(key, side, base)
                row += [number(self.value(key, base))]
                row += [number(statistics.median(spread) if spread else None)]
                row += [f"{number(min(spread))}..{number(max(spread))}" if spread else ""]
            rows.append([*row, self.verdict(key, side)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        left = {0, 1, len(widths) - 1}
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def as_json(self) -> list[dict[str, object]]:
        """Return every value of every run."""
        return [
            {
                "figure": key,
                "title": figure.title,
                "unit": figure.unit,
                "goal": str(figure.goal) if figure.goal else None,
                "runs": self.values[key],
                "medians": {side: self.value(key, side) for side in self.values[key]},
            }
            for key, figure in self.figures.items()
        ]


def number(value: float | None) -> str:
    """Format a value with three significant digits."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"
