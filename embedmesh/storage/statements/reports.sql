-- name: list_recovered
-- The latest holds that were open when their gateway died, without a note: a reply may have been delivered and was not
-- charged.
SELECT hold_id, account_id, amount, ended_ms FROM holds WHERE ended_by = 'recover'
ORDER BY ended_ms DESC, hold_id DESC LIMIT :rows_max;

-- name: count_tallies
-- How much there is.
SELECT
    (SELECT count(*) FROM accounts) AS accounts,
    (SELECT count(*) FROM transfers) AS transfers,
    (SELECT count(*) FROM holds WHERE state = 'open') AS holds_open,
    (SELECT count(*) FROM holds WHERE state = 'captured') AS holds_captured,
    (SELECT count(*) FROM holds WHERE state = 'released') AS holds_released,
    (SELECT count(*) FROM holds WHERE ended_by = 'recover') AS holds_recovered,
    (SELECT count(*) FROM holds WHERE ended_by IN ('expire_noted', 'recover_noted')) AS holds_captured_at_notes,
    (SELECT count(*) FROM tabs WHERE ended_ms IS NULL) AS tabs_live,
    (SELECT count(*) FROM tabs WHERE ended_ms IS NOT NULL) AS tabs_ended,
    (SELECT count(*) FROM tabs WHERE state = 'recovered') AS tabs_recovered,
    (SELECT CAST(coalesce(sum(amount - captured), 0) AS BIGINT) FROM tabs
        WHERE state = 'recovered') AS tabs_recovered_nanousd,
    (SELECT CAST(coalesce(sum(requests), 0) AS BIGINT) FROM tabs) AS requests_settled,
    (SELECT count(*) FROM batches WHERE ended_ms IS NULL) AS batches_open,
    (SELECT count(*) FROM batches WHERE ended_ms IS NOT NULL) AS batches_ended,
    (SELECT count(*) FROM files) AS files,
    (SELECT count(*) FROM acts) AS acts;

-- name: notes
-- Notes of streams with the amounts of their holds, from one on.
SELECT hold_notes.hold_id, amount, cost, charge FROM hold_notes JOIN holds ON holds.hold_id = hold_notes.hold_id
WHERE hold_notes.hold_id > :after ORDER BY hold_notes.hold_id LIMIT :rows_max;

-- name: metered_usage
-- Usage records with several meters, from one on.
SELECT hold_id, tokens, cost, meters FROM usage WHERE meters IS NOT NULL AND hold_id > :after
ORDER BY hold_id LIMIT :rows_max;

-- name: settlements
-- Settlements of tabs from one on, whose usage records are kept.
SELECT transfer_id, tab_id, settlement, digest FROM transfers
WHERE digest IS NOT NULL AND transfer_id > :after AND created_ms / 86400000
    >= coalesce((SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'usage_kept_from_day'), 0)
ORDER BY transfer_id LIMIT :rows_max;

-- name: records_of_settlements
-- The usage records of some settlements, as they were digested.
SELECT
    usage.settlement, usage.tab_id, usage.hold_id, model, node_id, tokens, price, cost, payable, user_hash, meters
FROM transfers JOIN usage ON usage.tab_id = transfers.tab_id AND usage.settlement = transfers.settlement
WHERE digest IS NOT NULL AND transfer_id BETWEEN :first AND :last;

-- name: usage_of_account
-- An account's sums from one day to another, by day, model and key.
SELECT day, model, key_id, requests, tokens, cost FROM usage_days
WHERE account_id = :account_id AND day BETWEEN :from_day AND :to_day
ORDER BY day DESC, model, key_id LIMIT :rows_max;

-- name: entries_of_account
-- An account's entries before one, the latest first. The page is found before the transfers are looked at: a planner that
-- knows both tables only by their sizes may begin with the other one, which has millions of rows of other accounts.
SELECT
    transfer_id, kind, page.amount, source_id, target_id, hold_id, reference, created_ms, tab_id,
    CASE WHEN kind = 'charge' THEN coalesce(requests, 1) END
FROM (
    SELECT transfer_id, amount FROM entries WHERE account_id = :account_id AND transfer_id < CAST(:before AS BIGINT)
    ORDER BY transfer_id DESC LIMIT :rows_max
) AS page JOIN transfers USING (transfer_id)
ORDER BY transfer_id DESC;

-- name: statement_of_account
-- An account's entries in a span of time, in their order, from one on, with what was bought; under a tab that is known
-- by its settlement (see `bought_under_tabs`).
SELECT
    entries.transfer_id, transfers.created_ms, kind, entries.amount, transfers.hold_id, reference,
    coalesce(usage.key_id, tabs.key_id), model, tokens, price, transfers.tab_id,
    CASE WHEN kind = 'charge' THEN coalesce(transfers.requests, 1) END, transfers.settlement
FROM entries JOIN transfers USING (transfer_id)
    LEFT JOIN usage ON usage.hold_id = transfers.hold_id AND kind = 'charge'
    LEFT JOIN tabs ON tabs.tab_id = transfers.tab_id AND kind = 'charge'
WHERE entries.account_id = :account_id AND entries.transfer_id > CAST(:after AS BIGINT)
    AND transfers.created_ms >= CAST(:from_ms AS BIGINT) AND transfers.created_ms < CAST(:to_ms AS BIGINT)
ORDER BY entries.transfer_id LIMIT :rows_max;

-- name: bought_under_tabs
-- What some settlements were for, as long as that is kept: their tokens, and the model and the price that all of their
-- requests have in common.
SELECT
    usage.tab_id, usage.settlement,
    CASE WHEN min(model) = max(model) THEN min(model) END, CAST(sum(tokens) AS BIGINT),
    CASE WHEN min(price) = max(price) AND count(price) = count(*) THEN min(price) END
FROM jsonb_each(:rows) CROSS JOIN usage
WHERE usage.tab_id = value ->> 0 AND usage.settlement = CAST(value ->> 1 AS BIGINT)
GROUP BY usage.tab_id, usage.settlement;

-- name: charge_of_entry
-- What an entry charged an account for: a hold, or a settlement of a tab.
SELECT hold_id, tab_id, settlement FROM transfers
WHERE transfer_id = :transfer_id AND kind = 'charge' AND source_id = :account_id;

-- name: requests_of_hold
-- The only request of a charge, as long as that is kept.
SELECT hold_id, key_id, model, tokens, price, cost FROM usage WHERE hold_id = :hold_id AND hold_id > :after;

-- name: requests_of_settlement
-- The requests of a settlement in the order of their ids, from one on, as long as they are kept.
SELECT hold_id, key_id, model, tokens, price, cost FROM usage
WHERE tab_id = :tab_id AND settlement = :settlement AND hold_id > :after ORDER BY hold_id LIMIT :rows_max;

-- name: balance_before
-- What an account had at a moment.
SELECT CAST(coalesce(sum(entries.amount), 0) AS BIGINT) FROM entries JOIN transfers USING (transfer_id)
WHERE entries.account_id = :account_id AND created_ms < CAST(:until_ms AS BIGINT);

-- name: one_hold
-- A hold with all that is known of it.
SELECT hold_id, account_id, key_id, amount, state, ended_by, captured, owner, created_ms, deadline_ms, ended_ms
FROM holds WHERE hold_id = :hold_id;

-- name: note_of_hold
-- What was last noted of a stream, while its hold is open.
SELECT cost, noted_ms FROM hold_notes WHERE hold_id = :hold_id;

-- name: hold_of_lock
-- The hold of a lock, as long as locks are kept.
SELECT hold_id FROM locks WHERE lock_id = :lock_id;

-- name: lock_of_hold
-- The lock that a hold was placed for.
SELECT lock_id, node_id, scheme, model, units, price, expires_ms, used_ms FROM locks WHERE hold_id = :hold_id;

-- name: usage_of_hold
-- What a captured hold was for, as long as that is kept.
SELECT key_id, model, node_id, tokens, price, cost, payable, user_hash, meters FROM usage WHERE hold_id = :hold_id;

-- name: request_under_tab
-- A request that was settled under a tab, as long as that is kept: its cost, and the tab and the settlement.
SELECT usage.account_id, usage.key_id, cost, owner, deadline_ms, transfers.created_ms, usage.tab_id, usage.settlement
FROM usage JOIN tabs ON tabs.tab_id = usage.tab_id
    JOIN transfers ON transfers.tab_id = usage.tab_id AND transfers.settlement = usage.settlement AND kind = 'charge'
WHERE usage.hold_id = :hold_id;

-- name: transfers_of_request
-- All money that was moved for a request, in its order: by itself, and with others by its settlement.
SELECT transfer_id, kind, source_id, target_id, amount, reference, created_ms, 1 AS requests FROM transfers
WHERE hold_id = :hold_id
UNION ALL SELECT
    moved.transfer_id, moved.kind, moved.source_id, moved.target_id, moved.amount, moved.reference, moved.created_ms,
    charge.requests
FROM transfers AS moved JOIN transfers AS charge
    ON charge.tab_id = moved.tab_id AND charge.settlement = moved.settlement AND charge.kind = 'charge'
WHERE moved.tab_id = CAST(:tab_id AS TEXT) AND moved.settlement = CAST(:settlement AS BIGINT)
ORDER BY transfer_id;

-- name: one_tab
-- A tab with all that is known of it.
SELECT
    tab_id, account_id, key_id, amount, captured, requests, settlements, state, owner, opened_ms, deadline_ms, ended_ms
FROM tabs WHERE tab_id = :tab_id;

-- name: batch_of_tab
-- The batch whose money a tab has, as long as that is kept.
SELECT state, endpoint, model, total, completed, failed FROM batches WHERE batch_id = :tab_id;

-- name: transfers_of_tab
-- The latest money that was moved for a tab, the latest first.
SELECT transfer_id, kind, source_id, target_id, amount, reference, created_ms, coalesce(requests, 0) FROM transfers
WHERE tab_id = :tab_id AND settlement IS NOT NULL ORDER BY transfer_id DESC LIMIT :rows_max;

-- name: payables
-- What nodes have earned and not been paid out.
SELECT account_id, balance FROM accounts WHERE kind = 'node' ORDER BY account_id;
