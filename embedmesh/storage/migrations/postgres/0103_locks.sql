-- Runs before the new code. Adds locks, with the same table as SQLite's script: see there for what it is for.

-- -- locks

CREATE TABLE locks (
    lock_id BIGINT PRIMARY KEY,
    hold_id TEXT NOT NULL UNIQUE REFERENCES holds,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    identity BYTEA NOT NULL CHECK (length(identity) = 32),
    node_key BYTEA NOT NULL CHECK (length(node_key) = 32),
    scheme TEXT NOT NULL,
    model TEXT NOT NULL,
    units BIGINT NOT NULL CHECK (units BETWEEN 1 AND 1000000000),
    price BIGINT NOT NULL CHECK (price BETWEEN 0 AND 1000000000000000),
    expires_ms BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    used_ms BIGINT CHECK (used_ms < expires_ms),
    used_by TEXT,
    CHECK ((used_ms IS NULL) = (used_by IS NULL))
);
-- With all that is counted, so that no row is looked at.
CREATE INDEX locks_unused_of_account ON locks (account_id, expires_ms, key_id, used_ms) WHERE used_ms IS NULL;
CREATE INDEX locks_unused ON locks (expires_ms) WHERE used_ms IS NULL;

-- The price is split, so that the product fits 64 bits.
CREATE FUNCTION lock_needs_a_hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.used_ms IS NOT NULL OR NOT EXISTS (
        SELECT 1 FROM holds
        WHERE hold_id = NEW.hold_id AND account_id = NEW.account_id AND key_id = NEW.key_id
            AND state NOT IN ('captured', 'released') AND deadline_ms = NEW.expires_ms
            AND amount >= NEW.units * (NEW.price / 1000000) + (NEW.units * (NEW.price % 1000000) + 999999) / 1000000
    ) THEN
        RAISE EXCEPTION 'a lock is opened with an open hold, which covers it until it expires'
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER locks_have_holds BEFORE INSERT ON locks FOR EACH ROW EXECUTE FUNCTION lock_needs_a_hold();

CREATE TRIGGER locks_keep_their_terms
BEFORE UPDATE OF lock_id, hold_id, account_id, key_id, node_id, identity, node_key, scheme, model, units, price, expires_ms,
    created_ms ON locks FOR EACH ROW EXECUTE FUNCTION refuse('a lock keeps its terms');

CREATE FUNCTION use_lock_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.used_ms IS NOT NULL OR NOT EXISTS (
        SELECT 1 FROM holds WHERE hold_id = OLD.hold_id AND state NOT IN ('captured', 'released')
    ) THEN
        RAISE EXCEPTION 'a lock is used once, while its hold is open' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER locks_are_used_once BEFORE UPDATE OF used_ms, used_by ON locks FOR EACH ROW
EXECUTE FUNCTION use_lock_once();

CREATE FUNCTION keep_lock() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM holds WHERE hold_id = OLD.hold_id AND state NOT IN ('captured', 'released')) THEN
        RAISE EXCEPTION 'a lock is kept until its hold has ended' USING ERRCODE = 'check_violation';
    END IF;
    RETURN OLD;
END $$;

CREATE TRIGGER locks_stay_with_open_holds BEFORE DELETE ON locks FOR EACH ROW EXECUTE FUNCTION keep_lock();
CREATE TRIGGER locks_stay_all BEFORE TRUNCATE ON locks
EXECUTE FUNCTION refuse('a lock is kept until its hold has ended');

-- -- holds

DROP TRIGGER holds_keep_their_terms ON holds;

CREATE TRIGGER holds_keep_their_terms BEFORE UPDATE OF hold_id, account_id, key_id, amount, created_ms ON holds FOR EACH ROW
EXECUTE FUNCTION refuse('a hold keeps its terms');

CREATE FUNCTION change_hands_by_a_lock() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM locks WHERE hold_id = OLD.hold_id AND used_ms IS NOT NULL AND expires_ms = OLD.deadline_ms
    ) THEN
        RAISE EXCEPTION 'a hold keeps its terms, unless its lock is used' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER holds_change_hands_by_a_lock BEFORE UPDATE OF owner, deadline_ms ON holds FOR EACH ROW
EXECUTE FUNCTION change_hands_by_a_lock();
