"""The store: agents, contexts, messages, requests, models, keys and permissions, in the tables of schema.py.

Only this package uses SQL. Any thread may call.

Large: one method for each transaction.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiosd.database.connection import Connection
from aiosd.errors import StoreFailed, in_words
from aiosd.syscall.request import Request, State, Usage
from aiosd.syscall.spec import Message, Spec

log = logging.getLogger(__name__)

FOUND = "(agent_id=0 OR agent_id IN (SELECT id FROM agents))"  # requests: not of a removed agent
FORGET_SHARE = 16  # up to a sixteenth more requests are kept than `keep`
CONTEXT = ("tokens", "model", "pinned", "salt", "unfinished")
KEY = ("id", "sha256", "uid", "user", "name", "created_s", "agent", "agent_id", "expires_s", "tokens_per_day",
       "used_s")  # fmt: skip


class Store(Connection):
    def __init__(self, folder: Path, kinds: Mapping[str, type[Spec]]) -> None:
        """`kinds`: the class of each kind of request that may be stored. Raises StoreFailed."""
        super().__init__(folder)
        self._kinds = kinds
        # by agent and user: ended requests since old ones were forgotten
        self._ended = Counter[tuple[int, int]]()

    # permissions

    def permissions(self) -> list[tuple[str, int, int, int]]:
        return self._rows("SELECT path, uid, gid, mode FROM permissions")

    def save_permission(self, path: str, uid: int, gid: int, mode: int) -> None:
        with self._transaction() as db:
            db.execute("REPLACE INTO permissions VALUES (?,?,?,?)", (path, uid, gid, mode))

    def change_permissions(self, gone: list[str], now: list[tuple[str, int, int, int]]) -> None:
        """Drop paths, then save others, all or none."""
        with self._transaction() as db:
            db.executemany("DELETE FROM permissions WHERE path=?", [(path,) for path in gone])
            db.executemany("REPLACE INTO permissions VALUES (?,?,?,?)", now)

    def forget_permissions(self, path: str) -> None:
        with self._transaction() as db:
            below = (path + "/", path + "0")  # paths that begin with the first: 0 follows / in ASCII
            db.execute("DELETE FROM permissions WHERE path=? OR path>? AND path<?", (path, *below))

    def grants(self) -> list[tuple[str, str, set[int]]]:
        return [(kind, name, set(json.loads(ids))) for kind, name, ids in self._rows("SELECT * FROM grants")]

    def save_grant(self, kind: str, name: str, ids: set[int]) -> None:
        with self._transaction() as db:
            db.execute("REPLACE INTO grants VALUES (?,?,?)", (kind, name, json.dumps(sorted(ids))))

    def remove_grant(self, kind: str, name: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM grants WHERE kind=? AND name=?", (kind, name))

    def accounts(self) -> dict[int, str]:
        return dict(self._rows("SELECT uid, name FROM accounts"))

    def save_account(self, uid: int, name: str) -> None:
        with self._transaction() as db:
            db.execute("REPLACE INTO accounts VALUES (?,?)", (uid, name))

    def users(self) -> list[int]:
        """Return all who have something here."""
        return [uid for (uid,) in self._rows("SELECT uid FROM permissions UNION SELECT uid FROM requests")]

    # keys

    def key_rows(self) -> list[tuple[Any, ...]]:
        return self._rows(f"SELECT {', '.join(KEY)} FROM keys")

    def add_key(self, facts: dict[str, Any]) -> None:
        with self._transaction() as db:
            values = ", ".join(f":{column}" for column in KEY)
            db.execute(f"INSERT INTO keys ({', '.join(KEY)}) VALUES ({values})", facts)

    def save_key_use(self, id: str, used_s: int) -> None:
        with self._transaction() as db:
            db.execute("UPDATE keys SET used_s=? WHERE id=?", (used_s, id))

    def remove_key(self, id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM keys WHERE id=?", (id,))

    # agents, contexts, models

    def agents(self) -> list[tuple[int, str, dict[str, Any], Usage, int]]:
        rows = self._rows(
            "SELECT id, name, settings, prompt_tokens, cached_tokens, completion_tokens, requests FROM agents"
        )
        return [
            (id, name, self._settings(id, name, text), Usage(p, c, n), count)
            for id, name, text, p, c, n, count in rows
        ]

    @staticmethod
    def _settings(id: int, name: str, text: str) -> dict[str, Any]:
        """An agent whose settings cannot be read keeps its owner and files, and waits for a person."""
        try:
            settings = json.loads(text)
            if isinstance(settings, dict):
                return settings
        except (ValueError, TypeError):
            pass
        words = "the settings of agent %s (row %d of agents) cannot be read: it is paused with default ones"
        log.error(words, name, id)
        return {"paused": True}

    def had_agents(self) -> bool:
        """Whether there ever was one; SQLite remembers the last number of a table that is empty now."""
        return bool(self._rows("SELECT 1 FROM sqlite_sequence WHERE name='agents'"))

    def add_agent(self, name: str, settings: dict[str, Any]) -> int:
        with self._transaction() as db:
            added = db.execute(
                "INSERT INTO agents (name, settings) VALUES (?,?)", (name, json.dumps(settings))
            )
            return added.lastrowid or 0

    def save_agent(self, id: int, settings: dict[str, Any]) -> None:
        with self._transaction() as db:
            db.execute("UPDATE agents SET settings=? WHERE id=?", (json.dumps(settings), id))

    def remove_agent(self, id: int) -> None:
        """From here on nobody finds its requests, and its keys are gone. `sweep` deletes the requests."""
        with self._transaction() as db:
            db.execute("DELETE FROM keys WHERE agent_id=?", (id,))
            db.execute("DELETE FROM agents WHERE id=?", (id,))
        for who in [who for who in self._ended if who[0] == id]:
            del self._ended[who]

    def gone_agents(self) -> list[int]:
        """Removed agents that still have requests."""
        return [id for (id,) in self._rows(f"SELECT DISTINCT agent_id FROM requests WHERE NOT {FOUND}")]

    def sweep(self, agent_id: int) -> bool:
        """Delete one request of a removed agent; a long one takes long. False: there is none."""
        with self._transaction() as db:
            one = "SELECT id FROM requests WHERE agent_id=? LIMIT 1"
            return db.execute(f"DELETE FROM requests WHERE id=({one})", (agent_id,)).rowcount > 0

    def contexts(self) -> list[tuple[Any, ...]]:
        return [
            (*row[:4], bool(row[4]), *row[5:])
            for row in self._rows(f"SELECT name, id, {', '.join(CONTEXT)} FROM contexts")
        ]

    def add_context(self, name: str) -> int:
        with self._transaction() as db:
            return db.execute("INSERT INTO contexts (name) VALUES (?)", (name,)).lastrowid or 0

    def fork_context(self, name: str, new: str) -> int:
        with self._transaction() as db:
            same = "SELECT ?, tokens, model FROM contexts WHERE name=?"
            added = db.execute(f"INSERT INTO contexts (name, tokens, model) {same}", (new, name))
            db.execute("INSERT INTO messages SELECT ?, seq, body FROM messages WHERE context=?", (new, name))
            return added.lastrowid or 0

    def save_context(self, name: str, facts: dict[str, Any]) -> None:
        assert facts.keys() <= set(CONTEXT)
        with self._transaction() as db:
            changes = ", ".join(f"{key}=?" for key in facts)
            db.execute(f"UPDATE contexts SET {changes} WHERE name=?", (*facts.values(), name))

    def remove_context(self, name: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM notes WHERE context=(SELECT id FROM contexts WHERE name=?)", (name,))
            db.execute("DELETE FROM contexts WHERE name=?", (name,))
            db.execute("DELETE FROM messages WHERE context=?", (name,))

    def note(self, context: int) -> str:
        rows = self._rows("SELECT body FROM notes WHERE context=?", context)
        return str(rows[0][0]) if rows else ""

    def save_note(self, context: int, text: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (context, text))

    def messages(self, context: str) -> list[Message]:
        """Raises StoreFailed."""
        try:
            return [json.loads(line) for line in self.message_lines(context)]
        except ValueError as error:
            why = f"a message of context {context} cannot be read: {in_words(error)}"
            raise StoreFailed(why, "`truncate N` in its ctl keeps the first N messages") from None

    def message_lines(self, context: str) -> list[str]:
        rows = self._rows("SELECT body FROM messages WHERE context=? ORDER BY seq", context)
        return [body for (body,) in rows]

    def messages_bytes(self, context: str) -> int:
        """Return the size of the lines with their newlines."""
        sql = "SELECT coalesce(sum(length(CAST(body AS BLOB)) + 1), 0) FROM messages WHERE context=?"
        return int(self._rows(sql, context)[0][0])

    def append_messages(self, context: str, messages: list[Message]) -> None:
        with self._transaction() as db:
            self._append(db, context, messages)

    @staticmethod
    def _append(db: sqlite3.Connection, context: str, messages: list[Message]) -> None:
        (last,) = db.execute(
            "SELECT coalesce(max(seq),0) FROM messages WHERE context=?", (context,)
        ).fetchone()
        db.executemany(
            "INSERT INTO messages VALUES (?,?,?)",
            [(context, last + 1 + i, json.dumps(m, ensure_ascii=False)) for i, m in enumerate(messages)],
        )

    def replace_messages(self, context: str, messages: list[Message]) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM messages WHERE context=?", (context,))
            self._append(db, context, messages)

    def truncate_messages(self, context: str, count: int) -> None:
        """Keep only the first `count` messages."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM messages WHERE context=? AND seq NOT IN"
                " (SELECT seq FROM messages WHERE context=? ORDER BY seq LIMIT ?)",
                (context, context, count),
            )

    def models(self) -> list[tuple[str, str]]:
        return self._rows("SELECT name, path FROM models")

    def save_model(self, name: str, path: str) -> None:
        with self._transaction() as db:
            db.execute("REPLACE INTO models VALUES (?,?)", (name, path))

    def forget_path(self, model: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM models WHERE name=?", (model,))

    def remove_model(self, name: str) -> None:
        with self._transaction() as db:
            for table, column in (("models", "name"), ("pins", "model"), ("stays", "model")):
                db.execute(f"DELETE FROM {table} WHERE {column}=?", (name,))

    def stays(self) -> dict[str, str]:
        return dict(self._rows("SELECT model, keep_alive FROM stays"))

    def save_stay(self, model: str, keep_alive: str) -> None:
        """Store how long a model stays. Empty: as the configuration says."""
        with self._transaction() as db:
            db.execute("DELETE FROM stays WHERE model=?", (model,))
            if keep_alive:
                db.execute("INSERT INTO stays VALUES (?,?)", (model, keep_alive))

    def pins(self) -> dict[str, str]:
        return dict(self._rows("SELECT model, devices FROM pins"))

    def save_pin(self, model: str, devices: str | None) -> None:
        """Store the devices that a model is pinned to. None: remove its pin."""
        with self._transaction() as db:
            db.execute("DELETE FROM pins WHERE model=?", (model,))
            if devices is not None:
                db.execute("INSERT INTO pins VALUES (?,?)", (model, devices))

    # requests

    def reserve_numbers(self, count: int) -> int:
        """Reserve so many request numbers and return the first. No number is ever reserved or used twice."""
        with self._transaction() as db:
            used = db.execute(
                "SELECT coalesce(max(seq),0)+1 FROM sqlite_sequence WHERE name='requests'"
            ).fetchone()
            kept = db.execute("SELECT next FROM counters WHERE name='requests'").fetchone()
            first = max(int(used[0]), int(kept[0]) if kept else 0)
            db.execute("REPLACE INTO counters VALUES ('requests', ?)", (first + count,))
        return first

    def add_request(self, request: Request) -> None:
        """Store a new request. From here on it is accepted: it ends once, whatever happens to the daemon."""
        with self._statements() as db:  # one statement is a transaction by itself
            self._add_request(db, request)

    @staticmethod
    def _add_request(db: sqlite3.Connection, request: Request) -> None:
        """Insert the request, unless it is stored already or its agent is gone."""
        db.execute(
            "INSERT OR IGNORE INTO requests"
            " (id, uid, agent, agent_id, file, state, spec, submitted_s, parent)"
            " SELECT ?2,?3,?4,?1,?5,?6,?7,?8,?9 WHERE ?1=0 OR EXISTS (SELECT 1 FROM agents WHERE id=?1)",
            (request.agent_id, request.id, request.uid, request.agent, request.file, State.QUEUED,
             request.spec.dump(), request.submitted_s, request.parent),
        )  # fmt: skip

    def start_request(self, request: Request) -> None:
        """Mark a tool call before it acts. From here on it is never run again."""
        with self._statements() as db:
            self._add_request(db, request)  # its start may overtake `add_request`
            db.execute("UPDATE requests SET started_s=? WHERE id=?", (request.started_s, request.id))

    def park(self, made: dict[int, str]) -> None:
        """Store the partial answers of unfinished requests, by id, for the next daemon."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE requests SET parked=? WHERE id=? AND finished_s IS NULL",
                [(text, id) for id, text in made.items()],
            )

    def finish_request(self, request: Request, said: list[Message], keep: int) -> None:
        """Store the end, the agent's usage and the context's new turn `said`, all or none.

        Keep the `keep` newest requests of its agent.
        """
        spent = request.spent
        with self._transaction() as db:
            if not self._end_request(db, request):
                self._add_request(db, request)  # its end may overtake `add_request`
                if not self._end_request(db, request):  # its end is stored already, or its agent is gone
                    return
            db.execute(
                "UPDATE agents SET requests=requests+1, prompt_tokens=prompt_tokens+?,"
                " cached_tokens=cached_tokens+?, completion_tokens=completion_tokens+? WHERE id=?",
                (spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens, request.agent_id),
            )
            if said:
                grown = db.execute(
                    "UPDATE contexts SET tokens=?, model=?, unfinished='' WHERE name=? AND id=?",
                    (spent.prompt_tokens + spent.completion_tokens, request.spec.target,
                     request.spec.context_name, request.spec.turn_of),
                )  # fmt: skip
                if grown.rowcount:  # the context may be gone, and a new one may have its name
                    self._append(db, request.spec.context_name, said)
            self._forget_old(db, request, keep)

    @staticmethod
    def _end_request(db: sqlite3.Connection, request: Request) -> bool:
        usage = request.usage
        text = request.text if request.spec.keeps_text else ""
        ended = db.execute(
            "UPDATE requests SET state=?, finished_s=?, text=?, response=?, finish_reason=?, error=?,"
            " started_s=?, preemptions=?, prompt_tokens=?, cached_tokens=?, completion_tokens=?, family=?,"
            f" parked='' WHERE id=? AND finished_s IS NULL AND {FOUND}",
            (request.state, request.finished_s, text, request.document, request.finish_reason, request.error,
             request.started_s, request.preemptions, usage.prompt_tokens,
             usage.cached_tokens, usage.completion_tokens, request.family, request.id),
        )  # fmt: skip
        return ended.rowcount > 0

    def _forget_old(self, db: sqlite3.Connection, request: Request, keep: int) -> None:
        """Delete all but the newest ended requests of an agent, or of a user without an agent. This reads all
        kept requests, so it runs only now and then, and a few more are kept meanwhile.
        """
        same = "agent_id=? AND (agent_id<>0 OR uid=?)"
        who = (request.agent_id, request.uid)
        self._ended[who] += 1
        if self._ended[who] < keep // FORGET_SHARE:
            return
        del self._ended[who]
        ended = f"requests WHERE {same} AND finished_s IS NOT NULL"
        db.execute(
            f"DELETE FROM {ended} AND id <= (SELECT id FROM {ended} ORDER BY id DESC LIMIT 1 OFFSET ?)"
            # an unfinished loop still needs its steps
            " AND NOT EXISTS (SELECT 1 FROM requests p WHERE p.id=requests.parent AND p.finished_s IS NULL)",
            (*who, *who, keep),
        )

    def unfinished(self) -> list[Request]:
        """A row that cannot be read stays in the table, and is named in the log at every start."""
        found = []
        for row in self._select("finished_s IS NULL"):
            try:
                found.append(self._request(row))
            except StoreFailed as error:
                log.error("%s: it is left aside, and never runs", error)
        return found

    def request(self, id: int) -> Request | None:
        rows = self._select("id=?", id)
        return self._request(rows[0]) if rows else None

    def children(self, id: int) -> list[Request]:
        """Return the steps of a loop, in the order they were made."""
        return [self._request(row) for row in self._select("parent=?", id)]

    def give_requests(self, uid: int, to: int) -> None:
        """Give a user's requests to another, whose newest ones of models and tools stay the same."""
        with self._transaction() as db:
            db.execute("UPDATE requests SET file=iif(agent_id=0,'',file), uid=? WHERE uid=?", (to, uid))

    def remove_request(self, id: int) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM requests WHERE id=?", (id,))

    def request_ids(self, agent_id: int) -> list[int]:
        return [id for (id,) in self._rows("SELECT id FROM requests WHERE agent_id=? ORDER BY id", agent_id)]

    def newest_asked(self, agent_id: int) -> int:
        """The newest request of an agent that is no step of another; 0: none."""
        rows = self._rows("SELECT max(id) FROM requests WHERE agent_id=? AND parent=0", agent_id)
        return rows[0][0] or 0

    def newest(self, agent_id: int, file: str, uid: int | None) -> int | None:
        """Return the newest request of a transaction file. `uid` None: of all users."""
        rows = self._rows(
            "SELECT id FROM requests WHERE agent_id=? AND file=? AND (? IS NULL OR uid=?)"
            " ORDER BY id DESC LIMIT 1",
            agent_id, file, uid, uid,
        )  # fmt: skip
        return rows[0][0] if rows else None

    def _select(self, where: str, *arguments: object) -> list[tuple[Any, ...]]:
        return self._rows(
            "SELECT id, uid, agent, agent_id, file, state, spec, submitted_s, text, response, finish_reason,"
            " error, finished_s, started_s, preemptions, parent, parked, family, prompt_tokens,"
            " cached_tokens, completion_tokens"
            f" FROM requests WHERE {where} AND {FOUND} ORDER BY id",
            *arguments,
        )

    def _request(self, row: tuple[Any, ...]) -> Request:
        (id, uid, agent, agent_id, file, state, spec, submitted_s, text, document, finish_reason, error,
         finished_s, started_s, preemptions, parent, parked, family, *usage) = row  # fmt: skip
        try:
            raw = json.loads(spec)
            asked, now = self._kinds[raw.pop("kind")].load(raw), State(state)
        except (ValueError, KeyError, TypeError, AttributeError) as wrong:
            raise StoreFailed(f"request {id} (a row of requests) cannot be read: {in_words(wrong)}") from None
        return Request(
            id, uid, agent, file, asked, agent_id=agent_id, parent=parent, submitted_s=submitted_s,
            size_bytes=len(spec),
            state=now, text=text, document=document,
            finish_reason=finish_reason, error=error, finished_s=finished_s,
            started_s=started_s, preemptions=preemptions, parked=parked, family=family,
            usage=Usage(*usage),
        )  # fmt: skip
