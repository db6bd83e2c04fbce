-- name: find_key
-- The key of a hash, if it is not revoked: whose it is and what it may do, until when; and the account's cache.
SELECT account_id, key_id, scopes, expires_ms, models, requests_a_minute, tokens_a_minute, cache
FROM keys JOIN accounts USING (account_id)
WHERE token_hash = :token_hash AND revoked_ms IS NULL;

-- name: insert_key
-- Store a new key's hash and what it may do.
INSERT INTO keys (
    key_id, account_id, name, token_hash, scopes, created_ms, expires_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month
) VALUES (
    :key_id, :account_id, :name, :token_hash, :scopes, :now_ms, :expires_ms, :models, :requests_a_minute,
    :tokens_a_minute, :concurrency, :budget_day, :budget_month
);

-- name: revoke_key
-- Make a key useless from now on.
UPDATE keys SET revoked_ms = :now_ms WHERE key_id = :key_id AND revoked_ms IS NULL;

-- name: rotate_key
-- Let a key end, because another takes its place: at once or later, never later than it would have.
UPDATE keys SET rotated_to = :rotated_to, expires_ms = CASE WHEN expires_ms < :expires_ms THEN expires_ms ELSE :expires_ms END
WHERE key_id = :key_id AND revoked_ms IS NULL AND rotated_to IS NULL
    AND (expires_ms IS NULL OR expires_ms > CAST(:now_ms AS BIGINT));

-- name: change_key
-- Other limits for a key.
UPDATE keys SET
    name = :name, models = :models, requests_a_minute = :requests_a_minute, tokens_a_minute = :tokens_a_minute,
    concurrency = :concurrency, budget_day = :budget_day, budget_month = :budget_month, expires_ms = :expires_ms
WHERE key_id = :key_id AND revoked_ms IS NULL;

-- name: one_key
-- One key as it may be shown.
SELECT
    key_id, account_id, name, scopes, created_ms, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month, rotated_to, last_used_ms
FROM keys WHERE key_id = :key_id;

-- name: list_keys
-- Keys of all accounts, oldest first, from one on.
SELECT
    key_id, account_id, name, scopes, created_ms, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month, rotated_to, last_used_ms
FROM keys
WHERE (created_ms, key_id) > (CAST(:after_ms AS BIGINT), CAST(:after_id AS TEXT))
ORDER BY created_ms, key_id LIMIT :rows_max;

-- name: keys_of_account
-- Keys of one account, oldest first, from one on.
SELECT
    key_id, account_id, name, scopes, created_ms, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month, rotated_to, last_used_ms
FROM keys
WHERE account_id = :account_id AND (created_ms, key_id) > (CAST(:after_ms AS BIGINT), CAST(:after_id AS TEXT))
ORDER BY created_ms, key_id LIMIT :rows_max;

-- name: note_use
-- When keys were last used; written once in a while.
UPDATE keys SET last_used_ms = CAST(value ->> 'used_ms' AS BIGINT)
FROM json_each(:rows)
WHERE key_id = value ->> 'key_id' AND coalesce(last_used_ms, 0) < CAST(value ->> 'used_ms' AS BIGINT);
