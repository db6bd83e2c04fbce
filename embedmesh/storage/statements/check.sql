-- Each statement lists what breaks one promise, as rows of (subject, detail); no rows means that it is kept.
-- The word after `name:` is the promise's name in the report.

-- name: transfers_sum_to_zero
-- The entries of a transfer are exactly its two sides.
SELECT 'transfer ' || transfer_id, 'entries: ' || count(entries.amount) || ', sum ' || coalesce(sum(entries.amount), 'none')
FROM transfers LEFT JOIN entries USING (transfer_id)
GROUP BY transfer_id
HAVING count(entries.amount) <> 2 OR sum(entries.amount) <> 0 OR max(entries.amount) <> transfers.amount;

-- name: entries_have_transfers
-- Every entry belongs to a transfer of its account.
SELECT 'entry of account ' || account_id, 'transfer ' || transfer_id || ' is not one of this account'
FROM entries LEFT JOIN transfers USING (transfer_id)
WHERE account_id IS NOT source_id AND account_id IS NOT target_id;

-- name: everything_sums_to_zero
-- All entries together are zero.
SELECT 'all entries', 'sum ' || sum(amount) FROM entries HAVING sum(amount) <> 0;

-- name: balance_is_sum_of_entries
-- An account's balance is the sum of its entries.
SELECT 'account ' || account_id, 'balance ' || balance || ', entries ' || coalesce(sum(amount), 0)
FROM accounts LEFT JOIN entries USING (account_id)
GROUP BY account_id
HAVING balance <> coalesce(sum(amount), 0);

-- name: held_is_sum_of_open_holds
-- What an account has held is the sum of its open holds.
SELECT 'account ' || account_id, 'held ' || held || ', open holds ' || coalesce(sum(amount), 0)
FROM accounts LEFT JOIN (SELECT account_id, amount FROM holds WHERE state = 'open') USING (account_id)
GROUP BY account_id
HAVING held <> coalesce(sum(amount), 0);

-- name: available_is_not_negative
-- No customer has less than is held.
SELECT 'account ' || account_id, 'balance ' || balance || ', held ' || held
FROM accounts
WHERE held < 0 OR (kind = 'customer' AND balance < held);

-- name: holds_end_once
-- A hold's state, its end and its times agree, and it captured at most its amount.
SELECT 'hold ' || hold_id, 'state ' || state || ', ended by ' || coalesce(ended_by, 'nothing')
    || ', captured ' || coalesce(captured, 'nothing') || ' of ' || amount
FROM holds
WHERE NOT coalesce(
    CASE state
        WHEN 'open' THEN ended_by IS NULL AND ended_ms IS NULL AND captured IS NULL
        WHEN 'captured' THEN ended_by IS 'capture' AND ended_ms IS NOT NULL AND captured BETWEEN 0 AND amount
        WHEN 'released' THEN ended_by IN ('release', 'expire', 'recover') AND ended_ms IS NOT NULL AND captured IS NULL
    END,
    FALSE
);

-- name: captured_holds_are_charged
-- A hold was captured if and only if it has one charge, of what was captured, to its own account.
SELECT 'hold ' || holds.hold_id, 'state ' || state || ', charges ' || count(transfer_id)
FROM holds LEFT JOIN transfers ON transfers.hold_id = holds.hold_id AND kind = 'charge'
GROUP BY holds.hold_id
HAVING count(transfer_id) <> (state = 'captured')
    OR (state = 'captured' AND (transfers.amount <> captured OR source_id <> holds.account_id));

-- name: captured_holds_have_usage
-- A hold was captured if and only if it has a usage record, with the same cost.
SELECT 'hold ' || holds.hold_id, 'state ' || state || ', usage ' || coalesce(cost, 'none')
FROM holds LEFT JOIN usage USING (hold_id)
WHERE (state = 'captured') <> (cost IS NOT NULL) OR cost <> captured OR usage.account_id <> holds.account_id;

-- name: payables_are_recorded
-- The nodes were given together exactly what the usage record says.
SELECT 'hold ' || usage.hold_id, 'payable ' || payable || ', moved ' || coalesce(sum(amount), 0)
FROM usage LEFT JOIN transfers ON transfers.hold_id = usage.hold_id AND kind = 'payable'
GROUP BY usage.hold_id
HAVING payable <> coalesce(sum(amount), 0);

-- name: references_are_whole
-- Every row that a row refers to exists.
SELECT "table" || ' row ' || coalesce(rowid, '?'), 'refers to a row of ' || parent || ' that is missing'
FROM pragma_foreign_key_check;

-- name: file_is_whole
-- SQLite finds no damage in the file.
SELECT 'file', integrity_check FROM pragma_integrity_check WHERE integrity_check <> 'ok';
