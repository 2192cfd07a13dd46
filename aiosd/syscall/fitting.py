"""Whether an answer fits its schema, all of it: the last word where the schema was weakened to decode by it.

Judged in a process of its own (aiosd.syscall.judging), as a pattern may take for ever.
"""

from __future__ import annotations

import json

from aiosd.syscall.decodable import LOOSE
from aiosd.syscall.judging import Court, serve

CHARS = 500  # of a reason
TOO_LONG = "judging it takes too long"
COURT = Court("aiosd.syscall.fitting")


def quarrel(schema: str, answer: str) -> str:
    """Return why the answer does not fit; empty: it does. Both are JSON. May take seconds."""
    said = COURT.verdict(json.dumps({"schema": schema, "answer": answer}))
    return TOO_LONG if said is None else said


def verdict(asked: str) -> str:
    """The same in this process, of one JSON object with both."""
    import jsonschema
    import referencing
    from jsonschema.exceptions import best_match

    from aiosd.syscall.schemas import place

    pair = json.loads(asked)
    schema = {key: value for key, value in json.loads(pair["schema"]).items() if key != LOOSE}
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    judge = kind(schema, registry=referencing.Registry())  # an address in it is not fetched
    try:
        wrong = best_match(judge.iter_errors(json.loads(pair["answer"])))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"[:CHARS]
    except Exception as error:  # noqa: BLE001 - a schema makes its judge raise anything
        return f"it cannot be judged: {error}"[:CHARS]
    return f"{place(wrong.absolute_path)}{wrong.message}"[:CHARS] if wrong else ""


if __name__ == "__main__":
    serve(verdict)
