-- Each statement lists what breaks one promise, as rows of (subject, detail). Without rows, the promise is kept.
-- The word after `name:` is the promise's name in the report.

-- name: transfers_sum_to_zero
-- The entries of a transfer are exactly its two sides.
SELECT 'transfer ' || transfer_id, 'entries: ' || count(entries.amount) || ', sum ' || coalesce(CAST(sum(entries.amount) AS TEXT), 'none')
FROM transfers LEFT JOIN entries USING (transfer_id)
GROUP BY transfer_id
HAVING count(entries.amount) <> 2 OR sum(entries.amount) <> 0 OR max(entries.amount) <> max(transfers.amount);

-- name: entries_have_transfers
-- Every entry belongs to a transfer of its account.
SELECT 'entry of account ' || account_id, 'transfer ' || transfer_id || ' is not one of this account'
FROM entries LEFT JOIN transfers USING (transfer_id)
WHERE account_id IS DISTINCT FROM source_id AND account_id IS DISTINCT FROM target_id;

-- name: everything_sums_to_zero
-- All entries together are zero.
SELECT 'all entries', 'sum ' || sum(amount) FROM entries HAVING sum(amount) <> 0;

-- name: balance_is_sum_of_entries
-- An account's balance is the sum of its entries.
SELECT 'account ' || account_id, 'balance ' || balance || ', entries ' || coalesce(sum(amount), 0)
FROM accounts LEFT JOIN entries USING (account_id)
GROUP BY account_id, balance
HAVING balance <> coalesce(sum(amount), 0);

-- name: held_is_sum_of_holds_and_tabs
-- What an account has held is the sum of its open holds, and of what its live tabs have not captured.
SELECT 'account ' || account_id, 'held ' || held || ', open holds and live tabs ' || coalesce(sum(amount), 0)
FROM accounts LEFT JOIN (
    SELECT account_id, amount FROM holds WHERE state = 'open'
    UNION ALL SELECT account_id, amount - captured FROM tabs WHERE ended_ms IS NULL
) AS open USING (account_id)
GROUP BY account_id, held
HAVING held <> coalesce(sum(amount), 0);

-- name: available_is_not_negative
-- No customer has less than is held, its credit limit counted in.
SELECT 'account ' || account_id, 'balance ' || balance || ', credit limit ' || credit_limit || ', held ' || held
FROM accounts
WHERE held < 0 OR (kind = 'customer' AND balance + credit_limit < held);

-- name: holds_end_once
-- A hold's state, its end and its times agree, and it captured at most its amount.
SELECT 'hold ' || hold_id, 'state ' || state || ', ended by ' || coalesce(ended_by, 'nothing')
    || ', captured ' || coalesce(CAST(captured AS TEXT), 'nothing') || ' of ' || amount
FROM holds
WHERE NOT coalesce(
    CASE state
        WHEN 'open' THEN ended_by IS NULL AND ended_ms IS NULL AND captured IS NULL
        WHEN 'captured' THEN ended_by IN ('capture', 'expire_noted', 'recover_noted')
            AND ended_ms IS NOT NULL AND captured BETWEEN 0 AND amount
        WHEN 'released' THEN ended_by IN ('release', 'expire', 'recover') AND ended_ms IS NOT NULL AND captured IS NULL
    END,
    FALSE
);

-- name: notes_end_with_their_holds
-- A note is of an open hold, which covers it.
SELECT 'note of ' || hold_notes.hold_id, 'cost ' || cost || ', hold ' || coalesce(state, 'missing') || ' of '
    || coalesce(CAST(amount AS TEXT), 'nothing')
FROM hold_notes LEFT JOIN holds ON holds.hold_id = hold_notes.hold_id
WHERE NOT coalesce(state = 'open' AND cost BETWEEN 0 AND amount, FALSE);

-- name: tabs_end_once
-- A tab's state and its times agree, and it captured at most its amount.
SELECT 'tab ' || tab_id, 'state ' || state || ', ended ' || coalesce(CAST(ended_ms AS TEXT), 'never')
    || ', captured ' || captured || ' of ' || amount
FROM tabs
WHERE NOT coalesce(
    captured BETWEEN 0 AND amount AND CASE
        WHEN state IN ('open', 'closing') THEN ended_ms IS NULL
        WHEN state IN ('closed', 'expired', 'recovered') THEN ended_ms IS NOT NULL
    END,
    FALSE
);

-- name: tabs_captured_what_was_settled
-- What a tab has captured is what its settlements moved, from its own account, numbered without a gap.
SELECT 'tab ' || tabs.tab_id, 'captured ' || captured || ', settled ' || coalesce(sum(transfers.amount), 0)
    || '; requests ' || tabs.requests || ', settled ' || coalesce(sum(transfers.requests), 0)
    || '; settlements ' || settlements || ', found ' || count(transfer_id)
FROM tabs LEFT JOIN transfers ON transfers.tab_id = tabs.tab_id AND kind = 'charge'
GROUP BY tabs.tab_id
HAVING captured <> coalesce(sum(transfers.amount), 0) OR tabs.requests <> coalesce(sum(transfers.requests), 0)
    OR settlements <> count(transfer_id) OR settlements <> coalesce(max(settlement), 0)
    OR min(source_id) <> tabs.account_id OR max(source_id) <> tabs.account_id;

-- name: requests_have_holds_or_tabs
-- Whatever was charged, paid or recorded for a request has a hold of its own, or a tab with that settlement.
SELECT 'transfer ' || transfer_id, 'is of the hold ' || hold_id || ', which is missing'
FROM transfers LEFT JOIN holds USING (hold_id)
WHERE hold_id IS NOT NULL AND transfers.tab_id IS NULL AND holds.hold_id IS NULL
UNION ALL SELECT 'transfer ' || transfer_id, 'is of the tab ' || transfers.tab_id || ', which is missing or has no such settlement'
FROM transfers LEFT JOIN tabs USING (tab_id)
WHERE transfers.tab_id IS NOT NULL AND (tabs.tab_id IS NULL OR settlement > settlements)
UNION ALL SELECT 'usage of ' || hold_id, 'has no hold and no tab'
FROM usage LEFT JOIN holds USING (hold_id)
WHERE usage.tab_id IS NULL AND holds.hold_id IS NULL;

-- name: settlements_are_their_usage
-- A settlement is exactly its usage records, which are of its tab, as long as such records are kept.
SELECT 'tab ' || settled.tab_id, 'settlement ' || settled.settlement || ': charged ' || settled.amount || ' for '
    || settled.requests || ' requests, usage ' || coalesce(sum(cost), 0) || ' for ' || count(usage.hold_id)
FROM transfers AS settled JOIN tabs USING (tab_id)
    LEFT JOIN usage ON usage.tab_id = settled.tab_id AND usage.settlement = settled.settlement
        AND usage.account_id = tabs.account_id AND usage.key_id = tabs.key_id AND day = settled.created_ms / 86400000
WHERE kind = 'charge' AND settled.created_ms / 86400000
    >= coalesce((SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'usage_kept_from_day'), 0)
GROUP BY settled.tab_id, settled.settlement, settled.amount, settled.requests
HAVING settled.amount <> coalesce(sum(cost), 0) OR settled.requests <> count(usage.hold_id);

-- name: usage_of_tabs_is_settled
-- Every usage record of a tab is of one of its settlements.
SELECT 'request ' || usage.hold_id, 'is of settlement ' || usage.settlement || ' of tab ' || usage.tab_id || ', which is missing'
FROM usage LEFT JOIN transfers
    ON transfers.tab_id = usage.tab_id AND transfers.settlement = usage.settlement AND kind = 'charge'
WHERE usage.tab_id IS NOT NULL AND transfer_id IS NULL;

-- name: requests_are_charged_once
-- No request is charged under a hold of its own and under a tab.
SELECT 'request ' || usage.hold_id, 'has a hold that was ' || state || ', and was settled under tab ' || tab_id
FROM usage JOIN holds USING (hold_id)
WHERE tab_id IS NOT NULL;

-- name: captured_holds_are_charged
-- A hold was captured if and only if it has one charge, of what was captured, to its own account.
SELECT 'hold ' || holds.hold_id, 'state ' || state || ', charges ' || count(transfer_id)
FROM holds LEFT JOIN transfers ON transfers.hold_id = holds.hold_id AND kind = 'charge'
GROUP BY holds.hold_id
HAVING count(transfer_id) <> CASE state WHEN 'captured' THEN 1 ELSE 0 END
    OR (state = 'captured' AND (max(transfers.amount) <> captured OR max(source_id) <> holds.account_id));

-- name: captured_holds_have_usage
-- A hold was captured if and only if it has a usage record, with the same cost, as long as such records are kept.
SELECT 'hold ' || holds.hold_id, 'state ' || state || ', usage ' || coalesce(CAST(cost AS TEXT), 'none')
FROM holds LEFT JOIN usage USING (hold_id)
WHERE (
    (state = 'captured') <> (cost IS NOT NULL) OR cost <> captured OR usage.account_id <> holds.account_id
) AND coalesce(ended_ms / 86400000, 0)
    >= coalesce((SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'usage_kept_from_day'), 0);

-- name: payables_are_recorded
-- The nodes were given together exactly what the usage record says.
SELECT 'hold ' || usage.hold_id, 'payable ' || payable || ', moved ' || coalesce(sum(amount), 0)
FROM usage LEFT JOIN transfers ON transfers.hold_id = usage.hold_id AND kind = 'payable'
WHERE usage.tab_id IS NULL
GROUP BY usage.hold_id, payable
HAVING payable <> coalesce(sum(amount), 0);

-- name: payables_of_tabs_are_recorded
-- The same for each settlement of a tab.
SELECT 'tab ' || tab_id, 'settlement ' || settlement || ': ' || sum(recorded) || ' nano-USD more are recorded than were moved'
FROM (
    SELECT tab_id, settlement, payable AS recorded FROM usage WHERE tab_id IS NOT NULL
    UNION ALL SELECT tab_id, settlement, -amount FROM transfers
    WHERE kind = 'payable' AND settlement IS NOT NULL AND created_ms / 86400000
        >= coalesce((SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'usage_kept_from_day'), 0)
) AS both_sides
GROUP BY tab_id, settlement
HAVING sum(recorded) <> 0;

-- name: refunds_are_of_charges
-- A request's refunds are together at most what was charged for it, and went to its own account.
SELECT 'hold ' || hold_id, 'captured ' || coalesce(CAST(charged AS TEXT), 'nothing') || ', refunds ' || sum(transfers.amount)
FROM transfers JOIN (
    SELECT hold_id, account_id, captured AS charged FROM holds
    UNION ALL SELECT hold_id, account_id, cost FROM usage WHERE tab_id IS NOT NULL
) AS request USING (hold_id)
WHERE kind = 'refund'
GROUP BY hold_id, charged, account_id
HAVING sum(transfers.amount) > coalesce(charged, 0) OR min(target_id) <> account_id OR max(target_id) <> account_id;

-- name: usage_adds_up
-- The sums by day are what the records add up to, for days whose records are all kept.
SELECT 'usage of key ' || key_id, 'day ' || day || ', model ' || model || ': sum ' || cost || ', records ' || recorded
FROM usage_days JOIN (
    SELECT key_id, day, model, sum(cost) AS recorded FROM usage GROUP BY key_id, day, model
) AS records USING (key_id, day, model)
WHERE cost <> recorded
    AND day >= coalesce((SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'usage_kept_from_day'), 0);

-- name: customers_were_charged_what_they_used
-- All sums of usage together are all charges together.
SELECT 'all usage', 'usage ' || used || ', charges ' || charged
FROM (
    SELECT
        (SELECT coalesce(sum(cost), 0) FROM usage_days) AS used,
        (SELECT coalesce(sum(amount), 0) FROM transfers WHERE kind = 'charge') AS charged
) AS both_sums
WHERE used <> charged;

-- name: keys_draw_from_all_above
-- A key draws from its parent and from the keys that its parent draws from, and from no other.
SELECT 'key ' || key_id, 'draws or should draw from ' || from_id
FROM (
    SELECT key_id, from_id FROM (
        SELECT key_id, parent_id AS from_id FROM keys WHERE parent_id IS NOT NULL
        UNION SELECT keys.key_id, from_id FROM keys JOIN key_draws ON key_draws.key_id = keys.parent_id
        EXCEPT SELECT key_id, from_id FROM key_draws
    ) AS missing
    UNION ALL SELECT key_id, from_id FROM (
        SELECT key_id, from_id FROM key_draws
        EXCEPT SELECT key_id, parent_id FROM keys
        EXCEPT SELECT keys.key_id, from_id FROM keys JOIN key_draws ON key_draws.key_id = keys.parent_id
    ) AS wrong
) AS differing;

-- name: drawn_is_held_below
-- What is drawn from a key is what the keys below it hold, in holds and in tabs.
SELECT 'key ' || key_id, 'drawn ' || sum(counted) || ' in holds, ' || sum(amount) || ' nano-USD more than is held'
FROM (
    SELECT key_id, holds AS counted, held AS amount FROM drawn
    UNION ALL SELECT from_id, -1, -amount FROM holds JOIN key_draws USING (key_id) WHERE state = 'open'
    UNION ALL SELECT from_id, 0, captured - amount FROM tabs JOIN key_draws USING (key_id) WHERE ended_ms IS NULL
) AS both_sides
GROUP BY key_id
HAVING sum(counted) <> 0 OR sum(amount) <> 0;

-- name: drawn_days_add_up
-- What was drawn from a key on a day is what the keys below it have spent.
SELECT 'key ' || key_id, 'day ' || day || ': ' || sum(cost) || ' nano-USD more was drawn than spent'
FROM (
    SELECT key_id, day, cost FROM drawn_days
    UNION ALL SELECT from_id, day, -cost FROM usage_days JOIN key_draws USING (key_id)
) AS both_sides
GROUP BY key_id, day
HAVING sum(cost) <> 0;

-- name: locks_have_holds
-- A lock has a hold of its account and key, which covers what its units cost; no request has taken it over but one that has
-- used the lock, and then in time.
SELECT 'lock ' || lock_id, 'needs ' || units || ' at ' || price || ', hold ' || coalesce(holds.hold_id, 'missing')
    || ' of ' || coalesce(CAST(amount AS TEXT), 'nothing') || ', ' || coalesce(state, 'none')
FROM locks LEFT JOIN holds ON holds.hold_id = locks.hold_id
WHERE NOT coalesce(
    holds.account_id = locks.account_id AND holds.key_id = locks.key_id
    AND amount >= units * (price / 1000000) + (units * (price % 1000000) + 999999) / 1000000
    AND CASE WHEN used_ms IS NULL THEN state <> 'captured' AND deadline_ms = expires_ms ELSE used_ms < expires_ms END,
    FALSE
);

-- name: holds_have_one_lock
-- No two locks are for the same money.
SELECT 'hold ' || hold_id, 'has ' || count(*) || ' locks' FROM locks GROUP BY hold_id HAVING count(*) > 1;

-- name: batches_have_their_money
-- A batch that was begun has a tab of its own over what its lines cost, which ends with it; another has none.
SELECT 'batch ' || batches.batch_id, batches.state || ' over ' || batches.amount || ', tab '
    || coalesce(tabs.state || ' of ' || tabs.amount, 'missing')
FROM batches LEFT JOIN tabs ON tabs.tab_id = batches.batch_id
WHERE NOT coalesce(
    CASE WHEN in_progress_ms IS NULL THEN tabs.tab_id IS NULL
        ELSE tabs.account_id = batches.account_id AND tabs.key_id = batches.key_id AND tabs.owner = tabs.tab_id
            AND tabs.amount = batches.amount AND (batches.ended_ms IS NULL OR tabs.ended_ms IS NOT NULL)
    END,
    FALSE
);

-- name: batches_are_charged_by_line
-- What was settled under a batch's tab is what its lines were charged, and no line was charged that was not completed.
SELECT 'batch ' || batch_id, 'charged ' || cost || ' for ' || charged || ' of ' || completed || ' lines, tab '
    || captured || ' for ' || requests
FROM batches JOIN tabs ON tabs.tab_id = batch_id
WHERE cost <> captured OR charged <> requests OR charged > completed;

-- name: batches_are_their_units
-- The counts of a batch that is being worked off are those of its units; once it is over these are deleted.
SELECT 'batch ' || batches.batch_id, 'completed ' || batches.completed || ', units ' || coalesce(sum(batch_units.completed), 0)
    || '; cost ' || batches.cost || ', units ' || coalesce(sum(batch_units.cost), 0)
FROM batches LEFT JOIN batch_units ON batch_units.batch_id = batches.batch_id
WHERE ended_ms IS NULL AND in_progress_ms IS NOT NULL
GROUP BY
    batches.batch_id, batches.completed, batches.failed, batches.charged, batches.cost, batches.units, batches.total
HAVING batches.completed <> coalesce(sum(batch_units.completed), 0) OR batches.failed <> coalesce(sum(batch_units.failed), 0)
    OR batches.charged <> coalesce(sum(batch_units.charged), 0) OR batches.cost <> coalesce(sum(batch_units.cost), 0)
    OR batches.units <> count(unit) OR batches.total <> coalesce(sum(lines), 0);

-- name: lines_are_of_their_batch
-- What was charged under a batch's tab are lines of that batch: their ids begin as its own.
SELECT 'request ' || hold_id, 'is no line of ' || tabs.tab_id
FROM tabs JOIN usage ON usage.tab_id = tabs.tab_id
WHERE tabs.owner = tabs.tab_id AND tabs.tab_id LIKE 'batch%' AND substr(hold_id, 5, 24) <> substr(tabs.tab_id, 7, 24);

-- name: jobs_have_their_money
-- A job has a tab of its own, which is over once the job is closed and has nothing under way.
SELECT 'job ' || jobs.job_id, 'tab ' || coalesce(tabs.state || ' of ' || tabs.amount, 'missing')
FROM jobs LEFT JOIN tabs ON tabs.tab_id = jobs.job_id
WHERE NOT coalesce(
    tabs.account_id = jobs.account_id AND tabs.key_id = jobs.key_id AND tabs.owner = tabs.tab_id
        AND (tabs.state <> 'open' OR closed_ms IS NULL)
        AND (tabs.state <> 'closing' OR (closed_ms IS NOT NULL AND EXISTS (
            SELECT 1 FROM job_requests WHERE job_requests.job_id = jobs.job_id AND done_ms IS NULL
        ))),
    FALSE
);

-- name: jobs_are_their_requests
-- What was settled under a job's tab, and the job's own counts, are what its requests were charged, as long as these are kept;
-- its budget covers what is under way, too.
SELECT 'job ' || jobs.job_id, 'charged ' || captured || ' of ' || tabs.amount || ' for ' || requests || ' requests, its keys '
    || coalesce(sum(CASE WHEN done_ms IS NOT NULL THEN job_requests.amount END), 0) || ' for ' || count(done_ms)
FROM jobs JOIN tabs ON tabs.tab_id = jobs.job_id LEFT JOIN job_requests ON job_requests.job_id = jobs.job_id
WHERE ended_ms IS NULL
GROUP BY jobs.job_id, captured, tabs.amount, requests, jobs.texts, jobs.tokens
HAVING captured <> coalesce(sum(CASE WHEN done_ms IS NOT NULL THEN job_requests.amount END), 0)
    OR requests <> count(done_ms)
    OR jobs.texts <> coalesce(sum(CASE WHEN done_ms IS NOT NULL THEN job_requests.texts END), 0)
    OR jobs.tokens <> coalesce(sum(CASE WHEN done_ms IS NOT NULL THEN job_requests.tokens END), 0)
    OR tabs.amount < captured + coalesce(sum(CASE WHEN done_ms IS NULL THEN job_requests.amount END), 0);

-- name: keys_of_jobs_are_charged
-- A request of a job that is done has the usage record of its own id, under the job's tab, as long as such records are kept.
SELECT 'request ' || request_id, 'of job ' || job_id || ' cost ' || amount || ', usage '
    || coalesce(CAST(cost AS TEXT), 'missing')
FROM job_requests LEFT JOIN usage ON usage.hold_id = request_id AND usage.tab_id = job_id
WHERE done_ms IS NOT NULL AND cost IS DISTINCT FROM amount AND done_ms / 86400000
    >= coalesce((SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'usage_kept_from_day'), 0);
