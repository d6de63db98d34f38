"""Lines of C as they are written."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Text:
    """Lines, the last of which are `depth` blocks deep."""

    lines: list[str] = field(default_factory=list[str])
    depth: int = 1

    def put(self, line: str) -> None:
        self.lines.append(line if line.startswith("#") else "    " * self.depth + line)

    def insert(self, at: int, line: str, depth: int) -> None:
        self.lines.insert(at, "    " * depth + line)

    def open(self, line: str = "") -> None:
        """Begins a block, behind a line if there is one."""
        self.put(f"{line} {{".lstrip())
        self.depth += 1

    def close(self, count: int = 1) -> None:
        for _ in range(count):
            self.depth -= 1
            self.put("}")
