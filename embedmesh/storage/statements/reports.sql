-- name: list_recovered
-- The latest holds that were open when their gateway died: a reply may have been delivered and was not charged.
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
    (SELECT count(*) FROM tabs WHERE ended_ms IS NULL) AS tabs_live,
    (SELECT count(*) FROM tabs WHERE ended_ms IS NOT NULL) AS tabs_ended,
    (SELECT count(*) FROM tabs WHERE state = 'recovered') AS tabs_recovered,
    (SELECT CAST(coalesce(sum(amount - captured), 0) AS BIGINT) FROM tabs
        WHERE state = 'recovered') AS tabs_recovered_nanousd,
    (SELECT CAST(coalesce(sum(requests), 0) AS BIGINT) FROM tabs) AS requests_settled;

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
SELECT transfer_id, kind, page.amount, source_id, target_id, hold_id, reference, created_ms
FROM (
    SELECT transfer_id, amount FROM entries WHERE account_id = :account_id AND transfer_id < CAST(:before AS BIGINT)
    ORDER BY transfer_id DESC LIMIT :rows_max
) AS page JOIN transfers USING (transfer_id)
ORDER BY transfer_id DESC;

-- name: statement_of_account
-- An account's entries in a span of time, in their order, from one on, with what was bought.
SELECT
    entries.transfer_id, transfers.created_ms, kind, entries.amount, transfers.hold_id, reference, key_id, model, tokens, price
FROM entries JOIN transfers USING (transfer_id)
    LEFT JOIN usage ON usage.hold_id = transfers.hold_id AND kind = 'charge'
WHERE entries.account_id = :account_id AND entries.transfer_id > CAST(:after AS BIGINT)
    AND transfers.created_ms >= CAST(:from_ms AS BIGINT) AND transfers.created_ms < CAST(:to_ms AS BIGINT)
ORDER BY entries.transfer_id LIMIT :rows_max;

-- name: balance_before
-- What an account had at a moment.
SELECT CAST(coalesce(sum(entries.amount), 0) AS BIGINT) FROM entries JOIN transfers USING (transfer_id)
WHERE entries.account_id = :account_id AND created_ms < CAST(:until_ms AS BIGINT);

-- name: one_hold
-- A hold with all that is known of it.
SELECT hold_id, account_id, key_id, amount, state, ended_by, captured, owner, created_ms, deadline_ms, ended_ms
FROM holds WHERE hold_id = :hold_id;

-- name: usage_of_hold
-- What a captured hold was for, as long as that is kept.
SELECT key_id, model, node_id, tokens, price, cost, payable, user_hash FROM usage WHERE hold_id = :hold_id;

-- name: transfers_of_hold
-- All money that was moved for a hold, in its order.
SELECT transfer_id, kind, source_id, target_id, amount, reference, created_ms FROM transfers
WHERE hold_id = :hold_id ORDER BY transfer_id;

-- name: payables
-- What nodes have earned and not been paid out.
SELECT account_id, balance FROM accounts WHERE kind = 'node' ORDER BY account_id;
