-- name: open_minute
-- Begin a key's minute.
INSERT INTO leases (key_id, minute, requests, tokens) VALUES (:key_id, :minute, 0, 0) ON CONFLICT DO NOTHING;

-- name: read_minute
-- How much of a key's minute is leased. An update that changes nothing: others wait until we have added ours.
UPDATE leases SET requests = requests WHERE key_id = :key_id AND minute = :minute RETURNING requests, tokens;

-- name: lease
-- Lease some of it to a gateway.
UPDATE leases SET requests = :requests, tokens = :tokens WHERE key_id = :key_id AND minute = :minute;

-- name: forget_minutes
-- Minutes that are over.
DELETE FROM leases WHERE minute < :minute;
