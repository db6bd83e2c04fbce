-- name: lock_places
-- Keep other gateways from leasing slots of some places until this transaction ends; how often each was asked for, and
-- when last.
INSERT INTO slot_places (place_id, asks, asked_ms, answers)
SELECT value ->> 'place_id', 0, 0, 0 FROM jsonb_each(:rows)
WHERE true ORDER BY value ->> 'place_id'
ON CONFLICT (place_id) DO UPDATE SET asks = slot_places.asks
RETURNING place_id, asks, asked_ms;

-- name: read_slots
-- The slots of some places that gateways have leased now, and up to which ask each has answered.
SELECT place_id, owner, slots, answered FROM jsonb_each(:rows) JOIN slots ON place_id = value ->> 'place_id'
WHERE until_ms > CAST(:now_ms AS BIGINT);

-- name: set_slots
-- What one gateway has leased from now on.
INSERT INTO slots (place_id, owner, slots, until_ms, answered)
SELECT
    value ->> 'place_id', CAST(:owner AS TEXT), CAST(value ->> 'slots' AS BIGINT), CAST(value ->> 'until_ms' AS BIGINT),
    CAST(value ->> 'answered' AS BIGINT)
FROM jsonb_each(:rows)
WHERE true
ON CONFLICT (place_id, owner) DO UPDATE SET
    slots = excluded.slots, until_ms = excluded.until_ms, answered = excluded.answered;

-- name: drop_slots
-- One gateway has no more slots of some places.
DELETE FROM slots WHERE owner = :owner AND place_id IN (SELECT value ->> 'place_id' FROM jsonb_each(:rows));

-- name: ask_and_answer
-- Ask the other gateways for slots of some places, or tell them that one has answered; all hear of it.
UPDATE slot_places SET
    asks = asks + CAST(value ->> 'asks' AS BIGINT), answers = answers + CAST(value ->> 'answers' AS BIGINT),
    asked_ms = CAST(value ->> 'asked_ms' AS BIGINT)
FROM jsonb_each(:rows)
WHERE place_id = value ->> 'place_id';

-- name: asked_of
-- The places of which a gateway has slots and has not answered the latest ask.
SELECT place_id FROM slots JOIN slot_places USING (place_id) WHERE owner = :owner AND answered < asks;

-- name: drop_slots_of
-- One gateway has no slots: it has just started, or ends.
DELETE FROM slots WHERE owner = :owner;

-- name: drop_all_slots
-- No gateway has slots: the one that starts is alone.
DELETE FROM slots;

-- name: forget_slots
-- Leases that have ended by themselves: their gateways are dead.
DELETE FROM slots WHERE until_ms < CAST(:now_ms AS BIGINT);
