"""An MCP server without any SDK, which says what a JSON file has it say, right or wrong.

{"tools": [...], "answers": {TOOL: result, or a text that is the whole line}, "hello": [lines before all],
"after": [messages after each initialize], "initialize": {more of its result}, "stderr": text, "deaf": true}
An answer {"ask": {"method", "params"}} asks the client that, and gives what it answered as a text.
In a text that is a line `@ID` is the number of the request. Each session makes a file whose name begins with
argv[2], if that is given.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SAYS: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())


def say(line: Any) -> None:
    sys.stdout.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    sys.stdout.flush()


def result(method: str, params: dict[str, Any]) -> Any:
    match method:
        case "initialize":
            facts = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}}
            return {**facts, "serverInfo": {"name": "raw", "version": "1"}, **SAYS.get("initialize", {})}
        case "tools/list":
            return {"tools": SAYS["tools"]}
        case "tools/call":
            return SAYS["answers"].get(params["name"], {"content": [{"type": "text", "text": "ok"}]})
    return {}


def answered(asked: dict[str, Any]) -> Any:
    say({"jsonrpc": "2.0", "id": "asked", **asked})
    for line in sys.stdin:
        heard = json.loads(line)
        if heard.get("id") == "asked":
            said = heard.get("result") or heard["error"]["message"]
            return {"content": [{"type": "text", "text": json.dumps(said)}]}
        if heard.get("method") == "notifications/cancelled":
            return {"content": []}
        if heard.get("method") == "tools/list":  # whether this one still answers
            say({"jsonrpc": "2.0", "id": heard["id"], "result": result("tools/list", {})})
    sys.exit()


def main() -> None:
    if len(sys.argv) > 2:
        Path(f"{sys.argv[2]}.{os.urandom(8).hex()}").touch()
    for line in SAYS.get("hello", []):
        say(line)
    sys.stderr.write(SAYS.get("stderr", ""))
    sys.stderr.flush()
    if SAYS.get("deaf"):
        time.sleep(600)
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" not in asked or "method" not in asked:
            continue
        if asked["method"] not in ("initialize", "ping", "tools/list", "tools/call"):
            say({"jsonrpc": "2.0", "id": asked["id"], "error": {"code": -32601, "message": "no such method"}})
            continue
        found = result(asked["method"], asked.get("params", {}))
        if isinstance(found, dict) and "ask" in found:
            found = answered(found["ask"])
        if isinstance(found, str):
            say(found.replace("@ID", json.dumps(asked["id"])))
        else:
            say({"jsonrpc": "2.0", "id": asked["id"], "result": found})
        if asked["method"] == "initialize":
            for message in SAYS.get("after", []):
                say(message)


if __name__ == "__main__":
    main()
