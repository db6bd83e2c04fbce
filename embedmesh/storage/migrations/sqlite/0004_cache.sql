-- Runs before the new code. Whether an account's answers may come from the cache, and what they cost then.

ALTER TABLE accounts ADD COLUMN cache TEXT NOT NULL DEFAULT 'off'
    CHECK (cache IN ('off', 'charged', 'free')) CHECK (kind = 'customer' OR cache = 'off');

-- Gateways remember it with each key of the account.
CREATE TRIGGER accounts_tell AFTER UPDATE OF cache ON accounts WHEN OLD.cache <> NEW.cache
BEGIN UPDATE topics SET version = version + 1 WHERE topic = 'keys'; END;
