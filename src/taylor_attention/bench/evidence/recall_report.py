"""Tables, pictures and sentences of the recall experiment."""

from __future__ import annotations

from typing import Any

from .drawing import panels
from .experiment import Finding, Findings, Picture, Table, select
from .recall_models import Mixer
from .recall_tasks import TASKS, Task

GOOD, BROKEN = 0.95, 0.5
"""Accuracy of who remembers, and below which one has forgotten."""

FAMILIES = {
    "softmax": ("*", ("#000000",)),
    "Taylor": ("o", ("#9ecae1", "#4ea3e0", "#1f77b4", "#0b4f94", "#08204d")),
    "window + Taylor": ("D", ("#74c476", "#006d2c")),
    "window": ("s", ("#fdae6b", "#e6550d")),
    "elu + 1": ("v", ("#c5b0e0", "#7b52ab")),
    "delta rule": ("^", ("#fc9272", "#b2182b")),
}
"""Markers, and colours from the smallest state on."""

_NOTE = (
    "Part of answers that are right in every symbol. bytes: float32 states of all layers at the size to compare at, "
    "the largest that was trained on."
)


def mixer_of(finding: Finding) -> Mixer:
    """The contestant of a case."""
    return Mixer(**{name: value for name, value in finding.case.items() if name not in ("task", "steps")})


def family_of(mixer: Mixer) -> str:
    """The kind of contestant, as the pictures tell them apart."""
    if mixer.kind == "taylor":
        return "window + Taylor" if mixer.window else "Taylor"
    return {"elu": "elu + 1", "delta": "delta rule"}.get(mixer.kind, mixer.kind)


def accuracy_of(finding: Finding, size: int) -> float:
    """At a size of its task."""
    return finding.values["accuracy"][str(size)]


def bytes_of(finding: Finding) -> int:
    """Of the state, at the size to compare at."""
    return finding.values["state_bytes"][str(_task(finding).hard)]


def _task(finding: Finding) -> Task:
    return TASKS[finding.case["task"]]


def _by_task(findings: Findings) -> list[tuple[Task, list[Finding]]]:
    """Tasks that there are findings of, contestants in the order of their bytes."""
    found = [(task, sorted(select(findings, task=name), key=bytes_of)) for name, task in TASKS.items()]
    return [(task, own) for task, own in found if own]


def tables(findings: Findings) -> list[Table]:
    """One per task: contestants, their bytes, and accuracy by size."""
    return [
        Table(
            f"{task.title}: accuracy by {task.size}",
            ("contestant", "bytes", *(f"{size:,}" for size in task.test)),
            tuple(
                (
                    mixer_of(each).name,
                    f"{bytes_of(each):,}",
                    *(f"{accuracy_of(each, size):.1%}" for size in task.test),
                )
                for each in own
            ),
            f"{_NOTE} Trained for {own[0].case['steps']} steps on {', '.join(map(str, task.train))} {task.size}.",
        )
        for task, own in _by_task(findings)
    ]


def pictures(findings: Findings) -> list[Picture]:
    """Associative recall, and the other tasks: accuracy against bytes at the size to compare at, and against size."""
    tasks, looks = _by_task(findings), _looks(findings)
    groups = {"recall": tasks[:1], "recall-tasks": tasks[1:]}
    return [_draw(name, group, looks) for name, group in groups.items() if group]


Looks = dict[str, dict[str, Any]]


def _looks(findings: Findings) -> Looks:
    """Each contestant's marker and colour, the same on every task."""
    mixers = sorted({mixer_of(each) for each in findings}, key=lambda mixer: (mixer.state_bytes(1), mixer.name))
    looks: Looks = {}
    for family, (marker, colors) in FAMILIES.items():
        for i, mixer in enumerate(mixer for mixer in mixers if family_of(mixer) == family):
            looks[mixer.name] = {"marker": marker, "color": colors[i % len(colors)], "label": mixer.name}
    return looks


def _draw(name: str, tasks: list[tuple[Task, list[Finding]]], looks: Looks) -> Picture:
    """A row for each task."""
    figure, axes = panels(2, len(tasks), width=4.6, height=3.0 if len(tasks) > 1 else 4.4)
    for row, (task, own) in enumerate(tasks):
        _draw_bytes(axes[2 * row], task, own, looks)
        _draw_sizes(axes[2 * row + 1], task, own, looks)
    lines = {line.get_label(): line for each in axes for line in each.lines}
    order = [label for label in looks if label in lines]
    figure.legend([lines[label] for label in order], order, loc="outside lower center", ncols=3, fontsize="small")
    caption = (
        "Models of one shape, trained alike, that differ in how values are mixed. Left: accuracy at the largest size "
        "trained on, against bytes of float32 state. Right: against size; beyond the line is more than was trained on."
    )
    return Picture(name, caption, figure)


def _draw_bytes(axes: Any, task: Task, findings: list[Finding], looks: Looks) -> None:
    for each in findings:
        look = {**looks[mixer_of(each).name], "markersize": 9, "linestyle": "none", "alpha": 0.85}
        axes.plot(bytes_of(each), accuracy_of(each, task.hard), **look)
    axes.set(xscale="log", xlabel="bytes of state", ylabel="accuracy", ylim=(-0.05, 1.1), xlim=(5e3, 6e5))
    axes.set_title(f"{task.title}, {task.hard} {task.size}", fontsize="medium")
    axes.set_xticks([10_000, 30_000, 100_000, 300_000], ["10 KB", "30 KB", "100 KB", "300 KB"])
    axes.set_xticks([], minor=True)


def _draw_sizes(axes: Any, task: Task, findings: list[Finding], looks: Looks) -> None:
    for each in findings:
        accuracies = [accuracy_of(each, size) for size in task.test]
        axes.plot(task.test, accuracies, **looks[mixer_of(each).name], markersize=4)
    axes.axvline(task.hard, color="k", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel=task.size, ylim=(-0.05, 1.1))
    axes.set_xticks(task.test, [f"{size:,}" for size in task.test])
    axes.set_xticks([], minor=True)


def conclusions(findings: Findings) -> list[str]:
    """Of each task: softmax, the smallest state that remembers, where the others break; and who wins at equal bytes."""
    return [line for task, own in _by_task(findings) for line in _tell(task, own)]


def _tell(task: Task, findings: list[Finding]) -> list[str]:
    where = f"{task.title}, {task.hard} {task.size}"
    exact = [each for each in findings if mixer_of(each).kind == "softmax"]
    others = [each for each in findings if each not in exact]
    said = [f"softmax {_percent(each, task.hard)} in {bytes_of(each):,} bytes" for each in exact]
    good = [each for each in others if accuracy_of(each, task.hard) >= GOOD]
    if good:
        said.append(f"the smallest other state with {GOOD:.0%}: {mixer_of(good[0]).name}, {bytes_of(good[0]):,} bytes")
    elif others:
        top = max(others, key=lambda each: accuracy_of(each, task.hard))
        said.append(f"no other state reaches {GOOD:.0%}, nearest {mixer_of(top).name}, {_percent(top, task.hard)}")
    lines = [f"{where}: {'; '.join(said)}."]
    broken = [f"{mixer_of(each).name} at {size:,}" for each in others if (size := _breaks(each)) is not None]
    if broken:
        lines.append(f"{task.title}: accuracy is below {BROKEN:.0%} from so many {task.size} on: {', '.join(broken)}.")
    return lines + _compare(task, findings)


def _breaks(finding: Finding) -> int | None:
    """The smallest size at which a contestant has forgotten."""
    return next((size for size in _task(finding).test if accuracy_of(finding, size) < BROKEN), None)


def _compare(task: Task, findings: list[Finding]) -> list[str]:
    """Each Taylor contestant beside the best of the others whose state is no larger than a tenth above its own."""
    lines = []
    for own in findings:
        mixer = mixer_of(own)
        rivals = [
            each
            for each in findings
            if mixer_of(each).kind in ("window", "elu", "delta") and bytes_of(each) <= 1.3 * bytes_of(own)
        ]
        if mixer.kind == "taylor" and rivals:
            top = max(rivals, key=lambda each: accuracy_of(each, task.hard))
            lines.append(
                f"{mixer.name} ({bytes_of(own):,} bytes) {_percent(own, task.hard)}; the best rival within 1.3 times "
                f"its bytes: {mixer_of(top).name} ({bytes_of(top):,}) {_percent(top, task.hard)}"
            )
    return [f"{task.title}, {task.hard} {task.size}: {line}." for line in lines]


def _percent(finding: Finding, size: int) -> str:
    return f"{accuracy_of(finding, size):.1%}"
