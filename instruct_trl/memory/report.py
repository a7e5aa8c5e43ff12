"""The dry run's page: memory by role and kind at the peak, phase by phase, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instruct_trl.memory.plan import KINDS, MemoryPlan, total

GB = 10**9  # as cards are sold
CONTEXT, KEPT_FREE = GB // 2, 0.05
SMALLER = "take a smaller model"


@dataclass(frozen=True)
class Device:
    """What the plan is held against. `memory` in bytes; `usable` leaves room for the driver and for fragmentation."""

    name: str
    memory: int
    is_gpu: bool

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - KEPT_FREE)) - CONTEXT


def this_device(gigabytes: float | None = None) -> Device:
    """The GPU of this machine or, without one, its main memory; with `gigabytes` a GPU of that size instead."""
    import torch

    if gigabytes is not None:
        return Device(f"a GPU with {gigabytes:g} GB", int(gigabytes * GB), True)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, True)
    import psutil

    return Device("this machine's main memory (no GPU)", psutil.virtual_memory().total, False)


def gigabytes(size: float) -> str:
    """'1.23 GB'; in MB below 0.1 GB."""
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / 10**6:.1f} MB"


def table_of(plan: MemoryPlan) -> list[str]:
    """Roles down, kinds across, at the peak."""
    items = [*plan.resident, *plan.peak_phase.items]
    kinds = [kind for kind in KINDS if total(items, kinds=[kind])]
    roles = list(dict.fromkeys(item.role for item in items))
    rows = [["", *kinds, "all"]]
    for role in [*roles, None]:
        sizes = [total(items, role, [kind]) for kind in kinds]
        rows.append([role or "all", *(gigabytes(s) if s else "-" for s in sizes), gigabytes(sum(sizes))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return lines


def phases_of(plan: MemoryPlan) -> list[str]:
    """What each phase adds to what is always there."""
    width = max(len(phase.name) for phase in plan.phases)
    return [
        f"  {phase.name.ljust(width)}  {gigabytes(phase.size).rjust(9)}"
        + ("  <- peak" if phase is plan.peak_phase else "")
        for phase in plan.phases
    ]


ROWS, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
Settings = dict[str, int | bool]
Planner = Callable[[Settings], MemoryPlan]


def advise(
    plan: MemoryPlan, make: Planner, settings: Settings, relief: Mapping[str, Sequence[str]], usable: int
) -> tuple[Settings, MemoryPlan]:
    """Change one setting after the other, the cheapest that helps the phase at the peak, until the plan fits.

    Args:
        make: settings → plan.
        settings: numbers are halved down to 1, False becomes True. With fewer rows a device `ACCUMULATION` grows, if it
            is there, so that the optimizer's batch stays what it is.
        relief: phase → settings that lower it, the cheapest first.

    Returns:
        the settings changed, and the plan with them, which may still not fit.
    """
    changed: Settings = {}
    while plan.peak > usable > plan.resident_size:
        options = [name for name in relief.get(plan.peak_phase.name, ()) if _lower(settings[name]) != settings[name]]
        if not options:
            break
        name = options[0]
        lowered: Settings = {name: _lower(settings[name])}
        if name == ROWS and ACCUMULATION in settings:
            batch = settings[ROWS] * settings[ACCUMULATION]
            rows = next(n for n in range(int(lowered[ROWS]), 0, -1) if batch % n == 0)
            lowered = {ROWS: rows, ACCUMULATION: batch // rows}
        settings, changed = {**settings, **lowered}, {**changed, **lowered}
        plan = make(settings)
    return changed, plan


def _lower(value: int | bool) -> int | bool:
    return True if isinstance(value, bool) else max(1, value // 2)


@dataclass(frozen=True)
class Stage:
    """A recipe to be planned: how its plan follows from the settings that advice may change.

    Attributes:
        title: the recipe.
        make, settings, relief: as `advise` takes them.
        last_resort: what to do where no setting helps.
    """

    title: str
    make: Planner
    settings: Settings
    relief: Mapping[str, Sequence[str]]
    last_resort: str = SMALLER


def report(stage: Stage, device: Device) -> str:
    """The page. Its last line begins with 'fits' or 'does not fit'."""
    plan = stage.make(stage.settings)
    lines = [
        f"Dry run of {stage.title}: configs were read, no weights were downloaded or loaded, nothing was written.",
        "",
    ]
    lines += [*table_of(plan), "", f"Always there: {gigabytes(plan.resident_size)}. Each phase adds:", *phases_of(plan)]
    lines += ["", *(f"Taken to be so: {sentence}" for sentence in plan.assumptions)]
    reserve = f"{gigabytes(CONTEXT)} and {KEPT_FREE:.0%} left to driver, libraries and fragmentation"
    lines.append(
        f"Peak {gigabytes(plan.peak)}, during {plan.peak_phase.name}. Device: {device.name}, "
        f"{gigabytes(device.memory)}; usable {gigabytes(device.usable)} ({reserve})."
    )
    return "\n".join([*lines, verdict(plan, stage, device)])


def verdict(plan: MemoryPlan, stage: Stage, device: Device) -> str:
    """'fits: ...' or 'does not fit: do this: ...'."""
    if plan.peak <= device.usable:
        return f"fits: {gigabytes(device.usable - plan.peak)} to spare"
    over = gigabytes(plan.peak - device.usable)
    if plan.resident_size >= device.usable:
        return f"does not fit: {over} too much, and the models alone are too large. Do this: {stage.last_resort}"
    changed, better = advise(plan, stage.make, stage.settings, stage.relief, device.usable)
    words = ", ".join(f"--{name} {_shown(value)}" for name, value in changed.items())
    if better.peak <= device.usable:
        return f"does not fit: {over} too much. Do this: {words}; the peak is then {gigabytes(better.peak)}"
    tried = f" (even {words} leaves {gigabytes(better.peak)})" if words else ""
    return f"does not fit: {over} too much{tried}. Do this: {stage.last_resort}"


def _shown(value: Any) -> str:
    return str(value).lower()
