-- name: find_key
-- The key of a hash, if it is not revoked: whose it is and what it may do, until when; the account's cache; and a row for
-- each key above it, the nearest first, or one without.
SELECT
    keys.account_id, keys.key_id, keys.scopes, keys.expires_ms, keys.models, keys.requests_a_minute,
    keys.tokens_a_minute, cache, above.key_id, above.models, above.requests_a_minute, above.tokens_a_minute,
    keys.concurrency, coalesce(keys.place_id, keys.key_id), above.concurrency, coalesce(above.place_id, above.key_id)
FROM keys JOIN accounts ON accounts.account_id = keys.account_id
LEFT JOIN key_draws ON key_draws.key_id = keys.key_id
LEFT JOIN keys AS above ON above.key_id = from_id
WHERE keys.token_hash = :token_hash AND keys.revoked_ms IS NULL
ORDER BY from_id DESC;

-- name: insert_key
-- Store a new key's hash and what it may do.
INSERT INTO keys (
    key_id, account_id, name, token_hash, scopes, created_ms, expires_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month, parent_id
) VALUES (
    :key_id, :account_id, :name, :token_hash, :scopes, :now_ms, :expires_ms, :models, :requests_a_minute,
    :tokens_a_minute, :concurrency, :budget_day, :budget_month, :parent_id
);

-- name: count_keys
-- How many keys of an account are good, how many were made since a moment, and when the first of these was.
SELECT
    (SELECT count(*) FROM keys WHERE account_id = :account_id AND revoked_ms IS NULL
        AND coalesce(expires_ms, 9223372036854775807) > :now_ms),
    (SELECT count(*) FROM keys WHERE account_id = :account_id AND created_ms > CAST(:since_ms AS BIGINT)),
    (SELECT min(created_ms) FROM keys WHERE account_id = :account_id AND created_ms > CAST(:since_ms AS BIGINT));

-- name: count_above
-- How many keys are above a key.
SELECT count(*) FROM key_draws WHERE key_id = :key_id;

-- name: revoke_key
-- Make a key useless from now on.
UPDATE keys SET revoked_ms = :now_ms WHERE key_id = :key_id AND revoked_ms IS NULL;

-- name: revoke_below
-- Make all good keys below a key useless from now on.
UPDATE keys SET revoked_ms = :now_ms
WHERE account_id = :account_id AND revoked_ms IS NULL
    AND coalesce(expires_ms, 9223372036854775807) > :now_ms
    AND EXISTS (SELECT 1 FROM key_draws WHERE key_draws.key_id = keys.key_id AND from_id = :key_id);

-- name: end_below
-- Let all good keys below a key end with it at the latest.
UPDATE keys SET expires_ms = :expires_ms
WHERE account_id = :account_id AND revoked_ms IS NULL
    AND coalesce(expires_ms, 9223372036854775807) > :expires_ms
    AND EXISTS (SELECT 1 FROM key_draws WHERE key_draws.key_id = keys.key_id AND from_id = :key_id);

-- name: rotate_key
-- End a key, because another takes its place: at once or later, never later than it would have.
UPDATE keys SET rotated_to = :rotated_to, expires_ms = CASE WHEN expires_ms < :expires_ms THEN expires_ms ELSE :expires_ms END
WHERE key_id = :key_id AND revoked_ms IS NULL AND rotated_to IS NULL
    AND (expires_ms IS NULL OR expires_ms > CAST(:now_ms AS BIGINT));

-- name: hand_over_place
-- The new key has the rotated key's place...
UPDATE keys SET place_id = (SELECT coalesce(old.place_id, old.key_id) FROM keys AS old WHERE old.key_id = :old_id)
WHERE key_id = :new_id;

-- name: hand_over_draws
-- ... all keys below a rotated key are below the new one...
UPDATE key_draws SET from_id = :new_id WHERE from_id = :old_id;

-- name: draw_from_new
-- ... and so is the rotated key itself.
INSERT INTO key_draws (key_id, from_id) VALUES (:old_id, :new_id);

-- name: hand_over_children
-- Its children have another parent, and it has one, too.
UPDATE keys SET parent_id = :new_id
WHERE key_id = :old_id OR (
    parent_id = :old_id AND key_id IN (SELECT key_id FROM key_draws WHERE from_id = :new_id)
);

-- name: hand_over_drawn
-- What is held and was spent below it is now below the new one...
UPDATE drawn SET key_id = :new_id WHERE key_id = :old_id;

-- name: hand_over_drawn_days
-- ...
UPDATE drawn_days SET key_id = :new_id WHERE key_id = :old_id;

-- name: add_held
-- ... with what it holds itself, in holds and in tabs...
INSERT INTO drawn (key_id, holds, held)
SELECT CAST(:new_id AS TEXT), CAST(sum(number) AS BIGINT), CAST(sum(amount) AS BIGINT) FROM (
    SELECT count(*) AS number, coalesce(sum(amount), 0) AS amount FROM holds WHERE key_id = :old_id AND state = 'open'
    UNION ALL SELECT 0, coalesce(sum(amount - captured), 0) FROM tabs
    WHERE account_id = (SELECT account_id FROM keys WHERE key_id = :old_id) AND key_id = :old_id AND ended_ms IS NULL
) AS held
WHERE true
ON CONFLICT (key_id) DO UPDATE SET holds = drawn.holds + excluded.holds, held = drawn.held + excluded.held;

-- name: add_spent
-- ... and has spent...
INSERT INTO drawn_days (key_id, day, cost)
SELECT CAST(:new_id AS TEXT), day, CAST(sum(cost) AS BIGINT) FROM usage_days WHERE key_id = :old_id GROUP BY day
ON CONFLICT (key_id, day) DO UPDATE SET cost = drawn_days.cost + excluded.cost;

-- name: add_leased
-- ... and what is leased of its minute.
INSERT INTO leases (key_id, minute, requests, tokens)
SELECT CAST(:new_id AS TEXT), minute, requests, tokens FROM leases
WHERE key_id = :old_id AND minute >= CAST(:minute AS BIGINT);

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
    concurrency, budget_day, budget_month, rotated_to, last_used_ms, parent_id
FROM keys WHERE key_id = :key_id;

-- name: list_keys
-- Keys of all accounts, oldest first, from one on.
SELECT
    key_id, account_id, name, scopes, created_ms, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month, rotated_to, last_used_ms, parent_id
FROM keys
WHERE (created_ms, key_id) > (CAST(:after_ms AS BIGINT), CAST(:after_id AS TEXT))
ORDER BY created_ms, key_id LIMIT :rows_max;

-- name: keys_of_account
-- Keys of one account, oldest first, from one on.
SELECT
    key_id, account_id, name, scopes, created_ms, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month, rotated_to, last_used_ms, parent_id
FROM keys
WHERE account_id = :account_id AND (created_ms, key_id) > (CAST(:after_ms AS BIGINT), CAST(:after_id AS TEXT))
ORDER BY created_ms, key_id LIMIT :rows_max;

-- name: note_use
-- When keys were last used; written once in a while.
UPDATE keys SET last_used_ms = CAST(value ->> 'used_ms' AS BIGINT)
FROM jsonb_each(:rows)
WHERE key_id = value ->> 'key_id' AND coalesce(last_used_ms, 0) < CAST(value ->> 'used_ms' AS BIGINT);
