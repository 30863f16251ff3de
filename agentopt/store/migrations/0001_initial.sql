-- One file holds everything a run leaves. JSON columns are text; `body` columns are zlib-compressed JSON.

CREATE TABLE runs (
    id       TEXT PRIMARY KEY,
    created  REAL NOT NULL,            -- seconds since the epoch
    updated  REAL NOT NULL,
    status   TEXT NOT NULL,
    config   TEXT NOT NULL,
    summary  TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE events (
    seq      INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id   TEXT NOT NULL,
    time     REAL NOT NULL,
    kind     TEXT NOT NULL,
    payload  TEXT NOT NULL
);
CREATE INDEX events_of_run ON events (run_id, seq);

CREATE TABLE candidates (
    run_id   TEXT NOT NULL,
    hash     TEXT NOT NULL,
    payload  TEXT NOT NULL,
    PRIMARY KEY (run_id, hash)
);

-- The only rows statistics read. `payload` holds what is not in the key.
CREATE TABLE evaluations (
    run_id         TEXT NOT NULL,
    candidate_hash TEXT NOT NULL,
    dataset_id     TEXT NOT NULL,
    example_id     TEXT NOT NULL,
    repeat         INTEGER NOT NULL,
    seed           INTEGER NOT NULL,
    payload        TEXT NOT NULL,
    PRIMARY KEY (run_id, candidate_hash, dataset_id, example_id, repeat, seed)
);

-- The cache of language model replies: key = sha256 of the canonical request.
CREATE TABLE replies (
    key      BLOB PRIMARY KEY,         -- 32 bytes
    created  REAL NOT NULL,
    model    TEXT NOT NULL,
    reply    TEXT NOT NULL,
    body     BLOB                      -- the request, for inspection
);

CREATE TABLE traces (
    id       TEXT PRIMARY KEY,
    run_id   TEXT NOT NULL,
    created  REAL NOT NULL,
    body     BLOB NOT NULL
);
CREATE INDEX traces_of_run ON traces (run_id, created);

CREATE TABLE capsules (
    key      TEXT PRIMARY KEY,
    created  REAL NOT NULL,
    payload  TEXT NOT NULL
) WITHOUT ROWID;
