-- name: claim
-- Let a hold answer for an Idempotency-Key: a new one, one that is too old, or one whose hold ended without a reply: it
-- was released, or captured at its note.
INSERT INTO claims (account_id, key_hash, body_hash, hold_id, created_ms)
VALUES (:account_id, :key_hash, :body_hash, :hold_id, :now_ms)
ON CONFLICT (account_id, key_hash) DO UPDATE SET
    body_hash = excluded.body_hash, hold_id = excluded.hold_id, created_ms = excluded.created_ms, reply = NULL
WHERE claims.created_ms < CAST(:kept_from_ms AS BIGINT) OR (
    claims.reply IS NULL
    AND NOT EXISTS (
        SELECT 1 FROM holds WHERE holds.hold_id = claims.hold_id AND (state = 'open' OR ended_by = 'capture')
    )
)
RETURNING hold_id;

-- name: find_claim
-- Which request answers for an Idempotency-Key, where it stands, and its reply once there is one.
SELECT claims.body_hash, claims.hold_id, holds.state, claims.reply
FROM claims LEFT JOIN holds ON holds.hold_id = claims.hold_id
WHERE claims.account_id = :account_id AND key_hash = :key_hash;

-- name: drop_claims
-- Claims of holds that were not placed after all.
DELETE FROM claims WHERE hold_id IN (
    SELECT value ->> 'hold_id' FROM jsonb_each(:rows)
    WHERE NOT EXISTS (SELECT 1 FROM holds WHERE holds.hold_id = value ->> 'hold_id')
);

-- name: keep_reply
-- The reply that was delivered, encrypted.
UPDATE claims SET reply = :reply WHERE hold_id = :hold_id;

-- name: kept_bytes
-- How much of an account's replies is kept.
SELECT bytes FROM kept_replies WHERE account_id = :account_id;

-- name: forget_claims
-- Delete claims that are too old, at most as many as one batch should carry; those of locks go after their locks.
DELETE FROM claims WHERE (account_id, key_hash) IN (
    SELECT account_id, key_hash FROM claims WHERE created_ms < :kept_from_ms ORDER BY created_ms LIMIT :rows_max
) AND NOT EXISTS (SELECT 1 FROM locks WHERE locks.hold_id = claims.hold_id);
