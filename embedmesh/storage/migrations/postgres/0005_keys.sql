-- Runs before the new code. Keys that were made by keys draw from the limits and budgets of those above them: see
-- SQLite's script for what each table is.

ALTER TABLE keys ADD COLUMN parent_id TEXT REFERENCES keys;
CREATE INDEX keys_live ON keys (account_id, coalesce(expires_ms, 9223372036854775807)) WHERE revoked_ms IS NULL;

CREATE FUNCTION need_a_good_parent() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM keys WHERE key_id = NEW.parent_id AND account_id = NEW.account_id AND revoked_ms IS NULL
    ) THEN
        RAISE EXCEPTION 'a key is made by a good key of its account' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER keys_have_a_good_parent BEFORE INSERT ON keys FOR EACH ROW WHEN (NEW.parent_id IS NOT NULL)
EXECUTE FUNCTION need_a_good_parent();

CREATE TABLE key_draws (
    key_id TEXT NOT NULL REFERENCES keys,
    from_id TEXT NOT NULL REFERENCES keys,
    PRIMARY KEY (key_id, from_id)
);
CREATE INDEX key_draws_from ON key_draws (from_id);

CREATE FUNCTION draw() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_draws (key_id, from_id)
    SELECT NEW.key_id, NEW.parent_id UNION ALL SELECT NEW.key_id, from_id FROM key_draws WHERE key_id = NEW.parent_id;
    RETURN NULL;
END $$;

CREATE TRIGGER keys_draw AFTER INSERT ON keys FOR EACH ROW WHEN (NEW.parent_id IS NOT NULL) EXECUTE FUNCTION draw();

CREATE TABLE drawn (
    key_id TEXT PRIMARY KEY REFERENCES keys,
    holds BIGINT NOT NULL CHECK (holds >= 0),
    held BIGINT NOT NULL CHECK (held >= 0)
) WITH (fillfactor = 60);

CREATE TABLE drawn_days (
    key_id TEXT NOT NULL REFERENCES keys,
    day BIGINT NOT NULL,
    cost BIGINT NOT NULL,
    PRIMARY KEY (key_id, day)
) WITH (fillfactor = 60);

-- A hold is placed only if the account covers it, and the key and all above it have room; no row otherwise. Holds of one
-- account are placed one after the other: whoever places them has locked it.
CREATE OR REPLACE FUNCTION need_room() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    key RECORD;
    draws BOOLEAN := FALSE;
    open_holds BIGINT;
    open_amount BIGINT;
    spent BIGINT;
    today BIGINT := NEW.created_ms / 86400000;
    first_day BIGINT;
BEGIN
    FOR key IN
        SELECT key_id, concurrency, budget_day, budget_month
        FROM (
            SELECT NEW.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_id = NEW.key_id
        ) AS all_counted JOIN keys ON key_id = counted
    LOOP
        draws := draws OR key.key_id <> NEW.key_id;
        CONTINUE WHEN coalesce(key.concurrency, key.budget_day, key.budget_month) IS NULL;
        SELECT count(*), coalesce(sum(amount), 0) INTO open_holds, open_amount
        FROM holds WHERE key_id = key.key_id AND state = 'open';
        SELECT open_holds + holds, open_amount + held INTO open_holds, open_amount
        FROM (SELECT coalesce(sum(holds), 0) AS holds, coalesce(sum(held), 0) AS held
            FROM drawn WHERE key_id = key.key_id) AS below;
        IF key.concurrency <= open_holds THEN
            RETURN NULL;
        END IF;
        IF key.budget_day IS NOT NULL THEN
            SELECT coalesce(sum(cost), 0) INTO spent FROM (
                SELECT cost FROM usage_days WHERE key_id = key.key_id AND day = today
                UNION ALL SELECT cost FROM drawn_days WHERE key_id = key.key_id AND day = today
            ) AS costs;
            IF key.budget_day < NEW.amount + open_amount + spent THEN
                RETURN NULL;
            END IF;
        END IF;
        IF key.budget_month IS NOT NULL THEN
            first_day := CAST(
                extract(epoch FROM date_trunc('month', to_timestamp(NEW.created_ms / 1000), 'UTC')) AS BIGINT
            ) / 86400;
            SELECT coalesce(sum(cost), 0) INTO spent FROM (
                SELECT cost FROM usage_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today
                UNION ALL SELECT cost FROM drawn_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today
            ) AS costs;
            IF key.budget_month < NEW.amount + open_amount + spent THEN
                RETURN NULL;
            END IF;
        END IF;
    END LOOP;
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF draws THEN
        INSERT INTO drawn (key_id, holds, held) SELECT from_id, 1, NEW.amount FROM key_draws WHERE key_id = NEW.key_id
        ON CONFLICT (key_id) DO UPDATE SET holds = drawn.holds + 1, held = drawn.held + excluded.held;
    END IF;
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION give_back() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE accounts SET held = held - ended.amount
    FROM (
        SELECT account_id, CAST(sum(amount) AS BIGINT) AS amount FROM after WHERE state <> 'open' GROUP BY account_id
    ) AS ended
    WHERE accounts.account_id = ended.account_id;
    UPDATE drawn SET holds = drawn.holds - ended.holds, held = held - ended.amount
    FROM (
        SELECT from_id, count(*) AS holds, CAST(sum(amount) AS BIGINT) AS amount FROM after JOIN key_draws USING (key_id)
        WHERE state <> 'open' GROUP BY from_id
    ) AS ended
    WHERE drawn.key_id = ended.from_id;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION add_usage_up() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    SELECT key_id, day, model, min(account_id), count(*), sum(tokens), sum(cost) FROM added
    GROUP BY key_id, day, model ORDER BY key_id, day, model
    ON CONFLICT (key_id, day, model) DO UPDATE SET
        requests = usage_days.requests + excluded.requests, tokens = usage_days.tokens + excluded.tokens,
        cost = usage_days.cost + excluded.cost;
    INSERT INTO drawn_days (key_id, day, cost)
    SELECT from_id, day, sum(cost) FROM added JOIN key_draws USING (key_id) GROUP BY from_id, day ORDER BY from_id, day
    ON CONFLICT (key_id, day) DO UPDATE SET cost = drawn_days.cost + excluded.cost;
    RETURN NULL;
END $$;
