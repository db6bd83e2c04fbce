-- Promises that only SQLite can check; see check.sql.

-- name: references_are_whole
-- Every row that a row refers to exists.
SELECT "table" || ' row ' || coalesce(rowid, '?'), 'refers to a row of ' || parent || ' that is missing'
FROM pragma_foreign_key_check;

-- name: file_is_whole
-- SQLite finds no damage in the file.
SELECT 'file', integrity_check FROM pragma_integrity_check WHERE integrity_check <> 'ok';

-- name: locks_have_claims
-- The claim of a lock says which request has used it, if one has. Each kind of store has its own word for 32 zero bytes.
SELECT 'lock ' || lock_id, CASE WHEN used_ms IS NULL THEN 'unused, ' ELSE 'used, ' END
    || CASE WHEN body_hash IS NULL THEN 'has no claim' ELSE 'its claim says otherwise' END
FROM locks LEFT JOIN claims ON claims.hold_id = locks.hold_id AND claims.account_id = locks.account_id
WHERE body_hash IS NULL OR (used_ms IS NULL) <> (body_hash = zeroblob(32));

-- name: quick_check
-- What SQLite finds damaged in the file without comparing indexes to their tables; a row of `ok` when nothing.
PRAGMA quick_check;
