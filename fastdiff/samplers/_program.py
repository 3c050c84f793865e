"""A plan made ready to run: which buffer every tensor lives in, and the coefficients of every update as lists."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.ops.update import MAX_TERMS
from fastdiff.samplers.plan import Plan

__all__ = ["Program", "Update", "program"]


@dataclass(frozen=True)
class Update:
    """What happens at one stage, in places of one list that holds all tensors of the run.

    Attributes:
        x: where the state is that the model is given.
        m: where its (guided or conditional) output goes.
        u: where the other output of plain guidance goes, or -1.
        coefficients: of the tensors in `sources`.
        sources: places.
        noise: the coefficient of fresh noise, or 0.
        out: the place of the next state; may be one of the sources.
        held: places of outputs of earlier stages that are still needed.
        step: the step that is complete now, or -1.
    """

    x: int
    m: int
    u: int
    coefficients: list[float]
    sources: list[int]
    noise: float
    out: int
    held: list[int]
    step: int


@dataclass(frozen=True)
class Program:
    """Updates in order; places 0..states-1 are states (0 is the start), up to `places` model outputs."""

    updates: list[Update]
    states: int
    places: int
    folded: bool


def program(plan: Plan, scales: tuple[float | None, ...]) -> Program:
    """The program of a plan whose stages are guided by these scales (1: no other output; None: combined before).

    Plain guidance is folded into the updates, unless some update then had more terms than one kernel takes.
    """
    key = ("program", scales)
    if key not in plan.cache:
        plan.cache[key] = _build(plan, scales)
    result: Program = plan.cache[key]
    return result


def _build(plan: Plan, scales: tuple[float | None, ...]) -> Program:
    stages = _terms(plan, scales, fold=True)
    folded = max(sum(kind != "n" for (kind, _), _ in terms) for terms in stages) <= MAX_TERMS  # noise is drawn
    if not folded:
        stages = _terms(plan, scales, fold=False)
    last: dict[tuple[str, int], int] = {}
    for i, terms in enumerate(stages):
        for value, _ in terms:
            last[value] = i
    places: dict[tuple[str, int], tuple[str, int]] = {("x", 0): ("x", 0)}
    # The input is never written to: its place is not given back.
    free: dict[str, list[int]] = {"x": [], "m": []}
    size = {"x": 1, "m": 0}

    def take(value: tuple[str, int]) -> None:
        pool = "x" if value[0] == "x" else "m"
        if free[pool]:
            places[value] = (pool, free[pool].pop())
        else:
            places[value] = (pool, size[pool])
            size[pool] += 1

    rows = []
    for i, terms in enumerate(stages):
        held = [places[v] for v in places if v[0] != "x"]
        take(("m", i))
        other = folded and scales[i] is not None and scales[i] != 1.0
        if other:
            take(("u", i))
        m, u, x = places["m", i], places.get(("u", i)), places["x", i]
        sources = [places[v] for v, _ in terms if v[0] != "n"]
        for value in [v for v in places if last.get(v, -1) <= i]:
            pool, place = places.pop(value)
            if (pool, place) != ("x", 0):
                free[pool].append(place)
        take(("x", i + 1))
        rows.append((x, m, u, sources, held, places["x", i + 1]))
    states = size["x"]

    def number(place: tuple[str, int] | None) -> int:
        return -1 if place is None else place[1] + (0 if place[0] == "x" else states)

    updates = [
        Update(
            number(x), number(m), number(u), [c for v, c in terms if v[0] != "n"], [number(s) for s in sources],
            sum(c for v, c in terms if v[0] == "n"), number(out), [number(h) for h in held], stage.step,
        )
        for (x, m, u, sources, held, out), terms, stage in zip(rows, stages, plan.stages, strict=True)
    ]  # fmt: skip
    return Program(updates, states, states + size["m"], folded)


Terms = list[tuple[tuple[str, int], float]]


def _terms(plan: Plan, scales: tuple[float | None, ...], *, fold: bool) -> list[Terms]:
    """Every stage's terms by the number of the stage that made them; noise comes last."""
    result = []
    for i, stage in enumerate(plan.stages):
        terms: Terms = []
        noise: Terms = []
        for (kind, lag), c in stage.terms:
            j = i - lag
            scale = scales[j]
            if kind == "n":
                noise.append((("n", j), c))
            elif kind == "m" and fold and scale is not None and scale != 1.0:
                terms += [(("m", j), c * scale), (("u", j), c * (1 - scale))]
            else:
                terms.append(((kind, j), c))
        result.append(terms + noise)
    return result
