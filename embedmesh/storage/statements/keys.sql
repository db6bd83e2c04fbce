-- name: find_key
-- The key of a hash, if it is neither revoked nor expired.
SELECT account_id, key_id, scopes FROM keys
WHERE token_hash = :token_hash AND revoked_ms IS NULL AND (expires_ms IS NULL OR expires_ms > :now_ms);

-- name: insert_key
-- Store a new key's hash and what it may do.
INSERT INTO keys (key_id, account_id, name, token_hash, scopes, created_ms, expires_ms)
VALUES (:key_id, :account_id, :name, :token_hash, :scopes, :now_ms, :expires_ms);

-- name: revoke_key
-- Make a key useless from now on.
UPDATE keys SET revoked_ms = :now_ms WHERE key_id = :key_id AND revoked_ms IS NULL;

-- name: list_keys
-- All keys of one account, or of all when none is named, oldest first.
SELECT key_id, account_id, name, scopes, created_ms, expires_ms, revoked_ms FROM keys
WHERE :account_id IS NULL OR account_id = :account_id
ORDER BY created_ms, key_id;
