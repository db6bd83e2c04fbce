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

-- Whether a key may hold so much more, with what it and all below it hold and have spent.
CREATE FUNCTION has_room(key keys, wanted BIGINT, now_ms BIGINT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$
DECLARE
    open_holds BIGINT;
    open_amount BIGINT;
    today BIGINT := now_ms / 86400000;
    first_day BIGINT;
BEGIN
    SELECT count(*), coalesce(sum(amount), 0) INTO open_holds, open_amount
    FROM holds WHERE key_id = key.key_id AND state = 'open';
    SELECT open_holds + coalesce(sum(holds), 0), open_amount + coalesce(sum(held), 0) INTO open_holds, open_amount
    FROM drawn WHERE key_id = key.key_id;
    IF key.concurrency <= open_holds
        OR key.budget_day < wanted + open_amount
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = key.key_id AND day = today)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = key.key_id AND day = today)
    THEN
        RETURN FALSE;
    END IF;
    IF key.budget_month IS NOT NULL THEN
        first_day := CAST(
            extract(epoch FROM date_trunc('month', to_timestamp(now_ms / 1000), 'UTC')) AS BIGINT
        ) / 86400;
        RETURN key.budget_month >= wanted + open_amount
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today);
    END IF;
    RETURN TRUE;
END $$;

-- A hold is placed only if the account covers it, and the key and all above it have room; no row otherwise. Holds of one
-- account are placed one after the other: whoever places them has locked it.
CREATE OR REPLACE FUNCTION need_room() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    key keys%ROWTYPE;
    above keys%ROWTYPE;
BEGIN
    SELECT * INTO key FROM keys WHERE key_id = NEW.key_id
        AND (concurrency IS NOT NULL OR budget_day IS NOT NULL OR budget_month IS NOT NULL OR parent_id IS NOT NULL);
    IF FOUND AND NOT has_room(key, NEW.amount, NEW.created_ms) THEN
        RETURN NULL;
    END IF;
    IF key.parent_id IS NOT NULL THEN
        FOR above IN
            SELECT keys.* FROM key_draws JOIN keys ON keys.key_id = from_id WHERE key_draws.key_id = NEW.key_id
                AND (concurrency IS NOT NULL OR budget_day IS NOT NULL OR budget_month IS NOT NULL)
        LOOP
            IF NOT has_room(above, NEW.amount, NEW.created_ms) THEN
                RETURN NULL;
            END IF;
        END LOOP;
    END IF;
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF key.parent_id IS NOT NULL THEN
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
    IF EXISTS (SELECT 1 FROM after JOIN key_draws USING (key_id)) THEN
        UPDATE drawn SET holds = drawn.holds - ended.holds, held = held - ended.amount
        FROM (
            SELECT from_id, count(*) AS holds, CAST(sum(amount) AS BIGINT) AS amount
            FROM after JOIN key_draws USING (key_id) WHERE state <> 'open' GROUP BY from_id
        ) AS ended
        WHERE drawn.key_id = ended.from_id;
    END IF;
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
    IF EXISTS (SELECT 1 FROM added JOIN key_draws USING (key_id)) THEN
        INSERT INTO drawn_days (key_id, day, cost)
        SELECT from_id, day, sum(cost) FROM added JOIN key_draws USING (key_id) GROUP BY from_id, day ORDER BY from_id, day
        ON CONFLICT (key_id, day) DO UPDATE SET cost = drawn_days.cost + excluded.cost;
    END IF;
    RETURN NULL;
END $$;
