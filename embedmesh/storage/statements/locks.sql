-- name: unused_locks
-- How many locks of an account a request may use yet, by key, and when the first of these ends. The money of each is held:
-- a lock of which its caller did not hear is deleted.
SELECT key_id, count(*), min(expires_ms) FROM locks
WHERE account_id = :account_id AND used_ms IS NULL AND expires_ms > CAST(:now_ms AS BIGINT)
GROUP BY key_id;

-- name: claim_unused
-- What stands for the request that will use a lock, if its hold was placed.
INSERT INTO claims (account_id, key_hash, body_hash, hold_id, created_ms)
SELECT account_id, :key_hash, :body_hash, hold_id, CAST(:now_ms AS BIGINT) FROM holds WHERE hold_id = :hold_id;

-- name: open_lock
-- Remember a lock, if its hold was placed.
INSERT INTO locks (
    lock_id, hold_id, account_id, key_id, node_id, identity, node_key, scheme, model, units, price, expires_ms, created_ms
)
SELECT
    CAST(:lock_id AS BIGINT), hold_id, account_id, CAST(:key_id AS TEXT), CAST(:node_id AS TEXT), :identity, :node_key,
    CAST(:scheme AS TEXT), CAST(:model AS TEXT), CAST(:units AS BIGINT), CAST(:price AS BIGINT),
    CAST(:expires_ms AS BIGINT), CAST(:now_ms AS BIGINT)
FROM holds WHERE hold_id = :hold_id;

-- name: delete_lock
-- A lock of which its caller did not hear was never opened.
DELETE FROM locks WHERE hold_id = :hold_id;

-- name: find_lock
-- One lock of an account: its terms; whether it was used, by a request with which body, and what became of that; and how
-- much of the account's replies is kept.
SELECT
    locks.lock_id, locks.account_id, locks.key_id, locks.hold_id, locks.node_id, locks.identity, locks.node_key,
    locks.scheme, locks.model, locks.units, locks.price, locks.expires_ms,
    locks.used_ms, holds.state, claims.body_hash, claims.reply, coalesce(kept_replies.bytes, 0)
FROM locks JOIN holds ON holds.hold_id = locks.hold_id LEFT JOIN claims ON claims.hold_id = locks.hold_id
LEFT JOIN kept_replies ON kept_replies.account_id = locks.account_id
WHERE locks.lock_id = :lock_id AND locks.account_id = :account_id;

-- name: use_locks
-- Use several locks, each of them once, in time, and while its hold is open.
UPDATE locks SET used_ms = CAST(:now_ms AS BIGINT), used_by = value ->> 'used_by'
FROM jsonb_each(:rows)
WHERE lock_id = CAST(value ->> 'lock_id' AS BIGINT) AND account_id = value ->> 'account_id'
    AND used_ms IS NULL AND expires_ms > CAST(:now_ms AS BIGINT)
    AND EXISTS (SELECT 1 FROM holds WHERE holds.hold_id = locks.hold_id AND state NOT IN ('captured', 'released'))
RETURNING lock_id;

-- name: claim_lock
-- The request that answers for a lock from now on.
UPDATE claims SET body_hash = :body_hash WHERE hold_id = :hold_id;

-- name: take_over_holds
-- The holds of locks that were used just now are those of requests of this gateway.
UPDATE holds SET owner = CAST(:owner AS TEXT), deadline_ms = CAST(value ->> 'deadline_ms' AS BIGINT)
FROM jsonb_each(:rows)
WHERE hold_id = value ->> 'hold_id' AND state NOT IN ('captured', 'released')
RETURNING hold_id, amount;

-- name: holds_of_uses
-- The holds of locks that were used by some requests, if they were.
SELECT locks.hold_id FROM jsonb_each(:rows) CROSS JOIN locks
WHERE lock_id = CAST(value ->> 'lock_id' AS BIGINT) AND used_by = value ->> 'used_by';

-- name: forget_unused_locks
-- Delete locks that nobody used in time, at most as many as one batch should carry.
DELETE FROM locks WHERE lock_id IN (
    SELECT lock_id FROM locks JOIN holds ON holds.hold_id = locks.hold_id
    WHERE used_ms IS NULL AND expires_ms < CAST(:ended_ms AS BIGINT) AND state IN ('captured', 'released')
    ORDER BY expires_ms LIMIT :rows_max
)
RETURNING hold_id;

-- name: forget_used_locks
-- Delete the locks of claims that are too old, at most as many as one batch should carry.
DELETE FROM locks WHERE hold_id IN (
    SELECT hold_id FROM claims WHERE created_ms < :kept_from_ms ORDER BY created_ms LIMIT :rows_max
) AND EXISTS (SELECT 1 FROM holds WHERE holds.hold_id = locks.hold_id AND state IN ('captured', 'released'));

-- name: forget_their_claims
-- Delete the claims of locks that were deleted.
DELETE FROM claims WHERE hold_id IN (SELECT value ->> 0 FROM jsonb_each(:rows));
