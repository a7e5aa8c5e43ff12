"""The dry run's page: memory by role and kind at the peak, phase by phase, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from instruct_trl.memory.plan import MemoryPlan
from instruct_trl.memory.roles import KINDS, total

GB = 10**9  # as cards are sold
CONTEXT, KEPT_FREE = GB // 2, 0.05
ROWS, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
Settings = dict[str, int | bool]


class Device(NamedTuple):
    """The device that must hold the plan. `memory` is in bytes; `usable` leaves room for driver and fragmentation."""

    name: str
    memory: int
    is_gpu: bool

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - KEPT_FREE)) - CONTEXT


def this_device(gigabytes: float | None = None) -> Device:
    """A GPU with `gigabytes`; by default this machine's GPU or, without one, its main memory."""
    import psutil
    import torch

    if gigabytes is not None:
        return Device(f"a GPU with {gigabytes:g} GB", int(gigabytes * GB), True)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, True)
    return Device("this machine's main memory (no GPU)", psutil.virtual_memory().total, False)


@dataclass(frozen=True)
class Stage:
    """A recipe to be planned, and how its plan follows from the settings that the advice may change.

    Attributes:
        title: the recipe.
        make: settings → plan.
        settings: numbers may be halved down to 1, and False may become True.
        relief: phase → the settings that lower it, the cheapest first.
        last_resort: the advice if no setting helps.
    """

    title: str
    make: Callable[[Settings], MemoryPlan]
    settings: Settings
    relief: Mapping[str, Sequence[str]]
    last_resort: str = "take a smaller model"


def report(stage: Stage, device: Device) -> str:
    """The page. Its last line begins with 'fits' or 'does not fit'."""
    plan = stage.make(stage.settings)
    peak, width = plan.peak_phase, max(len(phase.name) for phase in plan.phases)
    lines = [
        f"Dry run of {stage.title}: configs were read, no weights were downloaded or loaded, nothing was written.",
        "",
        *_table(plan),
        "",
        f"Always there: {_gb(total(plan.resident))}. Each phase adds:",
        *(
            f"  {phase.name.ljust(width)}  {_gb(phase.size).rjust(9)}" + "  <- peak" * (phase is peak)
            for phase in plan.phases
        ),
        "",
        *(f"Assumed: {sentence}" for sentence in plan.assumptions),
        f"Peak {_gb(plan.peak)}, during {peak.name}. Device: {device.name}, {_gb(device.memory)}; usable "
        f"{_gb(device.usable)} ({_gb(CONTEXT)} and {KEPT_FREE:.0%} left to driver, libraries and fragmentation).",
        _verdict(plan, stage, device),
    ]
    return "\n".join(lines)


def _gb(size: float) -> str:
    """'1.23 GB'; in MB below 0.1 GB."""
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / 10**6:.1f} MB"


def _table(plan: MemoryPlan) -> list[str]:
    """One row per role and one column per kind, at the peak."""
    items = [*plan.resident, *plan.peak_phase.items]
    kinds = [kind for kind in KINDS if total(items, kinds=[kind])]
    rows = [["", *kinds, "all"]]
    for role in [*dict.fromkeys(item.role for item in items), None]:
        sizes = [total(items, role, [kind]) for kind in kinds]
        rows.append([role or "all", *(_gb(size) if size else "-" for size in sizes), _gb(sum(sizes))])
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    ]


def _verdict(plan: MemoryPlan, stage: Stage, device: Device) -> str:
    """'fits: ...' or 'does not fit: ... Do this: ...'."""
    if plan.peak <= device.usable:
        return f"fits: {_gb(device.usable - plan.peak)} to spare"
    over = f"does not fit: {_gb(plan.peak - device.usable)} too much"
    if total(plan.resident) >= device.usable:
        return f"{over}, and the models alone are too large. Do this: {stage.last_resort}"
    changed, better = _advise(plan, stage, device.usable)
    words = ", ".join(f"--{name} {str(value).lower()}" for name, value in changed.items())
    if better.peak <= device.usable:
        return f"{over}. Do this: {words}; the peak is then {_gb(better.peak)}"
    tried = f" (even {words} leaves {_gb(better.peak)})" if words else ""
    return f"{over}{tried}. Do this: {stage.last_resort}"


def _advise(plan: MemoryPlan, stage: Stage, usable: int) -> tuple[Settings, MemoryPlan]:
    """Change one setting after the other, the cheapest that helps the phase at the peak, until the plan fits.

    Returns:
        the changed settings, and the plan with them. It may still not fit.
    """
    settings: Settings = dict(stage.settings)
    changed: Settings = {}
    while plan.peak > usable:
        relief = stage.relief.get(plan.peak_phase.name, ())
        lower = {name: not old if isinstance(old := settings[name], bool) else old // 2 for name in relief}
        name = next((name for name, value in lower.items() if value), None)  # 0 and False: it cannot go lower
        if name is None:
            break
        lowered: Settings = {name: lower[name]}
        if name == ROWS and ACCUMULATION in settings:
            # The optimizer's batch stays the user's: fewer rows come with more accumulation.
            batch = settings[ROWS] * settings[ACCUMULATION]
            rows = next(n for n in range(int(lowered[ROWS]), 0, -1) if batch % n == 0)
            lowered = {ROWS: rows, ACCUMULATION: batch // rows}
        settings, changed = settings | lowered, changed | lowered
        plan = stage.make(settings)
    return changed, plan
