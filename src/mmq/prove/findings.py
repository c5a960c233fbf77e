"""What verify found, as verify.json has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmq.errors import VerifyError

SHOWN_PROBLEMS = 20


@dataclass
class Report:
    """What verify found.

    Attributes:
        problems: one sentence for everything that is off.
        checks: what was looked at, and how many things.
        layers: per decoder layer, errors of the experts and the KV scales.
        attention: sha256 of every attention tensor, equal in source and result.
        files: size and xxh3-128 of every file that this is about, by name.
    """

    folder: Path
    path: Path
    problems: list[str] = field(default_factory=list)
    checks: dict[str, int] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)

    def count(self, check: str, number: int = 1) -> None:
        self.checks[check] = self.checks.get(check, 0) + number

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    def findings(self) -> dict[str, Any]:
        """What was found, as JSON."""
        return {
            "problems": self.problems,
            "checks": self.checks,
            "layers": self.layers,
            "attention": self.attention,
        }

    def add(self, findings: dict[str, Any]) -> None:
        """What another found, as `findings` has it."""
        self.problems += findings["problems"]
        self.layers += findings["layers"]
        self.attention |= findings["attention"]
        for check, number in findings["checks"].items():
            self.count(check, number)

    def require_ok(self) -> None:
        """Raises VerifyError where something is off."""
        if not self.problems:
            return
        shown = "\n".join(f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS])
        more = len(self.problems) - SHOWN_PROBLEMS
        raise VerifyError(
            f"{self.folder} is not what it must be:\n{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "ok": not self.problems,
            "problems": self.problems,
            "checks": self.checks,
            "layers": self.layers,
            "attention_sha256": self.attention,
            "files": self.files,
        }

    def rows(self) -> list[dict[str, Any]]:
        """The checks as a table."""
        return [{"check": check, "looked at": number} for check, number in self.checks.items()]
