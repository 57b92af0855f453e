"""Runs to report on, and a page read back."""

import json
import math
import random
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

from auxin.report import Report

LIMIT = 200_000
EVIL = '<script>alert("1")</script>&\'\x00'


def entry(number: int, step: int, added: list, renamed: dict | None = None, **changes) -> dict:
    return {
        "id": number,
        "edit": {"type": "auxin.edits.duplicate:Duplicate", "at": "blocks", "by": 1},
        "seed": number,
        "at": {"calls": step // 10, "optimizer_steps": step},
        "metrics": {"validation": 2.5},
        "added": [{"path": path, "from": source, "parameters": 1000} for path, source in added],
        "renamed": renamed or {},
        "parameters": {"before": 1000 * number, "after": 1000 * (number + 1)},
        "preserved": True,
        "max_difference": 0.0,
        "gradient_ratio": 0.8,
        "seconds": 0.003,
        "summary": f"{added[0][0]} <- copy of {added[0][1]}" if added else "",
        **changes,
    }


def journal() -> list[dict]:
    return [
        entry(1, 150, [("blocks.1", "blocks.0")]),
        entry(2, 290, [("blocks.1", "blocks.0")], {"blocks.1": "blocks.2"}),
        entry(3, 430, [("blocks.3", "blocks.2")]),
    ]


def metrics(count: int = 600, every: int = 10) -> list[dict]:
    noise = random.Random(0)
    return [
        {
            "step": step,
            "seconds": step * 0.1,
            "flops": step * 3.1e9,
            "loss": 1 + 3 * math.exp(-step / count * 4) + noise.gauss(0, 0.05),
            "validation": 1.05 + 3 * math.exp(-step / count * 4) if step % every == 0 else None,
            "parameters": 1000 * (1 + (step > 150) + (step > 290) + (step > 430)),
            "depth": 1 + (step > 150) + (step > 290) + (step > 430),
            "learning_rate": 3e-3,
        }
        for step in range(count)
    ]


class Log:
    """A run that writes its log line by line, as ``Grower(log=...)`` does: ten optimizer steps a call."""

    def __init__(self) -> None:
        self.noise = random.Random(1)
        self.lines: list[dict] = []
        self.entries: list[dict] = []
        self.call = self.step = 0
        self.flops = self.seconds = 0.0
        self.parameters, self.level = 8_801, 3.0

    def read(self, count: int, floor: float = 0.5) -> "Log":
        for _ in range(count):
            self.call, self.step = self.call + 1, self.step + 10
            self.flops += 10 * 6 * 32 * self.parameters
            self.seconds += 0.08 + self.parameters / 4e5
            self.level += (floor - self.level) * 0.05
            accuracy = 1 - self.level / 4 + self.noise.gauss(0, 0.01)
            line = {"kind": "reading", **self._now(), "flops": self.flops, "parameters": self.parameters}
            value = self.level + self.noise.gauss(0, 0.03)
            self.lines.append({**line, "metric": value, "metrics": {"accuracy": accuracy}})
        return self

    def grow(self, added: list, renamed: dict | None = None, wait: int = 0, dead: list | None = None) -> "Log":
        number = len(self.entries) + 1
        decided = {"kind": "decision", **self._now(), "fired": True, "reason": "plateau(patience=3)"}
        decided["chosen"] = "Duplicate('blocks', by=1)"
        waiting = "a gradient waits for the next step"
        self.lines += [{**decided, "waiting": waiting}] * wait + [{**decided, "waiting": None}]
        before, self.parameters = self.parameters, self.parameters + 8_416
        new = entry(
            number - 1,
            self.step,
            added,
            renamed,
            at={"calls": self.call, "optimizer_steps": self.step},
            metrics={"metric": self.level},
            parameters={"before": before, "after": self.parameters},
            gradient_ratio=0.5 + number / 10,
            fingerprint=f"{number}-{self.step}",
        )
        self.entries.append(new)
        line = {"kind": "growth", "number": number, **self._now(), "entry": new, "line": new["summary"]}
        self.lines.append({**line, "max_difference": 0.0, "gradient_ratio": 0.9, "parameters": self.parameters})
        for after in range(1, 21):
            rise = 0.3 + 0.1 * number + (0.7 - 0.1 * number + self.noise.gauss(0, 0.06)) * (1 - math.exp(-after / 6))
            flow = {"kind": "flow", "growth": number, "step": self.step + after, "ratios": {added[0][0]: rise}}
            self.lines.append({**flow, "dead": dead or []})
        return self

    def undo(self, call: int, step: int) -> "Log":
        line = {"kind": "undone", "number": len(self.entries), **self._now(), "why": "probation"}
        self.lines.append({key: value for key, value in line.items() if key != "seconds"})
        self.call, self.step, self.parameters = call, step, self.parameters - 8_416
        self.entries.pop()
        return self

    def _now(self) -> dict:
        return {"call": self.call, "step": self.step, "seconds": round(self.seconds, 3)}

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        (directory / "journal.json").write_text(json.dumps({"format": 1, "entries": self.entries}))
        return directory


def grown_log() -> Log:
    """Four growths; the third is undone."""
    log = Log().read(25).grow([("blocks.1", "blocks.0")]).read(15)
    log.grow([("blocks.1", "blocks.0")], {"blocks.1": "blocks.2"}, wait=3).read(15)
    call, step, level = log.call, log.step, log.level
    log.grow([("blocks.3", "blocks.2")]).read(12, floor=1.2).undo(call, step)
    log.level = level
    return log.read(10).grow([("blocks.2", "blocks.1")], {"blocks.2": "blocks.3"}, dead=["blocks.2.norm.bias"]).read(30)


def shapes(depth: int = 4) -> dict[str, list[int]]:
    """Of a network whose block 2 is narrower than the others."""
    found = {"inp.weight": [32, 8], "inp.bias": [32]}
    for block in range(depth):
        wide = 64 if block == 2 else 128
        found |= {f"blocks.{block}.norm.weight": [32], f"blocks.{block}.up.weight": [wide, 32]}
        found[f"blocks.{block}.down.weight"] = [32, wide]
    return {**found, "out.weight": [1, 32], "out.bias": [1]}


def write_checkpoint(directory: Path, entries: list, tensors: dict[str, list[int]], **state) -> Path:
    """The files of ``auxin.save`` that a report reads."""
    place = directory / "checkpoint-000001"
    place.mkdir(parents=True)
    head = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    text = json.dumps({"__metadata__": {"a": "b"}, **head}).encode()
    (place / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (place / "journal.json").write_text(json.dumps({"format": 1, "entries": entries}))
    (place / "run.json").write_text(json.dumps({"grower": state}))
    return place


def parsed(page: str) -> ET.Element:
    """The page as XML: it is written so that both parsers accept it."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def render_report(entries: list, points: list, **changes) -> str:
    page = Report.from_metrics(entries, points, **{"title": "A run", **changes}).html()
    assert len(page.encode()) < LIMIT
    return page


def render(entries: list, points: list, **changes) -> ET.Element:
    return parsed(render_report(entries, points, **changes))


def of_class(root: ET.Element, name: str) -> list[ET.Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def words(root: ET.Element | None) -> str:
    assert root is not None
    return " ".join("".join(root.itertext()).split())


def svg(root: ET.Element, name: str) -> ET.Element:
    return next(e for e in root.iter("svg") if f"{name}-title" in e.get("aria-labelledby", "").split())


def section(root: ET.Element, name: str) -> ET.Element:
    return next(e for e in root.iter("section") if e.get("aria-labelledby") == name)


def table_of(element: ET.Element) -> list[list[str]]:
    """The cells of the body of the first table below an element."""
    body = next(element.iter("tbody"))
    return [[words(cell) for cell in row] for row in body]


def at(place: str | None) -> float:
    """A horizontal place, 0 .. 1."""
    assert place is not None and place.endswith("%")
    return float(place[:-1]) / 100
