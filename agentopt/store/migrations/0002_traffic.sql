-- What a server captured: one row per exchange that says in which trace it is, and what users said of it.

CREATE TABLE exchanges (
    id       TEXT PRIMARY KEY,         -- the id that the client was given
    run_id   TEXT NOT NULL,
    trace_id TEXT NOT NULL,
    created  REAL NOT NULL,            -- seconds since the epoch
    payload  TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX exchanges_of_run ON exchanges (run_id, created);

-- The exchange need not be there: feedback counts for its variant also where the exchange itself was not kept.
CREATE TABLE feedback (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id      TEXT NOT NULL,
    exchange_id TEXT NOT NULL,
    time        REAL NOT NULL,
    payload     TEXT NOT NULL
);
CREATE INDEX feedback_of_exchange ON feedback (exchange_id, seq);
CREATE INDEX feedback_of_run ON feedback (run_id, seq);
