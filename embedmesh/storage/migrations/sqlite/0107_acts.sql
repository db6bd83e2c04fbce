-- Runs before the new code. Adds acts: what operators have changed, one row an act, each hashed with the row before.
-- See `0100_start.sql` for units.

-- -- acts: the audit. Never changed, never deleted. `changes` is JSON: name -> value, or [old, new]. `hash` is BLAKE2b-256
-- over the hash before and all other columns. How many there were is the fact `acts`: missing rows at the end are noticed

CREATE TABLE acts (
    act_id INTEGER PRIMARY KEY CHECK (act_id > 0),
    created_ms INTEGER NOT NULL,
    actor TEXT NOT NULL,
    verb TEXT NOT NULL,
    object_id TEXT NOT NULL,
    changes TEXT NOT NULL,
    origin TEXT NOT NULL,
    request_id TEXT NOT NULL,
    hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32)
) STRICT;
CREATE INDEX acts_of_object ON acts (object_id, act_id);
CREATE INDEX acts_of_actor ON acts (actor, act_id);

CREATE TRIGGER acts_grow BEFORE INSERT ON acts WHEN NEW.act_id <= (SELECT max(act_id) FROM acts)
BEGIN SELECT RAISE(ABORT, 'an act follows all others'); END;

CREATE TRIGGER acts_stay BEFORE DELETE ON acts
BEGIN SELECT RAISE(ABORT, 'acts are append-only'); END;

CREATE TRIGGER acts_never_change BEFORE UPDATE ON acts
BEGIN SELECT RAISE(ABORT, 'acts are append-only'); END;

INSERT INTO facts (name, value) VALUES ('acts', '0');

CREATE TRIGGER acts_are_counted_up BEFORE UPDATE ON facts
WHEN OLD.name = 'acts' AND (NEW.name <> 'acts' OR CAST(NEW.value AS INTEGER) < CAST(OLD.value AS INTEGER))
BEGIN SELECT RAISE(ABORT, 'acts are append-only'); END;

CREATE TRIGGER acts_stay_counted BEFORE DELETE ON facts WHEN OLD.name = 'acts'
BEGIN SELECT RAISE(ABORT, 'acts are append-only'); END;

-- A block covers the acts until then, too: with its hash, that of the act `acts`.
ALTER TABLE blocks ADD COLUMN acts INTEGER CHECK (acts > 0);
