"""/metrics: what the gateway has done, in the exposition format of Prometheus."""

from __future__ import annotations

from collections import Counter


class Metrics:
    def __init__(self) -> None:
        self._ended = Counter[tuple[str, int]]()
        self.open = 0

    def begun(self) -> None:
        self.open += 1

    def ended(self, endpoint: str, status: int) -> None:
        self.open -= 1
        self._ended[endpoint, status] += 1

    def text(self, sessions: int) -> str:
        lines = ["# TYPE aios_gateway_requests_total counter"]
        for (endpoint, status), count in sorted(self._ended.items()):
            lines.append(f'aios_gateway_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}')
        lines += ["# TYPE aios_gateway_requests_open gauge", f"aios_gateway_requests_open {self.open}"]
        lines += ["# TYPE aios_gateway_sessions gauge", f"aios_gateway_sessions {sessions}"]
        return "\n".join(lines) + "\n"
