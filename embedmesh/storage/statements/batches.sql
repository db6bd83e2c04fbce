-- name: create_batch
-- A new batch, if its account has the file, and may have one more: of those that are not over, of which it has a share, and
-- of those that it makes a day, paid ones or not.
INSERT INTO batches (
    batch_id, account_id, key_id, endpoint, input_file_id, window_s, output_expires_s, metadata, created_ms, expires_ms
)
SELECT
    CAST(:batch_id AS TEXT), files.account_id, CAST(:key_id AS TEXT), CAST(:endpoint AS TEXT), files.file_id,
    CAST(:window_s AS BIGINT), CAST(:output_expires_s AS BIGINT), CAST(:metadata AS TEXT), CAST(:now_ms AS BIGINT),
    CAST(:now_ms AS BIGINT) + CAST(:window_s AS BIGINT) * 1000
FROM files CROSS JOIN (
    SELECT
        (SELECT count(*) FROM batches WHERE account_id = :account_id AND ended_ms IS NULL) AS mine,
        (SELECT count(*) FROM batches WHERE ended_ms IS NULL) AS together,
        (SELECT count(*) FROM batches WHERE account_id = :account_id AND batch_id > :since_id) AS today,
        (SELECT count(*) FROM batches WHERE account_id = :account_id AND batch_id > :since_id AND charged = 0) AS unpaid
) AS counted
WHERE file_id = :input_file_id AND account_id = :account_id AND purpose = 'batch' AND deleted_ms IS NULL
    AND expires_ms > CAST(:now_ms AS BIGINT)
    AND mine < CAST(:of_account AS BIGINT) AND today < CAST(:a_day AS BIGINT)
    AND unpaid < CAST(:unpaid_a_day AS BIGINT)
    AND mine < CAST(:share AS BIGINT) * (CAST(:of_all AS BIGINT) - together)
RETURNING batch_id;

-- name: count_batches
-- How many batches an account has that are not over, has made since a day ago, and of these without a charge.
SELECT
    (SELECT count(*) FROM batches WHERE account_id = :account_id AND ended_ms IS NULL),
    (SELECT count(*) FROM batches WHERE account_id = :account_id AND batch_id > :since_id),
    (SELECT count(*) FROM batches WHERE account_id = :account_id AND batch_id > :since_id AND charged = 0);

-- name: drop_batch
-- A batch of which its caller did not hear was never there, unless it is being worked on.
DELETE FROM batches WHERE batch_id = :batch_id AND epoch = 0;

-- name: find_batch
-- One batch of an account.
SELECT
    batch_id, account_id, key_id, state, endpoint, model, input_file_id, output_file_id, error_file_id, window_s,
    output_expires_s, metadata, errors, prices, amount, units, total, completed, failed, input_tokens, cached_tokens,
    output_tokens, created_ms, expires_ms, in_progress_ms, finalizing_ms, completed_ms, failed_ms, expired_ms,
    cancelling_ms, cancelled_ms
FROM batches WHERE batch_id = :batch_id AND account_id = :account_id;

-- name: batches_before
-- Batches of an account in the order of their ids, the last first, those before one.
SELECT
    batch_id, account_id, key_id, state, endpoint, model, input_file_id, output_file_id, error_file_id, window_s,
    output_expires_s, metadata, errors, prices, amount, units, total, completed, failed, input_tokens, cached_tokens,
    output_tokens, created_ms, expires_ms, in_progress_ms, finalizing_ms, completed_ms, failed_ms, expired_ms,
    cancelling_ms, cancelled_ms
FROM batches WHERE account_id = :account_id AND batch_id < :after ORDER BY batch_id DESC LIMIT :rows_max;

-- name: cancel_batch
-- Have a batch of an account begin nothing more.
UPDATE batches SET state = 'cancelling', cancelling_ms = CAST(:now_ms AS BIGINT)
WHERE batch_id = :batch_id AND account_id = :account_id AND state IN ('validating', 'in_progress');

-- name: cancel_if_revoked
-- The same where its key, or one above it, was revoked.
UPDATE batches SET state = 'cancelling', cancelling_ms = CAST(:now_ms AS BIGINT)
WHERE batch_id = :batch_id AND state IN ('validating', 'in_progress') AND EXISTS (
    SELECT 1 FROM (
        SELECT batches.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_draws.key_id = batches.key_id
    ) AS all_counted JOIN keys ON keys.key_id = counted
    WHERE revoked_ms IS NOT NULL
);

-- name: free_batches
-- Batches that no gateway has, those of accounts that have the fewest under way first, and of these the oldest; none of some
-- accounts.
WITH busy AS (
    SELECT account_id, count(*) AS leased FROM batches
    WHERE ended_ms IS NULL AND lease_ms >= CAST(:now_ms AS BIGINT) GROUP BY account_id
)
SELECT batch_id, batches.account_id FROM batches LEFT JOIN busy ON busy.account_id = batches.account_id
WHERE ended_ms IS NULL AND lease_ms < CAST(:now_ms AS BIGINT)
    AND batches.account_id NOT IN (SELECT value ->> 0 FROM jsonb_each(:rows))
ORDER BY coalesce(leased, 0), batch_id LIMIT :rows_max;

-- name: take_batch
-- Have a batch that no gateway has. Whoever had it before can write nothing more.
UPDATE batches SET epoch = epoch + 1, owner = CAST(:owner AS TEXT), lease_ms = CAST(:until_ms AS BIGINT)
WHERE batch_id = :batch_id AND ended_ms IS NULL AND lease_ms < CAST(:now_ms AS BIGINT)
RETURNING epoch;

-- name: keep_batch
-- Have it for longer, or until now only.
UPDATE batches SET lease_ms = CAST(:until_ms AS BIGINT)
WHERE batch_id = :batch_id AND epoch = CAST(:epoch AS BIGINT) AND ended_ms IS NULL
RETURNING epoch;

-- name: batches_of_owner
-- The accounts whose batches one gateway has. Read at its start, when the process that had them is gone.
SELECT batch_id, account_id FROM batches
WHERE ended_ms IS NULL AND lease_ms > 0 AND (CAST(:owner AS TEXT) IS NULL OR owner = :owner);

-- name: free_these
-- Nobody has some batches any more.
UPDATE batches SET lease_ms = 0 FROM jsonb_each(:rows) WHERE batch_id = value ->> 0 AND ended_ms IS NULL;

-- name: batch_of_lease
-- A batch as whoever has it sees it.
SELECT state, output_file_id, error_file_id, completed, failed, total FROM batches
WHERE batch_id = :batch_id AND epoch = CAST(:epoch AS BIGINT);

-- name: clear_units
-- Delete units of a batch that was not validated yet, or is over, at most as many as one batch should carry.
DELETE FROM batch_units WHERE batch_id = :batch_id AND unit IN (
    SELECT unit FROM batch_units WHERE batch_id = :batch_id ORDER BY unit LIMIT :rows_max
);

-- name: add_units
-- Add units of a batch; those that are there stay.
INSERT INTO batch_units (batch_id, unit, first_byte, bytes, first_line, lines, tokens)
SELECT
    CAST(:batch_id AS TEXT), CAST(value ->> 0 AS BIGINT), CAST(value ->> 1 AS BIGINT), CAST(value ->> 2 AS BIGINT),
    CAST(value ->> 3 AS BIGINT), CAST(value ->> 4 AS BIGINT), CAST(value ->> 5 AS BIGINT)
FROM jsonb_each(:rows)
WHERE true
ON CONFLICT DO NOTHING;

-- name: count_units
-- How many units a batch has, and how many lines.
SELECT count(*), CAST(coalesce(sum(lines), 0) AS BIGINT) FROM batch_units WHERE batch_id = :batch_id;

-- name: has_room_for_output
-- Whether an account may keep so much more.
SELECT
    (SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) FROM files WHERE account_id = :account_id)
    + (SELECT CAST(coalesce(sum(output_bytes), 0) AS BIGINT) FROM batches
        WHERE account_id = :account_id AND ended_ms IS NULL AND batch_id <> :batch_id)
    + CAST(:output_bytes AS BIGINT) <= CAST(:bytes_max AS BIGINT);

-- name: open_batch_tab
-- Set the money of a batch aside, exactly. Nothing where the account does not cover it, or a budget, or its key was revoked.
INSERT INTO tabs (tab_id, account_id, key_id, owner, amount, opened_ms, deadline_ms)
SELECT
    batch_id, account_id, key_id, batch_id, CAST(:amount AS BIGINT), CAST(:now_ms AS BIGINT),
    expires_ms + CAST(:grace_ms AS BIGINT)
FROM batches
WHERE batch_id = :batch_id AND state = 'validating' AND NOT EXISTS (
    SELECT 1 FROM (
        SELECT batches.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_draws.key_id = batches.key_id
    ) AS all_counted JOIN keys ON keys.key_id = counted
    WHERE revoked_ms IS NOT NULL
)
RETURNING tab_id;

-- name: begin_batch
-- Put a batch in progress whose money was set aside just now.
UPDATE batches SET
    state = 'in_progress', in_progress_ms = CAST(:now_ms AS BIGINT), model = CAST(:model AS TEXT),
    prices = CAST(:prices AS TEXT), amount = CAST(:amount AS BIGINT), output_bytes = CAST(:output_bytes AS BIGINT),
    units = CAST(:units AS BIGINT), total = CAST(:lines AS BIGINT)
WHERE batch_id = :batch_id AND state = 'validating' AND EXISTS (SELECT 1 FROM tabs WHERE tab_id = :batch_id);

-- name: fail_batch
-- The file of a batch is not right, or its money does not suffice.
UPDATE batches SET
    state = 'failed', failed_ms = CAST(:now_ms AS BIGINT), ended_ms = CAST(:now_ms AS BIGINT),
    errors = CAST(:errors AS TEXT), total = CAST(:total AS BIGINT)
WHERE batch_id = :batch_id AND epoch = CAST(:epoch AS BIGINT) AND state = 'validating';

-- name: open_units
-- Units of a batch that are not done, in their order, from one on.
SELECT unit, first_byte, bytes, first_line, lines, tokens FROM batch_units
WHERE batch_id = :batch_id AND unit > CAST(:after AS BIGINT) AND state = 'open' ORDER BY unit LIMIT :rows_max;

-- name: done_units
-- Units of a batch that are done, in their order, from one on.
SELECT unit, first_byte, bytes, first_line, lines, tokens, segment, output_bytes, error_bytes FROM batch_units
WHERE batch_id = :batch_id AND unit > CAST(:after AS BIGINT) AND state = 'done' ORDER BY unit LIMIT :rows_max;

-- name: finish_unit
-- A unit is done, while whoever has its batch hands it in, and the batch has its money.
UPDATE batch_units SET
    state = 'done', segment = CAST(:segment AS TEXT), output_bytes = CAST(:output_bytes AS BIGINT),
    error_bytes = CAST(:error_bytes AS BIGINT), completed = CAST(:completed AS BIGINT), failed = CAST(:failed AS BIGINT),
    charged = CAST(:charged AS BIGINT), cost = CAST(:cost AS BIGINT)
WHERE batch_id = :batch_id AND unit = CAST(:unit AS BIGINT) AND state = 'open'
    AND EXISTS (
        SELECT 1 FROM batches WHERE batches.batch_id = :batch_id AND epoch = CAST(:epoch AS BIGINT)
            AND batches.state IN ('in_progress', 'cancelling')
    )
    AND EXISTS (SELECT 1 FROM tabs WHERE tab_id = :batch_id AND ended_ms IS NULL)
RETURNING unit;

-- name: count_unit
-- What a unit came to is added to its batch.
UPDATE batches SET
    completed = completed + CAST(:completed AS BIGINT), failed = failed + CAST(:failed AS BIGINT),
    charged = charged + CAST(:charged AS BIGINT), cost = cost + CAST(:cost AS BIGINT),
    input_tokens = input_tokens + CAST(:input_tokens AS BIGINT),
    cached_tokens = cached_tokens + CAST(:cached_tokens AS BIGINT),
    output_tokens = output_tokens + CAST(:output_tokens AS BIGINT)
WHERE batch_id = :batch_id;

-- name: why_not_finished
-- Why a unit was not finished: in which segment it is done already, and whether its batch is still whose was said.
SELECT
    batch_units.segment,
    EXISTS (
        SELECT 1 FROM batches WHERE batches.batch_id = :batch_id AND epoch = CAST(:epoch AS BIGINT)
            AND batches.state IN ('in_progress', 'cancelling')
    )
FROM batch_units WHERE batch_id = :batch_id AND unit = CAST(:unit AS BIGINT);

-- name: finalize_batch
-- All units of a batch are done.
UPDATE batches SET state = 'finalizing', finalizing_ms = CAST(:now_ms AS BIGINT)
WHERE batch_id = :batch_id AND epoch = CAST(:epoch AS BIGINT) AND state = 'in_progress'
    AND NOT EXISTS (SELECT 1 FROM batch_units WHERE batch_units.batch_id = :batch_id AND batch_units.state = 'open');

-- name: finish_batch
-- A batch is over, and has its output files.
UPDATE batches SET
    state = CASE state WHEN 'finalizing' THEN 'completed' WHEN 'cancelling' THEN 'cancelled' ELSE 'expired' END,
    completed_ms = CASE state WHEN 'finalizing' THEN CAST(:now_ms AS BIGINT) END,
    cancelled_ms = CASE state WHEN 'cancelling' THEN CAST(:now_ms AS BIGINT) END,
    expired_ms = CASE WHEN state IN ('in_progress', 'validating') THEN CAST(:now_ms AS BIGINT) END,
    ended_ms = CAST(:now_ms AS BIGINT), failed = CAST(:failed AS BIGINT),
    output_file_id = CAST(:output_file_id AS TEXT), error_file_id = CAST(:error_file_id AS TEXT)
WHERE batch_id = :batch_id AND epoch = CAST(:epoch AS BIGINT) AND ended_ms IS NULL;

-- name: open_of_batches
-- Those of some batches that are not over.
SELECT batch_id FROM batches WHERE batch_id IN (SELECT value ->> 0 FROM jsonb_each(:rows)) AND ended_ms IS NULL;

-- name: unswept_batches
-- Batches that are over and whose units were not deleted yet.
SELECT batch_id, account_id FROM batches WHERE ended_ms IS NOT NULL AND swept = 0 ORDER BY ended_ms LIMIT :rows_max;

-- name: sweep_batch
-- The units of a batch were deleted.
UPDATE batches SET swept = 1 WHERE batch_id = :batch_id AND ended_ms IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM batch_units WHERE batch_units.batch_id = :batch_id);

-- name: old_batches
-- Batches that ended long ago and were swept, at most as many as one batch should carry.
SELECT batch_id, account_id FROM batches
WHERE ended_ms IS NOT NULL AND ended_ms < CAST(:kept_from_ms AS BIGINT) AND swept = 1 ORDER BY ended_ms LIMIT :rows_max;

-- name: forget_batches
-- Delete some batches that are over and swept.
DELETE FROM batches WHERE batch_id IN (SELECT value ->> 0 FROM jsonb_each(:rows)) AND swept = 1
RETURNING batch_id;
