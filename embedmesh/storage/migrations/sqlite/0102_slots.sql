-- Runs before the new code. How many requests a key has at one time is leased to gateways, no longer counted by open holds.

-- -- keys: a key that took another's place has that one's: the first key's id. All keys of a place share its slots

ALTER TABLE keys ADD COLUMN place_id TEXT;

WITH RECURSIVE places (key_id, place_id) AS (
    SELECT key_id, key_id FROM keys AS first WHERE NOT EXISTS (SELECT 1 FROM keys AS old WHERE old.rotated_to = first.key_id)
    UNION ALL SELECT rotated_to, places.place_id FROM places JOIN keys AS old USING (key_id) WHERE rotated_to IS NOT NULL
)
UPDATE keys SET place_id = places.place_id FROM places WHERE places.key_id = keys.key_id AND places.place_id <> keys.key_id;

-- -- slots: how many requests of a place each gateway may have under way, until when. A gateway that needs more than are
-- left asks the others; one that has none to spare, or has given them back, has answered all that were asked until then

CREATE TABLE slot_places (
    place_id TEXT PRIMARY KEY,
    asks INTEGER NOT NULL,
    asked_ms INTEGER NOT NULL,
    answers INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE slots (
    place_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    slots INTEGER NOT NULL CHECK (slots > 0),
    until_ms INTEGER NOT NULL,
    answered INTEGER NOT NULL,
    PRIMARY KEY (place_id, owner)
) STRICT, WITHOUT ROWID;
CREATE INDEX slots_of_owner ON slots (owner);

INSERT INTO changes (kind) VALUES ('slots');

CREATE TRIGGER slots_asked_for AFTER UPDATE OF asks, answers ON slot_places
WHEN OLD.asks <> NEW.asks OR OLD.answers <> NEW.answers
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'slots'; END;

-- -- holds need room in budgets only

DROP TRIGGER holds_need_room;

CREATE TRIGGER holds_need_room BEFORE INSERT ON holds
BEGIN
    SELECT RAISE(IGNORE)
    FROM (
        SELECT NEW.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_id = NEW.key_id
    ) CROSS JOIN keys ON keys.key_id = counted
    WHERE coalesce(budget_day, budget_month) IS NOT NULL AND (
        budget_day < NEW.amount + (SELECT held FROM key_held WHERE key_id = counted)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day = NEW.created_ms / 86400000)
            + coalesce((SELECT cost FROM drawn_days WHERE key_id = counted AND day = NEW.created_ms / 86400000), 0)
        OR budget_month < NEW.amount + (SELECT held FROM key_held WHERE key_id = counted)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.created_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.created_ms / 86400000)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.created_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.created_ms / 86400000)
    );
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    SELECT RAISE(IGNORE) WHERE changes() = 0;
END;
