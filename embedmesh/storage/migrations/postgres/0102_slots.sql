-- Runs before the new code. How many requests a key has at one time is leased to gateways, no longer counted by open holds.
-- What the tables are for, SQLite's script says.

-- -- keys

ALTER TABLE keys ADD COLUMN place_id TEXT;

WITH RECURSIVE places (key_id, place_id) AS (
    SELECT key_id, key_id FROM keys AS first WHERE NOT EXISTS (SELECT 1 FROM keys AS old WHERE old.rotated_to = first.key_id)
    UNION ALL SELECT rotated_to, places.place_id FROM places JOIN keys AS old USING (key_id) WHERE rotated_to IS NOT NULL
)
UPDATE keys SET place_id = places.place_id FROM places WHERE places.key_id = keys.key_id AND places.place_id <> keys.key_id;

-- -- slots

CREATE TABLE slot_places (
    place_id TEXT PRIMARY KEY,
    asks BIGINT NOT NULL,
    asked_ms BIGINT NOT NULL,
    answers BIGINT NOT NULL
) WITH (fillfactor = 60);

CREATE TABLE slots (
    place_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    slots BIGINT NOT NULL CHECK (slots > 0),
    until_ms BIGINT NOT NULL,
    answered BIGINT NOT NULL,
    PRIMARY KEY (place_id, owner)
) WITH (fillfactor = 60);
CREATE INDEX slots_of_owner ON slots (owner);

INSERT INTO changes (kind) VALUES ('slots');

CREATE TRIGGER slots_asked_for AFTER UPDATE OF asks, answers ON slot_places FOR EACH ROW
WHEN (OLD.asks <> NEW.asks OR OLD.answers <> NEW.answers) EXECUTE FUNCTION note_change('slots');

-- -- holds need room in budgets only

CREATE OR REPLACE FUNCTION has_room(key keys, wanted BIGINT, now_ms BIGINT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$
BEGIN
    RETURN has_budget(key, wanted, now_ms);
END $$;
