-- name: place_holds
-- Set money aside for several requests: a row for each that its account covers and its key has room for, in their order.
INSERT INTO holds (hold_id, account_id, key_id, amount, owner, created_ms, deadline_ms)
SELECT
    value ->> 'hold_id', value ->> 'account_id', value ->> 'key_id', CAST(value ->> 'amount_nanousd' AS BIGINT),
    CAST(:owner AS TEXT), CAST(:now_ms AS BIGINT), CAST(value ->> 'deadline_ms' AS BIGINT)
FROM jsonb_each(:rows)
WHERE true
RETURNING hold_id;

-- name: capture_holds
-- End open holds by capturing part or all of them. The condition is not `state = 'open'`, so that holds are found by
-- their id: PostgreSQL would read the index of open holds, which is full of those that have just ended.
UPDATE holds SET state = 'captured', ended_by = 'capture', captured = CAST(value ->> 'cost' AS BIGINT), ended_ms = :now_ms
FROM jsonb_each(:rows)
WHERE hold_id = value ->> 'hold_id' AND state NOT IN ('captured', 'released')
RETURNING hold_id;

-- name: release_holds
-- End open holds without charging.
UPDATE holds SET state = 'released', ended_by = value ->> 'ended_by', ended_ms = :now_ms
FROM jsonb_each(:rows)
WHERE hold_id = value ->> 'hold_id' AND state NOT IN ('captured', 'released')
RETURNING hold_id;

-- name: release_lost_holds
-- Release those of some holds that are still overdue and have no note: one may have been taken over by a request, with its
-- lock, or its stream was noted, since it was found.
UPDATE holds SET state = 'released', ended_by = CAST(:ended_by AS TEXT), ended_ms = :now_ms
FROM jsonb_each(:rows)
WHERE hold_id = value ->> 0 AND state NOT IN ('captured', 'released') AND deadline_ms < CAST(:until_ms AS BIGINT)
    AND NOT EXISTS (SELECT 1 FROM hold_notes WHERE hold_notes.hold_id = holds.hold_id)
RETURNING hold_id;

-- name: capture_at_notes
-- Capture those of some holds that are still overdue at their notes, if these are still the same.
UPDATE holds SET state = 'captured', ended_by = CAST(:ended_by AS TEXT), captured = hold_notes.cost, ended_ms = :now_ms
FROM jsonb_each(:rows) CROSS JOIN hold_notes
WHERE holds.hold_id = value ->> 'hold_id' AND state NOT IN ('captured', 'released')
    AND deadline_ms < CAST(:until_ms AS BIGINT)
    AND hold_notes.hold_id = value ->> 'hold_id' AND hold_notes.charge = value ->> 'charge'
RETURNING holds.hold_id;

-- name: note_holds
-- Note what some streams have delivered, if their holds are open and cover it.
INSERT INTO hold_notes (hold_id, cost, charge, noted_ms)
SELECT holds.hold_id, CAST(value ->> 'cost' AS BIGINT), value ->> 'charge', CAST(:now_ms AS BIGINT)
FROM jsonb_each(:rows) CROSS JOIN holds
WHERE holds.hold_id = value ->> 'hold_id' AND state NOT IN ('captured', 'released')
    AND amount >= CAST(value ->> 'cost' AS BIGINT)
ON CONFLICT (hold_id) DO UPDATE SET cost = excluded.cost, charge = excluded.charge, noted_ms = excluded.noted_ms
RETURNING hold_id;

-- name: extend_holds
-- Have open holds with a note last longer; none ends sooner than it would have.
UPDATE holds SET deadline_ms = CAST(value ->> 'deadline_ms' AS BIGINT)
FROM jsonb_each(:rows)
WHERE hold_id = value ->> 'hold_id' AND state NOT IN ('captured', 'released')
    AND deadline_ms < CAST(value ->> 'deadline_ms' AS BIGINT)
    AND EXISTS (SELECT 1 FROM hold_notes WHERE hold_notes.hold_id = holds.hold_id);

-- name: drop_notes
-- Delete the notes of those of some holds that have ended.
DELETE FROM hold_notes WHERE hold_id IN (SELECT value ->> 0 FROM jsonb_each(:rows)) AND NOT EXISTS (
    SELECT 1 FROM holds WHERE holds.hold_id = hold_notes.hold_id AND state NOT IN ('captured', 'released')
);

-- name: drop_broken_notes
-- Delete notes that nothing can be charged for, if they are still the same.
DELETE FROM hold_notes WHERE (hold_id, charge) IN (SELECT value ->> 0, value ->> 1 FROM jsonb_each(:rows));

-- name: overdue_holds
-- Open holds past their deadline, their notes, and whether each is of an unused lock. The oldest first, at most
-- as many as one batch should carry.
SELECT
    holds.hold_id, account_id, amount, deadline_ms, cost, charge,
    EXISTS (SELECT 1 FROM locks WHERE locks.hold_id = holds.hold_id AND used_ms IS NULL)
FROM holds LEFT JOIN hold_notes ON hold_notes.hold_id = holds.hold_id
WHERE state = 'open' AND deadline_ms < :now_ms ORDER BY deadline_ms LIMIT :holds_max;

-- name: holds_of_owner
-- The open holds of one gateway and their notes. Read at its start, when the process that placed them is gone; locks that
-- no request has used yet outlive it.
SELECT holds.hold_id, account_id, amount, deadline_ms, cost, charge
FROM holds LEFT JOIN hold_notes ON hold_notes.hold_id = holds.hold_id
WHERE state = 'open' AND owner = :owner
    AND NOT EXISTS (SELECT 1 FROM locks WHERE locks.hold_id = holds.hold_id AND used_ms IS NULL);

-- name: open_holds
-- All open holds but those of unused locks, and their notes. Read at the start of a gateway that is alone, when the
-- processes that placed them are gone.
SELECT holds.hold_id, account_id, amount, deadline_ms, cost, charge
FROM holds LEFT JOIN hold_notes ON hold_notes.hold_id = holds.hold_id
WHERE state = 'open'
    AND NOT EXISTS (SELECT 1 FROM locks WHERE locks.hold_id = holds.hold_id AND used_ms IS NULL);

-- name: hold_end
-- What has ended a hold.
SELECT ended_by FROM holds WHERE hold_id = :hold_id;

-- name: insert_nodes
-- Make the accounts of nodes that are paid for the first time.
INSERT INTO accounts (account_id, kind, created_ms)
SELECT value ->> 'account_id', 'node', CAST(:now_ms AS BIGINT) FROM jsonb_each(:rows)
WHERE true ORDER BY value ->> 'account_id'
ON CONFLICT DO NOTHING;

-- name: insert_transfers
-- Move captured holds' costs from the customers to revenue, and the nodes' shares from there to the nodes. A hold that is
-- captured and not charged yet is one that was captured just now.
INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)
SELECT
    value ->> 'kind', value ->> 'source_id', value ->> 'target_id', CAST(value ->> 'amount' AS BIGINT),
    value ->> 'hold_id', CAST(:now_ms AS BIGINT)
FROM jsonb_each(:rows)
WHERE EXISTS (SELECT 1 FROM holds WHERE holds.hold_id = value ->> 'hold_id' AND state = 'captured')
    AND NOT EXISTS (SELECT 1 FROM transfers AS t WHERE t.hold_id = value ->> 'hold_id' AND t.kind = 'charge');

-- name: insert_usage
-- Record what captured holds were for; once.
INSERT INTO usage (hold_id, account_id, key_id, model, node_id, tokens, price, cost, payable, user_hash, day, meters)
SELECT
    value ->> 'hold_id', value ->> 'account_id', value ->> 'key_id', value ->> 'model', value ->> 'node_id',
    CAST(value ->> 'tokens' AS BIGINT), CAST(value ->> 'price' AS BIGINT), CAST(value ->> 'cost' AS BIGINT),
    CAST(value ->> 'payable' AS BIGINT), value ->> 'user_hash', CAST(:day AS BIGINT), value ->> 'meters'
FROM jsonb_each(:rows)
WHERE EXISTS (SELECT 1 FROM holds WHERE holds.hold_id = value ->> 'hold_id' AND state = 'captured')
    AND NOT EXISTS (SELECT 1 FROM usage AS u WHERE u.hold_id = value ->> 'hold_id');

-- name: read_room
-- What a hold would have met: what the account has available, and the budgets of its key with what is used of them; then
-- the same of each key above it.
SELECT
    balance + credit_limit - held,
    counted,
    budget_day,
    (SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM usage_days
        WHERE usage_days.key_id = counted AND day = CAST(:day AS BIGINT))
        + coalesce((SELECT cost FROM drawn_days WHERE drawn_days.key_id = counted AND day = CAST(:day AS BIGINT)), 0),
    budget_month,
    (SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM usage_days
        WHERE usage_days.key_id = counted AND day BETWEEN CAST(:month_day AS BIGINT) AND CAST(:day AS BIGINT))
        + (SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM drawn_days
            WHERE drawn_days.key_id = counted AND day BETWEEN CAST(:month_day AS BIGINT) AND CAST(:day AS BIGINT)),
    coalesce((SELECT key_held.held FROM key_held WHERE key_held.key_id = counted), 0)
FROM accounts
CROSS JOIN (
    SELECT CAST(:key_id AS TEXT) AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_id = :key_id
) AS all_counted
LEFT JOIN keys ON keys.key_id = counted
WHERE accounts.account_id = :account_id AND accounts.kind = 'customer'
ORDER BY CASE WHEN counted = :key_id THEN 0 ELSE 1 END, counted DESC;
