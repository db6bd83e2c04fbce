-- name: open_tabs
-- Set money aside for several requests each: the amount that is wanted, but at most a share of what the account has
-- available and of what is left of each budget. Nothing where that is too little, and for keys that are not good.
INSERT INTO tabs (tab_id, account_id, key_id, owner, amount, opened_ms, deadline_ms)
SELECT tab_id, account_id, key_id, CAST(:owner AS TEXT), amount, CAST(:now_ms AS BIGINT), deadline_ms
FROM (
    SELECT
        value ->> 'tab_id' AS tab_id, accounts.account_id, keys.key_id,
        CAST(value ->> 'deadline_ms' AS BIGINT) AS deadline_ms,
        CAST(value ->> 'least' AS BIGINT) AS least_amount,
        (SELECT min(most) FROM (
            SELECT CAST(value ->> 'wanted' AS BIGINT) AS most
            UNION ALL SELECT (accounts.balance + accounts.credit_limit - accounts.held) / CAST(:share AS BIGINT)
            UNION ALL SELECT (
                CASE monthly WHEN 0 THEN budget_day ELSE budget_month END - key_held.held
                - (SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM usage_days
                    WHERE usage_days.key_id = counted AND day BETWEEN first_day AND CAST(:day AS BIGINT))
                - (SELECT CAST(coalesce(sum(cost), 0) AS BIGINT) FROM drawn_days
                    WHERE drawn_days.key_id = counted AND day BETWEEN first_day AND CAST(:day AS BIGINT))
            ) / CAST(:share AS BIGINT)
            FROM (
                SELECT keys.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_draws.key_id = keys.key_id
            ) AS all_counted JOIN keys AS limits ON limits.key_id = counted JOIN key_held ON key_held.key_id = counted
            CROSS JOIN (
                SELECT 0 AS monthly, CAST(:day AS BIGINT) AS first_day UNION ALL SELECT 1, CAST(:month_day AS BIGINT)
            ) AS periods
            WHERE CASE monthly WHEN 0 THEN budget_day ELSE budget_month END IS NOT NULL
        ) AS bounds) AS amount
    FROM jsonb_each(:rows)
        CROSS JOIN accounts CROSS JOIN keys
    WHERE accounts.account_id = value ->> 'account_id' AND accounts.kind = 'customer'
        AND keys.key_id = value ->> 'key_id' AND keys.account_id = accounts.account_id
        AND NOT EXISTS (
            SELECT 1 FROM (
                SELECT keys.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_draws.key_id = keys.key_id
            ) AS all_counted JOIN keys AS bad ON bad.key_id = counted
            WHERE bad.revoked_ms IS NOT NULL OR bad.expires_ms <= CAST(:now_ms AS BIGINT)
        )
    LIMIT CAST(:tabs_max AS BIGINT)  -- all of them: PostgreSQL would compute each amount twice without it
) AS opening
WHERE amount >= least_amount
RETURNING tab_id, amount;

-- name: insert_usage_of_tabs
-- Record what requests under live tabs were for, as their tab's next settlement.
INSERT INTO usage (
    hold_id, account_id, key_id, model, node_id, tokens, price, cost, payable, user_hash, day, meters, tab_id, settlement
)
SELECT
    value ->> 1, tabs.account_id, tabs.key_id, value ->> 2, value ->> 3,
    CAST(value ->> 4 AS BIGINT), CAST(value ->> 5 AS BIGINT), CAST(value ->> 6 AS BIGINT), CAST(value ->> 7 AS BIGINT),
    value ->> 8, CAST(:day AS BIGINT), value ->> 9, tabs.tab_id, settlements + 1
FROM jsonb_each(:rows) CROSS JOIN tabs
WHERE tabs.tab_id = value ->> 0 AND state IN ('open', 'closing');

-- name: settle_tabs
-- Move what live tabs have captured from the customers to revenue, and the nodes' shares from there to the nodes.
INSERT INTO transfers (kind, source_id, target_id, amount, created_ms, tab_id, settlement, requests, digest)
SELECT
    value ->> 'kind', value ->> 'source_id', value ->> 'target_id', CAST(value ->> 'amount' AS BIGINT),
    CAST(:now_ms AS BIGINT), tabs.tab_id, settlements + 1, CAST(value ->> 'requests' AS BIGINT), value ->> 'digest'
FROM jsonb_each(:rows) CROSS JOIN tabs
WHERE tabs.tab_id = value ->> 'tab_id' AND state IN ('open', 'closing')
RETURNING tab_id;

-- name: settled_before
-- Which of some requests were settled: nobody may know after a connection was lost.
SELECT usage.hold_id FROM jsonb_each(:rows) CROSS JOIN usage
WHERE usage.hold_id = value ->> 0 AND usage.tab_id = value ->> 1;

-- name: end_tabs
-- End live tabs; what was not captured goes back. Found by their ids: see `capture_holds`.
UPDATE tabs SET state = value ->> 'state', ended_ms = CAST(:now_ms AS BIGINT)
FROM jsonb_each(:rows)
WHERE tab_id = value ->> 'tab_id' AND tabs.state IN ('open', 'closing')
RETURNING tab_id;

-- name: recall_tabs
-- Ask for the money of an account's open tabs; with a key, of those that have a budget in common with it. The tab of a batch,
-- which is its own owner, keeps its money until the batch ends.
UPDATE tabs SET state = 'closing'
WHERE account_id = :account_id AND ended_ms IS NULL AND state = 'open' AND owner <> tab_id AND (
    CAST(:key_id AS TEXT) IS NULL OR key_id = :key_id
    OR key_id IN (SELECT from_id FROM key_draws WHERE key_draws.key_id = :key_id)
    OR key_id IN (
        SELECT below.key_id FROM key_draws AS below WHERE below.from_id = :key_id
        UNION ALL SELECT beside.key_id FROM key_draws AS above JOIN key_draws AS beside ON beside.from_id = above.from_id
        WHERE above.key_id = :key_id
    )
);

-- name: count_live_tabs
-- How many of them have not ended.
SELECT count(*) FROM tabs
WHERE account_id = :account_id AND ended_ms IS NULL AND owner <> tab_id AND (
    CAST(:key_id AS TEXT) IS NULL OR key_id = :key_id
    OR key_id IN (SELECT from_id FROM key_draws WHERE key_draws.key_id = :key_id)
    OR key_id IN (
        SELECT below.key_id FROM key_draws AS below WHERE below.from_id = :key_id
        UNION ALL SELECT beside.key_id FROM key_draws AS above JOIN key_draws AS beside ON beside.from_id = above.from_id
        WHERE above.key_id = :key_id
    )
);

-- name: recalled_tabs
-- The tabs of a gateway that are asked for.
SELECT tab_id FROM tabs WHERE owner = :owner AND state = 'closing';

-- name: overdue_tabs
-- Live tabs past their deadline, the oldest first, at most as many as one batch should carry.
SELECT tab_id, account_id FROM tabs
WHERE ended_ms IS NULL AND deadline_ms < :now_ms ORDER BY deadline_ms LIMIT :tabs_max;

-- name: tabs_of_owner
-- The live tabs of one gateway. Read at its start, when the process that spent them is gone.
SELECT tab_id, account_id FROM tabs WHERE ended_ms IS NULL AND owner = :owner;

-- name: live_tabs
-- All live tabs but those of batches. Read at the start of a gateway that is alone, when the processes that spent them are
-- gone; whatever gateway has a batch goes on with its tab.
SELECT tab_id, account_id FROM tabs WHERE ended_ms IS NULL AND owner <> tab_id;

-- name: tabs_with_budgets
-- The live tabs of one gateway whose key, or one above it, is no longer good or has a budget, of which a tab has a part. Read
-- after keys were changed.
SELECT tab_id FROM tabs
WHERE owner = :owner AND ended_ms IS NULL AND EXISTS (
    SELECT 1 FROM (
        SELECT tabs.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_draws.key_id = tabs.key_id
    ) AS all_counted JOIN keys ON keys.key_id = counted
    WHERE revoked_ms IS NOT NULL OR expires_ms <= CAST(:now_ms AS BIGINT)
        OR coalesce(budget_day, budget_month) IS NOT NULL
);

-- name: unspent_of_account
-- What an account's live tabs have not captured: a hold may have it, once they were recalled. Those of batches are not.
SELECT CAST(coalesce(sum(amount - captured), 0) AS BIGINT) FROM tabs
WHERE account_id = :account_id AND ended_ms IS NULL AND owner <> tab_id;
