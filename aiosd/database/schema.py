"""The tables of aios.db, and the migrations from older versions."""

SCHEMA_VERSION = 11
SCHEMA = """
CREATE TABLE agents (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, settings TEXT NOT NULL,
    requests INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0);
CREATE TABLE contexts (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE,
    tokens INTEGER NOT NULL DEFAULT 0, model TEXT NOT NULL DEFAULT '', pinned INTEGER NOT NULL DEFAULT 0,
    salt TEXT NOT NULL DEFAULT '', unfinished TEXT NOT NULL DEFAULT '');
CREATE TABLE messages (context TEXT NOT NULL, seq INTEGER NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (context, seq)) WITHOUT ROWID;
CREATE TABLE notes (context INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE requests (id INTEGER PRIMARY KEY AUTOINCREMENT, uid INTEGER NOT NULL, agent TEXT NOT NULL,
    agent_id INTEGER NOT NULL, file TEXT NOT NULL, state TEXT NOT NULL, spec TEXT NOT NULL,
    submitted_s REAL NOT NULL, finished_s REAL,
    text TEXT NOT NULL DEFAULT '', response TEXT NOT NULL DEFAULT '', finish_reason TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT '', started_s REAL, preemptions INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, parent INTEGER NOT NULL DEFAULT 0,
    parked TEXT NOT NULL DEFAULT '', family TEXT NOT NULL DEFAULT '');
CREATE INDEX requests_by_agent ON requests (agent_id, id);
CREATE INDEX requests_by_parent ON requests (parent) WHERE parent<>0;
CREATE TABLE permissions (path TEXT PRIMARY KEY, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    mode INTEGER NOT NULL);
CREATE TABLE models (name TEXT PRIMARY KEY, path TEXT NOT NULL);
CREATE TABLE pins (model TEXT PRIMARY KEY, devices TEXT NOT NULL);
CREATE TABLE grants (kind TEXT NOT NULL, name TEXT NOT NULL, ids TEXT NOT NULL, PRIMARY KEY (kind, name));
CREATE TABLE counters (name TEXT PRIMARY KEY, next INTEGER NOT NULL);
CREATE TABLE accounts (uid INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE stays (model TEXT PRIMARY KEY, keep_alive TEXT NOT NULL);
CREATE TABLE keys (id TEXT PRIMARY KEY, sha256 TEXT NOT NULL, uid INTEGER NOT NULL, user TEXT NOT NULL,
    name TEXT NOT NULL, created_s INTEGER NOT NULL, agent TEXT NOT NULL, agent_id INTEGER NOT NULL,
    expires_s INTEGER, tokens_per_day INTEGER, used_s INTEGER NOT NULL);
"""
MIGRATIONS = {  # version → statements that make the next version
    1: f"""
ALTER TABLE contexts RENAME TO old;
{next(line for line in SCHEMA.split(";") if "TABLE contexts" in line)};
INSERT INTO contexts (name, tokens) SELECT name, tokens FROM old;
DROP TABLE old;
""",
    2: """
DROP INDEX IF EXISTS requests_by_file;
ALTER TABLE requests ADD COLUMN parent INTEGER NOT NULL DEFAULT 0;
CREATE INDEX requests_by_parent ON requests (parent) WHERE parent<>0;
""",
    3: """
CREATE TABLE grants (kind TEXT NOT NULL, name TEXT NOT NULL, ids TEXT NOT NULL, PRIMARY KEY (kind, name));
""",
    4: "ALTER TABLE requests ADD COLUMN parked TEXT NOT NULL DEFAULT '';",
    5: "CREATE TABLE pins (model TEXT PRIMARY KEY, devices TEXT NOT NULL);",
    6: """
CREATE TABLE counters (name TEXT PRIMARY KEY, next INTEGER NOT NULL);
ALTER TABLE requests ADD COLUMN family TEXT NOT NULL DEFAULT '';
UPDATE requests SET spec = CASE coalesce(json_extract(spec,'$.operation'),'llm')
WHEN 'llm' THEN iif(coalesce(json_extract(spec,'$.steps'),0) > 0,
    json_set(json_remove(spec,'$.operation'),'$.kind','loop'),
    json_set(json_remove(spec,'$.operation','$.steps','$.groups'),'$.kind','llm'))
WHEN 'tool' THEN json_object('kind','tool','nice',json_extract(spec,'$.nice'),
    'tool',substr(json_extract(spec,'$.model'),7),
    'arguments',coalesce(json_extract(spec,'$.messages[0].content'),''),
    'groups',json(coalesce(json_extract(spec,'$.groups'),'[]')))
ELSE json_object('kind',json_extract(spec,'$.operation'),'nice',json_extract(spec,'$.nice'),
    'json',json('true'),'input',coalesce(json_extract(spec,'$.messages[0].content'),''),'model',json_extract(spec,'$.model'))
    END; """,
    7: "CREATE TABLE accounts (uid INTEGER PRIMARY KEY, name TEXT NOT NULL);",
    8: "CREATE TABLE stays (model TEXT PRIMARY KEY, keep_alive TEXT NOT NULL);",
    9: f"{next(line for line in SCHEMA.split(';') if 'TABLE keys' in line)};",
    10: "CREATE TABLE notes (context INTEGER PRIMARY KEY, body TEXT NOT NULL);",
}
