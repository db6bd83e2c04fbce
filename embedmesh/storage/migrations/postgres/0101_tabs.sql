-- Runs before the new code. Adds tabs, with the same tables as SQLite's script: see there for what each is for.

INSERT INTO changes (kind) VALUES ('tabs');

-- -- tabs

CREATE TABLE tabs (
    tab_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL REFERENCES keys,
    owner TEXT NOT NULL,
    amount BIGINT NOT NULL CHECK (amount BETWEEN 1 AND 4611686018427387904),
    captured BIGINT NOT NULL DEFAULT 0 CHECK (captured BETWEEN 0 AND amount),
    requests BIGINT NOT NULL DEFAULT 0 CHECK (requests >= 0),
    settlements BIGINT NOT NULL DEFAULT 0 CHECK (settlements BETWEEN 0 AND requests),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'closing', 'closed', 'expired', 'recovered')),
    opened_ms BIGINT NOT NULL,
    deadline_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    CHECK ((state IN ('open', 'closing')) = (ended_ms IS NULL))
) WITH (fillfactor = 60);  -- what is captured changes with each settlement
CREATE INDEX tabs_live ON tabs (deadline_ms) WHERE ended_ms IS NULL;
CREATE INDEX tabs_live_of_key ON tabs (account_id, key_id) WHERE ended_ms IS NULL;
CREATE INDEX tabs_recalled ON tabs (owner) WHERE state = 'closing';
CREATE INDEX tabs_of_dead_gateways ON tabs (ended_ms) WHERE state = 'recovered';

CREATE TRIGGER tabs_start_open BEFORE INSERT ON tabs FOR EACH ROW
WHEN (NEW.state <> 'open' OR NEW.captured <> 0 OR NEW.requests <> 0 OR NEW.settlements <> 0)
EXECUTE FUNCTION refuse('a tab starts open and unspent');

-- What a key holds, and all keys below it.
CREATE VIEW key_held AS SELECT
    key_id,
    CAST((SELECT coalesce(sum(amount), 0) FROM holds WHERE holds.key_id = keys.key_id AND state = 'open')
        + (SELECT coalesce(sum(amount - captured), 0) FROM tabs
            WHERE tabs.account_id = keys.account_id AND tabs.key_id = keys.key_id AND ended_ms IS NULL)
        + coalesce((SELECT drawn.held FROM drawn WHERE drawn.key_id = keys.key_id), 0) AS BIGINT) AS held
FROM keys;

-- Whether a key's budgets may hold `wanted` more, counting what it and all keys below it hold and have spent.
CREATE FUNCTION has_budget(key keys, wanted BIGINT, now_ms BIGINT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$
DECLARE
    all_held BIGINT;
    today BIGINT := now_ms / 86400000;
    first_day BIGINT;
BEGIN
    IF key.budget_day IS NULL AND key.budget_month IS NULL THEN
        RETURN TRUE;
    END IF;
    SELECT held INTO all_held FROM key_held WHERE key_id = key.key_id;
    IF key.budget_day < wanted + all_held
        + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = key.key_id AND day = today)
        + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = key.key_id AND day = today)
    THEN
        RETURN FALSE;
    END IF;
    IF key.budget_month IS NOT NULL THEN
        first_day := CAST(
            extract(epoch FROM date_trunc('month', to_timestamp(now_ms / 1000), 'UTC')) AS BIGINT
        ) / 86400;
        RETURN key.budget_month >= wanted + all_held
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today);
    END IF;
    RETURN TRUE;
END $$;

-- A tab is opened only if the account covers it, and the key and all keys above it have room. Otherwise there is no row.
CREATE FUNCTION tab_needs_room() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    counted keys%ROWTYPE;
BEGIN
    FOR counted IN
        SELECT keys.* FROM keys
        WHERE key_id = NEW.key_id AND (budget_day IS NOT NULL OR budget_month IS NOT NULL)
        UNION ALL SELECT keys.* FROM key_draws JOIN keys ON keys.key_id = from_id
        WHERE key_draws.key_id = NEW.key_id AND (budget_day IS NOT NULL OR budget_month IS NOT NULL)
    LOOP
        IF NOT has_budget(counted, NEW.amount, NEW.opened_ms) THEN
            RETURN NULL;
        END IF;
    END LOOP;
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    INSERT INTO drawn (key_id, holds, held) SELECT from_id, 0, NEW.amount FROM key_draws WHERE key_id = NEW.key_id
    ON CONFLICT (key_id) DO UPDATE SET held = drawn.held + excluded.held;
    RETURN NEW;
END $$;

CREATE TRIGGER tabs_need_room BEFORE INSERT ON tabs FOR EACH ROW EXECUTE FUNCTION tab_needs_room();

CREATE TRIGGER tabs_end_once BEFORE UPDATE ON tabs FOR EACH ROW
WHEN (OLD.state NOT IN ('open', 'closing')) EXECUTE FUNCTION refuse('a tab ends once');

CREATE TRIGGER tabs_move_on BEFORE UPDATE OF state ON tabs FOR EACH ROW
WHEN (NEW.state IN ('open', OLD.state)) EXECUTE FUNCTION refuse('a tab only moves on');

CREATE TRIGGER tabs_keep_their_terms
BEFORE UPDATE OF tab_id, account_id, key_id, owner, amount, opened_ms, deadline_ms ON tabs FOR EACH ROW
EXECUTE FUNCTION refuse('a tab keeps its terms');

CREATE TRIGGER tabs_only_grow BEFORE UPDATE OF captured, requests, settlements ON tabs FOR EACH ROW
WHEN (NEW.captured < OLD.captured OR NEW.requests < OLD.requests OR NEW.settlements < OLD.settlements)
EXECUTE FUNCTION refuse('what a tab has captured only grows');

CREATE TRIGGER tabs_stay BEFORE DELETE ON tabs FOR EACH ROW EXECUTE FUNCTION refuse('tabs are never deleted');
CREATE TRIGGER tabs_stay_all BEFORE TRUNCATE ON tabs EXECUTE FUNCTION refuse('tabs are never deleted');

-- What tabs hold less: what was captured, and at their end the rest.
CREATE FUNCTION tabs_hold_less() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE accounts SET held = held - less.amount
    FROM (
        SELECT account_id, CAST(sum(rest) AS BIGINT) AS amount FROM (
            SELECT account_id, amount - captured AS rest FROM before WHERE ended_ms IS NULL
            UNION ALL SELECT account_id, captured - amount FROM after WHERE ended_ms IS NULL
        ) AS rests GROUP BY account_id
    ) AS less
    WHERE accounts.account_id = less.account_id AND less.amount <> 0;
    IF EXISTS (SELECT 1 FROM after JOIN key_draws USING (key_id)) THEN
        UPDATE drawn SET held = held - less.amount
        FROM (
            SELECT from_id, CAST(sum(rest) AS BIGINT) AS amount FROM (
                SELECT key_id, amount - captured AS rest FROM before WHERE ended_ms IS NULL
                UNION ALL SELECT key_id, captured - amount FROM after WHERE ended_ms IS NULL
            ) AS rests JOIN key_draws USING (key_id) GROUP BY from_id
        ) AS less
        WHERE drawn.key_id = less.from_id AND less.amount <> 0;
    END IF;
    -- A gateway hears that a tab of its own is asked for, and whoever asked hears that it has ended.
    IF EXISTS (SELECT 1 FROM after WHERE state = 'closing')
        OR EXISTS (SELECT 1 FROM before JOIN after USING (tab_id) WHERE before.state = 'closing' AND after.ended_ms IS NOT NULL)
    THEN
        UPDATE changes SET version = version + 1 WHERE kind = 'tabs';
        PERFORM pg_notify('embedmesh', 'tabs');
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER tabs_give_back AFTER UPDATE ON tabs REFERENCING OLD TABLE AS before NEW TABLE AS after
FOR EACH STATEMENT EXECUTE FUNCTION tabs_hold_less();

-- -- holds count what tabs hold

CREATE OR REPLACE FUNCTION has_room(key keys, wanted BIGINT, now_ms BIGINT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$
BEGIN
    IF key.concurrency <= (SELECT count(*) FROM holds WHERE key_id = key.key_id AND state = 'open')
        + (SELECT coalesce(sum(holds), 0) FROM drawn WHERE key_id = key.key_id)
    THEN
        RETURN FALSE;
    END IF;
    RETURN has_budget(key, wanted, now_ms);
END $$;

-- -- usage

ALTER TABLE usage DROP CONSTRAINT usage_hold_id_fkey;
ALTER TABLE usage ADD COLUMN tab_id TEXT;
ALTER TABLE usage ADD COLUMN settlement BIGINT CHECK (settlement > 0);
ALTER TABLE usage ADD CONSTRAINT usage_of_a_tab_is_settled CHECK ((tab_id IS NULL) = (settlement IS NULL));
CREATE INDEX usage_of_settlement ON usage (tab_id, settlement) WHERE tab_id IS NOT NULL;
DROP INDEX usage_by_day;

CREATE OR REPLACE FUNCTION add_usage_up() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT 1 FROM added WHERE tab_id IS NULL AND NOT EXISTS (SELECT 1 FROM holds WHERE holds.hold_id = added.hold_id AND holds.account_id = added.account_id)
    ) THEN
        RAISE EXCEPTION 'usage is of a hold or of a tab' USING ERRCODE = 'check_violation';
    END IF;
    INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    SELECT key_id, day, model, min(account_id), count(*), sum(tokens), sum(cost) FROM added
    GROUP BY key_id, day, model ORDER BY key_id, day, model
    ON CONFLICT (key_id, day, model) DO UPDATE SET
        requests = usage_days.requests + excluded.requests, tokens = usage_days.tokens + excluded.tokens,
        cost = usage_days.cost + excluded.cost;
    IF EXISTS (SELECT 1 FROM added JOIN key_draws USING (key_id)) THEN
        INSERT INTO drawn_days (key_id, day, cost)
        SELECT from_id, day, sum(cost) FROM added JOIN key_draws USING (key_id) GROUP BY from_id, day ORDER BY from_id, day
        ON CONFLICT (key_id, day) DO UPDATE SET cost = drawn_days.cost + excluded.cost;
    END IF;
    RETURN NULL;
END $$;

-- -- transfers

ALTER TABLE transfers DROP CONSTRAINT transfers_hold_id_fkey;
ALTER TABLE transfers DROP CONSTRAINT transfers_check1;
ALTER TABLE transfers ADD COLUMN tab_id TEXT;
ALTER TABLE transfers ADD COLUMN settlement BIGINT;
ALTER TABLE transfers ADD COLUMN requests BIGINT CHECK (requests > 0);
ALTER TABLE transfers ADD COLUMN digest TEXT CHECK (length(digest) = 64);
ALTER TABLE transfers ADD CONSTRAINT transfers_are_of_a_hold_or_a_tab CHECK (CASE
    WHEN kind IN ('credit', 'payout') THEN hold_id IS NULL AND tab_id IS NULL
    WHEN kind = 'refund' THEN hold_id IS NOT NULL
    ELSE (hold_id IS NULL) <> (tab_id IS NULL)
END);
ALTER TABLE transfers ADD CONSTRAINT transfers_of_a_tab_settle CHECK (
    (settlement IS NOT NULL) = (tab_id IS NOT NULL AND kind IN ('charge', 'payable'))
    AND (requests IS NOT NULL) = (tab_id IS NOT NULL AND kind = 'charge')
    AND (digest IS NOT NULL) = (tab_id IS NOT NULL AND kind = 'charge')
);
ALTER TABLE transfers DROP CONSTRAINT transfers_reference_key;
CREATE UNIQUE INDEX transfers_once_a_reference ON transfers (reference) WHERE reference IS NOT NULL;
CREATE UNIQUE INDEX transfers_once_a_settlement ON transfers (tab_id, settlement, kind, target_id)
WHERE settlement IS NOT NULL;

-- A settlement is of a live tab, follows the tab's last one, and is exactly its usage records.
CREATE FUNCTION check_settlement(settled transfers) RETURNS VOID LANGUAGE plpgsql AS $$
DECLARE
    tab tabs%ROWTYPE;
BEGIN
    SELECT * INTO tab FROM tabs WHERE tab_id = settled.tab_id AND state IN ('open', 'closing');
    IF NOT FOUND OR tab.account_id <> settled.source_id OR settled.target_id <> 'revenue'
        OR tab.settlements + 1 <> settled.settlement
    THEN
        RAISE EXCEPTION 'a settlement is of a live tab, and goes to revenue' USING ERRCODE = 'check_violation';
    END IF;
    IF NOT EXISTS (
        SELECT 1 FROM usage WHERE tab_id = settled.tab_id AND settlement = settled.settlement
        HAVING count(*) = settled.requests AND sum(cost) = settled.amount
            AND bool_and(account_id = tab.account_id AND key_id = tab.key_id)
    ) THEN
        RAISE EXCEPTION 'a settlement is what its usage records add up to' USING ERRCODE = 'check_violation';
    END IF;
END $$;

CREATE OR REPLACE FUNCTION check_transfer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.transfer_id <= (SELECT max(last_transfer) FROM blocks) THEN
        RAISE EXCEPTION 'a transfer comes after all blocks' USING ERRCODE = 'check_violation';
    ELSIF NEW.kind = 'charge' THEN
        IF NEW.tab_id IS NOT NULL THEN
            PERFORM check_settlement(NEW);
        ELSIF NOT EXISTS (
            SELECT 1 FROM holds WHERE hold_id = NEW.hold_id AND account_id = NEW.source_id
                AND captured = NEW.amount AND NEW.target_id = 'revenue'
        ) THEN
            RAISE EXCEPTION 'a charge is what its hold captured, and goes to revenue' USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NEW.kind = 'payable' THEN
        IF NEW.source_id <> 'revenue' OR NOT EXISTS (
            SELECT 1 FROM accounts WHERE account_id = NEW.target_id AND kind = 'node'
        ) OR NOT EXISTS (
            SELECT 1 FROM holds WHERE hold_id = NEW.hold_id
            UNION ALL SELECT 1 FROM tabs WHERE tab_id = NEW.tab_id
        ) THEN
            RAISE EXCEPTION 'a payable goes from revenue to a node, for a hold or a settlement'
                USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NEW.kind = 'refund' THEN
        IF NOT EXISTS (
            SELECT 1 FROM (
                SELECT account_id, captured AS charged FROM holds WHERE hold_id = NEW.hold_id AND NEW.tab_id IS NULL
                UNION ALL SELECT account_id, cost FROM usage WHERE hold_id = NEW.hold_id AND tab_id = NEW.tab_id
            ) AS request
            WHERE account_id = NEW.target_id AND NEW.source_id = 'revenue' AND charged >= NEW.amount
                + (SELECT coalesce(sum(amount), 0) FROM transfers WHERE hold_id = NEW.hold_id AND kind = 'refund')
        ) THEN
            RAISE EXCEPTION 'a refund is at most what its hold captured, and goes to the account that was charged'
                USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NEW.kind = 'credit' THEN
        IF NOT EXISTS (
            SELECT 1 FROM accounts WHERE kind = 'customer' AND (
                (account_id = NEW.target_id AND NEW.source_id = 'credit_source')
                OR (account_id = NEW.source_id AND NEW.target_id = 'credit_source')
            )
        ) THEN
            RAISE EXCEPTION 'a credit is between the credit source and a customer' USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NOT EXISTS (
        SELECT 1 FROM accounts
        WHERE account_id = NEW.source_id AND kind = 'node' AND balance >= NEW.amount AND NEW.target_id = 'payouts'
    ) THEN
        RAISE EXCEPTION 'a payout is at most what a node has' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

-- Tabs that were settled have captured that much more. Before the entries: a balance covers what is held at any time.
CREATE OR REPLACE FUNCTION make_entries() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM added WHERE settlement IS NOT NULL) THEN
        UPDATE tabs SET captured = captured + settled.amount, requests = tabs.requests + settled.requests,
            settlements = settled.settlement
        FROM added AS settled WHERE tabs.tab_id = settled.tab_id AND settled.kind = 'charge';
    END IF;
    INSERT INTO entries (account_id, transfer_id, amount)
    SELECT source_id, transfer_id, -amount FROM added UNION ALL SELECT target_id, transfer_id, amount FROM added;
    RETURN NULL;
END $$;
