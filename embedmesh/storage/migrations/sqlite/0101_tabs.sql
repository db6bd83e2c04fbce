-- Runs before the new code. Adds tabs: holds that cover several requests of one key at one gateway.
-- See `0100_start.sql` for units, and for what each of the older tables is.

INSERT INTO changes (kind) VALUES ('tabs');

-- -- tabs: money set aside for several requests. `owner` is the gateway that spends it, in its memory; `captured` is what
-- it has settled. The moves are those of rules.tabs.MOVES. What is held is `amount - captured` until the tab has ended

CREATE TABLE tabs (
    tab_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL REFERENCES keys,
    owner TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 1 AND 4611686018427387904),
    captured INTEGER NOT NULL DEFAULT 0 CHECK (captured BETWEEN 0 AND amount),
    requests INTEGER NOT NULL DEFAULT 0 CHECK (requests >= 0),
    settlements INTEGER NOT NULL DEFAULT 0 CHECK (settlements BETWEEN 0 AND requests),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'closing', 'closed', 'expired', 'recovered')),
    opened_ms INTEGER NOT NULL,
    deadline_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    CHECK ((state IN ('open', 'closing')) = (ended_ms IS NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX tabs_live ON tabs (deadline_ms) WHERE ended_ms IS NULL;
CREATE INDEX tabs_live_of_key ON tabs (account_id, key_id) WHERE ended_ms IS NULL;
CREATE INDEX tabs_recalled ON tabs (owner) WHERE state = 'closing';
CREATE INDEX tabs_of_dead_gateways ON tabs (ended_ms) WHERE state = 'recovered';

CREATE TRIGGER tabs_start_open BEFORE INSERT ON tabs
WHEN NEW.state <> 'open' OR NEW.captured <> 0 OR NEW.requests <> 0 OR NEW.settlements <> 0
BEGIN SELECT RAISE(ABORT, 'a tab starts open and unspent'); END;

-- What a key holds, and all keys below it.
CREATE VIEW key_held AS SELECT
    key_id,
    (SELECT coalesce(sum(amount), 0) FROM holds WHERE holds.key_id = keys.key_id AND state = 'open')
        + (SELECT coalesce(sum(amount - captured), 0) FROM tabs
            WHERE tabs.account_id = keys.account_id AND tabs.key_id = keys.key_id AND ended_ms IS NULL)
        + coalesce((SELECT drawn.held FROM drawn WHERE drawn.key_id = keys.key_id), 0) AS held
FROM keys;

-- A tab is opened only if the account covers it, and the key and all keys above it have room. Otherwise there is no row.
CREATE TRIGGER tabs_need_room BEFORE INSERT ON tabs
BEGIN
    SELECT RAISE(IGNORE)
    FROM (
        SELECT NEW.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_id = NEW.key_id
    ) CROSS JOIN keys ON keys.key_id = counted
    WHERE coalesce(budget_day, budget_month) IS NOT NULL AND (
        budget_day < NEW.amount + (SELECT held FROM key_held WHERE key_id = counted)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day = NEW.opened_ms / 86400000)
            + coalesce((SELECT cost FROM drawn_days WHERE key_id = counted AND day = NEW.opened_ms / 86400000), 0)
        OR budget_month < NEW.amount + (SELECT held FROM key_held WHERE key_id = counted)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.opened_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.opened_ms / 86400000)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.opened_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.opened_ms / 86400000)
    );
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    SELECT RAISE(IGNORE) WHERE changes() = 0;
END;

CREATE TRIGGER tabs_end_once BEFORE UPDATE ON tabs WHEN OLD.state NOT IN ('open', 'closing')
BEGIN SELECT RAISE(ABORT, 'a tab ends once'); END;

CREATE TRIGGER tabs_move_on BEFORE UPDATE OF state ON tabs WHEN NEW.state IN ('open', OLD.state)
BEGIN SELECT RAISE(ABORT, 'a tab only moves on'); END;

CREATE TRIGGER tabs_keep_their_terms
BEFORE UPDATE OF tab_id, account_id, key_id, owner, amount, opened_ms, deadline_ms ON tabs
BEGIN SELECT RAISE(ABORT, 'a tab keeps its terms'); END;

CREATE TRIGGER tabs_only_grow BEFORE UPDATE OF captured, requests, settlements ON tabs
WHEN NEW.captured < OLD.captured OR NEW.requests < OLD.requests OR NEW.settlements < OLD.settlements
BEGIN SELECT RAISE(ABORT, 'what a tab has captured only grows'); END;

CREATE TRIGGER tabs_stay BEFORE DELETE ON tabs
BEGIN SELECT RAISE(ABORT, 'tabs are never deleted'); END;

-- What a tab holds less: what was captured, and at its end the rest.
CREATE TRIGGER tabs_give_back AFTER UPDATE OF captured, state ON tabs
BEGIN
    UPDATE accounts SET held = held - (OLD.amount - OLD.captured) + iif(NEW.ended_ms IS NULL, NEW.amount - NEW.captured, 0)
    WHERE account_id = OLD.account_id;
END;

-- Triggers of their own for keys that draw: other keys pay for one lookup only.
CREATE TRIGGER tabs_draw AFTER INSERT ON tabs WHEN EXISTS (SELECT 1 FROM key_draws WHERE key_id = NEW.key_id)
BEGIN
    INSERT INTO drawn (key_id, holds, held) SELECT from_id, 0, NEW.amount FROM key_draws WHERE key_id = NEW.key_id
    ON CONFLICT (key_id) DO UPDATE SET held = held + excluded.held;
END;

CREATE TRIGGER tabs_draw_less AFTER UPDATE OF captured, state ON tabs
WHEN EXISTS (SELECT 1 FROM key_draws WHERE key_id = OLD.key_id)
BEGIN
    UPDATE drawn SET held = held - (OLD.amount - OLD.captured) + iif(NEW.ended_ms IS NULL, NEW.amount - NEW.captured, 0)
    WHERE key_id IN (SELECT from_id FROM key_draws WHERE key_id = OLD.key_id);
END;

-- A gateway hears that a tab of its own is asked for, and whoever asked hears that it has ended.
CREATE TRIGGER tabs_changed AFTER UPDATE OF state ON tabs WHEN 'closing' IN (OLD.state, NEW.state)
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'tabs'; END;

-- -- holds count what tabs hold

DROP TRIGGER holds_need_room;

CREATE TRIGGER holds_need_room BEFORE INSERT ON holds
BEGIN
    SELECT RAISE(IGNORE)
    FROM (
        SELECT NEW.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_id = NEW.key_id
    ) CROSS JOIN keys ON keys.key_id = counted
    WHERE coalesce(concurrency, budget_day, budget_month) IS NOT NULL AND (
        concurrency <= (SELECT count(*) FROM holds WHERE key_id = counted AND state = 'open')
            + coalesce((SELECT holds FROM drawn WHERE key_id = counted), 0)
        OR budget_day < NEW.amount + (SELECT held FROM key_held WHERE key_id = counted)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day = NEW.created_ms / 86400000)
            + coalesce((SELECT cost FROM drawn_days WHERE key_id = counted AND day = NEW.created_ms / 86400000), 0)
        OR budget_month < NEW.amount + (SELECT held FROM key_held WHERE key_id = counted)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.created_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.created_ms / 86400000)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.created_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.created_ms / 86400000)
    );
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    SELECT RAISE(IGNORE) WHERE changes() = 0;
END;

-- -- usage: a request under a tab has no hold of its own. `settlement` is the number of its settlement within its tab.
-- `hold_id` is our own id of the request in both cases

CREATE TABLE usage_with_tabs (
    hold_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    node_id TEXT NOT NULL,
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    price INTEGER CHECK (price >= 0),
    cost INTEGER NOT NULL CHECK (cost >= 0),
    payable INTEGER NOT NULL CHECK (payable BETWEEN 0 AND cost),
    user_hash TEXT,
    day INTEGER NOT NULL,
    meters TEXT CHECK (meters IS NULL OR price IS NULL),
    tab_id TEXT,
    settlement INTEGER CHECK (settlement > 0),
    CHECK ((tab_id IS NULL) = (settlement IS NULL))
) STRICT, WITHOUT ROWID;
INSERT INTO usage_with_tabs
SELECT hold_id, account_id, key_id, model, node_id, tokens, price, cost, payable, user_hash, day, meters, NULL, NULL FROM usage;
DROP TABLE usage;
ALTER TABLE usage_with_tabs RENAME TO usage;
-- With all that a settlement adds up, so that it need not look at the records themselves.
CREATE INDEX usage_of_settlement ON usage (tab_id, settlement, model, cost, tokens) WHERE tab_id IS NOT NULL;

-- Requests under a tab are added up by their settlement.
CREATE TRIGGER usage_adds_up AFTER INSERT ON usage WHEN NEW.tab_id IS NULL
BEGIN
    SELECT RAISE(ABORT, 'usage is of a hold or of a tab')
    WHERE NOT EXISTS (SELECT 1 FROM holds WHERE hold_id = NEW.hold_id AND account_id = NEW.account_id);
    INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    VALUES (NEW.key_id, NEW.day, NEW.model, NEW.account_id, 1, NEW.tokens, NEW.cost)
    ON CONFLICT (key_id, day, model) DO UPDATE SET
        requests = requests + 1, tokens = tokens + excluded.tokens, cost = cost + excluded.cost;
    INSERT INTO drawn_days (key_id, day, cost) SELECT from_id, NEW.day, NEW.cost FROM key_draws WHERE key_id = NEW.key_id
    ON CONFLICT (key_id, day) DO UPDATE SET cost = cost + excluded.cost;
END;

CREATE TRIGGER usage_never_changes BEFORE UPDATE ON usage
BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END;

CREATE TRIGGER usage_stays BEFORE DELETE ON usage
WHEN OLD.day >= coalesce((SELECT CAST(value AS INTEGER) FROM facts WHERE name = 'usage_kept_from_day'), 0)
BEGIN SELECT RAISE(ABORT, 'usage is kept until its day is over'); END;

-- -- transfers: a settlement is a charge of a tab: for `requests` requests, whose usage records have the `digest`
-- (see ledger.settle_tab). A refund of a request under a tab names both

DROP TRIGGER entries_follow_transfers;

CREATE TABLE transfers_with_tabs (
    transfer_id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('credit', 'charge', 'payable', 'refund', 'payout')),
    source_id TEXT NOT NULL REFERENCES accounts,
    target_id TEXT NOT NULL REFERENCES accounts,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 4611686018427387904),
    hold_id TEXT,
    reference TEXT,
    created_ms INTEGER NOT NULL,
    tab_id TEXT,
    settlement INTEGER,
    requests INTEGER CHECK (requests > 0),
    digest TEXT CHECK (length(digest) = 64),
    CHECK (source_id <> target_id),
    CHECK (CASE
        WHEN kind IN ('credit', 'payout') THEN hold_id IS NULL AND tab_id IS NULL
        WHEN kind = 'refund' THEN hold_id IS NOT NULL
        ELSE (hold_id IS NULL) <> (tab_id IS NULL)
    END),
    CHECK ((settlement IS NOT NULL) = (tab_id IS NOT NULL AND kind IN ('charge', 'payable'))),
    CHECK ((requests IS NOT NULL) = (tab_id IS NOT NULL AND kind = 'charge')),
    CHECK ((digest IS NOT NULL) = (tab_id IS NOT NULL AND kind = 'charge')),
    CHECK ((kind IN ('credit', 'payout', 'refund')) = (reference IS NOT NULL))
) STRICT;
INSERT INTO transfers_with_tabs
SELECT transfer_id, kind, source_id, target_id, amount, hold_id, reference, created_ms, NULL, NULL, NULL, NULL FROM transfers;
DROP TABLE transfers;
ALTER TABLE transfers_with_tabs RENAME TO transfers;
-- A hold has one charge, and one payable for each node that did some of its work; so has a settlement.
CREATE UNIQUE INDEX transfers_once_a_hold ON transfers (hold_id, kind, target_id, coalesce(reference, ''))
WHERE hold_id IS NOT NULL;
CREATE UNIQUE INDEX transfers_once_a_reference ON transfers (reference) WHERE reference IS NOT NULL;
CREATE UNIQUE INDEX transfers_once_a_settlement ON transfers (tab_id, settlement, kind, target_id)
WHERE settlement IS NOT NULL;

CREATE TRIGGER transfers_charge_what_was_captured BEFORE INSERT ON transfers
WHEN NEW.kind = 'charge' AND NEW.tab_id IS NULL AND NOT EXISTS (
    SELECT 1 FROM holds
    WHERE hold_id = NEW.hold_id AND account_id = NEW.source_id AND captured = NEW.amount AND NEW.target_id = 'revenue'
)
BEGIN SELECT RAISE(ABORT, 'a charge is what its hold captured, and goes to revenue'); END;

-- A settlement is of a live tab, follows the tab's last one, and is exactly its usage records. It adds them up, and its
-- tab has captured that much more.
CREATE TRIGGER transfers_settle_tabs BEFORE INSERT ON transfers WHEN NEW.kind = 'charge' AND NEW.tab_id IS NOT NULL
BEGIN
    SELECT RAISE(ABORT, 'a settlement is of a live tab, and goes to revenue') WHERE NEW.target_id <> 'revenue' OR NOT EXISTS (
        SELECT 1 FROM tabs WHERE tab_id = NEW.tab_id AND account_id = NEW.source_id
            AND state IN ('open', 'closing') AND settlements + 1 = NEW.settlement
    );
    SELECT RAISE(ABORT, 'a settlement is what its usage records add up to') WHERE (
        SELECT count(*) IS NOT NEW.requests OR sum(cost) IS NOT NEW.amount FROM usage
        WHERE tab_id = NEW.tab_id AND settlement = NEW.settlement
    );
    INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    SELECT (SELECT key_id FROM tabs WHERE tab_id = NEW.tab_id), NEW.created_ms / 86400000, model, NEW.source_id,
        count(*), sum(tokens), sum(cost)
    FROM usage WHERE tab_id = NEW.tab_id AND settlement = NEW.settlement GROUP BY model
    ON CONFLICT (key_id, day, model) DO UPDATE SET
        requests = requests + excluded.requests, tokens = tokens + excluded.tokens, cost = cost + excluded.cost;
    INSERT INTO drawn_days (key_id, day, cost)
    SELECT from_id, NEW.created_ms / 86400000, NEW.amount FROM tabs JOIN key_draws USING (key_id)
    WHERE tab_id = NEW.tab_id
    ON CONFLICT (key_id, day) DO UPDATE SET cost = cost + excluded.cost;
    UPDATE tabs SET captured = captured + NEW.amount, requests = requests + NEW.requests, settlements = NEW.settlement
    WHERE tab_id = NEW.tab_id;
END;

CREATE TRIGGER transfers_pay_nodes BEFORE INSERT ON transfers WHEN NEW.kind = 'payable' AND (
    NEW.source_id <> 'revenue' OR NOT EXISTS (SELECT 1 FROM accounts WHERE account_id = NEW.target_id AND kind = 'node')
    OR NOT EXISTS (
        SELECT 1 FROM holds WHERE hold_id = NEW.hold_id
        UNION ALL SELECT 1 FROM tabs WHERE tab_id = NEW.tab_id AND settlements >= NEW.settlement
    )
)
BEGIN SELECT RAISE(ABORT, 'a payable goes from revenue to a node, for a hold or a settlement'); END;

CREATE TRIGGER transfers_refund_what_was_charged BEFORE INSERT ON transfers WHEN NEW.kind = 'refund' AND NOT EXISTS (
    SELECT 1 FROM (
        SELECT account_id, captured AS charged FROM holds WHERE hold_id = NEW.hold_id AND NEW.tab_id IS NULL
        UNION ALL SELECT account_id, cost FROM usage WHERE hold_id = NEW.hold_id AND tab_id = NEW.tab_id
    )
    WHERE account_id = NEW.target_id AND NEW.source_id = 'revenue' AND charged >= NEW.amount
        + (SELECT coalesce(sum(amount), 0) FROM transfers WHERE hold_id = NEW.hold_id AND kind = 'refund')
)
BEGIN SELECT RAISE(ABORT, 'a refund is at most what its hold captured, and goes to the account that was charged'); END;

CREATE TRIGGER transfers_credit_customers BEFORE INSERT ON transfers WHEN NEW.kind = 'credit' AND NOT EXISTS (
    SELECT 1 FROM accounts WHERE kind = 'customer' AND (
        (account_id = NEW.target_id AND NEW.source_id = 'credit_source')
        OR (account_id = NEW.source_id AND NEW.target_id = 'credit_source')
    )
)
BEGIN SELECT RAISE(ABORT, 'a credit is between the credit source and a customer'); END;

CREATE TRIGGER transfers_pay_out_what_nodes_have BEFORE INSERT ON transfers WHEN NEW.kind = 'payout' AND NOT EXISTS (
    SELECT 1 FROM accounts
    WHERE account_id = NEW.source_id AND kind = 'node' AND balance >= NEW.amount AND NEW.target_id = 'payouts'
)
BEGIN SELECT RAISE(ABORT, 'a payout is at most what a node has'); END;

CREATE TRIGGER transfers_make_entries AFTER INSERT ON transfers
BEGIN
    INSERT INTO entries (account_id, transfer_id, amount)
    VALUES (NEW.source_id, NEW.transfer_id, -NEW.amount), (NEW.target_id, NEW.transfer_id, NEW.amount);
END;

CREATE TRIGGER transfers_stay BEFORE DELETE ON transfers
BEGIN SELECT RAISE(ABORT, 'transfers are append-only'); END;

CREATE TRIGGER transfers_never_change BEFORE UPDATE ON transfers
BEGIN SELECT RAISE(ABORT, 'transfers are append-only'); END;

CREATE TRIGGER transfers_follow_blocks AFTER INSERT ON transfers
WHEN NEW.transfer_id <= (SELECT max(last_transfer) FROM blocks)
BEGIN SELECT RAISE(ABORT, 'a transfer comes after all blocks'); END;

CREATE TRIGGER entries_follow_transfers BEFORE INSERT ON entries WHEN NOT EXISTS (
    SELECT 1 FROM transfers
    WHERE transfer_id = NEW.transfer_id
        AND NEW.amount = CASE NEW.account_id WHEN source_id THEN -amount WHEN target_id THEN amount END
)
BEGIN SELECT RAISE(ABORT, 'an entry is one side of its transfer'); END;

