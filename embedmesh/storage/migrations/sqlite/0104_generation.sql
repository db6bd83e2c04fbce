-- Runs before the new code. Adds what models that generate need: prices by meter, and notes of what streams have delivered.
-- See `0100_start.sql` for units, and for what each of the older tables is.

-- -- prices: of one meter each. `input`, `cached` and `output` are in nano-USD per million tokens; `images:WIDTHxHEIGHT`
-- is in nano-USD for one image of that size

ALTER TABLE prices ADD COLUMN meter TEXT NOT NULL DEFAULT 'input'
CHECK (meter IN ('input', 'cached', 'output') OR meter LIKE 'images:_%');

DROP INDEX prices_one_at_a_time;
CREATE UNIQUE INDEX prices_one_at_a_time ON prices (model, meter, coalesce(account_id, '')) WHERE to_ms IS NULL;

DROP TRIGGER prices_only_end;

CREATE TRIGGER prices_only_end BEFORE UPDATE ON prices
WHEN NEW.to_ms > OLD.to_ms OR NEW.to_ms IS NULL OR OLD.price_id <> NEW.price_id OR OLD.model <> NEW.model
    OR OLD.meter <> NEW.meter OR OLD.account_id IS NOT NEW.account_id OR OLD.price <> NEW.price
    OR OLD.from_ms <> NEW.from_ms
BEGIN SELECT RAISE(ABORT, 'a price only ends'); END;

-- -- hold_notes: what a stream has delivered by `noted_ms`, and what it costs until then, as a `rules.holds.Charge` in
-- JSON. Only while the hold is open: whoever ends the hold deletes its note

CREATE TABLE hold_notes (
    hold_id TEXT PRIMARY KEY REFERENCES holds,
    cost INTEGER NOT NULL CHECK (cost >= 0),
    charge TEXT NOT NULL,
    noted_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TRIGGER hold_notes_are_covered BEFORE INSERT ON hold_notes WHEN NOT EXISTS (
    SELECT 1 FROM holds WHERE hold_id = NEW.hold_id AND state = 'open' AND amount >= NEW.cost
)
BEGIN SELECT RAISE(ABORT, 'a note is of an open hold, which covers it'); END;

CREATE TRIGGER hold_notes_stay_covered BEFORE UPDATE ON hold_notes WHEN NEW.hold_id <> OLD.hold_id OR NOT EXISTS (
    SELECT 1 FROM holds WHERE hold_id = NEW.hold_id AND state = 'open' AND amount >= NEW.cost
)
BEGIN SELECT RAISE(ABORT, 'a note is of an open hold, which covers it'); END;

-- -- holds: two more ends. A hold whose gateway has died or fallen silent is captured at its note, if it has one.
-- SQLite cannot change a CHECK, and copying the largest table for two words would take minutes. This is the way that its
-- documentation has for changes that leave the rows as they are: https://sqlite.org/lang_altertable.html, section 7

PRAGMA writable_schema = ON;

UPDATE sqlite_schema SET sql = replace(
    replace(
        sql,
        'CHECK ((state = ''captured'') = (ended_by IS ''capture''))',
        'CHECK ((state = ''captured'') = (ended_by IS ''capture'' OR ended_by IS ''expire_noted'' OR ended_by IS ''recover_noted''))'
    ),
    'ended_by IN (''capture'', ''release'', ''expire'', ''recover'')',
    'ended_by IN (''capture'', ''release'', ''expire'', ''recover'', ''expire_noted'', ''recover_noted'')'
) WHERE type = 'table' AND name = 'holds';

PRAGMA writable_schema = RESET;

-- The note is looked for in the trigger that every end of a hold has: one of its own would cost each request 0.5 µs. With a
-- list of more than two words SQLite would make a table of them for each row, which costs 2 µs.
DROP TRIGGER holds_give_back;

CREATE TRIGGER holds_give_back AFTER UPDATE OF state ON holds WHEN NEW.state <> 'open'
BEGIN
    UPDATE accounts SET held = held - OLD.amount WHERE account_id = OLD.account_id;
    SELECT RAISE(ABORT, 'a hold that its gateway did not end is captured at its note, or released without one')
    WHERE NEW.ended_by <> 'capture' AND NEW.ended_by <> 'release'
        AND (SELECT cost FROM hold_notes WHERE hold_id = OLD.hold_id) IS NOT NEW.captured;
END;

DROP TRIGGER holds_change_hands_by_a_lock;

CREATE TRIGGER holds_change_hands_by_a_lock BEFORE UPDATE OF owner, deadline_ms ON holds WHEN NOT EXISTS (
    SELECT 1 FROM locks WHERE hold_id = OLD.hold_id AND used_ms IS NOT NULL AND expires_ms = OLD.deadline_ms
) AND (
    NEW.owner <> OLD.owner OR NEW.deadline_ms < OLD.deadline_ms
    OR NOT EXISTS (SELECT 1 FROM hold_notes WHERE hold_id = OLD.hold_id)
)
BEGIN SELECT RAISE(ABORT, 'a hold keeps its terms, unless its lock is used or its stream was noted'); END;
