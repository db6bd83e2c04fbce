-- Runs before the new code. Adds prices by meter and notes of streams, as SQLite's script does: see there for what for.

-- -- prices

ALTER TABLE prices ADD COLUMN meter TEXT NOT NULL DEFAULT 'input'
CHECK (meter IN ('input', 'cached', 'output') OR meter LIKE 'images:_%');

DROP INDEX prices_one_at_a_time;
CREATE UNIQUE INDEX prices_one_at_a_time ON prices (model, meter, coalesce(account_id, '')) WHERE to_ms IS NULL;

DROP TRIGGER prices_only_end ON prices;

CREATE TRIGGER prices_only_end BEFORE UPDATE ON prices FOR EACH ROW
WHEN (NEW.to_ms > OLD.to_ms OR NEW.to_ms IS NULL OR OLD.price_id <> NEW.price_id OR OLD.model <> NEW.model
    OR OLD.meter <> NEW.meter OR OLD.account_id IS DISTINCT FROM NEW.account_id OR OLD.price <> NEW.price
    OR OLD.from_ms <> NEW.from_ms)
EXECUTE FUNCTION refuse('a price only ends');

-- -- hold_notes

CREATE TABLE hold_notes (
    hold_id TEXT PRIMARY KEY REFERENCES holds,
    cost BIGINT NOT NULL CHECK (cost >= 0),
    charge TEXT NOT NULL,
    noted_ms BIGINT NOT NULL
) WITH (fillfactor = 60);  -- a note is written anew every few seconds

CREATE FUNCTION cover_note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM holds
        WHERE hold_id = NEW.hold_id AND state NOT IN ('captured', 'released') AND amount >= NEW.cost
    ) THEN
        RAISE EXCEPTION 'a note is of an open hold, which covers it' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER hold_notes_are_covered BEFORE INSERT OR UPDATE ON hold_notes FOR EACH ROW EXECUTE FUNCTION cover_note();

CREATE TRIGGER hold_notes_stay_covered BEFORE UPDATE OF hold_id ON hold_notes FOR EACH ROW
WHEN (NEW.hold_id <> OLD.hold_id) EXECUTE FUNCTION refuse('a note is of an open hold, which covers it');

-- -- holds

ALTER TABLE holds DROP CONSTRAINT holds_check4, DROP CONSTRAINT holds_ended_by_check,
    ADD CONSTRAINT holds_are_captured_by CHECK (
        (state = 'captured') = coalesce(ended_by IN ('capture', 'expire_noted', 'recover_noted'), FALSE)
    ),
    ADD CONSTRAINT holds_ended_by_check CHECK (
        ended_by IS NULL
        OR ended_by IN ('capture', 'release', 'expire', 'recover', 'expire_noted', 'recover_noted')
    );

CREATE FUNCTION capture_at_note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT cost FROM hold_notes WHERE hold_id = OLD.hold_id) IS DISTINCT FROM NEW.captured THEN
        RAISE EXCEPTION 'a hold that its gateway did not end is captured at its note, or released without one'
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER holds_are_captured_at_their_notes BEFORE UPDATE OF state ON holds FOR EACH ROW
WHEN (NEW.ended_by <> 'capture' AND NEW.ended_by <> 'release') EXECUTE FUNCTION capture_at_note();

CREATE OR REPLACE FUNCTION change_hands_by_a_lock() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM locks WHERE hold_id = OLD.hold_id AND used_ms IS NOT NULL AND expires_ms = OLD.deadline_ms
    ) AND (
        NEW.owner <> OLD.owner OR NEW.deadline_ms < OLD.deadline_ms
        OR NOT EXISTS (SELECT 1 FROM hold_notes WHERE hold_id = OLD.hold_id)
    ) THEN
        RAISE EXCEPTION 'a hold keeps its terms, unless its lock is used or its stream was noted'
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
