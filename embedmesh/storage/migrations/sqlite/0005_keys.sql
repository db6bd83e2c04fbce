-- Runs before the new code. Keys that were made by keys draw from the limits and budgets of those above them.

ALTER TABLE keys ADD COLUMN parent_id TEXT REFERENCES keys;
CREATE INDEX keys_live ON keys (account_id, coalesce(expires_ms, 9223372036854775807)) WHERE revoked_ms IS NULL;

CREATE TRIGGER keys_have_a_good_parent BEFORE INSERT ON keys WHEN NEW.parent_id IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM keys WHERE key_id = NEW.parent_id AND account_id = NEW.account_id AND revoked_ms IS NULL
)
BEGIN SELECT RAISE(ABORT, 'a key is made by a good key of its account'); END;

-- Every key above a key, not its parent only: a trigger cannot climb.
CREATE TABLE key_draws (
    key_id TEXT NOT NULL REFERENCES keys,
    from_id TEXT NOT NULL REFERENCES keys,
    PRIMARY KEY (key_id, from_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX key_draws_from ON key_draws (from_id);

CREATE TRIGGER keys_draw AFTER INSERT ON keys WHEN NEW.parent_id IS NOT NULL
BEGIN
    INSERT INTO key_draws (key_id, from_id)
    SELECT NEW.key_id, NEW.parent_id UNION ALL SELECT NEW.key_id, from_id FROM key_draws WHERE key_id = NEW.parent_id;
END;

-- What all keys below a key hold now, and have spent by day. Sums, because there is no bound on how many were ever made.
CREATE TABLE drawn (
    key_id TEXT PRIMARY KEY REFERENCES keys,
    holds INTEGER NOT NULL CHECK (holds >= 0),
    held INTEGER NOT NULL CHECK (held >= 0)
) STRICT, WITHOUT ROWID;

CREATE TABLE drawn_days (
    key_id TEXT NOT NULL REFERENCES keys,
    day INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    PRIMARY KEY (key_id, day)
) STRICT, WITHOUT ROWID;

-- A hold is placed only if the account covers it, and the key and all above it have room; no row otherwise.
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
        OR budget_day < NEW.amount
            + (SELECT coalesce(sum(amount), 0) FROM holds WHERE key_id = counted AND state = 'open')
            + coalesce((SELECT held FROM drawn WHERE key_id = counted), 0)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day = NEW.created_ms / 86400000)
            + coalesce((SELECT cost FROM drawn_days WHERE key_id = counted AND day = NEW.created_ms / 86400000), 0)
        OR budget_month < NEW.amount
            + (SELECT coalesce(sum(amount), 0) FROM holds WHERE key_id = counted AND state = 'open')
            + coalesce((SELECT held FROM drawn WHERE key_id = counted), 0)
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

-- For keys that draw, and by themselves: what others need not run costs them a look.
CREATE TRIGGER holds_draw AFTER INSERT ON holds WHEN EXISTS (SELECT 1 FROM key_draws WHERE key_id = NEW.key_id)
BEGIN
    INSERT INTO drawn (key_id, holds, held) SELECT from_id, 1, NEW.amount FROM key_draws WHERE key_id = NEW.key_id
    ON CONFLICT (key_id) DO UPDATE SET holds = holds + 1, held = held + excluded.held;
END;

CREATE TRIGGER holds_draw_no_more AFTER UPDATE OF state ON holds
WHEN NEW.state <> 'open' AND EXISTS (SELECT 1 FROM key_draws WHERE key_id = OLD.key_id)
BEGIN
    UPDATE drawn SET holds = holds - 1, held = held - OLD.amount
    WHERE key_id IN (SELECT from_id FROM key_draws WHERE key_id = OLD.key_id);
END;

CREATE TRIGGER usage_draws AFTER INSERT ON usage WHEN EXISTS (SELECT 1 FROM key_draws WHERE key_id = NEW.key_id)
BEGIN
    INSERT INTO drawn_days (key_id, day, cost) SELECT from_id, NEW.day, NEW.cost FROM key_draws WHERE key_id = NEW.key_id
    ON CONFLICT (key_id, day) DO UPDATE SET cost = cost + excluded.cost;
END;
