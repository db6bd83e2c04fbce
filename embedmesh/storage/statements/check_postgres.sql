-- Promises that only PostgreSQL can check; see check.sql. Its foreign keys are never switched off, and `amcheck` looks at files.

-- name: constraints_are_valid
-- Every constraint of the schema is in force.
SELECT 'constraint ' || conname, 'is not in force' FROM pg_constraint
WHERE connamespace = current_schema() :: regnamespace AND NOT convalidated;

-- name: triggers_are_on
-- Every trigger of the schema is on.
SELECT 'trigger ' || tgname, 'is off' FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
WHERE relnamespace = current_schema() :: regnamespace AND NOT tgisinternal AND tgenabled <> 'O';

-- name: locks_have_claims
-- The claim of a lock says which request has used it, if one has. Each kind of store has its own word for 32 zero bytes.
SELECT 'lock ' || lock_id, CASE WHEN used_ms IS NULL THEN 'unused, ' ELSE 'used, ' END
    || CASE WHEN body_hash IS NULL THEN 'has no claim' ELSE 'its claim says otherwise' END
FROM locks LEFT JOIN claims ON claims.hold_id = locks.hold_id AND claims.account_id = locks.account_id
WHERE body_hash IS NULL OR (used_ms IS NULL) <> (body_hash = decode(repeat('00', 32), 'hex'));
