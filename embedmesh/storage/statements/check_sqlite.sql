-- Promises that only SQLite can check; see check.sql.

-- name: references_are_whole
-- Every row that a row refers to exists.
SELECT "table" || ' row ' || coalesce(rowid, '?'), 'refers to a row of ' || parent || ' that is missing'
FROM pragma_foreign_key_check;

-- name: file_is_whole
-- SQLite finds no damage in the file.
SELECT 'file', integrity_check FROM pragma_integrity_check WHERE integrity_check <> 'ok';

-- name: quick_check
-- What SQLite finds damaged in the file without comparing indexes to their tables; a row of `ok` when nothing.
PRAGMA quick_check;
