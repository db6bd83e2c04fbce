-- name: add_file
-- Keep a file, if its account may keep so much: files, and bytes with the room that its batches need for their output files.
INSERT INTO files (file_id, account_id, filename, purpose, bytes, created_ms, expires_ms)
SELECT
    CAST(:file_id AS TEXT), CAST(:account_id AS TEXT), CAST(:filename AS TEXT), CAST(:purpose AS TEXT),
    CAST(:bytes AS BIGINT), CAST(:created_ms AS BIGINT), CAST(:expires_ms AS BIGINT)
FROM (
    SELECT
        (SELECT count(*) FROM files WHERE account_id = :account_id) AS files,
        (SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) FROM files WHERE account_id = :account_id)
            + (SELECT CAST(coalesce(sum(output_bytes), 0) AS BIGINT) FROM batches
                WHERE account_id = :account_id AND ended_ms IS NULL) AS bytes
) AS kept
WHERE kept.files < CAST(:files_max AS BIGINT) AND kept.bytes + CAST(:bytes AS BIGINT) <= CAST(:bytes_max AS BIGINT)
RETURNING file_id;

-- name: add_output_file
-- Keep an output file of a batch. The room for it was kept before.
INSERT INTO files (file_id, account_id, filename, purpose, bytes, created_ms, expires_ms)
VALUES (:file_id, :account_id, :filename, :purpose, :bytes, :created_ms, :expires_ms);

-- name: drop_file
-- A file of which its caller did not hear was never kept.
DELETE FROM files WHERE file_id = :file_id;

-- name: kept_of_account
-- How many files an account keeps, their bytes, those of files that it has sent, and how much room its batches need for
-- their output files.
SELECT
    (SELECT count(*) FROM files WHERE account_id = :account_id),
    (SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) FROM files WHERE account_id = :account_id),
    (SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) FROM files WHERE account_id = :account_id AND purpose = 'batch'),
    (SELECT CAST(coalesce(sum(output_bytes), 0) AS BIGINT) FROM batches
        WHERE account_id = :account_id AND ended_ms IS NULL);

-- name: means_of_account
-- What an account has, held or not, with its credit limit, and what it has spent since a day.
SELECT balance + credit_limit + (
    SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM usage_days
    WHERE usage_days.account_id = :account_id AND day >= CAST(:since_day AS BIGINT)
) FROM accounts WHERE account_id = :account_id;

-- name: find_file
-- One file of an account, unless it was deleted or has expired.
SELECT file_id, account_id, filename, purpose, bytes, created_ms, expires_ms, deleted_ms FROM files
WHERE file_id = :file_id AND account_id = :account_id AND deleted_ms IS NULL AND expires_ms > CAST(:now_ms AS BIGINT);

-- name: find_input
-- The file that a batch reads, also where it was deleted since.
SELECT file_id, account_id, filename, purpose, bytes, created_ms, expires_ms, deleted_ms FROM files
WHERE file_id = :file_id AND account_id = :account_id;

-- name: files_after
-- Files of an account in the order of their ids, those after one.
SELECT file_id, account_id, filename, purpose, bytes, created_ms, expires_ms, deleted_ms FROM files
WHERE account_id = :account_id AND file_id > :after AND deleted_ms IS NULL AND expires_ms > CAST(:now_ms AS BIGINT)
    AND (CAST(:purpose AS TEXT) IS NULL OR purpose = :purpose)
ORDER BY file_id LIMIT :rows_max;

-- name: files_before
-- The same the other way round, those before one.
SELECT file_id, account_id, filename, purpose, bytes, created_ms, expires_ms, deleted_ms FROM files
WHERE account_id = :account_id AND file_id < :after AND deleted_ms IS NULL AND expires_ms > CAST(:now_ms AS BIGINT)
    AND (CAST(:purpose AS TEXT) IS NULL OR purpose = :purpose)
ORDER BY file_id DESC LIMIT :rows_max;

-- name: delete_file
-- Nobody sees a file of an account any more.
UPDATE files SET deleted_ms = CAST(:now_ms AS BIGINT)
WHERE file_id = :file_id AND account_id = :account_id AND deleted_ms IS NULL
RETURNING file_id;

-- name: files_to_forget
-- Files that were deleted or have expired and that no batch reads, at most as many as one batch should carry.
SELECT file_id, account_id FROM (
    SELECT file_id, account_id FROM files WHERE deleted_ms IS NOT NULL
    UNION SELECT file_id, account_id FROM files WHERE expires_ms <= CAST(:now_ms AS BIGINT)
) AS over
WHERE NOT EXISTS (SELECT 1 FROM batches WHERE input_file_id = over.file_id AND ended_ms IS NULL)
ORDER BY file_id LIMIT :rows_max;

-- name: forget_files
-- Delete the rows of those of some files that are still to be forgotten.
DELETE FROM files WHERE file_id IN (SELECT value ->> 0 FROM jsonb_each(:rows))
    AND (deleted_ms IS NOT NULL OR expires_ms <= CAST(:now_ms AS BIGINT))
    AND NOT EXISTS (SELECT 1 FROM batches WHERE input_file_id = files.file_id AND ended_ms IS NULL)
RETURNING file_id;

-- name: known_files
-- Those of some ids that a row has.
SELECT file_id FROM files WHERE file_id IN (SELECT value ->> 0 FROM jsonb_each(:rows));
