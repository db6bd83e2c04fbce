-- Runs before the new code. Adds files, and batches that are worked off from them.
-- See `0100_start.sql` for units, and for what each of the older tables is.

-- -- files: what is in them lies on the disk. Their ids begin with the time. One that is deleted is seen by nobody, and
-- its row stays until no batch reads it any more

CREATE TABLE files (
    file_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL CHECK (purpose IN ('batch', 'batch_output')),
    bytes INTEGER NOT NULL CHECK (bytes >= 0),
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    deleted_ms INTEGER
) STRICT, WITHOUT ROWID;
-- With all that is added up, so that no row is looked at.
CREATE INDEX files_of_account ON files (account_id, file_id, bytes, purpose);
CREATE INDEX files_by_end ON files (expires_ms);
CREATE INDEX files_deleted ON files (deleted_ms) WHERE deleted_ms IS NOT NULL;

CREATE TRIGGER files_keep_their_terms
BEFORE UPDATE OF file_id, account_id, filename, purpose, bytes, created_ms, expires_ms ON files
BEGIN SELECT RAISE(ABORT, 'a file keeps its terms'); END;

CREATE TRIGGER files_are_deleted_once BEFORE UPDATE OF deleted_ms ON files WHEN OLD.deleted_ms IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'a file is deleted once'); END;

-- -- batches: the moves are those of rules.batches.MOVES. The gateway that has a batch until `lease_ms` writes under the
-- latest `epoch`. Its money is that of the tab with its own id, which is its own owner: no gateway's. `prices` are by meter, in
-- JSON. `output_bytes` is the room that is kept for its output files. `charged` and `cost` are those of its settled lines.
-- `swept`: its units and its segments were deleted

CREATE TABLE batches (
    batch_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL REFERENCES keys,
    state TEXT NOT NULL DEFAULT 'validating' CHECK (state IN (
        'validating', 'in_progress', 'finalizing', 'cancelling', 'completed', 'failed', 'expired', 'cancelled'
    )),
    endpoint TEXT NOT NULL,
    model TEXT,
    input_file_id TEXT NOT NULL,
    output_file_id TEXT,
    error_file_id TEXT,
    window_s INTEGER NOT NULL,
    output_expires_s INTEGER NOT NULL,
    metadata TEXT,
    errors TEXT,
    prices TEXT,
    amount INTEGER NOT NULL DEFAULT 0,
    output_bytes INTEGER NOT NULL DEFAULT 0 CHECK (output_bytes >= 0),
    units INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    charged INTEGER NOT NULL DEFAULT 0,
    cost INTEGER NOT NULL DEFAULT 0 CHECK (cost BETWEEN 0 AND amount),
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    in_progress_ms INTEGER,
    finalizing_ms INTEGER,
    completed_ms INTEGER,
    failed_ms INTEGER,
    expired_ms INTEGER,
    cancelling_ms INTEGER,
    cancelled_ms INTEGER,
    ended_ms INTEGER,
    swept INTEGER NOT NULL DEFAULT 0 CHECK (swept IN (0, 1)),
    owner TEXT,
    lease_ms INTEGER NOT NULL DEFAULT 0,
    epoch INTEGER NOT NULL DEFAULT 0,
    CHECK ((state IN ('completed', 'failed', 'expired', 'cancelled')) = (ended_ms IS NOT NULL)),
    CHECK (completed >= 0 AND failed >= 0 AND completed + failed <= total)
) STRICT, WITHOUT ROWID;
CREATE INDEX batches_of_account ON batches (account_id, batch_id);
CREATE INDEX batches_open ON batches (account_id) WHERE ended_ms IS NULL;
CREATE INDEX batches_reading ON batches (input_file_id) WHERE ended_ms IS NULL;
CREATE INDEX batches_unswept ON batches (ended_ms) WHERE ended_ms IS NOT NULL AND swept = 0;
CREATE INDEX batches_ended ON batches (ended_ms) WHERE ended_ms IS NOT NULL;

CREATE TRIGGER batches_start_validating BEFORE INSERT ON batches WHEN NEW.state <> 'validating' OR NEW.epoch <> 0
BEGIN SELECT RAISE(ABORT, 'a batch starts validating'); END;

CREATE TRIGGER batches_move_on BEFORE UPDATE OF state ON batches WHEN NEW.state <> OLD.state AND NOT CASE OLD.state
    WHEN 'validating' THEN NEW.state IN ('in_progress', 'failed', 'cancelling', 'expired')
    WHEN 'in_progress' THEN NEW.state IN ('finalizing', 'cancelling', 'expired')
    WHEN 'finalizing' THEN NEW.state = 'completed'
    WHEN 'cancelling' THEN NEW.state = 'cancelled'
    ELSE FALSE
END
BEGIN SELECT RAISE(ABORT, 'a batch only moves on'); END;

CREATE TRIGGER batches_begin_with_their_money BEFORE UPDATE OF state ON batches
WHEN NEW.state = 'in_progress' AND OLD.state <> 'in_progress' AND NOT EXISTS (
    SELECT 1 FROM tabs WHERE tab_id = NEW.batch_id AND account_id = NEW.account_id AND key_id = NEW.key_id
        AND amount = NEW.amount AND ended_ms IS NULL
)
BEGIN SELECT RAISE(ABORT, 'a batch begins with a tab of its own over what it costs'); END;

-- The last word in a batch's life: nothing changes then but that it was swept.
CREATE TRIGGER batches_end_once
BEFORE UPDATE OF
    state, output_file_id, error_file_id, completed, failed, charged, cost, input_tokens, cached_tokens, output_tokens, epoch
ON batches WHEN OLD.ended_ms IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'a batch ends once'); END;

CREATE TRIGGER batches_give_their_money_back BEFORE UPDATE OF ended_ms ON batches
WHEN NEW.ended_ms IS NOT NULL AND EXISTS (SELECT 1 FROM tabs WHERE tab_id = NEW.batch_id AND ended_ms IS NULL)
BEGIN SELECT RAISE(ABORT, 'a batch ends with its tab'); END;

CREATE TRIGGER batches_keep_their_terms
BEFORE UPDATE OF
    batch_id, account_id, key_id, endpoint, input_file_id, window_s, output_expires_s, metadata, created_ms, expires_ms
ON batches
BEGIN SELECT RAISE(ABORT, 'a batch keeps its terms'); END;

CREATE TRIGGER batches_only_grow BEFORE UPDATE OF completed, failed, charged, cost, epoch ON batches
WHEN NEW.completed < OLD.completed OR NEW.failed < OLD.failed OR NEW.charged < OLD.charged OR NEW.cost < OLD.cost
    OR NEW.epoch < OLD.epoch
BEGIN SELECT RAISE(ABORT, 'what a batch has done only grows'); END;

CREATE TRIGGER batches_stay_until_their_end BEFORE DELETE ON batches
WHEN OLD.ended_ms IS NULL AND (OLD.state <> 'validating' OR OLD.units > 0)
BEGIN SELECT RAISE(ABORT, 'a batch is kept until its end'); END;

-- -- batch_units: some lines of a batch's file each, from `first_byte` on. Done once, with its results in `segment`

CREATE TABLE batch_units (
    batch_id TEXT NOT NULL REFERENCES batches,
    unit INTEGER NOT NULL CHECK (unit >= 0),
    first_byte INTEGER NOT NULL CHECK (first_byte >= 0),
    bytes INTEGER NOT NULL CHECK (bytes > 0),
    first_line INTEGER NOT NULL CHECK (first_line >= 0),
    lines INTEGER NOT NULL CHECK (lines > 0),
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'done')),
    segment TEXT,
    output_bytes INTEGER CHECK (output_bytes >= 0),
    error_bytes INTEGER CHECK (error_bytes >= 0),
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    charged INTEGER NOT NULL DEFAULT 0 CHECK (charged BETWEEN 0 AND completed),
    cost INTEGER NOT NULL DEFAULT 0 CHECK (cost >= 0),
    PRIMARY KEY (batch_id, unit),
    CHECK (completed + failed = CASE state WHEN 'done' THEN lines ELSE 0 END),
    CHECK ((state = 'done') = (segment IS NOT NULL AND output_bytes IS NOT NULL AND error_bytes IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX batch_units_open ON batch_units (batch_id, unit) WHERE state = 'open';

CREATE TRIGGER batch_units_start_open BEFORE INSERT ON batch_units WHEN NEW.state <> 'open' OR NOT EXISTS (
    SELECT 1 FROM batches WHERE batch_id = NEW.batch_id AND state = 'validating'
)
BEGIN SELECT RAISE(ABORT, 'a unit starts open, before its batch is in progress'); END;

CREATE TRIGGER batch_units_are_done_once BEFORE UPDATE ON batch_units
WHEN OLD.state <> 'open' OR NEW.state <> 'done' OR NEW.batch_id <> OLD.batch_id OR NEW.unit <> OLD.unit
    OR NEW.first_byte <> OLD.first_byte OR NEW.bytes <> OLD.bytes OR NEW.first_line <> OLD.first_line
    OR NEW.lines <> OLD.lines OR NEW.tokens <> OLD.tokens
BEGIN SELECT RAISE(ABORT, 'a unit is done once, and keeps its terms'); END;

CREATE TRIGGER batch_units_stay_while_they_are_worked_off BEFORE DELETE ON batch_units WHEN EXISTS (
    SELECT 1 FROM batches WHERE batch_id = OLD.batch_id AND ended_ms IS NULL AND state <> 'validating'
)
BEGIN SELECT RAISE(ABORT, 'units are kept until their batch has ended'); END;

-- -- tabs: one over nothing is that of a batch whose model is free.
-- SQLite cannot change a CHECK. This is the way that its documentation has for changes that leave the rows as they are:
-- https://sqlite.org/lang_altertable.html, section 7

PRAGMA writable_schema = ON;

UPDATE sqlite_schema SET sql = replace(
    sql,
    'CHECK (amount BETWEEN 1 AND 4611686018427387904)',
    'CHECK (amount BETWEEN 0 AND 4611686018427387904 AND (amount > 0 OR owner = tab_id))'
) WHERE type = 'table' AND name = 'tabs';

PRAGMA writable_schema = RESET;
